"""The least dose that forgets as much as a reference, on curves whose crossing is known."""

from __future__ import annotations

import math

import pytest

from editors.unlearning.dose import match_dose
from editors.unlearning.forms import worst_form
from lab.errors import ConfigError


def test_the_least_matching_dose_is_found_by_bisection():
    # gap 0.8 - d reaches the tolerance 0.05 at d = 0.75.
    found = match_dose(lambda dose: 0.8 - dose, 0.05, width=0.01)
    assert found.dose == pytest.approx(0.75, abs=0.011)
    assert found.dose >= 0.75 - 1e-12
    assert found.gap <= 0.05
    assert found.tried[0] == (1.0, pytest.approx(-0.2))


def test_a_weak_patch_is_scaled_up():
    found = match_dose(lambda dose: 0.8 - 0.3 * dose, 0.05, width=0.01)
    assert found.dose == pytest.approx(2.5, abs=0.03)
    assert [dose for dose, _ in found.tried[:3]] == [1.0, 2.0, 4.0]


def test_what_never_reaches_the_reference_has_no_dose():
    found = match_dose(lambda dose: 0.9 - 0.1 * dose, 0.05)
    assert found.dose is None
    assert found.gap == pytest.approx(0.5)
    assert [dose for dose, _ in found.tried] == [1.0, 2.0, 4.0]


def test_a_cliff_between_two_doses_is_not_matched():
    # Below 0.5 too much is left, above it far too much is gone; nothing lies within the tolerance.
    found = match_dose(lambda dose: 0.6 if dose < 0.5 else -0.3, 0.05, evaluations=9)
    assert found.dose is None
    assert len(found.tried) <= 9
    assert found.gap == -0.3


def test_a_broken_model_counts_as_too_much():
    found = match_dose(lambda dose: math.nan if dose > 0.6 else 0.5 - dose, 0.05, width=0.01)
    assert found.dose == pytest.approx(0.45, abs=0.01)


def test_the_dose_at_the_edge_of_the_tolerance_costs_least():
    assert match_dose(lambda dose: 0.0, 0.05, width=0.1, evaluations=20).dose < 0.01


@pytest.mark.parametrize("wrong", [{"tolerance": 0.0}, {"most": 0.5}, {"width": 1.0}, {"evaluations": 0}])
def test_settings_that_make_no_sense(wrong):
    with pytest.raises(ConfigError, match="tolerance"):
        match_dose(lambda dose: 0.0, **{"tolerance": 0.05} | wrong)


def test_the_worst_form_is_measured_against_the_reference_in_it():
    # A choice of four is guessed at 0.3 by the reference, so 0.5 there is less than 0.3 in a cloze.
    assert worst_form({"cloze": 0.3, "choice": 0.5}, {"cloze": 0.01, "choice": 0.3}) == (
        "cloze",
        pytest.approx(0.29),
    )
