"""Evaluations that are no suite of edits, found by name: how another floor offers one to ``knowlab eval``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lab.registry import Registry

if TYPE_CHECKING:
    from lab.handle import ModelHandle

GROUP = "knowlab.evaluations"


@dataclass(frozen=True)
class EvaluationRequest:
    """What the command line asks for.

    Attributes:
        handle: The model, with its patches.
        data: A file, or ``None`` or ``atlas`` for the built-in world.
        split: Part of the built-in world, ``test`` or ``dev``.
        limit: Cases at most.
        seed: Of every draw.
        oracle: A second model to compare with, for evaluations that know one.
    """

    handle: ModelHandle
    data: str | None
    split: str
    limit: int | None
    seed: int
    oracle: ModelHandle | None = None


Evaluation = Callable[[EvaluationRequest], Mapping[str, Any]]
"""Returns the JSON document's own part: ``metrics`` by name as ``{mean, low, high, n}``, ``rows``, and more."""


def evaluations() -> Registry[Evaluation]:
    """Every evaluation of the entry-point group ``knowlab.evaluations``."""
    return Registry("evaluation", {}, group=GROUP)
