"""Audits as one HTML page with a radar of families and the attacks' curves; nothing is loaded from elsewhere."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING

from lab.audit.base import FAMILIES
from lab.audit.report import LIMITS, AuditReport, attack_names, detail_rows, lifts_table
from lab.eval.html import document, figure_html, html_table, plain_label

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def page(
    reports: Sequence[AuditReport], *, above: tuple[str, Sequence[str], Sequence[Sequence[str]]] | None = None
) -> str:
    """The page of one audit, or of several side by side.

    Args:
        reports: The audits.
        above: Title, heads and rows of a table to stand in place of the table of lifts.

    Raises:
        ConfigError: No report.
    """
    title = "Audit: " + " | ".join(report.name for report in reports)
    heads, rows = lifts_table(reports) if above is None else above[1:]
    parts = [f"<h1>{escape(title)}</h1>"]
    for report in reports:
        worst = "no attack applied" if report.worst is None else f"worst attack: {report.worst.name}"
        parts.append(
            f'<p class="note"><b>{escape(report.name)}</b>: worst case {report.worst_case:.3f}, up to '
            f"{report.worst_case_high:.3f} ({escape(worst)})</p>"
        )
    if above is not None:
        parts.append(f"<h2>{escape(above[0])}</h2>")
    parts.append("<p>Lift over the larger control, with 95 % intervals; 0 is no leak, 1 is everything.</p>")
    parts += [html_table(heads, rows), figure_html(radar(reports), "lift per family")]
    for name in attack_names(reports):
        if (figure := curves(reports, name)) is not None:
            parts.append(f"<h2>{escape(name)}</h2>{figure_html(figure, f'curves of {name}')}")
    for report in reports:
        parts.append(f"<h2>What was tried: {escape(report.name)}</h2>{html_table(*detail_rows(report))}")
        settings = [[key, str(value)] for key, value in report.settings.items()]
        parts.append(html_table(["setting", "value"], settings))
    limits = "".join(f"<li>{escape(limit)}</li>" for limit in LIMITS)
    parts.append(f"<h2>What this audit cannot show</h2><ul>{limits}</ul>")
    return document(title, parts)


def radar(reports: Sequence[AuditReport]) -> Figure:
    """The lift of each family's worst attack, one line per report; families that no report has are left out."""
    from matplotlib.figure import Figure

    shown = [family for family in FAMILIES if any(family in report.families for report in reports)]
    figure = Figure(figsize=(5.6, 4.6), layout="constrained")
    axes = figure.add_subplot(projection="polar")
    angles = [2 * math.pi * number / max(1, len(shown)) for number in range(len(shown))]
    for report in reports:
        found = report.families
        lengths = [min(1.0, max(0.0, found[name].mean)) if name in found else 0.0 for name in shown]
        if lengths:
            axes.plot(
                [*angles, angles[0]], [*lengths, lengths[0]], marker="o", label=plain_label(report.name)
            )
            axes.fill(angles, lengths, alpha=0.12)
    axes.set_xticks(angles, [plain_label(name) for name in shown])
    axes.set_ylim(0, 1)
    if shown:
        axes.legend(loc="lower left", bbox_to_anchor=(-0.25, -0.12), frameon=False)
    return figure


def curves(reports: Sequence[AuditReport], attack: str) -> Figure | None:
    """The curves of one attack in every report; ``None`` where it has none."""
    from matplotlib.figure import Figure

    lines = [
        (f"{report.name}: {name}" if len(reports) > 1 else name, points)
        for report in reports
        for result in report.results
        if result.name == attack
        for name, points in result.curves.items()
        if points
    ]
    if not lines:
        return None
    figure = Figure(figsize=(6, 3), layout="constrained")
    axes = figure.subplots()
    for label, points in lines:
        axes.plot([x for x, _ in points], [y for _, y in points], marker="o", label=plain_label(label))
    axes.set(ylim=(-0.02, 1.02), ylabel="leak")
    axes.legend(fontsize="small", frameon=False)
    return figure
