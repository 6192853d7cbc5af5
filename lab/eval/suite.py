"""A suite: which probes a case asks, and how what came back becomes metrics."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from lab.data.cases import CaseProbe, EditCase
from lab.eval.probe import Observation, Probe
from lab.eval.stats import Estimate, harmonic_score, summarise

Scorer = Callable[[Probe, Observation, Observation | None], float | None]
Bounds = tuple[float, float] | None
Values = dict[str, list[float]]


@dataclass(frozen=True)
class CaseView:
    """All that is known of one case when it is scored.

    Attributes:
        case: The case.
        probes: What was asked.
        seen: Answers by probe id.
        before: Answers of the model before, by probe id, or ``None``.
    """

    case: EditCase
    probes: tuple[Probe, ...]
    seen: Mapping[str, Observation]
    before: Mapping[str, Observation] | None = None

    def of(self, group: str) -> tuple[Probe, ...]:
        """The probes of one group, in order."""
        return tuple(probe for probe in self.probes if probe.group == group)


Measure = Callable[[CaseView], Values]


@dataclass(frozen=True)
class PromptMeasure:
    """A metric that scores the prompts of one group one by one.

    Attributes:
        name: Key of the metric.
        group: The probes it scores.
        scorer: What it does with each.
        by_kind: Also reports ``name_kind`` for every kind, and takes the mean of the kinds' means as the case's value.
    """

    name: str
    group: str
    scorer: Scorer
    by_kind: bool = False

    def __call__(self, view: CaseView) -> Values:
        """Scores a case."""
        kinds: dict[str, list[float]] = {}
        for probe in view.of(self.group):
            value = self.scorer(
                probe, view.seen[probe.id], None if view.before is None else view.before[probe.id]
            )
            if value is not None:
                kinds.setdefault(probe.kind, []).append(value)
        if not self.by_kind:
            return {self.name: [value for values in kinds.values() for value in values]}
        # Each kind weighs the same, however many prompts it has: EasyEdit's portability and locality.
        found = {self.name: [math.fsum(values) / len(values) for values in kinds.values()]}
        return found | {f"{self.name}_{kind}": values for kind, values in kinds.items() if kind}


@dataclass(frozen=True)
class Suite:
    """A benchmark: probes and measures, as data.

    Attributes:
        name: Its name on the command line.
        about: One line for listings.
        probes: Turns a case into what is asked.
        measures: Turn what came back into values.
        score_parts: Metrics whose harmonic mean is ``score``; empty for suites without one.
        pooling: ``case``: a metric is the mean over cases of the mean over the case's prompts; ``prompt``: over all prompts.
        bounds: Smallest and largest value of metrics that are not fractions; matched by the end of the key.
        comparable: Names the convention; figures of different conventions must not stand in one table.
        one_per_subject: Draws at most one case per subject under every protocol.
        paper: Where the benchmark is described.
        cost: What a case asks of the model, in words.
    """

    name: str
    about: str
    probes: Callable[[EditCase], tuple[Probe, ...]]
    measures: tuple[Measure, ...]
    score_parts: tuple[str, ...] = ()
    pooling: Literal["case", "prompt"] = "case"
    bounds: Mapping[str, Bounds] | None = None
    comparable: str = ""
    one_per_subject: bool = False
    paper: str = ""
    cost: str = ""

    def values(
        self, case: EditCase, seen: Mapping[str, Observation], before: Mapping[str, Observation] | None = None
    ) -> Values:
        """The values of one case: one per metric, or one per prompt where prompts are pooled."""
        view = CaseView(case, self.probes(case), seen, before)
        found: Values = {}
        for measure in self.measures:
            for name, values in measure(view).items():
                if values:
                    found[name] = (
                        [math.fsum(values) / len(values)] if self.pooling == "case" else list(values)
                    )
        return found

    def summarise(self, cases: Sequence[Values]) -> dict[str, Estimate]:
        """Metrics over cases; one that no case has a value for is absent."""
        names = dict.fromkeys(name for case in cases for name in case)
        table = {
            name: summarise([value for case in cases for value in case.get(name, ())], self.bounds_of(name))
            for name in names
        }
        if self.score_parts and all(part in table for part in self.score_parts):
            table["score"] = harmonic_score(cases, self.score_parts)
        return table

    def bounds_of(self, name: str) -> Bounds:
        """Smallest and largest possible value of a metric."""
        for ending, bounds in {**_BOUNDS, **(self.bounds or {})}.items():
            if name.endswith(ending):
                return bounds
        return (0.0, 1.0)


_BOUNDS: Mapping[str, Bounds] = {"fluency": None, "_magnitude": (-1.0, 1.0)}


def scored(probe: CaseProbe, number: int, *, aliases: bool = False, distribution: bool = False) -> Probe:
    """A probe that scores the first answer (or all spellings) and the rival."""
    answers = probe.answers if aliases else probe.answers[:1]
    return Probe(
        id=f"{probe.group}/{number}",
        group=probe.group,
        prompt=probe.prompt,
        answers=answers,
        rival=probe.rival,
        kind=probe.kind,
        distribution=distribution,
    )


def scored_group(case: EditCase, *groups: str, aliases: bool = False) -> list[Probe]:
    """Scoring probes for all prompts of some groups; prompts without an answer are left out."""
    return [
        scored(probe, number, aliases=aliases)
        for group in groups
        for number, probe in enumerate(case.of(group))
        if probe.answers
    ]


def distracted(case: EditCase, group: str, name: str) -> list[Probe]:
    """The prompts of ``group`` with the edited statement before them: ``prompt o*. `` and the prompt (SADR)."""
    statement = " ".join(f"{request.text} {request.target_new}." for request in case.requests)
    return [
        Probe(
            f"{name}/{number}",
            name,
            f"{statement} {p.prompt}",
            answers=p.answers[:1],
            rival=p.rival,
            kind=p.kind,
        )
        for number, p in enumerate(case.of(group))
        if p.answers
    ]


def written(
    case: EditCase,
    group: str,
    *,
    tokens: int,
    top_k: int | None,
    limit: int | None = None,
    prompts: Sequence[str] = (),
) -> list[Probe]:
    """Probes that let the model write; sampled ones get a seed of their own, so that repeated prompts differ."""
    texts = list(prompts) or [probe.prompt for probe in case.of(group)]
    return [
        Probe(f"{group}/{number}", group, text, "generate", tokens=tokens, whole=True, top_k=top_k)
        for number, text in enumerate(texts[:limit])
    ]
