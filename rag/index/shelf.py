"""One Chroma collection as chunks: what a record holds, and conditions in Chroma's words.

Chroma merges metadata on update, ignores an added id that it knows, and takes a limited number of records a call; all three are
dealt with here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from rag.index.words import WordRanking
from rag.store import CONTAINS, FIELDS, Chunk, Where, choices, fits

# Below Chroma's limit (5,461), and below what a query's list of ids may hold.
BATCH = 1000
# A key of a record costs as much as a document does, so what is as usual is not stored.
_USUAL: Mapping[str, str] = {"trust": "", "status": "live", "note": ""}
_NAMED = ("source", "position", *_USUAL)


def batches(items: Sequence[Any]) -> Iterator[Sequence[Any]]:
    """Items in parts that one call takes."""
    for begin in range(0, len(items), BATCH):
        yield items[begin : begin + BATCH]


class Shelf:
    """Chunks in one collection, with a ranking by words that is made when it is needed.

    The caller keeps writers and readers apart.

    Args:
        collection: Chroma's collection, made for cosine distances and without an embedding function.
    """

    def __init__(self, collection: Any) -> None:
        self.collection = collection
        self._ranking: WordRanking | None = None

    def __len__(self) -> int:
        return int(self.collection.count())

    def get(self, ids: Sequence[str]) -> dict[str, tuple[Chunk, np.ndarray]]:
        """Chunks and vectors of those ids that are here."""
        found: dict[str, tuple[Chunk, np.ndarray]] = {}
        for part in batches(list(dict.fromkeys(ids))):
            rows = self.collection.get(ids=list(part), include=["documents", "metadatas", "embeddings"])
            for chunk, vector in zip(_chunks(rows), rows["embeddings"], strict=True):
                found[chunk.id] = (chunk, np.asarray(vector, dtype=np.float32))
        return found

    def has(self, ids: Sequence[str]) -> set[str]:
        """Those ids that are here."""
        return {
            id for part in batches(list(ids)) for id in self.collection.get(ids=list(part), include=[])["ids"]
        }

    def select(self, where: Where | None) -> list[Chunk]:
        """Chunks that meet a condition, in no order."""
        if _impossible(where):
            return []
        rows = self.collection.get(
            where=_filter(where), where_document=_text_filter(where), include=["documents", "metadatas"]
        )
        return [chunk for chunk in _chunks(rows) if fits(chunk, where)]

    def write(
        self, chunks: Sequence[Chunk], vectors: np.ndarray, known: Mapping[str, tuple[Chunk, np.ndarray]]
    ) -> None:
        """Stores chunks with their vectors ``[chunk, width]``; known ids are replaced with all their fields.

        Args:
            chunks: What is stored.
            vectors: A row per chunk.
            known: What ``get`` returned for the ids of these chunks; nobody has written since.
        """
        rows = [index for index, chunk in enumerate(chunks) if chunk.id not in known]
        for part in batches(rows):
            self.collection.add(**_records([chunks[i] for i in part], vectors[list(part)]))
        rows = [index for index, chunk in enumerate(chunks) if chunk.id in known]
        for part in batches(rows):
            records = _records([chunks[i] for i in part], vectors[list(part)])
            for metadata, i in zip(records["metadatas"], part, strict=True):
                old = (*known[chunks[i].id][0].extra, *_USUAL)
                metadata |= {key: None for key in old if key not in metadata}
            self.collection.update(**records)
        if any(chunk.id not in known or known[chunk.id][0].text != chunk.text for chunk in chunks):
            self._ranking = None

    def delete(self, ids: Sequence[str]) -> None:
        """Removes chunks; the ranking by words keeps their names, which nobody finds here any more."""
        for part in batches(list(ids)):
            self.collection.delete(ids=list(part))

    def nearest(self, vector: np.ndarray, k: int, where: Where | None) -> list[tuple[str, float]]:
        """Ids and cosines of the chunks nearest to ``vector``, best first."""
        if _impossible(where) or not len(self):
            return []
        keep = None
        if _exact_only(where):
            keep = [chunk.id for chunk in self.select(where)]
            if not keep:
                return []
        rows = self.collection.query(
            query_embeddings=[vector.tolist()],
            n_results=k,
            ids=keep,
            where=None if keep else _filter(where),
            where_document=None if keep else _text_filter(where),
            include=["distances"],
        )
        return [
            (id, 1 - float(distance))
            for id, distance in zip(rows["ids"][0], rows["distances"][0], strict=True)
        ]

    def by_words(self, query: str, k: int, where: Where | None) -> list[tuple[str, float]]:
        """Ids and scores of the chunks that share words with ``query``, best first."""
        ranking = self._ranking
        if ranking is None:
            rows = self.collection.get(include=["documents"])
            ranking = self._ranking = WordRanking(rows["ids"], rows["documents"])
        keep = {chunk.id for chunk in self.select(where)} if where else None
        # Names of removed chunks may stand in the ranking, so more is asked for until enough of them exist.
        wanted = k
        while True:
            ranked = ranking.rank(query, wanted, keep)
            here = self.has([id for id, _ in ranked])
            found = [(id, score) for id, score in ranked if id in here]
            if len(found) >= k or len(ranked) < wanted:
                return found[:k]
            wanted *= 4


def _records(chunks: Sequence[Chunk], vectors: np.ndarray) -> dict[str, Any]:
    metadatas = []
    for chunk in chunks:
        row: dict[str, Any] = {
            key: list(value) if isinstance(value, tuple) else value for key, value in chunk.extra.items()
        }
        row |= {"source": chunk.source, "position": chunk.position}
        for key, usual in _USUAL.items():
            if (value := getattr(chunk, key) or "") != usual:
                row[key] = value
        metadatas.append(row)
    return {
        "ids": [chunk.id for chunk in chunks],
        "documents": [chunk.text for chunk in chunks],
        "metadatas": metadatas,
        "embeddings": vectors,
    }


def _chunks(rows: Mapping[str, Any]) -> list[Chunk]:
    found = []
    for id, text, metadata in zip(rows["ids"], rows["documents"], rows["metadatas"], strict=True):
        named: dict[str, Any] = {**_USUAL, **{key: metadata[key] for key in _NAMED if key in metadata}}
        named["trust"] = named["trust"] or None
        extra = {key: value for key, value in metadata.items() if key not in _NAMED}
        found.append(Chunk(id, text, extra=extra, **named))
    return found


def _impossible(where: Where | None) -> bool:
    return any(wanted is not None and not choices(wanted) for wanted in (where or {}).values())


def _exact_only(where: Where | None) -> bool:
    """Whether Chroma's filter would let pass what does not meet the condition."""
    return any(
        key in ("id", "text", CONTAINS) or wanted is None or _usual(key, wanted)
        for key, wanted in (where or {}).items()
    )


def _usual(key: str, wanted: Any) -> bool:
    """Whether a condition is met by chunks that do not store the field."""
    return key in _USUAL and (wanted is None or _USUAL[key] in choices(wanted))


def _filter(where: Where | None) -> dict[str, Any] | None:
    """A condition in Chroma's words: all that meets it passes, and more where ``_exact_only`` says so.

    Filters never say what a field is *not*: Chroma lets chunks pass that lack the field.
    """
    clauses: list[dict[str, Any]] = []
    for key, wanted in (where or {}).items():
        if key in ("id", "text", CONTAINS) or wanted is None or _usual(key, wanted):
            continue
        options: list[dict[str, Any]] = []
        for value in choices(wanted):
            options.append({key: {"$eq": value}})
            if isinstance(value, str) and key not in FIELDS:
                options.append({key: {"$contains": value}})
        clauses.append(options[0] if len(options) == 1 else {"$or": options})
    if not clauses:
        return None
    return clauses[0] if len(clauses) == 1 else {"$and": clauses}


def _text_filter(where: Where | None) -> dict[str, Any] | None:
    wanted = (where or {}).get(CONTAINS)
    parts = [{"$regex": f"(?i){_escaped(str(part))}"} for part in choices(wanted) if str(part)]
    if not parts:
        return None
    return parts[0] if len(parts) == 1 else {"$or": parts}


def _escaped(text: str) -> str:
    return "".join(f"\\{sign}" if sign in r"\.+*?()|[]{}^$#&-~/" else sign for sign in text)
