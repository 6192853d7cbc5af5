"""Asking with documents and a ledger: one answer, who said what, and what the ledger holds; nothing forgotten comes back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from lab.data.text import normalize_answer
from lab.errors import ConfigError, RequestError
from lab.records import Passage
from rag.ledger.conflicts import mentions
from rag.verdict import POLICIES, Policy, Voice, decide, judge

if TYPE_CHECKING:
    from lab.handle import ModelHandle
    from rag.guard import Decision, Guard, Thresholds
    from rag.ledger import Entry, Ledger
    from rag.readers import Reading
    from rag.store import DocumentStore

MAX_QUESTION = 2_000
ALL_POLICIES = (*POLICIES, "ledger")


def check_policy(policy: str) -> None:
    """Refuses a policy that an ``Asker`` does not know.

    Raises:
        ConfigError: There is no such policy.
    """
    if policy not in ALL_POLICIES:
        raise ConfigError(f"unknown policy {policy!r}; use {', '.join(ALL_POLICIES)}")


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


class Asker:
    """Answers questions from a model, documents and, where there is one, a ledger.

    Args:
        handle: The model; its patches are those of the ledger.
        store: The documents, as they are searched; none by default.
        ledger: What was edited and forgotten; nothing by default.
        reader: How documents are read (``knowlab list readers``).
        decoding: How answers are decoded.
        documents: How many documents of the store an answer is given at most.
        thresholds: Where the guard's measuring gates close while something is to be forgotten; see ``rag.guard.calibrate``.
        max_new_tokens: Longest answer.

    Raises:
        UnknownNameError: There is no such reader or rule.
    """

    def __init__(
        self,
        handle: ModelHandle,
        store: DocumentStore | None = None,
        ledger: Ledger | None = None,
        *,
        reader: str = "con",
        decoding: str = "greedy",
        documents: int = 4,
        thresholds: Thresholds | None = None,
        max_new_tokens: int = 24,
    ) -> None:
        from rag.decoding import get_rule
        from rag.readers import READERS

        self.handle = handle
        self.store = store
        self.ledger = ledger
        self.documents = documents
        self.thresholds = thresholds
        self.reader = READERS.get(reader)(handle, get_rule(decoding), max_new_tokens=max_new_tokens)
        self._last_guard: Guard | None = None

    def ask(
        self,
        question: str,
        *,
        mode: str = "documents",
        policy: str = "context",
        given: Sequence[Passage] = (),
        attention: bool = False,
    ) -> dict[str, Any]:
        """Answers a question.

        Args:
            question: At most ``MAX_QUESTION`` characters.
            mode: ``memory`` (no documents) or ``documents``.
            policy: Who wins where sources differ: ``context``, ``memory``, ``trust``, or ``ledger`` (what the ledger says, then
                documents before memory).
            given: Documents that are read before those of the store.
            attention: Measures how much the model looks at each passage where the answer begins; nobody else is answered
                meanwhile.

        Raises:
            RequestError: The question is empty or too long.
            ConfigError: An unknown mode or policy.
        """
        question = check_text(question.strip(), "the question")
        if not question:
            raise RequestError("the question is empty")
        if len(question) > MAX_QUESTION:
            raise RequestError(
                f"the question has {len(question)} characters; ask with at most {MAX_QUESTION}"
            )
        if mode not in ("memory", "documents"):
            raise ConfigError(f"unknown mode {mode!r}; use memory or documents")
        check_policy(policy)
        chosen: Policy | None = next((name for name in POLICIES if name == policy), None)
        # Documents, ledger and weights are read under one lock, the one that a change of any of them takes.
        with self.handle.writing() if attention else self.reader.holding():
            found = [*given, *self._passages(question)] if mode == "documents" else []
            guard = self._guard()
            decision, readings = self._guarded(guard, question, found)
            passages = list(decision.passages)
            if decision.stopped:
                # What is stopped looks like what nobody knows: no voice is heard.
                return self._unknown(question, mode, policy)
            reading = readings[-1]
            verdict = judge(self.handle, question, passages, chosen or "context")
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

    def _guard(self) -> Guard:
        from rag.guard import Forgotten, Guard

        facts = tuple(Forgotten.of_entry(entry) for entry in self._in_force() if entry.op == "forget")
        guard = self._last_guard
        # It remembers how likely forgotten answers are without documents.
        if guard is None or guard.forgotten != facts:
            guard = self._last_guard = Guard(self.handle, facts, self.thresholds)
        return guard

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
        if self.store is None:
            return []
        return [found.chunk.passage for found in self.store.search(question, self.documents)]

    def _in_force(self) -> list[Entry]:
        return [] if self.ledger is None else list(self.ledger.in_force().values())

    def _entry(self, question: str) -> Entry | None:
        """The entry in force that a question asks for: its own question, or its subject with the relation's label."""
        from lab.atlas.forms import load_format

        relations = load_format().relations
        for entry in self._in_force():
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
