"""What an evaluation tells whoever remembers it: finished edits, so that an interrupted run goes on where it was."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

from lab.data.cases import EditCase
from lab.eval.patches import Patch
from lab.eval.report import CaseRow
from lab.eval.retention import Moment

Guard = Callable[[Patch, Sequence[EditCase]], Sequence[str]]
"""Looks at a patch before it is used: returns remarks, or raises ``RequestError`` to refuse it."""


@dataclass(frozen=True)
class Step:
    """One finished edit: of a case, or of all of them in a batch.

    Attributes:
        id: Of the case, or ``batch``.
        patches: What was applied, oldest first; more than one where a case names a subject more than once.
        row: The case right after its edit.
        moment: Retention right after it, where that was due.
        refused: Case id to why it was not edited.
        remarks: What a reader must know of it.
    """

    id: str
    patches: tuple[Patch, ...] = ()
    row: CaseRow | None = None
    moment: Moment | None = None
    refused: Mapping[str, str] = field(default_factory=dict)
    remarks: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Everything but the patches, as plain values."""
        return {
            "id": self.id,
            "row": None if self.row is None else asdict(self.row),
            "moment": None if self.moment is None else self.moment.to_json(),
            "refused": dict(self.refused),
            "remarks": list(self.remarks),
        }

    @classmethod
    def from_json(cls, row: Mapping[str, Any], patches: Sequence[Patch]) -> Step:
        """Inverse of ``to_json``, with the patches that were kept beside it."""
        return cls(
            row["id"],
            tuple(patches),
            None if row["row"] is None else CaseRow(**row["row"]),
            None if row["moment"] is None else Moment.from_json(row["moment"]),
            dict(row["refused"]),
            tuple(row["remarks"]),
        )


class Journal(Protocol):
    """Remembers finished steps."""

    def recall(self, id: str) -> Step | None:
        """The finished step of this id, or ``None``."""
        ...

    def write(self, step: Step) -> None:
        """Keeps a step; when this returns, an interruption cannot lose it."""
        ...
