"""``knowlab bench editing``: the document, the files, going on after an interruption, and mistakes."""

from __future__ import annotations

import csv
import json

import pytest

from editors.bench import Workshop
from editors.cli_bench import settings_by_editor, sources
from lab.errors import ConfigError
from tests.commands import call, result
from tests.test_cli_editing import ROWS, counterfact_file

QUICK = ["--set", "steps=3", "--no-fluency", "--suite", "counterfact"]


def words(tmp_path, *more):
    data = counterfact_file(tmp_path, ROWS)
    return ["bench", "editing", *QUICK, "--data", data, "--out", tmp_path / "out", *more]


def no_more(self, cell):
    raise AssertionError(f"{cell} was finished before")


def test_document_files_and_a_second_run(capsys, tmp_path, standin, monkeypatch):
    line = words(
        tmp_path,
        "--editors",
        "rome_identity,rome_identity+sadr",
        "--limit",
        "2",
        "--seed",
        "5",
        "--seed",
        "6",
    )
    document = result(capsys, tmp_path, *line)
    assert (document["command"], document["seed"], document["seeds"]) == ("bench editing", 5, [5, 6])
    rows = document["rows"]
    assert [(row["editor"], row["seed"]) for row in rows] == [
        ("rome_identity", 5),
        ("rome_identity+sadr", 5),
        ("rome_identity", 6),
        ("rome_identity+sadr", 6),
    ]
    for row in rows:
        assert (row["suite"], row["model"], row["n"], row["edits"]) == ("counterfact", "atlas", 2, 2)
        assert row["seconds_per_edit"] > 0
        assert row["peak_mb"] > 10
        assert all(set(metric) == {"mean", "low", "high", "n"} for metric in row["metrics"].values())
        assert {"efficacy", "neighborhood", "score"} <= set(row["metrics"])
        assert len(row["attention_drift"]["max_head_drift"]) == 3
        assert "cases" not in row
    assert [(entry["editor"], entry["seeds"]) for entry in document["pooled"]] == [
        ("rome_identity", [5, 6]),
        ("rome_identity+sadr", [5, 6]),
    ]
    assert all(2 <= entry["n"] <= 3 for entry in document["pooled"])
    assert (document["kept"], document["failed"]) == (0, [])

    out = tmp_path / "out"
    assert {path.name for path in out.glob("bench.*")} == {
        f"bench.{form}" for form in ("json", "html", "md", "csv", "tex")
    }
    assert json.loads((out / "bench.json").read_text())["rows"] == rows
    assert len(list((out / "cells").iterdir())) == 4
    page = (out / "bench.html").read_text(encoding="utf-8")
    assert page.count("data:image/png;base64,") == 6, "cost, metrics, four maps of drift"
    assert "http" not in page.split("base64,")[0]
    lines = list(csv.DictReader((out / "bench.csv").open()))
    assert {line["metric"] for line in lines} == set(rows[0]["metrics"])
    assert (out / "bench.md").read_text().count("rome_identity+sadr") >= 2
    assert r"\toprule" in (out / "bench.tex").read_text()

    monkeypatch.setattr(Workshop, "run", no_more)
    again = result(capsys, tmp_path, *line)
    assert again["kept"] == 4
    assert again["rows"] == rows
    code, _, err = call(capsys, *words(tmp_path, "--editors", "rome_identity", "--limit", "1"))
    assert code == 1
    assert "was finished before" in err, "another limit is another run"


def test_an_interrupted_comparison_goes_on(capsys, tmp_path, standin, monkeypatch):
    real, seen = Workshop.run, []

    def interrupted(self, cell):
        if len(seen) == 1:
            raise KeyboardInterrupt
        seen.append(cell)
        return real(self, cell)

    line = words(tmp_path, "--editors", "rome_identity,rome_identity+sadr", "--limit", "1")
    monkeypatch.setattr(Workshop, "run", interrupted)
    code, _, _ = call(capsys, *line)
    assert code == 130
    (kept,) = (tmp_path / "out" / "cells").iterdir()
    assert kept.name.startswith("rome_identity-counterfact-atlas-0-")
    monkeypatch.setattr(Workshop, "run", lambda self, cell: seen.append(cell) or real(self, cell))
    document = result(capsys, tmp_path, *line)
    assert document["kept"] == 1
    assert [cell.editor for cell in seen] == ["rome_identity", "rome_identity+sadr"]
    # A file that was damaged is made again.
    kept.write_text("{")
    assert result(capsys, tmp_path, *line)["kept"] == 1


def test_a_sequence_shows_how_edits_hold(capsys, tmp_path, standin):
    document = result(
        capsys, tmp_path, *words(tmp_path, "--editors", "rome_identity", "--protocol", "sequential")
    )
    (row,) = document["rows"]
    assert [len(moment["held"]) for moment in row["retention"]["moments"]] == [1, 2, 3]
    assert set(row["retention"]["by_age"]["0"]) == {"mean", "low", "high", "n"}
    assert set(row["extra"]["right_after_edit"]) == set(row["metrics"])
    page = (tmp_path / "out" / "bench.html").read_text(encoding="utf-8")
    assert "retention curves" in page
    (entry,) = document["pooled"]
    assert entry["right_after_edit"] == row["extra"]["right_after_edit"]
    heads = (tmp_path / "out" / "bench.md").read_text().split("| metric |")[1].splitlines()[0]
    assert heads == " before | rome_identity right after | rome_identity after all | n |"


def test_a_run_that_fails_does_not_take_the_others_down(capsys, tmp_path, standin):
    line = words(tmp_path, "--editors", "rome_identity,r_rome", "--set", "r_rome:lr=-1", "--limit", "1")
    file = tmp_path / "result.json"
    code, _, err = call(capsys, *line, "--json", file)
    document = json.loads(file.read_text())
    assert code == 1
    assert "lr must be positive" in err
    assert [row["editor"] for row in document["rows"]] == ["rome_identity"]
    assert [(row["editor"], "lr must" in row["error"]) for row in document["failed"]] == [("r_rome", True)]
    assert "lr must be positive" in (tmp_path / "out" / "bench.md").read_text()
    assert len(list((tmp_path / "out" / "cells").iterdir())) == 1


def test_ray_that_is_not_installed_is_named(capsys, tmp_path, standin, monkeypatch):
    import importlib

    real = importlib.import_module

    def absent(name, *rest):
        if name == "ray":
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(importlib, "import_module", absent)
    code, _, err = call(capsys, *words(tmp_path, "--editors", "rome_identity", "--ray", "local"))
    assert code == 1
    assert "knowlab[bench]" in err


@pytest.mark.parametrize(
    ("more", "code", "named"),
    [
        (["--editors", "roem"], 2, "rome"),
        (["--editors", ","], 2, "editor"),
        (["--suite", "contrafact"], 2, "counterfact"),
        (["--suite", "zsre"], 2, "SUITE=FILE"),
        (["--set", "memit:steps=3"], 2, "memit"),
        (["--data", "counterfact=other.json"], 2, "two files"),
    ],
    ids=["editor", "no editor", "suite", "data", "setting", "twice"],
)
def test_mistakes_stop_before_any_work(more, code, named, capsys, tmp_path, standin, monkeypatch):
    monkeypatch.setattr(Workshop, "run", no_more)
    found, _, err = call(capsys, *words(tmp_path, *more))
    assert found == code
    assert named in err
    assert len(err.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_a_full_folder_is_left_alone(capsys, tmp_path, standin):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine").write_text("mine")
    code, _, err = call(capsys, *words(tmp_path, "--editors", "rome_identity"))
    assert code == 1
    assert "--force" in err


def test_words_of_data_and_settings():
    assert sources(["a=b.json"], ["atlas", "zsre"]) == {"zsre": "a=b.json"}
    assert sources(["zsre=b.json", "sadr=c.json"], ["zsre", "sadr"]) == {"zsre": "b.json", "sadr": "c.json"}
    with pytest.raises(ConfigError, match="built in"):
        sources(["atlas=b.json"], ["atlas", "zsre"])
    with pytest.raises(ConfigError, match="no suite"):
        sources(["b.json"], ["atlas"])
    found = settings_by_editor(["steps=3", "rome:lr=0.5", 'rome:fact_token="last"'], ["rome", "memit"])
    assert found == {"": {"steps": 3}, "rome": {"lr": 0.5, "fact_token": "last"}}
