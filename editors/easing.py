"""PMET's easing of the value search: once the model says the target everywhere, hold its other answers instead of pushing on.

A search that goes on after success only moves the subject further from what it was. Two rules of PMET's authors (Li et al.,
2023, arXiv 2308.08742; ``compute_zs`` of their code) end that: the likelihood of a target that is already the likeliest
continuation weighs less at the next step, and the search stops where the divergence is small as well.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lab.errors import ConfigError


@dataclass(frozen=True)
class Easing:
    """How the likelihood is weighed.

    Attributes:
        weight: Of the negative log-likelihood.
        eased: What ``weight`` is multiplied with at the next step, once every target token is the likeliest in every context.
        stop_kl: The search also stops there, where the weighted divergence is at most this.
    """

    weight: float = 1.0
    eased: float = 0.1
    stop_kl: float = 0.01

    def __post_init__(self) -> None:
        for name in ("weight", "eased"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} of the likelihood must be positive, it is {getattr(self, name)}")
        if not self.stop_kl >= 0:
            raise ConfigError(f"stop_kl must not be negative, it is {self.stop_kl}")

    def weights(self, reached: Tensor, dtype: torch.dtype) -> Tensor:
        """Weight of the likelihood at the next step, ``[edit]``, where ``reached [edit]`` says which targets are said."""
        full = torch.full(reached.shape, self.weight, dtype=dtype, device=reached.device)
        return torch.where(reached, full * self.eased, full)

    def stops(self, reached: Tensor, kl: Tensor) -> Tensor:
        """Which edits are finished, ``[edit]``."""
        return reached & (kl <= self.stop_kl)


def targets_reached(logits: Tensor, target: Tensor, counts: Tensor, owner: Tensor, edits: int) -> Tensor:
    """Whether every target token is the likeliest one, ``[edit]``.

    Args:
        logits: ``[line, vocabulary]``.
        target: ``[line]``, the token wanted there.
        counts: ``[line]``, whether the line carries a target.
        owner: ``[line]``, which edit it belongs to.
        edits: Number of edits.
    """
    wanted = logits.gather(1, target[:, None])[:, 0]
    missed = (logits.amax(dim=1) > wanted) & counts
    total = torch.zeros(edits, dtype=torch.long, device=logits.device)
    return total.index_add(0, owner, missed.long()) == 0
