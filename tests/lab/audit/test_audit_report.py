"""The lift over the controls, variants, and what may be broken by a limit."""

from __future__ import annotations

import json

import numpy as np
import pytest

from lab.audit.base import AttackResult, AuditSubject, Family, Interval, Scores, lift_over_controls
from lab.audit.forms import Forms
from lab.audit.lift import _widening
from lab.audit.page import page
from lab.audit.report import AuditReport, broken_limits, markdown, parse_limits, read_report
from lab.audit.sampling import leak_at
from lab.audit.variants import halves, worst_variant
from lab.errors import ConfigError, DataError
from lab.records import Fact
from tests.tiny import tiny_handle


def test_the_lift_is_the_mean_minus_the_larger_control():
    lift = lift_over_controls([0.8, 0.6], [0.1, 0.3], [0.5, 0.3])
    assert lift.mean == pytest.approx(0.7 - 0.4)
    assert lift.low <= lift.mean <= lift.high
    assert lift_over_controls([0.8, 0.6], [0.5, 0.7], [0.1]).mean == pytest.approx(0.1)
    assert lift_over_controls([0.8, 0.6]).mean == pytest.approx(0.7)


def test_the_interval_of_a_lift_is_the_bootstrap_of_pairs():
    # The oracle's scores follow the facts', so pairing leaves no spread at all in the difference.
    rng = np.random.default_rng(1)
    base = rng.uniform(0, 0.5, 40)
    paired = lift_over_controls((base + 0.2).tolist(), base.tolist())
    assert paired.low == pytest.approx(0.2)
    assert paired.high == pytest.approx(0.2)
    apart = lift_over_controls((base + 0.2).tolist(), (), base.tolist())
    # 1.96 * sqrt(2 * (0.5^2 / 12) / 40) is the normal half width of two independent means.
    assert (apart.high - apart.low) / 2 == pytest.approx(0.063, abs=0.02)


def test_scores_without_spread_keep_a_width():
    lift = lift_over_controls([1.0] * 5, (), [0.0] * 5)
    assert lift.mean == 1.0
    assert lift.high == 1.0
    # Newcombe's interval over Wilson's of 5/5 and 0/5: 1 - sqrt(2) * 0.4345.
    assert lift.low == pytest.approx(1 - 2**0.5 * 0.4345, abs=1e-3)
    nothing = lift_over_controls([0.0] * 5, (), [0.0] * 5)
    assert nothing.mean == 0.0
    assert nothing.high == pytest.approx(0.4345, abs=1e-3)


def test_the_lift_of_facts_that_are_like_the_controls_covers_zero():
    covered = 0
    for seed in range(100):
        rng = np.random.default_rng(seed)
        facts, oracle, never = (rng.beta(0.5, 4, 30).tolist() for _ in range(3))
        covered += lift_over_controls(facts, oracle, never, seed, resamples=300).low <= 0.0
    assert covered >= 95


def test_the_worst_of_many_clean_variants_is_seldom_sure():
    alone = together = 0
    for seed in range(40):
        rng = np.random.default_rng(seed)
        arms = [(rng.beta(0.5, 4, 40).tolist(), rng.beta(0.5, 4, 40).tolist()) for _ in range(20)]

        def any_sure(comparisons: int, arms=arms, seed=seed) -> bool:
            lifts = [lift_over_controls(f, (), n, seed, 1000, comparisons) for f, n in arms]
            return any(lift.low > 0 for lift in lifts)

        alone += any_sure(1)
        together += any_sure(20)
    assert together <= 4
    assert alone >= 8


def test_facts_of_one_subject_are_drawn_together():
    # Five facts of a subject that are all alike say no more than one: without their names the interval is far too narrow.
    misled = held = 0
    for seed in range(60):
        rng = np.random.default_rng(seed)
        facts, never = (np.repeat(rng.beta(0.5, 2, 20), 5).tolist() for _ in range(2))
        names = [str(place // 5) for place in range(100)]
        misled += lift_over_controls(facts, (), never, seed, 500).low > 0
        held += lift_over_controls(facts, (), never, seed, 500, about=names, about_never=names).low > 0
    assert held <= 4
    assert misled >= 8
    with pytest.raises(ConfigError, match="pair up"):
        lift_over_controls([0.5, 0.5], about=["one"])


def test_few_subjects_get_wider_intervals():
    # Student's 97.5 % quantile for 8 degrees of freedom is 2.306, and ten values resampled lack a tenth of their variance.
    assert _widening([5, 5], 0.025) == pytest.approx(2.306 / 1.960 * (10 / 8) ** 0.5, rel=2e-3)
    assert _widening([500, 500], 0.025) == pytest.approx(1.0, abs=5e-3)
    held = 0
    for seed in range(100):
        rng = np.random.default_rng(seed)
        facts, never = (rng.beta(0.5, 2, 5).tolist() for _ in range(2))
        held += lift_over_controls(facts, (), never, seed, 500).low <= 0
    assert held >= 95


def test_a_variant_without_a_control_is_not_the_worst_beside_others_that_have_one():
    subject = AuditSubject(tiny_handle("llama", layers=2), (Fact("a", "r", "b", "{} is", id="a"),))
    variants = {"alone": Scores((0.9,)), "compared": Scores((0.4, 0.5), never=(0.4, 0.5))}
    found = worst_variant(Forms(), subject, variants, tried="")
    assert found.details["worst"] == "compared"
    assert found.lift.mean == pytest.approx(0.0)
    assert set(found.details["variants"]) == {"alone", "compared"}
    assert worst_variant(Forms(), subject, {"alone": Scores((0.9,))}, tried="").details["worst"] == "alone"


def test_the_same_seed_gives_the_same_interval():
    facts, never = [0.1, 0.9, 0.4, 0.3, 0.35, 0.2, 0.7], [0.2, 0.1, 0.05, 0.4, 0.3]
    assert lift_over_controls(facts, (), never, 3) == lift_over_controls(facts, (), never, 3)
    assert lift_over_controls(facts, (), never, 3) != lift_over_controls(facts, (), never, 4)


@pytest.mark.parametrize(
    ("facts", "oracle", "message"),
    [([], [], "over nothing"), ([0.5], [0.5, 0.5], "same facts"), ([1.5], [], r"\[0, 1\]")],
)
def test_impossible_scores_are_refused(facts, oracle, message):
    with pytest.raises(ConfigError, match=message):
        lift_over_controls(facts, oracle)


def test_halves_test_every_fact_once_and_never_on_itself():
    pairs = halves(7, 0)
    assert sorted(i for _, test in pairs for i in test) == list(range(7))
    assert all(not set(train) & set(test) for train, test in pairs)
    with pytest.raises(ConfigError, match="divided"):
        halves(1, 0)


def test_leak_at_k_is_the_chance_of_a_leak_among_k_draws_without_replacement():
    assert leak_at(0, 10, 5) == 0.0
    assert leak_at(1, 10, 1) == pytest.approx(0.1)
    assert leak_at(2, 4, 2) == pytest.approx(1 - 1 / 6)
    assert leak_at(6, 10, 5) == 1.0
    with pytest.raises(ConfigError, match="leak@11"):
        leak_at(1, 10, 11)


def _result(
    name: str, mean: float, high: float, *, applicable: bool = True, family: Family = "prompt"
) -> AttackResult:
    return AttackResult(
        name,
        leak=mean,
        per_fact=(mean,),
        lift=Interval(mean, mean - 0.05, high),
        controls={"never": Interval(0.0, 0.0, 0.1)},
        cost={"seconds": 1.0, "forward_passes": 2.0},
        applicable=applicable,
        family=family,
        curves={"line": ((1.0, 0.5), (2.0, 0.25))},
    )


@pytest.fixture
def report() -> AuditReport:
    return AuditReport(
        "a <b>",
        (
            _result("forms", 0.2, 0.3),
            _result("quantize", 0.1, 0.4, family="weights"),
            _result("adapter_removal", 0.9, 0.9, applicable=False, family="weights"),
            _result("refusals", 0.8, 0.9, family="side effects"),
        ),
        {"seed": 0, "controls": ["never"]},
        {"facts": 0.5},
    )


def test_the_worst_case_is_the_largest_lift_of_an_attack_that_applied_and_leaks(report):
    assert report.worst_case == 0.2
    assert report.worst is not None
    assert report.worst.name == "forms"
    assert report.worst_case_high == 0.4
    assert report.families["weights"].mean == 0.1
    assert report.families["side effects"].mean == 0.8
    assert set(report.families) == {"prompt", "weights", "side effects"}
    assert AuditReport("clean", (_result("forms", -0.2, -0.1),)).worst_case == 0.0
    assert AuditReport("empty", ()).worst_case == 0.0


def test_limits_look_at_upper_ends(report):
    names = [result.name for result in report.results]
    limits = parse_limits(["worst_case=0.35", "forms=0.35", "quantize=0.35", "adapter_removal=0.1"], names)
    broken = broken_limits(report, limits)
    assert [sentence.split(":")[0] for sentence in broken] == ["worst_case", "quantize"]
    assert broken_limits(report, {"worst_case": 0.4}) == []


@pytest.mark.parametrize("word", ["worst_case", "nothing=0.1", "forms=high", "forms=2", "forms=-1"])
def test_limits_that_make_no_sense_are_refused(word):
    with pytest.raises(ConfigError, match="--fail-above"):
        parse_limits([word], ["forms"])


def test_reports_survive_json(report, tmp_path):
    file = tmp_path / "audit.json"
    file.write_text(json.dumps(report.to_json()), encoding="utf-8")
    assert read_report(file) == report
    file.write_text("{}", encoding="utf-8")
    with pytest.raises(DataError, match="no report"):
        read_report(file)


def test_pages_escape_names_and_show_everything_side_by_side(report):
    other = AuditReport("b", (_result("forms", 0.0, 0.1),), {"controls": []})
    shown = page([report, other])
    assert "<b>" not in shown.replace('<p class="note"><b>', "")
    assert "a &lt;b&gt;" in shown
    assert "http" not in shown
    assert shown.count("data:image/png;base64") == 5
    text = markdown([report, other])
    assert "| forms | prompt | black-box | 0.200 [0.150, 0.300] | 0.000 [-0.050, 0.100] |" in text
    assert "not applicable" in text
    assert "What this audit cannot show" in text


def test_scores_default_to_no_controls():
    assert Scores((0.1,)).oracle == ()
