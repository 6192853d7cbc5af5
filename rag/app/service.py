"""What the API and the page do: ask, edit, undo, take documents in. Every answer sees one state of weights and documents."""

from __future__ import annotations

import re
import threading
from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

from lab.errors import RequestError
from lab.records import Trust
from rag.asking import Asker, check_text
from rag.facts import named_fact, names_of, question_of
from rag.ledger import Ledger
from rag.ledger.values import OnConflict
from rag.makers import edit_maker
from rag.store import Chunk, DocumentStore, chunk_id

if TYPE_CHECKING:
    from lab.handle import ModelHandle
    from rag.guard import Thresholds

MAX_DOCUMENT = 1_000_000
_PIECE = 600


class Service:
    """One model with its ledger and documents.

    Args:
        handle: The model; the ledger's weights must be this handle's.
        store: The documents, as they are searched.
        ledger: Takes edits and documents in.
        reader: How documents are read (``knowlab list readers``).
        decoding: How answers are decoded.
        editor: What changes the weights (``knowlab list editors``).
        documents: How many documents an answer is given at most.
        thresholds: Where the guard's measuring gates close while something is to be forgotten; see ``rag.guard.calibrate``.
    """

    def __init__(
        self,
        handle: ModelHandle,
        store: DocumentStore,
        ledger: Ledger,
        *,
        reader: str = "con",
        decoding: str = "greedy",
        editor: str = "rome",
        documents: int = 4,
        thresholds: Thresholds | None = None,
    ) -> None:
        self.handle = handle
        self.store = store
        self.ledger = ledger
        self.editor = editor
        self.asker = Asker(
            handle,
            store,
            ledger,
            reader=reader,
            decoding=decoding,
            documents=documents,
            thresholds=thresholds,
        )
        # What a change starts from is read before it is made; two at once would start from the same.
        self._changing = threading.RLock()

    def ask(
        self, question: str, *, mode: str = "documents", policy: str = "context", attention: bool = False
    ) -> dict[str, Any]:
        """Answers a question; see ``Asker.ask``."""
        return self.asker.ask(question, mode=mode, policy=policy, attention=attention)

    def edit(
        self,
        subject: str,
        relation: str,
        new: str,
        *,
        object: str = "",
        prompt: str = "",
        on_conflict: OnConflict = "edit_wins",
    ) -> dict[str, Any]:
        """Makes ``new`` the object of a fact, in weights, ledger and documents; see ``Ledger.edit`` and ``named_fact``."""
        for part in (subject, relation, new, object, prompt):
            check_text(part, "the fact")
        fact = named_fact(subject, relation, object=object, prompt=prompt)
        make = edit_maker(self.handle, self.editor, fact, new.strip())
        outcome = self.ledger.edit(
            fact,
            new.strip(),
            make,
            on_conflict=on_conflict,
            question=question_of(fact),
            names=names_of(fact),
        )
        return {**outcome.to_json(), "question": question_of(fact), "state": self.handle.state}

    def undo(self, entry: int | None = None) -> dict[str, Any]:
        """Takes an entry off, the last one in force by default.

        Raises:
            RequestError: Nothing is in force.
        """
        with self._changing:
            if entry is None:
                active = [one.id for one in self.ledger.entries() if one.status == "active"]
                if not active:
                    raise RequestError("there is nothing to undo")
                entry = active[-1]
            return {**self.ledger.rollback(entry).to_json(), "state": self.handle.state}

    def ingest(self, name: str, text: str, *, trust: Trust | None = None) -> dict[str, Any]:
        """Takes a document in; one of the same name is replaced.

        Raises:
            RequestError: The text is blank or too long, or the name is a path out of the documents.
        """
        source = check_name(name)
        check_text(text, f"the document {source!r}")
        if len(text) > MAX_DOCUMENT:
            raise RequestError(f"the document has {len(text)} characters; give at most {MAX_DOCUMENT}")
        chunks = pieces(source, text, trust)
        if not chunks:
            raise RequestError(f"the document {name!r} holds no text")
        kept = {chunk.id for chunk in chunks}
        with self._changing:
            old = [chunk.id for chunk in self.ledger.documents.chunks(where={"source": source})]
            gone = [id for id in old if id not in kept]
            outcome = self.ledger.put(chunks, gone)
            held = self.store.chunks(outcome.changed)
        hidden = [chunk.id for chunk in held if chunk.status != "live"]
        return {"name": source, "chunks": len(chunks), "hidden": hidden, "removed": len(gone)}

    def health(self) -> dict[str, Any]:
        """What runs here."""
        active = [entry for entry in self.ledger.entries() if entry.status == "active"]
        return {
            "status": "ok",
            "model": self.handle.name,
            "state": self.handle.state,
            "entries": len(active),
            "open": len(self.ledger.rows.open()),
        }

    def changes(self) -> list[dict[str, Any]]:
        """Edits in force, oldest first. What was forgotten is not among them: to name it would say what it was."""
        return [
            {
                "entry": entry.id,
                "subject": entry.fact.subject,
                "relation": entry.fact.relation,
                "before": entry.fact.answers[0],
                "now": entry.new,
            }
            for entry in sorted(self.ledger.in_force().values(), key=lambda entry: entry.id)
            if entry.op == "edit"
        ]


def check_name(name: str) -> str:
    """The name of a document, when it is one.

    Raises:
        RequestError: It is empty, or would lead out of the documents.
    """
    path = PurePosixPath(name)
    parts = path.parts
    bad = path.is_absolute() or ".." in parts or "\\" in name or ":" in name
    if not name.strip() or bad or not name.isprintable() or len(name) > 200:
        raise RequestError(
            f"{name[:80]!r} cannot name a document; use a plain name such as notes/report.txt, without .., and not from the root"
        )
    return str(path)


def pieces(source: str, text: str, trust: Trust | None = None) -> list[Chunk]:
    """A text as chunks of whole sentences, by paragraph."""
    found: list[str] = []
    for paragraph in re.split(r"\n\s*\n", text):
        piece = ""
        for sentence in re.split(r"(?<=[.!?])\s+", " ".join(paragraph.split())):
            while len(sentence) > _PIECE:
                found.append(sentence[:_PIECE])
                sentence = sentence[_PIECE:]
            if piece and len(piece) + len(sentence) >= _PIECE:
                found.append(piece)
                piece = ""
            piece = f"{piece} {sentence}".strip()
        found.append(piece)
    seen: dict[str, int] = {}
    chunks = []
    for position, piece in enumerate(piece for piece in found if piece.strip()):
        repeat = seen[piece] = seen.get(piece, -1) + 1
        chunks.append(Chunk(chunk_id(source, piece, repeat), piece, source, position, trust))
    return chunks


def read_folder(folder: Any) -> Sequence[Chunk]:
    """Every file below a folder that an index reads, as chunks.

    Raises:
        ConfigError: There is no such folder.
        DataError: A file cannot be read; names the first.
    """
    from lab.errors import DataError
    from rag.index import load

    found = load.read_folder(folder, name="documents")
    if found.problems:
        first = found.problems[0]
        source = first.source.removeprefix("documents/")
        raise DataError(
            f"{first.reason} ({len(found.problems)} such problems); move it away, or make an index, which leaves it out",
            source,
        )
    return [
        chunk
        for document in found.documents
        for chunk in pieces(document.source.removeprefix("documents/"), document.text, document.trust)
    ]
