"""Running a suite: a model as it is, or an editor over many cases.

An editor is any object with ``edit(handle, requests)``; this module knows none by name. Cases are drawn with a seed, what a method
cannot take is skipped with its reason and replaced by another draw, and nothing is filtered by what the model knows unless asked.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

from lab.data.cases import CaseSet, EditCase
from lab.errors import ConfigError, DataError, NumericalError, PatchError, RequestError
from lab.eval.draw import Draw
from lab.eval.patches import Applied, Editor, ManyEditor, Patch, compute
from lab.eval.probe import Observation, Probe, Respondent
from lab.eval.report import CaseRow, MetricTable, Report
from lab.eval.respond import ModelRespondent
from lab.eval.suite import Suite, Values
from lab.handle import ModelHandle

Protocols = Literal["single", "batch", "sequential"]
Progress = Callable[[str, int, int], None]
"""Called with what is being done, how much is done, and how much there is."""

_CHUNK = 16


class BaselineCache:
    """Answers of models as they are, so that several editors on one model share one pass before.

    Answers are kept by the handle's state and the probe; those with whole distributions are too large and are asked again.
    """

    def __init__(self) -> None:
        self._kept: dict[tuple[str, Probe], Observation] = {}

    def observe(
        self, handle: ModelHandle, respondent: Respondent, probes: Sequence[Probe]
    ) -> list[Observation]:
        """Answers all probes, in order; asks only for what is not kept."""
        state = handle.state
        found = {p: self._kept[state, p] for p in probes if (state, p) in self._kept}
        missing = [p for p in dict.fromkeys(probes) if p not in found]
        for probe, seen in zip(missing, respondent.observe(missing) if missing else (), strict=True):
            found[probe] = seen
            if not probe.distribution:
                self._kept[state, probe] = seen
        return [found[probe] for probe in probes]


def evaluate(
    suite: Suite,
    respondent: Respondent,
    cases: Sequence[EditCase],
    *,
    model: str = "",
    limit: int | None = None,
    seed: int = 0,
) -> Report:
    """Asks a respondent all probes of all cases, as it is.

    Metrics that compare with a model before are absent until ``Report.against`` supplies one.

    Args:
        suite: The benchmark.
        respondent: Whom to ask.
        cases: What to ask.
        model: Name for the report.
        limit: How many cases, drawn by ``seed`` among those that an editor could take; all in their order without it.
        seed: Draws the cases; with the same seed an editor is tried on the same ones, those that it refuses aside.
    """
    if limit is not None:
        order = list(cases)
        random.Random(seed).shuffle(order)
        cases = [case for case in order if not case.unsupported][:limit]
    start = time.monotonic()
    answers = _ask(suite, cases, respondent.observe)
    values = [suite.values(case, answers[case.id]) for case in cases]
    rows = tuple(_row(case, now, {}, answers[case.id], {}) for case, now in zip(cases, values, strict=True))
    return Report(
        suite=suite.name,
        model=model,
        editor="",
        seed=seed,
        n=len(cases),
        known=0,
        metrics=suite.summarise(values),
        drawn=len(cases),
        rows=len(cases),
        seconds=time.monotonic() - start,
        settings={"comparable": suite.comparable or suite.name},
        cases=rows,
        definition=suite,
        asked=tuple(cases),
        answers=answers,
    )


def evaluate_editing(
    suite: Suite,
    handle: ModelHandle,
    editor: Editor,
    cases: CaseSet,
    *,
    limit: int | None = None,
    seed: int = 0,
    protocol: Protocols = "single",
    known_only: bool = False,
    name: str = "",
    batch_size: int = 64,
    chunk: int = _CHUNK,
    cache: BaselineCache | None = None,
    progress: Progress | None = None,
    settings: Mapping[str, Any] | None = None,
) -> Report:
    """Edits and asks.

    Args:
        suite: The benchmark.
        handle: The model; it is left as it was found, also when something raises.
        editor: The method.
        cases: From ``lab.data.load_cases`` or ``atlas_cases``.
        limit: How many cases; all without it.
        seed: Draws the cases.
        protocol: ``single``: every case edits the model as it was. ``batch``: one patch for all cases. ``sequential``: patch on
            patch; ``metrics`` are of the model after the last one, the table ``right_after_edit`` of each case right after its own.
        known_only: Draws only cases whose old answer is the model's greedy answer.
        name: Spec of the editor, for the report.
        batch_size: Rows in one forward pass.
        chunk: Cases edited and asked together under ``single``.
        cache: Shared between calls on one model, it saves asking the unedited model twice.
        progress: Told about every step.
        settings: Further settings for the report.

    Raises:
        ConfigError: A nonsensical limit, chunk or protocol.
        DataError: Not one case could be evaluated.
    """
    if limit is not None and limit < 1:
        raise ConfigError(f"limit must be at least 1, it is {limit}")
    if protocol not in ("single", "batch", "sequential"):
        raise ConfigError(f"unknown protocol {protocol!r}; known: single, batch, sequential")
    run = _Run(
        suite, handle, editor, cases, seed, protocol, known_only, batch_size, max(1, chunk), cache, progress
    )
    start, state = time.monotonic(), handle.state
    run.execute(limit)
    if handle.state != state:
        raise PatchError("the model is not what it was before the evaluation; a patch was not taken back")
    if not run.done:
        reason = run.draw.skipped[0].reason if run.draw.skipped else "the source holds none"
        raise DataError(f"not one case could be evaluated; the first reason: {reason}", cases.source)
    return run.report(name, seed, time.monotonic() - start, limit, dict(settings or {}))


class _Run:
    """The state of one evaluation."""

    def __init__(
        self,
        suite: Suite,
        handle: ModelHandle,
        editor: Editor,
        cases: CaseSet,
        seed: int,
        protocol: Protocols,
        known_only: bool,
        batch_size: int,
        chunk: int,
        cache: BaselineCache | None,
        progress: Progress | None,
    ) -> None:
        self.suite, self.handle, self.editor, self.cases = suite, handle, editor, cases
        self.protocol, self.known_only, self.chunk = protocol, known_only, chunk
        self.respondent = ModelRespondent(handle, batch_size=batch_size)
        self.cache = cache or BaselineCache()
        self.progress: Progress = progress or (lambda stage, done, total: None)
        self.done: list[CaseRow] = []
        self.right_after: list[Values] = []
        self.draw = Draw(
            suite,
            handle,
            cases.cases,
            seed=seed,
            unique=protocol != "single" or suite.one_per_subject,
            known_only=known_only,
            ask=self.before,
        )

    def before(self, probes: Sequence[Probe]) -> list[Observation]:
        """Answers of the model as it stands, kept for the next editor."""
        return self.cache.observe(self.handle, self.respondent, probes)

    # -- the three protocols ------------------------------------------------------------------------------------------

    def execute(self, limit: int | None) -> None:
        """Runs the chosen protocol."""
        total = len(self.cases) if limit is None else limit
        if self.protocol == "single":
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
        base = _ask(self.suite, drawn, self.before)
        self.progress("asked before", len(drawn), len(drawn))
        after, kept = self._batch(drawn) if self.protocol == "batch" else self._sequential(drawn, base)
        for case, knows in zip(drawn, known, strict=True):
            if case.id in kept:
                self._finish(case, knows, after[case.id], base[case.id])

    def _chunk(self) -> int:
        """Cases at a time; few where whole distributions have to be held until the model is edited."""
        first = next((case for case in self.cases if not case.unsupported), None)
        heavy = first is not None and any(probe.distribution for probe in self.suite.probes(first))
        return min(self.chunk, 2) if heavy else self.chunk

    def _single(self, drawn: Sequence[EditCase]) -> None:
        known = dict(zip([case.id for case in drawn], self.draw.known(drawn), strict=True))
        base = _ask(self.suite, drawn, self.before)
        for case, patch in self._patches(drawn):
            with patch.applied(self.handle):
                seen = _ask(self.suite, [case], self.respondent.observe)
            self._finish(case, known[case.id], seen[case.id], base[case.id])

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
                self.draw.skip(case, str(error))
                continue
            yield case, patch

    def _batch(self, drawn: Sequence[EditCase]) -> tuple[Mapping[str, Mapping[str, Observation]], set[str]]:
        try:
            patch = self._together(drawn)
        except (RequestError, NumericalError):
            drawn = self._takeable(drawn)
            if not drawn:
                return {}, set()
            patch = self._together(drawn)
        with patch.applied(self.handle):
            after = _ask(self.suite, drawn, self.respondent.observe, self.progress)
        return after, set(after)

    def _together(self, cases: Sequence[EditCase]) -> Patch:
        return compute(self.editor, self.handle, [request for case in cases for request in case.requests])

    def _takeable(self, cases: Sequence[EditCase]) -> list[EditCase]:
        """The cases of a refused batch that are not at fault, found by halving; the others are skipped with their reasons."""
        try:
            self._together(cases)
        except (RequestError, NumericalError) as error:
            if len(cases) == 1:
                self.draw.skip(cases[0], str(error))
                return []
            middle = len(cases) // 2
            return self._takeable(cases[:middle]) + self._takeable(cases[middle:])
        return list(cases)

    def _sequential(
        self, drawn: Sequence[EditCase], base: Mapping[str, Mapping[str, Observation]]
    ) -> tuple[Mapping[str, Mapping[str, Observation]], set[str]]:
        stack: list[Applied] = []
        kept: list[EditCase] = []
        try:
            for number, case in enumerate(drawn, start=1):
                try:
                    patch = compute(self.editor, self.handle, case.requests)
                except (RequestError, NumericalError) as error:
                    self.draw.skip(case, str(error))
                    continue
                stack.append(patch.apply(self.handle))
                kept.append(case)
                seen = _ask(self.suite, [case], self.respondent.observe)
                self.right_after.append(self.suite.values(case, seen[case.id], base[case.id]))
                self.progress("edited in sequence", number, len(drawn))
            after = _ask(self.suite, kept, self.respondent.observe, self.progress)
        finally:
            for applied in reversed(stack):
                applied.undo()
        return after, {case.id for case in kept}

    # -- results ------------------------------------------------------------------------------------------------------

    def _finish(
        self,
        case: EditCase,
        known: bool | None,
        seen: Mapping[str, Observation],
        base: Mapping[str, Observation],
    ) -> None:
        now, then = self.suite.values(case, seen, base), self.suite.values(case, base, base)
        self.done.append(replace(_row(case, now, then, seen, base), known=known))

    def report(
        self, name: str, seed: int, seconds: float, limit: int | None, settings: dict[str, Any]
    ) -> Report:
        """The result."""
        notes = []
        unknown = sum(row.known is None for row in self.done)
        if unknown:
            notes.append(f"{unknown} of {len(self.done)} cases give no old answer and cannot count as known")
        if limit is not None and len(self.done) < limit:
            notes.append(f"only {len(self.done)} of {limit} cases could be had")
        if self.draw.too_long:
            notes.append(f"{self.draw.too_long} prompts longer than the model's context were left out")
        if self.draw.passed_over:
            notes.append(
                f"{self.draw.passed_over} cases were passed over because their subject was edited already"
            )
        extra: dict[str, MetricTable] = {}
        if self.right_after:
            extra["right_after_edit"] = self.suite.summarise(self.right_after)
        return Report(
            suite=self.suite.name,
            model=self.handle.name,
            editor=name,
            seed=seed,
            n=len(self.done),
            known=sum(row.known is True for row in self.done),
            metrics=self.suite.summarise([row.values for row in self.done]),
            before=self.suite.summarise([row.before for row in self.done]),
            skipped=(*self.cases.malformed, *self.draw.skipped),
            drawn=len(self.done) + len(self.draw.skipped),
            rows=len(self.cases) + len(self.cases.malformed),
            seconds=seconds,
            settings={
                "comparable": self.suite.comparable or self.suite.name,
                "protocol": self.protocol,
                "source": self.cases.source,
                "format": self.cases.format,
                "limit": limit,
                "known_only": self.known_only,
                "fingerprint": self.handle.fingerprint,
                **settings,
            },
            notes=tuple(notes),
            extra=extra,
            cases=tuple(self.done),
        )


def _ask(
    suite: Suite,
    cases: Sequence[EditCase],
    observe: Callable[[Sequence[Probe]], list[Observation]],
    progress: Progress | None = None,
) -> dict[str, dict[str, Observation]]:
    """Answers by case and probe; cases go through in chunks, so that batches are full and memory is bounded."""
    found: dict[str, dict[str, Observation]] = {}
    for begin in range(0, len(cases), _CHUNK):
        part = [(case.id, suite.probes(case)) for case in cases[begin : begin + _CHUNK]]
        seen = iter(observe([probe for _, probes in part for probe in probes]))
        found |= {name: {probe.id: next(seen) for probe in probes} for name, probes in part}
        if progress:
            progress("asked after", len(found), len(cases))
    return found


def _row(
    case: EditCase,
    now: Values,
    then: Values,
    seen: Mapping[str, Observation],
    base: Mapping[str, Observation],
) -> CaseRow:
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
