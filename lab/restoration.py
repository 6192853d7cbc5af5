"""The engine of causal tracing: clean runs, noise on the subject, and rows that each restore something."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from lab.arch import Role
from lab.errors import ConfigError, NumericalError
from lab.scoring import log_probs
from lab.tokens import Batch, pad_rows
from lab.trace import Site, trace

if TYPE_CHECKING:
    from lab.handle import ModelHandle

Kind = Literal["block", "mlp", "attn"]

KIND_ROLES = {"block": Role.BLOCK, "mlp": Role.MLP, "attn": Role.ATTN}


@dataclass(frozen=True, eq=False)
class Case:
    """One prompt, run clean."""

    ids: list[int]
    subject: range
    answer: int
    clean: float
    states: Tensor  # [layer, token, d]


def noise_std_of(handle: ModelHandle, noise: str | float, pieces: Sequence[Sequence[int]]) -> float:
    """Standard deviation of the noise: a number as it is, ``"s3"`` from the embeddings of the tokens in ``pieces``."""
    if isinstance(noise, str):
        try:
            factor = float(noise.removeprefix("s")) if noise.startswith("s") else float("nan")
        except ValueError:
            factor = float("nan")
        if not factor > 0:
            raise ConfigError(f"unknown noise {noise!r}; use 's3' (3 standard deviations) or a number")
        ids = torch.tensor([token for piece in pieces for token in piece], device=handle.device)
        return factor * float(handle.module(Role.EMBED)(ids[None]).double().std())
    if not noise > 0:
        raise ConfigError(f"the noise must be positive, it is {noise}")
    return float(noise)


def clean_cases(handle: ModelHandle, kind: str, prompts: Sequence[tuple[list[int], range]]) -> list[Case]:
    """Runs prompts without noise and keeps what can be restored."""
    sites = [Site(KIND_ROLES[kind], layer) for layer in range(handle.n_layers)]
    batch = pad_rows([ids for ids, _ in prompts], handle.pad_id, device=handle.device)
    with trace(handle, sites) as recording:
        logits = recording.run(batch)
        states = torch.stack([recording[site] for site in sites], dim=1)
    if logits is None:
        raise NumericalError("the forward pass gave no logits")
    cases = []
    for row, (ids, span) in enumerate(prompts):
        table = log_probs(logits[row, len(ids) - 1])
        answer = int(table.argmax())
        cases.append(Case(ids, span, answer, float(table[answer].exp()), states[row, :, : len(ids)]))
    return cases


@dataclass(frozen=True)
class _Row:
    """One row to run: which case and noise sample, and what to put back."""

    case: int
    sample: int
    token: int = -1
    layer: int = -1


def trace_cases(
    handle: ModelHandle,
    kind: str,
    window: int,
    cases: Sequence[Case],
    std: float,
    samples: int,
    seed: int,
    batch_tokens: int,
) -> tuple[list[float], list[Tensor]]:
    """Corrupted probability and effects ``[token, layer]`` of each case."""
    if samples < 1:
        raise ConfigError(f"tracing needs at least one noise sample, not {samples}")
    depth = handle.n_layers
    rows = []
    for index, case in enumerate(cases):
        rows += [_Row(index, sample) for sample in range(samples)]
        # Left of the subject nothing is corrupted, so nothing can be restored: those effects are exactly 0.
        places = range(case.subject[0], len(case.ids))
        rows += [
            _Row(index, s, token, layer) for token in places for layer in range(depth) for s in range(samples)
        ]
    # The same draws for every case, as in the reference: a fixed generator per prompt.
    longest = max((len(case.subject) for case in cases), default=0)
    size = handle.module(Role.EMBED)(torch.zeros(1, 1, dtype=torch.long, device=handle.device)).shape[-1]
    generator = torch.Generator().manual_seed(seed)
    draws = (
        torch.randn(longest, samples, size, generator=generator, dtype=torch.float64).transpose(0, 1) * std
    )
    scores: dict[_Row, float] = {}
    for start, stop in _chunks([len(cases[row.case].ids) for row in rows], batch_tokens):
        part = rows[start:stop]
        values = _run_rows(handle, kind, window, cases, part, draws)
        scores.update(zip(part, values.tolist(), strict=True))
    corrupted = [sum(scores[_Row(index, s)] for s in range(samples)) / samples for index in range(len(cases))]
    effects = []
    for index, case in enumerate(cases):
        effect = torch.zeros(len(case.ids), depth, dtype=torch.float64)
        for token in range(case.subject[0], len(case.ids)):
            for layer in range(depth):
                mean = sum(scores[_Row(index, s, token, layer)] for s in range(samples)) / samples
                effect[token, layer] = mean - corrupted[index]
        effects.append(effect)
    return corrupted, effects


def _chunks(lengths: Sequence[int], batch_tokens: int) -> list[tuple[int, int]]:
    """Runs of rows of one length, each of at most ``batch_tokens`` tokens (one row at least)."""
    chunks, start = [], 0
    for at in range(1, len(lengths) + 1):
        full = at < len(lengths) and (at + 1 - start) * lengths[start] > batch_tokens
        if at == len(lengths) or lengths[at] != lengths[start] or full:
            chunks.append((start, at))
            start = at
    return chunks


def _run_rows(
    handle: ModelHandle, kind: str, window: int, cases: Sequence[Case], rows: Sequence[_Row], draws: Tensor
) -> Tensor:
    """Probability of each row's answer, ``[row]``."""
    device = handle.device
    ids = torch.tensor([cases[row.case].ids for row in rows], device=device)
    positions = torch.arange(ids.shape[1], device=device).expand_as(ids)
    batch = Batch(ids, torch.ones_like(ids), positions)

    def corrupt(embedded: Tensor) -> Tensor:
        noise = torch.zeros_like(embedded)
        for index, row in enumerate(rows):
            span = cases[row.case].subject
            noise[index, span.start : span.stop] = draws[row.sample, : len(span)].to(noise)
        return embedded + noise

    def restore(layer: int, touched: Sequence[int]) -> Callable[[Tensor], Tensor]:
        places = torch.tensor([rows[index].token for index in touched], device=device)
        clean = torch.stack([cases[rows[index].case].states[layer, rows[index].token] for index in touched])

        def write(output: Tensor) -> Tensor:
            return output.index_put((torch.tensor(touched, device=device), places), clean.to(output.dtype))

        return write

    writes: dict[Site, Callable[[Tensor], Tensor]] = {Site(Role.EMBED): corrupt}
    for layer in range(handle.n_layers):
        touched = [
            index
            for index, row in enumerate(rows)
            if row.token >= 0 and row.layer - window // 2 <= layer < row.layer + (window + 1) // 2
        ]
        if touched:
            writes[Site(KIND_ROLES[kind], layer)] = restore(layer, touched)
    with trace(handle, writes=writes) as recording:
        logits = recording.run(batch, logits_to_keep=1)
    if logits is None:
        raise NumericalError("the forward pass gave no logits")
    answers = torch.tensor([cases[row.case].answer for row in rows], device=device)
    return log_probs(logits[:, -1]).gather(-1, answers[:, None]).squeeze(-1).exp().double().cpu()
