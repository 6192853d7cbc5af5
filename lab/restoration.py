"""The engine of causal tracing: clean runs, noise on the subject, and rows that each restore something."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from lab.arch import Role
from lab.errors import ConfigError, NumericalError
from lab.prefill import stored_keys_values
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
    """Corrupted probability and effects ``[token, layer]`` of each case.

    Restoring something at token ``t`` of block ``l`` changes nothing left of ``t`` and nothing below ``l``. So the corrupted
    prompts run once in full, and each restoration re-runs the rest only, on the keys and values that were kept.
    """
    if samples < 1:
        raise ConfigError(f"tracing needs at least one noise sample, not {samples}")
    # The same draws for every case, as in the reference: a fixed generator per prompt.
    longest = max((len(case.subject) for case in cases), default=0)
    size = handle.module(Role.EMBED)(torch.zeros(1, 1, dtype=torch.long, device=handle.device)).shape[-1]
    generator = torch.Generator().manual_seed(seed)
    draws = torch.randn(longest, samples, size, generator=generator, dtype=torch.float64) * std
    corrupted = [0.0] * len(cases)
    effects = [torch.zeros(len(case.ids), handle.n_layers, dtype=torch.float64) for case in cases]
    for group in _groups(cases, max(1, batch_tokens // samples)):
        run = _Corrupted(handle, [cases[index] for index in group], draws)
        low = run.score.view(len(group), samples).mean(1)
        for place, index in enumerate(group):
            corrupted[index] = float(low[place])
        # Left of the subject nothing is corrupted, so nothing can be restored: those effects are exactly 0.
        first = min(cases[index].subject[0] for index in group)
        for token in range(first, len(cases[group[0]].ids)):
            inside = [place for place, index in enumerate(group) if cases[index].subject[0] <= token]
            part = run.after(token, inside)
            for layer in range(handle.n_layers):
                scores = part.restored(kind, layer, window).view(len(inside), samples).mean(1)
                for score, place in zip(scores, inside, strict=True):
                    effects[group[place]][token, layer] = score - low[place]
    return corrupted, effects


def _groups(cases: Sequence[Case], most_tokens: int) -> list[list[int]]:
    """Cases of one length together, at most ``most_tokens`` tokens in a group (one case at least)."""
    groups: list[list[int]] = []
    for index in sorted(range(len(cases)), key=lambda index: len(cases[index].ids)):
        length = len(cases[index].ids)
        last = groups[-1] if groups else []
        if not last or len(cases[last[0]].ids) != length or (len(last) + 1) * length > most_tokens:
            groups.append([])
        groups[-1].append(index)
    return groups


class _Corrupted:
    """Corrupted rows of cases of one length, run once: scores, keys and values, and what enters each block."""

    def __init__(self, handle: ModelHandle, cases: Sequence[Case], draws: Tensor) -> None:
        handle.stack.refuse_memories("causal tracing")
        self.handle, self.cases, self.samples = handle, cases, draws.shape[1]
        device = handle.device
        ids = torch.tensor([case.ids for case in cases], device=device)
        self.ids = ids.repeat_interleave(self.samples, 0)
        self.answers = torch.tensor([case.answer for case in cases], device=device).repeat_interleave(
            self.samples
        )
        self.noise = torch.zeros(*self.ids.shape, draws.shape[2], dtype=draws.dtype)
        for place, case in enumerate(cases):
            rows = slice(place * self.samples, (place + 1) * self.samples)
            self.noise[rows, case.subject.start : case.subject.stop] = draws[: len(case.subject)].transpose(
                0, 1
            )
        self.noise = self.noise.to(device=device, dtype=handle.dtype)
        cache = DynamicCache()
        entering = [Site(Role.BLOCK, layer, "in") for layer in range(handle.n_layers)]
        mask = torch.ones_like(self.ids)
        batch = Batch(self.ids, mask, mask.cumsum(1) - 1)
        self.sizes: list[int | None] = []
        hooks = [
            handle.module(Role.BLOCK, layer).register_forward_hook(self._size)
            for layer in range(handle.n_layers)
        ]
        try:
            with trace(
                handle, entering, writes={Site(Role.EMBED): lambda value: value + self.noise}
            ) as recording:
                logits = recording.run(batch, past_key_values=cache, use_cache=True, logits_to_keep=1)
        finally:
            for hook in hooks:
                hook.remove()
        if logits is None:
            raise NumericalError("the forward pass gave no logits")
        self.entering = [recording[site] for site in entering]
        self.kept = [stored_keys_values(layer) for layer in cache.layers]
        self.score = _probability(logits, self.answers)

    def _size(self, _module: nn.Module, _args: Any, output: Any) -> None:
        self.sizes.append(len(output) if isinstance(output, tuple) else None)

    def after(self, token: int, inside: Sequence[int]) -> _Suffix:
        """The columns from ``token`` on, of the cases numbered ``inside``."""
        rows = torch.tensor(
            [at * self.samples + s for at in inside for s in range(self.samples)], device=self.ids.device
        )
        return _Suffix(self, token, rows, [self.cases[at] for at in inside])


class _Suffix:
    """Re-runs what lies right of one token and above one block."""

    def __init__(self, run: _Corrupted, token: int, rows: Tensor, cases: Sequence[Case]) -> None:
        self.run, self.token, self.rows, self.cases = run, token, rows, cases
        self.kept = [(keys[rows, :, :token], values[rows, :, :token]) for keys, values in run.kept]
        self.entering = [value[rows, token:] for value in run.entering]

    def restored(self, kind: str, layer: int, window: int) -> Tensor:
        """Probability of each row's answer with the clean activations of ``layer``'s window back at the token, ``[row]``."""
        run, handle = self.run, self.run.handle
        lowest = max(0, layer - window // 2)
        highest = min(handle.n_layers, layer + (window + 1) // 2)
        writes: dict[Site, Callable[[Tensor], Tensor]] = {}
        if lowest == 0:
            noise = run.noise[self.rows, self.token :]
            writes[Site(Role.EMBED)] = lambda value: value + noise
        for at in range(lowest, highest):
            clean = torch.stack([case.states[at, self.token] for case in self.cases])
            writes[Site(KIND_ROLES[kind], at)] = _put_first(clean.repeat_interleave(run.samples, 0))
        cache = DynamicCache()
        for keys, values in self.kept:
            cached = DynamicLayer()
            cached.lazy_initialization(keys, values)
            cached.keys, cached.values = keys, values
            cache.layers.append(cached)
        ids = run.ids[self.rows, self.token :]
        seen = torch.ones_like(run.ids[self.rows])
        positions = torch.arange(self.token, run.ids.shape[1], device=ids.device).expand_as(ids)
        inputs = handle.inputs(Batch(ids, seen, positions))
        with trace(handle, writes=writes) as recording, self._skipped(lowest):
            logits = recording.call(
                lambda: (
                    handle.model(**inputs, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
                ),
                (ids.shape[0], ids.shape[1]),
            )
        if logits is None:
            raise NumericalError("the forward pass gave no logits")
        return _probability(logits, run.answers[self.rows])

    @contextmanager
    def _skipped(self, lowest: int) -> Iterator[None]:
        """Lets the blocks below ``lowest`` hand on what the corrupted run put into block ``lowest``."""
        blocks = [self.run.handle.module(Role.BLOCK, below) for below in range(lowest)]
        saved = [vars(block).get("forward") for block in blocks]
        value = self.entering[lowest]

        def answer(size: int | None) -> Callable[..., Any]:
            return lambda *_args, **_kwargs: value if size is None else (value, *[None] * (size - 1))

        try:
            for block, size in zip(blocks, self.run.sizes, strict=False):
                vars(block)["forward"] = answer(size)
            yield
        finally:
            for block, forward in zip(blocks, saved, strict=True):
                if forward is None:
                    vars(block).pop("forward", None)
                else:
                    vars(block)["forward"] = forward


def _put_first(clean: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda output: torch.cat([clean.to(output.dtype)[:, None], output[:, 1:]], dim=1)


def _probability(logits: Tensor, answers: Tensor) -> Tensor:
    return log_probs(logits[:, -1]).gather(-1, answers[:, None]).squeeze(-1).exp().double().cpu()
