"""MEND's update written plainly: one token after another, one layer after another, no batching."""

from __future__ import annotations

from collections.abc import Mapping

import torch


def plain_update(
    state: Mapping[str, torch.Tensor], group: str, index: int, rate: torch.Tensor, inputs, grads
) -> torch.Tensor:
    """The change of one weight, ``[out, in]``.

    Args:
        state: The network's state dict.
        group: Shape group of the weight, ``"64x32"``.
        index: Its place in the group.
        rate: Its η.
        inputs: ``[term, in]``.
        grads: ``[term, out]``.
    """

    def part(name: str) -> torch.Tensor:
        return state[f"networks.{group}.{name}"]

    def normalised(row, name):
        spread = (part(f"{name}.squares") / (part(f"{name}.count") - 1)).sqrt()
        spread = torch.maximum(spread, 0.01 * spread.mean())
        return (row - part(f"{name}.mean")) / spread

    def layer(row, name, rectify):
        inner = torch.mv(part(f"{name}.down"), row)
        change = part(f"{name}.scale")[index] * (torch.mv(part(f"{name}.up"), inner) + part(f"{name}.bias"))
        change = change + part(f"{name}.shift")[index]
        return row + (torch.where(change > 0, change, torch.zeros_like(change)) if rectify else change)

    total = torch.zeros(grads.shape[1], inputs.shape[1], dtype=inputs.dtype)
    for u, delta in zip(inputs, grads, strict=True):
        row = torch.cat([normalised(u, "inputs"), normalised(delta, "grads")])
        row = layer(layer(row, "first", True), "second", False)
        total -= rate * torch.outer(row[len(u) :], row[: len(u)])
    return total
