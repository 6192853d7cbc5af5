"""Bringing a folder into a store: chunks with stable ids, only what changed is written."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lab.errors import ConfigError, DataError, MissingDependencyError
from lab.records import Trust
from rag.index.load import SIZE_LIMIT, Document, Found, Problem, read_folder
from rag.store import Chunk, DocumentStore, chunk_id

if TYPE_CHECKING:
    from langchain_text_splitters import RecursiveCharacterTextSplitter

Advance = Callable[[str, int, int], None]
Admit = Callable[[Sequence[Chunk]], Sequence[Chunk]]
# Chunks that are embedded and written together; searches wait no longer than for these.
_BATCH = 256


@dataclass(frozen=True)
class Chunking:
    """How documents are cut.

    Attributes:
        size: Characters of the longest chunk; the default sentence model reads about a thousand.
        overlap: Characters that a chunk shares with the one before.

    Raises:
        ConfigError: A number that makes no sense.
    """

    size: int = 800
    overlap: int = 80

    def __post_init__(self) -> None:
        if self.size < 1 or not 0 <= self.overlap < self.size:
            raise ConfigError(
                f"a chunk of {self.size} characters cannot share {self.overlap} with the one before"
            )


@dataclass(frozen=True)
class Ingested:
    """What an ingest did.

    Attributes:
        documents: Documents that were read.
        added: Chunks that were new.
        updated: Chunks whose text was known and whose place, trust or fields changed.
        removed: Chunks whose text their document no longer holds, or whose document is gone.
        unchanged: Chunks that were left alone.
        missing: Sources that the store holds and the folder does not, and that were kept because nobody asked to prune.
        problems: What was not read; what the store holds of it stays.
        skipped: Files of kinds that are not read.
    """

    documents: int
    added: int
    updated: int
    removed: int
    unchanged: int
    missing: tuple[str, ...] = ()
    problems: tuple[Problem, ...] = ()
    skipped: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """As a JSON object."""
        return asdict(self)


def cut(document: Document, chunking: Chunking | None = None) -> list[Chunk]:
    """The chunks of a document, in its order; Markdown is cut at its headings first.

    Raises:
        MissingDependencyError: langchain-text-splitters is not installed.
    """
    chunking = chunking or Chunking()
    times: Counter[str] = Counter()
    chunks: list[Chunk] = []
    for text in _splitter(document.kind, chunking).split_text(document.text):
        if not text.strip():
            continue
        repeat, times[text] = times[text], times[text] + 1
        id = chunk_id(document.source, text, repeat)
        chunks.append(Chunk(id, text, document.source, len(chunks), document.trust, extra=document.extra))
    return chunks


def _splitter(kind: str, chunking: Chunking) -> RecursiveCharacterTextSplitter:
    try:
        from langchain_text_splitters import Language, RecursiveCharacterTextSplitter
    except ImportError:
        raise MissingDependencyError("langchain-text-splitters", "cutting documents", "app") from None
    settings: dict[str, Any] = {"chunk_size": chunking.size, "chunk_overlap": chunking.overlap}
    if kind == "markdown":
        return RecursiveCharacterTextSplitter.from_language(Language.MARKDOWN, **settings)
    return RecursiveCharacterTextSplitter(**settings)


def ingest(
    store: DocumentStore,
    folder: str | Path,
    *,
    name: str = "",
    trust: Trust | None = None,
    chunking: Chunking | None = None,
    prune: bool = False,
    strict: bool = False,
    size_limit: int = SIZE_LIMIT,
    admit: Admit | None = None,
    progress: Advance | None = None,
) -> Ingested:
    """Brings a folder into a store; doing it twice changes nothing the second time.

    Args:
        store: Where to.
        folder: The folder, or one file.
        name: Begins the sources; two folders of one name in one store take each other's place, so name one of them.
        trust: Trust of every document that does not state its own.
        chunking: How documents are cut.
        prune: Remove what the store holds of this folder and the folder no longer does.
        strict: Write nothing where a file cannot be read; without it the others are brought in and the problem is reported.
        size_limit: Bytes of the largest file that is read.
        admit: Looks at new chunks before they are stored and returns them, changed if need be (another status, a note).
        progress: Called with a phase, what is done of it, and its total.

    Raises:
        ConfigError: There is no such folder.
        DataError: ``strict``, and something cannot be read; names the first of it.
    """
    found = read_folder(folder, name=name, trust=trust, size_limit=size_limit)
    if strict and found.problems:
        first = found.problems[0]
        raise DataError(f"{first.reason} ({len(found.problems)} problems; nothing was written)", first.source)
    label = name or Path(folder).expanduser().resolve().name
    wanted = [chunk for document in found.documents for chunk in cut(document, chunking)]
    stored = [chunk for chunk in store.chunks() if _belongs(chunk.source, label)]
    new, changed, obsolete = difference(wanted, stored, {document.source for document in found.documents})
    gone = _gone(stored, found)
    if prune:
        obsolete += [chunk for chunk in stored if chunk.source in gone]
    admitted = list(admit(new)) if admit else new
    writes = [*admitted, *changed]
    for begin in range(0, len(writes), _BATCH):
        store.put(writes[begin : begin + _BATCH])
        if progress:
            progress("chunks", min(begin + _BATCH, len(writes)), len(writes))
    # Last, so that an interruption leaves too much rather than too little; the next ingest goes on.
    if obsolete:
        store.remove([chunk.id for chunk in obsolete])
    return Ingested(
        documents=len(found.documents),
        added=len(admitted),
        updated=len(changed),
        removed=len(obsolete),
        unchanged=len(wanted) - len(new) - len(changed),
        missing=() if prune else tuple(sorted(gone)),
        problems=found.problems,
        skipped=found.skipped,
    )


def difference(
    wanted: Sequence[Chunk], stored: Sequence[Chunk], read: Iterable[str]
) -> tuple[list[Chunk], list[Chunk], list[Chunk]]:
    """What turns stored chunks into wanted ones.

    A stored chunk keeps its status, its note and the fields that others gave it. One that was put in the place of another
    (``extra["replaces"]``) stays as long as the document holds the text of that one.

    Args:
        wanted: Chunks of the documents that were read.
        stored: Chunks of the store.
        read: Sources of these documents; chunks of others are left alone.

    Returns:
        New chunks, changed ones, and obsolete ones.
    """
    known = {chunk.id: chunk for chunk in stored}
    heirs = {str(chunk.extra["replaces"]): chunk for chunk in stored if "replaces" in chunk.extra}
    new, changed = [], []
    kept: set[str] = set()
    for chunk in wanted:
        heir = heirs.get(chunk.id)
        if heir is not None:
            kept.add(heir.id)
        before = known.get(chunk.id)
        if before is None:
            if heir is None:
                new.append(chunk)
            continue
        kept.add(chunk.id)
        after = replace(
            before, position=chunk.position, trust=chunk.trust, extra={**before.extra, **chunk.extra}
        )
        if after != before:
            changed.append(after)
    sources = set(read)
    obsolete = [chunk for chunk in stored if chunk.id not in kept and chunk.source in sources]
    return new, changed, obsolete


def _belongs(source: str, label: str) -> bool:
    return source == label or source.startswith((f"{label}/", f"{label}#"))


def _gone(stored: Sequence[Chunk], found: Found) -> set[str]:
    """Sources that are no longer there; one that could not be read is."""
    there = {document.source for document in found.documents}
    # One bad row: nobody can say which of the file's rows it was.
    broken = [problem.source.rpartition("#")[0] or problem.source for problem in found.problems]
    return {
        chunk.source
        for chunk in stored
        if chunk.source not in there and not any(_belongs(chunk.source, source) for source in broken)
    }
