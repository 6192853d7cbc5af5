"""The rules: two next-token distributions in, scores of the next token out.

Notation: ``c`` are log-probabilities with the documents, ``u`` without them, ``H`` is the entropy in nats. With its
defaults, every rule keeps the best token where ``c`` equals ``u``. A token that the model itself rules out with the
documents (log-probability minus infinity) stays ruled out, and one that it rules out in either stream gets no contrast,
for its ratio has no value.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor

from lab.errors import ConfigError

if TYPE_CHECKING:
    from lab.handle import ModelHandle


@dataclass(frozen=True)
class Rule(ABC):
    """How two streams make one.

    Attributes:
        title: What it does, in a few words.
        paper: Where it comes from.
        cost: What it costs beside plain decoding.
        uses_memory: Whether it looks at the stream without documents.
        changes_model: Whether the model computes otherwise while it decodes; then nobody else may use it meanwhile.
    """

    title: ClassVar[str]
    paper: ClassVar[str]
    cost: ClassVar[str] = "two rows a step"
    uses_memory: ClassVar[bool] = True
    changes_model: ClassVar[bool] = False

    def settled(self, handle: ModelHandle, with_context: Sequence[str], without: Sequence[str]) -> Rule:
        """The rule with everything chosen that it measures on the model, from prompts with documents and without."""
        return self

    def active(self, handle: ModelHandle) -> AbstractContextManager[None]:
        """What the model does differently while the rule decodes; nothing is left behind."""
        return nullcontext()

    @abstractmethod
    def combine(self, c: Tensor, u: Tensor) -> Tensor:
        """Scores ``[row, vocabulary]``, unnormalised, of log-probabilities ``c`` and ``u`` of the same shape."""


def entropy(logp: Tensor) -> Tensor:
    """Shannon entropy in nats, ``[row]``, of log-probabilities ``[row, vocabulary]``."""
    return torch.special.entr(logp.exp()).sum(dim=-1)


def jensen_shannon(logp: Tensor, logq: Tensor) -> Tensor:
    """Jensen-Shannon divergence in nats, ``[row]``, between 0 and ln 2, of log-probabilities ``[row, vocabulary]``."""
    middle = torch.logaddexp(logp, logq) - math.log(2)
    found = entropy(middle) - (entropy(logp) + entropy(logq)) / 2
    return found.clamp(0.0, math.log(2))  # rounding may leave the range


def contrast(c: Tensor, u: Tensor) -> Tensor:
    """``c - u``, and 0 where either is minus infinity."""
    return torch.where(torch.isfinite(c) & torch.isfinite(u), c - u, torch.zeros_like(c))


def _checked_alpha(alpha: float) -> None:
    if not isinstance(alpha, (int, float)) or not math.isfinite(alpha) or alpha < 0:
        raise ConfigError(f"alpha must be a number of at least 0, it is {alpha!r}")


@dataclass(frozen=True)
class Greedy(Rule):
    """The distribution with documents as it is."""

    title: ClassVar[str] = "plain decoding with the documents"
    paper: ClassVar[str] = ""
    cost: ClassVar[str] = "one row a step"
    uses_memory: ClassVar[bool] = False

    def combine(self, c: Tensor, u: Tensor) -> Tensor:
        """``c``."""
        return c


@dataclass(frozen=True)
class CAD(Rule):
    """Context-aware decoding: ``(1 + alpha) c - alpha u``.

    Attributes:
        alpha: Weight of the contrast; the released code takes 1 for questions and 0.5 for summaries.
    """

    title: ClassVar[str] = "context-aware decoding"
    paper: ClassVar[str] = "arXiv:2305.14739"
    alpha: float = 1.0

    def __post_init__(self) -> None:
        _checked_alpha(self.alpha)

    def combine(self, c: Tensor, u: Tensor) -> Tensor:
        """``c + alpha (c - u)``."""
        return c + self.alpha * contrast(c, u)


@dataclass(frozen=True)
class AdaCAD(Rule):
    """Context-aware decoding whose weight is, at each step, the Jensen-Shannon divergence of the two streams.

    Attributes:
        floor: Smallest weight; the paper takes none for questions and 0.3 for long texts.
    """

    title: ClassVar[str] = "context-aware decoding weighted by the conflict"
    paper: ClassVar[str] = "arXiv:2409.07394"
    floor: float = 0.0

    def __post_init__(self) -> None:
        _checked_alpha(self.floor)

    def combine(self, c: Tensor, u: Tensor) -> Tensor:
        """``c + JSD(c, u) (c - u)``, row by row."""
        weight = jensen_shannon(c, u).clamp_min(self.floor)[:, None]
        return c + weight * contrast(c, u)


@dataclass(frozen=True)
class COIECD(Rule):
    """Contextual information-entropy constraint: contrast on top of memory inside a typicality band, of context outside.

    Attributes:
        alpha: Weight of the contrast.
        ratio: Share of the band's bounds, lambda in the paper; the bounds lie ``ln(1 / ratio)`` inside the extremes.
        variant: ``official`` bounds ``-c`` as the released code does: it normalises ``-c - H(u)`` by a softmax, which no
            shift changes, so the entropy drops out. ``entropy`` bounds the distance ``|-c - H(u)|``, where it does not.
    """

    title: ClassVar[str] = "contrast within an entropy band"
    paper: ClassVar[str] = "arXiv:2402.11893"
    alpha: float = 1.0
    ratio: float = 0.25
    variant: Literal["official", "entropy"] = "official"

    def __post_init__(self) -> None:
        _checked_alpha(self.alpha)
        if not 0 < self.ratio <= 1:
            raise ConfigError(f"ratio must lie in (0, 1], it is {self.ratio!r}")
        if self.variant not in ("official", "entropy"):
            raise ConfigError(f"unknown variant {self.variant!r}; use official or entropy")

    def combine(self, c: Tensor, u: Tensor) -> Tensor:
        """``u`` inside the band and ``c`` outside, plus ``alpha (c - u)``; a token without finite ``u`` is outside."""
        inside = self.band(c, u) & torch.isfinite(u)
        scores = torch.where(inside, u, c) + self.alpha * contrast(c, u)
        return scores.masked_fill(c == -math.inf, -math.inf)

    def band(self, c: Tensor, u: Tensor) -> Tensor:
        """Which tokens lie inside the band, ``[row, vocabulary]`` bool."""
        possible = torch.isfinite(c)
        surprise = -c if self.variant == "official" else (-c - entropy(u)[:, None]).abs()
        margin = math.log(1 / self.ratio)
        low = surprise.masked_fill(~possible, math.inf).amin(dim=-1, keepdim=True) + margin
        high = surprise.masked_fill(~possible, -math.inf).amax(dim=-1, keepdim=True) - margin
        below = (surprise < low) & possible
        # A single token below the lower bound is a confident answer, not an outlier.
        below &= below.sum(dim=-1, keepdim=True) != 1
        return possible & ~below & ~(surprise > high)


@dataclass(frozen=True)
class CKPlug(Rule):
    """CK-PLUG: a dial between memory and context, turned only where the documents make the model less certain.

    Attributes:
        memory: 1 follows memory, 0 the context; ``None`` sets it at each step to ``H(c) / (H(u) + H(c))``.
        threshold: Smallest gain in certainty ``H(u) - H(c)`` that leaves a step alone.
        top_k: The tokens that can win a turned step: the union of so many best ones of both streams. 10 is our choice.
    """

    title: ClassVar[str] = "a dial between memory and context"
    paper: ClassVar[str] = "arXiv:2503.15888"
    memory: float | None = None
    threshold: float = 0.0
    top_k: int = 10

    def __post_init__(self) -> None:
        if self.memory is not None and not (isinstance(self.memory, (int, float)) and 0 <= self.memory <= 1):
            raise ConfigError(f"memory must lie in [0, 1], it is {self.memory!r}")
        if not isinstance(self.threshold, (int, float)) or math.isnan(self.threshold):
            raise ConfigError(f"threshold must be a number, it is {self.threshold!r}")
        if not isinstance(self.top_k, int) or self.top_k < 1:
            raise ConfigError(f"top_k must be a whole number of at least 1, it is {self.top_k!r}")

    def combine(self, c: Tensor, u: Tensor) -> Tensor:
        """``c`` where certainty holds, else ``memory * u + (1 - memory) (c - u)`` over the head of both streams."""
        before, after = entropy(u), entropy(c)
        if self.memory is None:
            # Two certain streams have no entropy to share out, and no loss of certainty either.
            share = (after / (before + after).clamp_min(torch.finfo(c.dtype).tiny))[:, None]
        else:
            share = torch.full_like(c[:, :1], self.memory)
        k = min(self.top_k, c.shape[-1])
        head = torch.zeros_like(c, dtype=torch.bool)
        for stream in (c, u):
            head.scatter_(-1, stream.topk(k, dim=-1).indices, True)
        head &= torch.isfinite(c) & torch.isfinite(u)
        turned = (share * u.masked_fill(~head, 0.0) + (1 - share) * contrast(c, u)).masked_fill(
            ~head, -math.inf
        )
        keep = (before - after >= self.threshold) | ~head.any(dim=-1)
        return torch.where(keep[:, None], c, turned)
