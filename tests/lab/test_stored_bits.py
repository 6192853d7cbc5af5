"""Bits of patched weights: digests that guard them, deltas as they are stored, and what counts as finite."""

from __future__ import annotations

import math

import torch

from lab.patch import Dense, LowRank
from lab.stack import _all_finite, _digest


def test_every_change_of_a_weight_changes_its_digest():
    """Single bits, exchanged rows, columns and neighbors, at every size that does not fill the square."""
    draw = torch.Generator().manual_seed(0)
    for shape, dtype in (
        ((6, 10), torch.float32),
        ((7, 9), torch.bfloat16),
        ((13,), torch.float32),
        ((1,), torch.float16),
    ):
        weight = torch.randn(*shape, generator=draw).to(dtype)
        whole = _digest(weight)
        assert _digest(weight.clone()) == whole
        for index in range(weight.numel()):
            other = weight.clone()
            other.view(-1)[index] = other.view(-1)[index] + 1
            assert _digest(other) != whole
        if weight.dim() == 2:
            assert _digest(weight.flip(0)) != whole
            assert _digest(weight.flip(1)) != whole
            assert _digest(weight.T) != whole


def test_a_delta_is_stored_as_its_product_whichever_way_the_weight_lies():
    draw = torch.Generator().manual_seed(0)
    for rank in (1, 3):
        left, right = torch.randn(70, rank, generator=draw), torch.randn(rank, 90, generator=draw)
        delta = LowRank(left, right)
        assert torch.equal(delta.stored(False), delta.dense())
        assert torch.equal(delta.stored(True), delta.dense().T)
        assert torch.equal(Dense(delta.dense()).stored(True), delta.dense().T)


def test_a_sum_that_overflows_is_no_infinity():
    assert _all_finite(torch.full((4, 400), 3e38))
    for bad in (math.nan, math.inf, -math.inf):
        weight = torch.ones(5, 5)
        weight[2, 3] = bad
        assert not _all_finite(weight)
