"""The guard: each gate on its own, thresholds, figures, and the seven ways back."""

from __future__ import annotations

import random

import pytest

from lab.atlas.world import load_world
from lab.errors import ConfigError, DataError
from lab.handle import ModelHandle
from lab.records import Fact, Passage
from rag import guard as guard_module
from rag.guard import GATES, Forgotten, Guard, Thresholds, calibrate, similarity, threshold
from rag.guard_trials import (
    KINDS,
    Row,
    false_blocks,
    halves,
    kept,
    latency,
    leak_rates,
    read_all,
    reader_of,
    reintroductions,
    run_trials,
    stopped_share,
)
from tests.commands import result
from tests.tiny import tiny_handle

FRANCE = Forgotten.of(Fact("France", "capital", "Paris", "The capital of {} is"))
STATED = Passage("1", "The capital of France is Paris.")
OTHER = Passage("2", "The capital of Japan is Tokyo.")
HALF = Passage("3", "France has the capital that note two names.")
NOTE = Passage("4", "Note two: Paris.")


def only(*gates, **thresholds) -> Guard:
    return Guard(tiny_handle(), [FRANCE], Thresholds(**thresholds), gates=gates)


def test_each_gate_closes_alone(monkeypatch):
    assert only("ingest").check("?", [STATED, OTHER]).passages == (OTHER,)
    assert not only("ingest").admits(STATED.text) and only().admits(STATED.text)
    asked = only("query").check("Tell me the capital of France", [OTHER])
    assert asked.stopped and asked.gate == "query" and asked.passages == ()
    assert not only("query").check("What is the currency of France?", [OTHER]).stopped
    assert only("query", query=0.8).check("What is the capital of that France?", []).gate == "query"
    draft = only("output").check("Which city?", [Passage("5", "France has one.")], "It is Paris")
    assert draft.stopped and draft.answer == "unknown" and draft.gate == "output"
    assert only("output").check("Which city?", [OTHER], "It is Paris").answer == "It is Paris"
    # A passage gains by itself in the first case, and only together with the other one in the second.
    gains = {(STATED,): 3.0, (HALF,): 0.1, (NOTE,): 0.2, (HALF, NOTE): 2.0}
    monkeypatch.setattr(
        guard_module, "leak_gains", lambda _, facts, some, alone: [gains.get(tuple(some), 0.0) for _ in facts]
    )
    assert only("chunk").check("?", [STATED, HALF]).blocked[0][:2] == ("1", "chunk")
    assert only("chunk").check("?", [HALF, NOTE]).passages == (HALF, NOTE)
    together = only("chunk", "set").check("?", [HALF, NOTE])
    assert together.passages == () and together.gate == "set"
    assert only().check("?", [STATED], "Paris").answer == "Paris"
    with pytest.raises(ConfigError, match="ingest"):
        only("moat")


def test_the_measuring_gates_look_at_facts_whose_subject_is_named(monkeypatch):
    asked = []

    def gains(_, facts, some, alone):
        asked.append((len(facts), len(some)))
        return [9.0] * len(facts)

    monkeypatch.setattr(guard_module, "leak_gains", gains)
    # The answer alone may be somebody else's; a name that one passage gives makes the other one count.
    twin = Passage("6", "Atlantis has the capital Paris.")
    assert only("chunk", "set").check("What is the capital of Atlantis?", [twin, OTHER]).blocked == ()
    alias = Passage("7", "Atlantis is another name of France.")
    found = only("chunk").check("What is the capital of Atlantis?", [alias, twin])
    assert [one[0] for one in found.blocked] == ["7", "6"]
    assert asked == [(0, 1), (0, 1), (0, 2), (1, 1), (1, 1)]
    # A name beside the point counts nothing, one that a chain of passages leads to does.
    beside = Passage("8", "Nothing is said here of France.")
    assert only("chunk", "set").check("What is the capital of Atlantis?", [twin, beside]).blocked == ()
    assert only("output").check("What is the capital of Atlantis?", [twin, beside], "Paris").answer == "Paris"
    chain = [Passage("9", "Atlantis is Lemuria."), Passage("10", "Lemuria is France."), twin]
    assert only("set").check("What is the capital of Atlantis?", chain).gate == "set"
    assert only("output").check("What is the capital of Atlantis?", chain, "Paris").answer == "unknown"


def test_a_stopped_draft_is_tried_again_without_passages():
    seen = []

    def read(passages):
        seen.append(tuple(passages))
        return "Paris" if passages else "unknown"

    found = only("output").answer("Which city does France have?", [HALF], read)
    assert seen == [(HALF,), ()] and found.answer == "unknown" and found.gate == "output"
    assert only("output").answer("?", [OTHER], lambda _: "Tokyo").answer == "Tokyo"


def test_thresholds_by_hand():
    assert threshold([1, 2, 3, 4], 0.0) == 4 and threshold([4, 1, 3, 2], 0.25) == 3
    assert threshold(list(range(100)), 0.01) == 98
    with pytest.raises(DataError):
        threshold([], 0.1)
    assert similarity("the capital of France", "capital of Japan") == pytest.approx(2 / 4)


def row(kind: str, told: bool, stopped: bool = False, milliseconds: float = 1.0) -> Row:
    return Row(kind, (), told, stopped, None, milliseconds)


def test_figures_by_hand():
    off = [row("direct", True), row("direct", True), row("split", False), row("kept", True)]
    on = [
        row("direct", False, True, 3.0),
        row("direct", True),
        row("split", False),
        row("kept", False, True, 3.0),
    ]
    assert leak_rates(off)["direct"].mean == 1 and leak_rates(off)["all"].mean == pytest.approx(2 / 3)
    assert leak_rates(on)["direct"].mean == 0.5 and "kept" not in leak_rates(on)
    assert stopped_share(off, on).mean == 0.5 and stopped_share(off, on).n == 2
    assert false_blocks(on).mean == 1 and false_blocks(off).mean == 0
    # Of the kept fact alone: what is stopped is answered sooner.
    assert (latency(on).mean, latency(on).n) == (3.0, 1)
    with pytest.raises(DataError):
        stopped_share(off, on[::-1])


def test_seven_ways_back_and_halves():
    world = load_world()
    facts = world.forget_split("people05")
    fact = next(one for one in facts if one.relation == "employer")
    trials = {trial.kind: trial for trial in reintroductions(fact, world, random.Random(0))}
    assert tuple(trials) == KINDS and not trials["none"].passages
    told = {kind: [fact.object in passage.text and fact.subject in passage.text for passage in trial.passages]
            for kind, trial in trials.items()}  # fmt: skip
    assert told["direct"] == told["paraphrase"] == told["turns"] == [True]
    assert not any(told["renamed"] + told["axioms"] + told["split"])
    assert fact.subject not in trials["renamed"].question
    first, second = halves(facts, random.Random(0))
    assert not {one.subject for one in first} & {one.subject for one in second} and len(first) + len(
        second
    ) == len(facts)


def test_trials_of_kept_facts_tell_nothing_of_the_forgotten():
    world, rng = load_world(), random.Random(0)
    people = sorted({fact.subject for fact in world.forget_split("people10")})
    facts = [fact for fact in world.retain_split("people10") if fact.group == "person"][:40]
    trials = [kept(fact, world, rng, people) for fact in facts]
    named = [text for trial in trials for text in _texts(trial) if any(name in text for name in people)]
    assert 10 < len(named) < 30 and all(text.startswith("Nothing is said here of") for text in named)
    assert not any(len(kept(fact, world, rng).passages) > 2 for fact in facts)


def _texts(trial) -> list[str]:
    return [passage.text for passage in trial.passages]


def test_calibrated_gates_stop_what_leaks(atlas):
    handle, world, rng = ModelHandle.load("atlas"), load_world(), random.Random(0)
    forgotten, others = (half[:3] for half in halves(world.forget_split("people05"), rng))
    retained = [one for one in world.retain_split("people05") if one.group == "person"]
    harmless = [kept(fact, world, rng) for fact in rng.sample(retained, 6)]
    found = calibrate(handle, others, [(trial.question, trial.passages) for trial in harmless])
    assert found.cases == (6, 12, 6) and set(found.people) == {one.subject for one in others}
    assert 0 < found.query <= 1 and found.chunk >= 0 and found.joint >= 0
    trials = [trial for fact in forgotten for trial in reintroductions(fact, world, rng)]
    facts, reader = [Forgotten.of(fact) for fact in forgotten], reader_of(handle)
    answers = read_all(reader, trials)
    off = run_trials(Guard(handle, facts, found, gates=()), reader, trials, answers)
    assert len(answers) == len({(trial.question, trial.passages) for trial in trials})
    on = run_trials(Guard(handle, facts, found, gates=GATES), reader, trials, answers)
    assert not any(one.stopped for one in off)
    assert leak_rates(on)["all"].mean == 0
    assert all(one.gate == "query" for one in on if one.kind in ("none", "direct", "split"))


def test_the_commands_keep_people_apart(atlas, capsys, tmp_path):
    file = tmp_path / "thresholds.json"
    made = result(capsys, tmp_path, "guard", "calibrate", "--out", file, "--limit", 3)
    assert made["cases"][::2] == [3, 3] and 6 <= made["cases"][1] <= 9
    found = result(
        capsys, tmp_path, "guard", "measure", "--thresholds", file, "--limit", 1, "--gate", "query"
    )
    assert set(found["gates"]) == {"off", "query", "chosen"}
    assert found["gates"]["off"]["leaks"]["all"]["n"] == len(KINDS)
