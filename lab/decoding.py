"""Continuing many prompts at once with a key/value cache, so that a text does not depend on its neighbours in the batch.

Sampling draws each row's numbers from a seed of that row, not from one generator for the whole batch: the same prompt under
the same seed gives the same text alone, in any batch, and with other patches in the rows beside it.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import DynamicCache

from lab.errors import ConfigError
from lab.rowwise import NOBODY, RowPatches
from lab.tokens import Batch, pad_rows

if TYPE_CHECKING:
    from lab.handle import ModelHandle


@dataclass(frozen=True)
class Start:
    """A prompt to continue.

    Attributes:
        ids: Its tokens, at least one.
        tokens: Length of the continuation at most.
        seed: Seeds the sampling of this row.
        owner: Index of the patch that the row carries.
    """

    ids: tuple[int, ...]
    tokens: int
    seed: int = 0
    owner: int = NOBODY


@torch.no_grad()
def continue_rows(
    handle: ModelHandle,
    starts: Sequence[Start],
    *,
    top_k: int | None = None,
    patches: RowPatches | None = None,
    batch_size: int = 64,
) -> list[list[int]]:
    """Tokens after each prompt, up to and without the token that ends a text.

    Args:
        handle: The model.
        starts: Prompts.
        top_k: Samples among so many tokens at temperature 1; greedy without it.
        patches: What the owners of the rows index.
        batch_size: Rows in one forward pass.

    Raises:
        ConfigError: A row names a patch and there are none.
    """
    if patches is None and any(start.owner != NOBODY for start in starts):
        raise ConfigError("a row names a patch, but no patches were given")
    # Rows of one length, and that end at one step, waste the least.
    order = sorted(
        range(len(starts)), key=lambda index: (starts[index].tokens, len(starts[index].ids), index)
    )
    found: list[list[int]] = [[] for _ in starts]
    with handle.reading() if patches is None else handle.writing():
        for begin in range(0, len(order), batch_size):
            chosen = order[begin : begin + batch_size]
            texts = _decode(handle, [starts[index] for index in chosen], top_k, patches)
            for index, text in zip(chosen, texts, strict=True):
                found[index] = text
    return found


def _decode(
    handle: ModelHandle, starts: Sequence[Start], top_k: int | None, patches: RowPatches | None
) -> list[list[int]]:
    batch = pad_rows([start.ids for start in starts], handle.pad_id, "left", handle.device)
    ids, mask, positions = batch.input_ids, batch.attention_mask, batch.position_ids
    limits = torch.tensor([start.tokens for start in starts], device=handle.device)
    longest = int(limits.max())
    ends = torch.tensor(end_tokens(handle), dtype=torch.long, device=handle.device)
    luck = None if top_k is None else _luck([start.seed for start in starts], longest, handle.device)
    cache = DynamicCache()
    running = limits > 0
    steps: list[Tensor] = []
    lengths = torch.zeros_like(limits)
    owners = [start.owner for start in starts]
    with nullcontext() if patches is None else patches.carried(owners):
        for step in range(longest):
            inputs = handle.inputs(Batch(ids, mask, positions))
            logits = handle.model(**inputs, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
            token = _chosen(logits[:, -1], top_k, None if luck is None else luck[:, step])
            running = running & ~torch.isin(token, ends)
            steps.append(token)
            lengths = lengths + running
            running = running & (lengths < limits)
            if not bool(running.any()):
                break
            ids, positions = token[:, None], positions[:, -1:] + 1
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
    table = torch.stack(steps, dim=1).tolist() if steps else [[] for _ in starts]
    return [row[:length] for row, length in zip(table, lengths.tolist(), strict=True)]


def end_tokens(handle: ModelHandle) -> list[int]:
    """Token ids that end a text: those of the model's generation settings, else the tokenizer's."""
    settings = handle.model.generation_config
    named = None if settings is None else settings.eos_token_id
    if named is None:
        named = handle.tokenizer.eos_token_id
    return [
        int(token) for token in (named if isinstance(named, (list, tuple)) else [named]) if token is not None
    ]


def _luck(seeds: Sequence[int], steps: int, device: torch.device) -> Tensor:
    """Uniform numbers ``[row, step]``; a row's do not depend on the others or on how many steps there are."""
    rows = []
    for seed in seeds:
        draw = random.Random(seed)
        rows.append([draw.random() for _ in range(steps)])
    return torch.tensor(rows, dtype=torch.float64).to(device)


def _chosen(logits: Tensor, top_k: int | None, luck: Tensor | None) -> Tensor:
    """The next token of each row, ``[row]``, from ``logits [row, vocabulary]``."""
    if top_k is None or luck is None:
        return logits.argmax(dim=-1)
    best = logits.topk(min(top_k, logits.shape[-1]), dim=-1)
    steps = torch.softmax(best.values.double(), dim=-1).cumsum(dim=-1)
    # The last step may end just below 1.
    place = (steps < luck[:, None]).sum(dim=-1, keepdim=True).clamp_max(steps.shape[-1] - 1)
    return best.indices.gather(-1, place).squeeze(-1)
