"""``Ledger``: edits, forget requests and restores as transactions over weights, ledger and documents.

A transaction is written down before it happens and committed in the ledger's file after weights and documents are as it says; what is
found half done at the next start is completed, and taken back where it cannot be. Weights and documents follow from the entries in
force and from the documents as they were given, so taking one entry off leaves what the others do, in any order.
"""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from lab.data.text import normalize_answer
from lab.errors import BaseMismatchError, ConfigError, DataError, RequestError
from lab.patch import Patch
from lab.records import Fact
from rag.ledger.conflicts import Finder, MatchFinder
from rag.ledger.documents import LedgerDocuments
from rag.ledger.lock import WriterLock
from rag.ledger.planning import Planner
from rag.ledger.rows import Open, Plan, Rows, the_entry
from rag.ledger.schema import open_engine
from rag.ledger.values import (
    ON_CONFLICT,
    Conflict,
    Entry,
    LedgerFact,
    OnConflict,
    Op,
    Outcome,
    State,
    fact_id,
    governing,
)
from rag.ledger.weights import NoWeights, Weights
from rag.store import Chunk, DocumentStore

STEPS = ("patch", "intent", "put", "remove", "weights", "commit")

Maker = Callable[[], Patch]


@dataclass(frozen=True)
class Reconciled:
    """What a start-up check put right.

    Attributes:
        completed: Numbers of transactions that were brought to their end.
        reversed: Numbers of transactions that were taken back.
        repaired: Ids of chunks that were not as the ledger says.
        removed: Patch folders that no entry names.
    """

    completed: tuple[int, ...] = ()
    reversed: tuple[int, ...] = ()
    repaired: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()


class Ledger:
    """A folder with the ledger's file and its patches, over a document store and a model.

    Args:
        folder: Where it lies; made when it is to be written.
        store: The documents. Whoever takes documents in does it through ``put`` and ``remove``, or through ``documents``.
        weights: The model; none by default.
        finder: Says what a document states; matches words by default.
        write: Takes the writer's lock and reconciles; without it nothing can be changed, and other processes may write.
        after_step: Called with the name of each step (``STEPS``) when it has happened.

    Raises:
        BusyError: Another process, or another object of this one, writes.
        DataError: There is no ledger to be read.
        BaseMismatchError: Entries in force were made for another model.
    """

    def __init__(
        self,
        folder: str | Path,
        store: DocumentStore,
        weights: Weights | None = None,
        *,
        finder: Finder | None = None,
        write: bool = True,
        after_step: Callable[[str], None] | None = None,
    ) -> None:
        self.folder = Path(folder)
        self.store = store
        self.weights = weights or NoWeights()
        self.writes = write
        self.reconciled = Reconciled()
        self._after_step = after_step
        self._mutex = threading.RLock()
        self._lock = WriterLock(self.folder / "writer.lock")
        file = self.folder / "ledger.sqlite"
        if write:
            self._lock.take()
        elif not file.is_file():
            raise DataError("there is no ledger here; `knowlab ledger edit` makes one", self.folder)
        self.rows = Rows(open_engine(file))
        self.planner = Planner(self.rows, store, finder or MatchFinder())
        try:
            if write:
                self.rows.create()
                self.reconciled = self.reconcile()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Lets go of the file and of the writer's lock; weights stay as they are."""
        self.rows.engine.dispose()
        self._lock.release()

    def __enter__(self) -> Ledger:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- reading --------------------------------------------------------------------------------------------------

    def entries(self) -> list[Entry]:
        """All entries, oldest first."""
        return self.rows.entries()

    def in_force(self) -> dict[str, Entry]:
        """For each fact by id, the last entry in force."""
        return governing(self.entries())

    def contested(self) -> list[int]:
        """Entries in force that a document contradicts and, by their policy, stays as it is."""
        ruling = {entry.id for entry in self.in_force().values()}
        found = {effect.entry for effect in self.rows.effects() if effect.kind == "contest"}
        return sorted(ruling & found)

    def value(self, subject: str, relation: str) -> str | None:
        """What the ledger says a fact is; ``None`` where it says nothing, or that it is forgotten."""
        entry = self.in_force().get(fact_id(subject, relation))
        return None if entry is None else entry.fact.answers[0] if entry.op == "restore" else entry.new

    # -- changing -------------------------------------------------------------------------------------------------

    def edit(
        self,
        fact: Fact,
        new: str,
        make: Maker | None = None,
        *,
        on_conflict: OnConflict = "edit_wins",
        question: str = "",
        names: Sequence[str] = (),
    ) -> Outcome:
        """Makes ``new`` the object of a fact.

        Args:
            fact: The fact as it is held true so far.
            new: Its new object.
            make: Computes the patch, with what is in force applied; the weights stay as they are without it.
            on_conflict: What happens to documents that say otherwise: ``edit_wins`` (they are not retrieved any more), ``annotate``,
                ``rewrite``, ``doc_wins`` (there is no edit), ``ask`` (nothing happens; the conflicts are returned).
            question: Asks for the object; lets a finder read documents.
            names: Other names of the subject.

        Raises:
            RequestError: The object is blank.
            ConfigError: An unknown ``on_conflict``.
        """
        if not new.strip():
            raise RequestError(f"the new object of {fact.subject!r}, {fact.relation!r} is blank")
        return self._enter(
            "edit", LedgerFact.of(fact, question=question, names=names), new, make, on_conflict
        )

    def forget(
        self,
        fact: Fact,
        make: Maker | None = None,
        *,
        on_conflict: OnConflict = "edit_wins",
        question: str = "",
        names: Sequence[str] = (),
    ) -> Outcome:
        """Has a fact forgotten; documents that state it are blocked.

        Args:
            fact: The fact.
            make: Computes the patch; without it the model is taken not to know the fact.
            on_conflict: ``edit_wins`` (documents are blocked), ``doc_wins`` or ``ask``; see ``edit``.
            question, names: See ``edit``.

        Raises:
            ConfigError: ``annotate`` or ``rewrite``: the document would still be shown.
        """
        if on_conflict in ("annotate", "rewrite"):
            raise ConfigError(
                f"{on_conflict!r} would leave what is to be forgotten in sight; use edit_wins, doc_wins or ask"
            )
        return self._enter(
            "forget", LedgerFact.of(fact, question=question, names=names), None, make, on_conflict
        )

    def _enter(
        self, op: Op, fact: LedgerFact, new: str | None, make: Maker | None, policy: OnConflict
    ) -> Outcome:
        if policy not in ON_CONFLICT:
            raise ConfigError(f"unknown conflict policy {policy!r}; use {', '.join(ON_CONFLICT)}")
        with self._changing() as entries:
            earlier = [entry for entry in entries if entry.fact.id == fact.id and entry.status != "failed"]
            if earlier:
                known = earlier[0].fact
                together = tuple(dict.fromkeys((*known.names, *fact.names)))
                question = fact.question or known.question
                fact = replace(fact, answers=known.answers, question=question, names=together)
            values = [*fact.answers, *(entry.new for entry in earlier if entry.new)]
            now = normalize_answer(new or "")
            old = tuple(value for value in dict.fromkeys(values) if normalize_answer(value) != now)
            number = self._next(entries)
            entry = Entry(number, fact, op, old, new, policy, "", None, (), "pending", time.time())
            looked = self.planner.look(entry)
            stating = ("states_old",) if op == "forget" else ("states_old", "states_other")
            conflicts = tuple(found for found in looked.conflicts if found.label in stating)
            if conflicts and policy in ("doc_wins", "ask"):
                why = (
                    "documents say otherwise and win; nothing was changed"
                    if policy == "doc_wins"
                    else "documents say otherwise; choose who wins"
                )
                return Outcome(False, None, conflicts, (), why)
            patch: Patch | None = None
            if make is not None:
                patch = make()
                method = getattr(getattr(patch, "provenance", None), "method", "")
                entry = replace(entry, patch=f"{number:06d}-{patch.id[:12]}", method=str(method))
                shutil.rmtree(self._patches / str(entry.patch), ignore_errors=True)
                patch.save(self._patches / str(entry.patch))
                self._step("patch")
            plan = self.planner.toggle(op, {number: "active"}, entry, looked)
            return self._transact(plan, entry, patch, conflicts)

    def restore(self, fact: str) -> Outcome:
        """Makes a fact what it was before all entries about it; rolling the restore back brings them back.

        Args:
            fact: Its id.

        Raises:
            RequestError: No entry about it is in force.
        """
        with self._changing() as entries:
            active = [entry for entry in entries if entry.fact.id == fact and entry.status == "active"]
            taken = [entry for entry in active if entry.op != "restore"]
            if not taken:
                raise RequestError(f"no entry about the fact {fact!r} is in force (`knowlab ledger list`)")
            number = self._next(entries)
            numbers = tuple(entry.id for entry in active)
            entry = Entry(
                number,
                taken[0].fact,
                "restore",
                (),
                None,
                "edit_wins",
                "",
                None,
                numbers,
                "pending",
                time.time(),
            )
            states: dict[int, State] = {number: "active", **dict.fromkeys(numbers, "suspended")}
            outcome = self._transact(self.planner.toggle("restore", states, entry, None), entry, None, ())
            return replace(outcome, stale=self._stale(numbers))

    def rollback(self, number: int) -> Outcome:
        """Takes an entry off: weights and documents are as if it had never been.

        Raises:
            RequestError: There is no such entry, or it is not in force.
        """
        with self._changing() as entries:
            entry = the_entry(entries, number)
            if entry.status != "active":
                raise RequestError(f"entry {number} is {entry.status.replace('_', ' ')}, not in force")
            states: dict[int, State] = {number: "rolled_back"}
            suspended = {other.id for other in entries if other.status == "suspended"}
            states |= dict.fromkeys(sorted(suspended & set(entry.suspends)), "active")
            outcome = self._transact(self.planner.toggle("rollback", states, None, None), None, None, ())
            return replace(outcome, entry=number, stale=self._stale((number,)))

    def put(self, chunks: Sequence[Chunk], drop: Sequence[str] = ()) -> Outcome:
        """Takes documents in, and removes those with the ids ``drop``, in one transaction.

        Entries in force treat them like those that were there before.
        """
        with self._changing():
            return self._transact(self.planner.put(chunks, drop), None, None, ())

    def remove(self, ids: Sequence[str]) -> Outcome:
        """Removes documents, and what entries made of them."""
        return self.put((), ids)

    @property
    def documents(self) -> LedgerDocuments:
        """The documents as they were given, as a store: what is put there is taken in through the ledger."""
        return LedgerDocuments(self)

    # -- agreeing -------------------------------------------------------------------------------------------------

    def reconcile(self) -> Reconciled:
        """Brings ledger, weights and documents into agreement.

        Raises:
            BaseMismatchError: Entries in force were made for another model.
        """
        with self._mutex:
            self._check_writes()
            self._check_base([entry for entry in self.entries() if entry.status in ("active", "pending")])
            completed, taken_back = self._settle()
            active = [entry for entry in self.entries() if entry.status == "active"]
            repaired: tuple[str, ...] = ()
            with self.weights.writing():
                self.weights.hold(self._folders(active))
                # A finder may read documents with the model as it stands.
                plan = self.planner.screen()
                if plan is not None:
                    repaired = self._transact(plan, None, None, ()).changed
            named = {entry.patch for entry in self.entries() if entry.patch and entry.status != "failed"}
            place = self._patches
            orphans = [one for one in (place.iterdir() if place.is_dir() else ()) if one.name not in named]
            for folder in orphans:
                shutil.rmtree(folder, ignore_errors=True)
            return Reconciled(completed, taken_back, repaired, tuple(sorted(one.name for one in orphans)))

    def check(self) -> list[str]:
        """What does not agree, in words; empty where all is well. Changes nothing."""
        found = [f"transaction {open.id} ({open.plan.kind}) is half done" for open in self.rows.open()]
        active = [entry for entry in self.entries() if entry.status == "active"]
        wanted = self._folders(active)
        found += [f"the patch folder {folder} is gone" for folder in wanted if not folder.is_dir()]
        if self.writes and self.weights.held() != tuple(wanted):
            found.append(
                f"the model holds {len(self.weights.held())} patches of the ledger, not {len(wanted)}"
            )
        plan = self.planner.screen()
        if plan is not None:
            found += [f"chunk {id} is not as the ledger says" for id in plan.after]
        return found

    # -- one transaction ------------------------------------------------------------------------------------------

    def _transact(
        self, plan: Plan, entry: Entry | None, patch: Patch | None, conflicts: Sequence[Conflict]
    ) -> Outcome:
        saved = None if patch is None else (patch.id, str(getattr(patch, "base", "")))
        number = self.rows.intend(plan, entry, saved)
        self._step("intent")
        open = Open(number, "applying", plan)
        try:
            self._carry_out(open)
        except Exception as error:
            self._take_back(open, f"{type(error).__name__}: {error}")
            raise
        self._step("commit")
        return Outcome(True, entry.id if entry else None, tuple(conflicts), tuple(plan.after))

    def _carry_out(self, open: Open) -> None:
        plan = open.plan
        after = [replace(entry, status=plan.states.get(entry.id, entry.status)) for entry in self.entries()]
        with self.weights.writing():
            self._set_documents(plan.after)
            self.weights.hold(self._folders([entry for entry in after if entry.status == "active"]))
            self._step("weights")
            self.rows.commit(open)

    def _take_back(self, open: Open, error: str) -> None:
        self.rows.turn(open, error)
        with self.weights.writing():
            was = [chunk for chunk in open.plan.before.values() if chunk is not None]
            if was:
                self.store.put(was)
            made = [id for id, chunk in open.plan.before.items() if chunk is None]
            if made:
                self.store.remove(made)
            self.weights.hold(self._folders([entry for entry in self.entries() if entry.status == "active"]))
            self.rows.reverse(open)

    def _set_documents(self, images: Mapping[str, Chunk | None]) -> None:
        # What must not be retrieved goes out of sight before what takes its place comes in.
        hidden = [chunk for chunk in images.values() if chunk is not None and chunk.status != "live"]
        shown = [chunk for chunk in images.values() if chunk is not None and chunk.status == "live"]
        for chunks in (hidden, shown):
            if chunks:
                self.store.put(chunks)
        self._step("put")
        gone = [id for id, chunk in images.items() if chunk is None]
        if gone:
            self.store.remove(gone)
        self._step("remove")

    def hold_weights(self) -> None:
        """Puts the patches of the entries in force on the model and changes nothing else; for who only reads the ledger.

        Raises:
            BaseMismatchError: Entries in force were made for another model.
        """
        with self._mutex, self.weights.writing():
            active = [entry for entry in self.entries() if entry.status == "active"]
            self._check_base(active)
            self.weights.hold(self._folders(active))

    def _settle(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Ends every open transaction; returns the numbers of the completed and of the reversed ones."""
        completed, taken_back = [], []
        for open in self.rows.open():
            if open.phase == "applying":
                try:
                    self._carry_out(open)
                    completed.append(open.id)
                    continue
                except Exception as error:
                    self._take_back(open, f"{type(error).__name__}: {error}")
            else:
                self._take_back(open, "interrupted while it was taken back")
            taken_back.append(open.id)
        return tuple(completed), tuple(taken_back)

    def _changing(self) -> _Changing:
        return _Changing(self)

    def _check_writes(self) -> None:
        if not self.writes:
            raise ConfigError(f"the ledger in {self.folder} was opened for reading; open it with write=True")

    def _check_base(self, active: Sequence[Entry]) -> None:
        bases = self.rows.bases(entry.patch for entry in active if entry.patch)
        if self.weights.base and bases - {self.weights.base}:
            raise BaseMismatchError(
                f"the ledger in {self.folder} holds patches for base {min(bases)[:12]}, this model is "
                f"{self.weights.base[:12]}; open it with the model it was written for"
            )

    @property
    def _patches(self) -> Path:
        return self.folder / "patches"

    def _folders(self, entries: Sequence[Entry]) -> list[Path]:
        named = sorted((entry.id, entry.patch) for entry in entries if entry.patch)
        return [self._patches / patch for _, patch in named]

    def _stale(self, gone: Sequence[int]) -> tuple[int, ...]:
        """Entries in force after those that went, whose patches were computed while these were applied."""
        first = min(gone)
        return tuple(e.id for e in self.entries() if e.status == "active" and e.patch and e.id > first)

    @staticmethod
    def _next(entries: Sequence[Entry]) -> int:
        return max((entry.id for entry in entries), default=0) + 1

    def _step(self, name: str) -> None:
        if self._after_step is not None:
            self._after_step(name)


class _Changing:
    """One change at a time; what an interrupted one left open is ended first."""

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger

    def __enter__(self) -> list[Entry]:
        self.ledger._mutex.acquire()
        try:
            self.ledger._check_writes()
            self.ledger._settle()
            return self.ledger.entries()
        except BaseException:
            self.ledger._mutex.release()
            raise

    def __exit__(self, *_: object) -> None:
        self.ledger._mutex.release()
