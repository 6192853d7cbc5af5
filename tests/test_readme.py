"""What the README shows is run: its Python, its commands, on a small model that stands in for the shipped ones."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from lab.cli.root import run

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", TEXT, flags=re.MULTILINE | re.DOTALL)


def commands() -> list[str]:
    marked = TEXT.split("<!-- The tests run these lines. -->", 1)[1]
    (first, *_) = re.findall(r"^```sh\n(.*?)^```$", marked, flags=re.MULTILINE | re.DOTALL)
    return [line for line in first.splitlines() if line.strip()]


def test_it_opens_with_ten_lines_of_python():
    (opening,) = blocks("python")
    assert TEXT.index("```python") < TEXT.index("```sh")
    statements = [line for line in opening.splitlines() if line.strip()]
    assert len(statements) <= 13
    for word in (
        "load",
        "get_editor",
        ".edit(",
        "with patch.applied(handle)",
        ".apply(",
        ".undo()",
        ".save(",
        "WeightPatch.load(",
    ):
        assert word in opening


def test_the_python_runs(atlas, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (opening,) = blocks("python")
    scope: dict = {}
    exec(compile(opening, "README.md", "exec"), scope)
    said = capsys.readouterr().out
    assert "Rome" in said or not atlas
    (entry,) = scope["handle"].applied
    entry.undo()
    assert scope["handle"].state == scope["handle"].fingerprint


def test_every_command_of_the_makefile_that_it_names_exists():
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE))
    assert set(re.findall(r"\bmake (\w+)", TEXT)) <= targets


def test_all_commands_run_in_order(atlas, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for line in commands():
        program, *words = shlex.split(line, comments=True)
        assert program == "knowlab"
        code = run(words)
        said = capsys.readouterr()
        assert code == 0, f"{line}\n{said.err}"
    for made in (
        "edit.json",
        "trace.png",
        "eval.json",
        "small-demo/demo.html",
        "adapter/adapter_config.json",
    ):
        assert (tmp_path / "results" / made).is_file(), made


@pytest.mark.parametrize("name", ["README.md", "ARCHITECTURE.md", "CONTRIBUTING.md"])
def test_files_that_documents_name_exist(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    places = re.findall(r"`((?:lab|editors|rag|tests|examples|datasets)/[\w./-]+)`", text)
    assert not [place for place in places if "<" not in place and not (ROOT / place).exists()]
