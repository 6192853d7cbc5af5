"""Running a suite: a model as it is, or an editor over many cases.

An editor is any object with ``edit(handle, requests)``; this module knows none by name. Cases are drawn with a seed, what a method
cannot take is skipped with its reason and replaced by another draw, and nothing is filtered by what the model knows unless asked.
"""

from __future__ import annotations

import random
import time
from collections.abc import Mapping, Sequence
from typing import Any

from lab.data.cases import CaseSet, EditCase
from lab.errors import ConfigError, DataError, PatchError
from lab.eval.baseline import BaselineCache
from lab.eval.draw import Draw, taught_cases
from lab.eval.journal import Guard, Journal
from lab.eval.patches import Editor
from lab.eval.probe import Observation, Probe, Respondent
from lab.eval.protocols import EditingRun, Plan, Progress, Protocols, ask, case_row
from lab.eval.report import MetricTable, Report
from lab.eval.respond import ModelRespondent
from lab.eval.suite import Suite
from lab.handle import ModelHandle


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
    answers = ask(suite, cases, respondent.observe)
    values = [suite.values(case, answers[case.id]) for case in cases]
    rows = tuple(
        case_row(case, now, {}, answers[case.id], {}) for case, now in zip(cases, values, strict=True)
    )
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
    in_order: bool = False,
    name: str = "",
    batch_size: int = 64,
    chunk: int = 16,
    rowwise: bool = True,
    retention_every: int = 0,
    guard: Guard | None = None,
    journal: Journal | None = None,
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
            patch; ``metrics`` are of the model after the last one, the table ``right_after_edit`` of each case right after its
            own, and the editor is told the earlier patches.
        known_only: Draws only cases whose old answer is the model's greedy answer; of a bed, among the cases that it was taught.
        in_order: Takes the cases in their own order, also those that name a subject again.
        name: Spec of the editor, for the report.
        batch_size: Rows in one forward pass.
        chunk: Cases edited and asked together under ``single``.
        rowwise: Under ``single``, low-rank patches of the same parameters are asked in shared forward passes, beside the weights
            instead of in them. On a half-precision model that is also the more faithful way: adding a small patch to such
            weights rounds most of it away.
        retention_every: Under ``sequential``, after how many edits all edits so far are asked again; never for 0.
        guard: Looks at every patch before it is used; what it refuses is skipped.
        journal: Remembers finished edits; what it knows is not done again.
        cache: Shared between calls on one model, it saves asking the unedited model twice.
        progress: Told about every step.
        settings: Further settings for the report.

    Raises:
        ConfigError: A nonsensical limit, chunk or protocol.
        DataError: Not one case could be evaluated.
    """
    if limit is not None and limit < 1:
        raise ConfigError(f"limit must be at least 1, it is {limit}")
    plan = Plan(protocol, chunk, rowwise, retention_every, guard, journal, progress)
    start, state = time.monotonic(), handle.state
    respondent, kept = ModelRespondent(handle, batch_size=batch_size), cache or BaselineCache()

    def before(probes: Sequence[Probe]) -> list[Observation]:
        return kept.observe(handle, respondent, probes)

    taught = taught_cases(handle, cases)
    draw = Draw(
        suite,
        handle,
        cases.cases,
        seed=None if in_order else seed,
        unique=not in_order and (protocol != "single" or suite.one_per_subject),
        known_only=known_only,
        ask=before,
        taught=taught,
    )
    run = EditingRun(suite, handle, editor, draw, respondent, before, plan)
    run.execute(len(cases) if limit is None else limit)
    if handle.state != state:
        raise PatchError("the model is not what it was before the evaluation; a patch was not taken back")
    if not run.done:
        if draw.skipped:
            reason = f"the first reason: {draw.skipped[0].reason}"
        elif len(cases) and known_only:
            reason = (
                "the model answers none of them before the edit, as known_only asks; facts that are new have no such answer, evaluate "
                "them without it"
            )
        else:
            reason = "the source holds none"
        raise DataError(f"not one case could be evaluated; {reason}", cases.source)
    extra: dict[str, MetricTable] = {}
    if protocol == "sequential":
        extra["right_after_edit"] = suite.summarise([row.right_after for row in run.done])
    return Report(
        suite=suite.name,
        model=handle.name,
        editor=name,
        seed=seed,
        n=len(run.done),
        known=sum(row.known is True for row in run.done),
        metrics=suite.summarise([row.values for row in run.done]),
        before=suite.summarise([row.before for row in run.done]),
        skipped=(*cases.malformed, *draw.skipped),
        drawn=len(run.done) + len(draw.skipped),
        rows=len(cases) + len(cases.malformed),
        seconds=time.monotonic() - start,
        settings={
            "comparable": suite.comparable or suite.name,
            "protocol": protocol,
            "source": cases.source,
            "format": cases.format,
            "limit": limit,
            "known_only": known_only,
            "known_by": "greedy answer" if taught is None else "greedy answer of what the bed was taught",
            "fingerprint": handle.fingerprint,
            **(settings or {}),
        },
        notes=_notes(run, draw, limit),
        extra=extra,
        retention=run.retention,
        cases=tuple(run.done),
    )


def _notes(run: EditingRun, draw: Draw, limit: int | None) -> tuple[str, ...]:
    notes = []
    unknown = sum(row.known is None for row in run.done)
    if unknown:
        notes.append(f"{unknown} of {len(run.done)} cases give no old answer and cannot count as known")
    if limit is not None and len(run.done) < limit:
        notes.append(f"only {len(run.done)} of {limit} cases could be had")
    if draw.too_long:
        notes.append(f"{draw.too_long} prompts longer than the model's context were left out")
    if draw.passed_over:
        notes.append(f"{draw.passed_over} cases were passed over because their subject was edited already")
    return (*notes, *run.remarks)
