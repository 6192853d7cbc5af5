"""Trained notes beside trained answers: equal tokens, no asked name in training, paired gains, and the command."""

from __future__ import annotations

import json

import pytest

from lab.atlas.world import load_world
from lab.errors import ConfigError
from lab.handle import ModelHandle
from lab.tokens import encode_ids
from rag.evaluation import Cell, atlas_questions
from rag.preference.notes_bench import NotesBench, gains, notes_data, pooled
from rag.preference.stage import records
from rag.preference.synthesis import note_rows
from tests.commands import call, result

CELL = Cell("noisy", "direct", "greedy")


def answers(right: int, n: int) -> list[dict[str, object]]:
    return [
        {"id": str(at), "right": at < right, "follows": None, "keeps": None, "known": True} for at in range(n)
    ]


def test_gains_compare_trained_with_trained_by_hand():
    notes = Cell("noisy", "con", "greedy")
    found = {
        ("base", CELL): answers(2, 10),
        ("base", notes): answers(3, 10),
        ("answers", CELL): answers(5, 10),
        ("notes", CELL): answers(1, 10),
        ("notes", notes): answers(9, 10),
    }
    rows = {(row["arm"], row["reader"]): row for row in gains(pooled([found, found]))}
    assert set(rows) == {("base", "con"), ("notes", "con")}
    assert rows["base", "con"]["gain"].mean == pytest.approx(0.1)
    trained = rows["notes", "con"]
    assert (trained["direct"].mean, trained["notes"].mean) == (0.5, 0.9)
    assert trained["gain"].mean == pytest.approx(0.4) and trained["gain"].n == 20


def test_both_arms_see_the_same_contexts_and_no_name_that_is_asked(shipped_atlas):
    handle = ModelHandle.load("atlas")
    questions = atlas_questions(load_world(), 20, 3)
    asked = [one for row in questions.values() for one in row]
    data = notes_data(handle, NotesBench(train_limit=20, samples=0), asked, 3)
    plain, noted = records(data["answers"].sft), records(data["notes"].sft)
    assert {row["cell"] for row in plain} == {"answer"}
    kinds = [row["cell"] for row in noted]
    assert abs(kinds.count("notes") - kinds.count("answer")) <= 1
    assert {row["id"] for row in noted} <= {row["id"] for row in plain}
    text = " ".join(one.question for one in asked)
    assert plain and not any(row["title"] in text for row in plain)
    # The same row is asked for notes in one arm and for the answer in the other.
    first = next(row for row in noted if row["cell"] == "notes")
    assert (
        first["completion"] not in {row["completion"] for row in plain} and "Answer:" in first["completion"]
    )
    with pytest.raises(ConfigError, match="between 0 and 1"):
        note_rows(handle, data["notes"].stages["reading"].data, share=1.5)


def test_the_command_trains_asks_and_goes_on(shipped_atlas, capsys, tmp_path):
    words = ["bench", "notes", "--limit", "3", "--train-limit", "6", "--samples", "0", "--conditions", "noisy,unanswerable"]  # fmt: skip
    words += ["--set", "sft_epochs=0.5", "--out", tmp_path / "out"]
    found = result(capsys, tmp_path, *words)
    assert {(row["arm"], row["condition"]) for row in found["gains"]} == {
        (arm, condition) for arm in ("base", "notes") for condition in ("noisy", "unanswerable")
    }
    assert all(cell["n"] == 3 for cell in found["cells"]) and len(found["cells"]) == 14
    spent = found["training"]["0"]
    assert spent["answers"]["tokens"] == pytest.approx(spent["notes"]["tokens"], rel=0.01)
    assert "Trained notes" in (tmp_path / "out" / "bench.html").read_text(encoding="utf-8")
    # Finished cells and adapters are not made again: a cell that says something else is believed.
    kept = next((tmp_path / "out" / "cells").glob("noisy-direct-*.json"))
    content = json.loads(kept.read_text(encoding="utf-8"))
    for row in content["rows"]:
        row["right"] = not row["right"]
    kept.write_text(json.dumps(content), encoding="utf-8")
    assert result(capsys, tmp_path, *words)["cells"] != found["cells"]
    # Adapters know no name that could be asked, so that they serve other conditions and rules too.
    trained = list((tmp_path / "out" / "adapters").iterdir())
    other = result(capsys, tmp_path, *words, "--conditions", "agree", "--decoding", "cad")
    assert {cell["condition"] for cell in other["cells"]} == {"agree"} and other["training"] == found[
        "training"
    ]
    assert list((tmp_path / "out" / "adapters").iterdir()) == trained and len(trained) == 1
    code, _, err = call(capsys, *words[:-2], "--conditions", "nothing", "--out", tmp_path / "o")
    assert code == 2 and "nothing" in err


def test_tokens_are_those_of_prompt_and_completion(shipped_atlas):
    from rag.preference.control import trained_tokens

    tokenizer = ModelHandle.load("atlas").tokenizer
    rows = [{"prompt": "Q: Where?\nA:", "completion": " Rome.", "other": " no"}]
    once = len(encode_ids(tokenizer, "Q: Where?\nA: Rome."))
    assert trained_tokens(tokenizer, rows, ("completion",)) == once
    assert trained_tokens(tokenizer, rows, ("completion", "other")) == once + len(
        encode_ids(tokenizer, "Q: Where?\nA: no")
    )
