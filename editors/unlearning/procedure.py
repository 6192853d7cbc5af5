"""How the terms of one update come about; the plain way, and what methods with a way of their own may replace."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from editors.tuning import TargetLines
from lab.trace import Site

if TYPE_CHECKING:
    from editors.unlearning.trainer import UnlearningTrainer


@dataclass(frozen=True)
class Answers:
    """One batch of answers of one kind, in the form that ``losses`` reads.

    Attributes:
        logits: ``[batch, pos, vocabulary]`` of the model in training.
        labels: ``[batch, pos]``, -100 outside answers.
        reference: ``[batch, pos]`` log-probabilities of the labels under the untouched model, 0 outside answers and where no
            term reads them.
        table: ``[answer token, vocabulary]`` log-probabilities of the untouched model; without rows where no term reads it.
        lines: The batch as token rows.
        states: What was asked for, ``[batch, pos of the whole row, width]``.
    """

    logits: Tensor
    labels: Tensor
    reference: Tensor
    table: Tensor
    lines: TargetLines
    states: Mapping[Site, Tensor] = field(default_factory=dict)

    def at_answer(self, site: Site) -> Tensor:
        """States where the answer's tokens are predicted, ``[answer token, width]``."""
        return self.states[site][self.lines.row, self.lines.keep[self.lines.column]]

    @property
    def real(self) -> Tensor:
        """``[batch, pos of the whole row]``, true on tokens that are no padding."""
        return self.lines.batch.attention_mask.bool()


@dataclass(frozen=True)
class Step:
    """The terms of one update.

    Attributes:
        terms: By name; ``forget`` always.
        weights: What each is multiplied by.
        answer: The facts to forget as the model sees them now, for the rule that ends training.
        retained: The retained facts, likewise.
    """

    terms: Mapping[str, Tensor]
    weights: Mapping[str, float]
    answer: Answers | None = None
    retained: Answers | None = None


class Procedure:
    """The plain way: the objective's forget loss on the answers that it reads, and its retain term.

    One object serves one run. Subclasses replace single steps; none of them touches weights.
    """

    repeats = 1
    """Updates in a row on the same facts."""

    def prepare(self, run: UnlearningTrainer) -> None:
        """Asks the untouched model what later steps need."""

    def begin_epoch(self, run: UnlearningTrainer, epoch: int) -> None:
        """Called before the first update of every pass over the facts."""

    def choose(
        self, run: UnlearningTrainer, picked: Sequence[int], beside: Sequence[int]
    ) -> tuple[Sequence[int], Sequence[int]]:
        """Facts to forget and retained facts of one update, given those that were drawn; none of the former, no update."""
        return picked, beside

    def step(self, run: UnlearningTrainer, picked: Sequence[int], beside: Sequence[int]) -> Step:
        """The terms of one update."""
        batch, retained = run.together(run.objective.reads, picked, beside)
        assert run.objective.forget is not None  # a procedure of its own replaces this step
        forget = run.objective.forget(batch, run.config)
        return self.joined(run, {"forget": forget}, batch.get("answer"), retained)

    def with_retained(
        self,
        run: UnlearningTrainer,
        terms: Mapping[str, Tensor],
        answer: Answers | None,
        beside: Sequence[int],
    ) -> Step:
        """Adds the objective's retain term on some retained facts, which the model is run on here."""
        return self.joined(run, terms, answer, run.retained_answers(beside) if beside else None)

    def joined(
        self,
        run: UnlearningTrainer,
        terms: Mapping[str, Tensor],
        answer: Answers | None,
        retained: Answers | None,
    ) -> Step:
        """Adds the objective's retain term on a batch of retained answers."""
        weights = {"forget": run.config.forget_weight}
        if retained is None:
            return Step(terms, weights, answer)
        return Step(
            {**terms, "retain": run.retain_term(retained)},
            {**weights, "retain": run.config.retain_weight},
            answer,
            retained,
        )

    def before_update(self, run: UnlearningTrainer) -> None:
        """Called between the backward pass and the update."""

    def state(self) -> dict[str, Any]:
        """What is carried from one pass to the next and does not follow from ``prepare``: tensors, plain values and lists."""
        return {}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Takes up what ``state`` gave, behind ``prepare``."""

    def notes(self) -> dict[str, Any]:
        """What the patch should say about it."""
        return {}


def real_norms(states: Tensor, real: Tensor) -> Tensor:
    """Norm of each row over its real tokens, ``[batch]``."""
    return torch.linalg.vector_norm((states * real[..., None]).flatten(1), dim=1)
