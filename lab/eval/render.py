"""Reports side by side as a terminal table, Markdown, CSV and LaTeX. One row per metric, one column per report."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from typing import TYPE_CHECKING

from lab.errors import ConfigError
from lab.eval.stats import Estimate
from lab.tables import WideTable

if TYPE_CHECKING:
    from lab.eval.report import MetricTable, Report

# Metrics that are not fractions are printed as they are.
_PLAIN = ("fluency", "_kl")


def columns(reports: Sequence[Report]) -> list[tuple[str, MetricTable]]:
    """Heads and tables: the model before (once, if all share it), then every report.

    Raises:
        ConfigError: Nothing to show, or figures of different conventions.
    """
    if not reports:
        raise ConfigError("no report to show")
    conventions = {str(report.settings.get("comparable", report.suite)) for report in reports}
    if len(conventions) > 1:
        raise ConfigError(f"these figures must not stand in one table: {' | '.join(sorted(conventions))}")
    found: list[tuple[str, MetricTable]] = []
    for report in reports:
        if report.before and all(report.before != table for _, table in found):
            found.append(("before" if not found else f"before {report.editor}", report.before))
        found.append((report.editor or report.model or "model", report.metrics))
    return found


def metric_names(tables: Sequence[MetricTable]) -> list[str]:
    """All metrics, ``score`` first, then in the suites' order."""
    names = list(dict.fromkeys(name for table in tables for name in table))
    return sorted(names, key=lambda name: name != "score")


def cell(name: str, estimate: Estimate | None, *, interval: bool = True) -> str:
    """A figure in points (or plain), with its interval; a dash where there is none."""
    if estimate is None or estimate.mean is None or estimate.low is None or estimate.high is None:
        return "–"
    factor, digits = (1.0, 3 if name.endswith("_kl") else 1) if name.endswith(_PLAIN) else (100.0, 1)
    mean, low, high = (
        f"{factor * value:.{digits}f}" for value in (estimate.mean, estimate.low, estimate.high)
    )
    return f"{mean} [{low}, {high}]" if interval else mean


def grid(reports: Sequence[Report], *, interval: bool = True) -> tuple[list[str], list[list[str]]]:
    """Heads and rows of the table that all forms share."""
    shown = columns(reports)
    rows = []
    for name in metric_names([table for _, table in shown]):
        counts = [table[name].n for _, table in shown if name in table]
        figures = [cell(name, table.get(name), interval=interval) for _, table in shown]
        rows.append([name, *figures, str(max(counts, default=0))])
    return ["metric", *[head for head, _ in shown], "n"], rows


def title(reports: Sequence[Report]) -> str:
    """Suite, model and size in one line."""
    first = reports[0]
    return (
        f"{first.suite} on {first.model or 'model'}, {first.n} cases ({first.known} known), seed {first.seed}"
    )


def remarks(reports: Sequence[Report]) -> list[str]:
    """Notes of all reports, and a warning where too much was skipped."""
    found = []
    for report in reports:
        name = report.editor or report.model
        found += [f"{name}: {note}" for note in report.notes]
        if report.too_many_skipped:
            found.append(
                f"{name}: more than 5 % skipped ({len(report.skipped)} rows); the figures may be biased"
            )
    return list(dict.fromkeys(found))


def rich_table(reports: Sequence[Report]) -> WideTable:
    """For the terminal."""
    heads, rows = grid(reports)
    right = [number > 0 for number in range(len(heads))]
    return WideTable(title(reports), heads, rows, right=right, caption="\n".join(remarks(reports)))


def markdown_table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the first column is set to the left, the others to the right."""

    def line(values: Sequence[str]) -> str:
        return "| " + " | ".join(value.replace("|", "\\|").replace("\n", " ") for value in values) + " |"

    return "\n".join([line(heads), line(["---", *["---:"] * (len(heads) - 1)]), *map(line, rows)]) + "\n"


def markdown(reports: Sequence[Report]) -> str:
    """A Markdown table with title and remarks."""
    notes = [f"- {note}" for note in remarks(reports)]
    return f"**{title(reports)}**\n\n{markdown_table(*grid(reports))}\n{chr(10).join(notes)}".rstrip() + "\n"


def csv_text(reports: Sequence[Report]) -> str:
    """One line per metric and column, in full precision; an absent figure is an empty field."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["suite", "model", "column", "metric", "mean", "low", "high", "n"])
    first = reports[0] if reports else None
    for head, table in columns(reports):
        for name, value in table.items():
            writer.writerow(
                [
                    first.suite if first else "",
                    first.model if first else "",
                    tame(head),
                    name,
                    *_parts(value),
                ]
            )
    return out.getvalue()


def _parts(estimate: Estimate) -> list[float | str]:
    return ["" if value is None else value for value in (estimate.mean, estimate.low, estimate.high)] + [
        estimate.n
    ]


def tame(text: str) -> str:
    """Text that a spreadsheet does not take for a formula."""
    # Spreadsheets run a field that starts like a formula.
    return f"'{text}" if text[:1] in ("=", "+", "-", "@") else text


_LATEX = {
    "\\": r"\textbackslash{}",
    "&": r"\&",
    "%": r"\%",
    "$": r"\$",
    "#": r"\#",
    "_": r"\_",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "–": "--",
}


def latex_escape(text: str) -> str:
    """Text with LaTeX's special characters made harmless."""
    return "".join(_LATEX.get(char, char) for char in text)


def latex_table(heads: Sequence[str], rows: Sequence[Sequence[str]], caption: str) -> str:
    """A ``table`` with booktabs rules; needs ``\\usepackage{booktabs}``."""

    def line(values: Sequence[str]) -> str:
        return " & ".join(latex_escape(value) for value in values) + r" \\"

    body = [r"\begin{table}", r"\centering", rf"\begin{{tabular}}{{l{'r' * (len(heads) - 1)}}}", r"\toprule"]
    body += [line(heads), r"\midrule", *map(line, rows), r"\bottomrule", r"\end{tabular}"]
    body += [rf"\caption{{{latex_escape(caption)}}}", r"\end{table}"]
    return "\n".join(body) + "\n"


def latex(reports: Sequence[Report]) -> str:
    """The figures of reports as a ``latex_table``."""
    return latex_table(*grid(reports), title(reports))
