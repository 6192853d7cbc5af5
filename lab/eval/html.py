"""Reports as one HTML page: tables, plots and sample cases, with nothing loaded from elsewhere."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING

from lab.eval.render import columns, grid, metric_names, remarks, title
from lab.eval.stats import Estimate

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from lab.eval.report import Report

_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:70rem;margin:2rem auto;padding:0 1rem;color:#1d2433;background:#fff}
h1{font-size:1.4rem}h2{font-size:1.1rem;margin-top:2rem}img{max-width:100%}
table{border-collapse:collapse;font-variant-numeric:tabular-nums;display:block;overflow-x:auto}
th,td{padding:.25rem .7rem;border-bottom:1px solid #dde2ea;text-align:right}
th:first-child,td:first-child,td.text{text-align:left}
p.note{background:#fff4d6;padding:.4rem .8rem;border-left:4px solid #e0a800}
"""
_SHOWN_CASES = 40
_SHOWN_SKIPS = 200


def page(reports: Sequence[Report]) -> str:
    """The page; every text from data or names is escaped.

    Args:
        reports: One, or several to compare.
    """
    return document(title(reports), [f"<h1>{escape(title(reports))}</h1>", *report_sections(reports)])


def document(name: str, parts: Sequence[str]) -> str:
    """A page from pieces of HTML, in the style of all reports.

    Args:
        name: Title of the window; escaped here.
        parts: HTML whose texts are escaped already.
    """
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(name)}</title>'
        f"<style>{_STYLE}</style></head><body>\n" + "\n".join(parts) + "\n</body></html>\n"
    )


def report_sections(reports: Sequence[Report]) -> list[str]:
    """Figures, plots, cases, skipped rows and settings of reports, as pieces for ``document``."""
    heads, rows = grid(reports)
    parts = [f'<p class="note">{escape(note)}</p>' for note in remarks(reports)]
    parts.append("<p>Figures in points with 95 % intervals; fluency and divergences as they are.</p>")
    parts.append(html_table(heads, rows))
    parts.append(figure_html(metric_plot(reports), "metrics before and after"))
    for report in reports:
        name = escape(report.editor or report.model or "model")
        if any(row.p_after is not None for row in report.cases):
            parts.append(
                f"<h2>Probability of the target, {name}</h2>{figure_html(probability_plot(report), 'probabilities')}"
            )
        for extra, table in report.extra.items():
            found = [[key, *_numbers(value)] for key, value in table.items()]
            parts.append(
                f"<h2>{escape(extra)}, {name}</h2>{html_table(['metric', 'mean', 'low', 'high', 'n'], found)}"
            )
        if report.cases:
            parts.append(f"<h2>Cases, {name}</h2>{_cases(report)}")
        if report.skipped:
            skipped = [[skip.file, str(skip.line), skip.reason] for skip in report.skipped[:_SHOWN_SKIPS]]
            parts.append(
                f"<h2>Skipped, {name} ({len(report.skipped)})</h2>{html_table(['file', 'line', 'reason'], skipped)}"
            )
        settings = [[key, str(value)] for key, value in report.settings.items()]
        parts.append(
            f"<h2>Settings, {name}</h2>{html_table(['setting', 'value'], [*settings, ['seconds', f'{report.seconds:.1f}']])}"
        )
    return parts


def html_table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table; every text is escaped."""
    head = "".join(f"<th>{escape(value)}</th>" for value in heads)
    body = "".join("<tr>" + "".join(f"<td>{escape(value)}</td>" for value in row) + "</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _numbers(estimate: Estimate) -> list[str]:
    values = [estimate.mean, estimate.low, estimate.high]
    return ["–" if value is None else f"{value:.4f}" for value in values] + [str(estimate.n)]


def _cases(report: Report) -> str:
    def number(value: float | None) -> str:
        return "–" if value is None else f"{value:.3f}"

    rows = [
        [row.id, row.prompt, row.target_old or "–", row.target_new, number(row.p_before), number(row.p_after)]
        for row in report.cases[:_SHOWN_CASES]
    ]
    return html_table(["case", "prompt", "before", "target", "p before", "p after"], rows)


def metric_plot(reports: Sequence[Report]) -> Figure:
    """Bars of all metrics that are fractions, with their intervals; one colour per column of the table."""
    from matplotlib.figure import Figure

    shown = columns(reports)
    names = [name for name in metric_names([table for _, table in shown]) if _is_fraction(name)]
    figure = Figure(
        figsize=(9, max(2.0, 0.32 * len(names) * max(1, len(shown)) / 2 + 1)), layout="constrained"
    )
    axes = figure.subplots()
    height = 0.8 / len(shown)
    for number, (head, table) in enumerate(shown):
        found = [(place, *_triple(table[name])) for place, name in enumerate(names) if name in table]
        found = [row for row in found if table[names[row[0]]].n]
        if not found:
            continue
        means = [mean for _, mean, _, _ in found]
        below = [max(0.0, mean - low) for _, mean, low, _ in found]
        above = [max(0.0, high - mean) for _, mean, _, high in found]
        places = [place + (number - (len(shown) - 1) / 2) * height for place, *_ in found]
        axes.barh(
            places, means, height, xerr=[below, above], label=plain_label(head), error_kw={"elinewidth": 0.8}
        )
    axes.set_yticks(range(len(names)), [plain_label(name) for name in names])
    axes.invert_yaxis()
    axes.set_xlim(0, 1)
    if names:
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=min(4, len(shown)), frameon=False)
    return figure


def probability_plot(report: Report) -> Figure:
    """Probability of the edit target before against after, one dot per case."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.2, 4), layout="constrained")
    axes = figure.subplots()
    pairs = [
        (row.p_before, row.p_after)
        for row in report.cases
        if row.p_before is not None and row.p_after is not None
    ]
    axes.scatter([before for before, _ in pairs], [after for _, after in pairs], s=12, alpha=0.6)
    axes.plot([0, 1], [0, 1], color="#999999", linewidth=0.8)
    axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), xlabel="before", ylabel="after")
    return figure


def _triple(estimate: Estimate) -> tuple[float, float, float]:
    return estimate.mean or 0.0, estimate.low or 0.0, estimate.high or 0.0


def _is_fraction(name: str) -> bool:
    return not name.endswith(("_magnitude", "fluency", "_kl"))


def plain_label(text: str) -> str:
    """Text that matplotlib does not take for a formula."""
    return text.replace("$", r"\$")


def figure_html(figure: Figure, about: str) -> str:
    """A figure inside the page."""
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=110)
    return png_html(out.getvalue(), about)


def png_html(data: bytes, about: str) -> str:
    """A PNG inside the page; ``about`` is its text for those who cannot see it."""
    return f'<p><img alt="{escape(about)}" src="data:image/png;base64,{base64.b64encode(data).decode()}"></p>'
