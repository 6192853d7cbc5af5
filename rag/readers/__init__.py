"""Readers: a question and passages in, an answer out, with notes where the reader writes them."""

from __future__ import annotations

from lab.registry import Registry
from rag.readers.base import Reader, Reading

__all__ = ["READERS", "Reader", "Reading"]

READERS: Registry[type[Reader]] = Registry(
    "reader",
    {
        "direct": "rag.readers.prompted:DirectReader",
        "faithful": "rag.readers.prompted:FaithfulReader",
        "con": "rag.readers.con:NotesReader",
        "con_unchecked": "rag.readers.con:UncheckedNotesReader",
    },
    group="knowlab.readers",
)
