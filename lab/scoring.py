"""Log-probabilities, divergences and teacher-forced target scores, with every mask explicit.

The functions on tensors are pure: aligned inputs in, numbers out, no shifting inside. A position that a mask leaves out
never reaches the log-softmax. Softmax runs in fp32, or in fp64 where the logits are fp64.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from lab.errors import ConfigError, EmptyTargetError, RequestError
from lab.tokens import join_target, pad_rows

if TYPE_CHECKING:
    from lab.handle import ModelHandle

Reduction = Literal["mean", "sum", "none", "row_mean", "row_sum"]


@dataclass(frozen=True)
class TargetScore:
    """How a model rates one continuation of one prompt, token by token.

    Attributes:
        token_logprobs: Natural-log probability of each target token given the prompt and the target tokens before it.
        token_correct: Whether that token was the most probable one at its place.
    """

    token_logprobs: tuple[float, ...]
    token_correct: tuple[bool, ...]

    @property
    def sum_logprob(self) -> float:
        """Log-probability of the whole target."""
        return math.fsum(self.token_logprobs)

    @property
    def mean_logprob(self) -> float:
        """Log-probability per target token."""
        return self.sum_logprob / len(self.token_logprobs)

    @property
    def probability(self) -> float:
        """``exp`` of the mean token log-probability, the papers' length-normalised probability."""
        return math.exp(self.mean_logprob)

    @property
    def accuracy(self) -> float:
        """Share of target tokens that are the most probable one."""
        return sum(self.token_correct) / len(self.token_correct)

    @property
    def all_correct(self) -> bool:
        """Whether teacher-forced greedy decoding gives the target."""
        return all(self.token_correct)


def log_probs(logits: Tensor) -> Tensor:
    """Log-softmax over the last dimension in fp32 (fp64 for fp64 logits).

    Args:
        logits: ``[..., vocabulary]``.

    Returns:
        ``[..., vocabulary]``.
    """
    return torch.log_softmax(logits, dim=-1, dtype=torch.promote_types(logits.dtype, torch.float32))


def greedy_tokens(logits: Tensor) -> Tensor:
    """The most probable token at each position.

    Args:
        logits: ``[..., vocabulary]``.

    Returns:
        ``[...]`` of int64; of several equal maxima, the lowest id.
    """
    return logits.argmax(dim=-1)


def kl_divergence(
    logp: Tensor, logq: Tensor, mask: Tensor | None = None, reduction: Reduction = "mean"
) -> Tensor:
    """KL(p ‖ q) of two tables of log-probabilities.

    Args:
        logp: ``[..., vocabulary]``, log-probabilities of the distribution that the expectation is over.
        logq: The same shape.
        mask: ``[...]``, positions that count; all of them when absent.
        reduction: As in ``reduce_positions``.

    Returns:
        A scalar, a row vector, or ``[...]`` according to ``reduction``.
    """
    # p = 0 makes p * (log p - log q) = 0 * -inf; the limit is 0.
    gap = torch.where(logp == -math.inf, torch.zeros_like(logp), logp - logq)
    return reduce_positions((logp.exp() * gap).sum(-1), mask, reduction)


def nll(logits: Tensor, labels: Tensor, mask: Tensor | None = None, reduction: Reduction = "mean") -> Tensor:
    """Negative log-likelihood of labels that are already aligned with the logits that predict them.

    Args:
        logits: ``[..., vocabulary]``; position ``i`` predicts ``labels[i]``.
        labels: ``[...]`` of token ids; ignored where ``mask`` is false (any value there, -100 included).
        mask: ``[...]``, positions that count; without it, those whose label is not -100.
        reduction: As in ``reduce_positions``.

    Returns:
        A scalar, a row vector, or ``[...]`` according to ``reduction``.
    """
    wanted = (labels != -100) if mask is None else mask.bool()
    table = log_probs(logits[wanted])
    picked = -table.gather(-1, labels[wanted].unsqueeze(-1)).squeeze(-1)
    positions = torch.zeros(labels.shape, dtype=table.dtype, device=table.device).masked_scatter(
        wanted, picked
    )
    return reduce_positions(positions, wanted, reduction)


def reduce_positions(values: Tensor, mask: Tensor | None, reduction: Reduction) -> Tensor:
    """Reduces per-position values over the positions that count.

    Args:
        values: ``[..., pos]``.
        mask: ``[..., pos]`` or ``None`` for all positions.
        reduction: ``mean`` and ``sum`` over every counted position; ``row_mean`` and ``row_sum`` over the last dimension
            only; ``none`` keeps the shape and puts 0 where the mask is false.

    Raises:
        ConfigError: A mean over no position at all, or an unknown reduction.
    """
    kept = torch.ones_like(values, dtype=torch.bool) if mask is None else mask.bool()
    # where() and not a product: NaN or infinity under a false mask must not leak into the sum.
    values = torch.where(kept, values, torch.zeros_like(values))
    if reduction == "none":
        return values
    dims = (-1,) if reduction.startswith("row") else tuple(range(values.dim()))
    total = values.sum(dims)
    if reduction in ("sum", "row_sum"):
        return total
    if reduction not in ("mean", "row_mean"):
        raise ConfigError(f"unknown reduction {reduction!r}; known: mean, sum, none, row_mean, row_sum")
    counts = kept.sum(dims)
    if bool((counts == 0).any()):
        raise ConfigError("a mean over no position: the mask leaves a row or the whole batch empty")
    return total / counts


def score_targets(
    handle: ModelHandle, pairs: Sequence[tuple[str, str]], *, batch_size: int = 64
) -> list[TargetScore]:
    """Scores each target as the continuation of its prompt.

    Rows are right-padded and grouped by length, so the result does not depend on what else is in the list beyond
    rounding; order is that of ``pairs``.

    Args:
        handle: The model to ask.
        pairs: Prompt and target; the space between them follows ``tokens.join_target``. Prompts go through
            ``handle.rewrite``.
        batch_size: Rows in one forward pass.

    Raises:
        EmptyTargetError: A target has no tokens.
    """
    with handle.reading():
        prompts = handle.rewrite([prompt for prompt, _ in pairs])
        rows: list[tuple[list[int], list[int]]] = [
            join_target(handle.tokenizer, prompt, target)
            for prompt, (_, target) in zip(prompts, pairs, strict=True)
        ]
        return score_token_targets(handle, rows, batch_size=batch_size)


@torch.no_grad()
def score_token_targets(
    handle: ModelHandle, rows: Sequence[tuple[Sequence[int], Sequence[int]]], *, batch_size: int = 64
) -> list[TargetScore]:
    """``score_targets`` for token ids that are known already.

    Args:
        handle: The model to ask.
        rows: Prompt ids and target ids; the prompt holds at least one token, for something must predict the first target.
        batch_size: Rows in one forward pass.

    Raises:
        EmptyTargetError: A target has no tokens.
        RequestError: A prompt has no tokens.
    """
    if batch_size < 1:
        raise ConfigError(f"batch_size must be at least 1, it is {batch_size}")
    for number, (prompt, target) in enumerate(rows):
        if not target:
            raise EmptyTargetError(f"pair {number}: the target has no tokens")
        if not prompt:
            raise RequestError(
                f"pair {number}: the prompt has no tokens, so nothing predicts the first target token"
            )
    order = sorted(range(len(rows)), key=lambda index: (len(rows[index][0]) + len(rows[index][1]), index))
    scores: dict[int, TargetScore] = {}
    with handle.reading():
        for start in range(0, len(order), batch_size):
            chunk = order[start : start + batch_size]
            batch = pad_rows(
                [[*rows[i][0], *rows[i][1][:-1]] for i in chunk],
                handle.pad_id,
                device=handle.device,
                prompts=[len(rows[i][0]) for i in chunk],
            )
            firsts = [len(rows[i][0]) - 1 for i in chunk]
            # Everything left of the shortest prompt's end is context for all rows: its logits are never made.
            low = min(firsts)
            keep = torch.arange(low, batch.input_ids.shape[1], device=handle.device)
            logits = handle.logits(batch, logits_to_keep=keep)
            where = torch.tensor([r for r, i in enumerate(chunk) for _ in rows[i][1]], device=handle.device)
            columns = [
                first - low + j
                for first, i in zip(firsts, chunk, strict=True)
                for j in range(len(rows[i][1]))
            ]
            wanted = logits[where, torch.tensor(columns, device=handle.device)]
            targets = torch.tensor([token for i in chunk for token in rows[i][1]], device=handle.device)
            logprobs = log_probs(wanted).gather(-1, targets.unsqueeze(-1)).squeeze(-1).tolist()
            correct = (greedy_tokens(wanted) == targets).tolist()
            at = 0
            for i in chunk:
                size = len(rows[i][1])
                scores[i] = TargetScore(tuple(logprobs[at : at + size]), tuple(correct[at : at + size]))
                at += size
    return [scores[index] for index in range(len(rows))]
