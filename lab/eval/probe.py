"""What is asked and what came back: the border between suites and whoever answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np

from lab.scoring import TargetScore

Task = Literal["score", "generate"]


@dataclass(frozen=True)
class Probe:
    """One thing to ask.

    Attributes:
        id: Unique within its case.
        group: What it tests; suites' measures pick their probes by it.
        prompt: Filled text.
        task: ``score`` rates the answers as continuations; ``generate`` lets the model write.
        answers: The right answer, then aliases.
        rival: The answer that the right one competes with, or empty.
        kind: Sub-division of the group, or empty.
        tokens: For ``generate``: length of the continuation; with ``whole`` set, of prompt and continuation together.
        top_k: For ``generate``: samples among so many tokens; greedy without it.
        seed: For ``generate``: seeds the sampling.
        distribution: For ``score``: keeps the log-probabilities of the whole vocabulary at the answer's tokens (large).
    """

    id: str
    group: str
    prompt: str
    task: Task = "score"
    answers: tuple[str, ...] = ()
    rival: str = ""
    kind: str = ""
    tokens: int = 0
    whole: bool = False
    top_k: int | None = None
    seed: int = 0
    distribution: bool = False

    @property
    def targets(self) -> tuple[str, ...]:
        """What is scored: the answers, then the rival where there is one."""
        return (*self.answers, self.rival) if self.rival else self.answers


@dataclass(frozen=True)
class Rating(TargetScore):
    """How a model rates one target, and what it would have said instead.

    Attributes:
        predicted: The most probable token id at each place of the target, the target's own tokens being fed.
        distribution: ``[target tokens, vocabulary]`` log-probabilities, where the probe asked for them.
    """

    predicted: tuple[int, ...] = ()
    distribution: np.ndarray | None = field(default=None, repr=False, compare=False)


@dataclass(frozen=True)
class Observation:
    """The answer to a probe.

    Attributes:
        probe_id: The probe.
        ratings: One per target of a ``score`` probe, in its order.
        text: Continuation of a ``generate`` probe.
        text_tokens: Token ids of ``text``.
    """

    probe_id: str
    ratings: tuple[Rating, ...] = ()
    text: str = ""
    text_tokens: tuple[int, ...] = ()


class Respondent(Protocol):
    """Whoever can be asked: a model, an edited model, a pipeline with documents."""

    def observe(self, probes: Sequence[Probe]) -> list[Observation]:
        """Answers all probes, in order."""
        ...
