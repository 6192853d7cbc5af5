"""Prompts with targets as one batch whose log-probabilities can be differentiated, with activations written on the way."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lab.handle import ModelHandle
from lab.scoring import log_probs
from lab.tokens import Batch, join_target, pad_rows
from lab.trace import Site, Write, trace


@dataclass(frozen=True)
class Lines:
    """Padded rows of prompt and target.

    Attributes:
        batch: The rows, without each target's last token, which predicts nothing.
        targets: ``[row, longest]`` target ids; 0 past a target's end.
        columns: ``[row, longest]``, the column that predicts each target token; 0 past the end.
        mask: ``[row, longest]`` bool, real target tokens.
    """

    batch: Batch
    targets: Tensor
    columns: Tensor
    mask: Tensor

    @property
    def prompt_last(self) -> Tensor:
        """``[row]``, the column of each prompt's last token."""
        return self.columns[:, 0]

    def logprobs(self, logits: Tensor) -> Tensor:
        """Log-probability of each whole target, ``[row]``, from ``logits [row, pos, vocabulary]``."""
        rows = torch.arange(logits.shape[0], device=logits.device)[:, None]
        table = log_probs(logits[rows, self.columns])
        picked = table.gather(-1, self.targets.unsqueeze(-1)).squeeze(-1)
        return torch.where(self.mask, picked, torch.zeros_like(picked)).sum(-1)


def id_lines(handle: ModelHandle, rows: Sequence[tuple[Sequence[int], Sequence[int]]]) -> Lines:
    """Lines of prompt ids and target ids, at least one token in each."""
    batch = pad_rows(
        [[*prompt, *target[:-1]] for prompt, target in rows],
        handle.pad_id,
        device=handle.device,
        prompts=[len(prompt) for prompt, _ in rows],
    )
    longest = max(len(target) for _, target in rows)
    targets = torch.zeros(len(rows), longest, dtype=torch.long)
    columns, mask = torch.zeros_like(targets), torch.zeros(len(rows), longest, dtype=torch.bool)
    for row, (prompt, target) in enumerate(rows):
        size = len(target)
        targets[row, :size] = torch.tensor(list(target))
        columns[row, :size] = torch.arange(len(prompt) - 1, len(prompt) - 1 + size)
        mask[row, :size] = True
    return Lines(batch, targets.to(handle.device), columns.to(handle.device), mask.to(handle.device))


def text_ids(handle: ModelHandle, pairs: Sequence[tuple[str, str]]) -> list[tuple[list[int], list[int]]]:
    """Token ids of prompts, as they are fed under the patches applied now, and of their targets."""
    prompts = handle.rewrite([prompt for prompt, _ in pairs])
    return [
        join_target(handle.tokenizer, prompt, target)
        for prompt, (_, target) in zip(prompts, pairs, strict=True)
    ]


def written_logprobs(
    handle: ModelHandle, lines: Lines, writes: Mapping[Site, Write] | None = None, *, grad: bool = False
) -> Tensor:
    """Log-probability of each target ``[row]`` while activations are written.

    Args:
        handle: The model.
        lines: What is fed.
        writes: As in ``lab.trace.trace``.
        grad: Keep the graph, for gradients of what the writes depend on.
    """
    with trace(handle, writes=writes, detach=not grad) as recording:
        logits = recording.run(lines.batch)
    assert logits is not None
    return lines.logprobs(logits)
