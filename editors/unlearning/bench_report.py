"""A comparison of unlearning methods in every form in which it is read: terminal, JSON, Markdown, LaTeX, CSV, one HTML page."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from editors.unlearning.bench import STAYS, Row
from editors.unlearning.pooling import MethodResult, pool
from lab.eval import html, render
from lab.eval.report import save_comparison
from lab.eval.stats import Estimate

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class UnlearnComparison:
    """All methods of a comparison, and the cells that failed.

    Attributes:
        results: Matched methods by what they lose, least first, then those that do not reach the reference.
        rows: Finished cells.
        failed: Cells with their errors.
        title: What was forgotten, by which model.
    """

    results: tuple[MethodResult, ...]
    rows: tuple[Row, ...]
    failed: tuple[Row, ...]
    title: str

    @classmethod
    def of(cls, rows: Sequence[Row], title: str) -> UnlearnComparison:
        """Puts cells together by method."""
        finished, failed = (tuple(row for row in rows if ("error" in row) is bad) for bad in (False, True))
        return cls(pool(finished), finished, failed, title)

    @property
    def ranked(self) -> tuple[MethodResult, ...]:
        """Methods that forget as much as the reference, best first."""
        return tuple(result for result in self.results if result.matched)

    @property
    def unmatched(self) -> tuple[MethodResult, ...]:
        """Methods that do not: listed, not ranked."""
        return tuple(result for result in self.results if not result.matched)

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Heads and lines: rank, dose, gap, loss of each group in points with its interval, forms, cost."""
        lines = []
        for place, result in enumerate(self.results, start=1):
            rank = str(place) if result.matched else "not matched"
            drops = [_points(result.kept[group]["drop"]) for group in STAYS]
            lines.append(
                [
                    result.method,
                    rank,
                    *(_number(result.mean(name), 3) for name in ("dose", "gap")),
                    *drops,
                    _number(result.mean("form_independence"), 2),
                    _number(result.mean("seconds"), 1),
                    _number(result.mean("peak_mb"), 0),
                    ",".join(str(row["seed"]) for row in result.rows),
                ]
            )
        heads = ["method", "rank", "dose", "gap", *(f"{group} lost" for group in STAYS)]
        return [*heads, "form independence", "s", "peak MB", "seeds"], lines

    def form_table(self) -> tuple[list[str], list[list[str]]]:
        """Heads and lines: mean probability of the forgotten answers, per form; untouched and reference first."""
        names = list(dict.fromkeys(form for row in self.rows for form in row["forms"]))

        def side(rows: Sequence[Row], key: str) -> list[str]:
            means = [[row["forms"][form][key] for row in rows if form in row["forms"]] for form in names]
            return [_number(sum(found) / len(found), 3) if found else "–" for found in means]

        lines = [
            [label, *side(self.rows, key)]
            for label, key in (("untouched", "before"), ("reference", "reference"))
        ]
        lines += [[result.method, *side(result.rows, "after")] for result in self.results]
        return ["method", *names], lines

    def to_json(self) -> Row:
        """``ranked`` and ``unmatched``: one entry per method; ``rows``: one per cell; ``failed``."""
        rows = [{name: value for name, value in row.items() if name != "facts"} for row in self.rows]
        return {
            "ranked": [result.to_json() for result in self.ranked],
            "unmatched": [result.to_json() for result in self.unmatched],
            "rows": rows,
            "failed": list(self.failed),
        }

    def save(self, folder: str | Path, content: Mapping[str, Any]) -> list[Path]:
        """Writes ``unlearning.json .html .md .csv .tex``.

        Args:
            folder: Where to.
            content: The JSON document.
        """
        forms = {
            "html": lambda: page(self),
            "md": lambda: markdown(self),
            "csv": lambda: csv_text(self),
            "tex": lambda: latex(self),
        }
        return save_comparison(folder, "unlearning", content, forms)


def _points(estimate: Estimate) -> str:
    if estimate.mean is None or estimate.low is None or estimate.high is None:
        return "–"
    return f"{100 * estimate.mean:.1f} [{100 * estimate.low:.1f}, {100 * estimate.high:.1f}]"


def _number(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def _failures(found: UnlearnComparison) -> list[list[str]]:
    return [[row["method"], str(row["seed"]), row["error"]] for row in found.failed]


def markdown(found: UnlearnComparison) -> str:
    """The table, the forms, and what failed."""
    parts = [
        f"**{found.title}**\n",
        render.markdown_table(*found.table()),
        render.markdown_table(*found.form_table()),
    ]
    if found.failed:
        parts.append(render.markdown_table(["failed", "seed", "error"], _failures(found)))
    return "\n".join(parts)


def latex(found: UnlearnComparison) -> str:
    """The same as LaTeX tables."""
    forms = render.latex_table(
        *found.form_table(), f"{found.title}: probability of forgotten answers, per form"
    )
    return render.latex_table(*found.table(), found.title) + "\n" + forms


def csv_text(found: UnlearnComparison) -> str:
    """One line per cell and point of its curve, in full precision; dose 0 is the untouched model."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    heads = ("dose", "gap", "worst_form", "forget", *STAYS)
    writer.writerow(["method", "seed", "matched", *heads])
    for row in found.rows:
        for point in row["curve"]:
            figures = ["" if point[head] is None else point[head] for head in heads]
            writer.writerow([render.tame(row["method"]), row["seed"], row["matched"], *figures])
    return out.getvalue()


def page(found: UnlearnComparison) -> str:
    """One page that needs no other file: tables, trade-off curves, cost."""
    parts = [f"<h1>{escape(found.title)}</h1>"]
    parts.append(
        "<p>Each method at the least dose that forgets as much as the reference in its worst form; methods that do not reach it "
        "are listed, not ranked. Losses in points of probability, with 95 % intervals.</p>"
    )
    parts.append(html.html_table(*found.table()))
    parts.append("<h2>Forms</h2>" + html.html_table(*found.form_table()))
    if found.results:
        parts.append("<h2>Forgetting against what stays</h2>")
        parts.append(html.figure_html(trade_off_plot(found.results), "forgetting against utility over doses"))
    if found.failed:
        parts.append("<h2>Failed</h2>" + html.html_table(["method", "seed", "error"], _failures(found)))
    return html.document(found.title, parts)


def trade_off_plot(results: Sequence[MethodResult]) -> Figure:
    """Per group that stays, its probability against that of the forgotten answers in their worst form, along the doses.

    A method is the better the longer its line stays up on its way to the left; the matched dose is marked.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4), layout="constrained")
    all_axes = figure.subplots(1, len(STAYS), sharey=True)
    for axes, group in zip(all_axes, STAYS, strict=True):
        for result in results:
            row = result.rows[0]
            points = [point for point in row["curve"] if point[group] is not None]
            if not points:
                continue
            places = [point["forget"] for point in points]
            (line,) = axes.plot(
                places, [point[group] for point in points], marker=".", label=html.plain_label(result.method)
            )
            chosen = [point for point in points if point["dose"] == row["dose"]]
            axes.plot(
                [point["forget"] for point in chosen], [point[group] for point in chosen], "o", ms=9,
                color=line.get_color(), fillstyle="none",
            )  # fmt: skip
        axes.set(xlabel="forgotten answers, worst form", title=group, xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
    all_axes[0].set(ylabel="probability of what stays")
    handles, labels = all_axes[0].get_legend_handles_labels()
    if handles:
        all_axes[-1].legend(handles, labels, frameon=False, fontsize="small")
    return figure
