"""Readers and rules between memory and documents: what is asked, what a figure means, resuming, the dial, files of others."""

from __future__ import annotations

import json
import math

import pytest
import torch

from lab.atlas.forms import load_format
from lab.atlas.world import load_world
from lab.errors import ConfigError, DataError, UnknownNameError
from lab.eval.stats import NOTHING
from rag.cli_eval import split_rules
from rag.decoding import get_rule
from rag.evaluation import CONDITIONS, DIAL, FURTHER, Cell, atlas_questions, figures, gain, never_falls, plan
from rag.evaluation_report import gains
from rag.ledger.conflicts import mentions
from rag.questions import FileQuestion, documents_of, read_documents, read_questions, says
from rag.retrieval import as_asked, bring_in, document_of, retrieval_figures
from rag.store import Chunk, MemoryStore, Retrieved
from tests.commands import call, result

RGB = [
    {
        "id": number,
        "query": f"Where was the {year} final?",
        "answer": [[city, f"{city} City"]],
        "fakeanswer": "Glendale",
        "positive": [f"The {year} final took place in {city}."],
        "positive_wrong": [f"The {year} final took place in Glendale."],
        "negative": ["Tickets are on sale now."],
    }
    for number, (year, city) in enumerate((("2021", "Tampa"), ("2019", "Atlanta"), ("2017", "Houston")))
]


def test_every_condition_asks_the_same_facts_with_what_it_promises():
    world, format = load_world(), load_format()
    found = atlas_questions(world, 30, seed=4)
    assert set(found) == {*CONDITIONS, *FURTHER}
    assert atlas_questions(world, 30, seed=4) == found != atlas_questions(world, 30, seed=5)
    for asked in zip(*(found[condition] for condition in CONDITIONS), strict=True):
        agree, contradict, irrelevant, none, several = asked
        assert len({one.id for one in asked}) == len({one.question for one in asked}) == 1
        fact = world.fact(agree.id)
        assert agree.answers == fact.answers and fact.subject in agree.question
        assert agree.passages[0].text == f"{format.statement(fact)}."
        for one in (contradict, several):
            for passage in one.passages:
                assert mentions(passage.text, one.told) and fact.subject in passage.text
            assert not {each.casefold() for each in one.told} & {each.casefold() for each in fact.answers}
        assert (len(contradict.told), len(several.passages), none.passages) == (1, 3, ())
        assert fact.subject not in irrelevant.passages[0].text and not irrelevant.told
    subjects = {fact.subject for fact in world.facts}
    for none, noisy, nobody in zip(*(found[name] for name in ("none", *FURTHER)), strict=True):
        fact = world.fact(none.id)
        assert (noisy.question, noisy.answers, len(noisy.passages)) == (none.question, none.answers, 3)
        said = " ".join(passage.text for passage in noisy.passages)
        assert not mentions(said, (fact.subject, *fact.answers)) and nobody.passages == noisy.passages
        assert not nobody.answers and fact.subject not in nobody.question
        assert not [subject for subject in subjects if mentions(nobody.question, (subject,))]


def test_a_gain_is_paired_and_needs_the_same_questions():
    old = [{"id": str(number), "right": number > 1} for number in range(10)]
    new = [{"id": str(number), "right": number != 5} for number in range(10)]
    found = gain(old, new)
    assert found.mean == pytest.approx(0.1) and found.low < 0 < found.high and found.n == 10
    # By hand: two won, one lost of ten.
    half = 1.959964 * math.sqrt(4 - 1 / 12) / 12
    assert (found.low, found.high) == pytest.approx((1 / 12 - half, 1 / 12 + half), abs=1e-4)
    same = gain(old * 30, old * 30)
    assert same.mean == 0 and 0 < same.high < 0.01 and gain([], []) is NOTHING
    with pytest.raises(ConfigError, match="same questions"):
        gain(old, new[::-1])
    cells = {
        Cell("noisy", "direct", "cad"): old,
        Cell("noisy", "con", "cad"): new,
        Cell("noisy", "con", "greedy"): new,
    }
    (one,) = gains(cells)
    assert (one["reader"], one["decoding"], one["gain"]["mean"]) == ("con", "cad", pytest.approx(0.1))


def test_a_figure_is_a_function_of_rows_and_nothing_where_it_has_no_meaning():
    def row(known, right, follows, keeps):
        return {"known": known, "right": right, "follows": follows, "keeps": keeps}

    rows = [row(True, True, False, True), row(True, False, True, False), row(False, False, False, None)]
    found = figures("contradict", rows)
    assert (found["accuracy"].mean, found["accuracy"].n) == (pytest.approx(1 / 3), 3)
    assert (found["adherence"].mean, found["unknown"].mean) == (pytest.approx(1 / 3), pytest.approx(1 / 3))
    assert (found["memory"].mean, found["memory"].n) == (0.5, 2)
    assert found["robustness"] is NOTHING
    assert found["accuracy"].low < 1 / 3 < found["accuracy"].high
    bare = figures("irrelevant", [row(True, True, None, True)])
    assert bare["robustness"].mean == 1 and bare["adherence"] is NOTHING


def test_names_are_checked_before_anything_is_asked():
    assert plan(["none"], ["direct", "direct"], ["cad"]) == [Cell("none", "direct", "cad")]
    with pytest.raises(UnknownNameError, match="direct"):
        plan(["none"], ["dirct"], ["cad"])
    with pytest.raises(ConfigError, match="nothing to ask"):
        plan(["none"], [], ["cad"])
    assert split_rules("ck_plug:memory=0,top_k=5, cad") == ["ck_plug:memory=0,top_k=5", "cad"]
    assert split_rules("greedy,cad:alpha=1") == ["greedy", "cad:alpha=1"]


@pytest.mark.parametrize("seed", range(4))
def test_the_dial_turns_one_way_only(seed):
    """Over the dial the winner of ``d u + (1 - d)(c - u)`` never becomes less likely by memory, and its contrast never grows."""
    generator = torch.Generator().manual_seed(seed)
    c, u = (torch.randn(64, 12, generator=generator).mul(2).log_softmax(-1) for _ in range(2))
    rules = [get_rule(f"ck_plug:memory={value},threshold=100") for value in DIAL]
    winners = torch.stack([rule.combine(c, u).argmax(-1) for rule in rules])
    by_memory = torch.stack([u.gather(-1, row[:, None])[:, 0] for row in winners])
    contrast = torch.stack([(c - u).gather(-1, row[:, None])[:, 0] for row in winners])
    assert (by_memory.diff(dim=0) >= -1e-6).all()
    assert (contrast.diff(dim=0) <= 1e-6).all()
    assert (winners[-1] == u.argmax(-1)).all()
    assert (winners[0] != winners[-1]).any(), "a dial that turns nothing proves nothing"
    # Where the documents make the model surer, no turn of the dial touches the answer.
    left = [get_rule(f"ck_plug:memory={value},threshold=-100").combine(c, u) for value in DIAL]
    assert all(torch.equal(scores, c) for scores in left)


def test_values_that_are_absent_do_not_break_a_curve():
    assert never_falls([0.0, None, 0.2, 0.2]) and not never_falls([0.3, None, 0.2])


def test_the_command_measures_keeps_its_cells_and_goes_on(shipped_atlas, capsys, tmp_path):
    out = tmp_path / "out"
    words = ["rag", "eval", "--limit", "6", "--readers", "direct", "--max-new-tokens", "8", "--out", out]
    few = [*words, "--decodings", "greedy", "--conditions", "contradict,none"]
    first = result(capsys, tmp_path, *few)
    assert (len(first["cells"]), first["kept"]) == (2, 0)
    by = {cell["condition"]: cell["metrics"] for cell in first["cells"]}
    assert first["gains"] == []
    assert by["none"]["accuracy"]["mean"] >= 0.8 and by["none"]["adherence"]["mean"] is None
    assert (
        by["contradict"]["adherence"]["n"] == 6 and "Memory and documents" in (out / "eval.html").read_text()
    )
    assert json.loads((out / "eval.json").read_text())["cells"] == first["cells"]
    (torn,) = (out / "cells").glob("contradict-*.json")
    torn.write_text(torn.read_text()[:-20])
    more = result(capsys, tmp_path, *few[:-1], "contradict,none,irrelevant")
    assert (len(more["cells"]), more["kept"]) == (3, 1)
    assert more["cells"][:2] == first["cells"]
    other = result(capsys, tmp_path, *few, "--seed", "1")
    assert other["kept"] == 0 and other["seed"] == 1
    code, _, err = call(capsys, *words, "--conditions", "agre")
    assert code == 2 and "agree" in err


def test_the_dial_moves_atlas_from_the_document_to_memory(shipped_atlas, capsys, tmp_path):
    words = ["rag", "eval", "--dial", "--limit", "8", "--readers", "direct", "--decodings", "ck_plug"]
    words += ["--conditions", "contradict", "--max-new-tokens", "8", "--out", tmp_path / "out"]
    found = result(capsys, tmp_path, *words)
    curve = found["dial"]["direct"]
    kept = [point["memory"]["mean"] for point in curve["points"]]
    followed = [point["adherence"]["mean"] for point in curve["points"]]
    assert [point["dial"] for point in curve["points"]] == list(DIAL)
    assert kept[-1] >= 0.8 and kept[0] < kept[-1] and followed[0] > followed[-1]
    assert curve["memory_never_falls"] == never_falls(kept)
    ratios = [point["ratio"] for point in curve["points"]]
    assert curve["ratio_never_falls"] == never_falls(ratios) and ratios[-1] >= 0.8
    assert len(found["cells"]) == 1
    assert "data:image/png" in (tmp_path / "out" / "eval.html").read_text()


def write(file, rows):
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return file


@pytest.mark.parametrize(
    ("row", "form", "wanted"),
    [
        (RGB[0], "rgb", FileQuestion("0", "Where was the 2021 final?", ("Tampa", "Tampa City"),
            ("The 2021 final took place in Tampa.",),
            ("The 2021 final took place in Glendale.", "Tickets are on sale now."))),
        ({"question": "Is it?", "ground_truth": ["False"], "parametric_memory_aligned_evidence": " A. ",
          "counter_memory_aligned_evidence": "B."}, "conflictqa",
         FileQuestion("0", "Is it?", ("False", "no"), ("A.", "B."))),
        ({"question_id": "q1", "question_sentence": "Where?", "choices": ["Rome", "Oslo"], "answer": "1",
          "evidence": "In <a href='x'>Oslo</a> &amp; elsewhere"}, "realtimeqa",
         FileQuestion("q1", "Where?", ("Oslo",), ("In Oslo & elsewhere",))),
        ({"ids": "7", "question": "Who?", "answers": "[\"Ann\", \"A.\"]"}, "questions",
         FileQuestion("7", "Who?", ("Ann", "A."))),
        ({"question": "who wrote it", "answers": ["Ann"], "context": "<P> Ann wrote <Li>it . </P>"}, "questions",
         FileQuestion("0", "who wrote it", ("Ann",), ("Ann wrote it .",))),
        ({"input_index": 3, "context_string": "Ann wrote it . \nUsing only the references listed above, answer "
          "the following question: \nQuestion: Who wrote it ?\nAnswer:", "gold_answers": "Ann"}, "nq_synth",
         FileQuestion("3", "Who wrote it ?", ("Ann",), ("Ann wrote it .",))),
    ],
)  # fmt: skip
def test_published_files_are_read_as_they_are(row, form, wanted, tmp_path):
    assert read_questions(write(tmp_path / "f.jsonl", [row])) == (form, [wanted])


def test_a_question_of_nq_synth_that_comes_without_its_document_is_left_out(tmp_path):
    told = "Ann wrote it . \nUsing only the references listed above, answer the following question: \nQuestion: Who ?\nAnswer:"
    bare = "Answer the following question:\nQuestion: Who ?\nAnswer:"
    rows = [
        {"input_index": 0, "context_string": text, "gold_answers": "Ann", "assigned_process": number}
        for number, text in enumerate((told, bare))
    ]
    _, found = read_questions(write(tmp_path / "nq.jsonl", rows))
    assert [one.relevant for one in found] == [("Ann wrote it .",)]


def test_documents_come_from_search_results_and_folders(tmp_path):
    row = {
        "question_id": "1",
        "search_time": "x",
        "search_result": [{"doc_id": "7", "text": " Ann  did. "}, {"text": ""}],
    }
    assert read_documents(write(tmp_path / "dpr.jsonl", [row, row])) == ["Ann did."]
    with pytest.raises(DataError, match=r"bad\.jsonl.*2.*search_result"):
        read_documents(write(tmp_path / "bad.jsonl", [row, row | {"search_result": "Ann"}]))
    with pytest.raises(DataError, match="no document"):
        read_documents(write(tmp_path / "alone.jsonl", [{"question": "Who?", "answers": ["Ann"]}]))


def test_files_that_are_none_of_these_and_broken_rows_are_named(tmp_path):
    with pytest.raises(DataError, match="no known format"):
        read_questions(write(tmp_path / "a.jsonl", [{"x": 1}]))
    broken = {"question_sentence": "Where?", "choices": ["Rome"], "answer": ["4"]}
    with pytest.raises(DataError, match=r"b\.jsonl.*1"):
        read_questions(write(tmp_path / "b.jsonl", [broken]))
    assert says("答案是1月3日。", ("1月3日",)) and not says("Romesh", ("Rome",))


def test_retrieval_figures_count_documents_not_chunks():
    questions = [FileQuestion("a", "q", ("x",), ("one", "two")), FileQuestion("b", "q", ("x",))]

    def hits(*names):
        return [
            Retrieved(Chunk(str(number), "t", document_of(name)), 1.0) for number, name in enumerate(names)
        ]

    found = retrieval_figures(questions, [hits("noise", "noise", "two", "one"), hits("one")])
    assert (found["recall@1"].mean, found["recall@3"].mean, found["mrr"].mean) == (0.0, 1.0, 0.5)
    assert (found["answer@3"].mean, found["answer@3"].n) == (0.0, 2)
    assert found["mrr"].n == 1  # nothing is relevant to the second
    store = MemoryStore()
    assert bring_in(store, documents_of(questions)) == bring_in(store, ["one", "two"]) == 2
    asked = as_asked(questions, [hits("a", "b", "c"), []], 2, lambda _, passages: len(passages) < 2)
    assert [len(one.passages) for one in asked["retrieved"]] == [1, 0]


def test_a_file_is_indexed_and_asked_end_to_end(shipped_atlas, capsys, tmp_path):
    file = write(tmp_path / "rgb.jsonl", RGB)
    words = [
        "rag",
        "eval",
        "--data",
        file,
        "--limit",
        "2",
        "--readers",
        "direct",
        "--decodings",
        "greedy,cad",
    ]
    words += ["--max-new-tokens", "6", "--out", tmp_path / "out"]
    found = result(capsys, tmp_path, *words)
    assert found["format"] == "rgb" and len(found["cells"]) == 4
    figures = found["retrieval"]["figures"]
    assert figures["recall@5"]["mean"] == 1 and figures["mrr"]["mean"] >= 0.5 and figures["mrr"]["n"] == 2
    assert (found["retrieval"]["chunks"], found["retrieval"]["embeddings"]) == (7, "minilm")
    assert result(capsys, tmp_path, *words)["kept"] == 4
    alone = write(tmp_path / "popqa.jsonl", [{"ids": "1", "question": "Who?", "answers": '["Ann"]'}])
    bare = [
        "rag",
        "eval",
        "--data",
        alone,
        "--readers",
        "direct",
        "--decodings",
        "greedy",
        "--out",
        tmp_path / "o",
    ]
    assert result(capsys, tmp_path, *bare)["retrieval"] == {}
    (tmp_path / "told").mkdir()
    (tmp_path / "told" / "who.txt").write_text("It was Ann.", encoding="utf-8")
    told = result(capsys, tmp_path, *bare, "--documents", tmp_path / "told", "--documents", file)["retrieval"]
    assert told["chunks"] == 8 and told["figures"]["answer@10"]["mean"] == 1
    assert told["figures"]["recall@1"]["mean"] is None
    code, _, err = call(capsys, *bare, "--dial")
    assert code == 2 and "contradict" in err
