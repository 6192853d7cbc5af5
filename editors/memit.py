"""MEMIT: many facts in one update, spread over several layers (Meng et al., ICLR 2023, arXiv 2210.07229).

A value ``z`` is searched for each request at the output of the last layer's block. Then each down projection takes an equal
share of what is still missing: ``Δ = R Kᵀ (λC + K Kᵀ)⁻¹`` with ``R = (Z − H) / (layers left)`` (equations 14 and 20).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from editors.base import Editor, EditorOptions, Method
from editors.spread import SpreadConfig, SpreadEditor, SpreadMethod
from lab.errors import ConfigError
from lab.stats import KeyStats, woodbury_factors


@dataclass(frozen=True)
class MemitConfig(SpreadConfig):
    """Settings beside those of the value search.

    Attributes:
        mom2_weight: λ: how many average keys the statistics stand for against the new ones.
    """

    mom2_weight: float = 15000.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.mom2_weight > 0:
            raise ConfigError(f"mom2_weight must be positive, it is {self.mom2_weight}")


def _update(config: MemitConfig, stats: KeyStats, keys: Tensor, residuals: Tensor) -> tuple[Tensor, Tensor]:
    return woodbury_factors(stats.factor(config.mom2_weight), keys, residuals)


def _build(options: EditorOptions) -> Editor:
    return SpreadEditor(options, SpreadMethod("memit", MemitConfig), _update)


MEMIT = Method(
    "memit",
    "Many facts at once, spread over several MLPs",
    "Meng et al. 2023, arXiv 2210.07229",
    "key statistics once per model; then about a second per fact and one solve per layer",
    True,
    _build,
)
