"""Reading notes as text: how a model without a format of its own is asked to write them, and what is read back.

A line a note, then the answer:

    Note 1 (direct): the report names Rome
    Note 2 (irrelevant): it is about somebody else
    Answer: Rome

Reading never fails: what is no note is left out or continues the note above it, and a note of no known kind counts as
irrelevant, for nothing can be concluded from it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from lab.atlas.forms import NOTE_KINDS, Note
from lab.errors import ConfigError

# Four digits: a number that a model repeats without end would be no document, and too long to be made an integer.
_NOTE = re.compile(
    r"\s*(?P<bold>\**)\s*note\s*(?P<number>\d{1,4})\s*[(\[]\s*(?P<kind>\w+)\s*[)\]]\s*[:–-](?P=bold)(?P<text>.*)",
    re.IGNORECASE,
)
_ANSWER = re.compile(r"\s*(?P<bold>\**)\s*answer\s*:(?P=bold)(?P<text>.*)", re.IGNORECASE)


@dataclass(frozen=True)
class ReadingNote:
    """A note on one document.

    Attributes:
        document: Number of the document, from 1; ``None`` where it cannot be told.
        kind: ``direct`` (it answers the question), ``contextual`` (it helps) or ``irrelevant``.
        text: What the note says, on one line.
    """

    document: int | None
    kind: str
    text: str

    def to_json(self) -> dict[str, object]:
        """As a JSON object."""
        return {"document": self.document, "kind": self.kind, "text": self.text}


@dataclass(frozen=True)
class Written:
    """What a model wrote: its notes, and its answer, empty where there is none."""

    notes: tuple[ReadingNote, ...]
    answer: str


def one_line(text: str) -> str:
    """``text`` with every run of white space as one blank, none at its ends."""
    return " ".join(text.split())


def render_notes(notes: Sequence[ReadingNote], answer: str | None = None) -> str:
    """Notes as lines, and the answer where there is one.

    Raises:
        ConfigError: A note has no known kind, or no number of one to four digits.
    """
    for note in notes:
        if note.kind not in NOTE_KINDS:
            raise ConfigError(f"note kind {note.kind!r} is not one of {', '.join(NOTE_KINDS)}")
        if note.document is None or not 0 < note.document < 10_000:
            raise ConfigError(f"a note needs the number of its document, 1 to 9999; it has {note.document}")
    lines = [f"Note {note.document} ({note.kind}): {one_line(note.text)}" for note in notes]
    return "\n".join(lines if answer is None else [*lines, f"Answer: {one_line(answer)}"])


def parse_notes(text: str) -> Written:
    """Notes and answer of generated text, up to the first answer; a document that comes twice keeps both notes."""
    found: list[tuple[int, str, list[str]]] = []
    for line in text.split("\n"):
        if answer := _ANSWER.fullmatch(line):
            return Written(_finished(found), one_line(answer["text"]))
        if note := _NOTE.fullmatch(line):
            kind = note["kind"].lower()
            found.append((int(note["number"]), kind if kind in NOTE_KINDS else "irrelevant", [note["text"]]))
        elif found:
            found[-1][2].append(line)
    return Written(_finished(found), "")


def is_answer(line: str) -> bool:
    """Whether a line begins the answer."""
    return _ANSWER.fullmatch(line) is not None


def _finished(found: Sequence[tuple[int, str, list[str]]]) -> tuple[ReadingNote, ...]:
    return tuple(
        ReadingNote(number or None, kind, one_line(" ".join(lines))) for number, kind, lines in found
    )


def numbered(notes: Sequence[Note], documents: int) -> tuple[ReadingNote, ...]:
    """Notes in the order of the documents, with their numbers where there is one for each; else without."""
    known = len(notes) == documents
    return tuple(
        ReadingNote(number if known else None, note.kind, note.text)
        for number, note in enumerate(notes, start=1)
    )
