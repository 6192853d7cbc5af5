from __future__ import annotations

import json
from collections import Counter
from typing import Any

import pytest

from lab.errors import ConfigError, DataError
from rag.preference.match import find_spans, same, says
from rag.preference.memory import probe_memory
from rag.preference.pairs import (
    SENTENCES,
    pairs,
    split_by_title,
    word_pairs,
)
from rag.preference.passages import contexts, counterfactuals, rewrite_passage
from rag.preference.sources import answer_type, item, read_items, with_edits
from rag.preference.stage import finish, records
from tests.tiny import tiny_handle

PEOPLE = ("Ada Vane", "Bo Marsh", "Cy Holt", "Di Frost", "Ed Lund", "Flo Reed", "Gus Hale", "Ida Penn")
TOWNS = ("Oslo", "Rome", "Lima", "Cairo", "Paris", "Tokyo", "Madrid", "Havana")


def items(count: int = 40) -> Any:
    """People with a town each, where they live or were born; every fifth item is of a person nobody knows."""
    rows = []
    for number in range(count):
        person, town = f"{PEOPLE[number % 8]} {number // 8}", TOWNS[(number * 3 + number // 8) % 8]
        verb = "lives" if number % 2 else "was born"
        row = item(
            f"town/{number}",
            f"Where does it say that {person} {verb}?",
            f"{person} {verb} in {town}, they say. Everybody in {town} knows it.",
            [town],
            title=person,
            subject=person,
            relation=verb,
            cloze=f"{person} {verb} in",
        )
        rows.append(row | ({"memory": []} if number % 5 == 4 else {}))
    return finish("items", count, rows)


def remembered(stage: Any) -> Any:
    """What ``probe_memory`` would add for a model that knows everything that can be known."""
    rows = [
        row
        | {
            "prior": row["memory"][0] if row["memory"] else "unknown",
            "prior_raw": " raw memory",
            "prior_correct": float(bool(row["memory"])),
            "prior_unknown": float(not row["memory"]),
            "prior_agreement": 1.0,
            "prior_known": bool(row["memory"]),
        }
        for row in records(stage.data)
    ]
    return finish("memory", len(rows), rows)


def prepared(seed: int = 0) -> Any:
    data = split_by_title(items().data, {"dpo": 1.0}, seed=seed).data
    data = counterfactuals(remembered(finish("split", 40, records(data))).data, seed=seed).data
    return contexts(data, documents=4, seed=seed)


def read_as(stage: Any, answer: Any, shown: Any = str) -> Any:
    rows = [
        row
        | {
            "prompt": "\n".join([*map(shown, row["documents"]), "Q: x\nA:"]),
            "read": answer(row),
            "read_raw": " raw reading",
        }
        for row in records(stage.data)
    ]
    return finish("reading", len(rows), rows).data


def test_matching_by_words_and_in_scripts_without_them():
    assert says("It is the Eiffel Tower.", ["eiffel tower"])
    assert not says("Romeo wrote it", ["Rome"])
    assert says("答案是主楼。", ["主楼"])
    assert not says("anything", ["", "  "])
    assert same("I-95", "i95")
    assert same("New York", "New York City")
    assert not same("Rome", "Romeo")
    assert find_spans("York and New York", ["York", "New York"]) == [(0, 4), (9, 17)]


def test_rewriting_keeps_where_and_what():
    done = rewrite_passage("Paris, in PARIS. Parisian. City of Paris!", ["Paris", "City of Paris"], "Rome")
    assert done is not None
    assert done.text == "Rome, in Rome. Parisian. Rome!"
    assert done.edits == ((0, 5, "Paris"), (10, 15, "PARIS"), (27, 40, "City of Paris"))
    assert rewrite_passage("nothing here", ["Paris"], "Rome") is None
    # The replacement itself holds the answer, which would then still be true.
    assert rewrite_passage("In Paris.", ["Paris"], "Paris Texas") is None


def test_answer_types():
    kinds = {"1998": "date", "3 May 1998": "date", "3,677": "number", "Ada Vane": "name", "walking": "other"}
    assert {text: answer_type(text) for text in kinds} == kinds
    assert answer_type("主楼") == "cjk"


def test_titles_never_cross_splits():
    rows = records(split_by_title(items().data, {"sft": 0.5, "dpo": 0.5}, seed=3).data)
    places: dict[str, set[str]] = {}
    for row in rows:
        places.setdefault(row["title"], set()).add(row["split"])
    assert all(len(found) == 1 for found in places.values())
    assert {"sft", "dpo"} == {row["split"] for row in rows}
    with pytest.raises(ConfigError, match="positive"):
        split_by_title(items().data, {"sft": -1.0})


def test_contexts_hold_what_they_say_and_equal_seeds_give_equal_contexts():
    stage = prepared()
    rows = records(stage.data)
    assert stage.manifest["digest"] == prepared().manifest["digest"] != prepared(1).manifest["digest"]
    assert {row["context"] for row in rows} == {"related", "conflict", "irrelevant"}
    for row in rows:
        told = " ".join(row["documents"])
        assert len(set(row["documents"])) == len(row["documents"]) <= 4
        if row["context"] == "irrelevant":
            assert row["gold_pos"] == -1
            assert not says(told, row["answers"])
            assert not says(told, [row["counterfactual"]])
        else:
            assert says(row["documents"][row["gold_pos"]], row["context_answers"])
            others = [text for at, text in enumerate(row["documents"]) if at != row["gold_pos"]]
            assert not any(says(text, row["context_answers"]) for text in others)
        if row["context"] == "conflict":
            assert not says(told, row["answers"])
            assert row["counterfactual"] in TOWNS
            old = [edit["old"] for edit in row["passage_edits"]]
            assert old == row["answers"] * 2
        assert (row["grade"] == "hard") == ("hard" in row["kinds"])


def test_the_place_of_the_answer_tells_nothing():
    places = Counter(
        row["gold_pos"]
        for seed in range(6)
        for row in records(prepared(seed).data)
        if row["gold_pos"] >= 0 and len(row["documents"]) == 4
    )
    expected = sum(places.values()) / 4
    # 16.27: the chi-square bound of p = 0.001 at 3 degrees of freedom.
    assert sum((places[at] - expected) ** 2 / expected for at in range(4)) < 16.27


def test_pairs_reject_the_models_own_mistakes():
    handle = tiny_handle()

    def copied(row: Any) -> str:
        wrong = [
            t for t in TOWNS if says(" ".join(row["documents"]), [t]) and t not in row["context_answers"]
        ]
        return wrong[0] if wrong else row["prior"]

    stage = pairs(handle, read_as(prepared(), copied), seed=0)
    for row in records(stage.data):
        told = " ".join(row["documents"])
        assert not same(row["chosen_answer"], row["rejected_answer"])
        assert (row["rejected_answer"], row["rejected_from"]) == (row["read"], "on_policy")
        if row["error_type"] == "ignorance":
            # Nothing else of the type stands in the documents.
            assert not says(told, [row["read"]])
            assert says(told, [row["chosen_answer"]])
        elif row["error_type"] == "overinclusion_mixed":
            assert row["chosen_answer"] in row["context_answers"]
            assert says(told, [row["rejected_answer"]])
        else:
            assert says(told, [row["rejected_answer"]])
            right = row["prior"] if row["error_type"] == "overinclusion_known" else "unknown"
            assert row["chosen_answer"] == right
    found = {row["error_type"] for row in records(stage.data)}
    assert found >= {"overinclusion_mixed", "overinclusion_known", "overinclusion_unknown"}


def test_memory_and_admissions_are_mistakes_where_a_document_answers():
    handle = tiny_handle()
    remembering = records(pairs(handle, read_as(prepared(), lambda row: row["prior"]), seed=0).data)
    told = [row for row in remembering if row["context"] == "conflict" and row["prior"] != "unknown"]
    assert told and all(row["error_type"] == "ignorance" for row in told)
    assert all((row["rejected_answer"], row["rejected_role"]) == (row["prior"], "memory") for row in told)

    admitting = records(pairs(handle, read_as(prepared(), lambda _row: "unknown"), seed=0).data)
    for row in admitting:
        assert (row["rejected_from"] == "on_policy") == (row["error_type"] != "overinclusion_unknown")
        if row["error_type"] != "overinclusion_unknown":
            assert (row["rejected_answer"], row["rejected_role"]) == ("unknown", "unknown")
            assert row["error_type"] in ("ignorance", "overinclusion_known")


def test_without_a_mistake_one_is_found():
    handle = tiny_handle()

    def right(row: Any) -> str:
        return row["context_answers"][0] if row["context_answers"] else row["prior"]

    made = records(pairs(handle, read_as(prepared(), right), seed=0).data)
    assert {row["rejected_from"] for row in made} <= {"memory", "unknown", "span"}
    for row in made:
        told = " ".join(row["documents"])
        if row["rejected_from"] == "span":
            assert says(told, [row["rejected_answer"]])
        else:
            assert row["error_type"] == "ignorance" and row["rejected_answer"] == row["prior"]
    found = {row["error_type"] for row in made}
    assert found == {"ignorance", "overinclusion_mixed", "overinclusion_known", "overinclusion_unknown"}


def test_nothing_is_rejected_that_no_prompt_shows():
    handle = tiny_handle()
    data = read_as(prepared(), lambda row: "", shown=lambda text: "")
    made = records(pairs(handle, data, seed=0).data)
    assert made and {row["rejected_from"] for row in made} <= {"memory", "unknown"}
    assert {row["error_type"] for row in made} == {"ignorance"}


def test_a_document_on_the_same_title_gives_the_mistake_where_none_of_the_type_stands():
    handle = tiny_handle()
    base = records(read_as(prepared(), lambda row: ""))[0]
    base |= {"context": "irrelevant", "prior_known": True, "prior": "Rome", "memory": ["Rome"]}
    row = base | {"documents": ["She plays the oboe."], "prompt": "1: She  plays the oboe.\nQ: x\nA:"}
    other = base | {"passage": "She plays the oboe.", "answers": ["oboe"], "answer_type": "instrument"}
    other |= {"documents": [], "prompt": "Q: x\nA:"}

    def made(second: Any) -> list[Any]:
        told = records(pairs(handle, finish("reading", 2, [row, second]).data).data)
        return [(each["rejected_answer"], each["error_type"]) for each in told]

    assert made(other) == [("oboe", "overinclusion_known")]
    with pytest.raises(DataError, match="no mistake to reject: 2"):
        made(other | {"title": "somebody else"})


def test_both_answers_are_worded_alike_and_of_one_length():
    handle = tiny_handle()
    base = {
        "chosen_answer": "Rome",
        "chosen_role": "context",
        "rejected_role": "memory",
        "rejected_raw": " Raw, it is",
    }
    rows = [base | {"rejected_answer": "Oslo"}, base | {"rejected_answer": "a place " * 30}]  # fmt: skip
    stage = word_pairs(handle, finish("x", 2, rows).data, frame=SENTENCES)
    [row] = records(stage.data)
    assert row["chosen"] == " From the documents, the answer is: Rome\n"
    assert row["rejected"] == " From my own memory, the answer is: Oslo\n"
    assert stage.manifest["dropped"] == {"lengths differ too much": 1}
    assert sum(stage.manifest["settings"]["length_differences"].values()) == 1
    raw = records(word_pairs(handle, finish("x", 2, rows).data, rewrite=False).data)
    assert [row["rejected"] for row in raw] == [" Raw, it is\n"] * 2


def test_edits_become_the_memory():
    request = {"prompt": "{} was born in", "subject": "Ada Vane 0", "target_new": "Mars"}
    rows = records(with_edits(items().data, [request, {"odd": 1}]).data)
    edited = [row for row in rows if row["edited"]]
    assert [row["title"] for row in edited] == ["Ada Vane 0"]
    assert edited[0]["memory"] == ["Mars"] != edited[0]["answers"]


def test_a_stage_that_leaves_nothing_says_why():
    with pytest.raises(DataError, match="too short: 3"):
        finish("cut", 3, [], {"too short": 3})


FILES = {
    "squad.json": json.dumps({"version": "v2.0", "data": [{"title": "Norse", "paragraphs": [{
        "context": "The Seine bounded it.", "qas": [
            {"id": "1", "question": "What bounded it?", "answers": [{"text": "Seine", "answer_start": 4}]},
            {"id": "2", "question": "Who sold it?", "answers": [], "is_impossible": True}]}]}]}),
    "mrqa.jsonl": '{"header": {"dataset": "SQuAD"}}\n' + json.dumps({"context": "The Seine bounded it.", "qas": [
        {"qid": "1", "question": "What bounded it?", "answers": ["Seine", "the Seine"]}]}),
    "flat.jsonl": json.dumps({"question": "What bounded it?", "answers": ["Seine"], "context": "The Seine bounded it."}),
    "knowpo.json": json.dumps([{"title": "圣母大学", "question": "在哪？", "answer": "主楼", "type": "related",
                                "doc": ["主楼旁边是大教堂。", "别的"]}]),
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_files_become_items(name, tmp_path):
    (tmp_path / name).write_text(FILES[name], encoding="utf-8")
    rows = records(read_items(tmp_path / name).data)
    assert rows[0]["answers"][0] in ("Seine", "主楼")
    assert find_spans(rows[0]["passage"], rows[0]["answers"])
    if name == "squad.json":
        assert [row["answerable"] for row in rows] == [True, False]
        assert rows[1]["title"] == "Norse"


def test_a_file_of_another_form_is_refused_with_its_line(tmp_path):
    file = tmp_path / "odd.jsonl"
    file.write_text(FILES["flat.jsonl"] + '\n{"text": "a", "label": 1}\n', encoding="utf-8")
    with pytest.raises(DataError, match=r"odd.jsonl.*2"):
        read_items(file)


def test_memory_is_the_models_own_and_sampled_answers_count():
    handle = tiny_handle(scale=3.0)
    stage = probe_memory(handle, items(3).data, samples=3, temperature=1.0, seed=1, max_new_tokens=4)
    rows = records(stage.data)
    assert not any(row["prior_known"] for row in rows)
    assert all(row["prior"] for row in rows)
    assert stage.manifest["settings"]["model"] == handle.fingerprint
    again = probe_memory(handle, items(3).data, samples=3, temperature=1.0, seed=1, max_new_tokens=4)
    assert again.manifest["digest"] == stage.manifest["digest"]
