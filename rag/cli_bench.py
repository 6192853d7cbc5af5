"""``knowlab bench preference``: prompts, decoding rules and trained adapters on the same contexts."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lab.cli import options as opt
from lab.cli.cells import CELLS, read_cell, write_cell
from lab.cli.output import check_out, console, document, progress, table, write_json
from lab.errors import ConfigError, KnowLabError
from rag import cli_options as training

if TYPE_CHECKING:
    from lab.handle import ModelHandle

app = typer.Typer()
# Other floors have a group of this name; the root joins them.
bench = typer.Typer(help="Comparisons over many runs.", no_args_is_help=True)
app.add_typer(bench, name="bench")

COMMAND = "bench preference"
ALL = (
    "base,faithful,con,cad,adacad,coiecd,ck_plug,parammute,sft,sft_con,sft_first,sft_first_con,context_dpo,knowpo,knowpo_con,"
    "knowpo_no_rewrite,knowpo_no_ratio,knowpo_con_no_rewrite,knowpo_con_no_ratio,dta,hierarchy,trust"
)

_HELP = """Compare ways of choosing between documents and memory: adherence, robustness, their errors, and seconds.

Prompts (base, faithful, con), decoding rules (cad, adacad, coiecd, ck_plug, parammute) and adapters that are trained first (sft,
context_dpo, knowpo, dta, hierarchy, trust) answer the very same contexts; every two are compared by a paired test. Two
controls have as many tokens as knowpo: sft_first is its first step carried on, sft is taught what it prefers as well.
knowpo_no_rewrite and knowpo_no_ratio lack a step of it; names with con in them train the answers that con gives after its notes.

Writes bench.json, .md and .html into --out. Each finished run is kept in --out/cells; the same command goes on where it was
interrupted.

Examples:

    knowlab bench preference --methods base,cad,knowpo --limit 100 --out results/preference

    knowlab bench preference --methods base,sft,knowpo --difficulty hard --seed 0 --seed 1 --seed 2 --out results/hard

    knowlab bench preference --methods base,knowpo --adapter knowpo=results/knowpo --data squad.json --out results/squad
"""


@bench.command("preference", help=_HELP)
def bench_preference(
    methods: Annotated[
        str,
        typer.Option("--methods", help="Names with commas between them.", rich_help_panel=training.PANEL),
    ] = ALL,
    data: Annotated[
        str,
        typer.Option("--data", help="atlas, or a file of questions.", rich_help_panel=training.PANEL),
    ] = "atlas",
    train_data: training.TrainData = "atlas",
    difficulty: Annotated[
        str,
        typer.Option(
            "--difficulty",
            help="plain; hard: every context with up to three hard distractors, in wordings that nothing was trained on.",
            rich_help_panel=training.PANEL,
        ),
    ] = "plain",
    split: Annotated[
        str,
        typer.Option(
            "--split",
            help="test; held: a part of the facts for tuning that nothing is trained on, to choose settings by.",
            rich_help_panel=training.PANEL,
        ),
    ] = "test",
    suites: Annotated[
        str,
        typer.Option(
            "--suites",
            help="What is measured besides, with commas between: trust, hierarchy, edits (those that the model carries).",
            rich_help_panel=training.PANEL,
            show_default=False,
        ),
    ] = "",
    edits: Annotated[
        int,
        typer.Option(
            "--edits",
            min=0,
            help="Edits of the built-in world's test facts that are made first, over which adapters are trained.",
            rich_help_panel=training.PANEL,
        ),
    ] = 0,
    editor: Annotated[
        str,
        typer.Option("--editor", help="The method that makes them.", rich_help_panel=training.PANEL),
    ] = "memit",
    adapter: Annotated[
        list[str] | None,
        typer.Option(
            "--adapter",
            help="METHOD=FOLDER: an adapter that is trained already; repeatable.",
            rich_help_panel=training.PANEL,
            show_default=False,
        ),
    ] = None,
    train_limit: training.TrainLimit = 400,
    max_steps: Annotated[
        int | None,
        typer.Option(
            "--max-steps", min=1, help="Ends each of SFT and DPO early.", rich_help_panel=training.PANEL
        ),
    ] = None,
    settings: training.Settings = None,
    samples: training.Samples = 10,
    draws: training.Draws = 1,
    model: opt.Model = "atlas",
    patch: opt.Patches = None,
    limit: opt.Limit = None,
    seed: opt.Seeds = None,
    device: opt.Device = "cpu",
    dtype: opt.Dtype = "float32",
    out: opt.Reports = Path("results/preference"),
    force: opt.Force = False,
    json: opt.Json = None,
) -> None:
    """Compare ways of choosing between documents and memory."""
    if not (out / CELLS).is_dir():
        check_out(out, force)
    from lab.cli.session import open_model
    from rag.preference.bench import PreferenceBench, PreferenceWorkshop, cell_name, check_ways
    from rag.preference.bench_report import PreferenceComparison

    names = check_ways(opt.comma_list(methods))
    adapters = dict(_adapter(word) for word in adapter or ())
    check_ways([*names, *adapters])
    seeds = list(dict.fromkeys(seed or [0]))
    options = PreferenceBench(
        data=data,
        train_data=train_data,
        split=split,
        difficulty=difficulty,
        suites=tuple(opt.comma_list(suites)) if suites else (),
        limit=limit or 100,
        train_limit=train_limit,
        samples=samples,
        draws=draws,
        adapters=adapters,
    )
    chosen = {**opt.overrides(settings), "max_steps": max_steps}
    handle = open_model(model, patch, device=device, dtype=dtype)
    if edits:
        _edited(handle, editor, edits, seeds[0], out / "edits")
    plan = [(name, one) for one in seeds for name in names]
    files = {cell: out / CELLS / cell_name(handle, cell[0], options, chosen, cell[1]) for cell in plan}
    cells: dict[tuple[str, int], dict[str, Any]] = {
        cell: found for cell, file in files.items() if (found := read_cell(file)) is not None
    }
    kept = len(cells)
    with progress() as advance:
        workshop = PreferenceWorkshop(handle, options, chosen, progress=advance)
        for name, one in plan:
            advance("runs", len(cells), len(plan))
            if (name, one) not in cells:
                try:
                    row = workshop.run(name, one)
                except KnowLabError as error:  # one way that does not fit must not cost the others
                    row = {"method": name, "seed": one, "error": str(error)}
                cells[name, one] = write_cell(files[name, one], row)
        advance("runs", len(cells), len(plan))
    found = PreferenceComparison.of([cells[cell] for cell in plan], f"{data} asked of {model}")
    screen = console(json)
    screen.print(table("Documents or memory", *found.table()))
    if found.further()[1]:
        screen.print(table("Trust, hierarchy and edits", *found.further()))
    if found.pairs:
        screen.print(table("Paired tests", *found.tests()))
    content = found.to_json() | {"model": model, "data": data, "seeds": seeds, "kept": kept, "out": out}
    if found.metrics:
        found.save(out, document(COMMAND, seeds[0], content))
        screen.print(f"{len(plan)} runs, {kept} of them finished before; reports -> {out}", markup=False)
    write_json(json, COMMAND, seeds[0], content)
    for row in found.failed:
        typer.echo(f"error: {row['method']}, seed {row['seed']}: {row['error']}", err=True)
    if found.failed:
        raise typer.Exit(1)


def _edited(handle: ModelHandle, method: str, count: int, seed: int, folder: Path) -> None:
    """Makes the edits, or takes those that were made before, and applies them for good."""
    from lab.patch_io import load_saved
    from rag.preference.edited import world_edits

    place = folder / f"{method}-{count}-{seed}-{handle.state[:12]}"
    if not (place / "patch.json").is_file():
        world_edits(handle, method, count, seed=seed).save(place)
    load_saved(place).apply(handle)


def _adapter(word: str) -> tuple[str, str]:
    name, found, folder = word.partition("=")
    if not found or not folder:
        raise ConfigError(f"--adapter {word!r} is not of the form METHOD=FOLDER")
    if not Path(folder).is_dir():
        raise ConfigError(f"--adapter {word!r}: there is no folder {folder}")
    return name, folder
