from __future__ import annotations

import pytest
import torch

from lab.arch import Role
from lab.errors import ConfigError
from lab.prefill import shared_lengths
from lab.replay import Replay
from lab.tokens import pad_rows
from lab.trace import Site, trace
from tests.tiny import FAMILIES, tiny_handle

ROWS = [[5, 6, 7, 8, 9], [11, 12, 13], [14, 15, 16, 17, 18, 19, 20], list(range(30, 52))]
CHANGE = [2, 0, 4, 18]
WANTED = [[2, 4], [1], [], [20, 21]]
OWNER = torch.tensor([0, 1, 1, 0])


def full_logits(handle, site, delta):
    """The wanted logits by one full forward pass with the change written in."""
    batch = pad_rows(ROWS, 0)

    def write(value):
        update = torch.zeros_like(value)
        update[torch.arange(len(ROWS)), torch.tensor(CHANGE)] = delta[OWNER].to(value.dtype)
        return value + update

    with trace(handle, writes={site: write}) as recording:
        logits = recording.run(batch)
    assert logits is not None
    return torch.cat([logits[row, places] for row, places in enumerate(WANTED)])


def exactness(family):
    return (torch.float32, 1e-4) if family in ("gemma2", "gptj") else (torch.float64, 1e-10)


def difference(found, expected):
    """Largest difference over the largest value."""
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("family", FAMILIES)
def test_equals_the_full_forward_pass(family):
    dtype, tolerance = exactness(family)
    handle = tiny_handle(family, dtype=dtype, layers=4)
    if family == "gpt2":
        handle.model.set_attn_implementation("eager")
    for role, layer in (
        (Role.MLP, 0),
        (Role.MLP, 2),
        (Role.BLOCK, 0),
        (Role.BLOCK, 1),
        (Role.BLOCK, 3),
        (Role.ATTN, 2),
    ):
        replay = Replay(handle, ROWS, CHANGE, Site(role, layer), WANTED)
        delta = torch.randn(2, handle.hidden_size, dtype=dtype, generator=torch.Generator().manual_seed(1))
        expected = full_logits(handle, Site(role, layer), delta)
        unchanged = full_logits(handle, Site(role, layer), torch.zeros_like(delta))
        assert difference(replay.run(delta, OWNER).logits, expected) < tolerance
        assert difference(replay.run(0 * delta, OWNER).logits, unchanged) < tolerance
        assert not torch.allclose(expected, unchanged, atol=1e-2)


@pytest.mark.parametrize("family", ["gpt2", "llama", "opt", "gemma3"])
def test_leaves_no_hook_no_stub_and_no_gradient(family):
    handle = tiny_handle(family)
    before = handle.weights_digest()
    names = {name: dict(module.__dict__) for name, module in handle.model.named_modules()}
    replay = Replay(handle, ROWS, CHANGE, Site(Role.MLP, 1), WANTED)
    delta = torch.zeros(2, handle.hidden_size, requires_grad=True)
    replay.run(delta, OWNER).logits.sum().backward()
    with pytest.raises(RuntimeError):
        replay.run(torch.zeros(2, handle.hidden_size + 1), OWNER)
    assert handle.weights_digest() == before
    for name, module in handle.model.named_modules():
        assert "forward" not in module.__dict__, name
        assert not module._forward_hooks and not module._forward_pre_hooks, name
        assert module.__dict__.keys() == names[name].keys()
    assert delta.grad is not None and float(delta.grad.abs().sum()) > 0


def test_rows_can_be_dropped_and_reordered():
    handle = tiny_handle("llama", dtype=torch.float64)
    replay = Replay(handle, ROWS, CHANGE, Site(Role.MLP, 1), WANTED)
    delta = torch.randn(2, handle.hidden_size, dtype=torch.float64)
    every = replay.run(delta, OWNER)
    some = replay.keep([3, 0]).run(delta, OWNER[[3, 0]])
    assert replay.logit_rows.tolist() == [0, 0, 1, 3, 3]
    assert torch.allclose(some.logits, every.logits[[3, 4, 0, 1]], atol=1e-12)


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma3", "opt"])
def test_columns_of_padding_can_be_dropped_with_their_rows(family):
    handle = tiny_handle(family, dtype=torch.float64)
    queries = [4, 2, 5, 20]
    replay = Replay(handle, ROWS, CHANGE, Site(Role.MLP, 1), WANTED, queries)
    delta = torch.randn(2, handle.hidden_size, dtype=torch.float64)
    chosen = [2, 0]
    every, some = replay.run(delta, OWNER), replay.keep(chosen, trim=True)
    # Their longest prefix has 4 tokens, not 18, and nothing is wanted past the third token of a suffix.
    assert (replay.column, some.column) == (18, 4)
    found = some.run(delta, OWNER[chosen])
    assert torch.allclose(found.logits, every.logits[[0, 1]], atol=1e-12)
    for layer, attention in found.attention.items():
        assert attention.shape[-1] == 4 + 3
        wide = every.attention[layer][chosen][..., 18 - 4 : 18 + 3]
        assert torch.allclose(attention, wide, atol=1e-12)
    assert torch.equal(some.base, replay.base[chosen])


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma3", "opt", "gptj"])
def test_common_beginnings_are_run_once_with_the_same_result(family, monkeypatch):
    dtype, tolerance = exactness(family)
    handle = tiny_handle(family, dtype=dtype)
    head = list(range(40, 60))
    rows = [
        [*head, 5, 6, 7],
        [*head, 8, 9],
        [*head[:15], 10, 11, 12, 13],
        [70, 71, 72],
        [*head, 5, 6, 14, 15],
    ]
    change, wanted = [20, 21, 16, 1, 22], [[21, 22], [21], [18], [2], [23]]
    shared = shared_lengths(rows, change)
    assert shared == [20, 20, 15, 0, 22]
    owner = torch.tensor([0, 1, 0, 1, 0])
    delta = torch.randn(2, handle.hidden_size, dtype=dtype, generator=torch.Generator().manual_seed(2))
    site = Site(Role.MLP, 1)
    seen = []
    hook = handle.module(Role.EMBED).register_forward_hook(
        lambda _module, args, _output: seen.append(args[0].numel())
    )
    together = Replay(handle, rows, change, site, wanted)
    hook.remove()
    assert sum(seen) < 0.8 * len(rows) * max(map(len, rows))
    monkeypatch.setattr("lab.prefill._CPU_TOKENS", 30)
    pieces = Replay(handle, rows, change, site, wanted)
    monkeypatch.setattr("lab.prefill.shared_lengths", lambda rows, change: [0] * len(rows))
    apart = Replay(handle, rows, change, site, wanted)
    expected = apart.run(delta, owner).logits
    for replay in (together, pieces):
        assert difference(replay.run(delta, owner).logits, expected) < tolerance
        assert torch.allclose(replay.base, apart.base, atol=tolerance)


def test_sharing_is_left_out_where_it_saves_little():
    assert shared_lengths([[1, 2, 3, 4, 5, 6, 7, 8, 9], [1, 5, 6, 7, 8, 9, 3, 2, 4]], [5, 5]) == [0, 0]
    assert shared_lengths([[1, 2, 3, 4]], [3]) == [0]
    assert shared_lengths([[1, 2, 3, 4], [1, 2, 3, 4]], [3, 3]) == [3, 3]


def test_a_row_does_not_see_its_neighbours():
    handle = tiny_handle("qwen3", dtype=torch.float64)
    delta = torch.randn(1, handle.hidden_size, dtype=torch.float64)
    alone = Replay(handle, ROWS[:1], CHANGE[:1], Site(Role.MLP, 1), WANTED[:1]).run(delta, OWNER[:1])
    together = Replay(handle, ROWS, CHANGE, Site(Role.MLP, 1), WANTED).run(delta.expand(2, -1), OWNER)
    assert torch.allclose(alone.logits, together.logits[:2], atol=1e-12)


def test_several_taps_of_one_layer():
    handle = tiny_handle("llama", dtype=torch.float64)
    delta = torch.randn(2, 2, handle.hidden_size, dtype=torch.float64)
    replay = Replay(handle, ROWS, CHANGE, [Site(Role.ATTN, 1), Site(Role.MLP, 1)], WANTED)

    def add(index):
        def write(value):
            update = torch.zeros_like(value)
            update[torch.arange(len(ROWS)), torch.tensor(CHANGE)] = delta[OWNER, index]
            return value + update

        return write

    with trace(handle, writes={Site(Role.ATTN, 1): add(0), Site(Role.MLP, 1): add(1)}) as recording:
        logits = recording.run(pad_rows(ROWS, 0))
    assert logits is not None
    expected = torch.cat([logits[row, places] for row, places in enumerate(WANTED)])
    assert torch.allclose(replay.run(delta, OWNER).logits, expected, atol=1e-10)
    single = Replay(handle, ROWS, CHANGE, Site(Role.MLP, 1), WANTED)
    assert replay.bases.shape == (len(ROWS), 2, handle.hidden_size)
    assert torch.equal(replay.bases[:, 0], replay.base)
    assert torch.equal(replay.bases[:, 1], single.base)


def test_base_is_the_unchanged_output_at_the_change():
    handle = tiny_handle("opt", dtype=torch.float64)
    replay = Replay(handle, ROWS, CHANGE, Site(Role.MLP, 2), WANTED)
    with trace(handle, reads=[Site(Role.MLP, 2)]) as recording:
        recording.run(pad_rows(ROWS, 0))
    expected = recording[Site(Role.MLP, 2)][torch.arange(4), torch.tensor(CHANGE)]
    assert torch.allclose(replay.base, expected, atol=1e-12)


@pytest.mark.parametrize(
    "change, wanted, tap",
    [
        ([9, 0, 4, 18], WANTED, Site(Role.MLP, 1)),
        (CHANGE, [[1], [1], [], [20]], Site(Role.MLP, 1)),
        (CHANGE, [[5], [1], [], [20]], Site(Role.MLP, 1)),
        (CHANGE, WANTED, Site(Role.MLP_OUT, 1)),
        (CHANGE, WANTED, Site(Role.MLP, 1, "in")),
        (CHANGE, WANTED, [Site(Role.MLP, 1), Site(Role.ATTN, 2)]),
        (CHANGE, WANTED, [Site(Role.MLP, 1), Site(Role.BLOCK, 1)]),
        (CHANGE, WANTED, []),
        (CHANGE[:2], WANTED, Site(Role.MLP, 1)),
    ],
)
def test_refuses_what_it_cannot_replay(change, wanted, tap):
    with pytest.raises(ConfigError):
        Replay(tiny_handle("llama"), ROWS, change, tap, wanted)
