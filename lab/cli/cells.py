"""Finished parts of a comparison, kept one file each, so that the same command goes on where it was interrupted."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lab.cli.output import SCHEMA_VERSION, strict
from lab.records import write_text_atomically

CELLS = "cells"


def write_cell(file: Path, row: Mapping[str, Any]) -> dict[str, Any]:
    """Keeps a finished cell, one that failed (it has ``error``) not; returns it as it would be read back."""
    plain = strict(row)
    if "error" not in row:
        text = json.dumps({"schema_version": SCHEMA_VERSION} | plain, ensure_ascii=False, indent=1)
        write_text_atomically(file, text + "\n")
    return plain


def read_cell(file: Path) -> dict[str, Any] | None:
    """A finished cell; one that cannot be read is run again."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and found.get("schema_version") == SCHEMA_VERSION else None
