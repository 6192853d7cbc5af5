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
    "choice": ({"question_sentence": "Who?", "choices": ["a", "b"], "answer": ["7"]}, "place of one of 2"),
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
