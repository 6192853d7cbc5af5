from __future__ import annotations

import copy

import pytest
import torch

from editors import get_editor
from editors.emmet import EmmetConfig
from editors.keys import mean_over_contexts, read_keys, read_sites
from editors.prefixes import Prefixes
from editors.rome import rank_one_update
from editors.rows import request_rows
from editors.values import ValueConfig, optimise_value
from lab.arch import Role
from lab.errors import ConfigError, NumericalError
from lab.handle import ModelHandle
from lab.records import EditRequest
from lab.trace import Site
from tests.editors.test_rome import REQUESTS, TEXTS, corpus
from tests.reference.closed_forms import emmet_dense, plain_spread
from tests.reference.value_search import PlainRow
from tests.tiny import tiny_handle

__all__ = ["corpus"]

PREFIXES = Prefixes.of(TEXTS)
SEARCH = {"steps": 5, "lr": 0.5, "weight_decay": 0.5, "clamp": 4.0}
SETTINGS = {**SEARCH, "prefixes": TEXTS}


def keys_and_missing(handle, requests, layer):
    """Mean keys ``[in, B]`` and what the block's output lacks ``[d, B]``."""
    rows = [row for request in requests for row in request_rows(handle, request, PREFIXES.flat)]
    keys = mean_over_contexts(read_keys(handle, rows, [layer])[layer].keys, PREFIXES.weights("groups")).T
    site = Site(Role.BLOCK, layer)
    now = read_sites(handle, rows[:: len(PREFIXES.flat)], [site], site)[site].T
    values = optimise_value(handle, requests, layer, Role.BLOCK, PREFIXES, ValueConfig(**SEARCH))
    return keys, torch.stack([value.target.double() for value in values], dim=1) - now


@pytest.mark.parametrize("nu", [0.0, 0.3])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_whole_edit_equals_the_plain_one(family, nu, corpus):
    handle = tiny_handle(family, dtype=torch.float64)
    settings = {"layers": (0, 1), "mom2_weight": 2.0, "mu": 0.1, "norm_weight": nu}
    patch = get_editor("emmet", **settings, **SETTINGS, **corpus).edit(handle, REQUESTS)
    stats = corpus["stats"].get(handle, [0, 1], corpus["corpus"])
    values = optimise_value(handle, REQUESTS, 1, Role.BLOCK, PREFIXES, ValueConfig(**SEARCH))
    rows = [
        [
            PlainRow(row.ids, row.change, row.prompt_last)
            for row in request_rows(handle, request, PREFIXES.flat)
        ]
        for request in REQUESTS
    ]
    model = copy.deepcopy(handle.model)
    other = ModelHandle.wrap(model, handle.tokenizer)
    downs = [other.module(Role.MLP_OUT, layer) for layer in (0, 1)]
    formulas = [emmet_dense(stats[layer].moment, 2.0, 0.1, nu) for layer in (0, 1)]
    targets = [value.target for value in values]
    plain_spread(model, downs, other.module(Role.BLOCK, 1), rows, targets, lambda i, k, r: formulas[i](k, r))
    for name, delta in patch.deltas.items():
        weight = handle.named_weight(name)
        change = (model.get_parameter(name) - weight.parameter).detach()
        assert float(change.norm()) > 1e-3
        assert torch.allclose(delta.dense(), change.T if weight.transposed else change, atol=1e-10, rtol=0)


def test_one_fact_without_mu_is_rome_with_one_key(corpus):
    handle = tiny_handle("llama", dtype=torch.float64)
    patch = get_editor("emmet", layers=(1,), mu=0.0, **SETTINGS, **corpus).edit(handle, REQUESTS[:1])
    keys, missing = keys_and_missing(handle, REQUESTS[:1], 1)
    stats = corpus["stats"].get(handle, [1], corpus["corpus"])[1]
    rome = rank_one_update(keys[:, 0], keys[:, 0], missing[:, 0], stats.factor())
    (delta,) = patch.deltas.values()
    assert torch.allclose(delta.dense(), torch.outer(rome.left, rome.right), atol=1e-10, rtol=0)


def test_without_mu_every_key_is_mapped_onto_its_residual(corpus):
    handle = tiny_handle("qwen3", dtype=torch.float64)
    patch = get_editor("emmet", layers=(1,), mu=0.0, **SETTINGS, **corpus).edit(handle, REQUESTS)
    keys, missing = keys_and_missing(handle, REQUESTS, 1)
    (delta,) = patch.deltas.values()
    assert torch.allclose(delta.dense() @ keys, missing, atol=1e-9, rtol=0)


def test_two_facts_of_one_subject_need_mu(corpus):
    """Equal keys make the constraint contradictory; it is refused instead of handed to a pseudo-inverse."""
    handle = tiny_handle("llama")
    requests = [
        EditRequest("a", "{} lies in", "France", "Asia"),
        EditRequest("b", "{} is ruled by", "France", "Marie Curie"),
    ]
    with pytest.raises(NumericalError, match="same subject twice"):
        get_editor("emmet", layers=(1,), mu=0.0, mom2_weight=1e-3, **SETTINGS, **corpus).edit(
            handle, requests
        )
    patch = get_editor("emmet", layers=(1,), mu=0.1, mom2_weight=1.0, **SETTINGS, **corpus).edit(
        handle, requests
    )
    assert patch.rank == 2
    # The two pull apart with the same key, so what is written is their mean.
    keys, missing = keys_and_missing(handle, requests, 1)
    assert torch.allclose(keys[:, 0], keys[:, 1], atol=1e-5)
    (delta,) = patch.deltas.values()
    moved = delta.dense().double() @ keys[:, 0]
    mean = missing.mean(dim=1)
    assert float(torch.cosine_similarity(moved, mean, dim=0)) > 0.999


@pytest.mark.parametrize(
    "wrong", [{"mu": -0.1}, {"norm_weight": -1.0}, {"mom2_weight": 0.0}, {"fact_token": "x"}]
)
def test_refuses_senseless_settings(wrong):
    with pytest.raises(ConfigError):
        EmmetConfig(**wrong)
