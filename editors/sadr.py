"""SADR: selective attention drift restriction (Wang et al., ICLR 2025, arXiv 2502.14838).

An edit raises the probability of its target partly by making heads look too hard at the edited subject; other facts of the
same subject, and of its neighbours in the same context, are then drowned. The penalty holds back exactly the heads that look
harder at the subject than the strongest head of their layer did before.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from editors.values import AttentionStep
from lab.errors import ConfigError


@dataclass(frozen=True)
class AttentionDrift:
    """The penalty; pass it to ``optimise_value``.

    For every layer above the edit, every rewriting row and head: if the last prompt token's weight on the subject exceeds
    the largest such weight over the heads of the unedited model (same layer, same row), the divergence
    ``KL(original || current)`` of that attention row is added; summed over heads and layers, averaged over rows.

    Attributes:
        gamma: Weight of the term; the paper's 1e-2 for ROME and 5e-3 for MEMIT on GPT-J.
        hinge: Select heads as above; without it every head is restrained (the paper's ablation).
        gamma_mode: ``"sum"`` is the paper's; ``"per_head_mean"`` divides by heads times layers, so that one gamma serves
            models of any size.
        eps: Added to both distributions before the logarithm.
    """

    gamma: float = 1e-2
    hinge: bool = True
    gamma_mode: Literal["sum", "per_head_mean"] = "sum"
    eps: float = 1e-8

    def __post_init__(self) -> None:
        if not self.gamma >= 0:
            raise ConfigError(f"gamma must not be negative, it is {self.gamma}")
        if self.gamma_mode not in ("sum", "per_head_mean"):
            raise ConfigError(f"unknown gamma_mode {self.gamma_mode!r}; use 'sum' or 'per_head_mean'")
        if not self.eps > 0:
            raise ConfigError(f"eps must be positive, it is {self.eps}")

    def __call__(self, step: AttentionStep) -> Tensor:
        """Returns the penalty of each edit, ``[edit]``."""
        total = torch.zeros(step.edits, device=step.owner.device)
        scale = self.gamma
        for layer, current in step.current.items():
            rows = drift(step.original[layer], current, step.subject, hinge=self.hinge, eps=self.eps)
            total = total + step.mean_over_rows(rows)
            if self.gamma_mode == "per_head_mean":
                scale = self.gamma / (len(step.current) * current.shape[1])
        return scale * total


def drift(
    original: Tensor, current: Tensor, subject: int, *, hinge: bool = True, eps: float = 1e-8
) -> Tensor:
    """Divergence of the selected heads of one layer, summed over heads, ``[row]``.

    Args:
        original: ``[row, head, key]``, the unedited model.
        current: The same of the edited model.
        subject: Key column of the edited token.
        hinge: Select heads that exceed the strongest original head on the subject.
        eps: Added to every entry of both.
    """
    p, q = original + eps, current + eps
    divergence = (p * (p / q).log()).sum(dim=-1)
    if hinge:
        # The selection is a decision of this step; no gradient flows through it.
        chosen = current.detach()[..., subject] > original[..., subject].amax(dim=1, keepdim=True)
        divergence = divergence * chosen
    return divergence.sum(dim=1)
