"""The three protocols: every case on the model as it was, all cases in one patch, or patch on patch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from lab.data.cases import EditCase
from lab.errors import ConfigError, NumericalError, RequestError
from lab.eval.draw import Draw
from lab.eval.journal import Guard, Journal, Step
from lab.eval.patches import Applied, Editor, ManyEditor, Patch, compute, joined, parts
from lab.eval.probe import Observation, Probe
from lab.eval.report import CaseRow
from lab.eval.respond import ModelRespondent
from lab.eval.retention import Moment, Retention, measure_moment
from lab.eval.suite import Suite, Values
from lab.handle import ModelHandle
from lab.rowwise import RowPatches, rowwise_obstacle

Protocols = Literal["single", "batch", "sequential"]
PROTOCOLS: tuple[Protocols, ...] = ("single", "batch", "sequential")
Progress = Callable[[str, int, int], None]
"""Called with what is being done, how much is done, and how much there is."""

Answers = dict[str, Observation]
_CHUNK = 16
_BATCH = "batch"


@dataclass(frozen=True)
class Plan:
    """What decides a run beside suite, model and editor.

    Attributes:
        protocol: Which one.
        chunk: Cases edited and asked together under ``single``.
        rowwise: Whether patches that can share forward passes do.
        retention_every: Under ``sequential``, after how many edits all edits so far are asked again; never for 0.
        guard: Looks at every patch before it is used.
        journal: Remembers finished steps.
        progress: Told about every step.
    """

    protocol: Protocols = "single"
    chunk: int = _CHUNK
    rowwise: bool = True
    retention_every: int = 0
    guard: Guard | None = None
    journal: Journal | None = None
    progress: Progress | None = None

    def __post_init__(self) -> None:
        if self.protocol not in PROTOCOLS:
            raise ConfigError(f"unknown protocol {self.protocol!r}; known: {', '.join(PROTOCOLS)}")
        for name, least in (("chunk", 1), ("retention_every", 0)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name} must be at least {least}, it is {getattr(self, name)}")


class EditingRun:
    """One run of one editor over drawn cases.

    Args:
        suite: The benchmark.
        handle: The model; as it was after ``execute``, also when that raises.
        editor: The method.
        draw: Where cases come from.
        respondent: Asks the model as it stands.
        before: Asks the model as it was before the run.
        plan: How to run.

    Attributes:
        done: The finished cases.
        retention: Under ``sequential``, where it was asked for.
        remarks: What the guard said of patches that it let pass.
    """

    def __init__(
        self,
        suite: Suite,
        handle: ModelHandle,
        editor: Editor,
        draw: Draw,
        respondent: ModelRespondent,
        before: Callable[[Sequence[Probe]], list[Observation]],
        plan: Plan,
    ) -> None:
        self.suite, self.handle, self.editor, self.draw = suite, handle, editor, draw
        self.respondent, self.before, self.plan = respondent, before, plan
        self.progress: Progress = plan.progress or (lambda stage, done, total: None)
        self.done: list[CaseRow] = []
        self._right_after: dict[str, Values] = {}
        self.retention: Retention | None = None
        self.remarks: list[str] = []

    def execute(self, total: int) -> None:
        """Runs the protocol over at most ``total`` cases."""
        if self.plan.protocol == "single":
            while len(self.done) < total:
                drawn = self.draw.take(min(self._chunk(), total - len(self.done)))
                if not drawn:
                    break
                self._single(drawn)
                self.progress("edited and asked", len(self.done), total)
            return
        drawn = self.draw.take(total)
        if not drawn:
            return
        known = self.draw.known(drawn)
        base = ask(self.suite, drawn, self.before)
        self.progress("asked before", len(drawn), len(drawn))
        run = self._batch if self.plan.protocol == "batch" else self._sequential
        after = run(drawn, base)
        for case, knows in zip(drawn, known, strict=True):
            if case.id in after:
                self.done.append(self._row(case, knows, after[case.id], base[case.id]))

    # -- single -------------------------------------------------------------------------------------------------------

    def _chunk(self) -> int:
        """Cases at a time; few where whole distributions have to be held until the model is edited."""
        return min(self.plan.chunk, 2) if self.draw.heavy else self.plan.chunk

    def _single(self, drawn: Sequence[EditCase]) -> None:
        steps = {case.id: step for case in drawn if (step := self._recall(case.id)) is not None}
        fresh = [case for case in drawn if case.id not in steps]
        known = dict(zip([case.id for case in fresh], self.draw.known(fresh), strict=True))
        base = ask(self.suite, fresh, self.before)
        for case, patch, remarks, seen in self._patched_answers(fresh):
            row = self._row(case, known[case.id], seen, base[case.id])
            steps[case.id] = self._keep(Step(case.id, parts(patch), row, remarks=remarks))
        for case in drawn:
            step = steps.get(case.id)
            if step is None:
                continue  # refused just now
            if step.refused:
                self.draw.skip(case, step.refused[case.id])
            elif step.row is not None:
                self.done.append(step.row)
                self.remarks += step.remarks

    def _patched_answers(
        self, cases: Sequence[EditCase]
    ) -> Iterator[tuple[EditCase, Patch, tuple[str, ...], Answers]]:
        """Each case with its patch and the answers under it; patches that can share passes wait for each other."""
        group: list[tuple[EditCase, Any, tuple[str, ...]]] = []
        # An edit that is to be remembered must not wait for the next one to be computed.
        waits = self.plan.journal is None or isinstance(self.editor, ManyEditor)
        for case, patch in self._patches(cases):
            try:
                remarks = self._remarks(patch, [case])
            except RequestError as error:
                self._refuse(case, str(error))
                continue
            if not self.plan.rowwise or rowwise_obstacle(self.handle, [patch]):
                with patch.applied(self.handle):
                    seen = ask(self.suite, [case], self.respondent.observe)
                yield case, patch, remarks, seen[case.id]
                continue
            if group and rowwise_obstacle(self.handle, [group[0][1], patch]):
                yield from self._together_asked(group)
                group = []
            group.append((case, patch, remarks))
            if not waits:
                yield from self._together_asked(group)
                group = []
        yield from self._together_asked(group)

    def _together_asked(
        self, group: Sequence[tuple[EditCase, Any, tuple[str, ...]]]
    ) -> Iterator[tuple[EditCase, Patch, tuple[str, ...], Answers]]:
        if not group:
            return
        rows = RowPatches(self.handle, [patch for _, patch, _ in group])
        asked = [self.suite.probes(case) for case, _, _ in group]
        for (case, patch, remarks), seen in zip(
            group, self.respondent.observe_each(rows, asked), strict=True
        ):
            yield case, patch, remarks, {answer.probe_id: answer for answer in seen}

    def _patches(self, drawn: Sequence[EditCase]) -> Iterator[tuple[EditCase, Patch]]:
        lone = [case for case in drawn if len(case.requests) == 1]
        if isinstance(self.editor, ManyEditor) and len(lone) > 1:
            try:
                made = list(self.editor.edit_many(self.handle, [case.requests[0] for case in lone]))
            except (RequestError, NumericalError, ConfigError):
                # One request is at fault, or the method cannot work on several with these settings; alone, each shows.
                made = []
            if made:
                yield from zip(lone, made, strict=True)
                drawn = [case for case in drawn if len(case.requests) != 1]
        for case in drawn:
            try:
                patch = compute(self.editor, self.handle, case.requests)
            except (RequestError, NumericalError) as error:
                self._refuse(case, str(error))
                continue
            yield case, patch

    # -- batch --------------------------------------------------------------------------------------------------------

    def _batch(
        self, drawn: Sequence[EditCase], base: Mapping[str, Answers]
    ) -> Mapping[str, Mapping[str, Observation]]:
        step = self._recall(_BATCH)
        if step is None:
            step = self._keep(self._batch_step(drawn))
        by_id = {case.id: case for case in drawn}
        for name, reason in step.refused.items():
            self.draw.skip(by_id[name], reason)
        kept = [case for case in drawn if case.id not in step.refused]
        if not kept:
            return {}
        self.remarks += step.remarks
        with joined(step.patches).applied(self.handle):
            return ask(self.suite, kept, self.respondent.observe, self.progress)

    def _batch_step(self, drawn: Sequence[EditCase]) -> Step:
        refused: dict[str, str] = {}
        try:
            patch = self._together(drawn)
        except (RequestError, NumericalError):
            drawn = self._takeable(drawn, refused)
            if not drawn:
                return Step(_BATCH, refused=refused)
            patch = self._together(drawn)
        try:
            return Step(_BATCH, parts(patch), refused=refused, remarks=self._remarks(patch, drawn))
        except RequestError as error:
            return Step(_BATCH, refused=refused | {case.id: str(error) for case in drawn})

    def _together(self, cases: Sequence[EditCase]) -> Patch:
        return compute(self.editor, self.handle, [request for case in cases for request in case.requests])

    def _takeable(self, cases: Sequence[EditCase], refused: dict[str, str]) -> list[EditCase]:
        """The cases of a refused batch that are not at fault, found by halving; the others are noted with their reasons."""
        try:
            self._together(cases)
        except (RequestError, NumericalError) as error:
            if len(cases) == 1:
                refused[cases[0].id] = str(error)
                return []
            middle = len(cases) // 2
            return self._takeable(cases[:middle], refused) + self._takeable(cases[middle:], refused)
        return list(cases)

    # -- sequential ---------------------------------------------------------------------------------------------------

    def _sequential(
        self, drawn: Sequence[EditCase], base: Mapping[str, Answers]
    ) -> Mapping[str, Mapping[str, Observation]]:
        stack: list[Applied] = []
        history: list[Patch] = []
        kept: list[EditCase] = []
        moments: list[Moment] = []
        try:
            for number, case in enumerate(drawn, start=1):
                step = self._recall(case.id)
                change, remarks = None, ()
                if step is None:
                    change, remarks = self._next_patch(case, history)
                elif step.refused:
                    self.draw.skip(case, step.refused[case.id])
                else:
                    change, remarks = joined(step.patches), step.remarks
                if change is not None:
                    stack.append(change.apply(self.handle))
                    history += parts(change)
                    kept.append(case)
                    self.remarks += remarks
                    if step is None:
                        step = self._keep(self._measured(case, kept, change, remarks, base[case.id]))
                    self._right_after[case.id] = step.row.values if step.row is not None else {}
                    moments += [step.moment] if step.moment is not None else []
                self.progress("edited in sequence", number, len(drawn))
            if self.plan.retention_every and kept:
                if not moments or len(moments[-1].held) < len(kept):
                    moments.append(measure_moment(self.respondent, kept))
                self.retention = Retention(tuple(case.id for case in kept), tuple(moments))
            return ask(self.suite, kept, self.respondent.observe, self.progress)
        finally:
            for applied in reversed(stack):
                applied.undo()

    def _next_patch(self, case: EditCase, history: Sequence[Patch]) -> tuple[Patch | None, tuple[str, ...]]:
        try:
            patch = compute(self.editor, self.handle, case.requests, history)
            return patch, self._remarks(patch, [case])
        except (RequestError, NumericalError) as error:
            self._refuse(case, str(error))
            return None, ()

    def _measured(
        self,
        case: EditCase,
        kept: Sequence[EditCase],
        patch: Patch,
        remarks: tuple[str, ...],
        base: Mapping[str, Observation],
    ) -> Step:
        seen = ask(self.suite, [case], self.respondent.observe)[case.id]
        every = self.plan.retention_every
        moment = measure_moment(self.respondent, kept) if every and len(kept) % every == 0 else None
        return Step(case.id, parts(patch), self._row(case, None, seen, base), moment, remarks=remarks)

    # -- what is remembered -------------------------------------------------------------------------------------------

    def _remarks(self, patch: Patch, cases: Sequence[EditCase]) -> tuple[str, ...]:
        return () if self.plan.guard is None else tuple(self.plan.guard(patch, cases))

    def _recall(self, id: str) -> Step | None:
        return None if self.plan.journal is None else self.plan.journal.recall(id)

    def _keep(self, step: Step) -> Step:
        if self.plan.journal is not None:
            self.plan.journal.write(step)
        return step

    def _refuse(self, case: EditCase, reason: str) -> None:
        self.draw.skip(case, reason)
        self._keep(Step(case.id, refused={case.id: reason}))

    def _row(
        self,
        case: EditCase,
        known: bool | None,
        seen: Mapping[str, Observation],
        base: Mapping[str, Observation],
    ) -> CaseRow:
        now, then = self.suite.values(case, seen, base), self.suite.values(case, base, base)
        row = case_row(case, now, then, seen, base)
        return replace(row, known=known, right_after=self._right_after.get(case.id, {}))


def ask(
    suite: Suite,
    cases: Sequence[EditCase],
    observe: Callable[[Sequence[Probe]], list[Observation]],
    progress: Progress | None = None,
) -> dict[str, Answers]:
    """Answers by case and probe; cases go through in chunks, so that batches are full and memory is bounded."""
    found: dict[str, Answers] = {}
    for begin in range(0, len(cases), _CHUNK):
        part = [(case.id, suite.probes(case)) for case in cases[begin : begin + _CHUNK]]
        seen = iter(observe([probe for _, probes in part for probe in probes]))
        found |= {name: {probe.id: next(seen) for probe in probes} for name, probes in part}
        if progress:
            progress("asked after", len(found), len(cases))
    return found


def case_row(
    case: EditCase,
    now: Values,
    then: Values,
    seen: Mapping[str, Observation],
    base: Mapping[str, Observation],
) -> CaseRow:
    """The row of one case in a report."""

    def target(answers: Mapping[str, Observation]) -> float | None:
        found = answers.get("rewrite/0")
        return found.ratings[0].probability if found and found.ratings else None

    first = case.requests[0] if case.requests else None
    return CaseRow(
        id=case.id,
        prompt=first.text if first else "",
        target_new=first.target_new if first else "",
        target_old=(first.target_old or "") if first else "",
        values=now,
        before=then,
        p_before=target(base),
        p_after=target(seen),
    )
