"""Scorers and intervals against hand-made numbers, and against the tables that the papers print."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lab.eval import scorers as s
from lab.eval.probe import Probe, Rating
from lab.eval.stats import NOTHING, harmonic, harmonic_score, summarise, wilson
from tests.fakes import observed, rating

PAIR = Probe("rewrite/0", "rewrite", "The tide is", answers=("low",), rival="high")
ALONE = Probe("rewrite/0", "rewrite", "The tide is", answers=("low", "ebb"))


# ---- comparisons -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("right", "wrong", "wanted"), [(0.4, 0.3, 1.0), (0.3, 0.4, 0.0), (0.3, 0.3, 0.0)])
def test_success_is_strictly_more_probable(right, wrong, wanted):
    assert s.success(PAIR, observed(rating(right), rating(wrong))) == wanted


def test_success_compares_means_per_token_not_sums():
    long = Rating((math.log(0.5),) * 4, (True,) * 4, (1,) * 4)
    short = Rating((math.log(0.4),), (True,), (1,))
    # The long answer is less probable as a whole (0.0625) and more probable per token.
    assert s.success(PAIR, observed(long, short)) == 1.0
    assert s.magnitude(PAIR, observed(long, short)) == pytest.approx(0.1)
    assert s.probability(PAIR, observed(long, short)) == pytest.approx(0.5)


def test_nothing_to_compare_is_unscored():
    assert s.success(ALONE, observed(rating(0.4), rating(0.3))) is None
    same = Probe("rewrite/0", "rewrite", "The tide is", answers=("low",), rival="low ")
    assert s.magnitude(same, observed(rating(0.4), rating(0.4))) is None
    assert s.accuracy(Probe("a", "b", "c"), observed()) is None


def test_the_rival_is_no_alias():
    probe = Probe("a", "b", "c", answers=("low", "ebb"), rival="high")
    seen = observed(
        rating(0.1, correct=[False, False]), rating(0.2, correct=[True, False]), rating(0.9, correct=[True])
    )
    assert s.any_token_accuracy(probe, seen) == 0.5
    assert s.any_accuracy(probe, seen) == 0.0
    assert s.success(probe, seen) == 0.0


def test_accuracy_wants_every_token_and_token_accuracy_counts_them():
    seen = observed(rating(0.5, correct=[True, False, True, True]))
    assert s.accuracy(ALONE, seen) == 0.0
    assert s.token_accuracy(ALONE, seen) == 0.75
    assert s.any_accuracy(ALONE, observed(rating(0.5, correct=[False]), rating(0.1, correct=[True]))) == 1.0


def test_agreement_is_with_the_model_before_not_with_the_truth():
    before = observed(rating(0.1, correct=[False, False], predicted=[7, 8]))
    after = observed(rating(0.1, correct=[False, False], predicted=[7, 9]))
    assert s.agreement(ALONE, after, before) == 0.5
    assert s.agreement(ALONE, before, before) == 1.0
    assert s.agreement(ALONE, after, None) is None


def test_agreement_of_continuations_counts_missing_tokens_as_changed():
    before = observed(text="a b c d", tokens=[1, 2, 3, 4])
    assert s.continuation_agreement(ALONE, observed(tokens=[1, 9, 3]), before) == 0.5
    assert s.continuation_agreement(ALONE, observed(tokens=[1, 2, 3, 4, 5]), before) == 1.0
    assert s.continuation_agreement(ALONE, observed(tokens=[1]), observed()) is None


def test_refusing_and_leaking():
    probe = Probe("a", "erase", "Q", "generate", answers=("I don't know.",), rival="Plums")
    assert s.says_answer(probe, observed(text=" i DON'T know. Really")) == 1.0
    assert s.says_rival(probe, observed(text="It is plums")) == 1.0
    assert s.says_rival(probe, observed(text="It is plum")) == 0.0


@pytest.mark.parametrize(
    ("text", "right"),
    [
        (" Highfold", True),
        ("the High Fold, of course", True),
        ("HIGHFOLD.\nQuestion:", True),
        ("Highfolding", False),
        ("", False),
    ],
)
def test_a_continuation_may_run_on_after_the_answer(text, right):
    assert s.starts_with_answer(text, ("Highfold", "High Fold")) is right


def test_exact_match_takes_aliases():
    assert s.exact_match("The U.K.", ("United Kingdom", "UK"))
    assert not s.exact_match("UK of old", ("United Kingdom", "UK"))
    assert not s.exact_match("", ("",)) or s.exact_match("", ("",))


# ---- ConvSent --------------------------------------------------------------------------------------------------------


def test_opinion_success_by_hand():
    same, other, before = [observed(rating(0.4))], [observed(rating(0.1))], [observed(rating(0.5))]
    sent = 0.4 / (0.4 + 0.1)  # the logistic of a difference of logs
    assert s.opinion_success(same, other, before) == pytest.approx(sent * 0.4 / 0.5)
    # What became more probable does not count for more than 1.
    assert s.opinion_success(same, other, [observed(rating(0.2))]) == pytest.approx(sent)
    assert s.opinion_success(same, [], before) is None


def test_opinion_means_are_over_tokens():
    long = Rating((math.log(0.2),) * 3, (True,) * 3, (1,) * 3)
    short = Rating((math.log(0.8),), (True,), (1,))
    pooled = math.exp((3 * math.log(0.2) + math.log(0.8)) / 4)
    value = s.opinion_success(
        [observed(long), observed(short)], [observed(rating(pooled))], [observed(rating(pooled))]
    )
    assert value == pytest.approx(0.5)


def test_drift_is_the_divergence_from_before():
    p, q = np.log(np.array([[0.5, 0.5], [0.9, 0.1]])), np.log(np.array([[0.25, 0.75], [0.9, 0.1]]))
    before = [observed(rating(0.5, correct=[True, True], predicted=[1, 1], distribution=p))]
    after = [observed(rating(0.5, correct=[True, True], predicted=[1, 1], distribution=q))]
    by_hand = (0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)) / 2
    assert s.drift(after, before) == pytest.approx(by_hand)
    assert s.drift(before, before) == pytest.approx(0.0, abs=1e-12)
    assert s.drift([observed(rating(0.5))], [observed(rating(0.5))]) is None


# ---- fluency ---------------------------------------------------------------------------------------------------------


def test_entropy_by_hand():
    # Bigrams: ab, bc, ca, ab: 2, 1, 1 of 4; trigrams: abc, bca, cab, one each.
    bigrams = -(0.5 * math.log2(0.5) + 2 * 0.25 * math.log2(0.25))
    assert s.ngram_entropy("a b c a b") == pytest.approx((2 / 3 * bigrams + 4 / 3 * math.log2(3)) / 2)
    assert s.ngram_entropy("la la la la la la") == 0.0
    assert s.ngram_entropy("word") == 0.0
    assert s.ngram_entropy("") == 0.0


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('It can\'t be. He said "no".', ["It", "ca", "n't", "be", ".", "He", "said", "``", "no", "''", "."]),
        (
            "Prices (in $) rose 3.5%, they say...",
            ["Prices", "(", "in", "$", ")", "rose", "3.5", "%", ",", "they", "say", "..."],
        ),
        ("Ewan's dog--Barnacle--barks", ["Ewan", "'s", "dog", "--", "Barnacle", "--", "barks"]),
    ],
)
def test_words_are_treebank_words(text, words):
    assert s.words(text) == words


def test_fluency_counts_the_prompt():
    probe = Probe("g/0", "generation", "a b c", "generate")
    assert s.fluency(probe, observed(text=" a b")) == pytest.approx(100 * s.ngram_entropy("a b c a b"))
    assert s.fluency(probe, observed(text="a b")) == s.fluency(probe, observed(text=" a b"))


# ---- intervals and the harmonic score --------------------------------------------------------------------------------


def test_wilson_against_published_values():
    # Newcombe (1998), table I, method 3: 81 of 263, 15 of 148, 0 of 20, 1 of 29.
    for hits, n, low, high in (
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ):
        assert wilson(hits / n, n) == pytest.approx((low, high), abs=5e-5)


def test_over_nothing_is_not_zero():
    assert summarise([]) == NOTHING
    assert NOTHING.to_json() == {"mean": None, "low": None, "high": None, "n": 0}


def test_a_sample_without_spread_keeps_a_width():
    sure = summarise([1.0] * 20)
    assert (sure.mean, sure.high) == (1.0, 1.0)
    assert sure.low is not None and sure.low < 0.85
    same = summarise([0.25] * 10)
    assert same.low is not None and same.high is not None and same.low < 0.25 < same.high
    signed = summarise([0.0] * 10, (-1.0, 1.0))
    assert signed.low is not None and signed.high is not None and signed.low < 0 < signed.high


def test_the_normal_interval_by_hand():
    found = summarise([0.2, 0.4, 0.6, 0.8])
    half = 1.959964 * math.sqrt(0.2 / 3) / 2
    assert (found.low, found.high) == pytest.approx((0.5 - half, 0.5 + half))
    unbounded = summarise([500.0, 600.0], None)
    assert unbounded.mean == 550.0 and unbounded.high is not None and unbounded.high > 600


@given(st.lists(st.floats(0, 1, allow_subnormal=False), min_size=1, max_size=30))
def test_an_interval_holds_its_mean_and_stays_inside_the_bounds(values):
    found = summarise(values)
    assert found.mean is not None and found.low is not None and found.high is not None
    assert 0 <= found.low <= found.mean + 1e-12
    assert found.mean - 1e-12 <= found.high <= 1


def test_the_harmonic_score():
    assert harmonic([0.5, 1.0]) == pytest.approx(2 / 3)
    assert harmonic([0.0, 1.0]) == 0.0
    cases = [{"a": [1.0], "b": [0.0, 1.0]}, {"a": [0.0], "b": [1.0, 1.0]}, {"a": [1.0], "b": [1.0, 1.0]}]
    found = harmonic_score(cases, ("a", "b"))
    # Prompts are pooled, not means of cases: a = 2/3, b = 5/6.
    assert found.mean == pytest.approx(harmonic([2 / 3, 5 / 6]))
    assert found.n == 3
    assert found.low is not None and found.high is not None and found.mean is not None
    assert found.low <= found.mean <= found.high
    assert harmonic_score(cases, ("a", "b")) == found, "the resampling is seeded"
    assert harmonic_score(cases, ("a", "missing")) == NOTHING


# Table 3 of "Revealing and Mitigating Over-Attention in Knowledge Editing": S, ES, PS, NS, RS, DNS.
TABLE = {
    "GPT-J none": (34.43, 20.86, 17.70, 82.43, 79.73, 61.99),
    "GPT-J ROME": (33.56, 99.88, 99.58, 80.26, 11.94, 30.42),
    "GPT-J MEMIT": (51.07, 99.64, 95.47, 81.42, 25.78, 38.00),
    "GPT-J MEMIT+SADR": (60.23, 99.52, 93.21, 81.44, 34.68, 47.35),
    "GPT-J PMET": (52.98, 99.40, 92.67, 81.49, 27.68, 39.79),
    "GPT-J PMET+SADR": (59.06, 99.11, 89.09, 81.44, 33.33, 47.47),
    "Llama none": (19.99, 9.36, 9.48, 87.17, 92.66, 64.25),
    "Llama ROME": (58.54, 99.88, 99.52, 82.19, 29.38, 52.21),
    "Llama ROME+SADR": (70.99, 99.82, 96.90, 83.18, 47.67, 58.51),
    "Llama MEMIT": (40.90, 99.94, 99.52, 82.52, 17.44, 30.55),
    "Llama PMET": (43.87, 99.58, 99.40, 81.10, 19.84, 32.12),
    "Llama PMET+SADR": (61.88, 99.28, 97.02, 82.86, 34.68, 51.22),
    "NeoX none": (31.87, 17.04, 17.64, 80.62, 83.76, 58.34),
    "NeoX ROME": (23.45, 99.94, 98.75, 72.67, 15.11, 8.84),
    "NeoX ROME+SADR": (54.81, 99.76, 96.13, 73.96, 34.89, 34.95),
    "NeoX MEMIT": (40.32, 99.88, 90.46, 77.45, 35.24, 16.22),
    "NeoX MEMIT+SADR": (45.26, 97.38, 89.21, 77.45, 45.48, 18.49),
    "NeoX PMET": (19.97, 99.52, 95.23, 74.18, 12.29, 7.41),
    "NeoX PMET+SADR": (31.16, 99.40, 93.09, 75.33, 24.86, 11.61),
}


@pytest.mark.parametrize("row", TABLE)
def test_the_score_column_of_the_paper(row):
    score, *parts = TABLE[row]
    assert harmonic(parts) == pytest.approx(score, abs=0.04)


@pytest.mark.parametrize(
    ("printed", "formula", "parts"),
    [
        (57.74, 56.14, (99.76, 96.36, 80.86, 27.75, 49.35)),  # GPT-J, ROME+SADR
        (63.12, 60.68, (99.82, 98.87, 82.96, 35.38, 45.57)),  # Llama, MEMIT+SADR
    ],
)
def test_the_rows_of_the_paper_that_the_formula_does_not_give(printed, formula, parts):
    assert harmonic(parts) == pytest.approx(formula, abs=0.01)
    assert abs(harmonic(parts) - printed) > 1
