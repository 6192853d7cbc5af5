"""Checked access to the fields of a row: a wrong one names file and line."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn

from lab.data.source import Row
from lab.data.text import distinct
from lab.errors import DataError


class Fields:
    """The fields of one row, or of an object inside it.

    Args:
        row: The row, for its place in the file.
        value: The object to read; the row's own without it.
        path: Name of ``value`` inside the row, for messages.
    """

    def __init__(self, row: Row, value: Any = None, path: str = "") -> None:
        self.row = row
        self.path = path
        self.value: Mapping[str, Any] = value if path else row.value
        if not isinstance(self.value, Mapping):
            self.fail(path, "an object", value)

    def fail(self, name: str, wanted: str, found: Any) -> NoReturn:
        """Raises the error for field ``name``."""
        state = "missing" if found is None else f"{type(found).__name__}"
        raise DataError(f"field {name!r} must be {wanted}, it is {state}", self.row.file, self.row.line)

    def _name(self, key: str) -> str:
        return f"{self.path}.{key}" if self.path else key

    def has(self, key: str) -> bool:
        """Whether the field is present and not null."""
        return self.value.get(key) is not None

    def text(self, key: str, default: str | None = None) -> str:
        """A string; ``default`` where the field is absent."""
        found = self.value.get(key)
        if found is None and default is not None:
            return default
        if not isinstance(found, str):
            self.fail(self._name(key), "a string", found)
        return found

    def texts(self, key: str, *, optional: bool = False) -> tuple[str, ...]:
        """A list of strings; a single string counts as a list of one."""
        found = self.value.get(key)
        if found is None and optional:
            return ()
        if isinstance(found, str):
            return (found,)
        if not isinstance(found, list) or not all(isinstance(item, str) for item in found):
            self.fail(self._name(key), "a list of strings", found)
        return tuple(found)

    def answers(self, key: str) -> tuple[str, ...]:
        """All spellings in a string, a list of strings, or a list of lists of strings; first one first, blanks dropped."""
        found = self.value.get(key)

        def leaves(item: Any) -> list[str]:
            if isinstance(item, str):
                return [item]
            if isinstance(item, list):
                return [leaf for part in item for leaf in leaves(part)]
            if isinstance(item, (int, float)) and not isinstance(item, bool):
                return [str(item)]
            self.fail(self._name(key), "a string or a list of strings", item)

        if found is None:
            self.fail(self._name(key), "a string or a list of strings", found)
        return distinct(leaves(found))

    def sub(self, key: str) -> Fields:
        """An object inside this one."""
        found = self.value.get(key)
        if not isinstance(found, Mapping):
            self.fail(self._name(key), "an object", found)
        return Fields(self.row, found, self._name(key))

    def subs(self, key: str, *, optional: bool = False) -> tuple[Fields, ...]:
        """A list of objects inside this one."""
        found = self.value.get(key)
        if found is None and optional:
            return ()
        if not isinstance(found, list) or (not found and not optional):
            self.fail(self._name(key), "a non-empty list of objects", found)
        return tuple(
            Fields(self.row, item, f"{self._name(key)}[{index}]") for index, item in enumerate(found)
        )

    def value_text(self, key: str) -> str:
        """A string, or the ``str`` of an object as in the ROME schema."""
        return self.sub(key).text("str") if isinstance(self.value.get(key), Mapping) else self.text(key)
