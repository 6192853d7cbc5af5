"""The lift of an attack over its controls, and its interval."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np

from lab.errors import ConfigError
from lab.eval.stats import summarise

RESAMPLES = 2000


@dataclass(frozen=True)
class Interval:
    """A number and its 95 % interval."""

    mean: float
    low: float
    high: float

    def to_json(self) -> dict[str, float]:
        """Returns ``{mean, low, high}``."""
        return {"mean": self.mean, "low": self.low, "high": self.high}

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> Interval:
        """Inverse of ``to_json``."""
        return cls(float(row["mean"]), float(row["low"]), float(row["high"]))

    @classmethod
    def of(cls, values: Sequence[float], bounds: tuple[float, float] | None = (0.0, 1.0)) -> Interval:
        """Mean and interval of independent values, as ``lab.eval.stats.summarise`` makes them.

        Raises:
            ConfigError: There are no values.
        """
        found = summarise(list(values), bounds)
        if found.mean is None or found.low is None or found.high is None:
            raise ConfigError("an interval over nothing: the attack scored no fact")
        return cls(found.mean, found.low, found.high)


def lift_over_controls(
    per_fact: Sequence[float],
    oracle_per_fact: Sequence[float] = (),
    never_per_fact: Sequence[float] = (),
    seed: int = 0,
    resamples: int = RESAMPLES,
    comparisons: int = 1,
    *,
    about: Sequence[str] = (),
    about_never: Sequence[str] = (),
) -> Interval:
    """Mean score minus the larger of the controls' means, with a 95 % bootstrap interval.

    Subjects are drawn with replacement, each with all its facts, for what a model says of one subject hangs together; the oracle's
    scores are drawn with the facts they belong to, never-trained facts apart, and the larger control is chosen anew in every
    draw. Few subjects show too little of the spread there is, so the interval is widened as Student's is beside the normal.
    Without any control the scores themselves are the lift. Where nothing varies, the interval is Newcombe's (Wilson's of each
    side), for a sample without spread does not prove that there is none.

    Args:
        per_fact: Scores in [0, 1].
        oracle_per_fact: Of the oracle on the same facts, in the same order; or empty.
        never_per_fact: Of facts that were never trained; or empty.
        seed: Seeds the draws.
        resamples: Number of draws.
        comparisons: Among how many such lifts the worst is looked for; all their intervals hold together with 95 %
            (Bonferroni), so that trying many things does not make a clean model look guilty.
        about, about_never: The subjects of the scores; without them every fact is a subject of its own.

    Raises:
        ConfigError: There are no scores, the oracle's are not as many, one is outside [0, 1], or the subjects are not as many.
    """
    if not per_fact:
        raise ConfigError("a lift over nothing: the attack scored no fact")
    if oracle_per_fact and len(oracle_per_fact) != len(per_fact):
        raise ConfigError(
            f"{len(per_fact)} facts, but {len(oracle_per_fact)} scores of the oracle: it is asked for the same facts"
        )
    for values, names in ((per_fact, about), (never_per_fact, about_never)):
        if names and len(names) != len(values):
            raise ConfigError(f"{len(values)} scores about {len(names)} subjects do not pair up")
    arms = [np.asarray(values, dtype=float) for values in (per_fact, oracle_per_fact, never_per_fact)]
    for name, arm in zip(("facts", "oracle", "never"), arms, strict=True):
        if arm.size and not bool(((arm >= 0) & (arm <= 1)).all()):
            raise ConfigError(
                f"scores of {name!r} must lie in [0, 1]; they go from {arm.min()} to {arm.max()}"
            )
    facts, oracle, never = arms
    controls = [arm for arm in (oracle, never) if arm.size]
    mean = float(facts.mean() - max((float(arm.mean()) for arm in controls), default=0.0))
    if all(float(np.ptp(arm)) == 0.0 for arm in (facts, *controls)):
        top = max(controls, key=lambda arm: float(arm.mean()), default=None)
        side = Interval.of(facts.tolist())
        other = Interval(0.0, 0.0, 0.0) if top is None else Interval.of(top.tolist())
        below = math.hypot(side.mean - side.low, other.high - other.mean)
        above = math.hypot(side.high - side.mean, other.mean - other.low)
        return Interval(mean, max(-1.0, mean - below), min(1.0, mean + above))
    rng = np.random.default_rng(seed)
    paired = [facts, oracle] if oracle.size else [facts]
    drawn = _drawn_means(paired, about, resamples, rng)
    control = np.full(resamples, -np.inf) if controls else np.zeros(resamples)
    if oracle.size:
        control = np.maximum(control, drawn[1])
    if never.size:
        control = np.maximum(control, _drawn_means([never], about_never, resamples, rng)[0])
    tail = 2.5 / comparisons
    low, high = np.percentile(drawn[0] - control, [tail, 100 - tail])
    sides = [len(set(about)) or facts.size, *([len(set(about_never)) or never.size] if never.size else [])]
    wider = _widening(sides, tail / 100)
    below, above = max(0.0, mean - float(low)), max(0.0, float(high) - mean)
    return Interval(mean, max(-1.0, mean - wider * below), min(1.0, mean + wider * above))


def _widening(sizes: Sequence[int], tail: float) -> float:
    """Student's quantile over the normal one, and the resamples' lack of spread, for independent samples of these sizes.

    The quantile is the expansion in powers of 1/f (Abramowitz and Stegun 1964, 26.7.5), to the third.
    """
    freedom = sum(sizes) - len(sizes)
    if freedom < 1:
        return 1.0
    z = -NormalDist().inv_cdf(tail)
    student = (
        z
        + (z**3 + z) / (4 * freedom)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * freedom**3)
    )
    return student / z * math.sqrt(sum(sizes) / freedom)


def _drawn_means(
    arms: Sequence[np.ndarray], subjects: Sequence[str], resamples: int, rng: np.random.Generator
) -> list[np.ndarray]:
    """Means of each arm over subjects drawn with replacement, the same draws for all arms: ``[resample]`` each."""
    size = arms[0].size
    place = {name: number for number, name in enumerate(dict.fromkeys(subjects))}
    group = np.array([place[name] for name in subjects]) if place else np.arange(size)
    number = int(group.max()) + 1
    draws = rng.integers(0, number, size=(resamples, number))
    counts = np.bincount(group, minlength=number)[draws].sum(axis=1)
    return [np.bincount(group, arm, minlength=number)[draws].sum(axis=1) / counts for arm in arms]
