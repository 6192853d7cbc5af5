"""Which documents say something else than an entry."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from lab.data.text import normalize_answer
from rag.ledger.values import Conflict, Entry
from rag.store import Chunk

if TYPE_CHECKING:
    from lab.handle import ModelHandle


class Finder(Protocol):
    """Says what chunks state of the fact of an entry."""

    def find(self, entry: Entry, chunks: Sequence[Chunk]) -> list[Conflict]:
        """One finding for each chunk that mentions the subject, in their order."""
        ...


class MatchFinder:
    """Looks for the words of subject and objects: a chunk with both states the object.

    It cannot tell what a chunk says *of* the subject, so it errs on the side of finding too much; an old object counts before the
    new one.
    """

    def find(self, entry: Entry, chunks: Sequence[Chunk]) -> list[Conflict]:
        """See ``Finder``."""
        return [match(entry, chunk) for chunk in chunks if mentions(chunk.text, entry.fact.names)]


class NotesFinder:
    """Reads the note that the model itself writes on a chunk that mentions the subject; where it names no object, the words are matched.

    The match stays the last word for what the notes pass over: a stale document that is believed costs more than one that is left out.

    Args:
        handle: The model.
        batch_size: Chunks read together.
    """

    def __init__(self, handle: ModelHandle, *, batch_size: int = 8) -> None:
        self.handle = handle
        self.batch_size = batch_size

    def find(self, entry: Entry, chunks: Sequence[Chunk]) -> list[Conflict]:
        """See ``Finder``."""
        from rag.verdict import hear, same_answer

        about = [chunk for chunk in chunks if mentions(chunk.text, entry.fact.names)]
        if not entry.fact.question:
            return [match(entry, chunk) for chunk in about]
        found = []
        for begin in range(0, len(about), self.batch_size):
            some = about[begin : begin + self.batch_size]
            _, voices = hear(self.handle, entry.fact.question, [chunk.passage for chunk in some])
            for chunk, voice in zip(some, voices, strict=True):
                matched = match(entry, chunk)
                if voice.answer is None or matched.label == "states_old":
                    found.append(matched)
                elif same_answer(voice.answer, entry.new):
                    found.append(Conflict(chunk.id, chunk.source, "states_new", voice.answer, "notes"))
                else:
                    old = any(same_answer(voice.answer, answer) for answer in entry.old)
                    label = "states_old" if old else "states_other"
                    found.append(Conflict(chunk.id, chunk.source, label, voice.answer, "notes"))
        return found


def mentions(text: str, names: Sequence[str]) -> bool:
    """Whether one of the names stands in the text as words in a row."""
    return named(text, names) is not None


def named(text: str, names: Sequence[str]) -> str | None:
    """The first of the names whose words stand in the text in a row."""
    words = f" {normalize_answer(text)} "
    return next((name for name in names if (key := normalize_answer(name)) and f" {key} " in words), None)


def match(entry: Entry, chunk: Chunk) -> Conflict:
    """What a chunk that mentions the subject states, by the words that stand in it."""
    if old := named(chunk.text, entry.old):
        return Conflict(chunk.id, chunk.source, "states_old", old, "match")
    if entry.new and named(chunk.text, [entry.new]):
        return Conflict(chunk.id, chunk.source, "states_new", entry.new, "match")
    return Conflict(chunk.id, chunk.source, "mentions", None, "match")
