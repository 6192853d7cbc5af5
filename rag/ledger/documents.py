"""The documents of a ledger as a store, for whoever takes documents in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rag.store import Chunk, Retrieved, Where, fits

if TYPE_CHECKING:
    from rag.ledger.ledger import Ledger


class LedgerDocuments:
    """A ``DocumentStore`` that shows documents as they were given and takes them in through a ledger; searches see what entries made."""

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger

    def chunks(self, ids: Sequence[str] | None = None, where: Where | None = None) -> list[Chunk]:
        """See ``DocumentStore``."""
        given = self.ledger.planner.given()
        if ids is not None:
            found = [given[id] for id in dict.fromkeys(ids) if id in given]
        else:
            found = sorted(given.values(), key=lambda chunk: (chunk.source, chunk.position, chunk.id))
        return [chunk for chunk in found if fits(chunk, where)]

    def put(self, chunks: Sequence[Chunk]) -> None:
        """See ``DocumentStore``."""
        self.ledger.put(chunks)

    def remove(self, ids: Sequence[str]) -> None:
        """See ``DocumentStore``; what entries made of documents goes with these only."""
        given = self.ledger.planner.given()
        self.ledger.remove([id for id in ids if id in given])

    def search(self, query: str, k: int, where: Where | None = None) -> list[Retrieved]:
        """See ``DocumentStore``."""
        return self.ledger.store.search(query, k, where)
