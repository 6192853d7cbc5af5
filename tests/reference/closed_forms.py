"""The closed-form methods written the plain way: one row at a time through the whole model, dense matrices, weights written in place.

Nothing of ``lab.solve``, ``editors.keys`` or ``editors.spread`` is used, so that equality means something.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from tests.reference.value_search import PlainRow

Formula = Callable[[int, Tensor, Tensor], Tensor]
"""Index of the layer, keys ``[in, B]``, residuals ``[out, B]`` to a dense update ``[out, in]``."""


def read_at(model: Any, module: nn.Module, row: PlainRow, side: str) -> Tensor:
    """Input or output of a module at the change, from one unpadded forward pass of the whole model."""
    seen: list[Tensor] = []

    def hook(_module: nn.Module, args: Any, output: Any) -> None:
        value = args[0] if side == "in" else (output[0] if isinstance(output, tuple) else output)
        seen.append(value.reshape(len(row.ids), -1)[row.change].detach().clone())

    handle = module.register_forward_hook(hook)
    try:
        with torch.no_grad():
            model(input_ids=torch.tensor([list(row.ids)]), use_cache=False)
    finally:
        handle.remove()
    return seen[0].double()


def mean_key(model: Any, module: nn.Module, rows: Sequence[PlainRow]) -> Tensor:
    """The plain prompt (first row) one half, the others the other half."""
    keys = [read_at(model, module, row, "in") for row in rows]
    return keys[0] / 2 + torch.stack(keys[1:]).mean(0) / 2


def write(module: nn.Module, update: Tensor) -> None:
    """Adds ``[out, in]`` to a projection's weight."""
    weight: Any = module.weight
    weight.data += (update.T if isinstance(module, Conv1D) else update).to(weight.dtype)


def plain_spread(
    model: Any,
    downs: Sequence[nn.Module],
    tap: nn.Module,
    requests: Sequence[Sequence[PlainRow]],
    targets: Sequence[Tensor],
    formula: Formula,
    divisor: Callable[[int], float] = float,
) -> None:
    """One batch: layer by layer a share of what is missing at ``tap``, each written before the next is read."""
    for index, down in enumerate(downs):
        keys = torch.stack([mean_key(model, down, rows) for rows in requests], dim=1)
        now = torch.stack([read_at(model, tap, rows[0], "out") for rows in requests], dim=1)
        residuals = (torch.stack(list(targets), dim=1) - now) / divisor(len(downs) - index)
        write(down, formula(index, keys, residuals))


def memit_dense(moment: Tensor, weight: float) -> Callable[[Tensor, Tensor], Tensor]:
    """``R Kᵀ (λC + K Kᵀ)⁻¹``."""
    return lambda keys, residuals: residuals @ keys.T @ torch.linalg.inv(weight * moment + keys @ keys.T)


def emmet_dense(moment: Tensor, weight: float, mu: float, nu: float) -> Callable[[Tensor, Tensor], Tensor]:
    """``R (Kᵀ C'⁻¹ K + μI)⁻¹ Kᵀ C'⁻¹`` with ``C' = λC + νI``."""
    inverse = torch.linalg.inv(weight * moment + nu * torch.eye(len(moment), dtype=torch.float64))

    def update(keys: Tensor, residuals: Tensor) -> Tensor:
        system = keys.T @ inverse @ keys + mu * torch.eye(keys.shape[1], dtype=torch.float64)
        return residuals @ torch.linalg.inv(system) @ keys.T @ inverse

    return update


def dense_projector(moment: Tensor, threshold: float) -> Tensor:
    """``U Uᵀ`` over the small singular values of the moment."""
    u, s, _ = torch.linalg.svd(moment)
    small = u[:, s < threshold]
    return small @ small.T


def alphaedit_dense(projector: Tensor, keys: Tensor, residuals: Tensor, cache: Tensor, l2: float) -> Tensor:
    """``([P (K Kᵀ + cache) + λ₂ I]⁻¹ P K Rᵀ)ᵀ``."""
    system = projector @ (keys @ keys.T + cache) + l2 * torch.eye(len(projector), dtype=torch.float64)
    return torch.linalg.solve(system, projector @ keys @ residuals.T).T


class PlainAlphaEdit:
    """A sequence of batches on one model, with the second moment of all earlier keys as a matrix per layer."""

    def __init__(
        self, model: Any, downs: Sequence[nn.Module], tap: nn.Module, projectors: Sequence[Tensor], l2: float
    ) -> None:
        self.model, self.downs, self.tap = model, downs, tap
        self.projectors, self.l2 = projectors, l2
        self.cache = [torch.zeros_like(projector) for projector in projectors]

    def batch(self, requests: Sequence[Sequence[PlainRow]], targets: Sequence[Tensor]) -> None:
        """Edits, and afterwards adds the keys under the new weights to the cache."""

        def formula(index: int, keys: Tensor, residuals: Tensor) -> Tensor:
            return alphaedit_dense(self.projectors[index], keys, residuals, self.cache[index], self.l2)

        plain_spread(self.model, self.downs, self.tap, requests, targets, formula)
        for index, down in enumerate(self.downs):
            for rows in requests:
                key = mean_key(self.model, down, rows)
                self.cache[index] = self.cache[index] + torch.outer(key, key)


class PlainUltraEdit:
    """A sequence of batches: the running mean and deviation per shape, updated row by row, and one dense solve per weight."""

    def __init__(self, model: Any, modules: Sequence[nn.Module], lr: float) -> None:
        self.model, self.modules, self.lr = model, modules, lr
        self.seen: dict[tuple[int, int], tuple[int, Tensor, Tensor]] = {}

    def batch(self, rows: Sequence[PlainRow]) -> None:
        """Edits with all tokens of ``rows``."""
        found: list[tuple[Tensor, Tensor]] = [(torch.empty(0), torch.empty(0))] * len(self.modules)
        for row in rows:
            for place, (inputs, gradients) in enumerate(self._signals(row)):
                before = found[place]
                found[place] = (
                    (inputs, gradients)
                    if not len(before[0])
                    else (torch.cat([before[0], inputs]), torch.cat([before[1], gradients]))
                )
        for inputs, gradients in found:
            self._see((inputs.shape[1], gradients.shape[1]), torch.cat([inputs, gradients], dim=1))
        for module, (inputs, gradients) in zip(self.modules, found, strict=True):
            count, mean, square = self.seen[inputs.shape[1], gradients.shape[1]]
            deviation = (square / (count - 1)).sqrt() + torch.finfo(torch.float64).eps
            features = (torch.cat([inputs, gradients], dim=1) - mean) / deviation
            hidden, gradient = features[:, : inputs.shape[1]], features[:, inputs.shape[1] :]
            values = -self.lr * (hidden * hidden).sum(1, keepdim=True) * gradient
            system = inputs.T @ inputs + torch.eye(inputs.shape[1], dtype=torch.float64)
            write(module, torch.linalg.solve(system, inputs.T @ values).T)

    def _signals(self, row: PlainRow) -> list[tuple[Tensor, Tensor]]:
        inputs: dict[int, Tensor] = {}
        gradients: dict[int, Tensor] = {}
        hooks = []
        for place, module in enumerate(self.modules):
            module.weight.requires_grad_(True)

            def forward(_module: nn.Module, args: Any, output: Tensor, place: int = place) -> None:
                inputs[place] = args[0].detach().reshape(len(row.ids), -1)
                output.register_hook(
                    lambda gradient: gradients.__setitem__(place, gradient.reshape(len(row.ids), -1))
                )

            hooks.append(module.register_forward_hook(forward))
        try:
            logits = self.model(input_ids=torch.tensor([list(row.ids)]), use_cache=False).logits[0]
            lines = logits[row.prompt_last : row.prompt_last + len(row.targets)].log_softmax(-1)
            loss = -sum(line[target] for line, target in zip(lines, row.targets, strict=True))
            loss.backward()  # type: ignore[union-attr]
        finally:
            for hook in hooks:
                hook.remove()
            for module in self.modules:
                module.weight.requires_grad_(False)
                module.weight.grad = None
        return [(inputs[place], gradients[place]) for place in range(len(self.modules))]

    def _see(self, shape: tuple[int, int], values: Tensor) -> None:
        for value in values:
            count, mean, square = self.seen.get(shape, (0, torch.zeros_like(value), torch.zeros_like(value)))
            after = mean + (value - mean) / (count + 1)
            self.seen[shape] = (count + 1, after, square + (value - mean) * (value - after))
