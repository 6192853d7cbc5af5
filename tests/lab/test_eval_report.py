"""Reports in every form: complete, escaped, self-contained, and honest about what is missing."""

from __future__ import annotations

import csv
import io
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from lab.data import Skip
from lab.errors import ConfigError
from lab.eval import CaseRow, Estimate, Report, save_reports
from lab.eval.stats import NOTHING

NASTY = '<script>alert("x")</script> & 50% of $a_b$ {c} | ~^\\'


def made(editor: str = "rome", **changes) -> Report:
    row = CaseRow(
        "case/1", NASTY, "low", "high", {"efficacy": [1.0, 0.0]}, {"efficacy": [0.0]}, True, 0.1, 0.9
    )
    report = Report(
        suite="counterfact",
        model="tiny",
        editor=editor,
        seed=3,
        n=20,
        known=7,
        metrics={
            "efficacy": Estimate(0.95, 0.8, 0.99, 20),
            "efficacy_magnitude": Estimate(-0.2, -0.3, -0.1, 20),
            "fluency": Estimate(612.34, 600.0, 624.0, 20),
            "locality_kl": Estimate(0.01234, 0.01, 0.02, 20),
            "portability": NOTHING,
            "score": Estimate(0.9, 0.8, 0.95, 20),
        },
        before={"efficacy": Estimate(0.1, 0.02, 0.3, 20)},
        skipped=(Skip("rows.json", 12, NASTY, "case/9"),),
        drawn=21,
        rows=100,
        seconds=1.5,
        settings={"comparable": "x", "note": NASTY},
        notes=(NASTY,),
        cases=(row,),
    )
    return replace(report, **changes)


def test_json_follows_the_contract():
    found = made().to_json("eval")
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    wanted = {
        "schema_version",
        "command",
        "seed",
        "suite",
        "editor",
        "model",
        "n",
        "known",
        "metrics",
        "before",
        "skipped",
        "seconds",
    }
    assert wanted <= set(found)
    assert (found["schema_version"], found["command"], found["seed"]) == (1, "eval", 3)
    for table in (found["metrics"], found["before"]):
        assert all(set(value) == {"mean", "low", "high", "n"} for value in table.values())
    assert found["metrics"]["portability"] == {"mean": None, "low": None, "high": None, "n": 0}
    assert found["skipped"] == [{"file": "rows.json", "line": 12, "reason": NASTY, "id": "case/9"}]
    assert found["cases"][0]["metrics"] == {"efficacy": 0.5}


def test_too_many_skipped_counts_draws_and_broken_rows():
    skip = Skip("f", 1, "r")
    assert not made().too_many_skipped, "1 of 21 is under 5 %"
    assert made(n=19, drawn=21, skipped=(skip,) * 2).too_many_skipped
    assert not made(n=20, drawn=20, rows=100, skipped=(skip,) * 5).too_many_skipped
    assert made(n=20, drawn=20, rows=100, skipped=(skip,) * 6).too_many_skipped


def test_figures_in_points_and_a_dash_for_nothing():
    text = made().to_markdown()
    assert "| efficacy | 10.0 [2.0, 30.0] | 95.0 [80.0, 99.0] | 20 |" in text
    assert "| efficacy_magnitude | – | -20.0 [-30.0, -10.0] | 20 |" in text
    assert "| fluency | – | 612.3 [600.0, 624.0] | 20 |" in text
    assert "| locality_kl | – | 0.012 [0.010, 0.020] | 20 |" in text
    assert "| portability | – | – | 0 |" in text
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    assert rows[2].startswith("| score |"), "the score stands first"


def test_csv_has_full_precision():
    rows = list(csv.DictReader(io.StringIO(made("=cmd|x").to_csv())))
    by = {(row["column"], row["metric"]): row for row in rows}
    assert float(by["before", "efficacy"]["low"]) == 0.02
    assert by["'=cmd|x", "portability"]["mean"] == "", "and a spreadsheet runs nothing"


def test_latex_is_escaped_and_uses_booktabs():
    text = made("rome_identity & co").to_latex()
    assert text.count(r"\toprule") == text.count(r"\bottomrule") == 1
    assert r"rome\_identity \& co" in text
    assert r"locality\_kl" in text
    body = text.split(r"\midrule")[1].split(r"\bottomrule")[0]
    assert all(line.count(" & ") == 3 for line in body.strip().splitlines())


def test_html_stands_alone_and_escapes_everything():
    page = made(NASTY).to_html()
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    assert not re.search(r'(src|href)="(?!data:)', page)
    assert page.count("data:image/png;base64,") + page.count("<svg") >= 2
    assert "rows.json" in page and "case/1" in page
    for tag in ("table", "tr", "td", "p", "body", "html"):
        assert len(re.findall(rf"<{tag}[ >]", page)) == page.count(f"</{tag}>"), tag


def test_the_terminal_table_shows_markup_as_text():
    from rich.console import Console

    out = io.StringIO()
    Console(file=out, width=200).print(made("[red]rome[/red]", notes=("[bold]x",)).table())
    assert "[red]rome[/red]" in out.getvalue()
    assert "[bold]x" in out.getvalue()


def test_several_editors_share_one_before_column():
    first, second = made("rome"), made("rome+sadr")
    heads = first.to_markdown().splitlines()[2]
    assert heads == "| metric | before | rome | n |"
    from lab.eval.render import markdown

    assert markdown([first, second]).splitlines()[2] == "| metric | before | rome | rome+sadr | n |"
    with pytest.raises(ConfigError, match="one table"):
        markdown([first, made(settings={"comparable": "y"})])


def test_files_by_suffix(tmp_path: Path):
    for suffix in ("json", "md", "csv", "tex", "html"):
        path = made().save(tmp_path / "new" / f"report.{suffix}")
        assert path.stat().st_size > 100
    assert json.loads((tmp_path / "new/report.json").read_text("utf-8"))["editor"] == "rome"
    save_reports([made("a"), made("b")], tmp_path / "both.json")
    assert [row["editor"] for row in json.loads((tmp_path / "both.json").read_text("utf-8"))] == ["a", "b"]
    with pytest.raises(ConfigError, match=r"\.pdf"):
        made().save(tmp_path / "report.pdf")


def test_a_report_without_cases_or_before_is_still_a_page():
    bare = made(before={}, cases=(), skipped=(), notes=(), drawn=20, metrics={})
    for text in (bare.to_html(), bare.to_markdown(), bare.to_latex(), bare.to_csv()):
        assert text
