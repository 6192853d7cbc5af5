"""The second moment of what the down projections read, collected over text in one pass for all layers."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lab.arch import Role
from lab.errors import ConfigError, DataError, NumericalError
from lab.solve import Factor, Projector, factorize, null_space
from lab.tokens import Batch, encode_ids, pad_rows
from lab.trace import Site, trace

if TYPE_CHECKING:
    from lab.handle import ModelHandle

Progress = Callable[[int, int], None]

# Documents that are tokenised and sorted by length together, to keep padding small.
_WINDOW = 256
# Where the convergence read-out looks, as shares of the token budget.
_READ_OUTS = (0.125, 0.25, 0.5, 1.0)
# From this width on, the fp64 total of one layer takes gigabytes: keep it in main memory.
_WIDE = 16_384


@dataclass(frozen=True, eq=False)
class KeyStats:
    """Uncentred second moment of one layer's keys.

    Attributes:
        layer: Block whose down projection was tapped.
        count: Tokens in the mean.
        moment: ``[in, in]`` fp64 on the CPU, ``Σ k kᵀ / count``.
        source: Id of the text it was collected over.
        convergence: ``(tokens, change)`` pairs: mean relative change of ``kᵀ C⁻¹ k`` over held-out keys since the read-out
            before (half as many tokens). Empty where the text was too short for two read-outs.
        warning: What the text source had to say about itself, or empty.
    """

    layer: int
    count: int
    moment: Tensor
    source: str
    convergence: tuple[tuple[int, float], ...] = ()
    warning: str = ""

    @cached_property
    def _unit(self) -> Factor:
        return factorize(self.moment)

    def factor(self, weight: float = 1.0) -> Factor:
        """Cholesky factor of ``weight * C``; the decomposition itself is made once per layer, for all weights.

        Raises:
            ConfigError: ``weight`` is not positive.
            NumericalError: The moment cannot be factored.
        """
        if not weight > 0:
            raise ConfigError(f"the weight of the key statistics must be positive, it is {weight}")
        unit = self._unit
        return Factor(unit.cholesky, float(weight), unit.ridge, unit.relative_ridge)

    def null_space(self, threshold: float) -> Projector:
        """Projector onto the eigenvectors with eigenvalues below ``threshold``; see ``solve.null_space``.

        The decomposition is made once per layer and threshold.
        """
        if threshold not in self._projectors:
            self._projectors[threshold] = null_space(self.moment, threshold)
        return self._projectors[threshold]

    @cached_property
    def _projectors(self) -> dict[float, Projector]:
        return {}


def default_tokens(width: int) -> int:
    """Token budget for keys of ``width`` numbers: 50 per number.

    The second moment settles at 2 to 10 tokens per number (arXiv 2506.04226); the rest is margin for text that is less
    varied than an encyclopedia. ``KeyStats.convergence`` says whether it was enough.
    """
    return 50 * width


def collect_key_stats(
    handle: ModelHandle,
    layers: Sequence[int],
    texts: Iterable[str],
    *,
    max_tokens: int,
    max_length: int = 1024,
    batch_tokens: int = 8192,
    held_out: int = 128,
    source: str = "",
    warning: str = "",
    progress: Progress | None = None,
) -> dict[int, KeyStats]:
    """Collects the key second moment of several layers in one pass over the text.

    The pristine model is measured, whatever patches are applied.

    Args:
        handle: The model.
        layers: Blocks whose down projections are tapped; the forward pass ends at the highest.
        texts: Documents; read until the budget is spent.
        max_tokens: Tokens in the mean, exactly, unless the text ends before.
        max_length: Longer documents are cut, here or where the model's context ends; the latter alone may be 128 k.
        batch_tokens: Padded tokens in one forward pass.
        held_out: This many documents give one key each to the convergence read-out instead of to the mean.
        source: Id of the text, for the record.
        warning: Goes into the record.
        progress: Called with tokens done and the budget.

    Raises:
        ConfigError: No layer, or a budget below one token.
        DataError: The text holds no token.
        NumericalError: A key is NaN or infinite.
    """
    if not layers or max_tokens < 1 or max_length < 2 or batch_tokens < 1:
        raise ConfigError(
            "key statistics need at least one layer, one token, max_length 2 and one token per batch"
        )
    context = getattr(handle.config, "max_position_embeddings", None)
    if isinstance(context, int):
        max_length = min(max_length, context)
    sums = {layer: _Moment() for layer in sorted(set(layers))}
    sites = {layer: Site(Role.MLP_OUT, layer, "in") for layer in sums}
    count, seen = 0, 0
    marks = [round(share * max_tokens) for share in _READ_OUTS]
    with handle.stack.suspended(), torch.no_grad():
        keep = torch.empty(0)

        def tap(layer: int) -> Callable[[Tensor], Tensor]:
            def add(keys: Tensor) -> Tensor:
                sums[layer].add(keys, keep)
                return keys

            return add

        with trace(
            handle, writes={site: tap(layer) for layer, site in sites.items()}, stop=sites[max(sites)]
        ) as recording:
            for batch in _batches(handle, texts, max_tokens + held_out, max_length, batch_tokens):
                keep, taken = _choose(batch, max_tokens - count, held_out - seen)
                recording.run(batch)
                seen += taken
                count += int((keep == 1).sum())
                while marks and count >= marks[0]:
                    marks = [mark for mark in marks if mark > count]
                    for moment in sums.values():
                        moment.read_out(count)
                if progress is not None:
                    progress(count, max_tokens)
                if count >= max_tokens:
                    break
    if count == 0:
        raise DataError(f"the text source {source!r} holds no token to collect key statistics over")
    if count < max_tokens:
        for moment in sums.values():
            moment.read_out(count)
    return {
        layer: KeyStats(layer, count, moment.mean(count), source, tuple(moment.convergence), warning)
        for layer, moment in sums.items()
    }


class _Moment:
    """Running total of one layer, with the keys that are held out for the read-out."""

    def __init__(self) -> None:
        self.total: Tensor | None = None
        self.held: list[Tensor] = []
        self.last: tuple[int, Tensor] | None = None
        self.convergence: list[tuple[int, float]] = []

    def add(self, keys: Tensor, keep: Tensor) -> None:
        """Adds ``keys [batch, pos, in]`` where ``keep [batch, pos]`` is 1; sets those aside where it is 2."""
        width = keys.shape[-1]
        flat = keys[keep == 1].to(torch.promote_types(keys.dtype, torch.float32))
        total = self.total
        if total is None:
            device = torch.device("cpu") if width >= _WIDE else keys.device
            total = self.total = torch.zeros(width, width, dtype=torch.float64, device=device)
        product = flat.T @ flat
        if not bool(torch.isfinite(product.diagonal()).all()):
            raise NumericalError(
                "a key of the down projection is NaN or infinite on the corpus; load the model in fp32 or bf16"
            )
        total += product.to(device=total.device, dtype=torch.float64)
        self.held.append(keys[keep == 2].double().cpu())

    def mean(self, count: int) -> Tensor:
        """The moment over ``count`` tokens, symmetric to the last bit."""
        if self.total is None:
            raise DataError("no forward pass has reached the tapped layers")
        moment = (self.total / count).cpu()
        return (moment + moment.T) / 2

    def read_out(self, count: int) -> None:
        """Notes how far ``kᵀ C⁻¹ k`` moved since the last read-out."""
        held = torch.cat(self.held) if self.held else torch.empty(0, 0)
        # Below full rank the number measures the ridge, not the text.
        if not len(held) or count < held.shape[1] or (self.last is not None and self.last[0] == count):
            return
        try:
            factor = factorize(self.mean(count))
        except NumericalError:
            return
        energy = (held.T * factor.solve(held.T)).sum(0)
        if self.last is not None:
            before = self.last[1]
            shared = min(len(before), len(energy))
            change = (energy[:shared] - before[:shared]).abs() / energy[:shared].clamp_min(
                torch.finfo(torch.float64).tiny
            )
            self.convergence.append((count, float(change.mean())))
        self.last = (count, energy)


def _choose(batch: Batch, room: int, wanted: int) -> tuple[Tensor, int]:
    """Marks ``[batch, pos]``: 1 goes into the mean, 2 is held out, 0 is padding or over the budget."""
    keep = batch.attention_mask.clone()
    taken = 0
    for row, length in enumerate(batch.lengths.tolist()):
        if taken >= wanted:
            break
        # Every second row only, so that the first batch does not fill the read-out alone.
        if length > 1 and row % 2 == 0:
            # A place that varies from row to row without a random generator: any fixed place would favour one kind of word.
            keep[row, 1 + (row * 7919) % (length - 1)] = 2
            taken += 1
    over = (keep == 1).flatten().cumsum(0).view_as(keep) > room
    return keep.masked_fill(over & (keep == 1), 0), taken


def _batches(
    handle: ModelHandle, texts: Iterable[str], max_tokens: int, max_length: int, batch_tokens: int
) -> Iterator[Batch]:
    """Right-padded batches of at most ``batch_tokens`` padded tokens (one row at least)."""
    stream = iter(texts)
    tokens = 0
    while tokens < max_tokens and (window := list(itertools.islice(stream, _WINDOW))):
        rows = []
        for text in window:
            row = encode_ids(handle.tokenizer, text)[:max_length]
            if row and tokens < max_tokens:
                rows.append(row)
                tokens += len(row)
        rows.sort(key=len)
        groups: list[list[list[int]]] = []
        for row in rows:
            if not groups or len(row) * (len(groups[-1]) + 1) > batch_tokens:
                groups.append([])
            groups[-1].append(row)
        # Short documents first would make every read-out before the last one look at another kind of text.
        random.Random(0).shuffle(groups)
        for group in groups:
            yield pad_rows(group, handle.pad_id, device=handle.device)
