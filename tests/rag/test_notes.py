"""Notes as text: whatever a model writes can be read, and what was rendered comes back."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lab.atlas.forms import NOTE_KINDS, Note, load_format
from lab.errors import ConfigError
from rag.notes import ReadingNote, numbered, one_line, parse_notes, render_notes

FORMAT = load_format()
LINES = st.text(max_size=40).map(one_line)
NOTES = st.lists(st.builds(ReadingNote, st.integers(1, 9999), st.sampled_from(NOTE_KINDS), LINES), max_size=5)
PIECES = st.lists(
    st.one_of(
        st.text(max_size=12),
        st.sampled_from(
            ("Note", "note 1", "(direct)", "**", ":", "\n", "Answer:", "; ", ". Answer: ", "1 ", "99999")
        ),
    ),
    max_size=25,
).map("".join)


@settings(max_examples=150, deadline=None)
@given(NOTES, LINES)
def test_rendered_notes_are_read_back(notes, answer):
    found = parse_notes(render_notes(notes, answer))
    assert found.notes == tuple(notes)
    assert found.answer == answer


@settings(max_examples=300, deadline=None)
@given(PIECES)
def test_nothing_that_a_model_writes_stops_the_reading(text):
    found = parse_notes(text)
    assert all(note.kind in NOTE_KINDS and note.text == one_line(note.text) for note in found.notes)
    notes, answer = FORMAT.parse_notes(text)
    assert all(note.kind in NOTE_KINDS for note in notes) and answer == answer.strip()
    for note in notes:
        assert set(FORMAT.note_fields(note)) <= {"label", "object", "subject"}


def test_what_models_do_to_the_layout():
    text = (
        "Here are my notes.\n**Note 1 (Direct):** the report\nnames Rome\n- stray\nnote 2 [irrelevant] - nothing\n"
        "Note 3 (maybe): unsure\nNote 99999 (direct): far\n\n**Answer:** Rome\nNote 4 (direct): too late"
    )
    found = parse_notes(text)
    assert found.answer == "Rome"
    assert found.notes == (
        ReadingNote(1, "direct", "the report names Rome - stray"),
        ReadingNote(2, "irrelevant", "nothing"),
        ReadingNote(3, "irrelevant", "unsure Note 99999 (direct): far"),
    )
    assert parse_notes("Note 1 (direct): cut off in the mid").answer == ""


def test_notes_that_cannot_be_read_back_are_not_rendered():
    for note in (
        ReadingNote(None, "direct", "x"),
        ReadingNote(0, "direct", "x"),
        ReadingNote(1, "true", "x"),
    ):
        with pytest.raises(ConfigError, match="note"):
            render_notes([note])


def test_numbers_only_where_every_document_has_its_note():
    notes = [Note("direct", "a"), Note("irrelevant", "b")]
    assert [note.document for note in numbered(notes, 2)] == [1, 2]
    assert [note.document for note in numbered(notes, 3)] == [None, None]


@pytest.mark.parametrize("kind", NOTE_KINDS)
def test_the_format_reads_its_own_notes_back(kind):
    fields = {"label": "capital", "object": "St. John's: old town", "subject": "Antigua"}
    assert FORMAT.note_fields(FORMAT.note(kind, **fields)) == fields
    assert FORMAT.note_fields(Note(kind, "no such shape")) == {}
    assert FORMAT.note_fields(Note("strange", "a, b: c")) == {}
