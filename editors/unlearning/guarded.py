"""Training down projections so that what other facts read from them hardly changes.

A down projection's change acts on its input, the key. With ``C`` the second moment of keys that should keep their values and ``S² = λ(C +
λI)⁻¹``, the weights are trained as ``W + B S``: directions that many of those keys use are scaled down, directions that they leave
free are not. It is the soft form of AlphaEdit's projection (arXiv 2410.02355), put under Adam; no paper of the methods does so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from lab.errors import NumericalError


class Optimiser(Protocol):
    """What a loop needs of an optimiser."""

    param_groups: list[dict[str, Any]]

    def zero_grad(self) -> None:
        """Forgets gradients."""

    def step(self) -> Any:
        """One update."""

    def state_dict(self) -> dict[str, Any]:
        """What ``load_state_dict`` takes up."""
        ...

    def load_state_dict(self, state_dict: dict[str, Any]) -> Any:
        """Goes on from a state."""


def damping(moment: Tensor, share: float) -> Tensor:
    """``S = (λ(C + λI)⁻¹)^½``, symmetric, with eigenvalues in (0, 1].

    Args:
        moment: ``C``, ``[in, in]``.
        share: λ in means of ``C``'s eigenvalues.

    Raises:
        NumericalError: ``C`` is not finite.
    """
    wide = moment.double()
    if not bool(wide.isfinite().all()):
        raise NumericalError("the second moment of keys is not finite; load the model in float32")
    limit = share * wide.diagonal().mean().clamp_min(1e-30)
    values, vectors = torch.linalg.eigh(wide)
    return (vectors * (limit / (values.clamp_min(0) + limit)).sqrt()) @ vectors.T


class GuardedAdam:
    """AdamW on ``B`` of ``W + B S``; without weight decay, which would pull towards the untouched weights.

    Args:
        parameters: The weights; what they are now is ``W``.
        factors: For each its ``S``.
        transposed: For each whether it stands as ``[in, out]``.
        lr: Learning rate.
    """

    def __init__(
        self,
        parameters: Sequence[Tensor],
        factors: Sequence[Tensor],
        transposed: Sequence[bool],
        lr: float,
    ) -> None:
        self._parameters = list(parameters)
        self._start = [parameter.detach().clone() for parameter in parameters]
        self._factors = [factor.to(each) for factor, each in zip(factors, parameters, strict=True)]
        self._transposed = list(transposed)
        self._free = [torch.nn.Parameter(torch.zeros_like(each)) for each in self._start]
        self._adam = torch.optim.AdamW(self._free, lr=lr, weight_decay=0.0)
        self.param_groups = self._adam.param_groups

    def _damped(self, place: int, table: Tensor) -> Tensor:
        factor = self._factors[place]
        return factor @ table if self._transposed[place] else table @ factor

    def zero_grad(self) -> None:
        """Forgets gradients."""
        for parameter in self._parameters:
            parameter.grad = None

    @torch.no_grad()
    def step(self) -> None:
        """One update."""
        for place, (parameter, free) in enumerate(zip(self._parameters, self._free, strict=True)):
            free.grad = None if parameter.grad is None else self._damped(place, parameter.grad)
        self._adam.step()
        for place, (parameter, free) in enumerate(zip(self._parameters, self._free, strict=True)):
            parameter.copy_(self._start[place] + self._damped(place, free))

    def state_dict(self) -> dict[str, Any]:
        """``B``, and Adam's own state."""
        return {
            "free": [each.detach().cpu().clone() for each in self._free],
            "adam": self._adam.state_dict(),
        }

    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Goes on from a state; the weights themselves are the caller's to put back."""
        for free, found in zip(self._free, state_dict["free"], strict=True):
            free.copy_(found)
        self._adam.load_state_dict(state_dict["adam"])
        self.param_groups = self._adam.param_groups
