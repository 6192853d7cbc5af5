"""Readers that are one prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from rag.readers.base import Item, Reader, Reading


class DirectReader(Reader):
    """Puts the documents above the question and answers."""

    title: ClassVar[str] = "documents above the question"
    paper: ClassVar[str] = ""
    cost: ClassVar[str] = "one answer"

    def _read(self, items: Sequence[Item]) -> list[Reading]:
        return self._answers([self.prompts.direct(*item) for item in items], items)


class FaithfulReader(Reader):
    """Asks in words to keep to the documents, by instruction and by asking for the view of who told them.

    A model that was trained on a prompt format gets the instruction only; Atlas was never trained to obey it, so with it this
    reader shows what an instruction alone does.
    """

    title: ClassVar[str] = "a prompt that asks to keep to the documents"
    paper: ClassVar[str] = "arXiv:2303.11315"
    cost: ClassVar[str] = "one answer"

    def _read(self, items: Sequence[Item]) -> list[Reading]:
        return self._answers([self.prompts.faithful(*item) for item in items], items)
