"""Muting memory while reading: the MLPs that push the model's own answer are scaled down (ParamMute, NeurIPS 2025).

The gated product of an MLP, which its down projection reads, is multiplied by a factor λ in some layers; 0 mutes them, 1 leaves
them as they are, more amplifies memory. The paper finds the layers by how much more they are active before unfaithful answers;
here their effect is measured: how much less likely memory's answer becomes, below the documents, when one layer alone is scaled.
That does not tell a layer that pushes memory from one that everything needs: a small factor can break a small model. Notes are
written by the muted model too; what that does to them has not been measured.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from lab.arch import Role
from lab.errors import ConfigError
from lab.scoring import score_targets
from lab.trace import Site, trace
from rag.decoding.rules import Rule

if TYPE_CHECKING:
    from lab.handle import ModelHandle

_MEASURED = "measured"
# The paper scales 8 of 32 layers; a measurement on more questions than this changes little.
_SHARE, _QUESTIONS = 4, 8
_ANSWER_TOKENS = 12


@contextmanager
def muted(handle: ModelHandle, layers: Sequence[int], scale: float) -> Iterator[None]:
    """Scales what the MLPs of some layers write, for the length of a ``with``; no weight is touched.

    Nobody else uses the model meanwhile.

    Args:
        handle: The model.
        layers: Which blocks.
        scale: The factor λ.

    Raises:
        ConfigError: A layer does not exist, or the factor is no number of at least 0.
        BusyError: This thread only reads the model.
    """
    _check_scale(scale)

    def scaled(value: Tensor) -> Tensor:
        return value * scale

    with (
        handle.writing(),
        trace(handle, writes={Site(Role.MLP_OUT, layer, "in"): scaled for layer in dict.fromkeys(layers)}),
    ):
        yield


def memory_effects(
    handle: ModelHandle, prompts: Sequence[str], answers: Sequence[str], scale: float
) -> tuple[float, ...]:
    """How much each layer's MLP raises memory's answers below the documents.

    Args:
        handle: The model.
        prompts: Prompts with documents.
        answers: What the model says without them, one per prompt.
        scale: The factor λ that each layer is scaled by, alone.

    Returns:
        Per layer, the mean drop of the answers' log-probability per token; above 0 where the layer raises them.

    Raises:
        ConfigError: There is no prompt, or not one answer for each.
    """
    if not prompts or len(prompts) != len(answers):
        raise ConfigError(
            f"{len(prompts)} prompts and {len(answers)} answers; give at least one, and one answer each"
        )
    pairs = list(zip(prompts, answers, strict=True))
    before = [score.mean_logprob for score in score_targets(handle, pairs)]
    effects = []
    for layer in range(handle.n_layers):
        with muted(handle, [layer], scale):
            after = [score.mean_logprob for score in score_targets(handle, pairs)]
        drops = [old - new for old, new in zip(before, after, strict=True)]
        effects.append(math.fsum(drops) / len(drops))
    return tuple(effects)


@dataclass(frozen=True)
class ParamMute(Rule):
    """Plain decoding while the MLPs that push memory are scaled down.

    Attributes:
        scale: The factor λ; 0.25 is the released one.
        layers: ``measured`` (a pass per layer over the questions asked), or layers such as ``3``, ``4-6`` or ``1+4-6``.
        count: How many layers are chosen where they are measured; 0 for a quarter of the model's.
    """

    scale: float = 0.25
    layers: str | int = _MEASURED
    count: int = 0

    title: ClassVar[str] = "MLPs that push memory are scaled down while reading"
    paper: ClassVar[str] = "ParamMute, NeurIPS 2025"
    cost: ClassVar[str] = "one row a step; a pass per layer where layers are measured"
    uses_memory: ClassVar[bool] = False
    changes_model: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _check_scale(self.scale)
        if not isinstance(self.count, int) or self.count < 0:
            raise ConfigError(f"count is a number of layers, it is {self.count!r}")
        if self.layers != _MEASURED:
            _parse(self.layers)

    def settled(self, handle: ModelHandle, with_context: Sequence[str], without: Sequence[str]) -> ParamMute:
        """The rule with the layers that raise memory's answers most; without any answer of memory, nothing to mute."""
        if self.layers != _MEASURED:
            return self
        chosen = list(zip(with_context, without, strict=True))[:_QUESTIONS]
        said = handle.generate([bare for _, bare in chosen], max_new_tokens=_ANSWER_TOKENS, stop=("\n",))
        asked = [(told, text.strip()) for (told, _), text in zip(chosen, said, strict=True) if text.strip()]
        best: list[int] = []
        if asked:
            prompts, answers = zip(*asked, strict=True)
            effects = memory_effects(handle, prompts, answers, self.scale)
            order = sorted(range(handle.n_layers), key=lambda layer: (-effects[layer], layer))
            best = [layer for layer in order if effects[layer] > 0][
                : self.count or max(1, handle.n_layers // _SHARE)
            ]
        return replace(self, layers="+".join(map(str, sorted(best))))

    @contextmanager
    def active(self, handle: ModelHandle) -> Iterator[None]:
        """Mutes; see ``muted``.

        Raises:
            ConfigError: The layers were not measured, or one does not exist.
        """
        if self.layers == _MEASURED:
            raise ConfigError(
                "parammute has not measured its layers; call `settled` first, as readers do, or name them"
            )
        with muted(handle, _parse(self.layers), self.scale):
            yield

    def combine(self, c: Tensor, u: Tensor) -> Tensor:
        """``c``."""
        return c


def _check_scale(scale: float) -> None:
    if not isinstance(scale, (int, float)) or not math.isfinite(scale) or scale < 0:
        raise ConfigError(f"scale must be a number of at least 0, it is {scale!r}")


def _parse(layers: str | int) -> list[int]:
    """Layers of ``3``, ``4-6``, ``1+4-6``; none of an empty text."""
    found: list[int] = []
    for part in str(layers).split("+") if str(layers) else ():
        span = re.fullmatch(r"(\d{1,4})(?:-(\d{1,4}))?", part.strip())
        if span is None or (span[2] and int(span[2]) < int(span[1])):
            raise ConfigError(
                f"layers {layers!r}: {part!r} is neither a layer nor a range such as 4-6; join parts with +"
            )
        found += range(int(span[1]), int(span[2] or span[1]) + 1)
    return found
