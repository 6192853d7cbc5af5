"""A comparison of ways of answering with documents as terminal table, JSON, Markdown and one HTML page."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lab.eval import html, render
from lab.eval.stats import NOTHING, Estimate
from lab.records import write_text_atomically
from rag.preference.bench import WAYS, Row, pooled
from rag.preference.suites import error_reduction, paired

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHOWN = (
    "adherence",
    "robustness",
    "contextual_ignorance",
    "contextual_overinclusion",
    "memorisation_ratio",
    "summed_error",
    "latency",
)
_HEADS = ("adherence", "robustness", "ignorance", "overinclusion", "memorisation", "summed error", "seconds")


@dataclass(frozen=True)
class PreferenceComparison:
    """All ways of a comparison.

    Attributes:
        metrics: Way to its figures over all seeds.
        pairs: Two ways to the paired tests of ``adherence`` and ``robustness``, and to ``gone``: the share of the first one's
            summed error that the second one lacks.
        cells: Finished cells.
        failed: Cells with their errors.
        title: What was asked of which model.
    """

    metrics: Mapping[str, Mapping[str, Estimate]]
    pairs: Mapping[tuple[str, str], Mapping[str, Any]]
    cells: tuple[Row, ...]
    failed: tuple[Row, ...]
    title: str

    @classmethod
    def of(cls, cells: Sequence[Row], title: str) -> PreferenceComparison:
        """Puts cells together by way, in the order of ``WAYS``."""
        done = tuple(cell for cell in cells if "error" not in cell)
        by_way = {way: found for way in WAYS if (found := [cell for cell in done if cell["method"] == way])}
        rows = {
            way: [row | {"seed": cell["seed"]} for cell in found for row in cell["rows"]]
            for way, found in by_way.items()
        }
        pairs = {
            (a, b): paired(rows[a], rows[b]) | {"gone": error_reduction(rows[a], rows[b]).to_json()}
            for a, b in combinations(rows, 2)
        }
        metrics = {way: pooled(found) for way, found in by_way.items()}
        return cls(metrics, pairs, done, tuple(cell for cell in cells if "error" in cell), title)

    def table(self, *, interval: bool = True) -> tuple[list[str], list[list[str]]]:
        """Heads and one line for each way: figures in points, seconds as they are."""
        lines = []
        for way, found in self.metrics.items():
            shown = [render.cell(name, found[name], interval=interval) for name in SHOWN[:-1]]
            lines.append(
                [way, *shown, _seconds(found["latency"]), str(found["adherence"].n + found["robustness"].n)]
            )
        return ["method", *_HEADS, "n"], lines

    def tests(self) -> tuple[list[str], list[list[str]]]:
        """Heads and one line for each two ways: differences in points (second less first), p values, share of error gone."""
        lines = []
        for (a, b), found in self.pairs.items():
            parts = []
            for name in ("adherence", "robustness"):
                one = found[name]
                none = one["p"] is None
                parts += ["–", "–"] if none else [f"{100 * one['difference']:+.1f}", f"{one['p']:.3g}"]
            gone = found["gone"]
            none = gone["mean"] is None
            shown = "–" if none else f"{gone['mean']:.0%} [{gone['low']:.0%}, {gone['high']:.0%}]"
            lines.append([f"{b} − {a}", *parts, shown])
        return ["methods", "adherence", "p", "robustness", "p", "summed error gone"], lines

    def further(self) -> tuple[list[str], list[list[str]]]:
        """Heads and one line for each way: what the further suites measured; no lines where none was asked."""
        names = list(
            dict.fromkeys(
                name
                for found in self.metrics.values()
                for name in found
                if name == "flip_rate" or name.startswith(("cell ", "edit_"))
            )
        )
        lines = [
            [way, *(render.cell(name, found.get(name, NOTHING), interval=True) for name in names)]
            for way, found in self.metrics.items()
        ]
        return ["method", *names], lines if names else []

    def to_json(self) -> dict[str, Any]:
        """As plain values, rows included."""
        return {
            "title": self.title,
            "methods": {
                way: {name: value.to_json() for name, value in found.items()}
                for way, found in self.metrics.items()
            },
            "pairs": [{"first": a, "second": b, **found} for (a, b), found in self.pairs.items()],
            "cells": [dict(cell) for cell in self.cells],
            "failed": [dict(cell) for cell in self.failed],
        }

    def save(self, folder: Path, document: Mapping[str, Any]) -> None:
        """Writes ``bench.json``, ``bench.md`` and ``bench.html``."""
        text = json.dumps(document, ensure_ascii=False, indent=1, allow_nan=False)
        write_text_atomically(folder / "bench.json", text + "\n")
        write_text_atomically(folder / "bench.md", markdown(self))
        write_text_atomically(folder / "bench.html", page(self))


_NOTE = (
    "Figures in points with 95 % intervals; summed error is that of adherence and robustness, 0 to 200. Seconds are of one "
    "question at a time. Paired tests are McNemar's, exact and two-sided, on the same contexts, not corrected for their number. "
    "Summed error gone: the share of the other method's summed error that is gone, with the interval of a paired bootstrap."
)


def markdown(found: PreferenceComparison) -> str:
    """The comparison as Markdown."""
    parts = [f"**{found.title}**", _NOTE, render.markdown_table(*found.table())]
    if found.further()[1]:
        parts.append(render.markdown_table(*found.further()))
    if found.pairs:
        parts.append(render.markdown_table(*found.tests()))
    parts += [f"- {cell['method']}, seed {cell['seed']}: {cell['error']}" for cell in found.failed]
    return "\n\n".join(part.rstrip() for part in parts) + "\n"


def page(found: PreferenceComparison) -> str:
    """The comparison as one HTML page that loads nothing."""
    parts = [f"<h1>{escape(found.title)}</h1>", f"<p>{escape(_NOTE)}</p>", html.html_table(*found.table())]
    parts += [
        f'<p class="note">{escape(cell["method"])}, seed {cell["seed"]}: {escape(cell["error"])}</p>'
        for cell in found.failed
    ]
    if found.further()[1]:
        parts += ["<h2>Trust, hierarchy and edits</h2>", html.html_table(*found.further())]
    if found.metrics:
        parts.append(html.figure_html(plane(found), "adherence and robustness of every method"))
    if found.pairs:
        parts += ["<h2>Paired tests</h2>", html.html_table(*found.tests())]
    trained = [
        [
            cell["method"],
            str(cell["seed"]),
            ", ".join(f"{name}: {count}" for name, count in cell["training"].get("rows", {}).items()),
            f"{cell['training'].get('seconds', 0.0):.0f}",
        ]
        for cell in found.cells
        if cell["training"]
    ]
    if trained:
        parts += ["<h2>Training</h2>", html.html_table(["method", "seed", "rows", "seconds"], trained)]
    return html.document(found.title, parts)


def plane(found: PreferenceComparison) -> Figure:
    """Adherence against robustness, one point with its intervals for each way; the best is at the top right."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.5, 5), layout="constrained")
    axes = figure.subplots()
    for way, metrics in found.metrics.items():
        ends = [metrics["robustness"], metrics["adherence"]]
        if any(one.mean is None for one in ends):
            continue
        (x, y), spans = (one.mean or 0.0 for one in ends), [_span(one) for one in ends]
        axes.errorbar(
            x, y, xerr=[[spans[0][0]], [spans[0][1]]], yerr=[[spans[1][0]], [spans[1][1]]],
            fmt="o", elinewidth=0.6, label=html.plain_label(way),
        )  # fmt: skip
    axes.set(xlim=(-0.03, 1.03), ylim=(-0.03, 1.03), xlabel="robustness", ylabel="adherence")
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    return figure


def _span(value: Estimate) -> tuple[float, float]:
    mean = value.mean or 0.0
    return max(0.0, mean - (value.low or 0.0)), max(0.0, (value.high or 0.0) - mean)


def _seconds(value: Estimate) -> str:
    return "–" if value.mean is None else f"{value.mean:.3f}"
