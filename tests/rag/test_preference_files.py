"""Question items of the public files themselves."""

from __future__ import annotations

import json

import pytest

from lab.errors import DataError
from rag.preference.passages import contexts, counterfactuals
from rag.preference.sources import read_items
from rag.preference.stage import finish, records

pytest_plugins = ("tests.shared",)
FILES = (
    "rgb/en_fact.jsonl", "rgb/zh_fact.jsonl", "rgb/zh_int.jsonl", "rgb/zh_refine.jsonl",
    "realtimeqa/past_qa.jsonl", "realtimeqa/past_qa_nota.jsonl", "ifqa/full_split_dev.jsonl",
    "conflictqa/conflictQA-strategyQA-llama2-7b.jsonl", "faithfulrag/squad_negative.json",
    "coconflictqa/SQuAD_kc.jsonl", "coconflictqa/hotpotq_kc.jsonl",
    "coconflictqa/NaturalQuestionsShort_kc.jsonl", "coconflictqa/TriviaQA-web_kc.jsonl",
    "knowpo_squadzen/processed_sqaudZen-related-dpo-negative_2.json",
    "knowpo_squadzen/processed_sqaudZen-irrelavant-dpo-negative.json",
)  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_a_real_file_becomes_contexts(name, shared_data):
    rows = records(read_items(shared_data / name, limit=12).data)
    assert all(row["question"] for row in rows)
    assert any(row["answers"] for row in rows) or "irrelavant" in name
    unknown = {"split": "all", "prior": "", "prior_known": False}
    split = finish("split", len(rows), [row | unknown for row in rows]).data
    made = records(contexts(counterfactuals(split).data).data)
    for row in made:
        assert (row["gold_pos"] >= 0) == (row["context"] != "irrelevant")
    assert {"related"} <= {row["context"] for row in made} or "irrelavant" in name or "nota" in name


def test_a_false_answer_that_the_file_brings_is_taken(shared_data):
    rows = records(read_items(shared_data / "rgb/en_fact.jsonl", limit=1).data)
    assert rows[0]["answers"] == ["Tampa, Florida"]
    assert rows[0]["given_counterfactual"] == "Glendale, Arizona"


BROKEN = {
    "choice": (
        {"question_sentence": "Who?", "choices": ["a", "b"], "answer": ["7"]},
        "names none of 2 choices",
    ),
    "query": ({"query": " ", "positive": ["x"], "answer": "x"}, "'query'"),
    "documents": ({"query": "Who?", "positive": "x", "answer": "x"}, "'positive'"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_row_names_file_and_line(name, tmp_path):
    row, message = BROKEN[name]
    good = {"query": "Who?", "positive": ["Ada did."], "answer": "Ada"}
    file = tmp_path / "rows.jsonl"
    file.write_text(f"{json.dumps(good)}\n{json.dumps(row)}\n", encoding="utf-8")
    with pytest.raises(DataError, match=message) as caught:
        read_items(file)
    assert "rows.jsonl" in str(caught.value) and "2" in str(caught.value)


DENYING = {
    "question": "Is Saint Vincent's language rooted in English?",
    "ground_truth": ["True"],
    "memory_answer": "It is not rooted in English.",
    "counter_answer": "It is rooted in English.",
    "parametric_memory_aligned_evidence": "It comes from elsewhere.",
    "counter_memory_aligned_evidence": "English is what it comes from.",
}


@pytest.mark.parametrize("right", [True, False])
def test_beliefs_and_their_opposites_become_contexts(right, tmp_path):
    file = tmp_path / "rows.jsonl"
    both_deny = DENYING | {"counter_answer": "No, it is not."}
    lines = [DENYING | {"ground_truth": [str(right)]}, both_deny]
    file.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    stage = read_items(file)
    (row,) = records(stage.data)
    assert sum(stage.manifest["dropped"].values()) == 1
    assert row["memory"] == ["False", "no"] and row["answers"][0] == str(right)
    evidence = ["English is what it comes from.", "It comes from elsewhere."]
    assert [row["passage"], row["given_counterfactual_passage"]] == (evidence if right else evidence[::-1])
    split = finish("split", 1, [row | {"split": "all", "prior": "", "prior_known": False}]).data
    (made,) = records(counterfactuals(split).data)
    assert made["counterfactual"] == str(not right)
    assert made["counterfactual_passage"] == row["given_counterfactual_passage"]


def test_the_conflictqa_file_tells_which_evidence_says_yes(shared_data):
    stage = read_items(shared_data / "conflictqa/conflictQA-strategyQA-chatgpt.jsonl")
    assert stage.manifest["rows_out"] > 600
    assert stage.manifest["rows_out"] + sum(stage.manifest["dropped"].values()) == stage.manifest["rows_in"]


def test_a_pair_of_passages_and_a_single_answer_are_read(tmp_path):
    file = tmp_path / "rows.jsonl"
    pair = {
        "question": "Where is Ada?", "orig_answer": "Oslo", "orig_alias": ["Christiania"], "cf_answer": "Rome",
        "orig_context": "Ada is in Oslo.", "cf_context": "Ada is in Rome.",
    }  # fmt: skip
    single = {"question": "Where is Bo?", "answer": " Nile", "context": "Bo is in Nile."}
    file.write_text("\n".join(map(json.dumps, [pair, single])), encoding="utf-8")
    first, second = records(read_items(file).data)
    assert first["answers"] == ["Oslo", "Christiania"] and first["given_counterfactual"] == "Rome"
    assert first["given_counterfactual_passage"] == "Ada is in Rome."
    assert second["answers"] == ["Nile"] and second["passage"] == "Bo is in Nile."
