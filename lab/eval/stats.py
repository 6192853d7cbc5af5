"""Means with 95 % intervals, and the harmonic score.

Which interval: proportions (every value 0 or 1) get Wilson's, which stays inside [0, 1] and keeps a width at 0 and 1. Other
values get the normal approximation, mean ± 1.96 standard errors, as the editing papers print it; values bounded by ``bounds``
that happen to be all equal get Wilson's too, for a sample without spread does not prove that there is none. The harmonic score is
not a mean of cases, so its interval comes from resampling cases.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Z95 = 1.959963984540054


@dataclass(frozen=True)
class Estimate:
    """A mean and its 95 % interval; over nothing all three are ``None`` and ``n`` is 0.

    Attributes:
        mean: The mean, or the score.
        low: Lower end.
        high: Upper end.
        n: How many values it is the mean of.
    """

    mean: float | None
    low: float | None
    high: float | None
    n: int

    def to_json(self) -> dict[str, Any]:
        """Returns ``{mean, low, high, n}``."""
        return {"mean": self.mean, "low": self.low, "high": self.high, "n": self.n}


NOTHING = Estimate(None, None, None, 0)


def wilson(mean: float, n: int) -> tuple[float, float]:
    """Wilson's score interval of a proportion ``mean`` over ``n`` trials."""
    spread = Z95**2 / n
    centre = (mean + spread / 2) / (1 + spread)
    half = Z95 / (1 + spread) * math.sqrt(mean * (1 - mean) / n + spread / (4 * n))
    # At 0 and 1 the end is the mean itself; rounding must not push it inside.
    return max(0.0, min(centre - half, mean)), min(1.0, max(centre + half, mean))


def summarise(values: Sequence[float], bounds: tuple[float, float] | None = (0.0, 1.0)) -> Estimate:
    """Mean and interval of independent values.

    Args:
        values: One per case (or per prompt, where a suite pools prompts).
        bounds: Smallest and largest possible value; ``None`` where there are none. One unbounded value has no interval: both
            ends are the value itself, and ``n`` says why.
    """
    if not values:
        return NOTHING
    n = len(values)
    mean = math.fsum(values) / n
    if bounds is not None and (bounds == (0.0, 1.0) and all(value in (0.0, 1.0) for value in values)):
        return Estimate(mean, *wilson(mean, n), n)
    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1)) if n > 1 else 0.0
    if bounds is None:
        half = Z95 * deviation / math.sqrt(n)
        return Estimate(mean, mean - half, mean + half, n)
    low, high = bounds
    if deviation <= 1e-12 * max(1.0, abs(mean)):
        share = min(1.0, max(0.0, (mean - low) / (high - low)))
        first, last = wilson(share, n)
        return Estimate(mean, min(mean, low + first * (high - low)), max(mean, low + last * (high - low)), n)
    half = Z95 * deviation / math.sqrt(n)
    return Estimate(mean, max(low, mean - half), min(high, mean + half), n)


def harmonic(values: Sequence[float]) -> float:
    """Harmonic mean; 0 where any value is 0."""
    if not values:
        raise ValueError("a harmonic mean over nothing")
    if min(values) <= 0:
        return 0.0
    return len(values) / math.fsum(1 / value for value in values)


def harmonic_score(
    cases: Sequence[Mapping[str, Sequence[float]]],
    parts: Sequence[str],
    *,
    resamples: int = 1000,
    seed: int = 0,
) -> Estimate:
    """The harmonic mean of the means of ``parts``, with a percentile interval from resampling cases.

    Args:
        cases: Per case, the values of each metric (several where prompts are pooled).
        parts: The metrics that enter; over any of them without a value the score is over nothing.
        resamples: Bootstrap samples.
        seed: Seeds the resampling.

    Returns:
        The estimate; ``n`` is the number of cases.
    """
    if not cases or not parts:
        return NOTHING
    sums = np.array([[math.fsum(case.get(part, ())) for part in parts] for case in cases])
    counts = np.array([[len(case.get(part, ())) for part in parts] for case in cases], dtype=float)
    if not counts.sum(axis=0).all():
        return NOTHING
    mean = harmonic(list(sums.sum(axis=0) / counts.sum(axis=0)))
    draws = np.random.default_rng(seed).integers(0, len(cases), size=(resamples, len(cases)))
    weights = np.stack([np.bincount(draw, minlength=len(cases)) for draw in draws]).astype(float)
    totals, numbers = weights @ sums, weights @ counts
    kept = (numbers > 0).all(axis=1)
    scores = [harmonic(list(row)) for row in totals[kept] / numbers[kept]]
    low, high = np.percentile(scores, [2.5, 97.5]) if scores else (mean, mean)
    return Estimate(mean, min(mean, float(low)), max(mean, float(high)), len(cases))
