"""``knowlab bench notes``: a reader trained to take notes beside one trained to answer at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lab.cli import options as opt
from lab.cli.output import check_out, console, document, progress, table, write_json
from rag import cli_options as training

if TYPE_CHECKING:
    from matplotlib.figure import Figure

app = typer.Typer()
# Other floors have a group of this name; the root joins them.
bench = typer.Typer(help="Comparisons over many runs.", no_args_is_help=True)
app.add_typer(bench, name="bench")

COMMAND = "bench notes"

_HELP = """Train a reader to take notes (Chain-of-Note) and one to answer at once, in equally many tokens, and ask both.

Both adapters see the same contexts of the built-in world's facts for tuning, invented strangers among them; half of the rows of the
one take notes, the other answers always. Then test facts are asked with documents that agree, contradict, are irrelevant, are noise
altogether, and about names that nobody has. Each reader's gain is paired, question by question: trained against trained, and the
untrained model's notes against the untrained model.

Writes bench.json and bench.html into --out; adapters and finished cells are kept there, and the same command goes on where it was
interrupted.

Examples:

    knowlab bench notes --limit 50 --train-limit 100 --out results/notes

    knowlab bench notes --limit 300 --seed 0 --seed 1 --seed 2 --conditions irrelevant,noisy,unanswerable --out results/notes3
"""


@bench.command("notes", help=_HELP)
def bench_notes(
    conditions: Annotated[
        str | None,
        typer.Option(
            "--conditions",
            help="Which documents: agree, contradict, irrelevant, none, several, noisy, unanswerable.",
            rich_help_panel=training.PANEL,
            show_default="all",
        ),
    ] = None,
    decoding: Annotated[
        str, typer.Option("--decoding", help="The rule of all readers.", rich_help_panel=training.PANEL)
    ] = "greedy",
    train_limit: training.TrainLimit = 400,
    train_data: training.TrainData = "atlas",
    samples: training.Samples = 4,
    settings: training.Settings = None,
    model: opt.Model = "atlas",
    patch: opt.Patches = None,
    limit: Annotated[
        int,
        typer.Option(
            "--limit", min=1, help="Facts asked, each under every condition.", rich_help_panel=opt.RUN_PANEL
        ),
    ] = 300,
    seed: opt.Seeds = None,
    device: opt.Device = "cpu",
    dtype: opt.Dtype = "float32",
    out: opt.Reports = Path("results/notes"),
    force: opt.Force = False,
    json: opt.Json = None,
) -> None:
    """Compare trained notes with trained answers."""
    if not (out / "cells").is_dir():
        check_out(out, force)
    import json as jsonlib

    from lab.cli.session import open_model
    from lab.eval.render import cell as shown
    from lab.records import write_text_atomically
    from rag.decoding import get_rule
    from rag.evaluation import check_conditions
    from rag.preference import notes_bench

    asked = tuple(opt.comma_list(conditions)) if conditions else notes_bench.NotesBench.conditions
    check_conditions(asked)
    get_rule(decoding)
    options = notes_bench.NotesBench(limit, train_limit, train_data, asked, decoding, samples)
    chosen = opt.overrides(settings)
    seeds = list(dict.fromkeys(seed or [0]))
    handle = open_model(model, patch, device=device, dtype=dtype)
    found, trained = [], {}
    with progress() as advance:
        for one in seeds:
            rows, trained[str(one)] = notes_bench.run_seed(handle, options, chosen, one, out, advance)
            found.append(rows)
    pooled = notes_bench.pooled(found)
    summary = notes_bench.summary(pooled)
    heads = ["trained to", "condition", "reader", "n", "accuracy", "adherence", "robustness", "unknown"]
    lines = [
        [arm, cell.condition, cell.reader, str(values["accuracy"].n)]
        + [shown(name, values[name]) for name in heads[4:]]
        for arm, cell, values in summary
    ]
    gains = notes_bench.gains(pooled)
    gain_heads = ["trained to", "condition", "reader", "direct", "with notes", "gain"]
    gain_lines = [
        [row["arm"], row["condition"], row["reader"]]
        + [shown("accuracy", row[name], interval=name == "gain") for name in ("direct", "notes", "gain")]
        for row in gains
    ]
    spent = [
        [one, arm, str(about["rows"]), f"{about['tokens']:,}", f"{about['epochs']:.2f}"]
        for one, arms in trained.items()
        for arm, about in arms.items()
    ]
    spent_heads = ["seed", "trained to", "rows", "tokens", "epochs"]
    screen = console(json)
    screen.print(table("Notes and answers", heads, lines))
    screen.print(table("Gain over the direct reader", gain_heads, gain_lines))
    screen.print(table("Training", spent_heads, spent))
    content = {
        "model": model,
        "seeds": seeds,
        "cells": [
            {"arm": arm, "condition": cell.condition, "reader": cell.reader, "decoding": cell.decoding}
            | {
                "n": values["accuracy"].n,
                "metrics": {name: value.to_json() for name, value in values.items()},
            }
            for arm, cell, values in summary
        ],
        "gains": [
            {name: value.to_json() if hasattr(value, "to_json") else value for name, value in row.items()}
            for row in gains
        ],
        "training": trained,
        "out": out,
    }
    text = jsonlib.dumps(document(COMMAND, seeds[0], content), ensure_ascii=False, indent=2, allow_nan=False)
    write_text_atomically(out / "bench.json", text + "\n")
    tables = (
        ("Gain over the direct reader", gain_heads, gain_lines),
        ("All figures", heads, lines),
        ("Training", spent_heads, spent),
    )
    write_text_atomically(out / "bench.html", _page(model, gains, tables))
    screen.print(f"reports -> {out}", markup=False)
    write_json(json, COMMAND, seeds[0], content)


def _page(
    model: str,
    gains: Sequence[Mapping[str, Any]],
    tables: Sequence[tuple[str, Sequence[str], Sequence[Sequence[str]]]],
) -> str:
    from html import escape

    from lab.eval import html

    parts = [
        f"<h1>Trained notes beside trained answers: {escape(model)}</h1>",
        "<p>In points, with 95 % intervals. Accuracy: right answers; where nobody knows, answers that say so. A gain is paired, question "
        "by question. Published for a 7B model (arXiv:2311.09210): +7.9 exact match with noise, +6.9 to +10.5 rejection of what "
        "nobody knows.</p>",
        html.figure_html(_plot(gains), "gain of notes over the direct reader by condition"),
    ]
    parts += [
        part
        for name, heads, lines in tables
        for part in (f"<h2>{escape(name)}</h2>", html.html_table(heads, lines))
    ]
    return html.document(f"Trained notes: {model}", parts)


def _plot(gains: Sequence[Mapping[str, Any]]) -> Figure:
    """Gains with their intervals, a row for each condition, a colour for each reader."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    conditions = list(dict.fromkeys(row["condition"] for row in gains))
    kinds = list(dict.fromkeys((row["arm"], row["reader"]) for row in gains))
    for at, kind in enumerate(kinds):
        rows = [row for row in gains if (row["arm"], row["reader"]) == kind and row["gain"].mean is not None]
        places = [conditions.index(row["condition"]) + (at - (len(kinds) - 1) / 2) * 0.18 for row in rows]
        means = [100 * row["gain"].mean for row in rows]
        spans = [
            [100 * (row["gain"].mean - row["gain"].low) for row in rows],
            [100 * (row["gain"].high - row["gain"].mean) for row in rows],
        ]
        axes.errorbar(means, places, xerr=spans, fmt="o", label=f"{kind[0]}, {kind[1]}")
    axes.axvline(0, color="grey", linewidth=0.8)
    axes.set_yticks(range(len(conditions)), conditions)
    axes.invert_yaxis()
    axes.set(xlabel="gain in points")
    axes.legend()
    return figure
