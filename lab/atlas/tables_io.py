"""Reads the world's tables from the package."""

from __future__ import annotations

import csv
import tomllib
from collections.abc import Mapping
from importlib import resources
from typing import Any


def _text(name: str) -> str:
    return (resources.files("lab.atlas") / "tables" / name).read_text(encoding="utf-8")


def read_table(name: str) -> list[dict[str, tuple[str, ...]]]:
    """Rows of a CSV table; every cell is the answer followed by its aliases, an empty cell is an empty tuple."""
    return [
        {column: tuple(part for part in cell.split("/") if part) for column, cell in row.items()}
        for row in csv.DictReader(_text(name).splitlines())
    ]


def read_toml(name: str) -> Mapping[str, Any]:
    """Content of a TOML table."""
    return tomllib.loads(_text(name))
