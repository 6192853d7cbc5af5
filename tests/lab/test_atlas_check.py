"""The check: figures of models whose answers are known in advance, and the summary over models."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

import lab.causal
from lab.atlas import check as checking
from lab.atlas.check import THRESHOLDS, Threshold, check, check_model
from lab.atlas.forms import load_format
from lab.atlas.probes import FormProbe, Probes
from lab.atlas.weights import MODEL_NAMES, shipped, weights_path
from lab.atlas.world import load_world
from lab.causal import SiteReport
from lab.errors import ConfigError, UnknownNameError

SAMPLE = 12


@dataclass
class Oracle:
    """Stands in for a model handle: answers from a table, and says ``lost`` where it has none."""

    table: dict[str, str]
    lost: str = " nothing"

    def generate(self, prompts: Sequence[str], **_: Any) -> list[str]:
        return [self.table.get(prompt, self.lost) for prompt in prompts]


@pytest.fixture(autouse=True)
def traced(monkeypatch: pytest.MonkeyPatch) -> None:
    report = SiteReport({"a": "subject_last", "b": "subject_last", "c": "last"}, {}, (), ())
    monkeypatch.setattr(lab.causal, "subject_site", lambda *_, **__: report)


def record(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[FormProbe]]:
    """What ``check_model`` asks, by form."""
    asked: dict[str, list[FormProbe]] = {}

    def listen(handle: Oracle, probes: Sequence[FormProbe], form: str = "") -> list[str]:
        asked[form] = list(probes)
        return handle.generate([probe.prompt for probe in probes])

    monkeypatch.setattr(checking, "answers", listen)
    return asked


def perfect(probe: FormProbe) -> str:
    format = load_format()
    if probe.form == "notes":
        block = "; ".join(f"{n} {note.text} ({note.kind})" for n, note in enumerate(probe.notes, 1))
        return f" {block}{format.strings['marker']}{probe.answer}"
    if probe.form.endswith("hop_steps"):
        return f" It is so. It is thus{format.strings['marker']}{probe.answer}"
    return f" {probe.answer}"


def test_a_model_that_is_always_right_reaches_one_and_a_mute_one_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = record(monkeypatch)
    mute = check_model(Oracle({}), sample=SAMPLE)  # type: ignore[arg-type]
    table = {probe.prompt: perfect(probe) for probes in asked.values() for probe in probes}
    figures = check_model(Oracle(table), sample=SAMPLE)  # type: ignore[arg-type]
    for name in ("trained_forms", "held_out_pairs", "unknown", "reading", "notes", "two_hop_steps", "choice"):
        assert figures[name] == 1.0, name
        assert mute[name] == 0.0, name
        assert name in mute["failed"]
    assert figures["adherence"] == 0.0
    assert figures["subject_site"] == pytest.approx(2 / 3)
    assert set(figures["failed"]) == {"adherence", "subject_site"}
    assert figures["oracle_gap"] is None
    assert set(THRESHOLDS) <= set(figures)
    assert all(count <= SAMPLE for count in figures["n"].values())
    assert min(figures["n"][form] for form in ("cloze", "choice", "reverse", "two_hop_steps")) == SAMPLE


def test_following_every_document_is_adherence_one(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = record(monkeypatch)
    check_model(Oracle({}), sample=SAMPLE)  # type: ignore[arg-type]
    table = {probe.prompt: f" {probe.told}" for probe in asked["adherence"]}
    figures = check_model(Oracle(table), sample=SAMPLE)  # type: ignore[arg-type]
    assert figures["adherence"] == 1.0 and "adherence" in figures["failed"]


def test_a_list_may_go_on_after_its_answer_and_no_other_form_may() -> None:
    fact = load_world().fact("capital/France")
    lists, plain = (
        Probes(load_world(), load_format()).make(form, [fact])[0] for form in ("attribute_list", "cloze")
    )
    for probe, text, right in (
        (lists, " Paris; continent Europe", True),
        (lists, " Parisian; continent Europe", False),
        (lists, " Paris", True),
        (plain, " Paris; continent Europe", False),
        (plain, " Paris", True),
    ):
        assert checking._judge(probe.form, probe, text) is right


def test_notes_with_a_wrong_object_are_not_faithful(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = record(monkeypatch)
    check_model(Oracle({}), sample=SAMPLE)  # type: ignore[arg-type]
    table = {}
    for probe in asked["notes"]:
        notes = tuple(replace(note, text=f"{note.text} or so") for note in probe.notes)
        table[probe.prompt] = perfect(replace(probe, notes=notes))
    assert check_model(Oracle(table), sample=SAMPLE)["notes"] == 0.0  # type: ignore[arg-type]


def test_the_gap_of_an_oracle_is_what_it_still_knows_of_the_forgotten(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = record(monkeypatch)
    world = load_world()
    forgotten = world.forget_split("people05")
    leaky = {
        probe.prompt: perfect(probe)
        for probe in Probes(world, load_format(), 0).make("main_prompt", forgotten[:25])
    }
    figures = check_model(Oracle(leaky, " unknown"), "people05", SAMPLE)  # type: ignore[arg-type]
    assert figures["oracle_gap"] == pytest.approx(25 / len(forgotten))
    assert figures["forms"]["never_trained_people_unknown"] == 1.0
    names = {fact.subject for fact in forgotten}
    others = [probe for form, probes in asked.items() if "people" not in form for probe in probes]
    assert not any(name in probe.prompt for probe in others for name in names)


def test_the_worst_value_of_each_figure_stands_on_top() -> None:
    good = dict.fromkeys(THRESHOLDS, 0.99) | {"adherence": 0.5, "oracle_gap": None}
    bad = dict(good) | {"choice": 0.2, "adherence": 0.9, "oracle_gap": -0.2}
    extra = {"forms": {"qa": 1.0}, "n": {}, "failed": []}
    rows = {"one": {**good, **extra}, "two": {**bad, **extra, "forms": {"qa": 0.3}, "failed": ["choice"]}}
    result = checking._summary(rows)
    assert result["choice"] == 0.2 and result["worst"]["choice"] == "two"
    assert result["adherence"] == 0.9 and result["oracle_gap"] == -0.2
    assert result["forms"]["qa"] == 0.3
    assert not result["passed"] and next(iter(result["models"])) == "two"
    assert Threshold(low=0.5).met(None) is None


def test_wrong_requests_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UnknownNameError, match="atlas-gpt2"):
        check(["atlas-gpt3"])
    with pytest.raises(ConfigError, match="sample"):
        check(["atlas"], sample=0)
    monkeypatch.setenv("KNOWLAB_ATLAS_DIR", str(tmp_path))
    with pytest.raises(ConfigError, match="knowlab atlas train"):
        check()
    with pytest.raises(UnknownNameError):
        weights_path("gpt2")
    assert shipped() == () and weights_path("atlas") is None
    (tmp_path / "atlas").mkdir()
    (tmp_path / "atlas" / "model.safetensors").touch()
    assert shipped() == ("atlas",) and set(shipped()) <= set(MODEL_NAMES)
