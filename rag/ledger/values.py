"""What a ledger holds, as values, and what its entries make of a chunk."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, get_args

from lab.data.text import normalize_answer
from lab.records import Fact
from rag.store import Chunk, chunk_id

Op = Literal["edit", "forget", "restore"]
State = Literal["pending", "active", "suspended", "rolled_back", "failed"]
OnConflict = Literal["edit_wins", "annotate", "rewrite", "doc_wins", "ask"]
Label = Literal["states_old", "states_other", "states_new", "mentions"]
Effects = Literal["stale", "blocked", "annotate", "rewrite", "contest", "none"]

ON_CONFLICT: tuple[OnConflict, ...] = get_args(OnConflict)
# An extra field of a rewritten chunk: the id of the one it was made from.
REWRITTEN_FROM = "rewritten_from"


def fact_id(subject: str, relation: str) -> str:
    """The id of a fact: what it is about, whatever its object."""
    return hashlib.sha256(f"{normalize_answer(subject)}|{relation}".encode()).hexdigest()[:16]


@dataclass(frozen=True)
class LedgerFact:
    """What entries are about.

    Attributes:
        id: See ``fact_id``.
        subject: What the fact is about.
        relation: Which of its attributes.
        prompt: Cloze with one ``{}`` for the subject, or empty.
        question: Asks for the object; empty where nobody said how.
        names: Subject and its other names.
        answers: What was right before any entry.
    """

    id: str
    subject: str
    relation: str
    prompt: str
    question: str
    names: tuple[str, ...]
    answers: tuple[str, ...]

    @classmethod
    def of(cls, fact: Fact, *, question: str = "", names: Sequence[str] = ()) -> LedgerFact:
        """The fact behind a record; ``names`` are other names of its subject."""
        known = tuple(dict.fromkeys((fact.subject, *names)))
        return cls(
            fact_id(fact.subject, fact.relation),
            fact.subject,
            fact.relation,
            fact.prompt,
            question,
            known,
            fact.answers,
        )


@dataclass(frozen=True)
class Entry:
    """One change of what is held true.

    Attributes:
        id: Revision; entries are in force in this order.
        fact: What it is about.
        op: ``edit``, ``forget``, or ``restore`` (the fact as it was before all entries that ``suspends`` names).
        old: What is not the answer any more: the answers before and the objects of earlier entries.
        new: The answer now; ``None`` unless it is an edit.
        policy: What happens to documents that say otherwise.
        method: What made the patch; empty without one.
        patch: Name of the patch's folder; ``None`` where the weights stay as they are.
        suspends: Entries that a restore takes off.
        status: ``active`` is in force; ``suspended`` comes back when the restore is rolled back.
        created_at: Seconds since 1970.
    """

    id: int
    fact: LedgerFact
    op: Op
    old: tuple[str, ...]
    new: str | None
    policy: OnConflict
    method: str
    patch: str | None
    suspends: tuple[int, ...]
    status: State
    created_at: float

    def to_json(self) -> dict[str, Any]:
        """As a JSON object."""
        return asdict(self)


@dataclass(frozen=True)
class Conflict:
    """What a chunk says of a fact.

    Attributes:
        chunk: Its id.
        source: The document it is from.
        label: ``states_old``, ``states_other`` (a third object), ``states_new``, or ``mentions`` (the subject, and no object).
        value: The object it states.
        scorer: What found it: ``notes`` (what the model notes on the chunk) or ``match`` (the object's words stand in it).
    """

    chunk: str
    source: str
    label: Label
    value: str | None
    scorer: str

    @property
    def against(self) -> bool:
        """Whether the chunk states another object than an edit's."""
        return self.label in ("states_old", "states_other")

    def to_json(self) -> dict[str, Any]:
        """As a JSON object."""
        return asdict(self)


@dataclass(frozen=True)
class Effect:
    """What an entry does to one chunk, for as long as the entry is the last one in force about its fact.

    Attributes:
        entry: Number of the entry.
        chunk: Id of the chunk as it was given.
        kind: ``stale`` and ``blocked`` (never retrieved), ``annotate``, ``rewrite``, ``contest`` (the document stays as it is and the
            entry is in doubt), or ``none``.
        label, value, scorer: See ``Conflict``.
    """

    entry: int
    chunk: str
    kind: Effects
    label: Label
    value: str | None
    scorer: str


@dataclass(frozen=True)
class Outcome:
    """What became of a request.

    Attributes:
        done: Whether anything was changed.
        entry: Number of the entry, where there is one.
        conflicts: Documents that say something else.
        changed: Ids of the chunks in the store that were changed, made or removed.
        reason: Why nothing was done.
        stale: Entries in force whose patches were computed on top of one that went.
    """

    done: bool
    entry: int | None = None
    conflicts: tuple[Conflict, ...] = ()
    changed: tuple[str, ...] = ()
    reason: str = ""
    stale: tuple[int, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """As a JSON object."""
        return asdict(self)


def effect_of(entry: Entry, conflict: Conflict) -> Effect:
    """What an entry does to a chunk that says this of its fact."""
    kind: Effects = "none"
    if entry.op == "forget":
        kind = "blocked" if conflict.label == "states_old" else "none"
    elif entry.op == "edit" and conflict.against:
        kinds: dict[str, Effects] = {"edit_wins": "stale", "annotate": "annotate", "rewrite": "rewrite"}
        kind = kinds.get(entry.policy, "contest")
    return Effect(entry.id, conflict.chunk, kind, conflict.label, conflict.value, conflict.scorer)


def governing(entries: Sequence[Entry]) -> dict[str, Entry]:
    """For each fact, the last entry in force."""
    return {entry.fact.id: entry for entry in sorted(entries, key=_number) if entry.status == "active"}


def view(original: Chunk, effects: Sequence[Effect], entries: Mapping[int, Entry]) -> dict[str, Chunk]:
    """What the store holds for a chunk as it was given.

    Args:
        original: The chunk as it was given.
        effects: What entries in force do to it; only those of a governing entry.
        entries: The entries by number.

    Returns:
        Chunks by id: the chunk itself and, where it was rewritten, what it became.
    """
    text, notes, trust = original.text, [original.note] if original.note else [], original.trust
    status = original.status
    for effect in sorted(effects, key=lambda effect: effect.entry):
        entry = entries[effect.entry]
        if effect.kind == "blocked" or (effect.kind == "stale" and status == "live"):
            status = effect.kind
        elif effect.kind == "annotate":
            notes.append(f"superseded: it is {entry.new} now")
            trust = "superseded"
        elif effect.kind == "rewrite":
            wrong = entry.old if effect.value is None else (*entry.old, effect.value)
            changed = substitute(text, wrong, str(entry.new))
            # An object that the text does not spell out cannot be replaced; such a chunk is not shown.
            if changed == text and status == "live":
                status = "stale"
            text = changed
    shown = replace(original, status=status, note="; ".join(notes), trust=trust)
    if text == original.text or status != "live":
        return {shown.id: shown}
    made = replace(
        shown,
        id=chunk_id(f"{original.source}#{original.id}", text),
        text=text,
        extra={**original.extra, REWRITTEN_FROM: original.id, "replaces": original.id},
    )
    return {original.id: replace(original, status="stale"), made.id: made}


def substitute(text: str, old: Sequence[str], new: str) -> str:
    """``text`` with every occurrence of an old name as a word replaced, longest first, whatever its case."""
    names = sorted((name for name in dict.fromkeys(old) if name.strip()), key=len, reverse=True)
    if not names:
        return text
    pattern = "|".join(re.escape(name) for name in names)
    return re.sub(rf"(?<!\w)(?:{pattern})(?!\w)", lambda _: new, text, flags=re.IGNORECASE)


def image(chunk: Chunk) -> dict[str, Any]:
    """A chunk as plain values."""
    return asdict(replace(chunk, extra={})) | {"extra": dict(chunk.extra)}


def chunk_of(row: Mapping[str, Any]) -> Chunk:
    """The chunk of an image."""
    return Chunk(**row)


def _number(entry: Entry) -> int:
    return entry.id
