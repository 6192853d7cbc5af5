"""Running a suite: a model as it is, or an editor over many cases.

An editor is any object with ``edit(handle, requests)``; this module knows none by name. Cases are drawn with a seed, what a method
cannot take is skipped with its reason and replaced by another draw, and nothing is filtered by what the model knows unless asked.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any, Literal, Protocol, runtime_checkable

from lab.data.cases import CaseSet, EditCase, Skip
from lab.errors import ConfigError, DataError, NumericalError, PatchError, RequestError
from lab.eval.probe import Observation, Probe, Respondent
from lab.eval.report import CaseRow, MetricTable, Report
from lab.eval.respond import ModelRespondent
from lab.eval.suite import Suite, Values
from lab.handle import ModelHandle
from lab.records import EditRequest
from lab.tokens import encode_ids, subject_span

Protocols = Literal["single", "batch", "sequential"]
Progress = Callable[[str, int, int], None]
"""Called with what is being done, how much is done, and how much there is."""

_KNOWN = "known"
_CHUNK = 16


class Applied(Protocol):
    """A change that is in force."""

    def undo(self) -> Any:
        """Takes it back."""
        ...


class Patch(Protocol):
    """What an editor returns: weights or memory."""

    def applied(self, handle: ModelHandle) -> AbstractContextManager[Any]:
        """In force inside the ``with``."""
        ...

    def apply(self, handle: ModelHandle) -> Applied:
        """In force until undone."""
        ...


class Editor(Protocol):
    """Computes a patch and leaves the model as it was."""

    def edit(self, handle: ModelHandle, requests: Sequence[EditRequest]) -> Patch:
        """One patch for all requests together."""
        ...


@runtime_checkable
class ManyEditor(Protocol):
    """An editor that computes independent edits faster together than one by one."""

    def edit_many(self, handle: ModelHandle, requests: Sequence[EditRequest]) -> Sequence[Patch]:
        """One patch per request, each as if it were alone."""
        ...


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
    suite: Suite, respondent: Respondent, cases: Sequence[EditCase], *, model: str = "", seed: int = 0
) -> Report:
    """Asks a respondent all probes of all cases, as it is.

    Metrics that compare with a model before are absent until ``Report.against`` supplies one.

    Args:
        suite: The benchmark.
        respondent: Whom to ask.
        cases: What to ask; unsupported cases are asked too where they have probes.
        model: Name for the report.
        seed: Recorded in the report.
    """
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
        reason = run.skipped[0].reason if run.skipped else "the source holds none"
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
        self.skipped: list[Skip] = []
        self.passed_over = 0
        self.too_long = 0
        self.done: list[CaseRow] = []
        self.right_after: list[Values] = []
        order = list(cases.cases)
        random.Random(seed).shuffle(order)
        self._order = iter(order)
        self._subjects: set[str] = set()
        self._unique = protocol != "single" or suite.one_per_subject

    # -- drawing ------------------------------------------------------------------------------------------------------

    def draw(self, count: int) -> list[EditCase]:
        """The next ``count`` cases that can be tried; fewer when the source runs dry."""
        found: list[EditCase] = []
        while len(found) < count:
            fresh = list(self._candidates(count - len(found) if not self.known_only else self.chunk * 4))
            if not fresh:
                break
            if self.known_only:
                keep = [case for case, known in zip(fresh, self.known(fresh), strict=True) if known]
                for case in (case for case in fresh if case not in keep):
                    self._subjects -= set(case.subjects)
                # What this round does not need goes back, or a shorter run would not be the beginning of a longer one.
                keep, rest = keep[: count - len(found)], keep[count - len(found) :]
                self._give_back(rest)
                found += keep
            else:
                found += fresh
        return found

    def _give_back(self, cases: Sequence[EditCase]) -> None:
        for case in cases:
            self._subjects -= set(case.subjects)
        remaining = self._order
        self._order = iter([*cases, *remaining])

    def _candidates(self, count: int) -> Iterator[EditCase]:
        found = 0
        for case in self._order:
            reason = case.unsupported or self._obstacle(case)
            if reason:
                self.skip(case, reason)
                continue
            if self._unique and self._subjects & set(case.subjects):
                self.passed_over += 1
                continue
            fitted = self._fitted(case)
            if fitted is None:
                self.skip(case, "its prompt is longer than the model's context")
                continue
            self._subjects |= set(case.subjects)
            found += 1
            yield fitted
            if found == count:
                return

    def _obstacle(self, case: EditCase) -> str:
        """Why this model cannot take a case, found out before any time is spent on it."""
        tokenizer = self.handle.tokenizer
        for request in case.requests:
            try:
                start = request.prompt.find("{}")
                subject_span(tokenizer, request.text, request.subject, start=start)
            except RequestError as error:
                return str(error)
        return ""

    def _fitted(self, case: EditCase) -> EditCase | None:
        """The case without the prompts that do not fit into the model's context; ``None`` where an edit itself does not."""
        longest = getattr(self.handle.config, "max_position_embeddings", None)
        if not isinstance(longest, int):
            return case
        long = [probe.prompt for probe in self.suite.probes(case) if self._tokens(probe, longest) > longest]
        if not long:
            return case
        if any(
            request.text in long or self._count(request.text, longest) > longest for request in case.requests
        ):
            return None
        # A prompt asked after the edited statement ends in the case's own prompt.
        kept = tuple(p for p in case.probes if not any(text.endswith(p.prompt) for text in long))
        self.too_long += len(case.probes) - len(kept)
        return replace(case, probes=kept)

    def _tokens(self, probe: Probe, longest: int) -> int:
        texts = (
            [f"{probe.prompt} {target}" for target in probe.targets]
            if probe.task == "score"
            else [probe.prompt]
        )
        more = 0 if probe.task == "score" or probe.whole else probe.tokens
        return more + max((self._count(text, longest - more) for text in texts), default=0)

    def _count(self, text: str, longest: int) -> int:
        # A token stands for one byte at least, so most texts need no counting.
        bound = len(text.encode()) + 1
        return bound if bound <= longest else len(encode_ids(self.handle.tokenizer, text))

    def known(self, cases: Sequence[EditCase]) -> list[bool | None]:
        """Per case, whether every old answer (or an alias) is the greedy answer; ``None`` where the file gives none."""
        asked: list[list[Probe]] = []
        for case in cases:
            pairs = zip(case.requests, case.old_answers, strict=True)
            asked.append(
                [
                    Probe(f"{_KNOWN}/{i}", _KNOWN, r.text, answers=old)
                    for i, (r, old) in enumerate(pairs)
                    if old
                ]
            )
        flat = iter(self.before([probe for probes in asked for probe in probes]))
        found: list[bool | None] = []
        for case, probes in zip(cases, asked, strict=True):
            seen = [next(flat) for _ in probes]
            right = [any(rating.all_correct for rating in observation.ratings) for observation in seen]
            found.append(all(right) if len(right) == len(case.requests) else None)
        return found

    def before(self, probes: Sequence[Probe]) -> list[Observation]:
        """Answers of the model as it stands, kept for the next editor."""
        return self.cache.observe(self.handle, self.respondent, probes)

    def skip(self, case: EditCase, reason: str) -> None:
        """Leaves a case out."""
        self.skipped.append(Skip(case.file, case.line, reason, case.id))

    # -- the three protocols ------------------------------------------------------------------------------------------

    def execute(self, limit: int | None) -> None:
        """Runs the chosen protocol."""
        total = len(self.cases) if limit is None else limit
        if self.protocol == "single":
            while len(self.done) < total:
                drawn = self.draw(min(self._chunk(), total - len(self.done)))
                if not drawn:
                    break
                self._single(drawn)
                self.progress("edited and asked", len(self.done), total)
            return
        drawn = self.draw(total)
        if not drawn:
            return
        known = self.known(drawn)
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
        known = dict(zip([case.id for case in drawn], self.known(drawn), strict=True))
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
                patch = self.editor.edit(self.handle, list(case.requests))
            except (RequestError, NumericalError) as error:
                self.skip(case, str(error))
                continue
            yield case, patch

    def _batch(self, drawn: Sequence[EditCase]) -> tuple[Mapping[str, Mapping[str, Observation]], set[str]]:
        patch = self.editor.edit(self.handle, [request for case in drawn for request in case.requests])
        with patch.applied(self.handle):
            after = _ask(self.suite, drawn, self.respondent.observe, self.progress)
        return after, set(after)

    def _sequential(
        self, drawn: Sequence[EditCase], base: Mapping[str, Mapping[str, Observation]]
    ) -> tuple[Mapping[str, Mapping[str, Observation]], set[str]]:
        stack: list[Applied] = []
        kept: list[EditCase] = []
        try:
            for number, case in enumerate(drawn, start=1):
                try:
                    patch = self.editor.edit(self.handle, list(case.requests))
                except (RequestError, NumericalError) as error:
                    self.skip(case, str(error))
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
        if self.too_long:
            notes.append(f"{self.too_long} prompts longer than the model's context were left out")
        if self.passed_over:
            notes.append(
                f"{self.passed_over} cases were passed over because their subject was edited already"
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
            skipped=(*self.cases.malformed, *self.skipped),
            drawn=len(self.done) + len(self.skipped),
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
