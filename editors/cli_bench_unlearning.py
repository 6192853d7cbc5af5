"""``knowlab bench unlearning``: unlearning methods compared at equal forgetting."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from editors.cli_bench import settings_by_editor
from lab.cli import options as opt
from lab.cli.cells import CELLS, read_cell, write_cell
from lab.cli.output import check_out, console, document, progress, table, write_json

COMMAND = "bench unlearning"
PANEL = "Unlearning"

HELP = """Compare unlearning methods at equal forgetting: every method and seed forgets, is scaled to the least dose at which it
knows no more of the forgotten facts than a model that was never trained on them, in the form in which it knows the most, and is
then asked what else it lost.

The reference is `--oracle`, the same model trained without the facts (for the built-in model, the shipped one where there is
one), or facts that no model was trained on (`--untrained`; for the built-in world, its never-trained people). Methods that do not
come within `--match-forget` of it are listed, not ranked.

Writes unlearning.json, .html (with curves of forgetting against what stays), .md, .csv and .tex into --out. Each finished run is
kept in --out/cells; the same command goes on where it was interrupted.

Examples:

    knowlab bench unlearning --methods npo,graddiff,simnpo --forget atlas:people05 --seeds 3 --out results/people05

    knowlab bench unlearning --methods npo,dpo --model beds/tofu --oracle beds/tofu-oracle --forget forget05.jsonl --retain
    retain.jsonl --out results/tofu
"""


def bench_unlearning(
    methods: Annotated[
        str,
        typer.Option(
            "--methods",
            help="Methods with commas between them (`knowlab list unlearners`).",
            rich_help_panel=PANEL,
        ),
    ] = "ga,graddiff,npo,simnpo",
    forget: Annotated[
        str,
        typer.Option(
            "--forget",
            help="atlas:SPLIT, facts (JSONL), or a file of questions and answers (TOFU and its kind).",
            rich_help_panel=PANEL,
        ),
    ] = "atlas:people05",
    retain: Annotated[
        Path | None,
        typer.Option(
            "--retain",
            help="What to keep, in the same forms.",
            rich_help_panel=PANEL,
            show_default="the rest of the world for atlas:SPLIT",
        ),
    ] = None,
    utility: Annotated[
        Path | None,
        typer.Option(
            "--utility",
            help="General knowledge, in the same forms.",
            rich_help_panel=PANEL,
            show_default="real-world facts for atlas:SPLIT",
        ),
    ] = None,
    oracle: Annotated[
        str | None,
        typer.Option(
            "--oracle",
            help="The model trained without what is forgotten: a name or a folder.",
            rich_help_panel=PANEL,
            show_default="the shipped one, where there is one",
        ),
    ] = None,
    untrained: Annotated[
        Path | None,
        typer.Option(
            "--untrained",
            help="Facts (JSONL) that the model never saw, in place of an oracle.",
            rich_help_panel=PANEL,
            show_default="never-trained people for atlas:SPLIT",
        ),
    ] = None,
    match_forget: Annotated[
        float,
        typer.Option(
            "--match-forget",
            min=0.001,
            max=1.0,
            help="How near the reference counts as matched, in probability.",
            rich_help_panel=PANEL,
        ),
    ] = 0.05,
    most_dose: Annotated[
        float, typer.Option("--most-dose", min=1.0, help="Largest dose tried.", rich_help_panel=PANEL)
    ] = 4.0,
    seeds: Annotated[
        int,
        typer.Option(
            "--seeds", min=1, help="Runs per method, with seeds 0, 1, ...", rich_help_panel=opt.RUN_PANEL
        ),
    ] = 1,
    limit: Annotated[
        int,
        typer.Option("--limit", min=1, help="Facts asked per group, at most.", rich_help_panel=opt.RUN_PANEL),
    ] = 100,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            help="One setting of all methods, `name=value`, or of one, `METHOD:name=value`; repeatable.",
            rich_help_panel=PANEL,
            show_default=False,
        ),
    ] = None,
    model: opt.Model = "atlas",
    device: opt.Device = "cpu",
    dtype: opt.Dtype = "float32",
    out: opt.Reports = Path("results/unlearning"),
    force: opt.Force = False,
    json: opt.Json = None,
) -> None:
    """Compare unlearning methods at equal forgetting."""
    if not (out / CELLS).is_dir():
        check_out(out, force)
    from editors.unlearning.bench import (
        UnlearnBenchOptions,
        UnlearnWorkshop,
        plan_unlearning,
        unlearn_cell_file,
    )
    from editors.unlearning.bench_report import UnlearnComparison

    names = opt.comma_list(methods)
    cells = plan_unlearning(names, range(seeds))
    options = UnlearnBenchOptions(
        forget=forget,
        model=model,
        oracle=oracle,
        untrained=None if untrained is None else str(untrained),
        retain=None if retain is None else str(retain),
        utility=None if utility is None else str(utility),
        tolerance=match_forget,
        limit=limit,
        most_dose=most_dose,
        settings=settings_by_editor(settings, names),
        device=device,
        dtype=dtype,
    )
    files = {cell: out / CELLS / unlearn_cell_file(cell, options) for cell in cells}
    rows = {cell: found for cell, file in files.items() if (found := read_cell(file)) is not None}
    kept = len(rows)
    workshop = UnlearnWorkshop(options)
    with progress() as advance:
        for cell in cells:
            if cell in rows:
                continue
            # What is wrong with the facts or the reference is wrong for every method: said once, as the command's error.
            workshop.task(cell.seed)
            rows[cell] = write_cell(files[cell], workshop.attempt(cell, advance))
            advance("runs", len(rows), len(cells))
    found = UnlearnComparison.of([rows[cell] for cell in cells], f"Unlearning {forget} from {model}")
    screen = console(json)
    heads, lines = found.table()
    screen.print(table(found.title, heads, lines))
    heads, lines = found.form_table()
    screen.print(table("Probability of forgotten answers, per form", heads, lines))
    content = found.to_json() | {
        "model": model,
        "forget": forget,
        "seeds": list(range(seeds)),
        "match_forget": match_forget,
        "kept": kept,
        "out": out,
    }
    if found.rows:
        found.save(out, document(COMMAND, 0, content))
        screen.print(f"{len(cells)} runs, {kept} of them finished before; reports -> {out}")
    write_json(json, COMMAND, 0, content)
    for row in found.failed:
        typer.echo(f"error: {row['method']}, seed {row['seed']}: {row['error']}", err=True)
    if found.failed:
        raise typer.Exit(1)
