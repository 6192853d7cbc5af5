"""What a change means for the documents: which chunks it touches, and what the store holds of them before and after."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from rag.ledger.conflicts import Finder
from rag.ledger.rows import Plan, Rows
from rag.ledger.values import (
    REWRITTEN_FROM,
    Conflict,
    Effect,
    Entry,
    State,
    effect_of,
    governing,
    view,
)
from rag.store import Chunk, DocumentStore


@dataclass(frozen=True)
class Looked:
    """What the documents say of the fact of one entry.

    Attributes:
        conflicts: Everything that mentions the subject.
        effects: What the entry does to it.
        originals: The chunks behind it, as they were given.
    """

    conflicts: tuple[Conflict, ...]
    effects: tuple[Effect, ...]
    originals: Mapping[str, Chunk]


class Planner:
    """Makes plans; changes nothing.

    Args:
        rows: The tables.
        store: The documents.
        finder: Says what a chunk states.
    """

    def __init__(self, rows: Rows, store: DocumentStore, finder: Finder) -> None:
        self.rows = rows
        self.store = store
        self.finder = finder

    def given(self) -> dict[str, Chunk]:
        """All documents as they were given, without what entries made of them."""
        held = {chunk.id: chunk for chunk in self.store.chunks() if REWRITTEN_FROM not in chunk.extra}
        kept = self.rows.originals()
        return {id: kept.get(id, chunk) for id, chunk in held.items()}

    def look(self, entry: Entry, chunks: Iterable[Chunk] | None = None) -> Looked:
        """What the given chunks, or all, say of the fact of an entry."""
        given = self.given() if chunks is None else {chunk.id: chunk for chunk in chunks}
        conflicts = tuple(self.finder.find(entry, list(given.values())))
        effects = tuple(effect_of(entry, conflict) for conflict in conflicts)
        return Looked(conflicts, effects, {conflict.chunk: given[conflict.chunk] for conflict in conflicts})

    def toggle(
        self, kind: str, states: Mapping[int, State], new: Entry | None, looked: Looked | None
    ) -> Plan:
        """A plan that changes which entries are in force."""
        entries = {entry.id: entry for entry in self.rows.entries()}
        if new is not None:
            entries[new.id] = new
        facts = {entries[number].fact.id for number in states}
        added = looked.effects if looked else ()
        everything = [*self.rows.effects(), *added]
        touched = {effect.chunk for effect in everything if entries[effect.entry].fact.id in facts}
        originals = {**(looked.originals if looked else {}), **self.rows.originals()}
        plan = Plan(kind, states, dict(looked.originals) if looked else {}, tuple(added))
        # A document that left the store past the ledger does not come back.
        present = [chunk.id for chunk in self.store.chunks(ids=sorted(touched))]
        return self._images(plan, {id: originals[id] for id in present}, everything, entries)

    def put(self, chunks: Sequence[Chunk], drop: Sequence[str] = ()) -> Plan:
        """A plan that takes chunks in as they are given, under all entries that are or may come in force, and removes others."""
        entries = {entry.id: entry for entry in self.rows.entries()}
        effects: list[Effect] = []
        for entry in entries.values():
            if entry.status in ("active", "suspended"):
                effects += self.look(entry, chunks).effects
        kept = {effect.chunk for effect in effects}
        given = {chunk.id: chunk for chunk in chunks}
        originals = {id: chunk if id in kept else None for id, chunk in given.items()}
        gone = dict.fromkeys(id for id in drop if id not in given)
        plan = Plan("put" if chunks else "remove", {}, {**originals, **gone}, tuple(effects), (*given, *gone))
        return self._images(plan, {**given, **gone}, effects, entries)

    def screen(self) -> Plan | None:
        """A plan for documents that came into the store past the ledger, or were changed there; ``None`` where all is as it should be."""
        entries = {entry.id: entry for entry in self.rows.entries()}
        seen = {(effect.entry, effect.chunk) for effect in self.rows.effects()}
        given = self.given()
        fresh: list[Effect] = []
        originals: dict[str, Chunk | None] = {}
        for entry in entries.values():
            if entry.status in ("active", "suspended"):
                unseen = [chunk for id, chunk in given.items() if (entry.id, id) not in seen]
                looked = self.look(entry, unseen)
                fresh += looked.effects
                originals |= looked.originals
        everything = [*self.rows.effects(), *fresh]
        known = {**originals, **self.rows.originals()}
        present = {id: chunk for id, chunk in known.items() if id in given}
        gone = tuple(id for id in known if id not in given)
        plan = Plan("screen", {}, {**originals, **dict.fromkeys(gone)}, tuple(fresh), gone)
        plan = self._images(plan, {**present, **dict.fromkeys(gone)}, everything, entries)
        return plan if plan.after or gone or fresh else None

    def _images(
        self,
        plan: Plan,
        originals: Mapping[str, Chunk | None],
        effects: Sequence[Effect],
        entries: Mapping[int, Entry],
    ) -> Plan:
        """The plan with what the store holds before and after, for the chunks that change."""
        after_states = [
            replace(entry, status=plan.states.get(entry.id, entry.status)) for entry in entries.values()
        ]
        ruling = {entry.id for entry in governing(after_states).values()}
        by_chunk: dict[str, dict[int, Effect]] = {id: {} for id in originals}
        for effect in effects:
            if effect.chunk in by_chunk and effect.entry in ruling:
                by_chunk[effect.chunk][effect.entry] = effect
        wanted: dict[str, Chunk] = {}
        for id, original in originals.items():
            if original is not None:
                wanted |= view(original, list(by_chunk[id].values()), entries)
        now = {chunk.id: chunk for chunk in self.store.chunks(ids=list(dict.fromkeys([*originals, *wanted])))}
        if originals:
            made = self.store.chunks(where={REWRITTEN_FROM: list(originals)})
            now |= {chunk.id: chunk for chunk in made}
        changed = [id for id in dict.fromkeys([*wanted, *now]) if not _equal(wanted.get(id), now.get(id))]
        return replace(
            plan,
            before={id: now.get(id) for id in changed},
            after={id: wanted.get(id) for id in changed},
        )


def _equal(one: Chunk | None, other: Chunk | None) -> bool:
    if one is None or other is None:
        return one is other
    return one == other and dict(one.extra) == dict(other.extra)
