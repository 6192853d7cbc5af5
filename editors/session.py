"""Edit sessions: many edits of one model, with their past, a budget for side effects, and a memory that survives interruption.

with EditSession(handle, get_editor("rome"), name="rome", budget=Budget(relative_norm=0.3)) as session:
    session.edit([request])                                      # one after another, until the session is closed

report = EditSession(handle, editor, name="rome", folder="results/session").run(cases, suite)
report.extra["right_after_edit"], report.metrics, report.retention
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from editors.budget import Budget, SideEffects
from editors.session_folder import SessionFolder
from lab.data.cases import CaseProbe, CaseSet, EditCase
from lab.errors import BudgetError, PatchError, RequestError
from lab.eval import scorers
from lab.eval.baseline import BaselineCache
from lab.eval.patches import Applied, Patch, compute, parts
from lab.eval.protocols import Protocols
from lab.eval.report import Report
from lab.eval.run import evaluate_editing
from lab.eval.suite import PromptMeasure, Suite, scored_group
from lab.eval.suites import compared
from lab.records import EditRequest

if TYPE_CHECKING:
    from editors.base import Editor
    from lab.handle import ModelHandle

__all__ = ["Budget", "EditSession", "SideEffects", "request_cases", "request_suite"]

NEIGHBOR_GROUPS = ("neighborhood", "locality", "relation", "unchanged")
"""Groups of a case's probes that its edit must not move."""


class EditSession:
    """Edits of one model by one editor.

    ``run`` takes cases through a protocol and takes every edit off again. ``edit`` makes single edits, each on top of the ones
    before and told of them, that stay until ``undo``, ``close`` or the end of the ``with``.

    Args:
        handle: The model.
        editor: The method.
        name: Its specification, for reports and for recognising a folder.
        settings: Its settings that differ from the preset, likewise.
        budget: Limits on side effects; none without it.
        folder: Where ``run`` keeps finished edits; an interrupted run goes on from there.
        seed: Draws cases; part of what a folder is recognised by.
        retention_every: Under ``sequential``, after how many edits all edits so far are asked again; never for 0.
        batch_size: Rows in one forward pass.
        cache: Answers of the unedited model, where several sessions share them.
    """

    def __init__(
        self,
        handle: ModelHandle,
        editor: Editor,
        *,
        name: str,
        settings: Mapping[str, Any] | None = None,
        budget: Budget | None = None,
        folder: str | Path | None = None,
        seed: int = 0,
        retention_every: int = 1,
        batch_size: int = 64,
        cache: BaselineCache | None = None,
    ) -> None:
        self.handle, self.editor, self.name = handle, editor, name
        self.settings = dict(settings or {})
        self.budget, self.seed, self.retention_every = budget, seed, retention_every
        self.folder = None if folder is None else Path(folder)
        self.batch_size, self.cache = batch_size, cache
        self._made: list[tuple[Patch, Applied]] = []

    # -- cases --------------------------------------------------------------------------------------------------------

    def run(
        self,
        cases: CaseSet | Sequence[EditRequest],
        suite: Suite | None = None,
        *,
        protocol: Protocols = "sequential",
        limit: int | None = None,
        known_only: bool = False,
        progress: Callable[[str, int, int], None] | None = None,
    ) -> Report:
        """Edits and measures: right after each edit, and after all of them.

        Args:
            cases: Cases of a benchmark, drawn by the session's seed; or plain requests, taken in their order.
            suite: What to ask of a case; without it, whether the requests' own prompts are answered with their targets.
            protocol: ``single``, ``batch`` or ``sequential``; see ``evaluate_editing``.
            limit: How many cases; all without it.
            known_only: Draws only cases whose old answer is the model's greedy answer.
            progress: Told about every step.

        Returns:
            ``metrics`` after all edits, ``extra["right_after_edit"]`` right after each, ``retention`` in between,
            ``skipped`` with what was refused and why, ``notes`` with what exceeded a budget that only warns.

        Raises:
            ConfigError: The folder holds another session, or the budget has nothing to be measured on.
            DataError: Not one edit was made.
        """
        plain = not isinstance(cases, CaseSet)
        chosen = request_cases(cases) if not isinstance(cases, CaseSet) else cases
        wanted = suite or request_suite()
        identity = self._identity(chosen, wanted, protocol, limit, known_only)
        journal = None if self.folder is None else SessionFolder(self.folder, identity, self.handle)
        return evaluate_editing(
            wanted,
            self.handle,
            self.editor,
            chosen,
            limit=limit,
            seed=self.seed,
            protocol=protocol,
            known_only=known_only,
            in_order=plain,
            name=self.name,
            batch_size=self.batch_size,
            retention_every=self.retention_every,
            guard=self._guard,
            journal=journal,
            cache=self.cache,
            progress=progress,
            settings={"overrides": self.settings, "budget": identity["budget"]},
        )

    def _identity(
        self, cases: CaseSet, suite: Suite, protocol: str, limit: int | None, known_only: bool
    ) -> dict[str, Any]:
        digest = hashlib.sha256()
        for case in cases:
            asked = (
                [dataclasses.asdict(probe) for probe in suite.probes(case)] if not case.unsupported else []
            )
            row = [case.id, [request.to_json() for request in case.requests], asked]
            digest.update(json.dumps(row, sort_keys=True, default=str).encode())
        return {
            "model": self.handle.fingerprint,
            "applied patches": [entry.patch.id for entry in self.handle.applied],
            "editor": self.name,
            "settings": self.settings,
            "suite": suite.name,
            "requests": digest.hexdigest(),
            "protocol": protocol,
            "limit": limit,
            "known_only": known_only,
            "seed": self.seed,
            "budget": None if self.budget is None else dataclasses.asdict(self.budget),
            "retention_every": self.retention_every,
        }

    def _guard(self, patch: Patch, cases: Sequence[EditCase]) -> tuple[str, ...]:
        requests = [request for case in cases for request in case.requests]
        neighbors = [p.prompt for case in cases for p in case.probes if p.group in NEIGHBOR_GROUPS]
        return self._checked(patch, requests, neighbors)

    def _checked(
        self, patch: Patch, requests: Sequence[EditRequest], neighbors: Sequence[str]
    ) -> tuple[str, ...]:
        if self.budget is None:
            return ()
        over = self.budget.exceeded(self.budget.measure(self.handle, patch, requests, neighbors))
        if not over:
            return ()
        named = ", ".join(request.id for request in requests[:3]) + (", ..." if len(requests) > 3 else "")
        remark = f"over budget, {named}: {'; '.join(over)}"
        if self.budget.action == "refuse":
            raise BudgetError(f"refused as {remark}")
        logging.getLogger(__name__).warning(remark)
        return (remark,)

    # -- one by one ---------------------------------------------------------------------------------------------------

    @property
    def patches(self) -> tuple[Patch, ...]:
        """What ``edit`` made and is applied now, oldest first."""
        return tuple(part for patch, _ in self._made for part in parts(patch))

    def edit(self, requests: Sequence[EditRequest]) -> Patch:
        """Makes an edit on top of the ones before, and keeps it applied.

        Args:
            requests: What the model should say.

        Returns:
            The patch.

        Raises:
            BudgetError: It would change too much around it; the session stays as it was.
            RequestError: It cannot be carried out.
            ConfigError: The budget limits ``neighborhood_kl`` and names no prompts.
        """
        patch = compute(self.editor, self.handle, requests, self.patches)
        self._checked(patch, requests, ())
        self._made.append((patch, patch.apply(self.handle)))
        return patch

    def undo(self) -> Patch:
        """Takes the last edit off.

        Raises:
            PatchError: There is none.
        """
        if not self._made:
            raise PatchError("the session has no edit to undo")
        patch, applied = self._made.pop()
        applied.undo()
        return patch

    def close(self) -> None:
        """Takes all edits off; the model is bit-identical to what it was."""
        while self._made:
            self.undo()

    def __enter__(self) -> EditSession:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def request_cases(requests: Sequence[EditRequest]) -> CaseSet:
    """One case per request, asked with its own prompt.

    Raises:
        RequestError: Two requests have the same id, by which they would be told apart.
    """
    if len({request.id for request in requests}) < len(requests):
        raise RequestError("two requests have the same id; a session tells its edits apart by it")
    cases = []
    for number, request in enumerate(requests, start=1):
        old = () if request.target_old is None else (request.target_old,)
        probe = CaseProbe("rewrite", request.text, (request.target_new,), request.target_old or "")
        cases.append(EditCase(request.id, "requests", (request,), (probe,), (old,), "requests", number))
    return CaseSet("requests", "requests", "requests", tuple(cases))


def request_suite() -> Suite:
    """Asks the requests' own prompts: ``success`` where the target is the greedy answer, ``probability`` of the target, and
    ``efficacy`` where a request names what it replaces."""
    return Suite(
        name="requests",
        about="Plain requests: is the target said?",
        probes=lambda case: tuple(scored_group(case, "rewrite")),
        measures=(
            PromptMeasure("success", "rewrite", scorers.accuracy),
            PromptMeasure("probability", "rewrite", scorers.probability),
            *compared("efficacy", "rewrite"),
        ),
        comparable="requests: teacher-forced argmax of the own prompt",
    )
