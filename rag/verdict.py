"""Who says what, who agrees, and who wins: memory and every document heard apart, then one answer by a stated policy.

Memory is heard by the question without documents. A document is heard by what the model notes on it when it reads it alone:
asking for the answer instead would often give memory's, also below a document that contradicts it. What a note claims counts
only where the document's own text holds it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

from lab.data.text import normalize_answer
from lab.errors import ConfigError
from lab.records import Passage, Trust
from lab.scoring import score_targets

if TYPE_CHECKING:
    from lab.handle import ModelHandle

Policy = Literal["context", "memory", "trust"]
Agreement = Literal["agree", "conflict", "documents_differ", "documents_only", "memory_only", "silent"]
Winner = Literal["both", "documents", "memory", "nobody"]

POLICIES: tuple[Policy, ...] = get_args(Policy)
AGREEMENTS: tuple[Agreement, ...] = get_args(Agreement)
# How far a document is believed under the policy `trust`; one that is not there is not believed at all.
_RANK: Mapping[Trust | None, int] = {"verified": 3, None: 1, "unverified": 1}
_MEMORY_RANK = 2


@dataclass(frozen=True)
class Voice:
    """What one source says.

    Attributes:
        source: ``memory``, or the id of the passage, or its number where it has no id.
        answer: What it says; ``None`` where it says nothing about the question.
        confidence: The model's probability of the answer with this source alone, length-normalised; 0 without an answer.
        trust: The passage's trust level, where it has one.
        kind: Kind of the note on the passage; empty for memory and where the model wrote no note.
    """

    source: str
    answer: str | None
    confidence: float = 0.0
    trust: Trust | None = None
    kind: str = ""

    def to_json(self) -> dict[str, Any]:
        """As a JSON object."""
        return {
            "source": self.source,
            "answer": self.answer,
            "confidence": self.confidence,
            "trust": self.trust,
            "kind": self.kind,
        }


@dataclass(frozen=True)
class Verdict:
    """The outcome of one question.

    Attributes:
        question: As asked.
        memory: What the model says without documents.
        documents: What each document says, in the order given.
        agreement: ``agree`` (memory and all documents that speak say the same), ``conflict`` (the documents agree with each other,
            against memory), ``documents_differ``, ``documents_only`` (memory is silent), ``memory_only``, or ``silent``.
        answer: The answer by the policy; the word for unknown where nothing supports one.
        confidence: That of the surest source that won; 0 where nobody did.
        winner: ``both`` where memory and a document say the answer, ``documents``, ``memory``, or ``nobody``.
        policy: ``context`` (documents before memory), ``memory`` (memory before documents), or ``trust`` (verified documents,
            then memory, then documents without a header or unverified; superseded ones do not count).
    """

    question: str
    memory: Voice
    documents: tuple[Voice, ...]
    agreement: Agreement
    answer: str
    confidence: float
    winner: Winner
    policy: Policy

    def to_json(self) -> dict[str, Any]:
        """As a JSON object."""
        return {
            "question": self.question,
            "memory": self.memory.to_json(),
            "documents": [voice.to_json() for voice in self.documents],
            "agreement": self.agreement,
            "answer": self.answer,
            "confidence": self.confidence,
            "winner": self.winner,
            "policy": self.policy,
        }


def same_answer(one: str | None, other: str | None) -> bool:
    """Whether two answers say the same, case, articles and punctuation aside; silence agrees with nothing."""
    return one is not None and other is not None and normalize_answer(one) == normalize_answer(other)


def agreement_of(memory: Voice, documents: Sequence[Voice]) -> Agreement:
    """How the sources stand to each other; see ``Verdict``."""
    said = [voice for voice in documents if voice.answer is not None]
    if not said:
        return "silent" if memory.answer is None else "memory_only"
    if not all(same_answer(voice.answer, said[0].answer) for voice in said):
        return "documents_differ"
    if memory.answer is None:
        return "documents_only"
    return "agree" if same_answer(memory.answer, said[0].answer) else "conflict"


def decide(
    question: str,
    memory: Voice,
    documents: Sequence[Voice],
    policy: Policy,
    *,
    unknown: str = "unknown",
) -> Verdict:
    """Weighs sources that were heard already.

    Among documents of one rank, the answer that most of them give wins; of equally many, the one that the model is surest of,
    then the first.

    Raises:
        ConfigError: There is no such policy.
    """
    if policy not in POLICIES:
        raise ConfigError(f"unknown policy {policy!r}; use {', '.join(POLICIES)}")
    ranks = [_rank(voice, policy) for voice in documents]
    heard = [(rank, voice) for rank, voice in zip(ranks, documents, strict=True) if voice.answer and rank]
    if memory.answer:
        heard.append((_MEMORY_RANK, memory))
    best = max((rank for rank, _ in heard), default=0)
    top = [voice for rank, voice in heard if rank == best]
    agreement = agreement_of(memory, documents)
    if not top:
        return Verdict(question, memory, tuple(documents), agreement, unknown, 0.0, "nobody", policy)

    def support(voice: Voice) -> tuple[int, float]:
        alike = [other for other in top if same_answer(other.answer, voice.answer)]
        return len(alike), max(other.confidence for other in alike)

    chosen = max(top, key=support)
    backing = [voice for _, voice in heard if same_answer(voice.answer, chosen.answer)]
    remembered = memory in backing
    winner: Winner = "memory" if backing == [memory] else "both" if remembered else "documents"
    confidence = max(voice.confidence for voice in backing)
    return Verdict(
        question, memory, tuple(documents), agreement, str(chosen.answer), confidence, winner, policy
    )


def _rank(document: Voice, policy: Policy) -> int:
    if policy == "trust":
        return _RANK.get(document.trust, 0)
    return _MEMORY_RANK + (1 if policy == "context" else -1)


def hear(handle: ModelHandle, question: str, passages: Sequence[Passage]) -> tuple[Voice, tuple[Voice, ...]]:
    """What memory says and what each passage says, each heard alone.

    Raises:
        RequestError: The question is empty.
    """
    from rag.readers.con import NotesReader

    reader = NotesReader(handle)
    prompts = reader.prompts
    question = question.strip()
    closed, *read = reader.read_many([(question, ()), *((question, (passage,)) for passage in passages)])
    said: list[tuple[str | None, str]] = [(closed.answer if closed.known else None, "")]
    for reading, passage in zip(read, passages, strict=True):
        note = reading.notes[0] if reading.notes else None
        claim = reading.answer if reading.known else None
        if note is not None:
            claim = (prompts.claim(note) or claim) if note.kind == "direct" else None
        said.append((claim if claim and _holds(passage.text, claim) else None, note.kind if note else ""))
    asked = [prompts.closed(question), *(prompts.direct(question, (passage,)) for passage in passages)]
    pairs = [(prompt, answer) for prompt, (answer, _) in zip(asked, said, strict=True) if answer]
    sure = iter(score_targets(handle, pairs))
    heard = [next(sure).probability if answer else 0.0 for answer, _ in said]
    documents = tuple(
        Voice(passage.id or str(number), answer, confidence, passage.trust, kind)
        for number, (passage, (answer, kind), confidence) in enumerate(
            zip(passages, said[1:], heard[1:], strict=True), start=1
        )
    )
    return Voice("memory", said[0][0], heard[0]), documents


def _holds(text: str, answer: str) -> bool:
    """Whether the words of ``answer`` stand in ``text``, in a row."""
    return f" {normalize_answer(answer)} " in f" {normalize_answer(text)} "


def judge(handle: ModelHandle, question: str, passages: Sequence[Passage], policy: Policy) -> Verdict:
    """Hears every source and decides by the policy.

    Raises:
        ConfigError: There is no such policy.
        RequestError: The question is empty.
    """
    from rag.prompts import prompts_for

    if policy not in POLICIES:
        raise ConfigError(f"unknown policy {policy!r}; use {', '.join(POLICIES)}")
    memory, documents = hear(handle, question, passages)
    return decide(question.strip(), memory, documents, policy, unknown=prompts_for(handle).unknown)
