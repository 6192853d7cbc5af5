"""What an evaluation of readers and rules found, as one table, JSON and one HTML page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from html import escape
from typing import TYPE_CHECKING, Any

from lab.eval import html, render
from rag.evaluation import DIAL, METRICS, Cell, Row, figures, gain, never_falls

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Found = Mapping[Cell, Sequence[Row]]
PLAIN = "direct"
HEADS = ("condition", "reader", "decoding", "n", *METRICS)


def lines(found: Found) -> list[list[str]]:
    """A line per cell: its names, how many questions, every metric in points with its interval."""
    made = []
    for cell, rows in found.items():
        table = figures(cell.condition, rows)
        shown = [render.cell(name, table[name]) for name in METRICS]
        made.append([cell.condition, cell.reader, cell.decoding, str(len(rows)), *shown])
    return made


def to_json(found: Found) -> list[dict[str, Any]]:
    """A cell per entry, with ``{mean, low, high, n}`` per metric."""
    return [
        {
            "condition": cell.condition,
            "reader": cell.reader,
            "decoding": cell.decoding,
            "n": len(rows),
            "metrics": {name: value.to_json() for name, value in figures(cell.condition, rows).items()},
        }
        for cell, rows in found.items()
    ]


def gains(found: Found) -> list[dict[str, Any]]:
    """What every other reader gains over ``direct``, by condition and rule: ``{mean, low, high, n}`` of paired accuracy."""
    return [
        {
            "condition": cell.condition,
            "reader": cell.reader,
            "decoding": cell.decoding,
            "gain": gain(found[plain], rows).to_json(),
        }
        for cell, rows in found.items()
        if cell.reader != PLAIN and (plain := replace(cell, reader=PLAIN)) in found
    ]


def curves(found: Found) -> dict[str, dict[str, Any]]:
    """The dial of CK-PLUG by reader: shares of answers from memory and from the document, and whether they turn one way only.

    ``ratio`` is the memorisation ratio, by which the paper judges the dial: answers from memory over those from either. Far down the
    dial the contrast alone can win with a token that neither says, so that the document's share may rise at first.
    """
    made: dict[str, dict[str, Any]] = {}
    for reader in dict.fromkeys(cell.reader for cell in found):
        points = []
        for value in DIAL:
            rows = found[Cell("contradict", reader, f"ck_plug:memory={value}")]
            table = figures("contradict", rows)
            point: dict[str, Any] = {name: table[name].to_json() for name in ("memory", "adherence")}
            points.append({"dial": value, **point, "ratio": _ratio(rows)})
        kept = [point["memory"]["mean"] for point in points]
        followed = [point["adherence"]["mean"] for point in points]
        made[reader] = {
            "points": points,
            "memory_never_falls": never_falls(kept),
            "ratio_never_falls": never_falls([point["ratio"] for point in points]),
            "adherence_never_rises": never_falls(followed[::-1]),
        }
    return made


def _ratio(rows: Sequence[Row]) -> float | None:
    memory, document = (sum(bool(row[name]) for row in rows) for name in ("keeps", "follows"))
    return memory / (memory + document) if memory + document else None


def page(
    title: str, found: Found, dial: Mapping[str, Any], extra: Mapping[str, Sequence[Sequence[str]]]
) -> str:
    """One HTML page.

    Args:
        title: Its heading.
        found: All cells.
        dial: What ``curves`` made, or nothing.
        extra: Further tables by heading; the first line of each is its head.
    """
    parts = [
        f"<h1>{escape(title)}</h1>",
        "<p>In points, with 95 % intervals. Accuracy: right answers. Adherence: answers that say what the documents state. "
        "Robustness: with irrelevant documents, closed-book answers that are kept. Memory: the same under any condition. "
        "Unknown: no answer.</p>",
        html.html_table(HEADS, lines(found)),
    ]
    for name, rows in extra.items():
        parts.append(f"<h2>{escape(name)}</h2>{html.html_table(rows[0], rows[1:])}")
    for reader, curve in dial.items():
        parts.append(f"<h2>The dial of CK-PLUG, reader {escape(reader)}</h2>")
        parts.append(
            html.figure_html(dial_plot(curve), "answers from memory and from the document over the dial")
        )
    return html.document(title, parts)


def dial_plot(curve: Mapping[str, Any]) -> Figure:
    """Shares of answers over the dial, with their intervals."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.2), layout="constrained")
    axes = figure.subplots()
    for name, label in (("memory", "memory's answer"), ("adherence", "the document's answer")):
        points = [point for point in curve["points"] if point[name]["mean"] is not None]
        places = [point["dial"] for point in points]
        axes.plot(places, [point[name]["mean"] for point in points], marker="o", label=label)
        low, high = ([point[name][end] for point in points] for end in ("low", "high"))
        axes.fill_between(places, low, high, alpha=0.15)
    axes.set(xlabel="dial: 0 follows the document, 1 memory", ylabel="share of answers", ylim=(-0.02, 1.02))
    axes.legend()
    return figure
