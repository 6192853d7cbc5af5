"""The demo as one HTML page that needs no other file."""

from __future__ import annotations

import tempfile
from html import escape
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from editors.demo import Demo, Line
    from lab.attention import DriftReport

_LEGEND = (
    "Green: what should be said after the edit. The edited prompt and its paraphrases should name the new object; a neighbor "
    "should keep the true one, also when it follows the edited statement (distracted neighbor)."
)


def demo_page(demo: Demo) -> str:
    """The page: completions before and after, figures, attention drift, and the proof that every edit came off."""
    from lab.eval.html import document, report_sections

    names = [report.editor for report in demo.reports]
    parts = [f"<h1>KnowLab demo: {len(demo.cases)} edits of {escape(demo.model)}</h1>"]
    parts.append("<p>" + "; ".join(_undo(name, held) for name, held in demo.undone.items()) + ".</p>")
    parts.append(f"<h2>What the model says</h2><p>{_LEGEND}</p>")
    parts += [
        _case_table(case_id, list(lines), names)
        for case_id, lines in groupby(demo.lines, key=lambda line: line.case)
    ]
    parts.append("<h2>Attention to the edited subject</h2>")
    parts += [f"<h3>{escape(name)}</h3>{_drift(demo.drift[name], name)}" for name in names]
    parts += report_sections(demo.reports)
    return document(f"KnowLab demo on {demo.model}", parts)


def _undo(name: str, held: bool) -> str:
    return (
        f"{escape(name)}: every edit came off bit for bit"
        if held
        else f"{escape(name)}: an edit did NOT come off"
    )


def _case_table(case_id: str, lines: list[Line], names: list[str]) -> str:
    heads = "".join(f"<th>{escape(head)}</th>" for head in ("kind", "prompt", "wanted", "before", *names))
    rows = []
    for line in lines:
        cells = [
            f"<td class=text>{escape(text)}</td>"
            for text in (line.kind, line.prompt, line.wanted, line.before)
        ]
        for name in names:
            color = "#1a7f37" if line.right(line.after[name]) else "#b42318"
            cells.append(f'<td class=text style="color:{color}">{escape(line.after[name])}</td>')
        rows.append("<tr>" + "".join(cells) + "</tr>")
    return f"<h3>{escape(case_id)}</h3><table><thead><tr>{heads}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


def _drift(report: DriftReport, name: str) -> str:
    from lab.eval.html import png_html

    with tempfile.TemporaryDirectory() as folder:
        image = png_html(report.plot(Path(folder) / "drift.png").read_bytes(), name)
    worst = max(float(value) for value in report.max_head)
    return f"<p>Largest head, mean over {len(report.prompts)} prompts: {worst:+.3f} at most.</p>{image}"
