from __future__ import annotations

import pytest
import torch

from editors.keys import mean_over_contexts, read_keys, read_sites
from editors.prefixes import Prefixes
from editors.rows import request_rows
from lab import prefill
from lab.arch import Role
from lab.errors import ConfigError
from lab.records import EditRequest
from lab.tokens import pad_rows
from lab.trace import Site, trace
from tests.tiny import tiny_handle

CONTEXTS = Prefixes.of(["{}", "The guitar plays on and on. {}", "The guitar plays no more. {}", "I. {}"])
REQUESTS = [
    EditRequest("a", "The capital of {} is", "France", "Rome"),
    EditRequest("b", "The capital of {} is", "Japan", "Rome"),
    EditRequest("c", "{}", "Kenya", "Rome"),
    EditRequest("d", "The mother tongue of {} is the language", "Danielle Darrieux", "English"),
]


@pytest.mark.parametrize("family", ["gpt2", "opt", "llama", "gemma3"])
def test_shared_contexts_give_the_keys_of_each_row_alone(family, monkeypatch):
    handle = tiny_handle(family, dtype=torch.float64, layers=3)
    rows = [row for request in REQUESTS for row in request_rows(handle, request, CONTEXTS.flat)]
    sites = [Site(Role.MLP_OUT, 1, "in"), Site(Role.BLOCK, 0)]
    fed = []
    begin = prefill.begin
    monkeypatch.setattr("editors.keys.begin", lambda h, r, s: (fed.extend(map(len, r)), begin(h, r, s))[1])
    together = read_sites(handle, rows, sites, Site(Role.MLP_OUT, 1))
    assert sum(fed) < 0.8 * sum(len(row.prompt) for row in rows)
    for index, row in enumerate(rows):
        with trace(handle, reads=tuple(sites)) as recording:
            recording.run(pad_rows([row.prompt], 0))
        for site in sites:
            assert torch.allclose(together[site][index], recording[site][0, -1], atol=1e-12, rtol=0)


def test_keys_are_what_the_down_projection_reads():
    handle = tiny_handle("llama", dtype=torch.float64, layers=3)
    rows = request_rows(handle, REQUESTS[0], CONTEXTS.flat)
    read = read_keys(handle, rows, [0, 2])
    for layer in (0, 2):
        weight = handle.weight(Role.MLP_OUT, layer).canonical()
        assert torch.allclose(read[layer].keys @ weight.T, read[layer].values, atol=1e-12, rtol=0)
    mean = mean_over_contexts(read[0].keys, CONTEXTS.weights("mean"))
    assert torch.allclose(mean[0], read[0].keys.mean(dim=0), atol=1e-14, rtol=0)
    with pytest.raises(ConfigError):
        read_keys(handle, rows, [])
