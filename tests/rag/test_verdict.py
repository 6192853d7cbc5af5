"""Verdicts by table, with the built-in model, and on the command line."""

from __future__ import annotations

import itertools

import pytest

from lab.data.text import normalize_answer
from lab.errors import ConfigError, RequestError
from lab.handle import ModelHandle
from lab.records import Passage
from rag.verdict import AGREEMENTS, POLICIES, Voice, agreement_of, decide, hear, judge, same_answer
from tests.commands import call, result
from tests.rag.facts import conflicts
from tests.tiny import tiny_handle

CASES = conflicts(8, seed=3)


def memory(answer=None, confidence=0.5) -> Voice:
    return Voice("memory", answer, confidence if answer else 0.0)


def document(answer=None, confidence=0.5, trust=None, source="1") -> Voice:
    return Voice(source, answer, confidence if answer else 0.0, trust)


@pytest.fixture(scope="module")
def model(shipped_atlas: None) -> ModelHandle:
    return ModelHandle.load("atlas")


@pytest.mark.parametrize(
    ("remembered", "told", "wanted"),
    [
        ("Rome", ["the Rome."], "agree"),
        ("Rome", [None, "Paris"], "conflict"),
        ("Rome", ["Rome", "Paris"], "documents_differ"),
        (None, ["Paris", "paris"], "documents_only"),
        ("Rome", [None], "memory_only"),
        (None, [], "silent"),
    ],
)
def test_how_sources_stand_to_each_other(remembered, told, wanted):
    assert agreement_of(memory(remembered), [document(answer) for answer in told]) == wanted
    assert wanted in AGREEMENTS


@pytest.mark.parametrize(
    ("policy", "remembered", "told", "answer", "winner"),
    [
        ("context", "Rome", [("Paris", None)], "Paris", "documents"),
        ("context", "Rome", [(None, None)], "Rome", "memory"),
        ("context", "Rome", [("Rome", None)], "Rome", "both"),
        ("context", "Rome", [("Oslo", None), ("Paris", None), ("paris", None)], "Paris", "documents"),
        ("context", None, [(None, None)], "unknown", "nobody"),
        ("memory", "Rome", [("Paris", "verified")], "Rome", "memory"),
        ("memory", None, [("Paris", None)], "Paris", "documents"),
        ("trust", "Rome", [("Paris", "verified"), ("Oslo", None)], "Paris", "documents"),
        ("trust", "Rome", [("Paris", "unverified")], "Rome", "memory"),
        ("trust", "Rome", [("Paris", None)], "Rome", "memory"),
        ("trust", None, [("Paris", "unverified")], "Paris", "documents"),
        ("trust", None, [("Paris", "superseded")], "unknown", "nobody"),
        ("trust", "Rome", [("Rome", "verified"), ("Oslo", "superseded")], "Rome", "both"),
    ],
)
def test_who_wins(policy, remembered, told, answer, winner):
    documents = [document(said, trust=trust) for said, trust in told]
    verdict = decide("Q?", memory(remembered), documents, policy)
    assert (verdict.answer, verdict.winner, verdict.policy) == (answer, winner, policy)
    assert (verdict.confidence == 0) == (winner == "nobody")


def test_the_surest_of_equally_many_wins_and_confidence_is_that_of_the_winners():
    documents = [document("Oslo", 0.2), document("Paris", 0.7)]
    assert decide("Q?", memory("Rome", 0.9), documents, "context").answer == "Paris"
    assert decide("Q?", memory("Rome", 0.9), documents, "context").confidence == 0.7
    assert decide("Q?", memory("Paris", 0.9), documents, "context").confidence == 0.9
    assert decide("Q?", memory(), [], "memory", unknown="no idea").answer == "no idea"
    with pytest.raises(ConfigError, match="context, memory, trust"):
        decide("Q?", memory(), [], "contxt")  # type: ignore[arg-type]


def test_an_answer_always_comes_from_a_source_that_won():
    answers, levels = (None, "Rome", "Paris"), (None, "verified", "superseded")
    for policy, remembered, one, two, trust in itertools.product(POLICIES, answers, answers, answers, levels):
        documents = (document(one, trust=trust), document(two, source="2"))
        verdict = decide("Q?", memory(remembered), documents, policy)
        in_documents = any(same_answer(voice.answer, verdict.answer) for voice in documents)
        in_memory = same_answer(remembered, verdict.answer)
        assert (
            verdict.winner
            in {
                (False, False): {"nobody"},
                (True, False): {"documents"},
                (False, True): {"memory"},
                # A superseded document may say the same and still not count.
                (True, True): {"both", "memory"},
            }[in_documents, in_memory]
        )


def test_memory_and_documents_are_heard_apart(model):
    right = 0
    for case in CASES:
        remembered, (told, other) = hear(model, case.question, [case.document, case.about_another])
        right += (
            same_answer(remembered.answer, case.known)
            and same_answer(told.answer, case.told)
            and other.answer is None
        )
        for voice in (remembered, told):
            assert (0 < voice.confidence <= 1) == (voice.answer is not None)
    assert right >= 0.75 * len(CASES)


def test_policies_decide_a_conflict_of_the_model(model):
    case = CASES[0]
    by = {policy: judge(model, case.question, [case.document], policy) for policy in POLICIES}
    assert {verdict.agreement for verdict in by.values()} == {"conflict"}
    assert [normalize_answer(by[policy].answer) for policy in POLICIES] == [
        normalize_answer(answer) for answer in (case.told, case.known, case.known)
    ]
    trusted = Passage("a", case.document.text, trust="verified")
    assert judge(model, case.question, [trusted], "trust").winner == "documents"
    assert judge(model, "Who wrote The Zzyx of Qworp?", [], "context").winner == "nobody"


def test_a_model_without_a_format_is_judged_too():
    roomy = tiny_handle("llama", scale=2.0)
    roomy.config.max_position_embeddings = 2048
    verdict = judge(roomy, "Where?", [Passage("a", "Rome.")], "context")
    assert verdict.documents[0].source == "a" and verdict.to_json()["documents"][0]["source"] == "a"
    with pytest.raises(RequestError, match="empty"):
        judge(tiny_handle("gpt2"), " ", [], "context")


def test_the_command_reads_texts_and_files(model, capsys, tmp_path):
    case = CASES[0]
    file = tmp_path / "report.txt"
    file.write_text(case.document.text.replace(" ", "\n"), encoding="utf-8")
    words = ("rag", "ask", case.question, "-d", f"verified:{file}", "-d", case.about_another.text)
    found = result(capsys, tmp_path, *words, "--decoding", "adacad", "--policy", "trust")
    assert [row["trust"] for row in found["passages"]] == ["verified", None]
    assert found["passages"][0]["text"] == case.document.text
    assert found["passages"][0]["source"] == str(file)
    assert found["verdict"]["winner"] == "documents"
    assert same_answer(found["verdict"]["answer"], case.told)
    assert len(found["notes"]) == 2
    assert {"memory", "context", "ledger", "winner", "policy"} <= set(found["verdict"])
    assert len(found["verdict"]["context"]) == 2 and found["verdict"]["ledger"] is None
    assert isinstance(found["answer"], str)
    code, out, _ = call(capsys, *words, "--reader", "direct")
    assert code == 0 and "Verdict:" in out and "Who says what" in out and "Notes" not in out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--policy", "contxt"), "unknown policy"),
        (("--policy", "ledger"), "needs --ledger"),
        (("--decoding", "cda"), "did you mean"),
        (("--reader", "cno"), "did you mean con"),
        (("-d", "verified: "), "document 1 is empty"),
    ],
)
def test_a_wrong_word_is_named_before_a_model_is_loaded(words, said, capsys):
    code, _, err = call(capsys, "rag", "ask", "Q?", "--model", "no-such-model", *words)
    assert code == 2 and said in err
