"""Measures of unlearning against values worked out by hand, by enumeration, or printed in the papers."""

from __future__ import annotations

import itertools
import math

import pytest

from lab.errors import ConfigError
from lab.eval import unlearning_metrics as m

HALF, TENTH = math.log(0.5), math.log(0.1)


def test_truth_ratio():
    assert m.truth_ratio(HALF, [TENTH, TENTH]) == pytest.approx(0.2)
    wrong = [math.log(0.4), TENTH]
    assert m.truth_ratio(HALF, wrong) == pytest.approx(0.2 / 0.5)  # sqrt(0.4 * 0.1) = 0.2
    assert m.truth_ratio(HALF, wrong, mean="arithmetic") == pytest.approx(0.25 / 0.5)
    assert m.truth_ratio(-2000.0, [-1.0]) == math.inf
    with pytest.raises(ConfigError, match="wrong answer"):
        m.truth_ratio(HALF, [])
    with pytest.raises(ConfigError, match="harmonic"):
        m.truth_ratio(HALF, wrong, mean="harmonic")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("ratio", "forget", "utility"),
    [(0.25, 0.25, 0.75), (4.0, 0.25, 0.0), (1.0, 1.0, 0.0), (math.inf, 0.0, 0.0), (0.0, 0.0, 1.0)],
)
def test_truth_ratio_scores(ratio, forget, utility):
    assert m.truth_ratio_forget(ratio) == forget
    assert m.truth_ratio_utility(ratio) == utility


def test_choice_probability():
    assert m.choice_probability(HALF, [HALF, TENTH, TENTH, TENTH]) == pytest.approx(0.5 / 0.8)
    with pytest.raises(ConfigError, match="right one"):
        m.choice_probability(HALF, [TENTH])


def test_model_utility_is_the_harmonic_mean_of_nine():
    parts = {name: dict.fromkeys(m.UTILITY_MEASURES, 0.5) for name in m.UTILITY_SETS}
    assert m.model_utility(parts) == pytest.approx(0.5)
    parts["retain"]["probability"] = 0.25
    assert m.model_utility(parts) == pytest.approx(9 / (8 / 0.5 + 1 / 0.25))
    parts["world_facts"]["truth_ratio"] = 0.0
    assert m.model_utility(parts) == 0.0
    del parts["real_authors"]["rouge_l_recall"]
    with pytest.raises(ConfigError, match="rouge_l_recall on real_authors"):
        m.model_utility(parts)


def brute_force(first, second):
    """The share of all splits of the pooled values (no ties) whose distance is as large."""

    def distance(a, b):
        points = {*a, *b}
        return max(abs(sum(x <= p for x in a) * len(b) - sum(x <= p for x in b) * len(a)) for p in points)

    pooled = sorted((*first, *second))
    seen = distance(first, second)
    splits = list(itertools.combinations(range(len(pooled)), len(first)))
    hits = 0
    for chosen in splits:
        a = [pooled[i] for i in chosen]
        b = [pooled[i] for i in range(len(pooled)) if i not in chosen]
        hits += distance(a, b) >= seen
    return seen / (len(first) * len(second)), hits / len(splits)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ([1, 2, 3], [4, 5, 6]),
        ([1, 4, 5, 8], [2, 3, 6]),
        ([1, 2, 3, 4, 9], [5, 6, 7, 8]),
        ([1, 3, 5], [2, 4, 6]),
    ],
)
def test_kolmogorov_smirnov_is_exact(first, second):
    statistic, p = brute_force(first, second)
    found = m.kolmogorov_smirnov(first, second)
    assert found.statistic == pytest.approx(statistic)
    assert found.p == pytest.approx(p)
    assert found.log10_p == pytest.approx(math.log10(p))
    mirrored = m.kolmogorov_smirnov(second, first)
    assert (mirrored.statistic, mirrored.p) == pytest.approx((statistic, p))


def test_kolmogorov_smirnov_of_equal_disjoint_tied_and_large_samples():
    assert m.forget_quality([1, 2, 3], [1, 2, 3]) == m.Difference(0.0, 1.0, 0.0)
    # Two of the C(400, 200) orders keep the samples apart.
    apart = m.forget_quality(range(200), range(1000, 1200))
    assert apart.statistic == 1.0
    assert apart.log10_p == pytest.approx(math.log10(2) - math.log10(math.comb(400, 200)))
    # Ties step both functions at once.
    assert m.kolmogorov_smirnov([0, 0, 1], [0, 1, 1]).statistic == pytest.approx(1 / 3)
    # 1200 x 1200 pairs take the limit distribution: D = 0.05, z = sqrt(600) * 0.05.
    large = m.kolmogorov_smirnov(range(1200), [value + 59.5 for value in range(1200)])
    assert large.statistic == pytest.approx(0.05)
    assert large.p == pytest.approx(
        2 * sum((-1) ** (k - 1) * math.exp(-3 * k * k) for k in (1, 2, 3)), rel=1e-6
    )
    with pytest.raises(ConfigError, match="both samples"):
        m.kolmogorov_smirnov([], [1.0])
    with pytest.raises(ConfigError, match="NaN"):
        m.kolmogorov_smirnov([math.nan], [1.0])


def test_forget_quality_does_not_care_which_way_the_ratio_stands():
    first, second = [0.5, 2.0, 3.0, 0.1], [0.7, 4.0, 5.0]
    assert (
        m.forget_quality(first, second).p
        == m.forget_quality([1 / x for x in first], [1 / x for x in second]).p
    )


def test_rouge_l():
    # "police kill the gunman" is Lin's example: LCS with "police killed the gunman" is 3 of 4 without stemming.
    found = m.rouge_l("police killed the gunman", "police kill the gunman", stem=False)
    assert (found.precision, found.recall, found.f1) == pytest.approx((0.75, 0.75, 0.75))
    assert m.rouge_l("police killed the gunman", "police kill the gunman").f1 == 1.0
    assert m.rouge_l("a b c d", "b x d", stem=False) == m.Rouge(2 / 3, 0.5, pytest.approx(4 / 7))
    assert m.rouge_l("Paris", "London") == m.Rouge(0.0, 0.0, 0.0)
    assert m.rouge_l("Paris.", "paris") == m.Rouge(1.0, 1.0, 1.0)
    assert m.rouge_l("", "paris").f1 == 0.0
    # Words of up to three signs are left as they are.
    assert m.rouge_words("Was running, the 3rd!") == ["was", "run", "the", "3rd"]


def test_memorisation_scores():
    assert m.verbatim_memorization([("a b", "a b"), ("a b", "c d")]) == 0.5
    assert m.knowledge_memorization([("Paris", "It is Paris")]) == pytest.approx(0.5)
    assert m.knowledge_memorization([("Paris", "It is Paris")], measure="recall") == 1.0
    with pytest.raises(ConfigError, match="over nothing"):
        m.verbatim_memorization([])
    with pytest.raises(ConfigError, match="precision"):
        m.knowledge_memorization([("a", "b")], measure="precision")


@pytest.mark.parametrize(
    ("correct", "strength", "exact"),
    [
        ([True] * 4, 1.0, 1.0),
        ([False, True, True, True], 0.75, 0.75),
        ([True, True, False, True], 0.25, 0.75),
        # Nothing can be extracted, though three of four tokens are right.
        ([True, True, True, False], 0.0, 0.75),
        ([False] * 4, 0.0, 0.0),
    ],
)
def test_extraction_strength_and_exact_memorisation(correct, strength, exact):
    assert m.extraction_strength(correct) == strength
    assert m.exact_memorization(correct) == exact


def test_min_k():
    assert m.min_k([-1.0, -5.0, -3.0, -2.0, -4.0]) == pytest.approx(4.5)  # int(5 * 0.4) = 2 lowest
    assert m.min_k([-1.0, -2.0], 0.4) == 2.0  # at least one token
    for wrong in (0.0, 1.5):
        with pytest.raises(ConfigError, match="share"):
            m.min_k([-1.0], wrong)


def test_auc_and_privacy_leak():
    assert m.roc_auc([3, 4], [1, 2]) == 1.0
    assert m.roc_auc([1, 2], [3, 4]) == 0.0
    assert m.roc_auc([1, 3], [2, 2]) == 0.5
    assert m.roc_auc([1, 1], [1, 1]) == 0.5
    assert m.roc_auc([2, 5, 3], [1, 4]) == pytest.approx(4 / 6)
    # A memorised set has the lower scores.
    memorised = m.roc_auc([m.min_k([-0.1])], [m.min_k([-3.0])])
    assert m.privacy_leak(memorised, 0.5) == -100.0
    assert m.privacy_leak(0.5, 0.5) == 0.0
    assert m.privacy_leak(1.0, 0.5) == 100.0
    with pytest.raises(ConfigError, match="oracle"):
        m.privacy_leak(0.5, 0.0)


def test_forms_chains_and_recovery():
    assert m.form_independence([0.4, 0.4, 0.4]) == pytest.approx(1.0)
    assert m.form_independence([0.2, 0.6]) == pytest.approx(0.5)
    assert m.form_independence([0.0, 0.0]) is None
    perfect = {"paraphrased": 0.0, "kept": 1.0, "same_answer": 1.0, "chained": 0.0, "kept_chained": 1.0}
    assert m.faithful_score(**perfect) == pytest.approx(1.0)
    assert m.faithful_score(**perfect | {"chained": 0.5}) == pytest.approx(0.9)
    assert m.recovery(0.6, 0.2, 1.0) == pytest.approx(0.5)
    assert m.recovery(0.2, 0.2, 1.0) == 0.0
    assert m.recovery(0.5, 0.5, 0.5) is None
