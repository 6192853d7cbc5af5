"""``knowlab bench sadr``: shares by hand, the runs that are planned, and the command with its files."""

from __future__ import annotations

import json

import pytest

from editors.bench import BenchOptions, Workshop
from editors.cli_bench_sadr import numbers
from editors.sadr_curve import entries, plan, share_regained, table_lines
from lab.errors import ConfigError
from tests.commands import result
from tests.test_cli_editing import ROWS, counterfact_file


def cases(after, before=1.0):
    return [
        {
            "id": str(number),
            "values": {"relation": list(values)},
            "before": {"relation": [before] * len(values)},
        }
        for number, values in enumerate(after)
    ]


def test_a_share_is_what_the_loss_of_the_same_cases_has_become():
    plain = cases([(0, 0), (1, 1), (0, 1), (1, 0)] * 10)
    half = cases([(1, 0), (1, 1), (0, 1), (1, 1)] * 10)
    found = share_regained(plain, half, "relation")
    # 40 of 80 prompts lost, then 20.
    assert (found.mean, found.n) == (pytest.approx(0.5), 40)
    assert found.low is not None and found.high is not None and found.low < 0.5 < found.high < 0.75
    assert share_regained(plain, plain, "relation").mean == 0
    same = share_regained(plain, plain, "relation")
    assert (same.low, same.high) == (0, 0), "paired: the same cases have the same loss in every resample"
    worse = share_regained(half, plain, "relation")
    assert worse.mean == pytest.approx(-1)
    everything = share_regained(plain, cases([(1, 1)] * 40), "relation")
    assert (everything.mean, everything.low, everything.high) == (1, 1, 1)
    assert share_regained(list(reversed(plain)), half, "relation").mean == pytest.approx(0.5)


def test_a_share_of_nothing_has_no_figure():
    kept = cases([(1, 1)] * 12)
    none = share_regained(kept, kept, "relation")
    assert (none.mean, none.low, none.n) == (None, None, 12)
    hardly = share_regained(cases([(1, 0)] + [(1, 1)] * 11), kept, "relation")
    assert hardly.mean is None, "one loss among twelve cases is not in every resample"
    assert share_regained(kept, kept, "elsewhere").n == 0
    with pytest.raises(ConfigError, match="before"):
        share_regained([{**kept[0], "before": {}}], kept, "relation")


def test_the_plan_has_both_references_and_a_curve():
    options = BenchOptions(settings={"": {"steps": 3}})
    found = plan(["rome", "memit"], [3.0, 0.1, 3.0], "atlas", "atlas", 0, options)
    assert [(one.name, one.cell.editor) for one in found[:4]] == [
        ("rome", "rome"),
        ("rome, all steps", "rome"),
        ("rome+sadr γ=0.1", "rome+sadr"),
        ("rome+sadr γ=3", "rome+sadr"),
    ]
    assert [one.options.settings_of(one.cell.editor) for one in found[:3]] == [
        {"steps": 3},
        {"steps": 3, "stop_below": 0.0},
        {"steps": 3, "gamma": 0.1},
    ]
    assert len(found) == 8
    whole = plan(["rome"], [1.0], "atlas", "atlas", 0, options, all_steps=True)[2]
    assert whole.options.settings_of("rome+sadr") == {"steps": 3, "gamma": 1.0, "stop_below": 0.0}
    for editors, gammas, said in (
        ([], [1.0], "at least"),
        (["ft_m"], [1.0], "ft_m"),
        (["rome"], [0.0], "above 0"),
    ):
        with pytest.raises(ConfigError, match=said):
            plan(editors, gammas, "atlas", "atlas", 0, options)
    with pytest.raises(ConfigError, match="numbers"):
        numbers("1,two")


def test_lines_carry_figures_and_shares():
    variants = plan(["rome"], [1.0], "atlas", "atlas", 0, BenchOptions())
    figure = {"mean": 0.5, "low": 0.4, "high": 0.6, "n": 40}
    after = ([(0, 1)] * 40, [(0, 0)] * 40, [(0.5, 1)] * 40)
    rows = [
        {"n": 40, "metrics": {"efficacy": figure, "relation": figure}, "before": {"relation": figure}}
        | {"seconds_per_edit": 0.1, "cases": cases(values)}
        | {"attention_drift": {"max_head_drift": [0.1, 0.25]} if values is after[2] else None}
        for values in after
    ]
    found = entries(variants, rows)
    assert found[0]["regained"] == {} == found[1]["regained"]
    assert found[2]["regained"]["plain"]["relation"]["mean"] == pytest.approx(0.5)
    assert found[2]["regained"]["all_steps"]["relation"]["mean"] == pytest.approx(0.75)
    heads, lines = table_lines(found)
    assert heads[:3] == ["run", "efficacy", "relation"]
    assert lines[0][-2:] == ["–", "–"]
    assert lines[2][-2].startswith("0.750") and lines[2][-1] == "0.250"


def test_the_command_writes_its_files_and_goes_on(capsys, tmp_path, standin, monkeypatch):
    line = ["bench", "sadr", "--editors", "rome_identity", "--gammas", "0.1,3", "--set", "steps=3"]
    line += ["--suite", "counterfact", "--data", counterfact_file(tmp_path, ROWS), "--limit", "2"]
    line += ["--out", tmp_path / "out"]
    found = result(capsys, tmp_path, *line)
    assert [row["kind"] for row in found["rows"]] == ["plain", "all_steps", "sadr", "sadr"]
    assert found["command"] == "bench sadr" and found["kept"] == 0
    out = tmp_path / "out"
    assert json.loads((out / "sadr.json").read_text())["rows"] == found["rows"]
    drifts = [f"drift-rome_identity-{end}" for end in ("plain", "all_steps", "sadr-0.1", "sadr-3")]
    for name in ("curve", *drifts):
        assert (out / f"{name}.png").read_bytes()[:4] == b"\x89PNG"
    assert (out / "sadr.html").read_text().count("data:image/png") == 5
    assert all(row["attention_drift"]["prompts"] == 2 for row in found["rows"])
    assert len(list((out / "cells").iterdir())) == 4

    def no_more(self, cell):
        raise AssertionError(f"{cell} was finished before")

    monkeypatch.setattr(Workshop, "run", no_more)
    assert result(capsys, tmp_path, *line)["kept"] == 4
