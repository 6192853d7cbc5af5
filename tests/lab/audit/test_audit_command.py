"""Audits as a whole: kept work, the command, and what they say of a model that knows."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import replace

import pytest

from lab.audit import run as running
from lab.audit.base import AuditSubject, Controls
from lab.audit.material import gather, permuted
from lab.audit.run import attack_list, audit
from lab.errors import ConfigError, DataError, KnowLabError, PatchError, UnknownNameError
from lab.handle import ModelHandle
from lab.records import Fact, write_facts
from tests.commands import call, result
from tests.standin import CAPITALS
from tests.tiny import tiny_handle

FACTS = tuple(
    Fact(place, "capital", city, "The capital of {} is", id=f"capital/{place}")
    for place, city in CAPITALS.items()
)


@pytest.fixture
def subject() -> AuditSubject:
    return AuditSubject(tiny_handle("llama", layers=2), FACTS[:3], Controls(never=FACTS[3:6]))


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    names: list[str] = []
    plain = running.run_attack

    def noting(name, *rest):
        names.append(name)
        return plain(name, *rest)

    monkeypatch.setattr(running, "run_attack", noting)
    return names


def test_an_interrupted_audit_goes_on_and_repeats_nothing(subject, ran, tmp_path, monkeypatch):
    from lab.audit.weights import Prune

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Prune, "run", interrupted)
        with pytest.raises(KeyboardInterrupt):
            audit(subject, ("quantize", "prune"), out=tmp_path)
    first = audit(subject, ("quantize", "prune", "forms"), out=tmp_path)
    assert ran == ["quantize", "prune", "prune", "forms"]
    again = audit(subject, ("quantize", "prune", "forms"), out=tmp_path)
    assert len(ran) == 4
    assert again == first
    assert all(each.cost["forward_passes"] >= 2 and each.cost["seconds"] > 0 for each in again.results)


def test_a_killed_audit_goes_on_and_repeats_no_finished_attack(standin, tmp_path, capsys):
    facts, kept = tmp_path / "facts.jsonl", tmp_path / "kept"
    write_facts(facts, FACTS)
    # The last attack waits for ever, so that the kill finds the first finished and the second in the middle.
    script = (
        "import time; from lab.audit.weights import Prune; from lab.cli.root import run\n"
        "Prune.run = lambda *_: time.sleep(600)\n"
        f"run(['audit', '--facts', {str(facts)!r}, '--attacks', 'quantize,prune', '--out', {str(kept)!r}])\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.DEVNULL)
    finished = kept / "attacks" / "quantize.json"
    deadline = time.monotonic() + 120
    while not finished.is_file() and time.monotonic() < deadline:
        time.sleep(0.1)
    process.kill()
    process.wait()
    before = finished.read_bytes()
    found = result(capsys, tmp_path, "audit", "--facts", facts, "--attacks", "quantize,prune", "--out", kept)
    assert finished.read_bytes() == before
    assert found["attacks"][0] == json.loads(before)["result"]
    assert found["attacks"][1]["applicable"]


def test_processes_find_what_one_process_finds_and_keep_it(standin, tmp_path, capsys):
    facts = tmp_path / "facts.jsonl"
    write_facts(facts, FACTS)
    words = ["audit", "--facts", facts, "--attacks", "quantize,prune,latent"]
    alone = result(capsys, tmp_path, *words)
    kept = tmp_path / "kept"
    together = result(capsys, tmp_path, *words, "--workers", "2", "--out", kept)
    for one, other in zip(alone["attacks"], together["attacks"], strict=True):
        assert one | {"cost": None} == other | {"cost": None}
    assert sorted(file.stem for file in (kept / "attacks").iterdir()) == ["latent", "prune", "quantize"]
    assert result(capsys, tmp_path, *words, "--out", kept)["attacks"] == together["attacks"]


def _unbuildable() -> AuditSubject:
    raise ConfigError("no such model here")


def test_a_failure_in_a_process_is_told(subject):
    with pytest.raises(KnowLabError, match=r"'quantize' failed: ConfigError: no such model"):
        audit(subject, ("quantize",), workers=2, build=_unbuildable)
    with pytest.raises(ConfigError, match="give build"):
        audit(subject, ("quantize",), workers=2)


def test_kept_attacks_of_another_audit_are_not_taken(subject, tmp_path):
    audit(subject, ("quantize",), out=tmp_path)
    for other in (
        replace(subject, seed=1),
        replace(subject, facts=FACTS[:2]),
        replace(subject, budget="full"),
    ):
        with pytest.raises(ConfigError, match="another folder"):
            audit(other, ("quantize",), out=tmp_path)
    (tmp_path / "attacks" / "quantize.json").write_text("{", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"quantize\.json"):
        audit(subject, ("quantize",), out=tmp_path)


def test_an_attack_that_changes_the_model_is_found_out(subject, tmp_path, monkeypatch):
    from lab.audit.weights import Prune

    plain = Prune.run

    def careless(self, subject, progress):
        next(iter(subject.handle.model.parameters())).data.add_(1e-3)
        return plain(self, subject, progress)

    monkeypatch.setattr(Prune, "run", careless)
    with pytest.raises(PatchError, match="'prune' left the model changed"):
        audit(subject, ("prune",), out=tmp_path)
    assert not (tmp_path / "attacks").exists()


def test_a_list_of_attacks_is_read():
    assert attack_list(" forms, prune,forms") == ("forms", "prune")
    assert set(attack_list("all")) >= {"forms", "relearn", "quantize"}
    with pytest.raises(UnknownNameError, match="forms"):
        attack_list("form")
    with pytest.raises(ConfigError, match="no attack"):
        attack_list(",")


def test_facts_of_a_file_get_exchanged_objects_as_controls(tmp_path):
    import random

    file = tmp_path / "facts.jsonl"
    write_facts(file, FACTS)
    material = gather(str(file), limit=5)
    assert len(material.facts) == 5
    assert {fact.text for fact in material.never} == {fact.text for fact in material.facts}
    truth = {fact.text: fact.object for fact in material.facts}
    assert all(truth[fact.text] != fact.object for fact in material.never)
    assert permuted(FACTS[:1], random.Random(0)) == ()
    write_facts(file, [replace(FACTS[0], prompt="")])
    with pytest.raises(DataError, match="no prompt"):
        gather(str(file))


def test_facts_of_the_world_get_people_that_no_text_mentions():
    material = gather("atlas:people01")
    assert not {fact.subject for fact in material.never} & {fact.subject for fact in material.facts}
    assert {fact.relation for fact in material.never} <= {fact.relation for fact in material.facts}
    asked = {(fact.subject, fact.relation) for fact in material.facts}
    assert not asked & {(fact.subject, fact.relation) for fact in material.retained}
    assert all(fact.split == "untrained" for fact in material.never)


def test_the_command_flags_a_model_that_knows_and_stops_a_release(standin, tmp_path, capsys):
    facts, page, text = (tmp_path / name for name in ("facts.jsonl", "audit.html", "audit.md"))
    write_facts(facts, FACTS)
    words = ["audit", "--facts", facts, "--attacks", "forms,quantize", "--out", tmp_path / "kept"]
    found = result(capsys, tmp_path, *words, "--html", page, "--markdown", text)
    assert found["command"] == "audit"
    assert found["worst_case"] > 0.8
    assert {"name", "leak", "lift", "controls", "cost"} <= set(found["attacks"][0])
    assert found["attacks"][0]["lift"]["low"] > 0.5
    assert found["unattacked"]["facts"] > 0.8
    assert page.read_text(encoding="utf-8").count("data:image/png") == 1
    assert "worst case" in text.read_text(encoding="utf-8")

    kept = tmp_path / "result.json"
    code, out, _ = call(capsys, *words, "--fail-above", "worst_case=0.05", "--beside", kept, "--html", page)
    assert code == 3
    assert "limit broken" in out
    assert call(capsys, *words, "--fail-above", "worst_case=1", "--fail-above", "forms=1")[0] == 0
    assert call(capsys, *words, "--fail-above", "prune=0.1")[0] == 2
    assert call(capsys, *words, "--budget", "huge")[0] == 2
    assert call(capsys, "audit", "--facts", facts, "--attacks", "nothing")[0] == 2


def test_an_oracle_that_knows_as_much_takes_the_lift_away(standin, tmp_path, capsys):
    facts = tmp_path / "facts.jsonl"
    write_facts(facts, FACTS)
    found = result(capsys, tmp_path, "audit", "--facts", facts, "--attacks", "quantize", "--oracle", "atlas")
    assert found["attacks"][0]["controls"]["oracle"]["mean"] == pytest.approx(found["attacks"][0]["leak"])
    assert found["worst_case"] == pytest.approx(0.0)
    assert json.loads(json.dumps(found))["settings"]["controls"] == ["oracle", "never"]


def test_the_original_is_flagged_and_strangers_are_not(shipped_atlas):
    material = gather("atlas:people01", limit=6)
    handle = ModelHandle.load("atlas")
    common = {"retained": material.retained, "format": material.format}
    known = audit(
        AuditSubject(handle, material.facts, Controls(never=material.never), **common), ("forms", "quantize")
    )
    assert all(each.lift.low > 0.5 for each in known.results)
    half = len(material.never) // 2
    strangers = AuditSubject(handle, material.never[:half], Controls(never=material.never[half:]), **common)
    unknown = audit(strangers, ("quantize", "in_context"))
    assert unknown.worst_case < 0.05
    assert all(each.lift.low <= 0.0 for each in unknown.results)
