"""Every example runs, with small arguments, on a small model that stands in for the shipped ones."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest

from lab.records import Fact, write_facts
from tests.standin import CAPITALS

# Run in tests/rag/test_examples.py.
RAG_EXAMPLES = {
    "ask_a_folder",
    "chroma_server",
    "edit_meets_document",
    "langchain_chain",
    "notes_against_noise",
}
EXAMPLES = Path(__file__).parents[1] / "examples"


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def knowedit_file(tmp_path: Path) -> Path:
    """Three rows in the shape of KnowEdit's ZsRE file."""
    rows = []
    for country, other in (("France", "Japan"), ("Kenya", "Italy"), ("Peru", "Egypt")):
        rows.append(
            {
                "subject": country,
                "prompt": f"The capital of {country} is",
                "target_new": CAPITALS[other],
                "ground_truth": [CAPITALS[country]],
                "rephrase_prompt": f"{country} has its capital in",
                "locality": {
                    "Relation_Specificity": [
                        {"prompt": "The capital of Spain is", "ground_truth": [["Madrid"]]}
                    ]
                },
                "portability": {
                    "Reasoning": [
                        {"prompt": f"Fact: the capital of {country} is", "ground_truth": [[CAPITALS[other]]]}
                    ]
                },
            }
        )
    file = tmp_path / "ZsRE-test-all.json"
    file.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    return file


def test_every_example_has_a_test():
    tested = {
        "audit_a_model",
        "edit_a_fact",
        "knowedit_benchmark",
        "train_knowpo",
        "unlearn_a_set",
    } | RAG_EXAMPLES
    assert {path.stem for path in EXAMPLES.glob("*.py")} == tested


def test_edit_a_fact(standin, tmp_path, capsys):
    example("edit_a_fact").main(["--out", str(tmp_path / "patch")])
    said = capsys.readouterr().out
    assert " before: The capital of France is -> Paris" in said
    assert " undone: The capital of France is -> Paris" in said
    after = {
        moment: said.split(f" {moment}: The capital of France is ->")[1].splitlines()[0]
        for moment in ("edited", "loaded")
    }
    assert after["edited"] == after["loaded"]
    assert "bit-identical again: True" in said
    assert (tmp_path / "patch" / "patch.json").is_file()


def test_knowedit_benchmark(standin, tmp_path, knowedit_file, capsys):
    out = tmp_path / "reports"
    words = [
        "--data",
        str(knowedit_file),
        "--editor",
        "rome",
        "--limit",
        "2",
        "--no-fluency",
        "--out",
        str(out),
    ]
    (report,) = example("knowedit_benchmark").main(words)
    assert report.n == 2
    assert report.known == 2
    assert all(row.p_after > row.p_before for row in report.cases)
    assert {path.name for path in out.iterdir()} == {"report.json", "report.md", "report.html"}


def test_audit_a_model(standin, saved_patch, tmp_path, capsys):
    page = tmp_path / "audit.html"
    words = ["--patch", str(saved_patch), "--attacks", "quantize", "--limit", "3", "--html", str(page)]
    example("audit_a_model").main(words)
    said = capsys.readouterr().out
    assert said.count("worst case") == 2
    assert "original" in said
    assert page.read_text(encoding="utf-8").startswith("<!doctype html>")


def test_unlearn_a_set(standin, tmp_path, capsys):
    facts = [
        Fact(country, "capital", city, "The capital of {} is", id=country)
        for country, city in CAPITALS.items()
    ]
    strangers = [Fact("Zorvania", "capital", "Paris", "The capital of {} is", id="Zorvania")]
    words = ["--methods", "npo,graddiff", "--epochs", "3", "--out", str(tmp_path / "out")]
    for name, chosen in (("forget", facts[:2]), ("retain", facts[2:]), ("untrained", strangers)):
        write_facts(tmp_path / f"{name}.jsonl", chosen)
        words += [f"--{name}", str(tmp_path / f"{name}.jsonl")]
    found = example("unlearn_a_set").main(words)
    assert {result.method for result in found.results} == {"npo", "graddiff"}
    said = capsys.readouterr().out
    assert "npo: " in said and "graddiff: " in said
    assert "<h2>Forms</h2>" in (tmp_path / "out" / "unlearning.html").read_text(encoding="utf-8")
