"""Chain-of-Note: a note on every document before the answer (arXiv:2311.09210)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar

from lab.records import Passage
from rag.decoding import contrast_generate
from rag.decoding.rules import Greedy
from rag.notes import ReadingNote, Written
from rag.readers.base import Item, Reader, Reading
from rag.readers.prompted import DirectReader

# A note is a sentence, and there is an answer behind the notes.
TOKENS_PER_NOTE = 40


class UncheckedNotesReader(Reader):
    """Notes that call each document direct, contextual or irrelevant, then the answer.

    Notes are decoded in one stream. A contrasting rule decodes the answer alone, after the finished notes and against the bare
    question: before that point the two streams would have to share notes on documents that one of them lacks. A model whose
    notes hold no answer is asked again without notes.
    """

    title: ClassVar[str] = "a note on every document before the answer, taken as it is written"
    paper: ClassVar[str] = "arXiv:2311.09210"
    cost: ClassVar[str] = "a note a document, then one answer"
    takes_notes: ClassVar[bool] = True

    def _read(self, items: Sequence[Item]) -> list[Reading]:
        # Without documents there is nothing to note.
        noted = [index for index, (_, passages) in enumerate(items) if passages]
        found: dict[int, Reading] = {}
        if noted:
            found = dict(zip(noted, self._with_notes([items[index] for index in noted]), strict=True))
        missing = [index for index in range(len(items)) if index not in found or not found[index].answer]
        if missing:
            direct = DirectReader(self.handle, self.rule, max_new_tokens=self.max_new_tokens)
            again = direct.read_many([items[index] for index in missing])
            for index, reading in zip(missing, again, strict=True):
                before = found.get(index)
                found[index] = (
                    reading
                    if before is None
                    else replace(reading, notes=before.notes, raw=before.raw, fallback=True)
                )
        return [found[index] for index in range(len(items))]

    def _with_notes(self, items: Sequence[Item]) -> list[Reading]:
        prompts = [self.prompts.notes(*item) for item in items]
        longest = max(len(passages) for _, passages in items)
        texts = self._written(prompts, self.max_new_tokens + TOKENS_PER_NOTE * longest)
        readings = []
        for (question, passages), prompt, text in zip(items, prompts, texts, strict=True):
            written = self.prompts.written(text, len(passages))
            readings.append(self._reading(question, written, text, prompt))
        if not self.rule.uses_memory:
            return readings
        answered = [index for index, reading in enumerate(readings) if reading.answer]
        if answered:
            after = [self.prompts.after_notes(prompts[index], texts[index]) for index in answered]
            for index, reading in zip(
                answered, self._answers(after, [items[index] for index in answered]), strict=True
            ):
                readings[index] = replace(
                    readings[index], answer=reading.answer, known=self.prompts.knows(reading.answer)
                )
        return readings

    def _written(self, prompts: Sequence[str], longest: int) -> list[str]:
        """Notes and answer after each prompt, from the drafts where they hold it."""
        rule = Greedy() if self.rule.uses_memory else self.rule
        held = self.drafts if isinstance(rule, Greedy) and self.drafts is not None else {}
        missing = [prompt for prompt in dict.fromkeys(prompts) if prompt not in held]
        made = contrast_generate(
            self.handle, missing, missing, rule, max_new_tokens=longest, stop=self.prompts.note_stop
        )
        held.update(zip(missing, made, strict=True))
        return [held[prompt] for prompt in prompts]

    def _reading(self, question: str, written: Written, raw: str, prompt: str) -> Reading:
        known = self.prompts.knows(written.answer)
        lead = self.prompts.after_notes(prompt, raw).removeprefix(prompt)
        return Reading(question, written.answer, known, written.notes, raw, prompt, lead)


class NotesReader(UncheckedNotesReader):
    """Notes that are held against the question; what they discard is not read on. The reader that is meant where nothing else is said.

    A model that has only read sets of documents with an answer among them calls one direct in every set. A note says whom its
    document is about, so one on somebody whom the question does not name is put right to irrelevant. Then the documents noted
    irrelevant are left out and the others are noted again; where none is left, the question is asked without documents. Free
    notes, which need not name their subject, stay as they are. Where there is not one note for
    each document, notes are taken on each document alone.
    """

    title: ClassVar[str] = "a note on every document before the answer; only what the notes keep is read"
    paper: ClassVar[str] = "arXiv:2311.09210; the check is ours"
    cost: ClassVar[str] = "as con_unchecked; once more where a note was put right, with fewer documents"

    def _with_notes(self, items: Sequence[Item]) -> list[Reading]:
        readings = super()._with_notes(items)
        found = [
            self._judged(question, reading, passages)
            for reading, (question, passages) in zip(readings, items, strict=True)
        ]
        # Below more documents than a model was trained on, notes break off or leave some out. They are taken on each alone then;
        # free notes of a model that did not keep to the form would be no ground to let a document go.
        broken = [
            at
            for at, (reading, (_, passages)) in enumerate(zip(readings, items, strict=True))
            if self.prompts.notes_have_fields
            and len(passages) > 1
            and not (reading.answer and len(reading.notes) == len(passages))
        ]
        alone = [(items[at][0], (passage,)) for at in broken for passage in items[at][1]]
        said = iter(zip(alone, super()._with_notes(alone), strict=True) if alone else ())
        for at in broken:
            each = [next(said) for _ in items[at][1]]
            found[at] = [
                replace(note, document=number)
                for number, ((question, passages), reading) in enumerate(each, start=1)
                for note in (self._judged(question, reading, passages) or reading.notes)[:1]
            ]
        left: dict[int, tuple[list[int], list[ReadingNote]]] = {}
        for index, (_, passages) in enumerate(items):
            gone = [note for note in found[index] if note.kind == "irrelevant" and note.document]
            if gone:
                dropped = {note.document for note in gone}
                left[index] = ([at for at in range(1, len(passages) + 1) if at not in dropped], gone)
        if not left:
            return readings
        # Every round leaves out a document at least.
        again = self._read([
            (items[index][0], [items[index][1][at - 1] for at in kept]) for index, (kept, _) in left.items()
        ])  # fmt: skip
        for (index, (kept, gone)), reading in zip(left.items(), again, strict=True):
            others = [
                replace(note, document=kept[note.document - 1]) if note.document else note
                for note in reading.notes
            ]
            notes = sorted([*gone, *others], key=lambda note: note.document or 0)
            readings[index] = replace(reading, notes=tuple(notes), raw=readings[index].raw)
        return readings

    def _judged(self, question: str, reading: Reading, passages: Sequence[Passage]) -> list[ReadingNote]:
        """The notes of a reading, put right and numbered, where any of them has to be; none otherwise."""
        notes = (self.prompts.checked(question, reading.raw, passages) or ())[: len(passages)]
        return [replace(note, document=at) for at, note in enumerate(notes, start=1)]
