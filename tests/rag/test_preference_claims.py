"""What the comparison claims: error that is gone, cells of the hierarchy, edits against documents; how hard it asks; its presets."""

from __future__ import annotations

import random
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest

from lab.atlas.world import load_world
from lab.errors import ConfigError, UnknownNameError
from lab.records import EditRequest
from rag.preference import suites
from rag.preference.bench import PreferenceBench
from rag.preference.edited import edit_metrics, edit_rows, edited_facts
from rag.preference.memory import fitting_contexts
from rag.preference.passages import contexts
from rag.preference.prepare import DIFFICULTIES, question_items
from rag.preference.presets import CONTROLS, train_config
from rag.preference.stage import finish, records
from rag.preference.synthesis import RECIPES, hierarchy_pairs
from tests.rag.test_preference_suites import row
from tests.tiny import tiny_handle


def answered(right: int, wrong: int, robust: int, failed: int) -> list[dict[str, Any]]:
    rows = [row("conflict", item=str(number), ctx=number < right) for number in range(right + wrong)]
    return rows + [
        row("irrelevant", item=str(number), par=number < robust) for number in range(robust + failed)
    ]


def test_the_error_that_is_gone_by_hand():
    first, second = answered(5, 5, 5, 5), answered(9, 1, 8, 2)
    found = suites.error_reduction(first, second)
    assert found.mean == pytest.approx(1 - 0.3 / 1.0)
    assert found.n == 20 and found.low is not None and found.high is not None
    assert 0 < found.low < 0.7 < found.high <= 1
    back = suites.error_reduction(second, first)
    assert back.mean == pytest.approx(1 - 1.0 / 0.3)
    # A method that makes no mistake, and one that was asked nothing of a kind, leave nothing to compare with.
    assert suites.error_reduction(answered(9, 0, 9, 0), first).mean is None
    assert suites.error_reduction(first[:10], second).mean is None
    # Contexts are matched, not counted.
    assert suites.error_reduction(first, list(reversed(second))).mean == pytest.approx(0.7)


def test_cells_of_the_hierarchy_by_hand():
    rows = [{"cell": "I,P", "right": True}, {"cell": "I,P", "right": False}, {"cell": "P", "right": True}]
    assert {name: value.mean for name, value in suites.hierarchy_cells(rows).items()} == {
        "I,P": 0.5,
        "P": 1.0,
    }


class Believer:
    """Says what the first document about the subject says, else what it knows."""

    def __init__(self, known: dict[str, str]) -> None:
        self.known = known

    def read_many(self, items: Any) -> list[Any]:
        readings = []
        for question, passages in items:
            subject = next(name for name in self.known if name in question)
            told = next((text.text for text in passages if subject in text.text), None)
            readings.append(SimpleNamespace(answer=told or self.known[subject], known=True))
        return readings


def test_edits_meet_documents():
    world = load_world()
    fact = next(each for each in world.facts if each.prompt and each.relation == "capital")
    other = next(each for each in world.facts if each.prompt and each.relation == "occupation")
    new = {each.id: world.counterfactual(each, random.Random(3)) for each in (fact, other)}
    requests = [vars(EditRequest.from_fact(each, new[each.id])) for each in (fact, other)]
    strange = {"prompt": "{} is", "subject": "Nobody", "target_new": "x"}
    patch = SimpleNamespace(provenance=SimpleNamespace(requests=[*requests, strange]))
    handle: Any = SimpleNamespace(applied=[SimpleNamespace(patch=patch)])
    assert edited_facts(handle, world) == [(fact, new[fact.id]), (other, new[other.id])]
    reader: Any = Believer({each.subject: new[each.id] for each in (fact, other)})
    rows = edit_rows(handle, reader)
    assert len(rows) == 6
    figures = {name: value.mean for name, value in edit_metrics(rows).items()}
    # It believes every document about the subject: those that agree with the edit, and those with the old value.
    assert figures == {
        "edit_adherence": 1.0,
        "edit_robustness": 0.0,
        "edit_old_followed": 1.0,
        "edit_memory": 1.0,
    }
    with pytest.raises(ConfigError, match="no edit"):
        edit_rows(SimpleNamespace(applied=[]), reader)  # type: ignore[arg-type]


def test_parts_for_tuning_share_no_title_and_held_out_words_none_with_training():
    tune, held = (records(question_items("atlas", split=split, limit=200).data) for split in ("tune", "held"))
    assert tune and held and not {each["title"] for each in tune} & {each["title"] for each in held}
    words = {
        wording: records(question_items("atlas", split="held", limit=60, wording=wording).data)
        for wording in ("trained", "held_out")
    }
    frames = {
        wording: {
            (each["relation"], each[field].replace(each["subject"], "{}").replace(each["answers"][0], "{}"))
            for each in rows
            for field in ("question", "passage")
            if each["cloze"] and each["passage"].count(".") == 1
        }
        for wording, rows in words.items()
    }
    assert frames["trained"] and frames["held_out"] and not frames["trained"] & frames["held_out"]
    with pytest.raises(ConfigError, match="wording"):
        question_items("atlas", wording="odd")
    with pytest.raises(ConfigError, match="split"):
        question_items("atlas", split="train")
    with pytest.raises(UnknownNameError, match="difficulty"):
        PreferenceBench(difficulty="hardest")
    with pytest.raises(UnknownNameError, match="suite"):
        PreferenceBench(suites=("trusts",))


def test_hard_contexts_are_as_many_as_asked_for():
    rows = records(question_items("atlas", split="held", limit=40).data)
    rows = [
        each
        | {
            "split": "all",
            "prior": "",
            "prior_known": False,
            "counterfactual": "",
            "counterfactual_passage": "",
        }
        for each in rows
    ]
    data = finish("x", len(rows), rows).data
    assert {each["grade"] for each in records(contexts(data, hard=1.0, most_hard=3).data)} == {"hard"}
    assert {each["grade"] for each in records(contexts(data, hard=0.0).data)} == {"easy"}
    hardest = max(each["kinds"].count("hard") for each in records(contexts(data, hard=1.0, most_hard=3).data))
    assert hardest == 3
    with pytest.raises(ConfigError, match="between 0 and 1"):
        contexts(data, hard=2.0)


def test_settings_of_training_come_from_defaults_the_model_and_the_caller():
    def handle(width: int) -> Any:
        config = SimpleNamespace(model_type="llama", vocab_size=3072)
        return SimpleNamespace(hidden_size=width, n_layers=5, config=config)

    plain, tuned = train_config(handle(64), "knowpo"), train_config(handle(256), "knowpo")
    assert plain.sft_lr == 1e-4 and tuned.sft_lr > plain.sft_lr
    assert all(train_config(handle(256), name) == tuned for name in CONTROLS)
    changed = train_config(
        handle(256), "knowpo", rank=3, beta=0.5, max_steps=None, loss=["sigmoid"], loss_weights=[1.0]
    )
    assert (changed.rank, changed.alpha, changed.beta, changed.loss) == (3, 6, 0.5, ("sigmoid",))
    with pytest.raises(ConfigError, match="no setting 'lr'"):
        train_config(handle(64), "knowpo", lr=1.0)


def test_contexts_are_cut_to_what_the_model_reads(monkeypatch):
    monkeypatch.setattr("rag.preference.memory.position_limit", lambda _handle: 500)
    handle, long = tiny_handle(), "a b c d " * 500
    base = {"question": "Where?", "context": "related", "context_answers": ["Rome"], "gold_pos": 1}
    rows = [
        base | {"id": "short", "documents": ["x", "In Rome."], "kinds": ["easy", "gold"]},
        base | {"id": "long", "documents": [long, "In Rome.", "y"], "kinds": ["hard", "gold", "easy"]},
        base | {"id": "hopeless", "documents": [long, long + long], "kinds": ["easy", "gold"]},
    ]
    stage = fitting_contexts(handle, finish("contexts", 3, rows).data, room=8)
    made = {each["id"]: each for each in records(stage.data)}
    assert list(made) == ["short", "long"]
    assert made["long"]["documents"] == ["In Rome.", "y"] and made["long"]["gold_pos"] == 0
    assert stage.manifest["settings"]["shortened"] == 1
    assert list(stage.manifest["dropped"].values()) == [1]


def test_a_finished_run_is_not_taken_for_one_of_other_data(monkeypatch):
    from rag.preference import knowpo
    from rag.preference.bench import cell_name

    handle, bench = tiny_handle(), PreferenceBench(limit=4)

    def names(bench: PreferenceBench = bench) -> list[str]:
        return [cell_name(handle, way, bench, {}, 0) for way in ("base", "knowpo", "knowpo_con")]

    before = names()
    assert names() == before
    monkeypatch.setattr(knowpo, "NOTES_RATIOS", {"ignorance": 1.0})
    base, direct, after_notes = names()
    assert (base, direct) == tuple(before[:2]) and after_notes != before[2]
    others = names(PreferenceBench(limit=4, draws=2))
    assert others[0] == base and others[1] != direct


def test_a_finished_run_is_not_taken_for_one_of_another_recipe(monkeypatch):
    from rag.preference import prepare
    from rag.preference.bench import cell_name

    handle, bench = tiny_handle(), PreferenceBench(limit=4)

    def names() -> dict[str, str]:
        return {way: cell_name(handle, way, bench, {}, 0) for way in ("base", "trust", "hierarchy", "dta")}

    def changed(before: dict[str, str]) -> list[str]:
        return [way for way, name in names().items() if name != before[way]]

    before = names()
    monkeypatch.setattr(prepare, "_STRANGERS", {"hierarchy": 0.5})
    assert changed(before) == ["hierarchy"]
    before = names()
    monkeypatch.setattr(prepare, "RECIPES", {**RECIPES, "hierarchy": partial(hierarchy_pairs, beside=3)})
    assert changed(before) == ["hierarchy"]
    before = names()
    monkeypatch.setattr(
        "rag.preference.bench.DIFFICULTIES", {"plain": replace(DIFFICULTIES["plain"], most_hard=1)}
    )
    assert changed(before) == list(before)
