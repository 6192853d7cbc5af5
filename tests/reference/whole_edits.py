"""Whole edits written the plain way, as the authors' code runs them: the full model over padded rows at every turn, dense matrices.

What ``tests/benchmarks/editing_speed.py`` times beside the editors. Nothing of ``lab.solve``, ``lab.replay``, ``editors.keys`` or
``editors.spread`` is used, so that equality of the updates means something.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from tests.reference.value_search import PlainRow, plain_value_search

_ROWS = 128


def padded(rows: Sequence[PlainRow]) -> tuple[Tensor, Tensor]:
    """Token ids and mask, padded on the right."""
    length = max(len(row.ids) for row in rows)
    ids = torch.zeros(len(rows), length, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for index, row in enumerate(rows):
        ids[index, : len(row.ids)] = torch.tensor(list(row.ids))
        mask[index, : len(row.ids)] = 1
    return ids, mask


@torch.no_grad()
def read(model: Any, module: nn.Module, rows: Sequence[PlainRow]) -> tuple[Tensor, Tensor]:
    """Input and output ``[row, width]`` of a module at each row's change, from full forward passes."""
    inputs: list[Tensor] = []
    outputs: list[Tensor] = []
    for begin in range(0, len(rows), _ROWS):
        part = rows[begin : begin + _ROWS]
        ids, mask = padded(part)
        lines, places = torch.arange(len(part)), torch.tensor([row.change for row in part])

        def hook(
            _module: nn.Module, args: Any, output: Any, lines: Tensor = lines, places: Tensor = places
        ) -> None:
            value = output[0] if isinstance(output, tuple) else output
            if args:
                inputs.append(args[0][lines, places].clone())
            outputs.append(value[lines, places].clone())

        handle = module.register_forward_hook(hook)
        try:
            model(input_ids=ids, attention_mask=mask, use_cache=False)
        finally:
            handle.remove()
    return (torch.cat(inputs) if inputs else torch.empty(0)), torch.cat(outputs)


def weight_of(module: nn.Module) -> Tensor:
    """A projection's weight as ``[out, in]``, sharing its memory."""
    weight: Any = module.weight
    return weight.data.T if isinstance(module, Conv1D) else weight.data


def plain_rome(
    model: Any,
    down: nn.Module,
    tap: nn.Module,
    rows: Sequence[PlainRow],
    essence: PlainRow,
    inverse: Tensor,
    **search: Any,
) -> tuple[Tensor, Tensor]:
    """ROME's update of one request, its factors ``[out]`` and ``[in]``: ``(z − v0) uᵀ / (k0·u)``, ``u`` along ``C⁻¹ k̄``.

    Args:
        model: Left as it was.
        down: The down projection.
        tap: Where the value is searched.
        rows: The request in every context, the plain prompt first.
        essence: The row whose prediction is held.
        inverse: ``C⁻¹``.
        **search: Of ``plain_value_search``.
    """
    keys, _ = read(model, down, rows)
    direction = inverse @ keys.mean(0)
    direction = direction / direction.norm()
    found = plain_value_search(model, tap, rows, essence, **search)
    key, value = (part[0] for part in read(model, down, rows[:1]))
    return (found.init + found.delta - value) / (key @ direction), direction


def group_mean(keys: Tensor) -> Tensor:
    """The plain prompt (first row) one half, the others the other half."""
    return keys[0] / 2 + keys[1:].mean(0) / 2


def layer_keys(model: Any, down: nn.Module, requests: Sequence[Sequence[PlainRow]]) -> Tensor:
    """Mean key of each request, ``[in, B]``."""
    keys, _ = read(model, down, [row for rows in requests for row in rows])
    size = len(requests[0])
    return torch.stack([group_mean(keys[at : at + size]) for at in range(0, len(keys), size)], dim=1)


@dataclass
class PlainBatches:
    """MEMIT's or AlphaEdit's writing of given values, weights in place.

    Attributes:
        model: Edited.
        downs: The down projections, ascending.
        tap: The block where the values are.
        solve: Index of the layer, keys ``[in, B]`` and residuals ``[out, B]`` to a dense update ``[out, in]``.
        after: Called with the index of a layer and its keys under the new weights; nothing is read again where it is ``None``.
    """

    model: Any
    downs: Sequence[nn.Module]
    tap: nn.Module
    solve: Callable[[int, Tensor, Tensor], Tensor]
    after: Callable[[int, Tensor], None] | None = None

    def write(self, requests: Sequence[Sequence[PlainRow]], targets: Tensor) -> None:
        """One batch; ``targets`` is ``[out, B]``."""
        for index, down in enumerate(self.downs):
            keys = layer_keys(self.model, down, requests)
            _, now = read(self.model, self.tap, [rows[0] for rows in requests])
            residuals = (targets - now.T) / (len(self.downs) - index)
            update = self.solve(index, keys, residuals)
            weight = weight_of(down)
            weight += update.to(weight.dtype)
        if self.after is not None:
            for index, down in enumerate(self.downs):
                self.after(index, layer_keys(self.model, down, requests))


def memit_solve(moments: Sequence[Tensor], weight: float) -> Callable[[int, Tensor, Tensor], Tensor]:
    """``R Kᵀ (λC + K Kᵀ)⁻¹`` in fp64."""

    def solve(index: int, keys: Tensor, residuals: Tensor) -> Tensor:
        columns = keys.double()
        system = weight * moments[index].double() + columns @ columns.T
        return residuals.double() @ torch.linalg.solve(system, columns).T

    return solve


@dataclass
class AlphaEditSolve:
    """``([P (K Kᵀ + cache) + λ₂ I]⁻¹ P K Rᵀ)ᵀ``, as precise as the projectors are.

    Attributes:
        projectors: ``P`` of each layer.
        l2: λ₂.
        cache: Second moments of all earlier keys.
    """

    projectors: Sequence[Tensor]
    l2: float
    cache: dict[int, Tensor] = field(default_factory=dict)

    def solve(self, index: int, keys: Tensor, residuals: Tensor) -> Tensor:
        """One layer's update."""
        projector = self.projectors[index]
        keys, residuals = keys.to(projector.dtype), residuals.to(projector.dtype)
        past = self.cache.get(index, torch.zeros_like(projector))
        system = projector @ (keys @ keys.T + past)
        system += self.l2 * torch.eye(len(projector), dtype=projector.dtype)
        return torch.linalg.solve(system, projector @ keys @ residuals.T).T

    def after(self, index: int, keys: Tensor) -> None:
        """Adds the keys of a finished edit."""
        keys = keys.to(self.projectors[index].dtype)
        self.cache[index] = self.cache.get(index, torch.zeros(len(keys), len(keys), dtype=keys.dtype)) + (
            keys @ keys.T
        )


def cosines(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> float:
    """The smallest cosine between two updates of the same parameters."""
    pairs = [(found[name].double().flatten(), wanted[name].double().flatten()) for name in wanted]
    return min(float(one @ other / (one.norm() * other.norm())) for one, other in pairs)
