"""Headline effects: what they measure on models whose answer is known beforehand, and the command."""

from __future__ import annotations

from dataclasses import replace

import pytest

from lab import ModelHandle
from lab.audit import effects as effects_module
from lab.audit.base import AuditSubject, Controls
from lab.audit.effects import EffectPlan, effects
from lab.audit.learning import Lesson
from lab.errors import ConfigError, UnknownNameError
from lab.records import Fact, write_facts
from tests.commands import call, result
from tests.standin import CAPITALS
from tests.tiny import tiny_handle

FACTS = tuple(
    Fact(place, "capital", city, "The capital of {} is", id=place) for place, city in CAPITALS.items()
)
QUICK = EffectPlan(
    length=4,
    steps=1,
    swaps=4,
    learn=4,
    restarts=2,
    texts=6,
    lesson=Lesson(steps=1, rate=1e-3),
    toy_steps=1000,
)


@pytest.fixture
def subject() -> AuditSubject:
    strangers = tuple(
        replace(fact, subject=f"{fact.subject}land", id=f"no/{fact.id}", object=other.object)
        for fact, other in zip(FACTS, FACTS[3:] + FACTS[:3], strict=True)
    )
    handle = tiny_handle("llama", layers=2)
    return AuditSubject(handle, FACTS, Controls(handle, strangers), retained=FACTS, base=handle)


def test_a_model_that_is_its_own_oracle_shows_no_effect_of_forgetting(subject: AuditSubject) -> None:
    digest = subject.handle.weights_digest()
    found = {effect.name: effect for effect in effects(subject, ["suffix", "hidden_knowledge"], QUICK)}
    assert subject.handle.weights_digest() == digest
    suffix = found["suffix"]
    assert suffix.ours == suffix.control
    assert not suffix.same_direction
    assert suffix.details["facts"] == len(FACTS)
    (here,) = effects(subject, ["suffix_with_access"], QUICK)
    assert here.ours == here.control
    assert "on the changed model" in here.measured
    (other,) = effects(replace(subject, base=None), ["suffix"], replace(QUICK, surrogate=subject.handle))
    assert other.details["suffixes"] == here.details["suffixes"]
    assert "surrogate" in other.measured
    hidden = found["hidden_knowledge"]
    assert hidden.control == hidden.ours
    assert set(hidden.details["quadrants"]) == {"retained", "suppressed", "lucky", "forgotten"}
    assert hidden.details["oracle_suppressed"] == hidden.details["quadrants"]["suppressed"]
    assert set(hidden.details["learned_on_retained"]) == {"internal", "gap", "quadrants"}


def test_a_model_that_forgot_nothing_is_refused(standin, subject: AuditSubject) -> None:
    with pytest.raises(ConfigError, match="has forgotten"):
        effects(replace(subject, handle=ModelHandle.load("atlas")), ["suffix"], QUICK)
    with pytest.raises(ConfigError, match="before the change"):
        effects(replace(subject, base=None), ["suffix"], QUICK)
    with pytest.raises(UnknownNameError, match="priming"):
        effects(subject, ["primin"])


def test_factorised_and_merged_part_exactly(subject: AuditSubject) -> None:
    (found,) = effects(subject, ["out_of_context"], QUICK)
    assert found.same_direction
    assert found.ours.mean == 1.0
    assert max(abs(margin) for margin in found.details["margin"]["merged"]) < 0.01
    assert min(found.details["margin"]["factorised"]) > 0.05


def test_priming_is_correlated_with_what_was_improbable(subject: AuditSubject, monkeypatch) -> None:
    from lab.audit.side_effects.priming import Primed

    def learned(handle, texts, ordinary, lesson, seed):
        return [
            Primed(text.id, (-float(place), -0.1), ((-9.0, -9.0 + place),))
            for place, text in enumerate(texts)
        ]

    monkeypatch.setattr(effects_module, "learn_and_measure", learned)
    (found,) = effects(subject, ["priming"], QUICK)
    assert found.ours.mean == pytest.approx(-1.0)
    assert found.ours.high is not None and found.ours.high < 0
    assert found.same_direction
    monkeypatch.undo()
    (real,) = effects(subject, ["priming"], QUICK)
    assert real.ours.n == 6
    with pytest.raises(ConfigError, match="never-trained"):
        effects(replace(subject, controls=Controls()), ["priming"], QUICK)


def test_the_command_puts_ours_beside_what_was_published(standin, tmp_path, capsys) -> None:
    facts = tmp_path / "facts.jsonl"
    write_facts(facts, [replace(fact, subject=f"{fact.subject}land") for fact in FACTS])
    words = ["effects", "--facts", facts, "--effects", "out_of_context"]
    found = result(capsys, tmp_path, *words)["effects"][0]
    assert found["name"] == "out_of_context"
    assert found["same_direction"]
    assert found["published"] and found["paper"]
    assert call(capsys, "effects", "--facts", facts, "--effects", ",")[0] == 2
