"""Rows held before a block: equal to full passes for every family, under patches that come while they are held."""

from __future__ import annotations

import contextlib

import pytest
import torch

from editors.keys import read_sites
from editors.rows import EditRow
from lab.arch import Role
from lab.errors import ConfigError
from lab.patch import LowRank, Provenance, WeightPatch
from lab.resume import HeldRows
from lab.trace import Site
from tests.tiny import FAMILIES, tiny_handle

ROWS = [[5, 9, 40, 7], [11, 3], [8, 2, 60, 31, 12, 4, 90]]


def patch_of(handle, layer):
    weight = handle.weight(Role.MLP_OUT, layer)
    draw = torch.Generator().manual_seed(layer)
    left, right = (
        torch.randn(*size, generator=draw, dtype=handle.dtype)
        for size in ((weight.shape[0], 1), (1, weight.shape[1]))
    )
    return WeightPatch(handle.fingerprint, {weight.name: LowRank(left, right)}, Provenance("made"))


@pytest.mark.parametrize("family", FAMILIES)
def test_held_rows_read_what_a_full_pass_reads(family):
    handle = tiny_handle(family, dtype=torch.float64)
    held = HeldRows(handle, ROWS, 1, 2, max_rows=2)
    key, out = Site(Role.MLP_OUT, 2, "in"), Site(Role.BLOCK, 2)

    def full():
        rows = [EditRow(tuple(row), len(row) - 1, len(row) - 1) for row in ROWS]
        return read_sites(handle, rows, [key, out], out)

    plain = full()
    for site, values in held.read([key, out], out).items():
        assert torch.allclose(values, plain[site], atol=1e-10, rtol=0), site
    with patch_of(handle, 1).applied(handle, mode="sidecar"):
        changed = full()
        assert float((changed[key] - plain[key]).abs().max()) > 1e-4
        held.move_to(2)
        for site, values in held.read([key, out], out).items():
            assert torch.allclose(values, changed[site], atol=1e-10, rtol=0), site
    assert held.layer == 2
    # What was below when they moved stays in them.
    assert torch.allclose(held.read([key], key)[key], changed[key], atol=1e-10, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_other_row_stands_where_the_rows_stand(family):
    handle = tiny_handle(family, dtype=torch.float64)
    rows = [*ROWS, [40, 7], [5, 5, 5, 5, 5]]
    held = HeldRows(handle, rows, 1, 2, max_rows=2)
    some = held.every(2)
    alone = HeldRows(handle, rows[::2], 1, 2)
    key, out = Site(Role.MLP_OUT, 2, "in"), Site(Role.BLOCK, 2)

    def same():
        for sites, stop in (([key, out], out), ([key], key)):
            ours, theirs = some.read(sites, stop), alone.read(sites, stop)
            for site in sites:
                assert ours[site].shape[0] == 3
                assert torch.allclose(ours[site], theirs[site], atol=1e-10, rtol=0)

    same()
    with patch_of(handle, 1).applied(handle, mode="sidecar"):
        for each in (held, alone):
            each.move_to(2)
        some.stand_with(held, 2)
        assert some.layer == 2
        same()


@pytest.mark.parametrize("family", FAMILIES)
def test_attention_that_is_kept_changes_nothing_under_new_down_projections(family):
    handle = tiny_handle(family, dtype=torch.float64, layers=4)
    rows = [*ROWS, [40, 7], [5, 5, 5, 5, 5]]
    held, again = (HeldRows(handle, rows, 1, 3, max_rows=2) for _ in range(2))
    some, out = held.every(2), Site(Role.BLOCK, 3)
    ran: list[int] = []
    hooks = [
        handle.module(Role.ATTN, layer).register_forward_hook(lambda *_, layer=layer: ran.append(layer))
        for layer in (1, 2)
    ]
    with contextlib.ExitStack() as applied:
        for layer in (1, 2):
            key = Site(Role.MLP_OUT, layer, "in")
            again.move_to(layer)
            ran.clear()
            held.move_to(layer)
            # Three chunks of two rows; to get here the attention of the block below was not run again.
            kept = held.read([key], key, keep_attention=True)[key]
            assert ran == [layer] * 3
            some.stand_with(held, 2)
            assert torch.allclose(kept, again.read([key], key)[key], atol=1e-10, rtol=0)
            applied.enter_context(patch_of(handle, layer).applied(handle, mode="sidecar"))
            plain = again.read([out], out)[out]
            assert torch.allclose(some.read([out], out)[out], plain[::2], atol=1e-10, rtol=0)
            assert torch.allclose(held.read([out], out)[out], plain, atol=1e-10, rtol=0)
        for each in (held, again):
            each.move_to(3)
        assert torch.allclose(held.read([out], out)[out], again.read([out], out)[out], atol=1e-10, rtol=0)
    for hook in hooks:
        hook.remove()
    assert not any(module._forward_hooks for module in handle.model.modules())


def test_held_rows_never_go_back_or_beyond():
    handle = tiny_handle("llama")
    held = HeldRows(handle, ROWS, 1, 2)
    held.move_to(2)
    for wrong in (
        lambda: held.move_to(1),
        lambda: HeldRows(handle, [], 0, 1),
        lambda: HeldRows(handle, ROWS, 1, 3),
    ):
        with pytest.raises(ConfigError):
            wrong()
    with pytest.raises(ConfigError, match="not in blocks"):
        held.read([Site(Role.BLOCK, 1)], Site(Role.BLOCK, 1))
