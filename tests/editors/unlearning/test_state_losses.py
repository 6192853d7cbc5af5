"""Losses of hidden states against plain references, and the identities of token-wise preference."""

from __future__ import annotations

import math

import pytest
import torch

from editors.unlearning import losses, state_losses
from editors.unlearning.rounds import nearest, rouge_l
from lab.errors import ConfigError, RequestError
from lab.scoring import log_probs
from tests.editors.unlearning.test_losses import LABELS, draw, gradient
from tests.reference import unlearning as plain


def states(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_catnip_at_even_odds_has_its_known_value_whatever_the_length():
    even = torch.zeros(3, 5, 2, dtype=torch.float64)
    labels = torch.where(LABELS == -100, -100, 1)
    for beta in (0.5, 1.0, 2.5):
        assert float(losses.catnip(even, labels, beta=beta)) == pytest.approx(2 / beta * math.log(2))
    logits, one = draw(0)[:1], LABELS[:1]
    twice = losses.catnip(logits.repeat(1, 2, 1), one.repeat(1, 2))
    assert float(twice) == pytest.approx(float(losses.catnip(logits, one)), abs=1e-13)


def test_catnip_is_unlikelihood_and_its_detached_form_is_twice_wga():
    logits = draw(0)[:1]
    labels = LABELS[:1]
    p = losses.token_logprobs(logits, labels)[labels != -100].exp()
    assert float(losses.catnip(logits, labels)) == pytest.approx(
        float(-2 * torch.log(1 - p).mean()), abs=1e-13
    )
    held = gradient(lambda z: losses.catnip(z, labels, detach_ref=True), logits)
    twice = 2 * gradient(lambda z: losses.wga(z, labels), logits)
    assert torch.allclose(held, twice, atol=1e-13)


@pytest.mark.parametrize("detached", [False, True])
def test_catnip_weighs_a_label_by_the_models_confidence(detached):
    logits, beta = draw(0)[2:], 0.8
    labels = LABELS[2:]
    where = torch.nonzero(labels[0] != -100)[:, 0]
    p = losses.token_logprobs(logits, labels)[0, where].exp()
    found = gradient(lambda z: losses.catnip(z, labels, beta=beta, detach_ref=detached), logits)
    own = found[0, where, labels[0, where]]
    expected = 2 * torch.sigmoid(beta * (p / (1 - p)).log()) * (1 - p if detached else 1) / len(where)
    assert torch.allclose(own, expected, atol=1e-13)


def test_catnip_and_unlikelihood_stay_finite_where_the_model_is_certain():
    logits = torch.zeros(1, 1, 7)
    logits[..., 3] = 60.0
    label = torch.tensor([[3]])
    for loss in (losses.catnip, state_losses.improbable):
        found = gradient(lambda z, loss=loss: loss(z, label), logits)
        assert math.isfinite(float(loss(logits, label)))
        assert bool(found.isfinite().all()) and float(found[..., 3]) > 0.5


def test_bidirectional_rests_at_its_teacher_and_pushes_only_what_was_said():
    logits = draw(0)
    wanted = LABELS != -100
    own = log_probs(logits[wanted])
    assert float(state_losses.bidirectional(logits, LABELS, own, own, top=7)) == pytest.approx(0.0, abs=1e-13)
    shifted = state_losses.bidirectional(logits + 3.0, LABELS, own, draw(1)[wanted], top=2)
    assert float(shifted) == pytest.approx(
        float(state_losses.bidirectional(logits, LABELS, own, draw(1)[wanted], top=2)), abs=1e-12
    )
    teacher, before = log_probs(draw(4)[wanted]), log_probs(draw(1)[wanted])
    with_push, without = (
        state_losses.bidirectional(draw(1), LABELS, teacher, before, push=push, top=2) for push in (1.0, 0.0)
    )
    assert float(with_push) > float(without) + 0.1


def test_the_masked_teacher_lowers_answers_and_raises_refusals():
    before = draw(1)[LABELS != -100]
    labels = LABELS[LABELS != -100]
    refusal = torch.tensor([5, 5, 5, 5, -1, -1, -1, -1])
    made = state_losses.masked_teacher(before, labels, refusal)
    assert torch.equal(made.gather(1, labels[:, None])[:, 0], before.amin(1))
    assert torch.equal(made[:4, 5], before[:4].amax(1))
    assert torch.equal(made[4:, 0], torch.where(labels[4:] == 0, before[4:].amin(1), before[4:, 0]))


def test_n_pair_and_pooling_equal_the_plain_ones():
    anchor, positive, negatives = states(0, 3, 4), states(1, 3, 4), states(2, 3, 5, 4)
    found = state_losses.n_pair(anchor, positive, negatives, tau=0.7)
    assert float(found) == pytest.approx(float(plain.n_pair(anchor, positive, negatives, 0.7)), abs=1e-12)
    tokens, row = states(3, 6, 4), torch.tensor([0, 0, 0, 1, 2, 2])
    pooled = state_losses.pooled(tokens, row, 3)
    assert torch.allclose(pooled, plain.pooled([tokens[:3], tokens[3:4], tokens[4:]]), atol=1e-12)
    with pytest.raises(ConfigError, match="tau"):
        state_losses.n_pair(anchor, positive, negatives, tau=0.0)


def test_consistency_is_the_mean_square_over_layers_and_real_tokens():
    one, two = ({layer: states(seed + layer, 2, 3, 4) for layer in (0, 1)} for seed in (0, 10))
    real = torch.tensor([[True, True, False], [True, True, True]])
    for side in (one, two):
        side[0][0, 2] = float("nan")
    each = [((one[layer] - two[layer]) ** 2).sum(-1)[real].mean() for layer in (0, 1)]
    assert float(state_losses.consistency(one, two, real)) == pytest.approx(float(sum(each) / 2), abs=1e-12)


def test_misdirection_vanishes_exactly_at_its_goal():
    real = torch.tensor([[True, False], [True, True]])
    goal = states(0, 4)
    at_goal = goal.expand(2, 2, 4).clone()
    at_goal[0, 1] = 99.0
    assert float(state_losses.misdirection(at_goal, real, goal)) == 0.0
    moved = at_goal.clone()
    moved[1, 1, 2] += 3.0
    assert float(state_losses.misdirection(moved, real, goal)) == pytest.approx(9 / 12)


def test_the_nearest_row_shares_rare_tokens():
    pool = [[1, 2, 9], [1, 2, 3], [1, 2, 4, 4]]
    assert nearest([[1, 2, 3], [4, 7], [1, 8, 9]], pool) == [1, 2, 0]
    with pytest.raises(RequestError, match="give some"):
        nearest([[1]], [])


@pytest.mark.parametrize(
    ("text", "answer", "recall"),
    [
        ("it is Michelle Obama.", "Michelle Obama", 1.0),
        ("Obama Michelle", "Michelle Obama", 0.5),
        ("nobody", "Paris", 0.0),
        ("", "Paris", 0.0),
    ],
)
def test_rouge_l_counts_the_answers_words_in_order(text, answer, recall):
    assert rouge_l(text, answer) == recall
