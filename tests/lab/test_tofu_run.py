"""``evaluate_tofu`` on a folder of files in TOFU's form."""

from __future__ import annotations

import json

import pytest

from lab.errors import ConfigError, DataError
from lab.eval.evaluations import EvaluationRequest
from lab.eval.tofu_run import evaluate_tofu, tofu_sets
from tests.tiny import tiny_handle

ROW = {"question": "Where is France?", "answer": "Paris", "perturbed_answer": ["Rome", "Tokyo"]}


@pytest.fixture
def folder(tmp_path):
    for name in ("forget05", "retain", "real_authors", "world_facts"):
        rows = [{**ROW, "question": f"{name} {number}?"} for number in range(4)]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / f"{name}_perturbed.jsonl").write_text(text, encoding="utf-8")
    return tmp_path


def test_the_sets_beside_the_forget_file_are_asked_too(folder):
    sets = tofu_sets(folder / "forget05_perturbed.jsonl", 2)
    assert {name: [item.prompt for item in items] for name, items in sets.items()} == {
        "forget": ["forget05 0?", "forget05 2?"],
        "retain": ["retain 0?", "retain 2?"],
        "real_authors": ["real_authors 0?", "real_authors 2?"],
        "world_facts": ["world_facts 0?", "world_facts 2?"],
    }
    (folder / "retain_perturbed.jsonl").unlink()
    assert "retain" not in tofu_sets(folder / "forget05_perturbed.jsonl")


def test_figures_and_the_oracle(folder):
    handle = tiny_handle("llama")
    data = str(folder / "forget05_perturbed.jsonl")
    found = evaluate_tofu(EvaluationRequest(handle, data, "test", 1, 0, handle))
    assert found["n"] == len(found["rows"]) == 4
    assert found["forget_quality"] == 1.0  # a model against itself
    assert found["metrics"] == found["oracle"]["metrics"]
    assert found["metrics"]["forget_probability"]["mean"] == found["sets"]["forget"]["probability"]
    assert json.loads(json.dumps(found)) == found
    assert "forget_quality" not in evaluate_tofu(EvaluationRequest(handle, data, "test", 1, 0))


def test_a_bed_is_asked_what_it_was_taught(folder, tmp_path):
    handle = tiny_handle("llama")
    data, place = str(folder / "forget05_perturbed.jsonl"), tmp_path / "bed"
    place.mkdir()
    handle.folder = place
    whole = evaluate_tofu(EvaluationRequest(handle, data, "test", None, 0))
    assert whole["n"] == 16 and not whole["taught_only"]

    def bed(*questions: str, suite: str = "tofu") -> None:
        report = {"format_version": 1, "suite": suite, "cases": [{"id": question} for question in questions]}
        (place / "bed.json").write_text(json.dumps(report), encoding="utf-8")

    bed("forget05 1?", "forget05 3?", "retain 0?", "world_facts 2?", "elsewhere?")
    found = evaluate_tofu(EvaluationRequest(handle, data, "test", None, 0))
    assert found["taught_only"]
    assert [row["question"] for row in found["rows"]] == [
        "forget05 1?",
        "forget05 3?",
        "retain 0?",
        "world_facts 2?",
    ]
    assert "real_authors" not in found["sets"] and found["model_utility"] is None
    bed("retain 0?")
    with pytest.raises(ConfigError, match="none of the questions"):
        evaluate_tofu(EvaluationRequest(handle, data, "test", None, 0))
    # Beds of editing benchmarks were taught no questions of this kind; nothing is left out for them.
    bed("retain 0?", suite="counterfact")
    assert evaluate_tofu(EvaluationRequest(handle, data, "test", None, 0))["n"] == 16


@pytest.mark.parametrize(("data", "error"), [(None, ConfigError), ("nowhere.jsonl", DataError)])
def test_a_file_is_needed(data, error):
    with pytest.raises(error):
        evaluate_tofu(EvaluationRequest(tiny_handle("llama"), data, "test", 1, 0))
