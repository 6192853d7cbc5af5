"""A file of changes to what is held true, and carrying one of them out on a ledger."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from lab.data import read_rows
from lab.errors import DataError

if TYPE_CHECKING:
    from lab.handle import ModelHandle
    from rag.ledger import Ledger, Outcome
    from rag.ledger.values import OnConflict

Operation = Literal["edit", "forget", "restore"]
OPERATIONS: tuple[Operation, ...] = get_args(Operation)


@dataclass(frozen=True)
class Change:
    """One line of a file of changes.

    Attributes:
        op: What becomes of the fact.
        subject: Whom it is about.
        relation: Which of its attributes.
        object: What the model shall say (``edit``), or what has been right so far (``forget``; may be empty).
        before: For ``edit``: what has been right so far; empty where the built-in world knows.
        prompt: Cloze with ``{}``; empty where the built-in world has one.
    """

    op: Operation
    subject: str
    relation: str
    object: str = ""
    before: str = ""
    prompt: str = ""

    def to_json(self) -> dict[str, Any]:
        """As a JSON object."""
        return asdict(self)


def read_changes(file: str | Path) -> list[Change]:
    """Reads a file of changes.

    Raises:
        DataError: The file cannot be read or a line breaks the schema; names file and line.
    """
    return [_change(row.value, row.file, row.line, row.error) for row in read_rows(file)]


def _change(row: Any, file: str, line: int, error: DataError | None) -> Change:
    if error is not None:
        raise error
    op: Operation | None = next((known for known in OPERATIONS if known == row.get("op", "edit")), None)
    if op is None:
        raise DataError(f"unknown op {row.get('op')!r}; use {', '.join(OPERATIONS)}", file, line)
    needed = ("subject", "relation", "object") if op == "edit" else ("subject", "relation")
    found = {name: row.get(name, "") for name in ("subject", "relation", "object", "before", "prompt")}
    for name, value in found.items():
        if not isinstance(value, str) or (name in needed and not value.strip()):
            raise DataError(f"{op} needs a text in {name!r}, it holds {value!r}", file, line)
    return Change(op, **found)


def carry_out(
    book: Ledger,
    handle: ModelHandle,
    change: Change,
    editor: str,
    method: str,
    *,
    on_conflict: OnConflict,
    seed: int = 0,
) -> Outcome:
    """Carries a change out in one transaction.

    Args:
        book: The ledger, over this model.
        handle: The model.
        change: The change.
        editor: Makes the patch of an ``edit``.
        method: Makes the patch of a ``forget``; ``none`` for no patch.
        on_conflict: What happens to documents that say otherwise.
        seed: Of editor or method.
    """
    from rag.facts import named_fact, names_of, question_of, relation_name
    from rag.ledger.values import fact_id
    from rag.makers import edit_maker, forget_maker

    if change.op == "restore":
        return book.restore(fact_id(change.subject.strip(), relation_name(change.relation.strip())))
    old = change.object if change.op == "forget" else change.before
    fact = named_fact(change.subject, change.relation, object=old, prompt=change.prompt)
    question, names = question_of(fact), names_of(fact)
    if change.op == "edit":
        make = edit_maker(handle, editor, fact, change.object, seed=seed)
        return book.edit(fact, change.object, make, on_conflict=on_conflict, question=question, names=names)
    maker = None if method == "none" else forget_maker(handle, method, fact, seed=seed)
    return book.forget(fact, maker, on_conflict=on_conflict, question=question, names=names)
