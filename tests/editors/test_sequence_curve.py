"""``knowlab bench sequence``: the plan, the verdict, and the command that goes on where it was interrupted."""

from __future__ import annotations

import json

import pytest

from editors.sequence_curve import half_of, plan_sequence, table_lines, verdict
from editors.spread import SpreadEditor
from lab.data.cases import CaseProbe, EditCase
from lab.errors import ConfigError, DataError
from lab.records import EditRequest
from tests.commands import result
from tests.test_cli_editing import ROWS, counterfact_file, counterfact_row


def case(name, *neighbors):
    request = EditRequest(name, "The capital of {} is", name, "Rome", "Paris")
    probes = [
        CaseProbe("rewrite", request.text, ("Rome",), "Paris"),
        CaseProbe("qa", "?", ("Rome",), "Paris"),
    ]
    probes += [
        CaseProbe("neighborhood", f"The capital of {other} is", ("Paris",), "Rome") for other in neighbors
    ]
    return EditCase(name, "atlas", (request,), tuple(probes), (("Paris",),), "here", 1)


def test_the_sequence_is_as_long_as_the_null_space_and_asks_no_edited_neighbor():
    assert half_of({0: 540, 1: 613}, 25) == 275, "half of the smaller rank, in whole batches"
    assert half_of({0: 90}, 25) == 200, "never under 200"
    cases = [case(str(number), str(number + 1), f"far {number}") for number in range(9)]
    plan = plan_sequence(cases, 4, 2, {0: 8})
    assert (plan.edits, [len(batch) for batch in plan.batches]) == (8, [2, 2, 2, 2])
    assert {2, 4} <= set(plan.marks) and max(plan.marks) == 4
    asked = [[(probe.group, probe.prompt) for probe in each.probes] for each in plan.batches[0]]
    # Case 1 edits what case 0 would ask; the question is not plotted.
    assert asked[0] == [("rewrite", "The capital of 0 is"), ("neighborhood", "The capital of far 0 is")]
    last = [probe.prompt for probe in plan.batches[-1][-1].probes]
    assert "The capital of 8 is" in last, "the ninth case is not edited, so its old answer is right"
    assert plan_sequence(cases[:7], 4, 2, {}).edits == 6, "shorter than 2N where cases run out"
    with pytest.raises(DataError, match="needs 4"):
        plan_sequence(cases[:3], 4, 2, {})
    with pytest.raises(ConfigError, match="multiple"):
        plan_sequence(cases, 5, 2, {})


def row(edits, efficacy, neighborhood):
    def figure(mean):
        return {"mean": mean, "low": mean, "high": mean, "n": 9}

    now = {"efficacy": figure(efficacy), "neighborhood": figure(neighborhood)}
    return {
        "edits": edits,
        "metrics": now,
        "before": {"neighborhood": figure(0.97)},
        "first": now,
        "latest": now,
    }


def test_a_sequence_breaks_where_efficacy_or_neighborhood_goes():
    good, forgets, leaks = row(25, 0.95, 0.93), row(50, 0.89, 0.97), row(75, 1.0, 0.91)
    assert verdict([good, {"edits": 30, "seconds": 1.0}], 25) == {
        "holds_at_n": True,
        "holds_until": 25,
        "breaks_at": None,
    }
    assert verdict([good, forgets, leaks], 50) == {"holds_at_n": False, "holds_until": 25, "breaks_at": 50}
    assert verdict([leaks], 75) == {"holds_at_n": False, "holds_until": None, "breaks_at": 75}
    broken = {"edits": 50, "broken": "NaN"}
    assert verdict([good, broken], 25) == {"holds_at_n": True, "holds_until": 25, "breaks_at": 50}
    heads, lines = table_lines({"memit": [good, broken]})
    assert {len(line) for line in lines} == {len(heads)}
    assert lines[1][:3] == ["memit", "50", "NaN"]


def test_the_command_writes_its_files_and_goes_on(capsys, tmp_path, standin, monkeypatch):
    rows = [*ROWS, counterfact_row(4, "Cuba", "Cairo")]
    line = ["bench", "sequence", "--editors", "memit,alphaedit", "--batch", "1", "--half", "2"]
    line += ["--set", "steps=2", "--set", "layers=[0,1]", "--set", "alphaedit:threshold_mode=relative"]
    line += ["--set", "alphaedit:nullspace_threshold=0.5", "--suite", "counterfact"]
    line += ["--data", counterfact_file(tmp_path, rows), "--out", tmp_path / "out"]
    found = result(capsys, tmp_path, *line)
    assert (found["command"], found["n"], found["edits"]) == ("bench sequence", 2, 4)
    assert [(each["editor"], each["edits"]) for each in found["rows"]] == [
        (name, edits) for name in ("memit", "alphaedit") for edits in (1, 2, 3, 4)
    ]
    last = found["rows"][-1]
    assert last["metrics"]["efficacy"]["n"] == 4 and last["first"]["efficacy"]["n"] == 1
    assert set(found["verdict"]) == {"memit", "alphaedit"}
    out = tmp_path / "out"
    assert json.loads((out / "sequence.json").read_text())["rows"] == found["rows"]
    assert (out / "curve.png").read_bytes()[:4] == b"\x89PNG"
    assert (out / "sequence.html").read_text().count("data:image/png") == 1

    # The last batch of one editor is lost; only that one is made again.
    (lost,) = (out / "cells").glob("memit-*-4.json")
    lost.unlink()
    monkeypatch.setattr(
        SpreadEditor, "edit", lambda *args, **options: pytest.fail("a finished batch is edited again")
    )
    again = result(capsys, tmp_path, *line)
    assert [each["metrics"] for each in again["rows"]] == [each["metrics"] for each in found["rows"]]
