"""What a reader is."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import MutableMapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from lab.errors import RequestError
from lab.records import Passage
from rag.decoding import Rule, contrast_generate
from rag.decoding.rules import Greedy
from rag.notes import ReadingNote
from rag.prompts import Prompts, prompts_for

if TYPE_CHECKING:
    from lab.handle import ModelHandle

Item = tuple[str, Sequence[Passage]]


@dataclass(frozen=True)
class Reading:
    """What a reader made of one question.

    Attributes:
        question: As asked.
        answer: The answer; the model's word for unknown where it has none.
        known: Whether the answer says anything.
        notes: Notes on the documents, where the reader writes them.
        raw: What the model generated, notes included.
        prompt: What the model was asked.
        lead: What it wrote between the prompt and the answer: its notes.
        fallback: The model's notes held no answer, so it was asked once more without notes.
    """

    question: str
    answer: str
    known: bool
    notes: tuple[ReadingNote, ...] = ()
    raw: str = ""
    prompt: str = ""
    lead: str = ""
    fallback: bool = False

    def to_json(self) -> dict[str, Any]:
        """As a JSON object."""
        return {
            "question": self.question,
            "answer": self.answer,
            "known": self.known,
            "notes": [note.to_json() for note in self.notes],
            "raw": self.raw,
            "fallback": self.fallback,
        }


class Reader(ABC):
    """Answers questions with passages.

    Args:
        handle: The model, with its patches.
        rule: How an answer is decoded; plain decoding without it.
        max_new_tokens: Longest answer.

    Attributes:
        title: What it does, in a few words.
        paper: Where it comes from.
        cost: What it costs beside one answer.
        takes_notes: Whether it lets the model write notes before the answer.
        drafts: What the unchanged model wrote after a prompt before its answer, by prompt. Readers that share it, over one state of
            one model, write it once; without it every reader writes anew.
    """

    title: ClassVar[str]
    paper: ClassVar[str]
    cost: ClassVar[str]
    takes_notes: ClassVar[bool] = False
    drafts: MutableMapping[str, str] | None = None

    def __init__(self, handle: ModelHandle, rule: Rule | None = None, *, max_new_tokens: int = 24) -> None:
        self.handle = handle
        self.rule = rule or Greedy()
        self.max_new_tokens = max_new_tokens
        self.prompts: Prompts = prompts_for(handle)

    def read(self, question: str, passages: Sequence[Passage]) -> Reading:
        """Answers one question.

        Raises:
            RequestError: The question is empty.
        """
        return self.read_many([(question, passages)])[0]

    def read_many(self, items: Sequence[Item]) -> list[Reading]:
        """Answers many questions, each with its own passages, in few passes.

        Raises:
            RequestError: A question is empty.
        """
        for number, (question, _) in enumerate(items):
            if not question.strip():
                raise RequestError(f"question {number} is empty")
        asked = [(question.strip(), passages) for question, passages in items]
        if not self.rule.changes_model:
            return self._read(asked)
        with self.handle.writing():
            # What is measured for these questions holds for them alone.
            settled = copy.copy(self)
            settled.rule = self.rule.settled(
                self.handle,
                [self.prompts.direct(*item) for item in asked],
                [self.prompts.closed(question) for question, _ in asked],
            )
            return settled._read(asked)

    def holding(self) -> AbstractContextManager[None]:
        """Held around several readings that must see the same weights."""
        return self.handle.writing() if self.rule.changes_model else self.handle.reading()

    @abstractmethod
    def _read(self, items: Sequence[Item]) -> list[Reading]:
        """Answers questions that are not empty."""

    def _answers(self, prompts: Sequence[str], items: Sequence[Item]) -> list[Reading]:
        """Decodes the answer after each prompt by the rule, against the question without documents."""
        bare = [self.prompts.closed(question) for question, _ in items]
        texts = contrast_generate(
            self.handle,
            prompts,
            bare,
            self.rule,
            max_new_tokens=self.max_new_tokens,
            stop=self.prompts.stop,
        )
        readings = []
        for (question, _), prompt, text in zip(items, prompts, texts, strict=True):
            answer = self.prompts.answer(text)
            readings.append(Reading(question, answer, self.prompts.knows(answer), raw=text, prompt=prompt))
        return readings
