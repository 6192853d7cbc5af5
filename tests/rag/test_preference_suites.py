from __future__ import annotations

from collections import Counter

import pytest

from lab.eval.stats import NOTHING
from rag.preference import suites


def row(context: str, *, ctx=0, par=0, gold=0, abstained=0, copied=0, known=True, item="a", **more):
    supported = "supported" if context == "related" else "unsupported"
    return {
        "item_id": item,
        "cell": f"{context}/easy",
        "context": context,
        "grade": "easy",
        "prior_known": known,
        "matched": {"ctx": bool(ctx), "par": bool(par), "gold": bool(gold)},
        "abstained": bool(abstained),
        "copied": bool(copied),
        "quadrant": f"{'known' if known else 'unknown'}/{supported}",
        **more,
    }


ROWS = [
    row("related", ctx=1, gold=1, par=1),
    row("related", ctx=1, gold=1, known=False),
    row("related", abstained=1, known=False),
    row("conflict", ctx=1),
    row("conflict", par=1, gold=1),
    row("conflict", abstained=1),
    row("conflict"),
    row("irrelevant", par=1, gold=1),
    row("irrelevant", copied=1),
    row("irrelevant", abstained=1, known=False),
    row("irrelevant", copied=1, known=False),
]


def test_adherence_robustness_and_the_errors_by_hand():
    found = suites.preference_metrics(ROWS)
    by_hand = {
        "adherence": (3 / 7, 7),
        "adherence_strict": (1 / 4, 4),
        "robustness": (2 / 4, 4),
        "contextual_ignorance": (2 / 4, 4),
        "contextual_overinclusion": (2 / 4, 4),
        "memorisation_ratio": (1 / 2, 2),
    }
    for name, (mean, n) in by_hand.items():
        assert (found[name].mean, found[name].n) == (pytest.approx(mean), n), name
    assert suites.adherence([]) == NOTHING


def test_the_nine_measures_by_hand():
    found = suites.divide_then_align(ROWS)
    # Right: related 1, 2; conflict 5; irrelevant 8; and 10 abstains where nothing is known.
    assert found["accuracy"].mean == pytest.approx(5 / 11)
    assert found["recall"].mean == pytest.approx(4 / 9)
    assert found["precision"].mean == pytest.approx(4 / 8)
    assert found["f1"].mean == pytest.approx(2 * 4 / 9 * 0.5 / (4 / 9 + 0.5))
    assert (found["denoise"].mean, found["denoise"].n) == (pytest.approx(2 / 6), 6)
    assert (found["utilisation"].mean, found["utilisation"].n) == (pytest.approx(1 / 2), 2)
    assert found["abstain_recall"].mean == pytest.approx(1 / 2)
    assert found["abstain_precision"].mean == pytest.approx(1 / 3)
    assert found["abstain_f1"].mean == pytest.approx(0.4)


def test_flips_twins_and_the_paired_test_by_hand():
    tagged = [
        row("conflict", item="a", trust="verified", right=True),
        row("conflict", item="a", trust="unverified", right=True),
        row("conflict", item="b", trust="verified", right=True),
        row("conflict", item="b", trust="unverified", right=False),
        row("conflict", item="c", trust="verified", right=True),
    ]
    assert (suites.flip_rate(tagged).mean, suites.flip_rate(tagged).n) == (0.5, 2)
    twins = [
        {"twin": "a", "answerable": True, "abstained": False, "right": True},
        {"twin": "a", "answerable": False, "abstained": True, "right": True},
        {"twin": "b", "answerable": True, "abstained": True, "right": False},
        {"twin": "b", "answerable": False, "abstained": True, "right": True},
    ]
    found = suites.abstention(twins)
    assert (found["admitted"].mean, found["over_abstained"].mean, found["twins_right"].mean) == (
        1.0,
        0.5,
        0.5,
    )
    assert suites.mcnemar([True] * 6, [False] * 6) == pytest.approx(2 / 64)
    assert suites.mcnemar([True, False], [False, True]) == 1.0


def test_an_answer_is_judged_by_what_it_matches():
    context = {
        "id": "a",
        "context": "conflict",
        "grade": "hard",
        "documents": ["Ada lives in Rome.", "Bo lives in Oslo."],
        "context_answers": ["Rome"],
        "answers": ["Paris"],
        "prior_known": True,
    }
    said = {
        word: suites.judged(context, word, known=word != "unknown", par=["Paris"])
        for word in ("Rome", "Paris", "Oslo", "unknown")
    }
    assert [said[word]["matched"]["ctx"] for word in said] == [True, False, False, False]
    assert [said[word]["matched"]["par"] for word in said] == [False, True, False, False]
    assert [said[word]["copied"] for word in said] == [True, False, True, False]
    assert said["unknown"]["abstained"]
    assert said["Rome"]["quadrant"] == "known/unsupported"
    assert suites.cells(list(said.values()))["conflict/hard"]["context"]["mean"] == 0.25


def test_tags_and_twins_are_rows_of_the_same_contexts():
    from types import SimpleNamespace

    from rag.preference.stage import finish
    from rag.preference.tagged import trust_rows, twin_rows

    asked = []

    class Believer:
        """Believes documents that are not superseded."""

        def read_many(self, items):
            asked.extend(items)
            said = ["Paris" if passages[0].trust == "superseded" else "Rome" for _, passages in items]
            return [SimpleNamespace(answer=answer, known=True) for answer in said]

    context = {"id": "a", "question": "Where?", "context": "conflict", "prior_known": True, "prior": "Paris",
               "counterfactual": "Rome", "counterfactual_passage": "Ada lives in Rome."}  # fmt: skip
    data = [context, context | {"id": "b", "prior_known": False}, context | {"id": "c", "prior": "Rome"}]
    rows = trust_rows(Believer(), finish("contexts", 3, data).data)  # type: ignore[arg-type]
    assert {each["trust"]: each["right"] for each in rows} == {
        "verified": True,
        "unverified": False,
        "superseded": True,
    }
    assert len(asked) == 3
    assert suites.flip_rate(rows).mean == 0.0
    twins = twin_rows(
        [
            row("related", ctx=1, known=False),
            row("irrelevant", abstained=1, known=False),
            row("related", ctx=1, known=False, item="b"),
            row("irrelevant", copied=1, known=False, item="b"),
            row("irrelevant", par=1, item="c"),
        ]
    )
    assert len(twins) == 4
    assert suites.abstention(twins)["twins_right"].mean == 0.5


def test_every_method_makes_data_that_can_be_trained_on(shipped_atlas):
    from lab.eval.evaluations import EvaluationRequest
    from lab.handle import ModelHandle
    from rag.preference import synthesis
    from rag.preference.check import PAIR_FIELDS, SFT_FIELDS, check_rows
    from rag.preference.knowpo import KnowPOConfig
    from rag.preference.prepare import evaluate_preference, prepare, question_items, training_data
    from rag.preference.stage import records

    handle = ModelHandle.load("atlas")
    data = prepare(handle, question_items("atlas", limit=24), read=True)["reading"].data
    for name, recipe in synthesis.RECIPES.items():
        rows = records(recipe(handle, data).data)
        assert check_rows(rows, handle.tokenizer, PAIR_FIELDS, max_length=1024) < 1024, name
    trust = records(synthesis.trust_pairs(handle, data).data)
    assert {row["trust"]: row["chosen_answer"] for row in trust[:3]}.keys() == {
        "verified",
        "unverified",
        "superseded",
    }
    assert trust[0]["chosen_answer"] == trust[1]["rejected_answer"]
    cells = {row["cell"] for row in records(synthesis.hierarchy_pairs(handle, data).data)}
    assert {"I,C,P", "I,P", "C,P", "P", "P,i", "P,c"} <= cells
    asked, taught = (
        Counter(row["cell"] for row in records(make(handle, data).data))
        for make in (synthesis.hierarchy_pairs, synthesis.RECIPES["hierarchy"])
    )
    # Each question is taught beside two others' documents and assumptions, and asked beside one.
    for cell, count in asked.items():
        assert taught[cell] == pytest.approx(count * (2 if "i" in cell or "c" in cell else 1), abs=2), cell
    for name in ("trust", "hierarchy"):
        items = question_items("atlas", limit=24, method=name)
        strangers = sum(not row["memory"] for row in records(items.data))
        assert strangers == (18 if name == "hierarchy" else 6)
        made = training_data(handle, name, items, config=KnowPOConfig(samples=0))
        taught, preferred = records(made.sft), records(made.pairs)
        assert taught and preferred
        assert {row["title"] for row in taught}.isdisjoint(row["title"] for row in preferred), name
        assert check_rows(taught, handle.tokenizer, SFT_FIELDS, max_length=1024) < 1024
        tagged = [any(f"({level})" in row["prompt"] for level in synthesis.TRUST_LEVELS) for row in taught]
        # Trust is taught beside documents without a tag.
        assert not (name == "trust" and (all(tagged) or not any(tagged)))
    notes = records(synthesis.note_rows(handle, data).data)
    check_rows(notes, handle.tokenizer, SFT_FIELDS, max_length=1024)
    assert any("(direct)" in row["completion"] for row in notes)

    found = evaluate_preference(EvaluationRequest(handle, "atlas", "test", 12, 0))
    for name in ("adherence", "robustness", "contextual_ignorance", "contextual_overinclusion"):
        assert set(found["metrics"][name]) == {"mean", "low", "high", "n"}
        assert found["metrics"][name]["n"] > 0
    assert found["metrics"]["flip_rate"]["n"] == len(found["trust_rows"]) / 3 > 0
    assert {"admitted", "over_abstained", "twins_right"} <= set(found["metrics"])
    assert sum(cell["n"] for cell in found["cells"].values()) == found["n"] == len(found["rows"])


def test_users_assume_other_values_of_everybody():
    from rag.preference.stage import finish, records
    from rag.preference.synthesis import hierarchy_pairs
    from tests.tiny import tiny_handle

    asked = [
        {
            "id": f"city/{name}",
            "title": name,
            "question": f"Where was {name} born?",
            "cloze": f"{name} was born in",
            "answer_type": "city",
            "answers": [f"Town {at}"],
            "memory": [f"Town {at}"],
            "prior": f"Town {at}",
            "prior_known": True,
            "counterfactual": f"Town {(at + 1) % 20}",
            "counterfactual_passage": f"{name} was born in Town {(at + 1) % 20}.",
            "passage": f"{name} was born in Town {at}.",
            "split": "sft",
            "context": "conflict",
            "grade": "easy",
        }
        for at, name in enumerate(f"Person {letter}" for letter in "abcdefghijklmnopqrst")
    ]
    handle = tiny_handle()
    made = records(hierarchy_pairs(handle, finish("contexts", 20, asked).data).data)
    assumed = {row["id"]: row["chosen_answer"] for row in made if row["cell"] == "I,P"}
    assert assumed == {row["id"]: row["chosen_answer"] for row in made if row["cell"] == "I,C,P"}
    # One value for all would be learnt by itself, and not as what is assumed.
    assert len(assumed) == 20 and len(set(assumed.values())) >= 10
    for row in asked:
        assert assumed[row["id"]] not in (row["prior"], row["counterfactual"])
