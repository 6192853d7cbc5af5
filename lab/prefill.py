"""The one full pass behind a replay: keys and values of everything before a change, and what the tap's block did after it.

Rows that begin alike (many edits in the same contexts) have their common beginning computed once.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from lab.arch import Role
from lab.errors import ConfigError
from lab.handle import ModelHandle
from lab.tokens import Batch, pad_rows

# Tokens in one forward pass. More does not help a CPU, whose caches and allocator prefer small tensors.
_CPU_TOKENS = 1024
_DEVICE_TOKENS = 16_384
# A second pass over the model pays when it saves at least this share of the tokens.
_WORTH_SHARING = 0.2

KeysValues = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Prefill:
    """What the pass leaves. Columns ``[0, column)`` are prefixes aligned to the right, then suffixes aligned to the left.

    Attributes:
        input_ids, position_ids: ``[row, suffix]``.
        attention_mask: ``[row, column + suffix]``.
        entering: Hidden states that enter the tapped block, ``[row, suffix, d]``.
        outputs: Output of each tapped role, ``[row, suffix, d]``.
        sizes: Length of the tuple that each role's module returns, ``None`` where it returns a tensor.
        cache: Keys and values of the blocks above, each ``[row, head, column, width]``.
    """

    input_ids: Tensor
    position_ids: Tensor
    attention_mask: Tensor
    entering: Tensor
    outputs: dict[Role, Tensor]
    sizes: dict[Role, int | None]
    cache: tuple[KeysValues, ...]


def prefill(
    handle: ModelHandle,
    rows: Sequence[Sequence[int]],
    change: Sequence[int],
    layer: int,
    roles: Sequence[Role],
) -> Prefill:
    """Runs each row once and keeps what a change at ``change`` does not touch.

    Args:
        handle: The model; the caller holds its write lock.
        rows: Token ids.
        change: For each row, where its suffix begins.
        layer: Tapped block.
        roles: Modules of that block whose outputs are kept.
    """
    column, width = max(change), max(len(row) - at for row, at in zip(rows, change, strict=True))
    shared = shared_lengths(rows, change)
    heads, head_of = heads_of(rows, shared)
    above: list[KeysValues] = []
    if heads:
        parts = [
            _run(handle, [heads[i] for i in chunk], None, ()).cache for chunk in token_chunks(handle, heads)
        ]
        above = join_caches(parts, max(len(head) for head in heads))
    tails = [list(row[length:]) for row, length in zip(rows, shared, strict=True)]
    pieces = []
    for chunk in token_chunks(handle, tails):
        start = Behind([shared[i] for i in chunk], [head_of[i] for i in chunk], above) if above else None
        pass_ = _run(handle, [tails[i] for i in chunk], start, tuple(roles), layer)
        pieces.append(
            _cut(handle, pass_, [rows[i] for i in chunk], [change[i] for i in chunk], column, width, layer)
        )
    return _concatenated(pieces)


def shared_lengths(rows: Sequence[Sequence[int]], change: Sequence[int]) -> list[int]:
    """For each row, how many of its first tokens another row has too (never past its change); zeros where it does not pay."""
    order = sorted(range(len(rows)), key=lambda index: list(rows[index]))
    shared = [0] * len(rows)
    for first, second in itertools.pairwise(order):
        common = 0
        for left, right in zip(rows[first], rows[second], strict=False):
            if left != right:
                break
            common += 1
        for index in (first, second):
            shared[index] = max(shared[index], min(common, change[index]))
    heads, _ = heads_of(rows, shared)
    saved = sum(shared) - sum(len(head) for head in heads)
    return shared if saved > _WORTH_SHARING * sum(len(row) for row in rows) else [0] * len(rows)


def cache_of(layers: Sequence[KeysValues]) -> DynamicCache:
    """A cache that starts from given tensors and grows out of place, so that they stay as they are."""
    cache = DynamicCache()
    for keys, values in layers:
        layer = DynamicLayer()
        layer.lazy_initialization(keys, values)
        layer.keys, layer.values = keys, values
        cache.layers.append(layer)
    return cache


@dataclass(frozen=True)
class Behind:
    """Where rows go on: how many tokens they have behind them, and whose keys and values those are."""

    lengths: Sequence[int]
    heads: Sequence[int]
    above: Sequence[KeysValues]


@dataclass(frozen=True)
class _Pass:
    """One forward pass; token ``j`` of a row is at ``j - skipped`` in ``seen`` and at ``j + offset`` in ``cache``."""

    seen: dict[Role | str, Tensor]
    sizes: dict[Role, int | None]
    cache: list[KeysValues]
    skipped: Tensor
    offset: Tensor


def heads_of(rows: Sequence[Sequence[int]], shared: Sequence[int]) -> tuple[list[list[int]], list[int]]:
    """The distinct beginnings but for those that begin another one, and for each row which one holds its own.

    A row without a beginning is given 0: its length masks it.
    """
    heads: list[tuple[int, ...]] = []
    holder: dict[tuple[int, ...], int] = {}
    # In this order a beginning comes right after what it begins.
    for head in sorted({tuple(row[:length]) for row, length in zip(rows, shared, strict=True)}, reverse=True):
        if head and (not heads or heads[-1][: len(head)] != head):
            heads.append(head)
        holder[head] = max(0, len(heads) - 1)
    mine = [holder[tuple(row[:length])] for row, length in zip(rows, shared, strict=True)]
    return [list(head) for head in heads], [
        at if length else 0 for at, length in zip(mine, shared, strict=True)
    ]


def token_chunks(handle: ModelHandle, rows: Sequence[Sequence[int]]) -> list[list[int]]:
    """Consecutive rows that go through the model together: about as many tokens as the device likes."""
    width = max(len(row) for row in rows)
    size = max(1, (_CPU_TOKENS if handle.device.type == "cpu" else _DEVICE_TOKENS) // width)
    return [list(range(begin, min(begin + size, len(rows)))) for begin in range(0, len(rows), size)]


def begin(
    handle: ModelHandle, rows: Sequence[Sequence[int]], start: Behind | None
) -> tuple[Batch, DynamicCache, Tensor, int]:
    """What a forward pass is fed that goes on behind other rows.

    Args:
        handle: The model.
        rows: The tokens that are new.
        start: What is behind them.

    Returns:
        The batch; the filled cache; how many tokens each row has behind it, ``[row]``; the columns that the cache holds, in which
        those tokens are aligned to the right.
    """
    device = handle.device
    batch = pad_rows(rows, handle.pad_id, "right", device)
    skipped = torch.tensor([0] * len(rows) if start is None else list(start.lengths), device=device)
    if start is None:
        return batch, DynamicCache(), skipped, 0
    room = max(start.lengths)
    places = torch.arange(room, device=device)[None] - (room - skipped)[:, None]
    index = torch.tensor(list(start.heads), device=device)
    cache = cache_of([(aligned(k[index], places), aligned(v[index], places)) for k, v in start.above])
    mask = torch.cat([(places >= 0).to(batch.attention_mask.dtype), batch.attention_mask], dim=1)
    return Batch(batch.input_ids, mask, batch.position_ids + skipped[:, None]), cache, skipped, room


def _run(
    handle: ModelHandle, rows: list[list[int]], start: Behind | None, roles: tuple[Role, ...], layer: int = 0
) -> _Pass:
    batch, cache, skipped, room = begin(handle, rows, start)
    seen: dict[Role | str, Tensor] = {}
    sizes: dict[Role, int | None] = {}

    def keep_output(role: Role) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            sizes[role] = len(output) if isinstance(output, tuple) else None
            value = output[0] if isinstance(output, tuple) else output
            # OPT feeds its MLP [batch*pos, d].
            seen[role] = value.reshape(len(rows), -1, value.shape[-1])

        return hook

    def keep_input(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen["entering"] = args[0] if args else kwargs["hidden_states"]

    def no_logits(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (args[0][:, :0],)

    hooks = []
    try:
        for role in roles:
            hooks.append(handle.module(role, layer).register_forward_hook(keep_output(role)))
        block = handle.module(Role.BLOCK, layer)
        hooks.append(block.register_forward_pre_hook(keep_input, with_kwargs=True))
        hooks.append(handle.module(Role.UNEMBED).register_forward_pre_hook(no_logits))
        handle.model(**handle.inputs(batch), past_key_values=cache, use_cache=True)
    finally:
        for hook in hooks:
            hook.remove()
    return _Pass(seen, sizes, [stored_keys_values(each) for each in cache.layers], skipped, room - skipped)


def _cut(
    handle: ModelHandle,
    pass_: _Pass,
    rows: Sequence[Sequence[int]],
    change: Sequence[int],
    column: int,
    width: int,
    layer: int,
) -> Prefill:
    device = handle.device
    lengths = torch.tensor([len(row) for row in rows], device=device)
    starts = torch.tensor(list(change), device=device)
    place = starts[:, None] + torch.arange(width, device=device)[None]
    inside = place < lengths[:, None]
    place = torch.minimum(place, lengths[:, None] - 1)
    before = torch.arange(column, device=device)[None] - (column - starts)[:, None]
    ids = pad_rows(rows, handle.pad_id, "right", device).input_ids

    def suffix(values: Tensor) -> Tensor:
        index = (place - pass_.skipped[:, None])[..., None].expand(-1, -1, values.shape[-1])
        return values.gather(1, index)

    def prefix(values: Tensor) -> Tensor:
        return aligned(values, torch.where(before < 0, before, before + pass_.offset[:, None]))

    return Prefill(
        input_ids=ids.gather(1, place).masked_fill(~inside, handle.pad_id),
        position_ids=place,
        attention_mask=torch.cat([before >= 0, inside], dim=1).to(torch.long),
        entering=suffix(pass_.seen["entering"]),
        outputs={role: suffix(pass_.seen[role]) for role in pass_.sizes},
        sizes=pass_.sizes,
        cache=tuple((prefix(keys), prefix(values)) for keys, values in pass_.cache[layer + 1 :]),
    )


def aligned(values: Tensor, places: Tensor) -> Tensor:
    """``values[row, head, place, width]`` at ``places[row, column]``, zero where a place is negative."""
    index = places.clamp(min=0)[:, None, :, None].expand(-1, values.shape[1], -1, values.shape[-1])
    # Zeros, not garbage: a masked weight of 0 times an infinity would still poison the row.
    return values.gather(2, index).masked_fill((places < 0)[:, None, :, None], 0)


def join_caches(parts: Sequence[list[KeysValues]], length: int) -> list[KeysValues]:
    """Caches of several chunks as one, padded on the right to one length."""

    def padded(values: Tensor) -> Tensor:
        return torch.nn.functional.pad(values, (0, 0, 0, length - values.shape[2]))

    return [
        (
            torch.cat([padded(part[at][0]) for part in parts]),
            torch.cat([padded(part[at][1]) for part in parts]),
        )
        for at in range(len(parts[0]))
    ]


def _concatenated(pieces: Sequence[Prefill]) -> Prefill:
    if len(pieces) == 1:
        return pieces[0]
    first = pieces[0]
    return Prefill(
        input_ids=torch.cat([piece.input_ids for piece in pieces]),
        position_ids=torch.cat([piece.position_ids for piece in pieces]),
        attention_mask=torch.cat([piece.attention_mask for piece in pieces]),
        entering=torch.cat([piece.entering for piece in pieces]),
        outputs={role: torch.cat([piece.outputs[role] for piece in pieces]) for role in first.outputs},
        sizes=first.sizes,
        cache=tuple(
            (
                torch.cat([piece.cache[at][0] for piece in pieces]),
                torch.cat([piece.cache[at][1] for piece in pieces]),
            )
            for at in range(len(first.cache))
        ),
    )


def stored_keys_values(layer: Any) -> KeysValues:
    """Keys and values of one layer of a filled cache.

    Raises:
        ConfigError: The layer is of another kind, or empty.
    """
    if not isinstance(layer, DynamicLayer) or layer.keys is None or layer.values is None:
        raise ConfigError(
            "the model left its key/value cache empty; replay and tracing need a family that fills it"
        )
    return layer.keys, layer.values
