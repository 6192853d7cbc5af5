from __future__ import annotations

import copy
import dataclasses
import math

import pytest
import torch

from editors import get_editor
from editors.easing import Easing, targets_reached
from editors.pmet import PmetConfig
from editors.prefixes import Prefixes
from editors.rows import FactToken, essence_row, request_rows
from editors.values import ValueConfig, optimise_value
from lab.arch import Role
from lab.errors import ConfigError
from lab.handle import ModelHandle
from lab.records import EditRequest
from tests.editors.test_rome import REQUESTS, TEXTS, corpus
from tests.reference.closed_forms import memit_dense, plain_spread
from tests.reference.joint_search import plain_joint_search
from tests.reference.value_search import PlainRow
from tests.tiny import tiny_handle, tiny_model, tiny_tokenizer

__all__ = ["corpus"]

PREFIXES = Prefixes.of(TEXTS)
TAPS = (Role.MLP, Role.ATTN)
SAYABLE = EditRequest("p", "The capital of {} is", "France", "Paris")
"""A target of one token, which a shift at the last token can make the likeliest one."""
CONFIG = ValueConfig(steps=8, lr=0.3, weight_decay=0.3, clamp=1.0, kl_factor=1.0)


def plain_rows(handle, request, token: FactToken = "subject_last"):
    return [
        PlainRow(row.ids, row.change, row.prompt_last, row.targets)
        for row in request_rows(handle, request, PREFIXES.flat, token)
    ]


def plain(handle, request, layer, config, token: FactToken = "subject_last", nll_factor=1.0):
    essence = essence_row(handle, request, token)
    return plain_joint_search(
        handle.model,
        (handle.module(Role.MLP_OUT, layer), handle.module(Role.ATTN_OUT, layer)),
        plain_rows(handle, request, token),
        PlainRow(essence.ids, essence.change, essence.prompt_last),
        nll_factor=nll_factor,
        **dataclasses.asdict(config),
    )


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
def test_both_deltas_equal_the_plain_search(family):
    handle = tiny_handle(family, dtype=torch.float64)
    if family == "gpt2":
        handle.model.set_attn_implementation("eager")
    (fast,) = optimise_value(handle, REQUESTS[1:], 1, TAPS, PREFIXES, CONFIG, easing=Easing())
    slow = plain(handle, REQUESTS[1], 1, CONFIG)
    assert min(float(delta.norm()) for delta in slow.deltas) > 0.05
    assert torch.allclose(fast.delta, slow.deltas[0], atol=1e-10, rtol=0)
    assert torch.allclose(fast.beside[0], slow.deltas[1], atol=1e-10, rtol=0)
    assert torch.allclose(fast.init, slow.inits[0], atol=1e-12, rtol=0)
    assert [step.total for step in fast.losses] == pytest.approx(slow.losses, abs=1e-10)
    # Each is clamped to its own norm.
    for delta, init in zip(slow.deltas, slow.inits, strict=True):
        assert float(delta.norm()) <= float(init.norm()) * (1 + 1e-12)


@pytest.mark.parametrize("family", ["gptj", "opt"])
def test_both_deltas_equal_the_plain_search_in_fp32(family):
    handle = tiny_handle(family)
    (fast,) = optimise_value(handle, REQUESTS[:1], 1, TAPS, PREFIXES, CONFIG, easing=Easing())
    slow = plain(handle, REQUESTS[0], 1, CONFIG)
    for found, expected in ((fast.delta, slow.deltas[0]), (fast.beside[0], slow.deltas[1])):
        assert float((found - expected).norm() / expected.norm()) < 1e-3


def test_a_target_that_is_said_weighs_less_and_may_end_the_search():
    handle = tiny_handle("llama", dtype=torch.float64, scale=1.5)
    held = dataclasses.replace(
        CONFIG, steps=12, lr=0.5, clamp=20.0, weight_decay=0.01, kl_factor=0.5, stop_below=1e-6
    )
    easing = Easing(stop_kl=0.01)
    (fast,) = optimise_value(handle, [SAYABLE], 1, TAPS, PREFIXES, held, easing=easing, fact_token="last")
    slow = plain(handle, SAYABLE, 1, held, "last")
    assert any(slow.eased)
    assert len(fast.losses) == len(slow.losses)
    assert [step.total for step in fast.losses] == pytest.approx(slow.losses, abs=1e-9)
    # The trace keeps the likelihood itself; only the total is weighed.
    first = slow.eased.index(True)
    step = fast.losses[first]
    assert step.total == pytest.approx(0.1 * step.nll + step.kl + step.decay + step.penalty, rel=1e-12)
    free = dataclasses.replace(held, kl_factor=0.0)
    (short,) = optimise_value(handle, [SAYABLE], 1, TAPS, PREFIXES, free, easing=easing, fact_token="last")
    # Without divergence the search ends where the target is first said.
    assert 1 < len(short.losses) < free.steps


def test_together_equals_alone():
    handle = tiny_handle("llama", dtype=torch.float64, scale=1.5)
    config = dataclasses.replace(CONFIG, steps=8, lr=0.5, clamp=20.0, kl_factor=0.001, stop_below=1e-6)
    both = [REQUESTS[1], SAYABLE]

    def search(requests):
        return optimise_value(handle, requests, 1, TAPS, PREFIXES, config, easing=Easing(), fact_token="last")

    alone = [search([request])[0] for request in both]
    assert len({len(result.losses) for result in alone}) > 1
    for batched, single in zip(search(both), alone, strict=True):
        assert len(batched.losses) == len(single.losses)
        assert torch.allclose(batched.delta, single.delta, atol=1e-10, rtol=0)
        assert torch.allclose(batched.beside[0], single.beside[0], atol=1e-10, rtol=0)


def test_reached_means_every_token_of_every_row():
    logits = torch.tensor([[0.0, 1.0], [2.0, 1.0], [1.0, 1.0], [0.0, 5.0]])
    target, owner = torch.tensor([1, 0, 0, 0]), torch.tensor([0, 0, 1, 1])
    counts = torch.tensor([True, True, True, False])
    assert targets_reached(logits, target, counts, owner, 2).tolist() == [True, True]
    assert targets_reached(logits, target, torch.ones_like(counts), owner, 2).tolist() == [True, False]


def test_a_whole_edit_equals_the_plain_one(corpus):
    """The residual is what the MLP of the last layer lacks, over the square root of the layers left."""
    handle = tiny_handle("llama", dtype=torch.float64)
    settings = {"steps": 6, "lr": 0.3, "weight_decay": 0.3, "clamp": 1.0, "kl_factor": 1.0, "prefixes": TEXTS}
    patch = get_editor("pmet", layers=(0, 1), mom2_weight=0.5, **settings, **corpus).edit(handle, REQUESTS)
    stats = corpus["stats"].get(handle, [0, 1], corpus["corpus"])
    rows = [plain_rows(handle, request) for request in REQUESTS]
    config = dataclasses.replace(CONFIG, steps=6)
    found = [plain(handle, request, 1, config) for request in REQUESTS]
    targets = [each.inits[0] + each.deltas[0] for each in found]
    model = copy.deepcopy(handle.model)
    other = ModelHandle.wrap(model, handle.tokenizer)
    downs = [other.module(Role.MLP_OUT, layer) for layer in (0, 1)]
    formulas = [memit_dense(stats[layer].moment, 0.5) for layer in (0, 1)]
    plain_spread(model, downs, downs[-1], rows, targets, lambda i, k, r: formulas[i](k, r), math.sqrt)
    assert sorted(patch.deltas) == [f"model.layers.{layer}.mlp.down_proj.weight" for layer in (0, 1)]
    for name, delta in patch.deltas.items():
        change = (model.get_parameter(name) - handle.model.get_parameter(name)).detach()
        assert float(change.norm()) > 1e-3
        assert torch.allclose(delta.dense(), change, atol=1e-10, rtol=0)
    assert patch.provenance.extra["value_site"] == "mlp"
    assert patch.provenance.extra["adapted"] is False


def test_the_tokenizers_padding_side_does_not_matter(corpus):
    """Right-padding arithmetic on left-padded rows moves all but the longest row's edit to a wrong token."""
    requests = [
        REQUESTS[0],
        dataclasses.replace(REQUESTS[1], prompt="After many years in the city {}'s wife is"),
    ]
    settings = {"layers": (0, 1), "steps": 4, "mom2_weight": 0.5, "prefixes": TEXTS}
    ids = []
    for side in ("right", "left"):
        tokenizer = copy.deepcopy(tiny_tokenizer())
        tokenizer.padding_side = side
        handle = ModelHandle.wrap(tiny_model("llama"), tokenizer)
        ids.append(get_editor("pmet", **settings, **corpus).edit(handle, requests).id)
    assert ids[0] == ids[1]


def test_the_attention_penalty_moves_the_value(corpus):
    handle = tiny_handle("gptj", scale=2.0)
    settings = {"layers": (1,), "steps": 5, "mom2_weight": 0.1, "prefixes": TEXTS, "clamp": 20.0}
    plain_patch = get_editor("pmet", **settings, **corpus).edit(handle, REQUESTS[1:])
    restrained = get_editor("pmet+sadr", gamma=2.0, hinge=False, **settings, **corpus)
    patch = restrained.edit(handle, REQUESTS[1:])
    assert max(step["penalty"] for step in patch.provenance.extra["values"][0]["losses"]) > 1e-4
    assert patch.id != plain_patch.id


@pytest.mark.parametrize(
    "wrong", [{"nll_factor": 0.0}, {"eased": -1.0}, {"stop_kl": -0.1}, {"mom2_weight": 0.0}]
)
def test_refuses_senseless_settings(wrong):
    with pytest.raises(ConfigError):
        PmetConfig(**wrong)
