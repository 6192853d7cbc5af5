"""How many edits in a row a model takes: batches on top of each other, all edits so far asked again along the way.

AlphaEdit writes into a null space of limited rank, so that the natural unit of such a curve is that rank: half of it is where a
sequence is expected to hold (``N``), the whole of it where nothing is left to write into (``2N``).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from lab.data.cases import EditCase
from lab.errors import ConfigError, DataError, NumericalError, RequestError
from lab.eval.draw import Draw
from lab.eval.journal import Journal, Step
from lab.eval.patches import Applied, Editor, Patch, compute, joined, parts
from lab.eval.protocols import ask
from lab.eval.suite import Suite, Values

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from lab.eval.baseline import BaselineCache
    from lab.eval.respond import ModelRespondent
    from lab.handle import ModelHandle

LEAST = 200
"""``N`` is no smaller than this, however small the null space."""
SHOWN = ("efficacy", "paraphrase", "neighborhood", "relation")
GROUPS = ("rewrite", "paraphrase", "neighborhood", "relation")
EFFICACY, LOSS = 0.90, 0.05
"""What a sequence that holds keeps: efficacy over all edits, and the most that the neighborhood may lose."""
_MARKS = 8

Row = dict[str, Any]
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class SequencePlan:
    """What all editors of a curve go through.

    Attributes:
        batches: Cases in their order, no subject twice.
        half: ``N``: edits after which the sequence is judged; a whole number of batches.
        marks: After how many batches all edits so far are asked again.
        ranks: Layer to the rank of the null space that ``half`` follows from; empty where it was given.
    """

    batches: tuple[tuple[EditCase, ...], ...]
    half: int
    marks: tuple[int, ...]
    ranks: Mapping[int, int]

    @property
    def edits(self) -> int:
        """Edits in the whole sequence."""
        return sum(map(len, self.batches))


def half_of(ranks: Mapping[int, int], batch: int) -> int:
    """``N``: half of the smallest rank, at least ``LEAST``, rounded up to whole batches."""
    wanted = max(LEAST, min(ranks.values()) // 2)
    return math.ceil(wanted / batch) * batch


def plan_sequence(cases: Sequence[EditCase], half: int, batch: int, ranks: Mapping[int, int]) -> SequencePlan:
    """Batches of ``2 half`` cases; fewer where there are not as many.

    Args:
        cases: With distinct subjects, in their order.
        half: ``N``, a multiple of ``batch``.
        batch: Cases in one edit.
        ranks: Where ``half`` comes from.

    Raises:
        ConfigError: ``half`` is not a positive multiple of ``batch``.
        DataError: There are fewer than ``half`` cases.
    """
    if batch < 1 or half < 1 or half % batch:
        raise ConfigError(f"N must be a positive multiple of the batch, {batch}; it is {half}")
    if len(cases) < half:
        raise DataError(f"{len(cases)} cases have subjects of their own; the sequence needs {half}", "cases")
    count = min(2 * half, len(cases) // batch * batch)
    batches = [tuple(cases[at : at + batch]) for at in range(0, count, batch)]
    step = max(1, round(len(batches) / _MARKS))
    middle = half // batch
    marks = {1, *range(step, len(batches) + 1, step), middle, len(batches)}
    kept = without_edited(batches)
    return SequencePlan(tuple(kept), half, tuple(sorted(marks)), dict(ranks))


def without_edited(batches: Sequence[Sequence[EditCase]]) -> list[tuple[EditCase, ...]]:
    """Cases asked only what is plotted, and nothing about others that the same sequence edits: their old answer is no longer right."""
    edited = {request.text for batch in batches for case in batch for request in case.requests}

    def bare(case: EditCase) -> EditCase:
        probes = tuple(
            probe
            for probe in case.probes
            if probe.group in GROUPS and (probe.group == "rewrite" or probe.prompt not in edited)
        )
        return replace(case, probes=probes)

    return [tuple(map(bare, batch)) for batch in batches]


def distinct_cases(suite: Suite, handle: ModelHandle, cases: Sequence[EditCase], seed: int) -> list[EditCase]:
    """All cases that the model can take, one per subject, in the order that ``seed`` draws."""
    draw = Draw(
        suite,
        handle,
        [case for case in cases if len(case.requests) == 1],
        seed=seed,
        unique=True,
        known_only=False,
        ask=lambda probes: [],
    )
    return draw.take(len(cases))


@dataclass
class SequenceRun:
    """One editor's way through a plan.

    Attributes:
        suite: What is asked.
        handle: The model; as it was after ``execute``.
        plan: The batches.
        respondent: Asks the model as it stands.
        cache: What the model answered before.
        journal: Remembers patches.
        recall, keep: Read and write the row of a batch, by how many edits it ends.
        progress: Told about every batch.
    """

    suite: Suite
    handle: ModelHandle
    plan: SequencePlan
    respondent: ModelRespondent
    cache: BaselineCache
    journal: Journal
    recall: Callable[[int], Row | None]
    keep: Callable[[int, Row], Row]
    progress: Progress

    def execute(self, editor: Editor) -> list[Row]:
        """Edits batch by batch.

        Args:
            editor: The method; told of the earlier patches.

        Returns:
            One row per batch: ``edits`` so far, ``seconds`` of this batch's edit, and at the marks ``metrics`` and ``before`` over
            all edits so far, and ``first``, ``latest`` over those of the first and of this batch. A batch that cannot be written
            has ``broken``, the reason, and is the last.
        """
        stack: list[Applied] = []
        history: list[Patch] = []
        made: list[EditCase] = []
        rows: list[Row] = []
        base = self._base()
        try:
            for number, batch in enumerate(self.plan.batches, start=1):
                made += batch
                row, step = self.recall(len(made)), self.journal.recall(_name(number))
                if step is None:
                    begin = time.perf_counter()
                    try:
                        requests = [request for case in batch for request in case.requests]
                        change = compute(editor, self.handle, requests, history)
                    except (RequestError, NumericalError) as error:
                        rows.append({"edits": len(made), "broken": str(error)})
                        break
                    row = {"edits": len(made), "seconds": time.perf_counter() - begin}
                    self.journal.write(Step(_name(number), parts(change)))
                else:
                    change = joined(step.patches)
                row = row or {"edits": len(made), "seconds": None}
                stack.append(change.apply(self.handle))
                history += parts(change)
                if number in self.plan.marks and "metrics" not in row:
                    row |= self._measure(made, batch, base)
                rows.append(self.keep(len(made), row))
                self.progress("batches", number, len(self.plan.batches))
        finally:
            for applied in reversed(stack):
                applied.undo()
        return rows

    def _base(self) -> dict[str, Any]:
        cases = [case for batch in self.plan.batches for case in batch]
        return ask(self.suite, cases, lambda probes: self.cache.observe(self.handle, self.respondent, probes))

    def _measure(self, made: Sequence[EditCase], latest: Sequence[EditCase], base: Mapping[str, Any]) -> Row:
        seen = ask(self.suite, made, self.respondent.observe)

        def table(cases: Sequence[EditCase], answers: Mapping[str, Any]) -> Row:
            values: list[Values] = [
                self.suite.values(case, answers[case.id], base[case.id]) for case in cases
            ]
            return {
                name: figure.to_json()
                for name, figure in self.suite.summarise(values).items()
                if name in SHOWN or name == "efficacy_accuracy"
            }

        return {
            "metrics": table(made, seen),
            "before": table(made, base),
            "latest": table(latest, seen),
            "first": table(self.plan.batches[0], seen),
        }


def _name(number: int) -> str:
    return f"batch {number}"


def holds(row: Row) -> bool:
    """Whether the efficacy over all edits and the neighborhood are what a sequence that holds keeps."""
    now, then = row["metrics"], row["before"]
    lost = then["neighborhood"]["mean"] - now["neighborhood"]["mean"] if "neighborhood" in now else 0.0
    return now["efficacy"]["mean"] >= EFFICACY and lost <= LOSS


def verdict(rows: Sequence[Row], half: int) -> Row:
    """What a curve says.

    Args:
        rows: Of ``SequenceRun.execute``.
        half: ``N``.

    Returns:
        ``holds_at_n``; ``holds_until`` and ``breaks_at``, the last mark up to which it always held and the first at which it did not
        (``None`` where there is none).
    """
    marks = [row for row in rows if "metrics" in row]
    bad = next((row["edits"] for row in marks if not holds(row)), None)
    broken = next((row["edits"] for row in rows if "broken" in row), None)
    bad = broken if bad is None else bad
    at = next((row for row in marks if row["edits"] == half), None)
    good = [row["edits"] for row in marks if bad is None or row["edits"] < bad]
    return {
        "holds_at_n": at is not None and holds(at),
        "holds_until": good[-1] if good else None,
        "breaks_at": bad,
    }


def table_lines(curves: Mapping[str, Sequence[Row]]) -> tuple[list[str], list[list[str]]]:
    """Heads and lines: one per editor and mark."""
    heads = ["editor", "edits", *SHOWN, "neighborhood before", "first batch", "latest batch"]
    lines = []
    for name, rows in curves.items():
        for row in rows:
            if "broken" in row:
                lines.append([name, str(row["edits"]), row["broken"], *["–"] * (len(heads) - 3)])
            elif "metrics" in row:
                figures = [_cell(row["metrics"].get(metric)) for metric in SHOWN]
                rest = [row["before"].get("neighborhood"), row["first"].get("efficacy")]
                rest.append(row["latest"].get("efficacy"))
                lines.append([name, str(row["edits"]), *figures, *map(_short, rest)])
    return heads, lines


def _cell(figure: Mapping[str, Any] | None) -> str:
    if figure is None or figure["mean"] is None:
        return "–"
    return f"{figure['mean']:.3f} [{figure['low']:.3f}, {figure['high']:.3f}]"


def _short(figure: Mapping[str, Any] | None) -> str:
    return "–" if figure is None or figure["mean"] is None else f"{figure['mean']:.3f}"


def curve_plot(curves: Mapping[str, Sequence[Row]], half: int) -> Figure:
    """Efficacy, paraphrase, neighborhood and relation over the number of edits; a line per editor, with its interval."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 6), layout="constrained")
    grid = figure.subplots(2, 2, sharex=True, sharey=True)
    for axes, metric in zip(grid.flat, SHOWN, strict=True):
        for number, (name, rows) in enumerate(curves.items()):
            marks = [row for row in rows if row.get("metrics", {}).get(metric)]
            edits = [row["edits"] for row in marks]
            low, mean, high = (
                [row["metrics"][metric][end] for row in marks] for end in ("low", "mean", "high")
            )
            axes.plot(edits, mean, marker=".", color=f"C{number}", label=name)
            axes.fill_between(edits, low, high, alpha=0.15, color=f"C{number}", linewidth=0)
            before = [row["before"][metric]["mean"] for row in marks if metric in row["before"]]
            if metric in ("neighborhood", "relation") and before:
                axes.plot(edits, before, color=f"C{number}", linestyle=":", linewidth=0.9)
        axes.axvline(half, color="0.6", linewidth=0.8)
        axes.set(title=metric, ylim=(-0.02, 1.02))
    for axes in grid[1]:
        axes.set(xlabel="edits (line: N; dotted: before)")
    grid[0][0].legend(frameon=False)
    return figure


def page(curves: Mapping[str, Sequence[Row]], half: int, title: str) -> str:
    """Table and curves as one HTML page that needs no other file."""
    from html import escape

    from lab.eval.html import document, figure_html, html_table

    pieces = [f"<h1>{escape(title)}</h1>", html_table(*table_lines(curves))]
    pieces.append(figure_html(curve_plot(curves, half), "figures over the number of edits"))
    return document(title, pieces)
