from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from editors import value_batches
from editors.prefixes import Prefixes
from editors.rows import EditRow, essence_row, request_rows
from editors.sadr import AttentionDrift
from editors.values import ValueConfig, optimise_value
from lab.arch import Role
from lab.errors import NumericalError
from lab.records import EditRequest
from tests.reference.value_search import PlainRow, plain_value_search
from tests.tiny import tiny_handle

REQUESTS = [
    EditRequest("a", "The capital of {} is", "France", "Rome"),
    EditRequest("b", "{}'s wife is", "Barack Obama", "Marie Curie of Paris"),
    EditRequest("c", "The mother tongue of {} is the language", "Danielle Darrieux", "English"),
]
PREFIXES = Prefixes.of(["{}", "The guitar. {}", "Because of the piano, and. {}", "I. {}"])
CONFIG = ValueConfig(steps=12, lr=0.3, weight_decay=0.3, clamp=3.0)


def plain(handle, request, layer, role, config, gamma=0.0, hinge=True):
    rows = request_rows(handle, request, PREFIXES.flat)
    essence = essence_row(handle, request)

    def as_plain(row):
        return PlainRow(row.ids, row.change, row.prompt_last, row.targets)

    settings = dataclasses.asdict(config)
    return plain_value_search(
        handle.model,
        handle.module(role, layer),
        [as_plain(row) for row in rows],
        as_plain(essence) if config.kl_factor else None,
        gamma=gamma,
        hinge=hinge,
        **settings,
    )


@pytest.mark.parametrize("role, layer", [(Role.MLP, 1), (Role.BLOCK, 2)])
@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen3", "gemma3"])
def test_equals_the_plain_search_in_fp64(family, role, layer):
    handle = tiny_handle(family, dtype=torch.float64, layers=4)
    if family == "gpt2":
        handle.model.set_attn_implementation("eager")
    (fast,) = optimise_value(handle, REQUESTS[1:2], layer, role, PREFIXES, CONFIG)
    slow = plain(handle, REQUESTS[1], layer, role, CONFIG)
    assert fast.delta.dtype == torch.float64
    assert float(slow.delta.norm()) > 0.1
    assert torch.allclose(fast.delta, slow.delta, atol=1e-10, rtol=0)
    assert torch.allclose(fast.init, slow.init, atol=1e-12, rtol=0)
    assert [step.total for step in fast.losses] == pytest.approx(slow.losses, abs=1e-10)


@pytest.mark.parametrize("family", ["gemma2", "gptj"])
def test_equals_the_plain_search_in_fp32(family):
    handle = tiny_handle(family, layers=4)
    (fast,) = optimise_value(handle, REQUESTS[:1], 1, Role.MLP, PREFIXES, CONFIG)
    slow = plain(handle, REQUESTS[0], 1, Role.MLP, CONFIG)
    assert float((fast.delta - slow.delta).norm() / slow.delta.norm()) < 1e-4


@pytest.mark.parametrize("role", [Role.MLP, Role.BLOCK])
def test_together_equals_alone_with_stops_at_different_steps(role):
    handle = tiny_handle("llama", dtype=torch.float64)
    config = dataclasses.replace(CONFIG, steps=14, clamp=20.0, stop_below=4.5)

    def search(requests, **options):
        return optimise_value(handle, requests, 1, role, PREFIXES, config, fact_token="last", **options)

    together, narrow = search(REQUESTS), search(REQUESTS, max_rows=5)
    alone = [search([request])[0] for request in REQUESTS]
    assert len({len(result.losses) for result in alone}) > 1
    for batched, chunked, single in zip(together, narrow, alone, strict=True):
        assert len(batched.losses) == len(single.losses)
        assert torch.allclose(batched.delta, single.delta, atol=1e-10, rtol=0)
        assert torch.allclose(chunked.delta, single.delta, atol=1e-10, rtol=0)


@pytest.mark.parametrize("family", ["gpt2", "gemma3"])
def test_parts_of_a_batch_change_nothing_under_a_penalty_either(family, monkeypatch):
    handle = tiny_handle(family, dtype=torch.float64, layers=4)
    penalties = [AttentionDrift(gamma=0.5)]

    def search(requests):
        return optimise_value(handle, requests, 1, Role.MLP, PREFIXES, CONFIG, penalties)

    whole = search(REQUESTS)
    monkeypatch.setattr(value_batches, "_CPU_TOKENS", 1)
    parted = search(REQUESTS)
    for request, together, apart in zip(REQUESTS, whole, parted, strict=True):
        (alone,) = search([request])
        assert max(step.penalty for step in alone.losses) > 0
        assert torch.allclose(apart.delta, alone.delta, atol=1e-10, rtol=0)
        assert torch.allclose(together.delta, alone.delta, atol=1e-10, rtol=0)


def test_parts_hold_all_problems_in_order_and_few_tokens(monkeypatch):
    def problem(rows, suffix):
        ids = tuple(range(suffix + 2))
        return value_batches.Problem(REQUESTS[0], (EditRow(ids, 2, 2, ids[2:]),) * rows, rows)

    problems = [problem(2, 3), problem(2, 4), problem(3, 4), problem(50, 9), problem(1, 9)]
    assert [each.suffix for each in problems] == [3, 4, 4, 9, 9]
    monkeypatch.setattr(value_batches, "_CPU_TOKENS", 16)
    parts = list(value_batches.parts_of(problems, torch.device("cpu")))
    # 4 rows of at most 4 tokens; 3 of 4; a problem that is too large goes alone.
    assert parts == [range(0, 2), range(2, 3), range(3, 4), range(4, 5)]
    assert list(value_batches.parts_of(problems, torch.device("meta"))) == [range(0, 5)]
    batches = list(value_batches.batches_of([problems[3], problems[0], problems[1]], 4))
    assert batches == [[1, 2], [0]]
    assert [list(value_batches.rows_of(problems, index)) for index in (0, 2)] == [[0, 1], [4, 5, 6]]


def test_the_search_raises_the_target_and_respects_the_clamp():
    handle = tiny_handle("gpt2", layers=3)
    free_config = ValueConfig(steps=30, clamp=50.0, stop_below=0.2)
    (free,) = optimise_value(handle, REQUESTS[:1], 1, Role.MLP, PREFIXES, free_config, fact_token="last")
    (tight,) = optimise_value(handle, REQUESTS[:1], 0, Role.MLP, PREFIXES, ValueConfig(steps=10, clamp=0.1))
    assert free.losses[-1].nll < free.losses[0].nll - 1
    assert free.p_target == pytest.approx(math.exp(-free.losses[-1].nll))
    assert float(tight.delta.norm()) == pytest.approx(0.1 * float(tight.init.norm()), rel=1e-5)
    assert torch.equal(tight.target, tight.init + tight.delta)


def test_parts_sum_to_the_total_and_start_at_zero():
    handle = tiny_handle("llama")
    (result,) = optimise_value(
        handle, REQUESTS[:1], 1, Role.MLP, PREFIXES, CONFIG, [AttentionDrift(gamma=0.5)]
    )
    first = result.losses[0]
    assert first.kl == pytest.approx(0, abs=1e-6)
    assert first.decay == 0
    assert first.penalty == pytest.approx(0, abs=1e-6)
    for step in result.losses:
        assert step.total == pytest.approx(step.nll + step.kl + step.decay + step.penalty, rel=1e-5)
    assert len(result.losses) == CONFIG.steps


def test_one_step_is_one_forward_and_no_update():
    handle = tiny_handle("llama")
    (result,) = optimise_value(handle, REQUESTS[:1], 1, Role.MLP, PREFIXES, ValueConfig(steps=1))
    assert len(result.losses) == 1
    assert not result.delta.any()


@pytest.fixture
def broken():
    handle = tiny_handle("llama")
    handle.model.get_parameter(f"{handle.arch.path(Role.FINAL_NORM)}.weight").data[0] = float("inf")
    return handle


def test_nan_names_the_request(broken):
    with pytest.raises(NumericalError, match=r"'a'.*nan at step 0"):
        optimise_value(broken, REQUESTS[:1], 1, Role.MLP, PREFIXES, CONFIG)


def test_model_is_left_as_it_was_also_on_errors(broken):
    before = broken.weights_digest()
    wanted = [parameter.requires_grad for parameter in broken.model.parameters()]
    with pytest.raises(NumericalError):
        optimise_value(broken, REQUESTS[:1], 1, Role.MLP, PREFIXES, CONFIG)
    assert broken.weights_digest() == before
    assert [parameter.requires_grad for parameter in broken.model.parameters()] == wanted
    assert all(parameter.grad is None for parameter in broken.model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in broken.model.modules())
