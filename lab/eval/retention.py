"""Retention: how the edits of a sequence hold while others follow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lab.data.cases import EditCase
from lab.eval.probe import Probe, Respondent
from lab.eval.stats import Estimate, summarise


@dataclass(frozen=True)
class Moment:
    """Every edit so far, asked at one moment.

    Attributes:
        held: Per edit in the order of making, the share of its requests whose target is the greedy answer.
        probability: Per edit, the mean probability of its targets (``exp`` of the mean token log-probability).
    """

    held: tuple[float, ...]
    probability: tuple[float, ...]

    def to_json(self) -> dict[str, Any]:
        """Returns plain values."""
        return {"held": list(self.held), "probability": list(self.probability)}

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> Moment:
        """Inverse of ``to_json``."""
        return cls(tuple(row["held"]), tuple(row["probability"]))


@dataclass(frozen=True)
class Retention:
    """The lower triangle "score of edit i after edit j"; a moment after ``j`` edits holds the scores of edits ``0 .. j - 1``.

    Attributes:
        cases: Ids of the edits, in the order of making.
        moments: By the number of edits made, ascending; every edit once, or every few edits.
    """

    cases: tuple[str, ...]
    moments: tuple[Moment, ...]

    def matrix(self) -> list[list[float | None]]:
        """``[i][j]``: whether edit ``i`` held after ``j + 1`` edits; ``None`` where it was not made yet, or not measured."""
        size = len(self.cases)
        table: list[list[float | None]] = [[None] * size for _ in range(size)]
        for moment in self.moments:
            for index, value in enumerate(moment.held):
                table[index][len(moment.held) - 1] = value
        return table

    def by_age(self) -> dict[int, Estimate]:
        """Number of edits made since an edit to the share of edits of that age that held."""
        return held_by_age([self])

    def by_number(self) -> dict[int, Estimate]:
        """Number of edits made to the share of them that held."""
        return {len(moment.held): summarise(moment.held) for moment in self.moments}

    def to_json(self) -> dict[str, Any]:
        """Returns plain values."""
        return {
            "cases": list(self.cases),
            "moments": [moment.to_json() for moment in self.moments],
            "by_age": {str(age): value.to_json() for age, value in self.by_age().items()},
            "by_number": {str(number): value.to_json() for number, value in self.by_number().items()},
        }

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> Retention:
        """Inverse of ``to_json``."""
        return cls(tuple(row["cases"]), tuple(Moment.from_json(moment) for moment in row["moments"]))


def held_by_age(sequences: Sequence[Retention]) -> dict[int, Estimate]:
    """``Retention.by_age`` over several sequences together."""
    ages: dict[int, list[float]] = {}
    for sequence in sequences:
        for moment in sequence.moments:
            for index, value in enumerate(moment.held):
                ages.setdefault(len(moment.held) - 1 - index, []).append(value)
    return {age: summarise(values) for age, values in sorted(ages.items())}


def measure_moment(respondent: Respondent, cases: Sequence[EditCase]) -> Moment:
    """Asks the own prompts of all edits made so far.

    Args:
        respondent: The model as it stands.
        cases: The edits, in the order of making.
    """
    asked = [
        [
            Probe(f"{number}", "rewrite", request.text, answers=(request.target_new,))
            for number, request in enumerate(case.requests)
        ]
        for case in cases
    ]
    seen = iter(respondent.observe([probe for probes in asked for probe in probes]))
    ratings = [[next(seen).ratings[0] for _ in probes] for probes in asked]
    return Moment(
        tuple(sum(each.all_correct for each in found) / len(found) for found in ratings),
        tuple(sum(each.probability for each in found) / len(found) for found in ratings),
    )
