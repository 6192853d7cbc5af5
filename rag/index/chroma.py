"""The document store in Chroma: embedded in a folder, or on a server.

Live chunks are in one collection and all others in a second one: a filter on the status would make every query about ten
times slower, and nothing that must not be retrieved lies where queries look. A chunk that is on its way from one to the other when the
process dies is in both; the second one counts then.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args
from urllib.parse import urlsplit

import numpy as np

from lab.errors import ConfigError, MissingDependencyError
from lab.locks import ReadWriteLock
from lab.records import write_text_atomically
from rag.index.embed import CheckedEmbeddings, TextEmbeddings
from rag.index.lock import WriterLock
from rag.index.shelf import Shelf
from rag.index.words import diverse, fuse
from rag.store import STATUSES, Chunk, Retrieved, Where, by_id, check_search, choices, fits, retrievable

Mode = Literal["hybrid", "dense", "words"]
MODES: tuple[Mode, ...] = get_args(Mode)
_SCHEMA = 1
_REVISION_FILE = "revision"
# A sentence model reads a few hundred tokens; a longer question is cut before it costs anything.
_QUERY_LENGTH = 20_000
# Candidates of each ranking for a result.
_FETCH, _FETCH_LEAST = 4, 24


class Index:
    """A ``DocumentStore`` in Chroma; ``open_index`` makes one. Use it in a ``with``, or ``close`` it.

    Threads may share an index: searches run beside each other and never see half of a change.

    Attributes:
        place: Folder or address.
        writable: Whether it was opened for writing.
    """

    def __init__(
        self, place: str, embeddings: TextEmbeddings | str | Path | None, write: bool, name: str
    ) -> None:
        self.place = place
        self.writable = write
        self._name = name
        self._folder = (
            None if place.startswith(("http://", "https://")) else Path(place).expanduser().resolve()
        )
        self._lock = ReadWriteLock()
        self._writers = threading.RLock()
        self._file_lock = self._claim() if write else None
        try:
            self._connect()
            card = dict(self._live.collection.metadata or {})
            self._embeddings = CheckedEmbeddings(embeddings, card)
            if "embedding" not in card:
                self._check_writable()
                self._live.collection.modify(metadata={"schema": _SCHEMA, **self._embeddings.card()})
            elif card.get("schema") != _SCHEMA:
                raise ConfigError(
                    f"the index {place} has the form {card.get('schema')}, this version reads {_SCHEMA}"
                )
            if write:
                self._heal()
        except BaseException:
            self.close()
            raise

    # -- opening --------------------------------------------------------------------------------------------------

    def _claim(self) -> WriterLock | None:
        if self._folder is None:
            return None
        if self._folder.exists() and not self._folder.is_dir():
            raise ConfigError(f"{self._folder} is a file; an index is a folder")
        self._folder.mkdir(parents=True, exist_ok=True)
        return WriterLock(self._folder)

    def _connect(self) -> None:
        try:
            import chromadb
            from chromadb.config import Settings
            from chromadb.errors import ChromaError
        except ImportError:
            raise MissingDependencyError("chromadb", "an index", "app") from None
        settings = Settings(anonymized_telemetry=False)
        try:
            if self._folder is None:
                parts = urlsplit(self.place)
                secure = parts.scheme == "https"
                self._client: Any = chromadb.HttpClient(
                    host=parts.hostname or "",
                    port=parts.port or (443 if secure else 80),
                    ssl=secure,
                    settings=settings,
                )
            else:
                if not self.writable and not (self._folder / "chroma.sqlite3").is_file():
                    raise ConfigError(
                        f"no index in {self._folder}; make one with `knowlab rag index FOLDER --store {self._folder}`"
                    )
                self._seen = self._revision()
                self._client = chromadb.PersistentClient(path=str(self._folder), settings=settings)
            self._live, self._aside = (Shelf(self._collection(part)) for part in ("live", "aside"))
        except ConfigError:
            raise
        except (ChromaError, ValueError, OSError, RuntimeError) as error:
            raise ConfigError(f"cannot open the index {self.place}: {error}") from error

    def _collection(self, part: str) -> Any:
        name = f"{self._name}-{part}"
        if self.writable:
            # Only a new collection takes the configuration.
            self._client.get_or_create_collection(
                name, embedding_function=None, configuration={"hnsw": {"space": "cosine"}}
            )
        found = self._client.get_collection(name, embedding_function=None)
        space = (found.configuration.get("hnsw") or {}).get("space")
        if space != "cosine":
            raise ConfigError(
                f"the collection {name!r} in {self.place} measures {space!r}, not cosine; it is no index of ours"
            )
        return found

    def _heal(self) -> None:
        """Finishes a move that an earlier process did not: what lies aside is not live."""
        aside = self._aside.collection.get(include=[])["ids"]
        if both := self._live.has(aside):
            self._live.delete(sorted(both))

    def close(self) -> None:
        """Ends the use of the index and lets others write; does nothing the second time."""
        with self._writers, self._lock.writing():
            client = self.__dict__.pop("_client", None)
            if client is not None:
                client.close()
            lock, self._file_lock = getattr(self, "_file_lock", None), None
            if lock is not None:
                lock.release()

    def __enter__(self) -> Index:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- as a store -----------------------------------------------------------------------------------------------

    @property
    def embedding(self) -> str:
        """Name of the embeddings."""
        return self._embeddings.name

    def counts(self) -> dict[str, int]:
        """Number of live chunks and of those set aside."""
        self._refresh()
        with self._lock.reading():
            return {"live": len(self._live), "aside": len(self._aside)}

    def chunks(self, ids: Sequence[str] | None = None, where: Where | None = None) -> list[Chunk]:
        """See ``rag.store.DocumentStore``."""
        self._refresh()
        with self._lock.reading():
            if ids is None:
                found = {chunk.id: chunk for chunk in self._live.select(where)}
                # A chunk in both counts as the one aside, also where that one does not fit.
                for id in self._aside.has(list(found)):
                    del found[id]
                found |= {chunk.id: chunk for chunk in self._aside.select(where)}
                return sorted(found.values(), key=lambda chunk: (chunk.source, chunk.position, chunk.id))
            held = {**self._live.get(ids), **self._aside.get(ids)}
        chosen = [held[id][0] for id in dict.fromkeys(ids) if id in held]
        return [chunk for chunk in chosen if fits(chunk, where)]

    def put(self, chunks: Sequence[Chunk]) -> None:
        """See ``rag.store.DocumentStore``; only texts that are new are embedded.

        Raises:
            ConfigError: The index was opened for reading, or two chunks have one id.
        """
        self._check_writable()
        wanted = list(by_id(chunks).values())
        if not wanted:
            return
        with self._writers:
            ids = [chunk.id for chunk in wanted]
            # Asked once: nobody else writes until this is done.
            known = {shelf: shelf.get(ids) for shelf in (self._live, self._aside)}
            vectors = self._vectors(wanted, {**known[self._live], **known[self._aside]})
            with self._lock.writing():
                # Aside first: a chunk that stops being live is never lost and soon not found.
                for own, other, live in ((self._aside, self._live, False), (self._live, self._aside, True)):
                    rows = [i for i, chunk in enumerate(wanted) if (chunk.status == "live") == live]
                    if not rows:
                        continue
                    own.write([wanted[i] for i in rows], vectors[rows], known[own])
                    if moved := [ids[i] for i in rows if ids[i] in known[other]]:
                        other.delete(sorted(moved))
            self._bump()

    def remove(self, ids: Sequence[str]) -> None:
        """See ``rag.store.DocumentStore``.

        Raises:
            ConfigError: The index was opened for reading.
        """
        self._check_writable()
        with self._writers:
            with self._lock.writing():
                # Live first: a chunk that lies in both must not come back.
                for shelf in (self._live, self._aside):
                    if here := shelf.has(list(dict.fromkeys(ids))):
                        shelf.delete(sorted(here))
            self._bump()

    def search(
        self,
        query: str,
        k: int,
        where: Where | None = None,
        *,
        mode: Mode = "hybrid",
        mmr: float | None = None,
    ) -> list[Retrieved]:
        """See ``rag.store.DocumentStore``.

        Args:
            query: A question; past 20,000 characters it is cut. Nothing is found for one without text.
            k: How many chunks.
            where: A condition; see ``rag.store.Where``.
            mode: ``dense`` ranks by the cosine of the embeddings, ``words`` by BM25, ``hybrid`` joins the two by their ranks.
            mmr: Chooses among the best results those that differ: 1 looks at the query alone, 0 at what was chosen before.

        Raises:
            ConfigError: ``k`` is below 1, or there is no such mode or weight.
        """
        check_search(k)
        if mode not in MODES:
            raise ConfigError(f"unknown search mode {mode!r}; use {', '.join(MODES)}")
        if mmr is not None and not 0 <= mmr <= 1:
            raise ConfigError(f"mmr is a weight from 0 to 1, it is {mmr}")
        query = query[:_QUERY_LENGTH].strip()
        if not query:
            return []
        where = retrievable(where)
        fetch = k if mode != "hybrid" and mmr is None else max(_FETCH * k, _FETCH_LEAST)
        vector = self._embeddings.query(query) if mode != "words" or mmr is not None else None
        self._refresh()
        with self._lock.reading():
            ranked = self._ranked(query, vector if mode != "words" else None, fetch, where, mode)
            held: dict[str, tuple[Chunk, np.ndarray]] = {}
            for shelf, _ in self._shelves(where):
                held |= shelf.get([id for id, _ in ranked])
            # A chunk in both collections is not live.
            for id in self._aside.has([id for id, (chunk, _) in held.items() if chunk.status == "live"]):
                del held[id]
        best = [(held[id], score) for id, score in ranked if id in held]
        if mmr is not None and vector is not None and best:
            order = diverse(vector, np.stack([found[1] for found, _ in best]), k, mmr)
            best = [best[index] for index in order]
        return [Retrieved(chunk, score) for (chunk, _), score in best[:k]]

    def _shelves(self, where: Where) -> list[tuple[Shelf, Where]]:
        """The collections that a condition looks at, each with the rest of the condition."""
        wanted = where["status"]
        statuses = set(STATUSES if wanted is None else choices(wanted))
        rest = {key: value for key, value in where.items() if key != "status"}
        found: list[tuple[Shelf, Where]] = []
        if "live" in statuses:
            found.append((self._live, rest))
        if others := sorted(status for status in statuses if status in STATUSES and status != "live"):
            found.append((self._aside, {**rest, "status": others}))
        return found

    def _ranked(
        self, query: str, vector: np.ndarray | None, fetch: int, where: Where, mode: Mode
    ) -> list[tuple[str, float]]:
        rankings: list[list[tuple[str, float]]] = []
        if vector is not None:
            dense = [
                hit for shelf, rest in self._shelves(where) for hit in shelf.nearest(vector, fetch, rest)
            ]
            rankings.append(sorted(dense, key=lambda hit: (-hit[1], hit[0]))[:fetch])
        if mode != "dense":
            lexical = [
                hit for shelf, rest in self._shelves(where) for hit in shelf.by_words(query, fetch, rest)
            ]
            rankings.append(sorted(lexical, key=lambda hit: (-hit[1], hit[0]))[:fetch])
        if mode != "hybrid":
            return rankings[0]
        return fuse([[id for id, _ in ranking] for ranking in rankings])[:fetch]

    def _vectors(self, chunks: Sequence[Chunk], held: Mapping[str, tuple[Chunk, np.ndarray]]) -> np.ndarray:
        """Vectors of chunks, taken from those held where the text is the same."""
        found: list[np.ndarray | None] = [
            held[chunk.id][1] if chunk.id in held and held[chunk.id][0].text == chunk.text else None
            for chunk in chunks
        ]
        missing = [index for index, vector in enumerate(found) if vector is None]
        if len(missing) == len(chunks):
            return self._embeddings.documents([chunk.text for chunk in chunks])
        if missing:
            made = self._embeddings.documents([chunks[index].text for index in missing])
            for index, vector in zip(missing, made, strict=True):
                found[index] = vector
        return np.stack([vector for vector in found if vector is not None])

    # -- other processes ------------------------------------------------------------------------------------------

    def _check_writable(self) -> None:
        if not self.writable:
            raise ConfigError(
                f"the index {self.place} is open for reading; open it with write=True to change it"
            )

    def _revision(self) -> str:
        try:
            return (self._folder / _REVISION_FILE).read_text(encoding="utf-8") if self._folder else ""
        except FileNotFoundError:
            return ""

    def _bump(self) -> None:
        if self._folder is not None:
            # Chroma's queries do not see what another process wrote; a reader that finds another number opens it again.
            self._seen = str(int(self._revision() or 0) + 1)
            write_text_atomically(self._folder / _REVISION_FILE, self._seen)

    def _refresh(self) -> None:
        if self.writable or self._folder is None or self._revision() == self._seen:
            return
        with self._lock.writing():
            if self._revision() != self._seen:
                self._client.close()
                self._connect()


def open_index(
    place: str | Path,
    *,
    embeddings: TextEmbeddings | str | Path | None = None,
    write: bool = False,
    name: str = "knowlab",
) -> Index:
    """Opens an index.

    Args:
        place: A folder, or the address of a Chroma server (``http://127.0.0.1:8000``). Several processes may read a folder while one
            writes; a server takes the calls of many, and its writers are not kept apart here.
        embeddings: ``minilm``, a folder, a sentence-transformers id, or an object with LangChain's ``embed_documents`` and
            ``embed_query``; without it, what the index was made with, ``minilm`` for a new one.
        write: Open it for writing; makes it where there is none.
        name: Several indexes may share a place; each has a name.

    Raises:
        BusyError: Somebody else writes; says who.
        ConfigError: There is no index, it cannot be opened, or it was made with other embeddings.
    """
    return Index(str(place), embeddings, write, name)
