"""What the API and the page do: ask, edit, undo, take documents in. Every answer sees one state of weights and documents."""

from __future__ import annotations

import re
import threading
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

from lab.data.text import normalize_answer
from lab.errors import ConfigError, RequestError
from lab.records import Passage, Trust
from rag.facts import named_fact, names_of, question_of
from rag.ledger import Ledger
from rag.ledger.conflicts import mentions
from rag.ledger.values import Entry, OnConflict
from rag.makers import edit_maker
from rag.store import Chunk, DocumentStore, chunk_id
from rag.verdict import Voice, decide

if TYPE_CHECKING:
    from lab.handle import ModelHandle
    from rag.guard import Decision, Guard, Thresholds
    from rag.readers import Reading
    from rag.verdict import Policy

MAX_QUESTION = 2_000
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
        from rag.decoding import get_rule
        from rag.readers import READERS

        self.handle = handle
        self.store = store
        self.ledger = ledger
        self.editor = editor
        self.documents = documents
        self.thresholds = thresholds
        self.reader = READERS.get(reader)(handle, get_rule(decoding))
        # What a change starts from is read before it is made; two at once would start from the same.
        self._changing = threading.RLock()

    def ask(
        self, question: str, *, mode: str = "documents", policy: str = "context", attention: bool = False
    ) -> dict[str, Any]:
        """Answers a question.

        Args:
            question: At most ``MAX_QUESTION`` characters.
            mode: ``memory`` (no documents) or ``documents``.
            policy: Who wins where sources differ: ``context``, ``memory``, ``trust``, or ``ledger`` (what the ledger says, then
                documents before memory).
            attention: Measures how much the model looks at each passage where the answer begins; nobody else is answered
                meanwhile.

        Raises:
            RequestError: The question is empty or too long.
            ConfigError: An unknown mode or policy.
        """
        from rag.verdict import POLICIES, judge

        question = check_text(question.strip(), "the question")
        if not question:
            raise RequestError("the question is empty")
        if len(question) > MAX_QUESTION:
            raise RequestError(
                f"the question has {len(question)} characters; ask with at most {MAX_QUESTION}"
            )
        if mode not in ("memory", "documents"):
            raise ConfigError(f"unknown mode {mode!r}; use memory or documents")
        if policy not in (*POLICIES, "ledger"):
            raise ConfigError(f"unknown policy {policy!r}; use {', '.join(POLICIES)} or ledger")
        chosen: Policy = next((name for name in POLICIES if name == policy), "context")
        # Documents, ledger and weights are read under one lock, the one that a change of any of them takes.
        with self.handle.writing() if attention else self.reader.holding():
            found = self._passages(question) if mode == "documents" else []
            guard = self._guard()
            decision, readings = self._guarded(guard, question, found)
            passages = list(decision.passages)
            if decision.stopped:
                # What is stopped looks like what nobody knows: no voice is heard.
                return self._unknown(question, mode, policy)
            reading = readings[-1]
            verdict = judge(self.handle, question, passages, chosen)
            heard = [voice.answer for voice in (verdict.memory, *verdict.documents) if voice.answer]
            if guard.forgotten and guard.check(question, passages, "; ".join(heard)).stopped:
                return self._unknown(question, mode, policy)
            looked = self._attention(question, passages, reading) if attention else ()
            entry = self._entry(question)
            state = self.handle.state
        said = verdict.to_json()
        said["context"] = said.pop("documents")
        said["ledger"] = _ledger_voice(entry)
        said["policy"] = policy
        answer = reading.answer
        if policy == "ledger" and entry is not None and entry.op == "edit":
            said |= {"answer": entry.new, "winner": "ledger"}
            answer = str(entry.new)
        return {
            "question": question,
            "mode": mode,
            "answer": answer,
            "known": reading.known or answer != reading.answer,
            "verdict": said,
            "notes": [note.to_json() for note in reading.notes],
            "passages": [asdict(passage) for passage in passages],
            "attention": list(looked),
            "state": state,
        }

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

    def _guard(self) -> Guard:
        from rag.guard import Forgotten, Guard

        ruling = self.ledger.in_force().values()
        facts = [Forgotten.of_entry(entry) for entry in ruling if entry.op == "forget"]
        return Guard(self.handle, facts, self.thresholds)

    def _attention(self, question: str, passages: Sequence[Passage], reading: Reading) -> tuple[float, ...]:
        """How much the model looks at each passage where the answer begins."""
        from lab.attention import text_attention

        prompts = self.reader.prompts
        if reading.notes and not reading.fallback:
            prompt = prompts.after_notes(prompts.notes(question, passages), reading.raw)
        else:
            prompt = prompts.direct(question, passages)
        return text_attention(self.handle, prompt, [passage.text.strip() for passage in passages])

    def _guarded(
        self, guard: Guard, question: str, passages: Sequence[Passage]
    ) -> tuple[Decision, list[Reading]]:
        """What the guard lets through, and the readings it took; the last is that of the answer."""
        readings: list[Reading] = []

        def read(some: Sequence[Passage]) -> str:
            readings.append(self.reader.read(question, some))
            return readings[-1].answer

        return guard.answer(question, passages, read), readings

    def _unknown(self, question: str, mode: str, policy: str) -> dict[str, Any]:
        unknown = self.reader.prompts.unknown
        silent = decide(question, Voice("memory", None), (), "context", unknown=unknown).to_json()
        del silent["documents"]
        return {
            "question": question,
            "mode": mode,
            "answer": unknown,
            "known": False,
            "verdict": {**silent, "context": [], "ledger": None, "policy": policy},
            "notes": [],
            "passages": [],
            "attention": [],
            "state": self.handle.state,
        }

    def _passages(self, question: str) -> list[Passage]:
        return [found.chunk.passage for found in self.store.search(question, self.documents)]

    def _entry(self, question: str) -> Entry | None:
        """The entry in force that a question asks for: its own question, or its subject with the relation's label."""
        from lab.atlas.forms import load_format

        relations = load_format().relations
        for entry in self.ledger.in_force().values():
            fact = entry.fact
            if normalize_answer(question) == normalize_answer(fact.question):
                return entry
            label = relations[fact.relation].label if fact.relation in relations else fact.relation
            if mentions(question, fact.names) and mentions(question, [label]):
                return entry
        return None


def _ledger_voice(entry: Entry | None) -> dict[str, Any] | None:
    # To say that a fact was forgotten would say what it was.
    if entry is None or entry.op != "edit":
        return None
    return {"entry": entry.id, "op": entry.op, "answer": entry.new, "before": entry.fact.answers[0]}


def check_text(text: str, what: str) -> str:
    """A text, when it is one.

    Raises:
        RequestError: It holds zero bytes or half a character.
    """
    if "\0" in text:
        raise RequestError(f"{what} is binary: a text holds no zero bytes")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RequestError(
            f"{what} holds half a character at place {error.start}; send it as UTF-8"
        ) from None
    return text


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
