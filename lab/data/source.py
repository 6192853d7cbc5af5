"""Rows of a benchmark file, each with the line it stands on.

Benchmarks come as a JSON list (usually one record per line), as JSON lines, as a JSON object of lists, or from the hub. The
standard parser forgets where a record began, so lists are walked record by record.
"""

from __future__ import annotations

import bisect
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lab.errors import DataError, MissingDependencyError

_SPACE = re.compile(r"[ \t\r\n]*")


@dataclass(frozen=True)
class Row:
    """One record as it came.

    Attributes:
        value: The JSON object; empty when ``error`` is set.
        file: Path or hub id.
        line: 1-based line of the record's first character (of a hub data set: 1-based row number).
        section: Key of the list it stood in, where the file is an object of lists.
        error: Why it could not be read.
    """

    value: Mapping[str, Any]
    file: str
    line: int
    section: str = ""
    error: DataError | None = None


@dataclass(frozen=True)
class HubSource:
    """A data set on the hub.

    Attributes:
        name: Hub id, ``owner/name``.
        file: One data file of the repository, or empty for its default configuration.
        split: Split to read.
        revision: Branch, tag or commit.
    """

    name: str
    file: str = ""
    split: str = "train"
    revision: str | None = None


def read_rows(source: str | Path | HubSource, *, strings: bool = False) -> list[Row]:
    """Reads all records of a local file or a hub data set.

    Args:
        source: A path; a hub id ``owner/name`` or ``owner/name:file-in-the-repository``; or a ``HubSource``. An existing
            path always wins, so that a local folder is never looked up on the hub.
        strings: Takes a bare string for a record with the one field ``text``.

    Raises:
        DataError: The file is absent, unreadable, empty or not JSON; or the hub cannot be reached.
        MissingDependencyError: A hub id without the package ``datasets``.
    """
    if isinstance(source, HubSource):
        return _hub_rows(source)
    path = Path(source).expanduser()
    if path.is_file():
        return _file_rows(path, strings)
    text = str(source)
    if path.is_dir():
        inside = ", ".join(sorted(file.name for file in path.glob("*.json*")))
        raise DataError(f"is a folder; name one of its files: {inside or 'it has no JSON file'}", path)
    name, _, file = text.partition(":")
    if (
        re.fullmatch(r"[\w.-]+/[\w.-]+", name)
        and not name.startswith(".")
        and not Path(name).suffix.startswith(".json")
    ):
        return _hub_rows(HubSource(name, file))
    raise DataError("no such file (and not shaped like a hub id owner/name)", text)


def _file_rows(path: Path, strings: bool) -> list[Row]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"not UTF-8: {error.reason} at byte {error.start}", path) from None
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror}", path) from None
    if not text.strip():
        raise DataError("is empty", path)
    walker = _Walker(text, str(path), strings)
    start = walker.skip(0)
    if path.suffix in (".jsonl", ".ndjson"):
        rows = list(walker.lines())
    elif text[start] == "[":
        rows = list(walker.items(start))
    elif text[start] == "{":
        rows = walker.object_or_lines(start)
    else:
        raise DataError(
            "is neither a JSON list, a JSON object of lists, nor JSON lines", path, walker.line(start)
        )
    if not rows:
        raise DataError("holds no records", path)
    return rows


class _Walker:
    """Decodes JSON piece by piece and knows the line of each piece."""

    def __init__(self, text: str, file: str, strings: bool = False) -> None:
        self.text = text
        self.file = file
        self.strings = strings
        self._breaks = [match.start() for match in re.finditer("\n", text)]
        self._decoder = json.JSONDecoder()

    def line(self, position: int) -> int:
        return bisect.bisect_left(self._breaks, position) + 1

    def skip(self, position: int) -> int:
        match = _SPACE.match(self.text, position)
        return match.end() if match else position

    def row(self, value: Any, position: int, section: str = "") -> Row:
        if self.strings and isinstance(value, str):
            value = {"text": value}
        if isinstance(value, dict):
            return Row(value, self.file, self.line(position), section)
        return self.bad(f"a record must be a JSON object, this is {type(value).__name__}", position, section)

    def bad(self, message: str, position: int, section: str = "") -> Row:
        line = self.line(position)
        return Row({}, self.file, line, section, DataError(message, self.file, line))

    def lines(self) -> Iterator[Row]:
        position = 0
        for text in self.text.split("\n"):
            if text.strip():
                start = position + len(text) - len(text.lstrip())
                try:
                    yield self.row(json.loads(text), start)
                except json.JSONDecodeError as error:
                    yield self.bad(f"not JSON: {error.msg} at column {error.colno}", start)
                except RecursionError:
                    yield self.bad("nested too deeply", start)
            position += len(text) + 1

    def items(self, start: int, section: str = "") -> Iterator[Row]:
        """Records of the list that opens at ``start``; a broken one costs its own line only."""
        position = self.skip(start + 1)
        while position < len(self.text) and self.text[position] != "]":
            try:
                value, end = self._decoder.raw_decode(self.text, position)
            except (json.JSONDecodeError, RecursionError) as error:
                detail = (
                    f"{error.msg} on line {error.lineno}"
                    if isinstance(error, json.JSONDecodeError)
                    else "nested too deeply"
                )
                yield self.bad(f"not JSON: {detail}", position, section)
                following = self.text.find("\n", position)
                position = self.skip(following + 1) if following >= 0 else len(self.text)
                if position < len(self.text) and self.text[position] not in "{]":
                    yield self.bad(
                        "the rest of the list cannot be read after a broken record", position, section
                    )
                    return
                continue
            yield self.row(value, position, section)
            position = self.skip(end)
            if position < len(self.text) and self.text[position] == ",":
                position = self.skip(position + 1)
            elif position < len(self.text) and self.text[position] != "]":
                yield self.bad("a comma is missing before this record", position, section)
                if self.text[position] != "{":
                    return
        if position >= len(self.text):
            yield self.bad(
                "the list is not closed: the file is cut off", len(self.text.rstrip()) - 1, section
            )

    def object_or_lines(self, start: int) -> list[Row]:
        try:
            value, end = self._decoder.raw_decode(self.text, start)
        except json.JSONDecodeError as error:
            if "\n" not in self.text.strip() or not self.text.split("\n", 1)[0].rstrip().endswith("}"):
                raise DataError(f"not JSON: {error.msg}", self.file, error.lineno) from None
            return list(self.lines())
        if self.skip(end) < len(self.text):
            return list(self.lines())
        if (
            value
            and all(isinstance(items, list) for items in value.values())
            and any(isinstance(item, dict) for items in value.values() for item in items)
        ):
            return list(self._sections(start))
        return [self.row(value, start)]

    def _sections(self, start: int) -> Iterator[Row]:
        position = self.skip(start + 1)
        while self.text[position] == '"':
            key, end = self._decoder.raw_decode(self.text, position)
            opening = self.skip(self.skip(end) + 1)
            yield from self.items(opening, key)
            _, end = self._decoder.raw_decode(self.text, opening)
            position = self.skip(end)
            if self.text[position] == ",":
                position = self.skip(position + 1)


def _hub_rows(source: HubSource) -> list[Row]:
    try:
        from datasets import load_dataset  # type: ignore[attr-defined]
    except ImportError:
        raise MissingDependencyError("datasets", f"reading {source.name!r} from the hub", "train") from None
    label = f"hub:{source.name}" + (f"/{source.file}" if source.file else "")
    try:
        rows = load_dataset(
            source.name, data_files=source.file or None, split=source.split, revision=source.revision
        )
        return [Row(_pruned(dict(row)), label, number) for number, row in enumerate(rows, start=1)]
    except Exception as error:
        # The library lets errors of many network and parser layers through; all mean that there is no data to work on.
        raise DataError(
            f"cannot be read from the hub ({type(error).__name__}: {error}); without a connection, download the file once and "
            "give its path with --data",
            label,
        ) from error


def _pruned(value: dict[str, Any]) -> dict[str, Any]:
    """Drops the empty columns that a table makes of optional fields."""
    return {
        key: _pruned(item) if isinstance(item, dict) else item
        for key, item in value.items()
        if item is not None
    }
