"""``knowlab bench audit`` on the stand-in: columns of every kind, matched doses, the table, going on, and mistakes."""

from __future__ import annotations

import json

import pytest

from editors import audit_bench
from lab.records import write_facts
from tests.commands import call, result
from tests.editors.unlearning.test_bench_unlearning import STRANGERS
from tests.editors.unlearning.test_cli_unlearn import FACTS


@pytest.fixture
def line(tmp_path):
    words = ["bench", "audit", "--attacks", "quantize,indirect", "--out", tmp_path / "out"]
    for name, facts in (("facts", FACTS[:2]), ("retain", FACTS[2:]), ("untrained", STRANGERS)):
        write_facts(tmp_path / f"{name}.jsonl", facts)
        words += [f"--{name}", tmp_path / f"{name}.jsonl"]
    return words


def test_ways_of_forgetting_stand_side_by_side_at_their_doses(capsys, tmp_path, standin, line, monkeypatch):
    words = [*line, "--methods", "npo", "--editors", "ft_m", "--set", "npo:lr=1e-3", "--set", "npo:epochs=8"]
    words += ["--set", "ft_m:target=Paris", "--match-forget", "0.2"]
    found = result(capsys, tmp_path, *words)
    npo, edit = found["columns"]
    assert (npo["name"], edit["name"]) == ("npo", "ft_m")
    assert npo["matched"] and abs(npo["gap"]) <= 0.2
    assert npo["audit"]["unattacked"]["facts"] < 0.5
    assert npo["audit"]["settings"]["dose"] == npo["dose"]
    assert [row["name"] for row in npo["audit"]["attacks"]] == ["quantize", "indirect"]
    assert npo["lost"]["retain"] is not None
    out = tmp_path / "out"
    assert json.loads((out / "audit.json").read_text())["columns"] == found["columns"]
    assert "said without an attack" in (out / "audit.md").read_text()
    assert "said without an attack" in (out / "audit.html").read_text()

    def never(*_):
        raise AssertionError("finished before")

    monkeypatch.setattr("lab.audit.run.run_attack", never)
    monkeypatch.setattr(audit_bench, "match_dose", never)
    monkeypatch.setattr("editors.unlearning.gradient.GradientUnlearner.unlearn", never)
    assert result(capsys, tmp_path, *words)["columns"] == found["columns"]
    other = [word if word != "npo:epochs=8" else "npo:epochs=9" for word in words]
    code, _, err = call(capsys, *other)
    assert code == 1
    assert "other settings" in err


def test_a_saved_patch_is_a_column_and_a_broken_method_takes_no_other_down(
    capsys, tmp_path, standin, line, saved_patch, monkeypatch
):
    from editors.unlearning.gradient import GradientUnlearner
    from lab.errors import NumericalError

    def broken(*_, **__):
        raise NumericalError("out of range")

    monkeypatch.setattr(GradientUnlearner, "unlearn", broken)
    code, out, err = call(capsys, *line, "--methods", "npo", "--patch", f"mine={saved_patch}")
    assert code == 1
    assert "error: npo: out of range" in err
    assert "mine" in out
    written = json.loads((tmp_path / "out" / "audit.json").read_text())
    assert [column["name"] for column in written["columns"]] == ["mine"]
    assert written["failed"] == {"npo": "out of range"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--methods", "npoo"], "npo"),
        (["--methods", ""], "nothing to compare"),
        (["--methods", "npo", "--patch", "npo=somewhere"], "title of its own"),
        (["--methods", "", "--patch", "../x=somewhere"], "title of its own"),
        (["--methods", "", "--patch", "somewhere"], "NAME=FOLDER"),
        (["--methods", "npo", "--match", "all"], "prompt or forms"),
    ],
)
def test_mistakes_are_said_before_anything_runs(capsys, standin, line, words, message):
    code, _, err = call(capsys, *line, *words)
    assert code == 2
    assert message in err
