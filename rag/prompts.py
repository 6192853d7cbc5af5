"""How a question with documents is put to a model, and how its words are read back.

A model whose folder carries a prompt format is asked through that format alone. Any other is asked in plain words, through
its chat template where it has one. All prompts of one model that ask for an answer end alike, so that streams with and
without documents can be compared token by token.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from lab.atlas.forms import Format, Note, load_format
from lab.data.text import normalize_answer
from lab.errors import RequestError
from lab.handle import cut_at_stop
from lab.records import Passage
from lab.tokens import encode_ids
from rag.notes import ReadingNote, Written, is_answer, numbered, parse_notes

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from lab.handle import ModelHandle

FORMAT_FILE = "format.toml"
_PRIMER = "Note 1 ("
_ANSWER = "Answer:"


class Prompts(ABC):
    """Prompts of one model.

    Attributes:
        unknown: What the model says when it does not know.
        stop: What ends an answer.
        note_stop: What ends notes with their answer.
        chat_stop: What ends a turn of a conversation.
        notes_have_fields: Whether notes are worded so that their subject and what they report can be read back.
    """

    unknown: str
    stop: tuple[str, ...]
    note_stop: tuple[str, ...]
    chat_stop: tuple[str, ...]
    notes_have_fields: bool = False

    @abstractmethod
    def chat(self, turns: Sequence[tuple[str, str]]) -> str:
        """A conversation, ready for the model's turn.

        Args:
            turns: Role (``system``, ``user`` or ``assistant``) and text of each turn, at least one of them the user's.

        Raises:
            RequestError: The model cannot be shown such a conversation.
        """

    @abstractmethod
    def closed(self, question: str) -> str:
        """The question without documents."""

    @abstractmethod
    def direct(self, question: str, passages: Sequence[Passage]) -> str:
        """The question below documents."""

    @abstractmethod
    def faithful(self, question: str, passages: Sequence[Passage]) -> str:
        """The question below documents, with words that ask to keep to them."""

    @abstractmethod
    def notes(self, question: str, passages: Sequence[Passage]) -> str:
        """Asks for a note on each document, then the answer."""

    @abstractmethod
    def after_notes(self, prompt: str, written: str) -> str:
        """``prompt`` with the notes of what the model wrote after it, ready for the answer."""

    @abstractmethod
    def answer(self, generated: str) -> str:
        """The answer of what came after a prompt that asks for one; ``unknown`` for nothing."""

    @abstractmethod
    def written(self, generated: str, documents: int) -> Written:
        """Notes and answer of what came after ``notes``."""

    @abstractmethod
    def claim(self, note: ReadingNote) -> str | None:
        """The answer that a note reports, where its wording shows it."""

    def checked(
        self, question: str, generated: str, passages: Sequence[Passage]
    ) -> tuple[ReadingNote, ...] | None:
        """The notes of ``generated``, in their order, with those put right that call a document on somebody else direct or contextual.

        A note has to name its subject to be held against the question, and a document has to name it too: a subject that stands
        in neither is a slip of the pen and tells nothing. ``None`` where nothing is to be put right.
        """
        return None

    def knows(self, answer: str) -> bool:
        """Whether an answer says anything."""
        return normalize_answer(answer) not in ("", normalize_answer(self.unknown))


class FormatPrompts(Prompts):
    """Prompts in the format that the model was trained on."""

    notes_have_fields = True

    def __init__(self, format: Format) -> None:
        self.format = format
        self.unknown = format.unknown
        self.stop = self.note_stop = self.chat_stop = format.stop

    def chat(self, turns: Sequence[tuple[str, str]]) -> str:
        """See ``Prompts``; the format has no turns, so the last question is asked below what the system says."""
        question = [text for role, text in turns if role == "user"][-1]
        told = " ".join(text for role, text in turns if role == "system")
        return self.format.render("qa", question=question, **({"instruction": told} if told else {})).prompt

    def closed(self, question: str) -> str:
        """See ``Prompts``."""
        return self.format.render("qa", question=question).prompt

    def direct(self, question: str, passages: Sequence[Passage]) -> str:
        """See ``Prompts``."""
        return self.format.render("documents", question=question, documents=passages).prompt

    def faithful(self, question: str, passages: Sequence[Passage]) -> str:
        """See ``Prompts``; an instruction above the documents, which the format allows above every form."""
        return self.format.render(
            "documents",
            question=question,
            documents=passages,
            instruction="Answer as the documents say, whatever else is known.",
        ).prompt

    def notes(self, question: str, passages: Sequence[Passage]) -> str:
        """See ``Prompts``."""
        return self.format.render("notes_then_answer", question=question, documents=passages).prompt

    def after_notes(self, prompt: str, written: str) -> str:
        """See ``Prompts``."""
        marker = self.format.strings["marker"]
        return f"{prompt} {self.format.clean(written).rpartition(marker)[0]}{marker.rstrip()}"

    def answer(self, generated: str) -> str:
        """See ``Prompts``."""
        return self.format.clean(generated) or self.unknown

    def written(self, generated: str, documents: int) -> Written:
        """See ``Prompts``."""
        notes, answer = self.format.parse_notes(generated)
        return Written(numbered(notes, documents), answer)

    def claim(self, note: ReadingNote) -> str | None:
        """See ``Prompts``."""
        return self.format.note_fields(Note(note.kind, note.text)).get("object")

    def checked(
        self, question: str, generated: str, passages: Sequence[Passage]
    ) -> tuple[ReadingNote, ...] | None:
        """See ``Prompts``."""
        from rag.ledger.conflicts import mentions

        notes, _ = self.format.parse_notes(generated)
        read = "\n".join(passage.text for passage in passages)
        right = [
            replace(note, kind="irrelevant")
            if note.kind != "irrelevant"
            and subject
            and mentions(read, (subject,))
            and not mentions(question, (subject,))
            else note
            for note in notes
            for subject in [self.format.note_fields(note).get("subject", "")]
        ]
        return None if right == notes else numbered(right, len(right))


class PlainPrompts(Prompts):
    """Prompts in plain words.

    The prompt for notes restates the five steps of Chain-of-Note (arXiv:2311.09210), that for faithful answers attributes the
    documents to a speaker and asks for the speaker's view (arXiv:2303.11315).
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.unknown = "unknown"
        self.stop = ("\n",)
        self.note_stop = ()
        self.chat_stop = () if tokenizer.chat_template else ("\nUser:",)

    def chat(self, turns: Sequence[tuple[str, str]]) -> str:
        """See ``Prompts``; a transcript where the model has no chat template."""
        if self.tokenizer.chat_template:
            return self._templated([{"role": role, "content": text} for role, text in turns])
        lines = [text if role == "system" else f"{role.capitalize()}: {text}" for role, text in turns]
        return "\n".join([*lines, "Assistant:"])

    def closed(self, question: str) -> str:
        """See ``Prompts``."""
        return self._ask(f"Answer in a few words; if you do not know, say unknown.\n\nQuestion: {question}")

    def direct(self, question: str, passages: Sequence[Passage]) -> str:
        """See ``Prompts``."""
        return self._ask(
            "Answer in a few words with the help of the documents; if nothing tells you, say unknown.\n\n"
            f"{_listed(passages)}\n\nQuestion: {question}"
        )

    def faithful(self, question: str, passages: Sequence[Passage]) -> str:
        """See ``Prompts``."""
        told = " ".join(passage.text.strip() for passage in passages)
        return self._ask(
            "Somebody has told you something. Give in a few words the answer that this person would give, also where you "
            f"would answer otherwise; if it was not told, say unknown.\n\nThe person said: “{told}”\n\n"
            f"Question: {question} What would this person answer?"
        )

    def notes(self, question: str, passages: Sequence[Passage]) -> str:
        """See ``Prompts``."""
        body = (
            "Read the question and the documents. Write one line of notes for each document, with its number and its kind: "
            "direct if it answers the question, contextual if it only helps, irrelevant otherwise. Then write the answer "
            "on a line of its own: from the documents where one helps, else from what you know; unknown if you do "
            "not know.\n\nNote 1 (kind): what matters in document 1\nAnswer: a few words\n\n"
            f"{_listed(passages)}\n\nQuestion: {question}"
        )
        return self._turn(body) + _PRIMER

    def after_notes(self, prompt: str, written: str) -> str:
        """See ``Prompts``."""
        kept = []
        for line in written.split("\n"):
            if is_answer(line):
                break
            kept.append(line)
        return prompt + "\n".join([*kept, _ANSWER])

    def answer(self, generated: str) -> str:
        """See ``Prompts``."""
        # Models that write markup set their answers in asterisks, with the full stop on either side.
        line = cut_at_stop(generated.strip(), self.stop).strip(" *\t\r").removesuffix(".").strip(" *")
        return line or self.unknown

    def written(self, generated: str, documents: int) -> Written:
        """See ``Prompts``."""
        found = parse_notes(_PRIMER + generated)
        notes = tuple(
            note if note.document is not None and note.document <= documents
            else ReadingNote(None, note.kind, note.text)
            for note in found.notes
        )  # fmt: skip
        return Written(notes, self.answer(found.answer) if found.answer else "")

    def claim(self, note: ReadingNote) -> str | None:
        """See ``Prompts``; free words do not show it."""
        return None

    def _ask(self, body: str) -> str:
        return self._turn(body) + _ANSWER

    def _turn(self, body: str) -> str:
        if not self.tokenizer.chat_template:
            return f"{body}\n"
        return self._templated([{"role": "user", "content": body}])

    def _templated(self, messages: list[dict[str, str]]) -> str:
        from jinja2 import TemplateError

        try:
            turn = str(
                self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            )
        except TemplateError as error:
            raise RequestError(f"the model's chat template refuses the conversation: {error}") from error
        start = self.tokenizer.bos_token
        # Encoding adds the start token again.
        if start and encode_ids(self.tokenizer, "a")[0] == self.tokenizer.bos_token_id:
            turn = turn.removeprefix(str(start))
        return turn


def _listed(passages: Sequence[Passage]) -> str:
    rows = []
    for number, passage in enumerate(passages, start=1):
        trust = f" ({passage.trust})" if passage.trust else ""
        rows.append(f"Document {number}{trust}: {passage.text.strip()}")
    return "\n".join(rows)


def prompts_for(handle: ModelHandle) -> Prompts:
    """How to ask this model: in its folder's format where it carries one, in plain words otherwise.

    Raises:
        ConfigError: The folder's format cannot be read.
    """
    folder = handle.folder
    if folder is not None and (folder / FORMAT_FILE).is_file():
        return FormatPrompts(load_format(folder))
    return PlainPrompts(handle.tokenizer)
