"""Reports: what an evaluation found, as values, and every form in which it is read."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lab.data.cases import EditCase, Skip
from lab.errors import ConfigError
from lab.eval.probe import Observation
from lab.eval.retention import Retention
from lab.eval.stats import Estimate
from lab.eval.suite import Suite, Values
from lab.records import write_text_atomically

if TYPE_CHECKING:
    from lab.tables import WideTable

SCHEMA_VERSION = 1
TOO_MANY_SKIPPED = 0.05

MetricTable = Mapping[str, Estimate]
Answers = Mapping[str, Mapping[str, Observation]]


@dataclass(frozen=True)
class CaseRow:
    """One case in a report.

    Attributes:
        id: The case.
        prompt: The first edit's prompt, filled.
        target_new: Its target.
        target_old: What was true before, or empty.
        values: The case's values after.
        before: The case's values before.
        known: Whether the model's greedy answer before was the old one; ``None`` where the file does not give it.
        p_before: Probability of the target before, or ``None``.
        p_after: Probability of the target after, or ``None``.
        right_after: In a sequence, the case's values right after its own edit; ``values`` are those after all edits.
    """

    id: str
    prompt: str
    target_new: str
    target_old: str
    values: Values
    before: Values
    known: bool | None = None
    p_before: float | None = None
    p_after: float | None = None
    right_after: Values = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Returns the JSON form; several values of one metric are given as their mean."""

        def means(values: Values) -> dict[str, float]:
            return {name: sum(found) / len(found) for name, found in values.items()}

        return {
            "id": self.id,
            "prompt": self.prompt,
            "target_new": self.target_new,
            "target_old": self.target_old,
            "known": self.known,
            "p_before": self.p_before,
            "p_after": self.p_after,
            "metrics": means(self.values),
            "before": means(self.before),
        }


@dataclass(frozen=True)
class Report:
    """The result of one evaluation.

    Attributes:
        suite: Name of the suite.
        model: Name of the model.
        editor: Spec of the editor, or empty for a model as it is.
        seed: Seed of the draw.
        n: Cases evaluated.
        known: Cases whose old answer was the greedy answer before.
        metrics: Metrics after the edits (or of the model as it is).
        before: The same table for the model before, where there is one.
        skipped: Rows left out, with file, line and reason.
        drawn: Cases that were drawn, skipped ones included.
        rows: Rows of the source, broken ones included.
        seconds: Wall time.
        settings: What else defines the figures: protocol, source, convention, options.
        notes: Remarks a reader must see.
        extra: Further tables by name.
        retention: How each edit of a sequence held while others followed, where that was measured.
        cases: One row per case.
        definition: The suite, for ``against``; not saved.
        asked: The cases, for ``against``; not saved.
        answers: All answers by case and probe, for ``against``; not saved.
    """

    suite: str
    model: str
    editor: str
    seed: int
    n: int
    known: int
    metrics: MetricTable
    before: MetricTable = field(default_factory=dict)
    skipped: tuple[Skip, ...] = ()
    drawn: int = 0
    rows: int = 0
    seconds: float = 0.0
    settings: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    extra: Mapping[str, MetricTable] = field(default_factory=dict)
    retention: Retention | None = None
    cases: tuple[CaseRow, ...] = ()
    definition: Suite | None = field(default=None, repr=False, compare=False)
    asked: tuple[EditCase, ...] = field(default=(), repr=False, compare=False)
    answers: Answers = field(default_factory=dict, repr=False, compare=False)

    @property
    def too_many_skipped(self) -> bool:
        """Whether more than 5 % of the drawn cases, or of the source's rows, were left out: the figures may be biased."""
        broken = len(self.skipped) - (self.drawn - self.n)
        return self.drawn - self.n > TOO_MANY_SKIPPED * self.drawn or broken > TOO_MANY_SKIPPED * max(
            self.rows, 1
        )

    def against(self, before: Report) -> Report:
        """This report with ``before`` as its baseline: fills the second table, and the metrics that compare with it.

        Raises:
            ConfigError: The two do not ask the same of the same cases, or one was read from a file.
        """
        if self.definition is None or before.definition is None:
            raise ConfigError(
                "a report that was read from a file holds no answers to compare; evaluate again"
            )
        if self.suite != before.suite or [case.id for case in self.asked] != [
            case.id for case in before.asked
        ]:
            raise ConfigError(f"the reports are of different cases ({self.suite} and {before.suite})")
        suite = self.definition
        now = [suite.values(case, self.answers[case.id], before.answers[case.id]) for case in self.asked]
        then = [suite.values(case, before.answers[case.id], before.answers[case.id]) for case in self.asked]
        rows = tuple(
            replace(row, values=a, before=b) for row, a, b in zip(self.cases, now, then, strict=True)
        )
        return replace(self, metrics=suite.summarise(now), before=suite.summarise(then), cases=rows)

    def to_json(self, command: str = "eval") -> dict[str, Any]:
        """Returns the JSON form, complete and stable.

        Args:
            command: The command that made it.
        """

        def table(metrics: MetricTable) -> dict[str, Any]:
            return {name: estimate.to_json() for name, estimate in metrics.items()}

        return {
            "schema_version": SCHEMA_VERSION,
            "command": command,
            "seed": self.seed,
            "suite": self.suite,
            "editor": self.editor,
            "model": self.model,
            "n": self.n,
            "known": self.known,
            "metrics": table(self.metrics),
            "before": table(self.before),
            "skipped": [skip.to_json() for skip in self.skipped],
            "seconds": self.seconds,
            "too_many_skipped": self.too_many_skipped,
            "settings": dict(self.settings),
            "notes": list(self.notes),
            "extra": {name: table(metrics) for name, metrics in self.extra.items()},
            "retention": None if self.retention is None else self.retention.to_json(),
            "cases": [row.to_json() for row in self.cases],
        }

    def table(self) -> WideTable:
        """The figures as a table for the terminal."""
        from lab.eval.render import rich_table

        return rich_table([self])

    def to_markdown(self) -> str:
        """The figures as a Markdown table."""
        from lab.eval.render import markdown

        return markdown([self])

    def to_csv(self) -> str:
        """One line per metric: name, before, after, interval ends, n."""
        from lab.eval.render import csv_text

        return csv_text([self])

    def to_latex(self) -> str:
        """The figures as a LaTeX table with booktabs rules."""
        from lab.eval.render import latex

        return latex([self])

    def to_html(self) -> str:
        """A page with tables and plots that needs no other file."""
        from lab.eval.html import page

        return page([self])

    def save(self, path: str | Path, command: str = "eval") -> Path:
        """Writes the form that the suffix names: ``.json .md .csv .tex .html``; the old file stays until the new is complete.

        Raises:
            ConfigError: Another suffix.
        """
        return save_reports([self], path, command)


def save_reports(reports: Sequence[Report], path: str | Path, command: str = "eval") -> Path:
    """Writes one or several reports side by side; see ``Report.save``. Several reports make a JSON list."""
    from lab.eval import html, render

    target = Path(path)
    writers = {".md": render.markdown, ".csv": render.csv_text, ".tex": render.latex, ".html": html.page}
    if target.suffix == ".json":
        found = [report.to_json(command) for report in reports]
        text = (
            json.dumps(found[0] if len(found) == 1 else found, ensure_ascii=False, indent=1, allow_nan=False)
            + "\n"
        )
    elif target.suffix in writers:
        text = writers[target.suffix](reports)
    else:
        raise ConfigError(
            f"cannot write a report as {target.suffix or target.name!r}; known: .json {' '.join(writers)}"
        )
    write_text_atomically(target, text)
    return target


def save_comparison(
    folder: str | Path, stem: str, content: Mapping[str, Any], forms: Mapping[str, Callable[[], str]]
) -> list[Path]:
    """Writes a comparison in every form in which it is read, one file each.

    Args:
        folder: Where to.
        stem: Name of the files before their ending.
        content: The JSON document, which is written as ``STEM.json``.
        forms: Ending to what makes that form's text.

    Returns:
        The files, JSON first.
    """
    written = json.dumps(content, ensure_ascii=False, indent=1, allow_nan=False) + "\n"
    texts = {"json": lambda: written, **forms}
    paths = [Path(folder) / f"{stem}.{form}" for form in texts]
    for path, make in zip(paths, texts.values(), strict=True):
        write_text_atomically(path, make())
    return paths
