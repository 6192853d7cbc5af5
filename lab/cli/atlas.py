"""``knowlab atlas``: train the built-in models, make beds from public files, export the data, check what models know."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from lab.cli import options as opt
from lab.cli.output import check_out, console, table, write_json
from lab.errors import ConfigError, KnowLabError

app = typer.Typer()
group = typer.Typer(
    help="The built-in world: train its models, export its data, check what models know.",
    no_args_is_help=True,
)
app.add_typer(group, name="atlas")

TRAIN_PANEL = "Training"
BED_PANEL = "Bed"

_TRAIN_HELP = """Train a built-in model, or go on with an interrupted run; or make a bed: a small model that really knows the answers of
a public benchmark file (`--from` with `--data`).

A checkpoint is written every few minutes, outside the source tree. Without `--out` a built-in model stays a checkpoint until
`knowlab atlas export NAME` turns it into a model folder.

Examples:

    knowlab atlas train atlas --work runs/atlas

    knowlab atlas train --from counterfact --data counterfact.json --limit 500 --out beds/counterfact

    knowlab atlas train --from tofu --data full.jsonl --data world_facts.jsonl --without forget05 --out beds/tofu-oracle
"""


def _say(line: str) -> None:
    typer.echo(line, err=True)


@group.command(help=_TRAIN_HELP)
def train(
    name: Annotated[
        str | None,
        typer.Argument(
            help="Model to train: atlas, atlas-gpt2, atlas-oracle, atlas-oracle-b.", show_default="atlas"
        ),
    ] = None,
    kind: Annotated[
        str | None,
        typer.Option(
            "--from",
            help="Make a bed from a file: counterfact, zsre, knowedit, sadr, mquake; tofu or rwku.",
            rich_help_panel=BED_PANEL,
            show_default=False,
        ),
    ] = None,
    data: Annotated[
        list[Path] | None,
        typer.Option(
            "--data", help="The bed's file; repeatable.", rich_help_panel=BED_PANEL, show_default=False
        ),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(
            "--limit", min=1, help="Cases of the bed.", rich_help_panel=BED_PANEL, show_default="all"
        ),
    ] = None,
    without: Annotated[
        str | None,
        typer.Option(
            "--without",
            help="For tofu and rwku, the oracle: leave out a file, one beside the data (forget05), or a person.",
            rich_help_panel=BED_PANEL,
            show_default=False,
        ),
    ] = None,
    work: Annotated[
        Path | None,
        typer.Option(
            "--work",
            help="Folder for checkpoints.",
            rich_help_panel=TRAIN_PANEL,
            show_default="a cache folder; OUT.work for a bed",
        ),
    ] = None,
    minutes: Annotated[
        float | None,
        typer.Option(
            "--minutes",
            min=0.0,
            help="Budget of training time.",
            rich_help_panel=TRAIN_PANEL,
            show_default="the recipe's",
        ),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(
            "--steps", min=1, help="Budget of steps instead.", rich_help_panel=TRAIN_PANEL, show_default=False
        ),
    ] = None,
    processes: Annotated[
        int,
        typer.Option(
            "--processes", min=0, help="Processes on a CPU; 0: one per core.", rich_help_panel=TRAIN_PANEL
        ),
    ] = 0,
    compile: Annotated[
        bool,
        typer.Option(
            "--compile/--no-compile", help="Compile the training pass.", rich_help_panel=TRAIN_PANEL
        ),
    ] = True,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume/--restart", help="Go on from the last checkpoint.", rich_help_panel=TRAIN_PANEL
        ),
    ] = True,
    device: opt.Device = "cpu",
    seed: opt.Seed = 0,
    out: opt.Out = None,
    force: opt.Force = False,
    json: opt.Json = None,
) -> None:
    """Train a built-in model, or make a bed from a public file."""
    from lab.cli.session import quiet_libraries

    if (kind is None) != (not data):
        raise ConfigError("a bed needs both --from and --data")
    quiet_libraries()
    common: dict[str, Any] = {
        "minutes": minutes,
        "steps": steps,
        "processes": processes,
        "device": device,
        "compile": compile,
    }
    if kind is not None and data:
        if name is not None:
            raise ConfigError("give a model's name, or --from with --data, not both")
        if out is None:
            raise ConfigError("a bed needs --out")
        check_out(out, force)
        from lab.atlas.bed import make_bed
        from lab.atlas.bed_questions import QUESTION_KINDS, make_question_bed

        common |= {"limit": limit, "seed": seed, "work_dir": work, "overwrite": force, "progress": _say}
        if kind in QUESTION_KINDS:
            made = make_question_bed(kind, data, out, without=without, **common)
        elif without is not None:
            raise ConfigError(f"--without belongs to --from {' or '.join(QUESTION_KINDS)}")
        else:
            made = make_bed(kind, data, out, **common)
        console(json).print(f"bed of {made.cases} cases, {len(made.known)} known -> {made.folder}")
        content = {
            "kind": kind,
            "path": made.folder,
            "cases": made.cases,
            "known": len(made.known),
            "report": dict(made.report),
        }
        write_json(json, "atlas train", seed, content)
        return
    if limit is not None or without is not None:
        raise ConfigError("--limit and --without belong to --from")
    if seed:
        raise ConfigError("the seed of a built-in model is part of its recipe; --seed belongs to --from")
    if out is not None:
        check_out(out, force)
    from lab.atlas.recipe import get_recipe
    from lab.atlas.runs import export_atlas, train_atlas

    chosen = name or "atlas"
    recipe = get_recipe(chosen)
    place = train_atlas(chosen, work, resume=resume, report=_say, **common)
    folder = export_atlas(chosen, place, out) if out is not None else None
    console(json).print(f"{chosen} -> {folder or place}")
    write_json(json, "atlas train", recipe.seed, {"model": chosen, "work": place, "path": folder})


@group.command()
def export(
    name: Annotated[
        str | None,
        typer.Argument(
            help="Model whose checkpoint becomes a model folder; the data set without it.",
            show_default="the data set",
        ),
    ] = None,
    work: Annotated[
        Path | None,
        typer.Option(
            "--work", help="Folder of the run.", rich_help_panel=TRAIN_PANEL, show_default="a cache folder"
        ),
    ] = None,
    out: opt.Out = None,
    force: opt.Force = False,
    json: opt.Json = None,
) -> None:
    """Write the world as a data set, or a trained checkpoint as a model folder.

    Examples: `knowlab atlas export --out datasets/atlas --force`; `knowlab atlas export atlas --work runs/atlas --out models/atlas`
    """
    if out is None:
        raise ConfigError("give --out")
    check_out(out, force)
    if name is None:
        from lab.atlas.export import export_dataset
        from lab.atlas.world import load_world

        world = load_world()
        files = export_dataset(out, world)
        console(json).print(f"{len(world.facts)} facts, {len(world.chains)} chains -> {out}")
        content = {"path": out, "files": files, "facts": len(world.facts), "fingerprint": world.fingerprint}
        write_json(json, "atlas export", world.seed, content)
        return
    from lab.atlas.recipe import get_recipe
    from lab.atlas.runs import export_atlas

    recipe = get_recipe(name)
    folder = export_atlas(name, work, out)
    console(json).print(f"{name} -> {folder}")
    write_json(json, "atlas export", recipe.seed, {"model": name, "path": folder})


@group.command()
def check(
    names: Annotated[
        list[str] | None, typer.Argument(help="Models to check.", show_default="all that are shipped")
    ] = None,
    folder: Annotated[
        Path | None,
        typer.Option(
            "--folder",
            help="Weights to check in place of the one named model.",
            rich_help_panel=opt.MODEL_PANEL,
            show_default=False,
        ),
    ] = None,
    sample: Annotated[
        int, typer.Option("--sample", min=1, help="Questions of each kind.", rich_help_panel=opt.RUN_PANEL)
    ] = 200,
    seed: opt.Seed = 0,
    json: opt.Json = None,
) -> None:
    """Measure what models know in every form, against the thresholds they must meet.

    Exits with an error when one is missed.

    Example: `knowlab atlas check atlas --json check.json`
    """
    from lab.atlas.check import check as measure
    from lab.cli.session import quiet_libraries

    quiet_libraries()
    folders = None
    if folder is not None:
        if names is None or len(names) != 1:
            raise ConfigError("--folder takes the place of exactly one named model")
        folders = {names[0]: folder}
    found = measure(names or None, sample=sample, seed=seed, folders=folders, progress=_say)
    screen = console(json)
    for name, figures in found["models"].items():
        rows = [
            (key, value, "missed" if key in figures["failed"] else "")
            for key, value in figures.items()
            if value is None or (isinstance(value, float) and not isinstance(value, bool))
        ]
        screen.print(table(name, ("figure", "value", ""), rows))
    write_json(json, "atlas check", seed, found)
    if not found["passed"]:
        missed = {name: figures["failed"] for name, figures in found["models"].items() if figures["failed"]}
        raise KnowLabError("; ".join(f"{name} misses {', '.join(failed)}" for name, failed in missed.items()))
