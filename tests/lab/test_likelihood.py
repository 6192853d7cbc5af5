from __future__ import annotations

import pytest
import torch

from lab.likelihood import target_nll


@pytest.fixture
def case():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 11, dtype=torch.float64, generator=generator) * 3
    targets = torch.tensor([0, 10, 4, 4, 7, 2])
    return logits.requires_grad_(), targets, torch.tensor([5, 2]), generator


def test_equals_cross_entropy_and_log_softmax_with_their_gradient(case):
    logits, targets, whole, generator = case
    weights = torch.rand(6, dtype=torch.float64, generator=generator)
    mix = torch.randn(2, 11, dtype=torch.float64, generator=generator)

    def loss(nll, table):
        return (weights * nll).sum() + (mix * table.exp() * table).sum()

    plain = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    expected = loss(plain, torch.log_softmax(logits, dim=1)[whole])
    (slope,) = torch.autograd.grad(expected, logits)
    nll, table = target_nll(logits, targets, whole)
    found = loss(nll, table)
    (gradient,) = torch.autograd.grad(found, logits)
    assert torch.allclose(found, expected, atol=1e-12, rtol=0)
    assert torch.allclose(gradient, slope, atol=1e-12, rtol=0)


def test_what_is_not_asked_for_has_no_gradient(case):
    logits, targets, _, _ = case
    nll, table = target_nll(logits, targets, torch.tensor([], dtype=torch.long))
    assert table.shape == (0, 11)
    nll[1].backward()
    assert logits.grad is not None
    assert not logits.grad[[0, 2, 3, 4, 5]].any()
    assert float(logits.grad[1].sum()) == pytest.approx(0, abs=1e-12)


def test_a_second_backward_pass_is_refused(case):
    logits, targets, whole, _ = case
    nll, _ = target_nll(logits, targets, whole)
    nll.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError):
        nll.sum().backward()
