"""A comparison of editors in every form in which it is read: terminal, JSON, Markdown, LaTeX, CSV, and one HTML page."""

from __future__ import annotations

import csv
import io
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from html import escape
from math import nan
from pathlib import Path
from typing import TYPE_CHECKING, Any

from editors.bench import Row, pool_cases
from lab.errors import ConfigError
from lab.eval import html, render
from lab.eval.report import Report, save_comparison
from lab.eval.retention import Retention, held_by_age
from lab.eval.stats import Estimate
from lab.eval.suites import SuiteOptions, get_suite

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_SHOWN_SKIPS = 40
HEADLINES = ("score", "multi_hop", "multi_hop_accuracy", "success", "efficacy")
"""What a line of the overview shows: the first of these that a suite has."""


@dataclass(frozen=True)
class Entry:
    """One editor on one suite and model, over all seeds.

    Attributes:
        editor, suite, model: As in the cells.
        rows: Its cells.
        report: Its figures over all seeds.
    """

    editor: str
    suite: str
    model: str
    rows: tuple[Row, ...]
    report: Report

    @property
    def seconds_per_edit(self) -> float | None:
        """Mean over all edits of all cells."""
        edits = sum(row["edits"] for row in self.rows)
        return (
            sum((row["seconds_per_edit"] or 0.0) * row["edits"] for row in self.rows) / edits
            if edits
            else None
        )

    @property
    def peak_mb(self) -> float | None:
        """The largest peak of any cell."""
        return max((row["peak_mb"] for row in self.rows if row["peak_mb"] is not None), default=None)

    @property
    def headline(self) -> tuple[str, Estimate] | None:
        """Name and figure of the first headline that there is."""
        found = self.report.metrics
        return next(((name, found[name]) for name in HEADLINES if name in found), None)

    @property
    def columns(self) -> list[Report]:
        """What stands in a table: in a sequence right after each edit, then after all edits."""
        right_after = self.report.extra.get("right_after_edit")
        if not right_after:
            return [self.report]
        early = replace(self.report, editor=f"{self.editor} right after", metrics=right_after, notes=())
        return [early, replace(self.report, editor=f"{self.editor} after all")]

    @property
    def retention(self) -> tuple[Retention, ...]:
        """Of every cell that has one."""
        return tuple(Retention.from_json(row["retention"]) for row in self.rows if row["retention"])


@dataclass(frozen=True)
class Comparison:
    """All entries of a comparison, and the cells that failed.

    Attributes:
        entries: By suite, model and editor.
        rows: Finished cells, in their order.
        failed: Cells with their errors.
    """

    entries: tuple[Entry, ...]
    rows: tuple[Row, ...]
    failed: tuple[Row, ...] = ()

    @classmethod
    def of(cls, rows: Sequence[Row]) -> Comparison:
        """Puts cells together; those of one editor, suite and model become an entry."""
        groups: dict[tuple[str, str, str], list[Row]] = {}
        for row in rows:
            if "error" not in row:
                groups.setdefault((row["suite"], row["model"], row["editor"]), []).append(row)
        entries = [
            Entry(editor, suite, model, tuple(found), _report(found))
            for (suite, model, editor), found in groups.items()
        ]
        finished, failed = ([row for row in rows if ("error" in row) is bad] for bad in (False, True))
        return cls(tuple(entries), tuple(finished), tuple(failed))

    def groups(self) -> list[list[Entry]]:
        """Entries that may stand in one table: of one suite and model."""
        found: dict[tuple[str, str], list[Entry]] = {}
        for entry in self.entries:
            found.setdefault((entry.suite, entry.model), []).append(entry)
        return list(found.values())

    def overview(self) -> tuple[list[str], list[list[str]]]:
        """Heads and lines: one per entry, with its headline and its cost."""
        lines = []
        for entry in self.entries:
            named = entry.headline
            figure = "–" if named is None else f"{named[0]} {render.cell(*named)}"
            seconds, peak = entry.seconds_per_edit, entry.peak_mb
            lines.append(
                [
                    entry.editor,
                    entry.suite,
                    entry.model,
                    ",".join(str(row["seed"]) for row in entry.rows),
                    str(entry.report.n),
                    figure,
                    "–" if seconds is None else f"{seconds:.3g}",
                    "–" if peak is None else f"{peak:.0f}",
                ]
            )
        return ["editor", "suite", "model", "seeds", "n", "headline", "s/edit", "peak MB"], lines

    def to_json(self) -> Row:
        """``rows``: one per cell; ``pooled``: one per entry, over all seeds; ``failed``: cells with their errors."""
        rows = [{name: value for name, value in row.items() if name != "cases"} for row in self.rows]
        pooled = []
        for entry in self.entries:
            tables = {"metrics": entry.report.metrics, "before": entry.report.before, **entry.report.extra}
            pooled.append(
                {
                    "editor": entry.editor,
                    "suite": entry.suite,
                    "model": entry.model,
                    "seeds": [row["seed"] for row in entry.rows],
                    "n": entry.report.n,
                    "seconds_per_edit": entry.seconds_per_edit,
                    "peak_mb": entry.peak_mb,
                }
                | {key: {name: e.to_json() for name, e in table.items()} for key, table in tables.items()}
            )
        return {"rows": rows, "pooled": pooled, "failed": list(self.failed)}

    def save(self, folder: str | Path, content: Mapping[str, Any]) -> list[Path]:
        """Writes ``bench.json .html .md .csv .tex``.

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
        return save_comparison(folder, "bench", content, forms)


def columns(group: Sequence[Entry]) -> list[Report]:
    """The columns of the table of one suite and model."""
    return [report for entry in group for report in entry.columns]


def _report(rows: Sequence[Row]) -> Report:
    """Cells of several seeds as one report."""
    first = rows[0]
    settings = first["settings"]
    # "zsre: easyedit targets, ..." names the convention that the measures follow.
    convention = "rome" if str(settings["comparable"]).startswith("zsre: rome") else "easyedit"
    suite = get_suite(first["suite"], SuiteOptions(convention=convention))
    tables, n = pool_cases(suite, [case for row in rows for case in row["cases"]])
    known = {case["id"] for row in rows for case in row["cases"] if case["known"]}
    notes = [note for row in rows for note in row["notes"]]
    notes += [
        f"seed {row['seed']}: more than 5 % skipped ({len(row['skipped'])} rows); the figures may be biased"
        for row in rows
        if row["too_many_skipped"]
    ]
    return Report(
        suite=first["suite"],
        model=first["model"],
        editor=first["editor"],
        seed=first["seed"],
        n=n,
        known=len(known),
        metrics=tables["metrics"],
        before=tables["before"],
        drawn=n,
        seconds=sum(row["seconds"] for row in rows),
        settings={**settings, "seeds": [row["seed"] for row in rows]},
        extra={"right_after_edit": tables["right_after_edit"]} if tables["right_after_edit"] else {},
        notes=tuple(dict.fromkeys(notes)),
    )


# ---- text forms --------------------------------------------------------------------------------------------------------


def markdown(found: Comparison) -> str:
    """The overview, then a table for each suite and model."""
    parts = [render.markdown_table(*found.overview())]
    parts += [render.markdown(columns(group)) for group in found.groups()]
    if found.failed:
        lines = [
            f"- {row['editor']} on {row['suite']}, {row['model']}: {row['error']}" for row in found.failed
        ]
        parts.append("**Failed**\n\n" + "\n".join(lines) + "\n")
    return "\n".join(parts)


def latex(found: Comparison) -> str:
    """The same as LaTeX tables."""
    parts = [render.latex_table(*found.overview(), "Editors compared")]
    return "\n".join([*parts, *(render.latex(columns(group)) for group in found.groups())])


def csv_text(found: Comparison) -> str:
    """One line per cell and metric, in full precision."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    heads = ("editor", "suite", "model", "seed", "n", "seconds_per_edit", "peak_mb", "metric")
    writer.writerow([*heads, "before", "mean", "low", "high", "values"])
    for entry in found.entries:
        for row in entry.rows:
            same = [render.tame(str(row[name])) for name in ("editor", "suite", "model")]
            same += [
                "" if row[name] is None else row[name]
                for name in ("seed", "n", "seconds_per_edit", "peak_mb")
            ]
            for name, value in row["metrics"].items():
                before = row["before"].get(name, {}).get("mean")
                figures = [before, value["mean"], value["low"], value["high"], value["n"]]
                writer.writerow([*same, name, *("" if figure is None else figure for figure in figures)])
    return out.getvalue()


# ---- the page ----------------------------------------------------------------------------------------------------------


def page(found: Comparison) -> str:
    """One page that needs no other file: tables, metrics with intervals, retention, cost, attention drift."""
    parts = ["<h1>Editors compared</h1>"]
    parts.append("<p>Figures in points with 95 % intervals; fluency and divergences as they are.</p>")
    parts.append(html.html_table(*found.overview()))
    if found.entries:
        parts.append(
            "<h2>Time and memory</h2>" + html.figure_html(cost_plot(found.entries), "time and memory")
        )
    for group in found.groups():
        reports = columns(group)
        parts.append(f"<h2>{escape(render.title(reports))}</h2>")
        parts += [f'<p class="note">{escape(note)}</p>' for note in render.remarks(reports)]
        parts.append(html.html_table(*render.grid(reports)))
        parts.append(html.figure_html(html.metric_plot(reports), "metrics with intervals"))
        curves = {entry.editor: entry.retention for entry in group if entry.retention}
        if curves:
            parts.append("<h3>Retention</h3>" + html.figure_html(retention_plot(curves), "retention curves"))
        parts += [
            _drift(entry.editor, row) for entry in group for row in entry.rows if row["attention_drift"]
        ]
        skipped = [
            [entry.editor, str(row["seed"]), skip["file"], str(skip["line"]), skip["reason"]]
            for entry in group
            for row in entry.rows
            for skip in row["skipped"][:_SHOWN_SKIPS]
        ]
        if skipped:
            parts.append(
                "<h3>Skipped</h3>" + html.html_table(["editor", "seed", "file", "line", "reason"], skipped)
            )
    if found.failed:
        lines = [[row["editor"], row["suite"], row["model"], row["error"]] for row in found.failed]
        parts.append("<h2>Failed</h2>" + html.html_table(["editor", "suite", "model", "error"], lines))
    return html.document("Editors compared", parts)


def retention_plot(curves: Mapping[str, Sequence[Retention]]) -> Figure:
    """Share of edits that still hold, by how many edits were made since; one line per editor, with its interval."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    if not curves:
        raise ConfigError("no retention was measured; only the sequential protocol does")
    figure = Figure(figsize=(7, 3.6), layout="constrained")
    axes = figure.subplots()
    for name, sequences in curves.items():
        table = held_by_age(sequences)
        ages = list(table)
        means = [nan if (mean := table[age].mean) is None else mean for age in ages]
        (line,) = axes.plot(ages, means, marker=".", label=html.plain_label(name))
        low, high = ([getattr(table[age], end) for age in ages] for end in ("low", "high"))
        axes.fill_between(ages, low, high, alpha=0.15, color=line.get_color(), linewidth=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set(xlabel="edits made since", ylabel="edits that still hold", ylim=(-0.02, 1.02))
    axes.legend(frameon=False)
    return figure


def cost_plot(entries: Sequence[Entry]) -> Figure:
    """Seconds per edit and peak memory, one bar per entry."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, max(2.0, 0.3 * len(entries) + 1)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    names = [
        html.plain_label(f"{entry.editor} ({entry.suite}, {Path(entry.model).name})") for entry in entries
    ]
    places = range(len(entries))
    for axes, values, label in (
        (left, [entry.seconds_per_edit or 0.0 for entry in entries], "seconds per edit"),
        (right, [entry.peak_mb or 0.0 for entry in entries], "peak memory, MB"),
    ):
        axes.barh(places, values, height=0.7)
        axes.set(xlabel=label)
    left.set_yticks(places, names)
    left.invert_yaxis()
    return figure


def _drift(editor: str, row: Row) -> str:
    import torch

    from lab.attention import plot_drift

    found = row["attention_drift"]
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "drift.png"
        drift, most = (torch.tensor(found[name], dtype=torch.float64) for name in ("drift", "max_head_drift"))
        data = plot_drift(place, drift, most, found["prompts"]).read_bytes()
    image = html.png_html(data, f"attention drift, {editor}")
    return f"<h3>Attention drift, {escape(editor)}, seed {row['seed']}</h3>{image}"
