"""Reading and writing the tables of a ledger as values."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from sqlalchemy import Connection, Engine, delete, func, insert, select, update

from lab.errors import RequestError
from rag.ledger import schema
from rag.ledger.values import Effect, Entry, LedgerFact, chunk_of, image
from rag.store import Chunk

Phase = Literal["applying", "reversing", "done", "reversed"]


@dataclass(frozen=True)
class Plan:
    """A transaction before it happens: everything that a commit writes, and what the store holds before and after.

    Attributes:
        kind: ``edit``, ``forget``, ``restore``, ``rollback``, ``put``, ``remove`` or ``screen``.
        states: New status of entries by number.
        originals: Chunks as given, to be kept by id; ``None`` drops one.
        effects: Effects to be added, in place of those of the same entry and chunk.
        dropped: Chunks whose effects go.
        before, after: Images of chunks of the store by id; ``None`` where there is no such chunk.
    """

    kind: str
    states: Mapping[int, str] = field(default_factory=dict)
    originals: Mapping[str, Chunk | None] = field(default_factory=dict)
    effects: tuple[Effect, ...] = ()
    dropped: tuple[str, ...] = ()
    before: Mapping[str, Chunk | None] = field(default_factory=dict)
    after: Mapping[str, Chunk | None] = field(default_factory=dict)


@dataclass(frozen=True)
class Open:
    """A transaction of the journal that has not come to its end."""

    id: int
    phase: Phase
    plan: Plan


class Rows:
    """The tables behind a ledger.

    Args:
        engine: See ``schema.open_engine``.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    def create(self) -> None:
        """Makes the tables that are not there."""
        schema.METADATA.create_all(self.engine)

    # -- reading --------------------------------------------------------------------------------------------------

    def entries(self) -> list[Entry]:
        """All entries, oldest first."""
        with self.engine.connect() as connection:
            facts = {row["id"]: _fact(row) for row in _all(connection, select(schema.FACTS))}
            rows = _all(connection, select(schema.ENTRIES).order_by(schema.ENTRIES.c.id))
        return [_entry(row, facts[row["fact"]]) for row in rows]

    def effects(self, chunks: Collection[str] | None = None) -> list[Effect]:
        """Effects on the given chunks, or all."""
        query = select(schema.EFFECTS).order_by(schema.EFFECTS.c.chunk, schema.EFFECTS.c.entry)
        with self.engine.connect() as connection:
            rows = _all(connection, query)
        return [Effect(**row) for row in rows if chunks is None or row["chunk"] in chunks]

    def originals(self) -> dict[str, Chunk]:
        """Chunks as they were given, by id."""
        with self.engine.connect() as connection:
            rows = _all(connection, select(schema.ORIGINALS))
        return {row["chunk"]: chunk_of(row["image"]) for row in rows}

    def bases(self, folders: Iterable[str]) -> set[str]:
        """Fingerprints of the models that the patches in these folders are for."""
        wanted = set(folders)
        with self.engine.connect() as connection:
            rows = _all(connection, select(schema.PATCHES))
        return {row["base"] for row in rows if row["folder"] in wanted}

    def open(self) -> list[Open]:
        """Transactions that have not come to their end, oldest first."""
        query = select(schema.JOURNAL).where(schema.JOURNAL.c.phase.in_(("applying", "reversing")))
        with self.engine.connect() as connection:
            found = []
            for row in _all(connection, query.order_by(schema.JOURNAL.c.id)):
                changes = _all(
                    connection, select(schema.CHANGES).where(schema.CHANGES.c.journal == row["id"])
                )
                found.append(Open(row["id"], row["phase"], _plan(row["kind"], row["plan"], changes)))
        return found

    def journal(self) -> list[dict[str, Any]]:
        """All transactions without their plans, oldest first."""
        table = schema.JOURNAL.c
        query = select(table.id, table.kind, table.phase, table.started_at, table.error).order_by(table.id)
        with self.engine.connect() as connection:
            return _all(connection, query)

    # -- writing; each method is one SQLite transaction -----------------------------------------------------------

    def intend(self, plan: Plan, entry: Entry | None, patch: tuple[str, str] | None) -> int:
        """Writes down what is about to happen.

        Args:
            plan: The transaction.
            entry: A new entry, pending.
            patch: Id and base of its patch, whose folder the entry names.

        Returns:
            The transaction's number.
        """
        with self.engine.begin() as connection:
            number = (
                int(connection.execute(select(func.coalesce(func.max(schema.JOURNAL.c.id), 0))).scalar_one())
                + 1
            )
            if entry is not None:
                self._add(connection, entry, patch)
            row = {
                "id": number,
                "kind": plan.kind,
                "phase": "applying",
                "plan": _plan_json(plan),
                "started_at": time.time(),
                "error": "",
            }
            connection.execute(insert(schema.JOURNAL), row)
            changes = [
                {
                    "journal": number,
                    "chunk": id,
                    "before": _image(plan.before.get(id)),
                    "after": _image(after),
                }
                for id, after in plan.after.items()
            ]
            if changes:
                connection.execute(insert(schema.CHANGES), changes)
        return number

    def _add(self, connection: Connection, entry: Entry, patch: tuple[str, str] | None) -> None:
        fact = asdict(entry.fact) | {"names": list(entry.fact.names), "answers": list(entry.fact.answers)}
        known = select(schema.FACTS.c.id).where(schema.FACTS.c.id == entry.fact.id)
        if connection.execute(known).first() is None:
            connection.execute(insert(schema.FACTS), fact)
        else:
            connection.execute(update(schema.FACTS).where(schema.FACTS.c.id == entry.fact.id).values(**fact))
        row = asdict(entry) | {
            "fact": entry.fact.id,
            "old": list(entry.old),
            "suspends": list(entry.suspends),
        }
        connection.execute(insert(schema.ENTRIES), row)
        if patch is not None:
            row = {"folder": entry.patch, "patch": patch[0], "base": patch[1]}
            connection.execute(insert(schema.PATCHES), row)

    def commit(self, open: Open) -> None:
        """The transaction has happened."""
        plan = open.plan
        with self.engine.begin() as connection:
            for number, state in plan.states.items():
                connection.execute(
                    update(schema.ENTRIES).where(schema.ENTRIES.c.id == number).values(status=state)
                )
            for id in plan.dropped:
                connection.execute(delete(schema.EFFECTS).where(schema.EFFECTS.c.chunk == id))
            for effect in plan.effects:
                same = (schema.EFFECTS.c.entry == effect.entry) & (schema.EFFECTS.c.chunk == effect.chunk)
                connection.execute(delete(schema.EFFECTS).where(same))
                connection.execute(insert(schema.EFFECTS), asdict(effect))
            for id, original in plan.originals.items():
                connection.execute(delete(schema.ORIGINALS).where(schema.ORIGINALS.c.chunk == id))
                if original is not None:
                    connection.execute(insert(schema.ORIGINALS), {"chunk": id, "image": image(original)})
            self._set_phase(connection, open.id, "done")

    def turn(self, open: Open, error: str) -> None:
        """From here on the transaction is taken back."""
        with self.engine.begin() as connection:
            self._set_phase(connection, open.id, "reversing", error)

    def reverse(self, open: Open) -> None:
        """The transaction has been taken back."""
        with self.engine.begin() as connection:
            for number in open.plan.states:
                pending = (schema.ENTRIES.c.id == number) & (schema.ENTRIES.c.status == "pending")
                connection.execute(update(schema.ENTRIES).where(pending).values(status="failed"))
            self._set_phase(connection, open.id, "reversed")

    def _set_phase(self, connection: Connection, number: int, phase: Phase, error: str | None = None) -> None:
        values: dict[str, Any] = {"phase": phase} | ({} if error is None else {"error": error})
        connection.execute(update(schema.JOURNAL).where(schema.JOURNAL.c.id == number).values(**values))


def the_entry(entries: Sequence[Entry], number: int) -> Entry:
    """The entry with this number.

    Raises:
        RequestError: There is none.
    """
    found = next((entry for entry in entries if entry.id == number), None)
    if found is None:
        raise RequestError(f"the ledger has no entry {number}; it has {len(entries)} (`knowlab ledger list`)")
    return found


def _all(connection: Connection, query: Any) -> list[dict[str, Any]]:
    return [dict(row) for row in connection.execute(query).mappings()]


def _fact(row: Mapping[str, Any]) -> LedgerFact:
    return LedgerFact(**{**row, "names": tuple(row["names"]), "answers": tuple(row["answers"])})


def _entry(row: Mapping[str, Any], fact: LedgerFact) -> Entry:
    return Entry(**{**row, "fact": fact, "old": tuple(row["old"]), "suspends": tuple(row["suspends"])})


def _image(chunk: Chunk | None) -> dict[str, Any] | None:
    return None if chunk is None else image(chunk)


def _chunk(row: Mapping[str, Any] | None) -> Chunk | None:
    return None if row is None else chunk_of(row)


def _plan_json(plan: Plan) -> dict[str, Any]:
    return {
        "states": {str(number): state for number, state in plan.states.items()},
        "originals": {id: _image(chunk) for id, chunk in plan.originals.items()},
        "effects": [asdict(effect) for effect in plan.effects],
        "dropped": list(plan.dropped),
    }


def _plan(kind: str, row: Mapping[str, Any], changes: Sequence[Mapping[str, Any]]) -> Plan:
    return Plan(
        kind,
        {int(number): state for number, state in row["states"].items()},
        {id: _chunk(held) for id, held in row["originals"].items()},
        tuple(Effect(**effect) for effect in row["effects"]),
        tuple(row["dropped"]),
        {change["chunk"]: _chunk(change["before"]) for change in changes},
        {change["chunk"]: _chunk(change["after"]) for change in changes},
    )
