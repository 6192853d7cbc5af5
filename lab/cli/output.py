"""What a command gives back: tables for people, one JSON document for programs, a bar while it works."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console

from lab.errors import OutputExistsError
from lab.records import write_text_atomically
from lab.tables import WideTable

SCHEMA_VERSION = 1


def console(json_target: Path | None = None) -> Console:
    """Where tables go: standard output, or standard error where the JSON document takes standard output."""
    return Console(highlight=False, stderr=str(json_target) == "-")


def strict(value: Any) -> Any:
    """``value`` as strict JSON: NaN and infinities become null, paths text, tuples lists."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): strict(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [strict(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def document(command: str, seed: int | None, content: Mapping[str, Any]) -> dict[str, Any]:
    """The JSON document of a command: the fields that all commands share, then its own."""
    return {"schema_version": SCHEMA_VERSION, "command": command, "seed": seed} | strict(content)


def write_json(target: Path | None, command: str, seed: int | None, content: Mapping[str, Any]) -> None:
    """Writes the document of a command to ``target``; to standard output for ``-``, nowhere for ``None``."""
    if target is None:
        return
    text = json.dumps(document(command, seed, content), ensure_ascii=False, indent=2, allow_nan=False) + "\n"
    if str(target) == "-":
        sys.stdout.write(text)
    else:
        write_text_atomically(target, text)


def check_out(folder: Path, force: bool) -> Path:
    """Refuses a folder that holds something, unless forced.

    Raises:
        OutputExistsError: ``folder`` is a file, or holds something and ``force`` is false.
    """
    if folder.exists() and not folder.is_dir():
        raise OutputExistsError(f"{folder} is a file; --out names a folder")
    if not force and folder.is_dir() and any(folder.iterdir()):
        raise OutputExistsError(
            f"{folder} is not empty; choose another --out, or add --force to write into it"
        )
    return folder


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> WideTable:
    """A table for the terminal: numbers are set to the right, fractions with three digits."""
    return WideTable(
        title,
        columns,
        [[_cell(value) for value in row] for row in rows],
        right=[
            bool(rows) and all(isinstance(row[index], (int, float)) for row in rows)
            for index in range(len(columns))
        ],
    )


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.3f}" if isinstance(value, float) else str(value)


Advance = Callable[[str, int, int], None]


@contextmanager
def progress() -> Iterator[Advance]:
    """Bars on standard error while the block runs, one per phase; silent where nobody watches.

    Yields:
        ``advance(phase, done, total)``, the form that editors and suites report in.
    """
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    err = Console(stderr=True)
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as bar:
        tasks: dict[str, Any] = {}

        def advance(phase: str, done: int, total: int) -> None:
            if phase not in tasks:
                tasks[phase] = bar.add_task(phase)
            bar.update(tasks[phase], completed=done, total=total)

        yield advance
