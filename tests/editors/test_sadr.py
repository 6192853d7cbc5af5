from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from editors.rows import essence_row, request_rows
from editors.sadr import AttentionDrift, drift
from editors.values import AttentionStep, ValueConfig, optimise_value
from lab.arch import Role
from lab.errors import ConfigError
from tests.editors.test_values import PREFIXES, REQUESTS
from tests.reference.value_search import PlainRow, plain_value_search
from tests.tiny import tiny_handle

CONFIG = ValueConfig(steps=6, lr=0.3, weight_decay=0.3, clamp=3.0)


@pytest.mark.parametrize("hinge", [True, False])
@pytest.mark.parametrize(
    "family, role", [("gpt2", Role.MLP), ("llama", Role.BLOCK), ("gptj", Role.MLP), ("gemma3", Role.MLP)]
)
def test_equals_full_attention_maps(family, role, hinge):
    # Eager attention takes its softmax in fp32 whatever the model's type, so equality is up to that.
    handle = tiny_handle(family, layers=4, scale=2.0)
    (fast,) = optimise_value(
        handle, REQUESTS[1:2], 1, role, PREFIXES, CONFIG, [AttentionDrift(gamma=2.0, hinge=hinge)]
    )
    rows = [
        PlainRow(row.ids, row.change, row.prompt_last, row.targets)
        for row in request_rows(handle, REQUESTS[1], PREFIXES.flat)
    ]
    essence = essence_row(handle, REQUESTS[1])
    with handle.eager_attention():
        slow = plain_value_search(
            handle.model,
            handle.module(role, 1),
            rows,
            PlainRow(essence.ids, essence.change, essence.prompt_last),
            steps=6,
            lr=0.3,
            weight_decay=0.3,
            clamp=3.0,
            kl_factor=0.0625,
            gamma=2.0,
            hinge=hinge,
        )
    assert max(step.penalty for step in fast.losses) > 1e-4
    assert [step.total for step in fast.losses] == pytest.approx(slow.losses, rel=1e-4)
    assert float((fast.delta - slow.delta).norm() / slow.delta.norm()) < 2e-3


def test_together_equals_alone():
    handle = tiny_handle("llama", dtype=torch.float64, scale=2.0)
    term = AttentionDrift(gamma=1.0)
    config = ValueConfig(steps=8, lr=0.3, clamp=20.0, stop_below=4.5)
    together = optimise_value(handle, REQUESTS, 1, Role.MLP, PREFIXES, config, [term], fact_token="last")
    for request, batched in zip(REQUESTS, together, strict=True):
        (single,) = optimise_value(
            handle, [request], 1, Role.MLP, PREFIXES, config, [term], fact_token="last"
        )
        assert len(single.losses) == len(batched.losses)
        assert torch.allclose(single.delta, batched.delta, atol=1e-6)


def test_selection_and_divergence_by_hand():
    original = torch.tensor([[[0.5, 0.3, 0.2], [0.1, 0.6, 0.3]]])
    current = torch.tensor([[[0.1, 0.7, 0.2], [0.2, 0.55, 0.25]]])
    first = sum(p * math.log(p / q) for p, q in zip([0.5, 0.3, 0.2], [0.1, 0.7, 0.2], strict=True))
    second = sum(p * math.log(p / q) for p, q in zip([0.1, 0.6, 0.3], [0.2, 0.55, 0.25], strict=True))
    # Head 0 looks at the subject (column 1) harder than the strongest original head (0.6), head 1 does not.
    assert float(drift(original, current, 1)) == pytest.approx(first, abs=1e-5)
    assert float(drift(original, current, 1, hinge=False)) == pytest.approx(first + second, abs=1e-5)
    assert float(drift(original, current, 0)) == 0.0


def test_mean_over_rows_sum_over_heads_and_layers():
    original = torch.softmax(torch.randn(3, 2, 5, generator=torch.Generator().manual_seed(0)), dim=-1)
    current = torch.softmax(torch.randn(3, 2, 5, generator=torch.Generator().manual_seed(1)), dim=-1)
    owner = torch.tensor([0, 0, 1])
    step = AttentionStep({4: current, 5: current}, {4: original, 5: original}, 2, owner, 2)
    rows = drift(original, current, 2, hinge=False)
    expected = torch.stack([rows[:2].mean(), rows[2]]) * 2
    assert torch.allclose(AttentionDrift(gamma=1.0, hinge=False)(step), expected)
    assert torch.allclose(
        AttentionDrift(gamma=1.0, hinge=False, gamma_mode="per_head_mean")(step), expected / 4
    )


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 4), st.integers(2, 6))
def test_drift_is_never_negative_and_zero_at_the_start(seed, heads, keys):
    generator = torch.Generator().manual_seed(seed)
    p = torch.softmax(3 * torch.randn(2, heads, keys, generator=generator, dtype=torch.float64), dim=-1)
    q = torch.softmax(3 * torch.randn(2, heads, keys, generator=generator, dtype=torch.float64), dim=-1)
    for hinge in (True, False):
        assert bool((drift(p, q, 0, hinge=hinge) >= -1e-6).all())
        assert not drift(p, p, 0, hinge=hinge).any()


def test_the_selection_carries_no_gradient_but_the_divergence_does():
    original = torch.softmax(torch.zeros(1, 1, 3), dim=-1)
    scores = torch.tensor([[[0.0, 2.0, 0.0]]], requires_grad=True)
    drift(original, torch.softmax(scores, dim=-1), 1).sum().backward()
    assert scores.grad is not None
    assert float(scores.grad[0, 0, 1]) > 0


@pytest.mark.parametrize("wrong", [{"gamma": -1.0}, {"gamma_mode": "mean"}, {"eps": 0.0}])
def test_refuses_senseless_settings(wrong):
    with pytest.raises(ConfigError):
        AttentionDrift(**wrong)
