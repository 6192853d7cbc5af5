"""Logits of many rows whose common beginnings are computed once.

A benchmark asks a hundred prompts that begin with the same statement, and every prompt with several answers behind it. Here the
rows form a tree: a beginning that several rows share goes through the model once, its own beginning likewise, and each row adds
what is only its own. The result equals the full pass over each row up to rounding.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lab.errors import ConfigError
from lab.prefill import (
    Behind,
    KeysValues,
    aligned,
    begin,
    heads_of,
    join_caches,
    shared_lengths,
    stored_keys_values,
    token_chunks,
)
from lab.rowwise import NOBODY, RowPatches
from lab.tokens import Batch, pad_rows

if TYPE_CHECKING:
    from lab.handle import ModelHandle

# Tokens whose keys and values may be held at once, before sharing.
_CPU_TOKENS = 4096
_DEVICE_TOKENS = 32_768
# Tokens that one pass with logits adds: with few, little is padding, and what the pass makes stays near the processor.
_CPU_PASS = 256
_DEVICE_PASS = 16_384

# Owner and tokens; rows of different owners share nothing, for their patches tell them apart.
_Line = tuple[int, tuple[int, ...]]


@dataclass(frozen=True)
class Line:
    """One row.

    Attributes:
        ids: Its tokens.
        first: The first column whose next-token logits are wanted; all after it are too.
        owner: Index of the patch that it carries.
        prompt: How many of its tokens are the prompt, at whose end memories decide; 0 for all.
    """

    ids: tuple[int, ...]
    first: int
    owner: int = NOBODY
    prompt: int = 0


@dataclass(frozen=True)
class LineLogits:
    """Logits of some lines.

    Attributes:
        lines: Indexes of the lines.
        logits: ``[line, column, vocabulary]``.
        offsets: For each line, the column of its own that ``logits[:, 0]`` belongs to.
    """

    lines: list[int]
    logits: Tensor
    offsets: list[int]


@torch.no_grad()
def line_logits(
    handle: ModelHandle, lines: Sequence[Line], *, patches: RowPatches | None = None, batch_size: int = 64
) -> Iterator[LineLogits]:
    """Runs rows; every line comes back exactly once, in whatever order shares most.

    Args:
        handle: The model, with whatever is applied to it.
        lines: The rows.
        patches: What the owners of the lines index.
        batch_size: Rows in one forward pass.

    Raises:
        ConfigError: A line wants nothing, or names a patch and there are none.
    """
    if any(not 0 <= line.first < len(line.ids) for line in lines):
        raise ConfigError("a line wants logits outside its tokens")
    if patches is None and any(line.owner != NOBODY for line in lines):
        raise ConfigError("a line names a patch, but no patches were given")
    order = sorted(range(len(lines)), key=lambda index: (lines[index].owner, lines[index].ids))
    limit = _CPU_TOKENS if handle.device.type == "cpu" else _DEVICE_TOKENS
    with handle.reading() if patches is None else handle.writing():
        if handle.stack.memory_inside:
            yield from _whole(handle, lines, patches, batch_size)
            return
        group: list[int] = []
        size = 0
        for index in order:
            if group and size + len(lines[index].ids) > limit:
                yield from _group(handle, lines, group, patches, batch_size)
                group, size = [], 0
            group.append(index)
            size += len(lines[index].ids)
        if group:
            yield from _group(handle, lines, group, patches, batch_size)


def _whole(
    handle: ModelHandle, lines: Sequence[Line], patches: RowPatches | None, batch_size: int
) -> Iterator[LineLogits]:
    """Shares nothing: a memory decides at the end of each prompt, on what it sees of the row in that pass."""
    order = sorted(range(len(lines)), key=lambda index: (len(lines[index].ids), index))
    for start in range(0, len(order), batch_size):
        chunk = order[start : start + batch_size]
        rows = [lines[index] for index in chunk]
        batch = pad_rows(
            [row.ids for row in rows],
            handle.pad_id,
            device=handle.device,
            prompts=[row.prompt or len(row.ids) for row in rows],
        )
        low = min(row.first for row in rows)
        keep = torch.arange(low, batch.input_ids.shape[1], device=handle.device)
        with _carried(patches, [row.owner for row in rows]):
            logits = handle.logits(batch, logits_to_keep=keep)
        yield LineLogits(chunk, logits, [low] * len(chunk))


def _group(
    handle: ModelHandle,
    lines: Sequence[Line],
    group: Sequence[int],
    patches: RowPatches | None,
    batch_size: int,
) -> Iterator[LineLogits]:
    rows: list[_Line] = [(lines[index].owner, lines[index].ids) for index in group]
    # The token at `first` predicts something, so it is run with its line.
    shared, above, head_of = _behind(handle, rows, [lines[index].first for index in group], patches)
    added = [len(ids) - length for (_, ids), length in zip(rows, shared, strict=True)]
    for chunk in _passes(handle, added, batch_size):
        tails = [list(rows[place][1][shared[place] :]) for place in chunk]
        wanted = [lines[group[place]].first - shared[place] for place in chunk]
        low = min(wanted)
        keep = torch.arange(low, max(map(len, tails)), device=handle.device)
        with _carried(patches, [rows[place][0] for place in chunk]):
            if above:
                lengths, heads = ([table[place] for place in chunk] for table in (shared, head_of))
                batch, cache, _, _ = begin(handle, tails, Behind(lengths, heads, above))
                inputs = handle.inputs(batch)
                logits = handle.model(
                    **inputs, past_key_values=cache, use_cache=True, logits_to_keep=keep
                ).logits
            else:
                batch = pad_rows(tails, handle.pad_id, device=handle.device)
                logits = handle.logits(batch, logits_to_keep=keep)
        yield LineLogits([group[place] for place in chunk], logits, [shared[place] + low for place in chunk])


def _passes(handle: ModelHandle, lengths: Sequence[int], batch_size: int) -> Iterator[list[int]]:
    """Which rows go through the model together; those that add the same number of tokens waste the least."""
    limit = _CPU_PASS if handle.device.type == "cpu" else _DEVICE_PASS
    chunk: list[int] = []
    for place in sorted(range(len(lengths)), key=lambda place: (lengths[place], place)):
        if chunk and (len(chunk) == batch_size or (len(chunk) + 1) * lengths[place] > limit):
            yield chunk
            chunk = []
        chunk.append(place)
    if chunk:
        yield chunk


def _behind(
    handle: ModelHandle, rows: Sequence[_Line], ends: Sequence[int], patches: RowPatches | None
) -> tuple[list[int], list[KeysValues], list[int]]:
    """How many tokens of each row are behind it (at most ``ends``), the keys and values of all beginnings, and whose is whose."""
    # The owner stands before the tokens, so that only rows of one owner begin alike.
    marked = [(-2 - owner, *ids) for owner, ids in rows]
    shared = shared_lengths(marked, [end + 1 for end in ends])
    shared = [length if length > 1 else 0 for length in shared]
    heads, head_of = heads_of(marked, shared)
    lengths = [max(0, length - 1) for length in shared]
    if not heads:
        return lengths, [], head_of
    known = _keys_values(handle, [(-2 - head[0], tuple(head[1:])) for head in heads], patches)
    return lengths, known, head_of


def _keys_values(handle: ModelHandle, rows: Sequence[_Line], patches: RowPatches | None) -> list[KeysValues]:
    """Keys and values of whole rows, ``[row, head, token, width]`` per layer, aligned to the left and padded with zeros."""
    longest = max(len(ids) for _, ids in rows)
    shared, above, head_of = _behind(handle, rows, [len(ids) - 1 for _, ids in rows], patches)
    tails = [list(ids[length:]) for (_, ids), length in zip(rows, shared, strict=True)]
    pieces = []
    for chunk in token_chunks(handle, tails):
        lengths, heads = ([table[place] for place in chunk] for table in (shared, head_of))
        behind = Behind(lengths, heads, above) if above else None
        batch, cache, skipped, room = begin(handle, [tails[place] for place in chunk], behind)
        with _carried(patches, [rows[place][0] for place in chunk]):
            _run_body(handle, batch, cache)
        sizes = torch.tensor([len(rows[place][1]) for place in chunk], device=handle.device)
        column = torch.arange(longest, device=handle.device)[None].expand(len(chunk), -1)
        places = torch.where(column < sizes[:, None], column + (room - skipped)[:, None], -1)
        stored = [stored_keys_values(layer) for layer in cache.layers]
        pieces.append([(aligned(keys, places), aligned(values, places)) for keys, values in stored])
    return join_caches(pieces, longest)


def _run_body(handle: ModelHandle, batch: Batch, cache: object) -> None:
    """Fills the cache; the head has nothing to say here."""
    handle.model.base_model(**handle.inputs(batch), past_key_values=cache, use_cache=True)


def _carried(patches: RowPatches | None, owners: Sequence[int]) -> AbstractContextManager[None]:
    return nullcontext() if patches is None else patches.carried(owners)
