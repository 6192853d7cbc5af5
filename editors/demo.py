"""The main job in small: edit facts of the built-in world, look at everything around them, take every edit off again."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

from lab.errors import ConfigError
from lab.records import EditRequest, Fact

if TYPE_CHECKING:
    from editors.base import Editor
    from lab.attention import DriftReport
    from lab.data.cases import EditCase
    from lab.eval.probe import Probe
    from lab.eval.report import Report
    from lab.handle import ModelHandle
    from lab.memory import MemoryPatch
    from lab.patch import WeightPatch

# Group of a suite's probes, what it is called here, how many of a case are shown.
SHOWN = (
    ("rewrite", "prompt", 1),
    ("paraphrase", "paraphrase", 2),
    ("neighborhood", "neighbor", 2),
    ("distract_neighborhood", "distracted neighbor", 2),
)
STOP = (".\n", "\n")
# Facts asked at a time when looking for known ones.
_LOOK = 64

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Line:
    """One prompt and what is said after it.

    Attributes:
        case: Id of the edited fact.
        kind: ``prompt``, ``paraphrase``, ``neighbor`` or ``distracted neighbor`` (the neighbor after the edited statement).
        prompt: The text.
        wanted: What should be said after the edit: the new object for the first two kinds, the true one for the others.
        before: Completion of the unedited model.
        after: Editor to completion.
    """

    case: str
    kind: str
    prompt: str
    wanted: str
    before: str
    after: Mapping[str, str]

    def right(self, completion: str) -> bool:
        """Whether a completion starts with what is wanted, case aside."""
        return completion.casefold().startswith(self.wanted.casefold())


@dataclass(frozen=True)
class Demo:
    """What the demo found.

    Attributes:
        model: Name of the model.
        cases: The edited facts.
        lines: Every prompt shown, in order.
        reports: One per editor, with the figures of the suite.
        drift: Editor to the drift of attention towards the edited subject, over all cases.
        undone: Editor to whether every edit came off bit for bit.
        seconds: Wall time.
    """

    model: str
    cases: tuple[EditCase, ...]
    lines: tuple[Line, ...]
    reports: tuple[Report, ...]
    drift: Mapping[str, DriftReport]
    undone: Mapping[str, bool]
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """Returns plain values."""
        return {
            "model": self.model,
            "n": len(self.cases),
            "edits": [
                {
                    "id": case.id,
                    "prompt": request.text,
                    "target_old": request.target_old,
                    "target_new": request.target_new,
                }
                for case in self.cases
                for request in case.requests
            ],
            "editors": {
                report.editor: {
                    "metrics": {name: value.to_json() for name, value in report.metrics.items()},
                    "attention_drift": self.drift[report.editor].to_json(),
                    "undo": {"bit_identical": self.undone[report.editor]},
                }
                for report in self.reports
            },
            "before": {name: value.to_json() for name, value in self.reports[0].before.items()},
            "completions": [
                {
                    "case": line.case,
                    "kind": line.kind,
                    "prompt": line.prompt,
                    "wanted": line.wanted,
                    "before": line.before,
                }
                | {"after": dict(line.after)}
                for line in self.lines
            ],
            "seconds": self.seconds,
        }


def choose_cases(handle: ModelHandle, limit: int, seed: int) -> tuple[EditCase, ...]:
    """Facts of the built-in world's test split that the model knows, one per subject: a capital first, then every relation in turn.

    Raises:
        ConfigError: The model knows none of the facts.
    """
    from lab.atlas.world import load_world
    from lab.eval.atlas import atlas_cases

    facts = list(load_world().split("test"))
    random.Random(seed).shuffle(facts)
    by_relation: dict[str, list[Fact]] = {}
    for fact in sorted(facts, key=lambda fact: fact.relation != "capital"):
        by_relation.setdefault(fact.relation, []).append(fact)
    order = [fact for turn in zip_longest(*by_relation.values()) for fact in turn if fact is not None]
    known: dict[str, Fact] = {}
    for begin in range(0, len(order), _LOOK):
        chunk = order[begin : begin + _LOOK]
        for fact, text in zip(chunk, _said(handle, [fact.text for fact in chunk]), strict=True):
            if any(text.casefold().startswith(answer.casefold()) for answer in fact.answers):
                known.setdefault(fact.subject, fact)
        if len(known) >= limit:
            break
    if not known:
        raise ConfigError(
            f"{handle.name!r} knows none of the built-in world's {len(order)} test facts; the demo needs some that it knows"
        )
    return atlas_cases(seed=seed, facts=list(known.values())[:limit]).cases


class Prepared:
    """An editor that hands out patches that were computed before, so that they are evaluated without a second search."""

    def __init__(self, patches: Mapping[str, WeightPatch | MemoryPatch]) -> None:
        self._patches = patches

    def edit(
        self, handle: ModelHandle, requests: Sequence[EditRequest], *, history: Any = None
    ) -> WeightPatch | MemoryPatch:
        """The patch of the one request."""
        (request,) = requests
        return self._patches[request.id]


def run_demo(
    handle: ModelHandle,
    editors: Mapping[str, Editor],
    cases: Sequence[EditCase],
    *,
    seed: int = 0,
    progress: Progress | None = None,
) -> Demo:
    """Edits each case alone with each editor and asks everything around it; the model is bit-identical afterwards.

    Args:
        handle: The model.
        editors: Spec to editor.
        cases: One request each.
        seed: Recorded in the reports.
        progress: Called with a phase, how much is done, and how much there is.
    """
    from lab.attention import attention_drift
    from lab.data.cases import CaseSet
    from lab.eval.baseline import BaselineCache
    from lab.eval.run import evaluate_editing
    from lab.eval.suites import SuiteOptions, get_suite

    started = time.perf_counter()
    suite = get_suite("atlas", SuiteOptions(fluency=False))
    chosen = CaseSet("atlas", "atlas", "atlas:test", tuple(cases))
    shown = [(case, probe, kind) for case in cases for probe, kind in _shown(suite.probes(case))]
    prompts = [probe.prompt for _, probe, _ in shown]
    bits, state = handle.weights_digest(), handle.state
    before = _said(handle, prompts)
    cache = BaselineCache()
    reports, drifts, undone = [], {}, {}
    after: list[dict[str, str]] = [{} for _ in shown]
    for name, editor in editors.items():
        patches: dict[str, WeightPatch | MemoryPatch] = {}
        for number, case in enumerate(cases):
            if progress is not None:
                progress(name, number, len(cases))
            (request,) = case.requests
            patches[request.id] = editor.edit(handle, [request])
        reports.append(
            evaluate_editing(suite, handle, Prepared(patches), chosen, seed=seed, name=name, cache=cache)
        )
        pieces = []
        for case in cases:
            (request,) = case.requests
            patch = patches[request.id]
            own = [index for index, (owner, _, _) in enumerate(shown) if owner is case]
            with patch.applied(handle):
                for index, text in zip(own, _said(handle, [prompts[index] for index in own]), strict=True):
                    after[index][name] = text
            # Every prompt that names the subject shows where the heads look: the edited one, its wordings, and the
            # neighbors that follow the edited statement.
            naming = [prompts[index] for index in own if request.subject in prompts[index]]
            pieces.append(attention_drift(handle, patch, naming, [request.subject] * len(naming)))
        if progress is not None:
            progress(name, len(cases), len(cases))
        undone[name] = handle.weights_digest() == bits and handle.state == state
        drifts[name] = joined(pieces)
    lines = tuple(
        Line(case.id, kind, probe.prompt, probe.answers[0], first, later)
        for (case, probe, kind), first, later in zip(shown, before, after, strict=True)
    )
    return Demo(
        handle.name, tuple(cases), lines, tuple(reports), drifts, undone, time.perf_counter() - started
    )


def _shown(probes: Sequence[Probe]) -> list[tuple[Probe, str]]:
    found = []
    for group, kind, count in SHOWN:
        found += [(probe, kind) for probe in [probe for probe in probes if probe.group == group][:count]]
    return found


def _said(handle: ModelHandle, prompts: Sequence[str]) -> list[str]:
    return [text.strip() for text in handle.generate(prompts, max_new_tokens=12, stop=STOP)]


def joined(reports: Sequence[DriftReport]) -> DriftReport:
    """Several drift reports of one model as one."""
    import torch

    from lab.attention import DriftReport

    return DriftReport(
        torch.cat([report.before for report in reports]),
        torch.cat([report.after for report in reports]),
        tuple(prompt for report in reports for prompt in report.prompts),
    )
