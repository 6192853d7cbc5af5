"""The comparison of ways to choose between documents and memory, its parts by hand, and the group of commands it joins."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import pytest
import typer

from lab.cli.root import build_app, run
from rag.preference import suites
from rag.preference.balance import balance
from rag.preference.stage import finish, records
from tests.rag.test_preference_suites import ROWS, row


def test_all_comparisons_are_in_one_group_however_often_it_is_built():
    for _ in range(2):
        command: Any = typer.main.get_command(build_app())
        names = list(command.commands["bench"].commands)
        assert {"editing", "sadr", "unlearning", "restor", "preference"} <= set(names)
        assert len(names) == len(set(names))


def test_rare_errors_are_repeated_up_to_the_cap():
    rows = [{"id": number, "error_type": "a" if number < 9 else "b"} for number in range(10)]
    data = finish("x", 10, rows).data
    once = Counter(each["error_type"] for each in records(balance(data, {"a": 2, "b": 1}).data))
    assert once == {"a": 2, "b": 1}
    stage = balance(data, {"a": 2, "b": 1}, repeat=3)
    made = records(stage.data)
    assert Counter(each["error_type"] for each in made) == {"a": 6, "b": 3}
    assert max(Counter(each["id"] for each in made).values()) == 3
    assert stage.manifest["settings"]["repeated"] == {"a": 0, "b": 2}
    # Never more rows than came in, unless a number is asked for.
    assert len(balance(data, {"a": 2, "b": 1}, repeat=50).data) <= 10


def test_the_summed_error_and_the_paired_test_by_hand():
    found = suites.summed_error(ROWS)
    assert found.mean == pytest.approx((1 - 3 / 7) + (1 - 2 / 4))
    assert found.low is not None and found.high is not None and 0 <= found.low < 15 / 14 < found.high <= 2
    assert suites.summed_error(ROWS[:3]).mean is None
    first = [row("conflict", item=str(number)) for number in range(6)]
    second = [row("conflict", item=str(number), ctx=1) for number in reversed(range(6))]
    result = suites.paired(first, [*second, row("conflict", item="other")])
    assert result["adherence"] == {"difference": 1.0, "p": pytest.approx(2 / 64), "n": 6}
    assert result["robustness"]["p"] is None


def test_the_command_compares_keeps_and_goes_on(tmp_path, standin, saved_patch, capsys):
    towns = ("Paris", "Rome", "Cairo", "Lima", "Tokyo", "Oslo")
    file = tmp_path / "asked.jsonl"
    rows = [
        {"id": str(number), "question": f"Where is P{number}?", "answers": [town], "context": f"P{number} is in {town}."}
        for number, town in enumerate(towns)
    ]  # fmt: skip
    file.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    out = tmp_path / "out"
    words = [
        "bench", "preference", "--data", str(file), "--methods", "base,cad,knowpo", "--adapter",
        f"knowpo={saved_patch}", "--out", str(out), "--json", "-",
    ]  # fmt: skip
    assert run(words) == 0
    found = json.loads(capsys.readouterr().out)
    assert list(found["methods"]) == ["base", "cad", "knowpo"]
    assert found["kept"] == 0
    for figures in found["methods"].values():
        assert {"adherence", "robustness", "memorisation_ratio", "summed_error", "latency"} <= set(figures)
        assert figures["latency"]["mean"] > 0
    assert len({len(cell["rows"]) for cell in found["cells"]}) == 1
    assert [pair["adherence"]["n"] for pair in found["pairs"]] == [
        found["methods"]["base"]["adherence"]["n"]
    ] * 3
    page = (out / "bench.html").read_text(encoding="utf-8")
    assert "Paired tests" in page and "http" not in page
    assert "| cad |" in (out / "bench.md").read_text(encoding="utf-8")

    assert run(words) == 0
    again = json.loads(capsys.readouterr().out)
    assert again["kept"] == 3
    assert again["methods"] == found["methods"]
    assert run([*words[:5], "base,cda", "--out", str(tmp_path / "other")]) == 2
    assert "cad" in capsys.readouterr().err
