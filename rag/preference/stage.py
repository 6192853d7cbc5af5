"""One step of making training data: rows in, rows out, and a manifest that says what was done and what was left out."""

from __future__ import annotations

import hashlib
import importlib
import json
import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from lab.errors import DataError, MissingDependencyError
from lab.records import write_text_atomically

# A Hugging Face data set. Type checkers take the folder `datasets/` for the package and find no such class in it.
Dataset: TypeAlias = Any
Record = dict[str, Any]
# Told a phase, what is done of it, and its total.
Report: TypeAlias = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Stage:
    """What a stage made.

    Attributes:
        data: Its rows.
        manifest: Name, settings, number of rows in and out, what was left out and why, a digest of the rows.
    """

    data: Dataset
    manifest: Mapping[str, Any]

    def save(self, folder: str | Path, name: str) -> None:
        """Writes ``<name>.jsonl`` and ``<name>.manifest.json`` into ``folder``."""
        place = Path(folder)
        write_jsonl(place / f"{name}.jsonl", records(self.data))
        write_text_atomically(
            place / f"{name}.manifest.json", json.dumps(self.manifest, ensure_ascii=False, indent=2) + "\n"
        )


def records(data: Dataset) -> list[Record]:
    """The rows as plain dictionaries, each one's own."""
    return [dict(row) for row in data]


def to_dataset(rows: Sequence[Mapping[str, Any]]) -> Dataset:
    """Rows as a Hugging Face data set.

    Raises:
        MissingDependencyError: The package ``datasets`` is absent.
    """
    try:
        library: Any = importlib.import_module("datasets")
    except ImportError:
        raise MissingDependencyError("datasets", "preference data", "train") from None
    return library.Dataset.from_list([dict(row) for row in rows])


def finish(
    name: str,
    before: int,
    rows: Sequence[Mapping[str, Any]],
    dropped: Mapping[str, int] | None = None,
    **settings: Any,
) -> Stage:
    """Closes a stage.

    Args:
        name: The stage.
        before: Number of rows that came in.
        rows: Rows that go out.
        dropped: Reason to number of rows left out for it.
        **settings: What defines the stage.

    Raises:
        DataError: No row is left; the message gives the reasons.
    """
    gone = dict(sorted((dropped or {}).items()))
    if not rows:
        reasons = ", ".join(f"{reason}: {count}" for reason, count in gone.items()) or "none came in"
        raise DataError(f"stage {name!r} of {before} rows left none ({reasons})")
    manifest = {
        "stage": name,
        "settings": settings,
        "rows_in": before,
        "rows_out": len(rows),
        "dropped": gone,
        "counts": _counts(rows),
        "digest": digest(rows),
    }
    return Stage(to_dataset(rows), manifest)


def _counts(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, int]]:
    keys = ("split", "context", "grade", "error_type", "cell", "quadrant", "trust")
    return {
        key: dict(sorted(Counter(str(row[key]) for row in rows).items()))
        for key in keys
        if any(key in row for row in rows) and all(key in row for row in rows)
    }


def digest(rows: Sequence[Mapping[str, Any]]) -> str:
    """A hash of rows, equal for equal rows in equal order."""
    made = hashlib.sha256()
    for row in rows:
        made.update(json.dumps(row, sort_keys=True, ensure_ascii=False, default=str).encode())
    return made.hexdigest()[:16]


def draw_for(seed: int, *names: object) -> random.Random:
    """A generator of its own for one item, so that leaving another item out changes nothing here."""
    return random.Random("|".join(map(str, ("preference", seed, *names))))


def share_of(seed: int, name: str) -> float:
    """A number in [0, 1) that belongs to a name: the same in every process."""
    made = hashlib.blake2b(f"{seed}|{name}".encode(), digest_size=8).digest()
    return int.from_bytes(made, "big") / 2**64


def write_jsonl(path: str | Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Writes rows as JSON lines; the old file stays until the new one is complete."""
    write_text_atomically(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
