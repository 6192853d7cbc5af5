"""EMMET: ROME's equality constraint for a whole batch (Gupta et al., 2024, arXiv 2403.14236).

Among all updates that map every key onto its residual, the one that moves the statistics' keys least:
``Δ = R (Kᵀ C'⁻¹ K + μI)⁻¹ Kᵀ C'⁻¹`` with ``C' = λC + νI``. For one fact and ``μ = 0`` that is ROME with one key throughout.
``μ`` keeps the system over the edits solvable where keys are alike, as those of one subject are.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from editors.base import Editor, EditorOptions, Method
from editors.memit import MemitConfig
from editors.spread import SpreadEditor, SpreadMethod
from lab.errors import ConfigError
from lab.stats import Factor, KeyStats, emmet_factors, factorize


@dataclass(frozen=True)
class EmmetConfig(MemitConfig):
    """Settings beside those of the value search.

    Attributes:
        layers: Usually one.
        mom2_weight: λ; only its size against ``mu`` and ``norm_weight`` matters.
        mu: μ: what is added to the system over the edits; 0 makes the constraint exact.
        norm_weight: ν: how much a large update costs in itself.
    """

    layers: tuple[int, ...] = (5,)
    mom2_weight: float = 10000.0
    mu: float = 0.1
    norm_weight: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("mu", "norm_weight"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"{name} must not be negative, it is {getattr(self, name)}")


def _factor(config: EmmetConfig, stats: KeyStats) -> Factor:
    if not config.norm_weight:
        return stats.factor(config.mom2_weight)
    identity = torch.eye(len(stats.moment), dtype=torch.float64)
    return factorize(config.mom2_weight * stats.moment + config.norm_weight * identity)


def _update(config: EmmetConfig, stats: KeyStats, keys: Tensor, residuals: Tensor) -> tuple[Tensor, Tensor]:
    return emmet_factors(_factor(config, stats), keys, residuals, config.mu)


def _build(options: EditorOptions) -> Editor:
    return SpreadEditor(options, SpreadMethod("emmet", EmmetConfig), _update)


EMMET = Method(
    "emmet",
    "Many facts at once under ROME's equality constraint",
    "Gupta et al. 2024, arXiv 2403.14236",
    "key statistics once per model; then about a second per fact and one solve per layer",
    True,
    _build,
)
