"""How far a confidence can be believed: expected calibration error and Brier score, over all answers and by kind of note."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from lab.errors import DataError


@dataclass(frozen=True)
class Graded:
    """An answer with its confidence.

    Attributes:
        confidence: Between 0 and 1.
        right: Whether the answer was right.
        kind: Kind of the note behind it; empty for memory.
    """

    confidence: float
    right: bool
    kind: str = ""


@dataclass(frozen=True)
class Calibration:
    """Figures over some answers.

    Attributes:
        n: How many.
        accuracy: Share of right ones.
        confidence: Mean confidence.
        ece: See ``expected_calibration_error``.
        brier: See ``brier_score``.
    """

    n: int
    accuracy: float
    confidence: float
    ece: float
    brier: float

    def to_json(self) -> dict[str, Any]:
        """As a JSON object."""
        return asdict(self)


def brier_score(rows: Sequence[Graded]) -> float:
    """Mean squared distance of confidence and outcome (Brier, 1950); 0 is perfect, 0.25 is always saying one half.

    Raises:
        DataError: There are no rows, or a confidence is no probability.
    """
    _check(rows)
    return sum((row.confidence - row.right) ** 2 for row in rows) / len(rows)


def expected_calibration_error(rows: Sequence[Graded], bins: int = 10) -> float:
    """Mean distance of confidence and accuracy within bins of equal width, weighted by their rows (arXiv:1706.04599, eq. 3).

    A confidence on a border belongs to the bin below it, and 0 to the first.

    Raises:
        DataError: There are no rows, a confidence is no probability, or there is no bin.
    """
    _check(rows)
    if bins < 1:
        raise DataError(f"an expected calibration error needs at least one bin, not {bins}")
    sums: dict[int, list[float]] = {}
    for row in rows:
        # Smallest bin whose upper border is not below the confidence; division would round across a border.
        place = next(index for index in range(bins) if row.confidence <= (index + 1) / bins)
        held = sums.setdefault(place, [0.0, 0.0])
        held[0] += row.confidence
        held[1] += row.right
    return sum(abs(sure - right) for sure, right in sums.values()) / len(rows)


def calibration(rows: Sequence[Graded], bins: int = 10) -> Calibration:
    """All figures over some answers.

    Raises:
        DataError: See ``expected_calibration_error``.
    """
    ece, brier = expected_calibration_error(rows, bins), brier_score(rows)
    accuracy = sum(row.right for row in rows) / len(rows)
    return Calibration(len(rows), accuracy, sum(row.confidence for row in rows) / len(rows), ece, brier)


def by_kind(rows: Iterable[Graded], bins: int = 10) -> Mapping[str, Calibration]:
    """Figures for each kind of note, in order of first occurrence; kinds without rows have none."""
    groups: dict[str, list[Graded]] = {}
    for row in rows:
        groups.setdefault(row.kind, []).append(row)
    return {kind: calibration(group, bins) for kind, group in groups.items()}


def _check(rows: Sequence[Graded]) -> None:
    if not rows:
        raise DataError("nothing was answered; a calibration needs at least one row")
    for row in rows:
        if not 0 <= row.confidence <= 1:
            raise DataError(f"a confidence lies between 0 and 1, not at {row.confidence}")
