"""``knowlab bench sadr``: what the penalty regains, for which weight, and where attention goes with and without it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from editors import cli_eval
from editors import cli_options as edit
from editors.cli_bench import app, bench, settings_by_editor, sources
from lab.cli import options as opt
from lab.cli.cells import CELLS, read_cell, write_cell
from lab.cli.output import check_out, console, progress, table, write_json
from lab.errors import ConfigError

if TYPE_CHECKING:
    from editors.bench import Workshop
    from editors.sadr_curve import Variant

__all__ = ["app", "bench_sadr", "numbers"]

COMMAND = "bench sadr"
_DRIFT_CASES = 16

_HELP = """Measure SADR: each editor plain, plain without stopping early, and with the penalty at several weights.

Prints the share of the relation and distracted-neighborhood loss that the penalty regains, with 95 % intervals from resampling cases
in pairs, and writes sadr.json, sadr.html, curve.png and for each run a map of the attention drift of its first 16 edits into --out.
Finished runs lie in --out/cells; the same command goes on where it was interrupted.

Example:

    knowlab bench sadr --limit 200 --gammas 0.01,1,3,30 --out results/sadr
"""


@bench.command("sadr", help=_HELP)
def bench_sadr(
    editors: Annotated[
        str,
        typer.Option("--editors", "-e", help="Methods with commas between them.", rich_help_panel=edit.PANEL),
    ] = "rome,memit",
    gammas: Annotated[
        str,
        typer.Option(
            "--gammas",
            help="Weights of the penalty with commas between them.",
            rich_help_panel=edit.PANEL,
        ),
    ] = "0.01,0.1,1,3,10,30",
    all_steps: Annotated[
        bool,
        typer.Option(
            "--all-steps", help="Runs with the penalty never stop early either.", rich_help_panel=edit.PANEL
        ),
    ] = False,
    suite: Annotated[
        str, typer.Option("--suite", help="Name of the suite.", rich_help_panel=cli_eval.SUITE_PANEL)
    ] = "atlas",
    data: Annotated[
        str | None,
        typer.Option(
            "--data",
            help="The suite's file, or a hub id.",
            rich_help_panel=cli_eval.SUITE_PANEL,
            show_default=False,
        ),
    ] = None,
    settings: edit.Settings = None,
    corpus: edit.Corpus = "auto",
    model: opt.Model = "atlas",
    limit: opt.Limit = None,
    known_only: opt.KnownOnly = False,
    batch_size: Annotated[
        int,
        typer.Option("--batch-size", min=1, help="Rows in one forward pass.", rich_help_panel=opt.RUN_PANEL),
    ] = 64,
    seed: opt.Seed = 0,
    device: opt.Device = "cpu",
    dtype: opt.Dtype = "float32",
    quantize: opt.Quantize = None,
    out: opt.Reports = Path("results/sadr"),
    force: opt.Force = False,
    json: opt.Json = None,
) -> None:
    """Measure what SADR regains."""
    if not (out / CELLS).is_dir():
        check_out(out, force)
    from editors.bench import BenchOptions, Workshop
    from editors.sadr_curve import curve_plot, entries, page, plan, table_lines
    from lab.files import replacing
    from lab.records import write_text_atomically

    names = opt.comma_list(editors)
    options = BenchOptions(
        data=sources(None if data is None else [data], [suite]),
        limit=limit,
        settings=settings_by_editor(settings, []),
        corpus=corpus,
        fluency=False,
        known_only=known_only,
        device=device,
        dtype=dtype,
        quantize=quantize,
        batch_size=batch_size,
        drift=_DRIFT_CASES,
    )
    variants = plan(names, numbers(gammas), suite, model, seed, options, all_steps=all_steps)
    shop = Workshop(options)
    with progress() as advance:
        rows, kept = _run(shop, variants, out / CELLS, advance)
    maps = _maps(variants, rows, out)
    found = entries(variants, rows)
    heads, lines = table_lines(found)
    screen = console(json)
    screen.print(table(f"SADR on {suite}, {model}", heads, lines))
    content = {"suite": suite, "model": model, "limit": limit, "kept": kept, "out": out, "rows": found}
    with replacing(out / "curve.png") as temporary:
        curve_plot(found).savefig(temporary, dpi=120, format="png")
    title = f"SADR on {suite}, {model}"
    write_text_atomically(
        out / "sadr.html", page(found, title, {name: file.read_bytes() for name, file in maps.items()})
    )
    write_json(out / "sadr.json", COMMAND, seed, content)
    screen.print(f"{len(variants)} runs, {kept} of them finished before; reports -> {out}")
    write_json(json, COMMAND, seed, content)


def numbers(words: str) -> list[float]:
    """Numbers with commas between them.

    Raises:
        ConfigError: A word is no number.
    """
    try:
        return [float(word) for word in words.split(",") if word.strip()]
    except ValueError as error:
        raise ConfigError(f"--gammas takes numbers with commas between them, not {words!r}") from error


def _run(shop: Workshop, variants: tuple[Variant, ...], folder: Path, advance: Any) -> tuple[list[Any], int]:
    """Rows of all runs, in order, and how many were finished before; each is written before the next begins."""
    from editors.bench import cell_file

    rows, kept = [], 0
    for variant in variants:
        file = folder / cell_file(variant.cell, variant.options)
        row = read_cell(file)
        if row is None:
            # One workshop for all: the model, its cases and what it answered as it was are the same.
            shop.options = variant.options
            row = write_cell(file, shop.run(variant.cell))
        else:
            kept += 1
        rows.append(row)
        advance("runs", len(rows), len(variants))
    return rows, kept


def _maps(variants: tuple[Variant, ...], rows: list[Any], out: Path) -> dict[str, Path]:
    """Maps of the attention drift that each run kept, by name of the run."""
    import torch

    from lab.attention import plot_drift

    found = {}
    for variant, row in zip(variants, rows, strict=True):
        drift = row.get("attention_drift")
        if drift is None:
            continue
        end = variant.kind if variant.gamma is None else f"{variant.kind}-{variant.gamma:g}"
        file = out / f"drift-{variant.editor}-{end}.png"
        heads, largest = (
            torch.tensor(drift[name], dtype=torch.float64) for name in ("drift", "max_head_drift")
        )
        found[variant.name] = plot_drift(file, heads, largest, drift["prompts"])
    return found
