"""PMET: values searched for attention and MLP together, written to the MLP alone (Li et al., 2023, arXiv 2308.08742).

What the attention of the last edited layer would contribute is left free during the search, so that the MLP's value need not
stand in for it: δ_attn and δ_mlp are optimised jointly, each with its own weight decay and clamp, and only
``z = mlp_out + δ_mlp`` is kept. A target that is already said eases the search (``editors.easing``). Layers then take
``R = (Z − MLP output of the last layer) / √(layers left)`` and MEMIT's update ``Δ = R Kᵀ (K Kᵀ + λC)⁻¹``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from editors.base import Editor, EditorOptions, Method
from editors.easing import Easing
from editors.memit import MemitConfig
from editors.spread import SpreadEditor, SpreadMethod
from lab.arch import Role
from lab.handle import ModelHandle
from lab.stats import KeyStats, woodbury_factors


@dataclass(frozen=True)
class PmetConfig(MemitConfig):
    """Settings beside those of the value search and of MEMIT.

    Attributes:
        nll_factor: Weight of the target's negative log-likelihood.
        eased: What it is multiplied with once every target token is the likeliest in every context.
        stop_kl: The search then stops where the weighted divergence is at most this.
    """

    nll_factor: float = 1.0
    eased: float = 0.1
    stop_kl: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        self.easing()

    def easing(self) -> Easing:
        """The rule as the value search takes it; refuses what makes no sense."""
        return Easing(self.nll_factor, self.eased, self.stop_kl)


def _taps(handle: ModelHandle) -> tuple[Role, ...]:
    return (Role.MLP, Role.ATTN)


def _update(config: PmetConfig, stats: KeyStats, keys: Tensor, residuals: Tensor) -> tuple[Tensor, Tensor]:
    return woodbury_factors(stats.factor(config.mom2_weight), keys, residuals)


def _build(options: EditorOptions) -> Editor:
    method = SpreadMethod("pmet", PmetConfig, math.sqrt, _taps, False, PmetConfig.easing)
    return SpreadEditor(options, method, _update)


PMET = Method(
    "pmet",
    "MEMIT with values searched for attention and MLP together",
    "Li et al. 2023, arXiv 2308.08742",
    "key statistics once per model; then about a second per fact and one solve per layer",
    True,
    _build,
)
