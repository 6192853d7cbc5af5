"""``knowlab bench unlearning`` on the stand-in: matched doses, what is lost, going on, and mistakes."""

from __future__ import annotations

import csv
import json

import pytest

from editors.unlearning.bench import UnlearnWorkshop
from editors.unlearning.pooling import pool
from lab.data.unlearning import facts_of
from lab.records import Fact, write_facts
from tests.commands import call, result
from tests.editors.unlearning.test_cli_unlearn import FACTS
from tests.standin import CAPITALS

STRANGERS = [
    Fact(name, "capital", city, "The capital of {} is", id=f"capital/{name}")
    for name, city in (("Zorvania", "Paris"), ("Qumbul", "Lima"), ("Ostrel", "Tokyo"))
]


@pytest.fixture
def line(tmp_path):
    words = ["bench", "unlearning"]
    for name, facts in (
        ("forget", FACTS[:2]),
        ("retain", FACTS[2:7]),
        ("utility", FACTS[7:]),
        ("untrained", STRANGERS),
    ):
        write_facts(tmp_path / f"{name}.jsonl", facts)
        words += [f"--{name}", tmp_path / f"{name}.jsonl"]
    return [*words, "--out", tmp_path / "out", "--set", "lr=1e-3"]


def test_methods_are_matched_measured_and_kept(capsys, tmp_path, standin, line, monkeypatch):
    words = [*line, "--methods", "npo,ga", "--seeds", "2", "--set", "npo:epochs=8", "--set", "ga:max_steps=1"]
    words += ["--match-forget", "0.2", "--most-dose", "1"]
    document = result(capsys, tmp_path, *words)
    # One step of ascent forgets next to nothing, and may not be scaled up: it is listed, not ranked.
    assert [entry["method"] for entry in document["ranked"]] == ["npo"]
    assert [entry["method"] for entry in document["unmatched"]] == ["ga"]
    assert [(row["method"], row["seed"]) for row in document["rows"]] == [
        ("npo", 0),
        ("ga", 0),
        ("npo", 1),
        ("ga", 1),
    ]
    npo, ga = document["rows"][:2]
    assert npo["matched"] and 0 < npo["dose"] <= 1 and abs(npo["gap"]) <= 0.2
    assert not ga["matched"] and ga["dose"] is None and ga["gap"] > 0.2
    form = npo["forms"]["prompt"]
    assert form["before"] > 0.9 > form["after"]
    assert form["after"] - form["reference"] == pytest.approx(npo["gap"])
    assert npo["reference"] == "untrained"
    assert [point["dose"] for point in npo["curve"]] == sorted({0.0, 0.25, 0.5, 0.75, 1.0, npo["dose"]})
    assert npo["curve"][0]["forget"] == pytest.approx(form["before"])
    assert npo["seconds"] > 0 and npo["peak_mb"] > 0 and npo["norm"] > 0
    entry = document["ranked"][0]
    assert (
        entry["retain"]["drop"]["low"] <= entry["retain"]["drop"]["mean"] <= entry["retain"]["drop"]["high"]
    )
    assert entry["utility"]["after"]["n"] == 1 and entry["seeds"] == [0, 1]
    out = tmp_path / "out"
    assert {path.name for path in out.glob("unlearning.*")} == {
        f"unlearning.{form}" for form in ("json", "html", "md", "csv", "tex")
    }
    assert json.loads((out / "unlearning.json").read_text())["ranked"] == document["ranked"]
    page = (out / "unlearning.html").read_text(encoding="utf-8")
    assert "not matched" in page and page.count("data:image/png;base64,") == 1
    points = list(csv.DictReader((out / "unlearning.csv").open()))
    assert len(points) == sum(len(row["curve"]) for row in document["rows"])
    assert "reference" in (out / "unlearning.md").read_text()
    assert r"\toprule" in (out / "unlearning.tex").read_text()

    def no_more(self, cell, progress=None):
        raise AssertionError(f"{cell} was finished before")

    monkeypatch.setattr(UnlearnWorkshop, "run", no_more)
    again = result(capsys, tmp_path, *words)
    assert again["kept"] == 4
    assert again["ranked"] == document["ranked"]


def test_an_oracle_is_the_reference_where_it_is_named(capsys, tmp_path, standin, standin_folder, line):
    # The untouched model as its own oracle: there is nothing to forget, said once.
    place = line.index("--untrained")
    code, _, err = call(capsys, *line[:place], *line[place + 2 :], "--oracle", standin_folder / "atlas")
    assert code == 2
    assert "nothing to forget" in err and "oracle" in err


@pytest.mark.parametrize(
    ("change", "code", "said"),
    [
        (["--methods", "npoo"], 2, "npo"),
        (["--methods", ","], 2, "at least one method"),
        (["--set", "epoch=3"], 1, "epochs"),
    ],
)
def test_mistakes(change, code, said, capsys, standin, line):
    found, _, err = call(capsys, *line, *change)
    assert found == code
    assert said in err


def test_forgetting_needs_a_reference(capsys, standin, line):
    place = line.index("--untrained")
    code, _, err = call(capsys, *line[:place], *line[place + 2 :])
    assert code == 2
    assert "--oracle" in err and "--untrained" in err


def row(method, seed, matched, drop, group="retain"):
    facts = {name: [] for name in ("retain", "neighbor", "utility")}
    facts[group] = [{"id": "a", "before": [0.9, 1.0], "after": [0.9 - drop, 0.0]}]
    common = {
        "dose": 1.0,
        "gap": 0.0,
        "form_independence": None,
        "seconds": 1.0,
        "peak_mb": None,
        "norm": 1.0,
    }
    return {
        "method": method,
        "seed": seed,
        "matched": matched,
        "facts": facts,
        "forms": {"prompt": {"after": 0.1}},
    } | common


def test_methods_are_ranked_by_what_they_lose_and_only_where_every_seed_matched():
    found = pool(
        [
            row("a", 0, True, 0.5),
            row("b", 0, True, 0.1),
            row("c", 0, True, 0.0),
            row("c", 1, False, 0.0),
            {"method": "d", "error": "x"},
        ]
    )
    assert [(result.method, result.matched) for result in found] == [("b", True), ("a", True), ("c", False)]
    assert found[0].drop == pytest.approx(0.1)
    two = pool([row("a", 0, True, 0.2), row("a", 1, True, 0.4)])[0]
    # The same fact under two seeds counts once, with its mean.
    assert (two.kept["retain"]["drop"].mean, two.kept["retain"]["drop"].n) == (pytest.approx(0.3), 1)


def test_questions_and_answers_are_facts(tmp_path):
    file = tmp_path / "forget.jsonl"
    file.write_text('{"question": "What is {}?", "answer": "Nothing."}\n', encoding="utf-8")
    (fact,) = facts_of(file)
    assert (fact.text, fact.object) == ("Question: What is {}?\nAnswer:", "Nothing.")
    write_facts(tmp_path / "facts.jsonl", FACTS[:2])
    assert facts_of(tmp_path / "facts.jsonl") == tuple(FACTS[:2])
    assert len(CAPITALS) == len(FACTS)
