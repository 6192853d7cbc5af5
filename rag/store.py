"""What a document store is: chunks by content-addressed ids, read, replaced, removed and searched.

The index is one; ``MemoryStore`` is another, for small sets of texts. Whoever journals changes needs these verbs only: a chunk is
a value that holds everything known about it, ``put`` makes the store hold exactly this value, so putting back what was read before
undoes a change.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol, get_args, runtime_checkable

from lab.errors import ConfigError
from lab.records import Passage, Trust

Status = Literal["live", "stale", "blocked"]
STATUSES: tuple[Status, ...] = get_args(Status)
TRUSTS: tuple[Trust, ...] = get_args(Trust)
Scalar = str | int | float | bool
Value = Scalar | tuple[str, ...]
Where = Mapping[str, Scalar | Collection[Scalar] | None]
"""A condition on chunks: every named field (``source``, ``position``, ``trust``, ``status``, ``note``, ``id`` or a key of ``extra``) has
the value, or one of the values where several are given; ``None`` asks for a field that is empty or absent. A field that holds several
values fits where one of them does. ``contains`` asks for a text, case aside, that the chunk's text holds."""

CONTAINS = "contains"
FIELDS = ("id", "text", "source", "position", "trust", "status", "note")


def chunk_id(source: str, text: str, repeat: int = 0) -> str:
    """The id of a text from a source: the same text of the same source always has the same one.

    Args:
        source: Where the text is from.
        text: The text.
        repeat: How often this source has held the same text before.
    """
    digest = hashlib.sha256()
    for part in (source, text, str(repeat)):
        content = part.encode("utf-8", "surrogatepass")
        digest.update(f"{len(content)}:".encode())
        digest.update(content)
    return digest.hexdigest()[:32]


@dataclass(frozen=True)
class Chunk:
    """A piece of a document.

    Attributes:
        id: Its name; ``chunk_id`` of its source and text when it was read from a document.
        text: What it says; a passage shows it to the model.
        source: The document it is from.
        position: Its place among the chunks of the document, from 0.
        trust: How far the document is believed, where it says so.
        status: ``live``; ``stale`` (a later edit says otherwise) and ``blocked`` (it must not be shown) are not retrieved.
        note: A remark for the reader of the chunk, for example by which value it was superseded; empty for none.
        extra: Further fields: text, numbers, truth values, or tuples of texts, under names that a chunk does not use itself.

    Raises:
        ConfigError: A field has a value that it cannot have.
    """

    id: str
    text: str
    source: str
    position: int = 0
    trust: Trust | None = None
    status: Status = "live"
    note: str = ""
    extra: Mapping[str, Value] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        if not self.id or not self.text.strip():
            raise ConfigError(
                f"a chunk of {self.source!r} needs an id and a text, it has {self.id!r} and {self.text!r}"
            )
        if self.status not in STATUSES:
            raise ConfigError(f"chunk {self.id}: status {self.status!r} is not one of {', '.join(STATUSES)}")
        if self.trust is not None and self.trust not in TRUSTS:
            raise ConfigError(f"chunk {self.id}: trust {self.trust!r} is not one of {', '.join(TRUSTS)}")
        if self.position < 0:
            raise ConfigError(f"chunk {self.id}: position {self.position} is below 0")
        # A copy, lists as tuples: nobody else holds what a frozen value is made of.
        kept: dict[str, Value] = {}
        for key, value in self.extra.items():
            if not key or key in FIELDS or key == CONTAINS:
                raise ConfigError(f"chunk {self.id}: {key!r} cannot name an extra field")
            if isinstance(value, (list, tuple)) and value and all(isinstance(item, str) for item in value):
                kept[key] = tuple(value)
            elif isinstance(value, (str, bool, int)) or (isinstance(value, float) and math.isfinite(value)):
                kept[key] = value
            else:
                raise ConfigError(
                    f"chunk {self.id}: extra field {key!r} holds {value!r}; give a text, a finite number, a truth value, or a "
                    "list of at least one text"
                )
        object.__setattr__(self, "extra", kept)

    @property
    def passage(self) -> Passage:
        """The chunk as a reader takes it, with its note below its text."""
        text = f"{self.text} ({self.note})" if self.note else self.text
        return Passage(self.id, " ".join(text.split()), self.source, self.trust)

    def reworded(self, text: str, **changes: Any) -> Chunk:
        """The chunk with another text, hence another id; ``changes`` are further fields.

        ``extra["replaces"]`` names the chunk whose place it takes: a document that is read again and still holds the old text
        keeps the new one.
        """
        extra = {**self.extra, **changes.pop("extra", {}), "replaces": self.extra.get("replaces", self.id)}
        return replace(self, id=chunk_id(self.source, text), text=text, extra=extra, **changes)


@dataclass(frozen=True)
class Retrieved:
    """A chunk that a search found.

    Attributes:
        chunk: The chunk.
        score: How well it fits; higher is better, comparable within one search only.
    """

    chunk: Chunk
    score: float


@runtime_checkable
class DocumentStore(Protocol):
    """Chunks that can be read, replaced, removed and searched."""

    def chunks(self, ids: Sequence[str] | None = None, where: Where | None = None) -> list[Chunk]:
        """Chunks by ids, by a condition, by both, or all.

        Returns:
            In the order of ``ids`` (unknown ones are left out), else by source and position. Every status is returned.
        """
        ...

    def put(self, chunks: Sequence[Chunk]) -> None:
        """Stores chunks; one whose id is known is replaced with all its fields.

        Raises:
            ConfigError: Two chunks have one id.
        """
        ...

    def remove(self, ids: Sequence[str]) -> None:
        """Removes chunks; unknown ids are passed over."""
        ...

    def search(self, query: str, k: int, where: Where | None = None) -> list[Retrieved]:
        """The chunks that fit a query best, at most ``k``, best first.

        Only live chunks are found, unless ``where`` names a status.

        Raises:
            ConfigError: ``k`` is below 1.
        """
        ...


def fits(chunk: Chunk, where: Where | None) -> bool:
    """Whether a chunk meets a condition; see ``Where``."""
    for key, wanted in (where or {}).items():
        if key == CONTAINS:
            text = chunk.text.lower()
            if not any(str(part).lower() in text for part in choices(wanted)):
                return False
            continue
        held = getattr(chunk, key) if key in FIELDS else chunk.extra.get(key)
        if wanted is None:
            if held not in (None, ""):
                return False
            continue
        values = {_typed(item) for item in (held if isinstance(held, tuple) else (held,))}
        if values.isdisjoint(_typed(item) for item in choices(wanted)):
            return False
    return True


def choices(wanted: Scalar | Collection[Scalar] | None) -> tuple[Scalar, ...]:
    """The values of which a condition asks for one."""
    if wanted is None:
        return ()
    return (wanted,) if isinstance(wanted, (str, int, float, bool)) else tuple(wanted)


def _typed(value: Value | None) -> tuple[bool, Value | None]:
    # Python takes True for 1; a field that holds a number holds no truth value.
    return isinstance(value, bool), value


def retrievable(where: Where | None) -> Where:
    """The condition of a search: ``where``, and live unless it names a status."""
    return {"status": "live", **(where or {})}


def check_search(k: int) -> None:
    """Raises ``ConfigError`` unless ``k`` chunks can be asked for."""
    if k < 1:
        raise ConfigError(f"a search returns at least one chunk; k is {k}")


def by_id(chunks: Sequence[Chunk]) -> dict[str, Chunk]:
    """Chunks by their ids.

    Raises:
        ConfigError: Two have one id.
    """
    found: dict[str, Chunk] = {}
    for chunk in chunks:
        if chunk.id in found:
            raise ConfigError(
                f"two chunks have the id {chunk.id}, of {found[chunk.id].source!r} and {chunk.source!r}"
            )
        found[chunk.id] = chunk
    return found


class MemoryStore:
    """A ``DocumentStore`` that lives as long as the object; it searches by shared words.

    Args:
        chunks: What it holds at first.
    """

    def __init__(self, chunks: Sequence[Chunk] = ()) -> None:
        self._chunks: dict[str, Chunk] = {}
        self.put(chunks)

    def chunks(self, ids: Sequence[str] | None = None, where: Where | None = None) -> list[Chunk]:
        """See ``DocumentStore``."""
        if ids is None:
            found = sorted(self._chunks.values(), key=lambda chunk: (chunk.source, chunk.position, chunk.id))
        else:
            found = [self._chunks[id] for id in dict.fromkeys(ids) if id in self._chunks]
        return [chunk for chunk in found if fits(chunk, where)]

    def put(self, chunks: Sequence[Chunk]) -> None:
        """See ``DocumentStore``."""
        self._chunks |= by_id(chunks)

    def remove(self, ids: Sequence[str]) -> None:
        """See ``DocumentStore``."""
        for id in ids:
            self._chunks.pop(id, None)

    def search(self, query: str, k: int, where: Where | None = None) -> list[Retrieved]:
        """See ``DocumentStore``; the score is the cosine of the two texts' word counts."""
        check_search(k)
        asked = _words(query)
        scored = []
        for chunk in self.chunks(where=retrievable(where)):
            held = _words(chunk.text)
            shared = sum(count * held[word] for word, count in asked.items())
            if shared:
                scored.append(Retrieved(chunk, shared / (_length(asked) * _length(held))))
        return sorted(scored, key=lambda found: (-found.score, found.chunk.id))[:k]


def _words(text: str) -> Counter[str]:
    return Counter(re.findall(r"\w+", text.lower()))


def _length(counts: Counter[str]) -> float:
    return math.sqrt(sum(count * count for count in counts.values()))
