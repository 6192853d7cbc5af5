"""Help for tests of the ledger: a document store in one file, and facts about countries."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from lab.records import Fact, write_text_atomically
from rag.ledger.values import chunk_of, image
from rag.store import Chunk, MemoryStore, chunk_id


class FileStore(MemoryStore):
    """A ``MemoryStore`` that outlives its process."""

    def __init__(self, file: Path) -> None:
        self.file = file
        rows = json.loads(file.read_text()) if file.is_file() else []
        self._quiet = True
        super().__init__([chunk_of(row) for row in rows])
        self._quiet = False

    def put(self, chunks: Sequence[Chunk]) -> None:
        super().put(chunks)
        self._write()

    def remove(self, ids: Sequence[str]) -> None:
        super().remove(ids)
        self._write()

    def _write(self) -> None:
        if not self._quiet:
            write_text_atomically(self.file, json.dumps([image(chunk) for chunk in self.chunks()]))


def capital(country: str, city: str) -> Fact:
    return Fact(country, "capital", city, "The capital of {} is", id=f"capital/{country}")


def chunk(text: str, source: str = "a.txt", position: int = 0) -> Chunk:
    return Chunk(chunk_id(source, text), text, source, position)


def contents(store: MemoryStore) -> list[tuple[str, str, str, str, str | None]]:
    """Everything a store holds, for comparison."""
    return [(one.id, one.text, one.status, one.note, one.trust) for one in store.chunks()]
