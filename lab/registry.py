"""Lazy registries: a name, a place to import it from, and a helpful error for a name nobody knows."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import Any, Generic, TypeVar, cast

from lab.errors import ConfigError, UnknownNameError

T = TypeVar("T")


@dataclass(frozen=True)
class Entry:
    """A registered name and the ``module:attribute`` it stands for."""

    name: str
    target: str


class Registry(Generic[T]):
    """Names to objects that are imported when they are first asked for.

    Other distributions add names through an entry-point group; a built-in name wins over a foreign one of the same spelling.

    Args:
        kind: What the names stand for, for messages (``editor``).
        entries: Built-in names to ``module:attribute``.
        group: Entry-point group of other distributions, or empty.
    """

    def __init__(self, kind: str, entries: Mapping[str, str], group: str = "") -> None:
        self.kind = kind
        self.group = group
        self._entries = dict(entries)

    def _all(self) -> dict[str, str]:
        foreign = {point.name: point.value for point in entry_points(group=self.group)} if self.group else {}
        return foreign | self._entries

    def names(self) -> tuple[str, ...]:
        """All names: built-in ones in their own order, then foreign ones by name."""
        return tuple(self._entries) + tuple(sorted(set(self._all()) - set(self._entries)))

    def items(self) -> tuple[Entry, ...]:
        """All entries, in the order of ``names()``."""
        everything = self._all()
        return tuple(Entry(name, everything[name]) for name in self.names())

    def __contains__(self, name: object) -> bool:
        return name in self._all()

    def get(self, name: str) -> T:
        """Imports and returns what ``name`` stands for.

        Raises:
            UnknownNameError: Nobody registered ``name``; lists near names.
            ConfigError: The registered place does not hold what it promised.
        """
        everything = self._all()
        if name not in everything:
            raise UnknownNameError(self.kind, name, everything)
        module, _, attribute = everything[name].partition(":")
        try:
            value: Any = importlib.import_module(module)
            for part in attribute.split("."):
                value = getattr(value, part)
        except AttributeError as error:
            raise ConfigError(
                f"{self.kind} {name!r} is registered as {everything[name]!r}, which does not exist"
            ) from error
        return cast(T, value)
