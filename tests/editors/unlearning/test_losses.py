"""Every loss against a plain fp64 reference, and the identities that the papers promise."""

from __future__ import annotations

import math

import pytest
import torch

from editors.unlearning import losses, state_losses
from lab.errors import ConfigError
from lab.scoring import log_probs
from tests.reference import unlearning as plain

BATCH, POS, VOCAB = 3, 5, 7
LABELS = torch.tensor([[-100, 2, 4, 1, -100], [-100, -100, 6, -100, -100], [3, 3, 0, 5, -100]])


def draw(seed: int, dtype: torch.dtype = torch.float64, scale: float = 2.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(BATCH, POS, VOCAB, generator=generator, dtype=torch.float64) * scale).to(dtype)


def before(seed: int = 1) -> torch.Tensor:
    """Log-probabilities of the labels under another model."""
    return losses.token_logprobs(draw(seed), LABELS)


def table(seed: int = 1) -> torch.Tensor:
    """Its whole distributions at answer tokens."""
    return log_probs(draw(seed)[LABELS != -100])


def calls():
    """Each loss as a function of logits, with its plain twin."""
    other = LABELS.roll(1, 0)
    refused = losses.token_logprobs(draw(3), other)
    cases = {
        f"nll {how}": (
            lambda z, how=how: losses.answer_nll(z, LABELS, how),
            lambda z, how=how: plain.nll(z, LABELS, how),
        )
        for how in ("mean", "row_mean", "row_sum")
    }
    return cases | {
        "ga": (lambda z: losses.gradient_ascent(z, LABELS), lambda z: -plain.nll(z, LABELS, "mean")),
        "kl": (
            lambda z: losses.retain_kl(z, LABELS, table()),
            lambda z: plain.kl(draw(1), z, LABELS),
        ),
        "npo": (
            lambda z: losses.npo(z, LABELS, before(), beta=0.3),
            lambda z: plain.npo(z, draw(1), LABELS, 0.3, mean=False),
        ),
        "npo_mean": (
            lambda z: losses.npo(z, LABELS, before(), beta=0.3, reduction="row_mean"),
            lambda z: plain.npo(z, draw(1), LABELS, 0.3, mean=True),
        ),
        "simnpo": (
            lambda z: losses.simnpo(z, LABELS, beta=2.5, margin=0.4),
            lambda z: plain.simnpo(z, LABELS, 2.5, 0.4),
        ),
        "dpo": (
            lambda z: losses.dpo(z + 1 / (1 + z**2), other, refused, z, LABELS, before(), beta=0.2),
            lambda z: plain.dpo(z + 1 / (1 + z**2), draw(3), other, z, draw(1), LABELS, 0.2),
        ),
        "wga": (
            lambda z: losses.wga(z, LABELS, beta=0.7),
            lambda z: plain.weighted(z, LABELS, lambda p: p**0.7),
        ),
        "satimp": (
            lambda z: losses.satimp(z, LABELS, saturation=2.0, importance=0.5),
            lambda z: plain.weighted(z, LABELS, lambda p: p**2 * (1 - p) ** 0.5),
        ),
        "undial": (
            lambda z: losses.undial(z, LABELS, table(), beta=3.0),
            lambda z: plain.undial(z, draw(1), LABELS, 3.0),
        ),
        "ce_u": (lambda z: losses.ce_u(z, LABELS), lambda z: plain.ce_u(z, LABELS, 1)),
        "catnip": (
            lambda z: losses.catnip(z, LABELS, beta=0.7),
            lambda z: plain.catnip(z, LABELS, 0.7, False),
        ),
        "catnip detached": (
            lambda z: losses.catnip(z, LABELS, beta=1.3, detach_ref=True),
            lambda z: plain.catnip(z, LABELS, 1.3, True),
        ),
        "flatness": (lambda z: state_losses.flatness(z, LABELS), lambda z: plain.flatness(z, LABELS)),
        "improbable": (
            lambda z: state_losses.improbable(z, LABELS, floor=-2.0),
            lambda z: plain.improbable(z, LABELS, -2.0),
        ),
        "bidirectional": (
            lambda z: state_losses.bidirectional(z, LABELS, table(4), table(), push=0.6, top=3),
            lambda z: plain.bidirectional(z, draw(4), draw(1), LABELS, 0.6, 3),
        ),
        "ce_u all": (lambda z: losses.ce_u(z, LABELS, skip_first=0), lambda z: plain.ce_u(z, LABELS, 0)),
    }


NAMES = list(calls())


def gradient(function, logits: torch.Tensor) -> torch.Tensor:
    variable = logits.clone().requires_grad_()
    (found,) = torch.autograd.grad(function(variable), variable)
    return found


@pytest.mark.parametrize("name", NAMES)
def test_value_and_gradient_equal_the_plain_ones(name):
    loss, twin = calls()[name]
    logits = draw(0)
    assert loss(logits).dim() == 0
    assert float(loss(logits)) == pytest.approx(float(twin(logits)), abs=1e-12)
    assert torch.allclose(gradient(loss, logits), gradient(twin, logits), atol=1e-12)
    assert float(gradient(loss, logits).abs().max()) > 1e-4


@pytest.mark.parametrize("name", [name for name in NAMES if name != "dpo"])
def test_what_is_masked_has_no_part_in_value_or_gradient(name):
    loss, _ = calls()[name]
    logits = draw(0)
    spoiled = logits.clone()
    spoiled[LABELS == -100] = float("nan")
    assert float(loss(spoiled)) == float(loss(logits))
    found = gradient(loss, spoiled)
    assert torch.equal(found, gradient(loss, logits))
    assert bool((found[LABELS == -100] == 0).all())


@pytest.mark.parametrize("name", NAMES)
def test_narrow_logits_are_widened_first(name):
    loss, _ = calls()[name]
    narrow = draw(0, torch.bfloat16)
    if name == "dpo":
        narrow = narrow.float()
    assert loss(narrow).dtype in (torch.float32, torch.float64)
    assert float(loss(narrow)) == pytest.approx(float(loss(narrow.double())), rel=1e-5)


@pytest.mark.parametrize("beta", [0.01, 0.1, 1.0, 5.0])
def test_npo_starts_at_its_known_value_with_the_gradient_of_ascent(beta):
    logits = draw(0)
    own = losses.token_logprobs(logits, LABELS)
    assert float(losses.npo(logits, LABELS, own, beta=beta)) == pytest.approx(2 / beta * math.log(2))
    found = gradient(lambda z: losses.npo(z, LABELS, own, beta=beta), logits)
    ascent = gradient(lambda z: losses.gradient_ascent(z, LABELS, "row_sum"), logits)
    assert torch.allclose(found, ascent, atol=1e-13)


def test_npo_becomes_ascent_as_beta_vanishes_and_not_before():
    logits = draw(0)
    ascent = gradient(lambda z: losses.gradient_ascent(z, LABELS, "row_sum"), logits)

    def far(beta):
        found = gradient(lambda z: losses.npo(z, LABELS, before(), beta=beta), logits)
        return float((found - ascent).norm() / ascent.norm())

    assert far(1e-6) < 1e-5
    assert far(1e-3) < far(0.1) < far(1.0)
    assert far(1.0) > 0.1


def test_npo_weighs_each_answer_by_how_much_is_left_of_it():
    logits, beta = draw(0), 0.5
    now = losses.token_logprobs(logits, LABELS).sum(-1)
    then = before().sum(-1)
    weight = 2 * (beta * now).exp() / ((beta * now).exp() + (beta * then).exp())
    found = gradient(lambda z: losses.npo(z, LABELS, before(), beta=beta), logits)
    ascent = gradient(lambda z: losses.gradient_ascent(z, LABELS, "row_sum"), logits)
    assert torch.allclose(found, weight[:, None, None] * ascent, atol=1e-13)


def test_simnpo_is_npo_mean_whose_reference_is_certain():
    logits = draw(0)
    sure = torch.zeros(BATCH, POS, dtype=torch.float64)
    expected = losses.npo(logits, LABELS, sure, beta=2.5, reduction="row_mean")
    assert float(losses.simnpo(logits, LABELS, beta=2.5)) == pytest.approx(float(expected), abs=1e-14)


def test_dpo_with_an_unchanged_refusal_is_npo():
    logits, refusal = draw(0), draw(5)
    own = losses.token_logprobs(refusal, LABELS)
    found = losses.dpo(refusal, LABELS, own, logits, LABELS, before(), beta=0.2)
    assert float(found) == pytest.approx(float(losses.npo(logits, LABELS, before(), beta=0.2)), abs=1e-13)


def test_weighted_ascents_contain_each_other_and_their_weights_carry_no_gradient():
    logits = draw(0)
    ascent = losses.gradient_ascent(logits, LABELS)
    assert float(losses.wga(logits, LABELS, beta=0.0)) == pytest.approx(float(ascent), abs=1e-14)
    same = losses.satimp(logits, LABELS, saturation=1.5, importance=0.0)
    assert float(same) == pytest.approx(float(losses.wga(logits, LABELS, beta=1.5)), abs=1e-14)
    p = losses.token_logprobs(logits, LABELS).exp()
    found = gradient(lambda z: losses.wga(z, LABELS), logits)
    ascent = gradient(lambda z: losses.gradient_ascent(z, LABELS), logits)
    assert torch.allclose(found, p[..., None] * ascent, atol=1e-14)


def test_undial_rests_at_beta_zero_and_reaches_ce_u_for_a_large_one():
    logits = draw(0)
    own = log_probs(logits[LABELS != -100])
    still = gradient(lambda z: losses.undial(z, LABELS, own, beta=0.0), logits)
    assert float(still.abs().max()) < 1e-14
    far = losses.undial(logits, LABELS, own, beta=200.0)
    assert float(far) == pytest.approx(float(losses.ce_u(logits, LABELS, skip_first=0)), abs=1e-12)


def test_undial_takes_logits_and_log_probabilities_alike():
    logits, teacher = draw(0), draw(1)[LABELS != -100]
    found = losses.undial(logits, LABELS, teacher, beta=3.0)
    assert float(found) == pytest.approx(float(losses.undial(logits, LABELS, table(), beta=3.0)), abs=1e-13)


def test_kl_is_zero_at_the_reference_and_grows_in_the_reference_direction():
    logits = draw(0)
    own = log_probs(logits[LABELS != -100])
    assert float(losses.retain_kl(logits, LABELS, own)) == pytest.approx(0.0, abs=1e-14)
    swapped = losses.retain_kl(draw(1), LABELS, own)
    assert float(losses.retain_kl(logits, LABELS, table())) != pytest.approx(float(swapped), abs=1e-3)


def test_token_and_answer_means_differ_for_answers_of_unequal_length():
    logits = draw(0)
    by_token, by_row = (losses.answer_nll(logits, LABELS, how) for how in ("mean", "row_mean"))
    assert abs(float(by_token) - float(by_row)) > 1e-3


def test_combined_weighs_both_terms():
    forget, retain = torch.tensor(-2.0), torch.tensor(3.0)
    assert float(losses.combined(forget, retain, forget_weight=0.5, retain_weight=2.0)) == 5.0
    assert float(losses.combined(forget, None, forget_weight=0.5)) == -1.0


def test_arguments_that_make_no_sense_are_refused():
    with pytest.raises(ConfigError, match="beta"):
        losses.npo(draw(0), LABELS, before(), beta=0.0)
    with pytest.raises(ConfigError, match="whole answers"):
        losses.npo(draw(0), LABELS, before(), reduction="mean")
    with pytest.raises(ConfigError, match="skip_first"):
        losses.ce_u(draw(0)[1:2], LABELS[1:2])
    with pytest.raises(ConfigError, match="no position"):
        losses.gradient_ascent(draw(0), torch.full_like(LABELS, -100))
