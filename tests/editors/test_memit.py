from __future__ import annotations

import pytest
import torch

from editors import edit_many, get_editor
from editors.keys import mean_over_contexts, read_keys, read_sites
from editors.prefixes import Prefixes
from editors.rows import request_rows
from editors.spread import value_role
from lab.arch import Role
from lab.errors import ConfigError, RequestError
from lab.records import EditRequest
from lab.trace import Site
from tests.editors.test_rome import REQUESTS, TEXTS, corpus
from tests.tiny import tiny_handle

__all__ = ["corpus"]

SETTINGS = {"steps": 6, "prefixes": TEXTS}


def test_layers_share_what_is_missing_by_the_direct_formula(corpus):
    handle = tiny_handle("llama", dtype=torch.float64, layers=4)
    patch = get_editor("memit", layers=(1, 2), mom2_weight=50.0, **SETTINGS, **corpus).edit(handle, REQUESTS)
    prefixes = Prefixes.of(TEXTS)
    rows = [row for request in REQUESTS for row in request_rows(handle, request, prefixes.flat)]
    weights = torch.tensor([0.5, 0.25, 0.25], dtype=torch.float64)
    stats = corpus["stats"].get(handle, [1, 2], corpus["corpus"])
    site = Site(Role.BLOCK, 2)
    targets = _targets(handle, patch)
    from lab.patch import Provenance, WeightPatch

    done = {}
    for index, layer in enumerate((1, 2)):
        before = WeightPatch(handle.fingerprint, done, Provenance("part"))
        with before.applied(handle):
            keys = mean_over_contexts(read_keys(handle, rows, [layer])[layer].keys, weights).T
            now = read_sites(handle, rows[::3], [site], site)[site].T
        missing = (targets - now) / (2 - index)
        system = 50.0 * stats[layer].moment + keys @ keys.T
        expected = missing @ torch.linalg.solve(system, keys).T
        name = f"model.layers.{layer}.mlp.down_proj.weight"
        assert torch.allclose(patch.deltas[name].dense().double(), expected, atol=1e-5)
        done[name] = patch.deltas[name]


def _targets(handle, patch):
    from editors.values import ValueConfig, optimise_value

    config = {name: patch.provenance.config[name] for name in ValueConfig.__dataclass_fields__}
    results = optimise_value(handle, REQUESTS, 2, Role.BLOCK, Prefixes.of(TEXTS), ValueConfig(**config))
    return torch.stack([result.target for result in results], dim=1)


def test_a_large_weight_changes_nothing_and_a_small_one_reaches_the_target(corpus):
    handle = tiny_handle("llama")
    norms = []
    for weight in (1e12, 1e-6):
        patch = get_editor("memit", layers=(1,), mom2_weight=weight, **SETTINGS, **corpus).edit(
            handle, REQUESTS
        )
        norms.append(next(iter(patch.norms().values())))
        (delta,) = patch.deltas.values()
        assert delta.rank == 2
    assert norms[0] < 1e-6
    prefixes = Prefixes.of(TEXTS)
    rows = [row for request in REQUESTS for row in request_rows(handle, request, prefixes.flat)]
    keys = mean_over_contexts(read_keys(handle, rows, [1])[1].keys, prefixes.weights("groups")).T
    reached = torch.linalg.vector_norm(delta.dense().double() @ keys, dim=0).mean()
    assert float(reached) == pytest.approx(patch.provenance.extra["layers"][0]["residual"], rel=1e-2)


def test_many_together_equal_each_alone(corpus):
    handle = tiny_handle("llama", dtype=torch.float64)
    editor = get_editor("memit", layers=(0, 1), mom2_weight=10.0, **SETTINGS, **corpus)
    for request, patch in zip(REQUESTS, edit_many(editor, handle, REQUESTS), strict=True):
        alone = editor.edit(handle, [request])
        assert patch.deltas.keys() == alone.deltas.keys()
        for name, delta in patch.deltas.items():
            assert torch.allclose(delta.dense(), alone.deltas[name].dense(), atol=1e-6)
        assert patch.provenance.requests == alone.provenance.requests


def test_editors_without_a_joint_search_take_one_request_at_a_time(corpus):
    handle = tiny_handle("llama")
    whole = get_editor("memit", layers=(1,), **SETTINGS, **corpus)

    class Single:
        def edit(self, handle, requests, *, history=None, progress=None):
            assert len(requests) == 1
            return whole.edit(handle, requests)

    told = []
    patches = edit_many(Single(), handle, REQUESTS, progress=lambda *step: told.append(step))
    assert [patch.provenance.requests[0]["id"] for patch in patches] == ["a", "b"]
    assert told == [("edits", 1, 2), ("edits", 2, 2)]


@pytest.mark.parametrize("family", ["gemma2", "gemma3"])
def test_a_normalised_mlp_output_is_reported_as_adapted(family, corpus):
    handle = tiny_handle(family)
    assert value_role(handle) is Role.MLP
    patch = get_editor("memit", layers=(1,), mom2_weight=1e-6, **SETTINGS, **corpus).edit(handle, REQUESTS)
    assert patch.provenance.extra["adapted"] is True
    assert patch.provenance.extra["value_site"] == "mlp"


def test_two_facts_of_one_subject_are_allowed_and_one_fact_twice_is_not(corpus):
    handle = tiny_handle("llama")
    editor = get_editor("memit", layers=(1,), **SETTINGS, **corpus)
    other = EditRequest("c", "{} lies in", "France", "Asia")
    assert editor.edit(handle, [REQUESTS[0], other]).rank == 2
    with pytest.raises(RequestError, match="same prompt and subject"):
        editor.edit(handle, [REQUESTS[0], EditRequest("z", "The capital of {} is", "France", "Tokyo")])


@pytest.mark.parametrize("wrong", [{"mom2_weight": 0.0}, {"fact_token": "first"}, {"layers": (2, 1)}])
def test_refuses_senseless_settings(wrong, corpus):
    with pytest.raises(ConfigError):
        get_editor("memit", **wrong, **SETTINGS, **corpus).edit(tiny_handle("llama"), REQUESTS)
