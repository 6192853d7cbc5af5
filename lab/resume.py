"""Rows held at the entrance of a block: what lies below is run once, what lies above again and again.

Methods that write block after block read the same rows after every write. Nothing below the lowest written block changes, so the
rows stay where they are and move up with the writing. The calls of the blocks above (masks, positions, rotary embeddings) are taken
from the model's own forward pass, so that the result is that of a full pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lab.arch import Role
from lab.errors import ConfigError, NumericalError
from lab.handle import ModelHandle
from lab.replay import replaced_forwards
from lab.tokens import pad_rows
from lab.trace import Site, trace

_Call = tuple[tuple[Any, ...], dict[str, Any]]


_INSIDE_MLP = (Role.MLP_IN, Role.MLP_UP, Role.MLP_OUT)


@contextmanager
def _only(mlp: nn.Module, rows: Tensor, places: Tensor) -> Iterator[None]:
    """An MLP sees one token of each row; what comes after it in the pass must not be used."""

    def cut(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args:
            return (args[0][rows, places][:, None], *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": kwargs["hidden_states"][rows, places][:, None]}

    handle = mlp.register_forward_pre_hook(cut, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _outputs(module: nn.Module, found: list[Any], wanted: bool) -> Iterator[None]:
    """Collects what a module returns, call by call."""
    if not wanted:
        yield
        return
    handle = module.register_forward_hook(lambda _module, _args, output: found.append(output))
    try:
        yield
    finally:
        handle.remove()


def _answer(known: Any, *_args: Any, **_kwargs: Any) -> Any:
    return known


def _first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def _like(output: Any, value: Tensor) -> Any:
    """``value`` in the form of a module's output."""
    return (value, *[None] * (len(output) - 1)) if isinstance(output, tuple) else value


class _Reached(BaseException):
    """Leaves the first pass where the last block's call is known."""


@dataclass(frozen=True)
class _Chunk:
    """Rows of one forward pass.

    Attributes:
        hidden: ``[row, pos, d]``, entering the block where the rows are held.
        last: ``[row]``, each row's last position.
        calls: What the model passes to each block beside the hidden states.
        attention: What the attention of the block where the rows are held returned, if that was kept.
    """

    hidden: Tensor
    last: Tensor
    calls: Mapping[int, _Call]
    attention: Any = None


def _taken(chunk: _Chunk, values: Sequence[Tensor], places: Sequence[tuple[int, int]]) -> Tensor:
    """What stands in ``values[i][row]`` for each row of a chunk, by its ``(i, row)``, padded as the chunk is."""
    # Rows are padded on the right, and no token sees what comes after it.
    found = torch.zeros_like(chunk.hidden)
    for line, (last, (place, row)) in enumerate(zip(chunk.last.tolist(), places, strict=True)):
        found[line, : last + 1] = values[place][row, : last + 1]
    return found


class HeldRows:
    """Rows that stand at the entrance of a block and can be read above it.

    Args:
        handle: The model, as it stands; what changes afterwards below the rows' block is not seen.
        rows: Token ids; only the last token of each is read.
        first: The block where the rows are held.
        last: The highest block that they will pass.
        max_rows: Rows per forward pass.

    Raises:
        ConfigError: No rows, or no such blocks.

    Example:
        >>> held = HeldRows(handle, [[5, 7, 9]], 3, 5)
        >>> held.move_to(4)
        >>> held.read([Site(Role.MLP_OUT, 4, "in")], Site(Role.MLP_OUT, 4, "in"))
    """

    def __init__(
        self,
        handle: ModelHandle,
        rows: Sequence[Sequence[int]],
        first: int,
        last: int,
        *,
        max_rows: int = 256,
    ) -> None:
        if not rows:
            raise ConfigError("there are no rows to hold")
        if not 0 <= first <= last < handle.n_layers:
            raise ConfigError(f"blocks {first} to {last} do not all exist; there are {handle.n_layers}")
        handle.stack.refuse_memories("reading keys block by block")
        self._handle, self._layer, self._last = handle, first, last
        self._rows, self._max_rows = rows, max_rows
        self._chunks = [
            self._begin(rows[begin : begin + max_rows], first) for begin in range(0, len(rows), max_rows)
        ]

    @property
    def layer(self) -> int:
        """The block at whose entrance the rows stand."""
        return self._layer

    def move_to(self, layer: int) -> None:
        """Runs the blocks below ``layer`` as they are now; the rows stand before it from then on.

        Raises:
            ConfigError: The rows are past ``layer`` already, or will never reach it.
        """
        if not self._layer <= layer <= self._last:
            raise ConfigError(f"rows held before block {self._layer} of {self._last} cannot move to {layer}")
        if layer == self._layer:
            return
        with torch.no_grad(), self._handle.reading():
            self._chunks = [
                replace(chunk, hidden=self._through(chunk, layer), attention=None) for chunk in self._chunks
            ]
        self._layer = layer

    def every(self, step: int) -> HeldRows:
        """The first of these rows and every ``step``-th one after it, where they stand now; no block is run for it."""
        found = object.__new__(HeldRows)
        found._handle, found._layer, found._last = self._handle, self._layer, self._last
        found._rows, found._max_rows = self._rows[::step], self._max_rows
        size = self._max_rows
        found._chunks = [
            found._begin(found._rows[begin : begin + size], 0) for begin in range(0, len(found._rows), size)
        ]
        found.stand_with(self, step)
        return found

    def stand_with(self, others: HeldRows, step: int) -> None:
        """Moves rows that came from ``others.every(step)`` to where the others are now; no block is run for it.

        Attention that the others kept is theirs too.
        """
        hidden = [chunk.hidden for chunk in others._chunks]
        kept = [chunk.attention for chunk in others._chunks]
        attended = None if any(each is None for each in kept) else [_first(each) for each in kept]
        chunks = []
        for number, chunk in enumerate(self._chunks):
            places = [
                divmod((number * self._max_rows + line) * step, others._max_rows)
                for line in range(len(chunk.last))
            ]
            attention = None if attended is None else _like(kept[0], _taken(chunk, attended, places))
            chunks.append(replace(chunk, hidden=_taken(chunk, hidden, places), attention=attention))
        self._chunks, self._layer = chunks, others._layer

    def read(self, sites: Sequence[Site], stop: Site, *, keep_attention: bool = False) -> dict[Site, Tensor]:
        """Reads sites at each row's last token; the rows stay where they are.

        Args:
            sites: In the rows' block or above it.
            stop: Where the pass ends; not before any site.
            keep_attention: The attention of the rows' block is not run again before the rows have left the block. Right only
                where nothing up to it changes meanwhile, as under methods that write down projections.

        Returns:
            Site to ``[row, width]``, fp64 on the CPU.

        Raises:
            ConfigError: ``stop`` lies outside the blocks.
            NumericalError: A value is NaN or infinite.
        """
        top = self._last if stop.layer is None else stop.layer
        if not self._layer <= top <= self._last:
            raise ConfigError(f"{stop} is not in blocks {self._layer} to {self._last}")
        parts: dict[Site, list[Tensor]] = {site: [] for site in sites}
        # Where the pass ends inside an MLP, that MLP need not see the tokens that nobody reads.
        narrow = stop.role in _INSIDE_MLP and set(sites) == {stop} and not self._handle.arch.flat_mlp
        attention: list[Any] = []
        with (
            trace(self._handle, reads=tuple(sites), stop=stop) as recording,
            torch.no_grad(),
            _outputs(self._handle.module(Role.ATTN, self._layer), attention, keep_attention),
        ):
            for chunk in self._chunks:
                rows, length, _ = chunk.hidden.shape
                lines = torch.arange(len(chunk.last), device=chunk.last.device)
                if narrow:
                    with _only(self._handle.module(Role.MLP, top), lines, chunk.last):
                        recording.call(lambda chunk=chunk: self._through(chunk, top + 1), (rows, 1))
                else:
                    recording.call(lambda chunk=chunk: self._through(chunk, top + 1), (rows, length))
                for site in sites:
                    value = recording[site]
                    value = value[:, 0] if narrow else value[lines, chunk.last]
                    parts[site].append(value.to("cpu", torch.float64))
        if len(attention) == len(self._chunks):
            self._chunks = [
                replace(chunk, attention=each) for chunk, each in zip(self._chunks, attention, strict=True)
            ]
        found = {site: torch.cat(pieces) for site, pieces in parts.items()}
        for site, values in found.items():
            if not bool(torch.isfinite(values).all()):
                raise NumericalError(
                    f"the model gives NaN or infinity at {site.role} of layer {site.layer}; load it in fp32 or bf16"
                )
        return found

    def _through(self, chunk: _Chunk, layer: int) -> Tensor:
        hidden = chunk.hidden
        for block in range(self._layer, layer):
            args, kwargs = chunk.calls[block]
            module = self._handle.module(Role.BLOCK, block)
            known = {}
            if block == self._layer and chunk.attention is not None:
                known[self._handle.module(Role.ATTN, block)] = partial(_answer, chunk.attention)
            with replaced_forwards(known):
                output = module(hidden, *args, **kwargs)
            hidden = output[0] if isinstance(output, (tuple, list)) else output
        return hidden

    def _begin(self, rows: Sequence[Sequence[int]], first: int) -> _Chunk:
        """The rows at the entrance of ``first``, and what the model passes to each block from there."""
        handle, last = self._handle, self._last
        batch = pad_rows(list(map(list, rows)), handle.pad_id, "right", handle.device)
        seen: list[Tensor] = []
        calls: dict[int, _Call] = {}

        def note(block: int) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                # Newer blocks may take their hidden states by keyword.
                hidden = args[0] if args else kwargs.pop("hidden_states")
                if not seen:
                    seen.append(hidden.detach())
                calls[block] = (tuple(args[1:]), kwargs)
                if block == last:
                    raise _Reached
                return hidden

            return forward

        stubs: dict[nn.Module, Callable[..., Any]] = {
            handle.module(Role.BLOCK, block): note(block) for block in range(first, last + 1)
        }
        with torch.no_grad(), handle.writing(), replaced_forwards(stubs), suppress(_Reached):
            handle.model(**{"use_cache": False, **handle.inputs(batch)})
        return _Chunk(seen[0], batch.last, calls)
