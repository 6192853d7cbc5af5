from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lab.errors import ConfigError, EmptyTargetError
from lab.scoring import (
    greedy_tokens,
    kl_divergence,
    log_probs,
    nll,
    reduce_positions,
    score_targets,
    score_token_targets,
)
from lab.tokens import join_target
from tests.tiny import FAMILIES, tiny_handle

PAIRS = [
    ("The capital of France is", "Paris"),
    ("Danielle Darrieux's mother tongue", "is French, not English"),
    ("The", "guitar"),
    ("The capital of Kenya is ", "Nairobi"),
]


def plain_score(handle, prompt: str, target: str) -> tuple[list[float], list[bool]]:
    """One row at a time, whole vocabulary at every position, no padding."""
    head, tail = join_target(handle.tokenizer, prompt, target)
    with torch.no_grad():
        table = handle.model(torch.tensor([[*head, *tail]])).logits[0].double().log_softmax(-1)
    rows = [table[len(head) - 1 + j] for j in range(len(tail))]
    return [float(row[t]) for row, t in zip(rows, tail, strict=True)], [
        int(row.argmax()) == t for row, t in zip(rows, tail, strict=True)
    ]


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_equal_the_plain_forward_pass_whatever_the_batching(family):
    fp64 = family not in ("gptj", "gemma2")
    handle = tiny_handle(family, dtype=torch.float64 if fp64 else torch.float32, scale=2.0)
    for batch_size in (1, 3, 64):
        scores = score_targets(handle, PAIRS, batch_size=batch_size)
        for (prompt, target), score in zip(PAIRS, scores, strict=True):
            logprobs, correct = plain_score(handle, prompt, target)
            assert score.token_logprobs == pytest.approx(logprobs, abs=1e-10 if fp64 else 2e-4)
            assert list(score.token_correct) == correct


def test_a_greedy_continuation_is_correct_and_its_neighbour_is_not():
    handle = tiny_handle("llama", scale=2.0)
    prompt, _ = join_target(handle.tokenizer, "The capital of France is", "x")
    row = list(prompt)
    for _ in range(3):
        row.append(int(handle.model(torch.tensor([row])).logits[0, -1].argmax()))
    target = row[len(prompt) :]
    right, wrong = score_token_targets(
        handle, [(prompt, target), (prompt, [target[0], (target[1] + 1) % 400, target[2]])]
    )
    assert right.all_correct and right.accuracy == 1.0
    assert not wrong.all_correct and wrong.token_correct[0] and not wrong.token_correct[1]
    assert right.probability == pytest.approx(math.exp(right.sum_logprob / 3))
    assert right.sum_logprob > wrong.sum_logprob


def test_mistakes_are_refused():
    handle = tiny_handle("gpt2")
    with pytest.raises(EmptyTargetError):
        score_targets(handle, [("The capital", "  ")])
    with pytest.raises(EmptyTargetError, match="pair 1"):
        score_token_targets(handle, [([1], [2]), ([1], [])])
    with pytest.raises(ValueError, match="predicts"):
        score_token_targets(handle, [([], [2])])
    with pytest.raises(ConfigError, match="batch_size"):
        score_targets(handle, PAIRS, batch_size=0)
    assert score_targets(handle, []) == []


def test_nll_and_kl_against_torch():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 4, 7, generator=generator, dtype=torch.float64)
    other = torch.randn(2, 4, 7, generator=generator, dtype=torch.float64)
    labels = torch.tensor([[1, -100, 3, 6], [0, 2, -100, -100]])
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
    assert torch.allclose(nll(logits, labels), expected, atol=1e-14)
    rows = nll(logits, labels, reduction="row_sum")
    assert torch.allclose(rows.sum() / 5, expected, atol=1e-14)
    assert nll(logits, labels, reduction="none")[0, 1] == 0
    mask = labels != -100
    torch_kl = torch.nn.functional.kl_div(
        log_probs(other), log_probs(logits), log_target=True, reduction="none"
    ).sum(-1)
    got = kl_divergence(log_probs(logits), log_probs(other), mask, "none")
    assert torch.allclose(got, torch_kl * mask, atol=1e-14)
    assert kl_divergence(log_probs(logits), log_probs(logits)) == 0


def test_kl_ignores_impossible_tokens_and_nan_under_the_mask():
    logp = torch.tensor([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0]]).log()
    logq = torch.tensor([[0.25, 0.5, 0.25], [math.nan, math.nan, math.nan]]).log()
    mask = torch.tensor([True, False])
    assert kl_divergence(logp, logq, mask) == pytest.approx(0.5 * math.log(2.0))


def test_gradients_flow_through_nll_only_where_the_mask_is_true():
    logits = torch.zeros(1, 3, 5, requires_grad=True)
    nll(logits, torch.tensor([[1, 2, 3]]), torch.tensor([[True, False, True]])).backward()
    assert logits.grad is not None
    assert logits.grad[0, 1].abs().sum() == 0
    assert logits.grad[0, 0].abs().sum() > 0


def test_a_mean_over_nothing_is_an_error_not_a_nan():
    with pytest.raises(ConfigError, match="no position"):
        reduce_positions(torch.ones(2, 3), torch.tensor([[1, 1, 1], [0, 0, 0]]), "row_mean")
    with pytest.raises(ConfigError, match="unknown reduction"):
        reduce_positions(torch.ones(2), None, "median")  # type: ignore[arg-type]


@settings(max_examples=30, deadline=None)
@given(st.lists(st.lists(st.floats(-5, 5), min_size=4, max_size=4), min_size=2, max_size=6), st.data())
def test_kl_is_never_negative_and_nll_row_means_average_to_the_whole(rows, data):
    logits = torch.tensor(rows, dtype=torch.float64)
    other = logits.flip(-1)
    assert float(kl_divergence(log_probs(logits), log_probs(other), reduction="none").min()) >= -1e-12
    labels = torch.tensor(data.draw(st.lists(st.integers(0, 3), min_size=len(rows), max_size=len(rows))))
    assert torch.allclose(nll(logits, labels, reduction="none").mean(), nll(logits, labels))
    assert torch.equal(greedy_tokens(logits), logits.argmax(-1))
