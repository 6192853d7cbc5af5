"""Runs commands in this process, for tests of the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lab.cli.root import run


def call(capsys, *words: object) -> tuple[int, str, str]:
    code = run([str(word) for word in words])
    said = capsys.readouterr()
    return code, said.out, said.err


def result(capsys, tmp_path: Path, *words: object) -> dict:
    """Runs a command that must succeed and returns its JSON document."""
    file = tmp_path / "result.json"
    file.unlink(missing_ok=True)
    code, out, err = call(capsys, *words, "--json", str(file))
    assert code == 0, err or out
    document = json.loads(file.read_text(encoding="utf-8"), parse_constant=pytest.fail)
    assert document["schema_version"] == 1
    assert {"command", "seed"} <= set(document)
    return document
