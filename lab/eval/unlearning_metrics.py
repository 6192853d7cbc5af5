"""Measures of unlearning as functions of numbers and texts: no model, no file, no method.

Log-probabilities are natural. An *answer probability* is ``exp`` of the mean token log-probability (``TargetScore.probability``).
Definitions: TOFU (Maini et al., 2024, arXiv 2401.06121), MUSE (Shi et al., 2024, arXiv 2407.06460), RWKU (Jin et al., 2024, arXiv
2406.10890), ORT (arXiv 2506.07795), FaithUn (arXiv 2502.19207), RESTOR (arXiv 2411.00204), extraction strength (Carlini et al.,
2021, arXiv 2012.07805), MIN-K (Shi et al., 2023, arXiv 2310.16789).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

from lab.errors import ConfigError
from lab.eval.stats import harmonic

Mean = Literal["geometric", "arithmetic"]

# Beyond so many pairs of values the exact count takes seconds, and the asymptotic p-value is good to three digits.
_EXACT_PAIRS = 1_000_000


# ---- TOFU --------------------------------------------------------------------------------------------------------------


def truth_ratio(right: float, wrong: Sequence[float], *, mean: Mean = "geometric") -> float:
    """How probable wrong answers are beside a right one: ``mean_j P(wrong_j) / P(right)``, of length-normalised probabilities.

    Args:
        right: Mean token log-probability of the right answer; TOFU takes the paraphrased one on its authors.
        wrong: Those of the perturbed answers.
        mean: ``geometric`` averages log-probabilities, as released code does; ``arithmetic`` averages probabilities, as the
            paper writes it.

    Returns:
        Below 1 where the model prefers the right answer; ``inf`` where it gives it no probability that a float can hold.

    Raises:
        ConfigError: No wrong answer, or an unknown mean.
    """
    if not wrong:
        raise ConfigError("a truth ratio needs at least one wrong answer")
    if mean == "geometric":
        log_wrong = math.fsum(wrong) / len(wrong)
    elif mean == "arithmetic":
        top = max(wrong)
        log_wrong = top + math.log(math.fsum(math.exp(value - top) for value in wrong) / len(wrong))
    else:
        raise ConfigError(f"unknown mean {mean!r}; known: geometric, arithmetic")
    gap = log_wrong - right
    return math.exp(gap) if gap < 700 else math.inf


def truth_ratio_forget(ratio: float) -> float:
    """Score on forgotten facts, ``min(R, 1/R)``: 1 where right and wrong answers are told apart no longer."""
    return 0.0 if ratio in (0.0, math.inf) else min(ratio, 1 / ratio)


def truth_ratio_utility(ratio: float) -> float:
    """Score on facts that stay, ``max(0, 1 - R)``: 1 where wrong answers have no probability."""
    return max(0.0, 1 - ratio)


def choice_probability(right: float, options: Sequence[float]) -> float:
    """Share of the right option in the probability of all options, TOFU's probability on real authors and world facts.

    Args:
        right: Mean token log-probability of the right option.
        options: Those of all options, the right one included.

    Raises:
        ConfigError: The right one is not among the options.
    """
    if right not in options:
        raise ConfigError("the options of a choice must hold the right one")
    top = max(options)
    return math.exp(right - top) / math.fsum(math.exp(value - top) for value in options)


UTILITY_SETS = ("retain", "real_authors", "world_facts")
UTILITY_MEASURES = ("probability", "rouge_l_recall", "truth_ratio")


def model_utility(parts: Mapping[str, Mapping[str, float]]) -> float:
    """TOFU's model utility: harmonic mean of three measures on each of three sets; 0 where one of the nine is 0.

    Args:
        parts: Set (``UTILITY_SETS``) to measure (``UTILITY_MEASURES``) to its mean; the truth ratio as ``truth_ratio_utility``.

    Raises:
        ConfigError: One of the nine is missing.
    """
    values = []
    for name in UTILITY_SETS:
        for measure in UTILITY_MEASURES:
            if measure not in parts.get(name, {}):
                raise ConfigError(f"model utility needs {measure} on {name}")
            values.append(parts[name][measure])
    return harmonic(values)


@dataclass(frozen=True)
class Difference:
    """Result of a two-sample test.

    Attributes:
        statistic: Largest distance of the two empirical distribution functions.
        p: Two-sided p-value; may be below what a float holds, and is then 0.
        log10_p: Its decimal logarithm, which stays finite there.
    """

    statistic: float
    p: float
    log10_p: float


def forget_quality(unlearned: Sequence[float], oracle: Sequence[float]) -> Difference:
    """TOFU's forget quality: the p-value that truth ratios of two models come from one distribution.

    The test depends on the order of values alone, so it is the same for a ratio and its inverse.

    Args:
        unlearned: Truth ratios of the unlearned model on forgotten facts.
        oracle: Those of a model that was never trained on them.
    """
    return kolmogorov_smirnov(unlearned, oracle)


def kolmogorov_smirnov(first: Sequence[float], second: Sequence[float]) -> Difference:
    """The two-sided two-sample Kolmogorov-Smirnov test.

    The p-value is exact where the samples have at most a million pairs: of all orders of the pooled values, equally likely, the
    share whose distance is as large. Larger samples take the limit distribution.

    Raises:
        ConfigError: A sample is empty or holds NaN.
    """
    n, m = len(first), len(second)
    if not n or not m:
        raise ConfigError("a two-sample test needs values in both samples")
    if any(math.isnan(value) for value in (*first, *second)):
        raise ConfigError("a two-sample test cannot order NaN")
    a, b = sorted(first), sorted(second)
    distance = i = j = 0
    while i < n and j < m:
        value = min(a[i], b[j])
        while i < n and a[i] == value:
            i += 1
        while j < m and b[j] == value:
            j += 1
        # In units of 1 / (n m), so that equality is exact.
        distance = max(distance, abs(i * m - j * n))
    statistic = distance / (n * m)
    if distance == 0:
        return Difference(0.0, 1.0, 0.0)
    if n * m <= _EXACT_PAIRS:
        outside, total = _paths_outside(n, m, distance)
        log10 = _log10(outside) - _log10(total)
        return Difference(statistic, outside / total, log10)
    p = _kolmogorov(math.sqrt(n * m / (n + m)) * statistic)
    return Difference(statistic, p, math.log10(p) if p > 0 else -math.inf)


def _paths_outside(n: int, m: int, distance: int) -> tuple[int, int]:
    """Lattice paths from (0, 0) to (n, m) that somewhere reach ``|i m - j n| >= distance``, and all paths."""
    total = math.comb(n + m, n)
    # Counts paths that never reach it, row by row; whole numbers, for their difference to the total may be tiny.
    row = [0] * (m + 1)
    row[0] = 1
    for j in range(1, m + 1):
        row[j] = row[j - 1] if j * n < distance else 0
    for i in range(1, n + 1):
        here = i * m
        row[0] = row[0] if here < distance else 0
        for j in range(1, m + 1):
            row[j] = row[j] + row[j - 1] if abs(here - j * n) < distance else 0
    return total - row[m], total


def _log10(value: int) -> float:
    # Whole numbers may be far larger than floats.
    shift = max(0, value.bit_length() - 900)
    return math.log10(value >> shift) + shift * math.log10(2) if value else -math.inf


def _kolmogorov(z: float) -> float:
    """P(K > z) of Kolmogorov's distribution."""
    if z < 0.2:
        return 1.0
    terms = (2 * (-1) ** (k - 1) * math.exp(-2 * (k * z) ** 2) for k in range(1, 101))
    return min(1.0, max(0.0, math.fsum(terms)))


# ---- texts -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rouge:
    """Overlap of two texts by their longest common subsequence of words; all three are 0 where nothing is shared."""

    precision: float
    recall: float
    f1: float


@lru_cache(maxsize=1)
def _stemmer() -> Any:
    from nltk.stem.porter import PorterStemmer

    return PorterStemmer()


def rouge_words(text: str, *, stem: bool = True) -> list[str]:
    """Words as ROUGE counts them: lower case, runs of ASCII letters and digits; those of more than three signs stemmed."""
    found = re.findall(r"[a-z0-9]+", text.lower())
    if not stem:
        return found
    stemmer = _stemmer()
    return [stemmer.stem(word) if len(word) > 3 else word for word in found]


def rouge_l(reference: str, said: str, *, stem: bool = True) -> Rouge:
    """ROUGE-L of one text against one reference (Lin, 2004), as the package ``rouge_score`` counts it.

    Args:
        reference: The right text; recall is over its words.
        said: What the model says; precision is over its words.
        stem: Porter-stems words, as TOFU, MUSE and RWKU do.
    """
    wanted, found = rouge_words(reference, stem=stem), rouge_words(said, stem=stem)
    if not wanted or not found:
        return Rouge(0.0, 0.0, 0.0)
    row = [0] * (len(found) + 1)
    for word in wanted:
        before = 0
        for place, other in enumerate(found, start=1):
            kept = row[place]
            row[place] = before + 1 if word == other else max(row[place], row[place - 1])
            before = kept
    common = row[-1]
    if not common:
        return Rouge(0.0, 0.0, 0.0)
    precision, recall = common / len(found), common / len(wanted)
    return Rouge(precision, recall, 2 * precision * recall / (precision + recall))


def verbatim_memorization(pairs: Sequence[tuple[str, str]]) -> float:
    """MUSE's VerbMem: mean ROUGE-L F1 of greedy continuations.

    Args:
        pairs: True continuation, then what the model said.
    """
    return _mean([rouge_l(true, said).f1 for true, said in pairs], "verbatim memorisation")


def knowledge_memorization(pairs: Sequence[tuple[str, str]], *, measure: str = "f1") -> float:
    """MUSE's KnowMem: mean ROUGE-L of answers to questions.

    Args:
        pairs: Right answer, then what the model said.
        measure: ``f1`` (the paper) or ``recall``.
    """
    if measure not in ("f1", "recall"):
        raise ConfigError(f"unknown measure {measure!r}; known: f1, recall")
    return _mean([getattr(rouge_l(true, said), measure) for true, said in pairs], "knowledge memorisation")


# ---- tokens ------------------------------------------------------------------------------------------------------------


def exact_memorization(correct: Sequence[bool]) -> float:
    """Share of answer tokens that are the most probable ones, the earlier ones being fed.

    Raises:
        ConfigError: No token.
    """
    return _mean([float(right) for right in correct], "exact memorisation")


def extraction_strength(correct: Sequence[bool]) -> float:
    """1 minus the shortest share of an answer that must be given for the model to say the rest greedily.

    0 where even the last token is wrong after all others; some released code gives ``1 / len`` there.

    Args:
        correct: Per answer token, whether it is the most probable one, the earlier ones being fed.

    Raises:
        ConfigError: No token.
    """
    if not correct:
        raise ConfigError("extraction strength of an answer without tokens")
    given = len(correct)
    while given and correct[given - 1]:
        given -= 1
    return 1 - given / len(correct)


def min_k(logprobs: Sequence[float], share: float = 0.4) -> float:
    """MIN-K score of a text: minus the mean of its lowest token log-probabilities; low for texts that were trained on.

    Args:
        logprobs: One per token.
        share: Part of the tokens that counts, rounded down, at least one; MUSE takes 0.4.

    Raises:
        ConfigError: No token, or a share outside (0, 1].
    """
    if not logprobs:
        raise ConfigError("a MIN-K score of a text without tokens")
    if not 0 < share <= 1:
        raise ConfigError(f"share must be in (0, 1], it is {share}")
    lowest = sorted(logprobs)[: max(1, int(len(logprobs) * share))]
    return -math.fsum(lowest) / len(lowest)


def roc_auc(positive: Sequence[float], negative: Sequence[float]) -> float:
    """Chance that a positive's score exceeds a negative's, ties counting half.

    Raises:
        ConfigError: A side is empty.
    """
    if not positive or not negative:
        raise ConfigError("an AUC needs scores on both sides")
    scored = sorted([(score, True) for score in positive] + [(score, False) for score in negative])
    ranks, start = 0.0, 0
    while start < len(scored):
        stop = start
        while stop < len(scored) and scored[stop][0] == scored[start][0]:
            stop += 1
        # Equal scores share the mean of their ranks.
        ranks += sum(side for _, side in scored[start:stop]) * (start + 1 + stop) / 2
        start = stop
    count = len(positive)
    return (ranks - count * (count + 1) / 2) / (count * len(negative))


def privacy_leak(auc: float, oracle: float) -> float:
    """MUSE's PrivLeak: how far a membership test is from what it is on a model that never saw the forgotten texts.

    Args:
        auc: ``roc_auc`` of ``min_k`` scores of forgotten texts against held-out ones, on the unlearned model. A model that
            memorised the forgotten texts gives them the lower scores: about 0.
        oracle: The same on the model trained without them, about 0.5.

    Returns:
        Percent: 0 is ideal, about -100 nothing forgotten, above 0 forgotten conspicuously.

    Raises:
        ConfigError: The oracle's AUC is 0.
    """
    if oracle <= 0:
        raise ConfigError("privacy leak compares with the oracle's AUC, which is 0")
    return (auc - oracle) / oracle * 100


# ---- forms, chains, recovery -------------------------------------------------------------------------------------------


def form_independence(drops: Sequence[float]) -> float | None:
    """``1 - deviation / mean`` of what was lost in each form of a question (population deviation); ``None`` without a loss.

    1 where every form lost the same; ORT's question to a method that saw one form only.
    """
    mean = _mean(drops, "form independence")
    if mean <= 0:
        return None
    return 1 - math.sqrt(math.fsum((drop - mean) ** 2 for drop in drops) / len(drops)) / mean


def faithful_score(
    *, paraphrased: float, kept: float, same_answer: float, chained: float, kept_chained: float
) -> float:
    """FaithUn's overall score as the mean of its goodness-oriented accuracies.

    The paper's own weighting is not public; equal weights are a reconstruction.

    Args:
        paraphrased: Accuracy on forgotten facts, paraphrased; lower is better.
        kept: On facts that stay.
        same_answer: On other facts with a forgotten answer.
        chained: On chains over forgotten facts; lower is better.
        kept_chained: On chains over facts that stay.
    """
    return (1 - paraphrased + kept + same_answer + 1 - chained + kept_chained) / 5


def recovery(unlearned: float, corrupted: float, clean: float) -> float | None:
    """RESTOR's recovery: which part of the accuracy that corruption took came back; ``None`` where it took nothing.

    Args:
        unlearned: Accuracy on the original facts after unlearning.
        corrupted: After corruption.
        clean: Before it.
    """
    return None if clean == corrupted else (unlearned - corrupted) / (clean - corrupted)


def _mean(values: Sequence[float], what: str) -> float:
    if not values:
        raise ConfigError(f"{what} over nothing")
    return math.fsum(values) / len(values)
