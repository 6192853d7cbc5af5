"""Question items of the public files themselves."""

from __future__ import annotations

import json

import pytest

from lab.errors import DataError
from rag.preference.match import says
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
    "mquake/AKEW-MQuAKE-CF.json", "mquake/MQuAKE-hard.json", "nq_synth/nq_synth_2_-1.jsonl",
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


CASE = {
    "case_id": 7,
    "requested_rewrite": [
        {"prompt": "{} was built by", "subject": "The Owl", "target_new": {"str": "Bo"}, "target_true": {"str": "Ada"}}
    ],
    "questions": ["Where was the builder of The Owl born?", "Where is its builder from?"],
    "answer": "Oslo",
    "answer_alias": ["Christiania"],
    "new_answer": "Port St.",
    "new_answer_alias": ["Port Saint"],
    "single_hops": [
        {"cloze": "The Owl was built by", "answer": "Ada"},
        {"cloze": "Ada was born in", "answer": "Oslo"},
    ],
    "new_single_hops": [
        {"cloze": "The Owl was built by", "answer": "Bo"},
        {"cloze": "Bo was born in", "answer": "Port St."},
    ],
}  # fmt: skip
SYNTH = {
    "input_index": 4,
    "assigned_process": 0,
    "context_string": "Bo wrote  the Owl . \nUsing only the references listed above, answer the following question: \n"
    "Question: Who wrote the Owl ?\nAnswer:",
    "gold_answers": "Bo",
}
ALONE = SYNTH | {
    "assigned_process": 1,
    "context_string": "Answer the following question: \nQuestion: Who wrote the Owl ?\nAnswer:",
}
BROKEN = {
    "case without an answer": ({**CASE, "answer": None}, "'answer'"),
    "case with a blank answer": ({**CASE, "new_answer": " "}, "'new_answer'"),
    "case with odd aliases": ({**CASE, "answer_alias": [1]}, "'answer_alias'"),
    "case without questions": ({**CASE, "questions": []}, "'questions'"),
    "case without hops": ({**CASE, "single_hops": []}, "'single_hops'"),
    "case with one side of hops": ({k: v for k, v in CASE.items() if k != "new_single_hops"}, "'new_single_hops'"),
    "case with half a hop": ({**CASE, "single_hops": [{"cloze": "Ada was born in"}]}, r"'single_hops\[0\].answer'"),
    "case with a hop of text": ({**CASE, "new_single_hops": ["Ada"]}, r"'new_single_hops\[0\]'"),
    "case without edits": ({k: v for k, v in CASE.items() if k != "requested_rewrite"}, "'requested_rewrite'"),
    "case without a subject": ({**CASE, "requested_rewrite": [{"prompt": "{} is"}]}, r"'requested_rewrite\[0\].subject'"),
    "synthetic without a document": (ALONE | {"assigned_process": 0}, "'context_string' must hold a document"),
    "synthetic without a question": (SYNTH | {"context_string": "Bo wrote it."}, "no line 'Question:'"),
    "synthetic with a blank question": (
        SYNTH | {"context_string": SYNTH["context_string"].replace("Who wrote the Owl ?", "")}, "a line 'Question"
    ),
    "synthetic without an answer": (SYNTH | {"gold_answers": ["Bo"]}, "'gold_answers'"),
    "answers alone": ({"ids": "4", "question": "who?", "answers": ["Bo"]}, "no document: a field 'context'"),
    "answer alone": ({"question": "Who?", "answer": "Bo", "type": "bridge"}, "no document: a field 'context'"),
    "results alone": ({"question_id": "1", "search_result": [{"text": "Bo."}]}, "no question: RealTimeQA"),
    "context of pairs": ({"question": "Who?", "answer": "Bo", "context": [["Owl", ["Bo."]]]}, "'context'"),
    "context of nothing": ({"question": "Who?", "answer": "Bo", "context": " "}, "'context'"),
    "no documents": ({"question": "Who?", "answer": "Bo", "doc": [], "type": "related"}, "'doc'"),
    "no evidence": ({"question": "Is it?", "ground_truth": ["True"], "memory_answer": "No.", "counter_answer": "Yes."},
                    "'parametric_memory_aligned_evidence'"),
    "another form": ({"text": "a", "label": 1}, "a row with label, text is none of: SQuAD, MRQA, .*MQuAKE, NQ-Synth"),
    "choice": (
        {"question_sentence": "Who?", "choices": ["a", "b"], "answer": ["7"]},
        "names none of 2 choices",
    ),
    "query": ({"query": " ", "positive": ["x"], "answer": "x"}, "'query'"),
    "documents": ({"query": "Who?", "positive": "x", "answer": "x"}, "'positive'"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_row_names_file_and_line(name, tmp_path):
    row, message = BROKEN[name]
    good = {"query": "Who?", "positive": ["Ada did."], "answer": "Ada"}
    file = tmp_path / "rows.jsonl"
    file.write_text(f"{json.dumps(good)}\n{json.dumps(row)}\n", encoding="utf-8")
    with pytest.raises(DataError, match=message) as caught:
        read_items(file)
    assert "rows.jsonl:2: " in str(caught.value)


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


def test_hops_become_a_passage_and_the_one_that_contradicts_it(tmp_path):
    file = tmp_path / "rows.json"
    also_right = CASE | {"case_id": 8, "new_answer": "Christiania"}
    told_both = CASE | {
        "case_id": 9,
        "new_single_hops": [{"cloze": "The twin of Oslo is", "answer": "Port St."}],
    }
    file.write_text(json.dumps([CASE, also_right, told_both]), encoding="utf-8")
    row, *unopposed = records(read_items(file).data)
    assert row["id"] == "7" and row["title"] == "The Owl"
    assert row["question"] == "Where was the builder of The Owl born?"
    assert row["passage"] == "The Owl was built by Ada. Ada was born in Oslo."
    assert row["answers"] == row["memory"] == ["Oslo", "Christiania"]
    assert row["given_counterfactual"] == "Port St."
    assert row["given_counterfactual_passage"] == "The Owl was built by Bo. Bo was born in Port St."
    for other in unopposed:
        assert not other["given_counterfactual"] and not other["given_counterfactual_passage"]


@pytest.mark.parametrize("name", ["AKEW-MQuAKE-CF", "MQuAKE-hard"])
def test_every_case_of_the_multi_hop_files_states_its_answers(name, shared_data):
    stage = read_items(shared_data / f"mquake/{name}.json")
    assert stage.manifest["rows_out"] == stage.manifest["rows_in"]
    rows = records(stage.data)
    opposed = [row for row in rows if row["given_counterfactual_passage"]]
    assert len(opposed) > 0.95 * len(rows)
    for row in rows:
        assert says(row["passage"], row["answers"][:1]) and row["title"]
        assert ".." not in row["passage"]
    for row in opposed:
        assert says(row["given_counterfactual_passage"], [row["given_counterfactual"]])
        assert not says(row["given_counterfactual_passage"], row["answers"])


def test_a_question_with_its_synthetic_document_is_read_once(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, [SYNTH, ALONE])), encoding="utf-8")
    stage = read_items(file)
    (row,) = records(stage.data)
    assert (row["id"], row["question"], row["passage"], row["answers"]) == (
        "4", "Who wrote the Owl ?", "Bo wrote the Owl .", ["Bo"],
    )  # fmt: skip
    assert stage.manifest["dropped"] == {"the question of another row without its document": 1}


def test_the_synthetic_file_has_a_document_for_every_other_row(shared_data):
    stage = read_items(shared_data / "nq_synth/nq_synth_2_-1.jsonl")
    assert 2 * stage.manifest["rows_out"] == stage.manifest["rows_in"]
    for row in records(stage.data):
        assert says(row["passage"], row["answers"])
        assert row["question"] not in row["passage"] and "Using only" not in row["passage"]


LACKING = {
    "hotpotqa/hotpot_dev_v1_simplified.json": "has a question and an answer but no document",
    "nq/nq_qa_dataset.jsonl": "has a question and an answer but no document",
    "realtimeqa/past_2022_dpr.jsonl": "has search results but no question",
}


@pytest.mark.parametrize("name", LACKING)
def test_a_file_without_documents_or_questions_is_refused_with_what_would_do(name, shared_data):
    with pytest.raises(DataError, match=LACKING[name]) as caught:
        read_items(shared_data / name)
    assert caught.value.line and "knowlab rag eval" in str(caught.value)
