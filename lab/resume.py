"""Rows held at the entrance of a block: what lies below is run once, what lies above again and again.

Methods that write block after block read the same rows after every write. Nothing below the lowest written block changes, so the
rows stay where they are and move up with the writing. The calls of the blocks above (masks, positions, rotary embeddings) are taken
from the model's own forward pass, so that the result is that of a full pass.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
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


class _Reached(BaseException):
    """Leaves the first pass where the last block's call is known."""


@dataclass(frozen=True)
class _Chunk:
    """Rows of one forward pass.

    Attributes:
        hidden: ``[row, pos, d]``, entering the block where the rows are held.
        last: ``[row]``, each row's last position.
        calls: What the model passes to each block beside the hidden states.
    """

    hidden: Tensor
    last: Tensor
    calls: Mapping[int, _Call]


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
        self._chunks = [
            self._begin(rows[begin : begin + max_rows]) for begin in range(0, len(rows), max_rows)
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
            self._chunks = [replace(chunk, hidden=self._through(chunk, layer)) for chunk in self._chunks]
        self._layer = layer

    def read(self, sites: Sequence[Site], stop: Site) -> dict[Site, Tensor]:
        """Reads sites at each row's last token; the rows stay where they are.

        Args:
            sites: In the rows' block or above it.
            stop: Where the pass ends; not before any site.

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
        with trace(self._handle, reads=tuple(sites), stop=stop) as recording, torch.no_grad():
            for chunk in self._chunks:
                rows, length, _ = chunk.hidden.shape
                recording.call(lambda chunk=chunk: self._through(chunk, top + 1), (rows, length))
                lines = torch.arange(len(chunk.last), device=chunk.last.device)
                for site in sites:
                    parts[site].append(recording[site][lines, chunk.last].to("cpu", torch.float64))
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
            output = module(hidden, *args, **kwargs)
            hidden = output[0] if isinstance(output, (tuple, list)) else output
        return hidden

    def _begin(self, rows: Sequence[Sequence[int]]) -> _Chunk:
        handle, first, last = self._handle, self._layer, self._last
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
