"""Changing chunks of any document store; each change is a ``put`` of new values, and returns the old ones to undo it with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from lab.errors import ConfigError
from rag.store import Chunk, DocumentStore, Status


def found(store: DocumentStore, ids: Sequence[str]) -> list[Chunk]:
    """Chunks of ids that must all exist.

    Raises:
        ConfigError: One does not; names it.
    """
    chunks = store.chunks(ids)
    missing = [id for id in ids if id not in {chunk.id for chunk in chunks}]
    if missing:
        raise ConfigError(
            f"the store holds no chunk {missing[0]!r}"
            + (f" and {len(missing) - 1} more" if missing[1:] else "")
        )
    return chunks


def set_status(
    store: DocumentStore, ids: Sequence[str], status: Status, *, note: str | None = None
) -> list[Chunk]:
    """Gives chunks a status, and a note where one is given; returns them as they were.

    Raises:
        ConfigError: A chunk does not exist, or there is no such status.
    """
    before = found(store, ids)
    store.put([replace(chunk, status=status, note=chunk.note if note is None else note) for chunk in before])
    return before


def annotate(store: DocumentStore, ids: Sequence[str], note: str) -> list[Chunk]:
    """Gives chunks a note, which a reader sees below the text; returns them as they were.

    Raises:
        ConfigError: A chunk does not exist.
    """
    before = found(store, ids)
    store.put([replace(chunk, note=note) for chunk in before])
    return before


def replace_text(store: DocumentStore, id: str, text: str) -> Chunk:
    """Puts a chunk with another text in the place of one, which stays in the store as stale; returns the new one.

    Raises:
        ConfigError: The chunk does not exist, or the text is the same.
    """
    (before,) = found(store, [id])
    if text == before.text:
        raise ConfigError(f"chunk {id} already has this text")
    after = before.reworded(text)
    store.put([replace(before, status="stale")])
    store.put([after])
    return after
