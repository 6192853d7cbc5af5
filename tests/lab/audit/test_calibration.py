"""False alarms: how facts are divided, what is counted, what is kept."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from lab.audit import calibration
from lab.audit.base import AuditSubject, Controls
from lab.audit.calibration import Trial, calibrate, divide, subjects_of, summaries
from lab.errors import ConfigError
from lab.records import Fact, write_facts
from tests.commands import call, result
from tests.standin import CAPITALS
from tests.tiny import tiny_handle

CITIES = tuple(CAPITALS.values())
FACTS = tuple(
    Fact(place, relation, city, f"The {relation} of {{}} is", id=f"{relation}/{place}")
    for number, place in enumerate(CAPITALS)
    for relation, city in (("capital", CITIES[number]), ("heart", CITIES[number - 1]))
)


def test_halves_are_alike_and_share_no_subject() -> None:
    first, second = divide(FACTS, 6, random.Random(0))
    assert len(first) == len(second) == 6
    assert not {fact.subject for fact in first} & {fact.subject for fact in second}
    assert divide(FACTS, 6, random.Random(0)) == (first, second)
    assert divide(FACTS, 6, random.Random(1)) != (first, second)
    assert len(divide(FACTS, 500, random.Random(0))[0]) == len(FACTS) // 2
    assert len(divide(FACTS, 5, random.Random(0))[0]) == 6  # no subject is cut
    with pytest.raises(ConfigError, match="two subjects"):
        divide(FACTS[:2], 2, random.Random(0))


def test_the_other_half_is_the_control_unless_there_is_one() -> None:
    subject = AuditSubject(tiny_handle("llama", layers=2), ())
    made = subjects_of(subject, FACTS, 4)(3)
    assert (len(made.facts), len(made.controls.never)) == (4, 4)
    assert made.seed == 3
    strangers = tuple(replace(fact, subject=f"no {fact.subject}") for fact in FACTS)
    other = subjects_of(replace(subject, controls=Controls(never=strangers)), FACTS, 4)(3)
    assert other.facts == made.facts
    assert set(other.controls.never) <= set(strangers)


def test_a_false_alarm_is_counted_and_what_did_not_apply_is_not() -> None:
    rows = [Trial("a", n, True, low, low + 0.1, low + 0.2, 1.0) for n, low in enumerate((-0.1, 0.0, 0.01))]
    rows += [Trial("a", 3, False, 0.0, 0.0, 0.0, 1.0), Trial("b", 0, True, -0.5, 0.0, 0.5, 2.0)]
    first, second = summaries(rows)
    assert (first.attack, first.under.n, first.skipped) == ("a", 3, 1)
    assert first.under.mean == pytest.approx(2 / 3)
    assert not first.met
    assert second.met
    assert second.to_json()["lift"]["mean"] == 0.0


def test_an_interrupted_calibration_goes_on_and_another_one_is_refused(tmp_path, monkeypatch) -> None:
    ran: list[tuple[str, int]] = []
    plain = calibration.run_attack

    def noting(name, subject, told):
        if len(ran) == 3:
            raise KeyboardInterrupt
        ran.append((name, subject.seed))
        return plain(name, subject, told)

    make = subjects_of(AuditSubject(tiny_handle("llama", layers=2), ()), FACTS, 4)
    monkeypatch.setattr(calibration, "run_attack", noting)
    with pytest.raises(KeyboardInterrupt):
        calibrate(make, ("quantize", "prune"), 2, out=tmp_path, key={"size": 4})
    monkeypatch.setattr(calibration, "run_attack", lambda *words: (ran.append(words[0]), plain(*words))[1])
    found = calibrate(make, ("quantize", "prune"), 2, out=tmp_path, key={"size": 4})
    assert ran == [("quantize", 0), ("prune", 0), ("quantize", 1), "prune"]
    assert [(trial.attack, trial.number) for trial in found] == [
        ("quantize", 0),
        ("quantize", 1),
        ("prune", 0),
        ("prune", 1),
    ]
    with pytest.raises(ConfigError, match="another folder"):
        calibrate(make, ("quantize",), 2, out=tmp_path, key={"size": 5})
    (tmp_path / "prune.json").write_text("[]", encoding="utf-8")
    with pytest.raises(ConfigError, match="no trials"):
        calibrate(make, ("prune",), 2, out=tmp_path, key={"size": 4})


def test_the_command_finds_no_leak_between_halves_of_what_is_not_known(standin, tmp_path, capsys) -> None:
    facts = tmp_path / "facts.jsonl"
    write_facts(facts, [replace(fact, subject=f"{fact.subject}land") for fact in FACTS])
    words = ["audit-calibration", "--facts", facts, "--attacks", "quantize,adapter_removal", "--size", "8"]
    found = result(capsys, tmp_path, *words, "--trials", "4", "--out", tmp_path / "kept")
    quantize, removal = found["attacks"]
    assert quantize["under"]["n"] == 4
    assert removal["under"]["n"] == 0
    assert removal["skipped"] == 4
    code, out, _ = call(capsys, *words, "--trials", "4", "--out", tmp_path / "kept")
    assert code == 0
    assert "quantize" in out
    assert "adapter_removal" in out
    assert call(capsys, *words, "--trials", "4", "--budget", "huge")[0] == 2


@pytest.mark.parametrize("name", ["forms", "in_context", "step_by_step", "two_hop", "sampling", "quantize"])
def test_scores_taken_once_are_those_of_every_division(name) -> None:
    oracle = tiny_handle("llama", layers=2, seed=1)
    retained = tuple(
        Fact(city, "tongue", f"{city}ish", "The tongue of {} is", id=city) for city in CAPITALS.values()
    )
    subject = AuditSubject(tiny_handle("llama", layers=2), FACTS, Controls(oracle), retained=retained)
    make = subjects_of(subject, FACTS, 6)
    # The first division has the seed of the whole; later ones draw prompts and samples of their own.
    (first,) = calibrate(make, (name,), 1)
    second, _ = calibrate(make, (name,), 2, whole=subject)
    assert second.mean == pytest.approx(first.mean, abs=1e-5)
    assert (second.low, second.high) == pytest.approx((first.low, first.high), abs=1e-5)
    # A random model never samples a city.
    assert first.mean or name == "sampling"


@pytest.mark.slow
def test_cheap_attacks_cry_wolf_in_at_most_one_of_twenty_divisions_of_strangers(
    shipped_atlas, tmp_path, capsys
) -> None:
    words = ["audit-calibration", "--attacks", "forms,in_context,quantize,prune", "--trials", "200"]
    found = result(capsys, tmp_path, *words)
    assert found["missed"] == []
    assert all(row["under"]["n"] == 200 for row in found["attacks"])
