"""Typed cases: what an editing benchmark asks, after its file has been parsed once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from lab.records import EditRequest


@dataclass(frozen=True)
class CaseProbe:
    """One prompt of a case and what counts as right after it.

    Attributes:
        group: What the prompt tests: ``rewrite``, ``paraphrase``, ``neighborhood``, ``relation``, ``portability``,
            ``locality``, ``generation``, ``multi_hop``, ``unchanged``, ``hop``, ``commonsense``, ``opinion``, ``elsewhere``,
            ``erase``, ``qa``.
        prompt: Filled text.
        answers: The right answer after the edit, then its aliases; empty where only the continuation matters.
        rival: The answer it competes with in comparisons of probabilities, or empty.
        kind: Sub-division of the group in ``snake_case`` (``reasoning``), or empty.
    """

    group: str
    prompt: str
    answers: tuple[str, ...] = ()
    rival: str = ""
    kind: str = ""


@dataclass(frozen=True)
class EditCase:
    """One case: the edits to make and the prompts to ask before and after.

    Attributes:
        id: Stable name, for example ``counterfact/14``.
        format: Name of the file format that it came from.
        requests: Edits that belong together; empty when ``unsupported``.
        probes: Prompts in file order.
        old_answers: Per request, the answer that is true without the edit and its aliases (empty where the file gives none).
        file: Where it came from.
        line: 1-based line of its row.
        unsupported: Why no editor can take it, or empty.
        meta: Further plain values from the row.
    """

    id: str
    format: str
    requests: tuple[EditRequest, ...]
    probes: tuple[CaseProbe, ...]
    old_answers: tuple[tuple[str, ...], ...] = ()
    file: str = ""
    line: int = 0
    unsupported: str = ""
    meta: Mapping[str, str] = field(default_factory=dict)

    def of(self, group: str) -> tuple[CaseProbe, ...]:
        """The probes of one group, in order."""
        return tuple(probe for probe in self.probes if probe.group == group)

    @property
    def subjects(self) -> tuple[str, ...]:
        """Subjects of the requests, folded for comparison."""
        return tuple(" ".join(request.subject.split()).casefold() for request in self.requests)


@dataclass(frozen=True)
class Skip:
    """A row that was left out, and why."""

    file: str
    line: int
    reason: str
    id: str = ""

    def to_json(self) -> dict[str, Any]:
        """Returns the JSON form."""
        return {"file": self.file, "line": self.line, "reason": self.reason} | (
            {"id": self.id} if self.id else {}
        )


@dataclass(frozen=True)
class CaseSet:
    """All cases of one source.

    Attributes:
        suite: Name of the suite that the format belongs to.
        format: Name of the file format.
        source: Path or hub id.
        cases: In file order, unsupported ones included.
        malformed: Rows that broke the schema, when they were asked to be skipped.
    """

    suite: str
    format: str
    source: str
    cases: tuple[EditCase, ...]
    malformed: tuple[Skip, ...] = ()

    def __len__(self) -> int:
        return len(self.cases)

    def __iter__(self) -> Iterator[EditCase]:
        return iter(self.cases)
