"""How much of an unlearning patch to apply: the least dose whose forgetting matches a reference."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from lab.errors import ConfigError


@dataclass(frozen=True)
class Match:
    """Result of the search.

    Attributes:
        dose: Factor of ``patch.scaled``; ``None`` where no dose that was tried matches.
        gap: At the dose; without one, the smallest in size that was seen.
        tried: Every dose with its gap, in the order of trial.
    """

    dose: float | None
    gap: float
    tried: tuple[tuple[float, float], ...]


def match_dose(
    gap: Callable[[float], float],
    tolerance: float,
    *,
    most: float = 4.0,
    width: float = 0.05,
    evaluations: int = 14,
) -> Match:
    """Finds the least dose whose gap is within the tolerance, by bisection.

    The gap is how much more the patched model knows of the forgotten facts than the reference does; it falls as the dose grows,
    first quickly, and may fall below what the reference knows. The least matching dose is the one that costs the least elsewhere.

    Args:
        gap: Measures a dose.
        tolerance: Largest size of a gap that counts as matched.
        most: Largest dose; the full one is doubled up to it while too much is left.
        width: Doses are told apart down to this part of themselves.
        evaluations: Calls of ``gap`` at most.

    Raises:
        ConfigError: A setting makes no sense.
    """
    if tolerance <= 0 or most < 1 or not 0 < width < 1 or evaluations < 1:
        raise ConfigError(
            "matching needs a tolerance above 0, a largest dose of at least 1, a width in (0, 1), and a trial"
        )
    tried: list[tuple[float, float]] = []

    def measure(dose: float) -> float:
        found = gap(dose)
        # What cannot be ordered (NaN of a model that broke down) counts as far too much forgetting.
        found = found if found == found else float("-inf")
        tried.append((dose, found))
        return found

    low, high = 0.0, 1.0
    while measure(high) > tolerance:
        low, high = high, high * 2
        if high > most or len(tried) >= evaluations:
            break
    else:
        while len(tried) < evaluations and high - low > width * high:
            middle = (low + high) / 2
            if measure(middle) > tolerance:
                low = middle
            else:
                high = middle
    matched = [(dose, found) for dose, found in tried if abs(found) <= tolerance]
    if matched:
        dose, found = min(matched)
        return Match(dose, found, tuple(tried))
    return Match(None, min((found for _, found in tried), key=abs), tuple(tried))
