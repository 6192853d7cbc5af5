"""``knowlab tune``: a preset for a model that has none."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from editors import cli_options as edit
from lab.cli import options as opt
from lab.cli.output import console, progress, table, write_json
from lab.errors import ConfigError

app = typer.Typer()

TUNE_PANEL = "Tuning"

_HELP = """Find the layers, the clamp and other search settings of an editor for a model that has no preset.

Causal tracing of a few known facts proposes layers; single edits of these facts decide, by the suite's score, and by
the margin of the right answers where scores are equal. The facts are the
built-in world's tuning facts, or those of `--data`; `--exclude` keeps everything that an evaluation file asks out of them. OUT gets
`preset.toml`, which `--preset` reads, `tune.json` and a picture, `tune.png`. Finished candidates are kept in OUT: the same command
goes on where it stopped, and with other `--grid` or `--places` it computes only what is new.

Examples:

    knowlab tune --model path/to/model --editor rome --limit 8 --out tuned/rome

    knowlab tune --model path/to/model --editor memit --suite counterfact --data dev.json --exclude eval.json --out tuned/memit

    knowlab tune --editor memit --grid "clamp=[0.75, 4.0]" --grid "mom2_weight=[]" --out tuned/quick --json tune.json

    knowlab edit --editor rome --preset tuned/rome/preset.toml --prompt "The capital of {} is" --subject France --target Rome
"""


@app.command("tune", help=_HELP)
def tune_editor(
    editor: Annotated[
        str,
        typer.Option(
            "--editor",
            "-e",
            help="Method that searches values, with penalties after a plus: rome, memit+sadr.",
            rich_help_panel=TUNE_PANEL,
        ),
    ] = "rome",
    suite: Annotated[
        str,
        typer.Option(
            "--suite", help="Whose score decides: atlas, counterfact or sadr.", rich_help_panel=TUNE_PANEL
        ),
    ] = "atlas",
    data: Annotated[
        str | None,
        typer.Option(
            "--data",
            help="The suite's file, or a hub id.",
            rich_help_panel=TUNE_PANEL,
            show_default="the suite's hub id",
        ),
    ] = None,
    exclude: Annotated[
        list[Path] | None,
        typer.Option(
            "--exclude",
            help="Evaluation file whose subjects and prompts stay out; repeatable.",
            rich_help_panel=TUNE_PANEL,
            show_default=False,
        ),
    ] = None,
    limit: Annotated[
        int, typer.Option("--limit", min=1, help="Known facts to tune on.", rich_help_panel=TUNE_PANEL)
    ] = 8,
    places: Annotated[
        int,
        typer.Option(
            "--places",
            min=1,
            help="Layers, or windows of layers, that tracing proposes beside the preset's.",
            rich_help_panel=TUNE_PANEL,
        ),
    ] = 3,
    grid: Annotated[
        list[str] | None,
        typer.Option(
            "--grid",
            help="Values to try, `name=[a, b]`; an empty list leaves a setting alone; repeatable.",
            rich_help_panel=TUNE_PANEL,
            show_default="of clamp, weight_decay and, where there is one, mom2_weight",
        ),
    ] = None,
    preset: edit.Preset = None,
    settings: edit.Settings = None,
    corpus: edit.Corpus = "auto",
    model: opt.Model = "atlas",
    seed: opt.Seed = 0,
    device: opt.Device = "cpu",
    dtype: opt.Dtype = "float32",
    quantize: opt.Quantize = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            help="Folder for the preset; new, empty, or of the run to go on with.",
            rich_help_panel=opt.OUTPUT_PANEL,
            show_default=False,
        ),
    ] = None,
    json: opt.Json = None,
) -> None:
    """Find layers and search settings of an editor for a model."""
    if out is None:
        raise ConfigError("give --out, the folder for the preset")
    grids = edit.overrides(grid)
    for name, values in grids.items():
        if not isinstance(values, list):
            raise ConfigError(f"--grid takes a list, such as {name}=[0.75, 4.0], not {values!r}")
    from editors.tune import tune, tuning_cases
    from editors.tune_files import label
    from editors.tune_records import TuneOptions
    from lab.cli.session import open_model
    from lab.data import load_cases
    from lab.eval import SuiteOptions, get_suite

    benchmark = get_suite(suite, SuiteOptions(fluency=False))
    options = TuneOptions(
        limit=limit,
        places=places,
        grids=grids,
        settings=edit.overrides(settings),
        preset=preset,
        corpus=corpus,
        seed=seed,
    )
    held = [case for file in exclude or () for case in load_cases(file).cases]
    cases = tuning_cases(suite, data, seed=seed, exclude=held)
    handle = open_model(model, None, device=device, dtype=dtype, quantize=quantize)
    with progress() as advance:
        result = tune(handle, editor, benchmark, cases, out, options, progress=advance)
    screen = console(json)
    rows = [
        (
            label(trial),
            trial.n,
            trial.score,
            trial.margin,
            trial is result.best,
        )
        for trial in sorted(result.trials, key=lambda trial: trial.rank, reverse=True)
    ]
    columns = ("candidate", "n", "score", "margin", "kept")
    screen.print(table(f"{editor} for {model}: {len(result.facts)} tuning facts", columns, rows))
    screen.print(f"preset -> {out / 'preset.toml'}   use it with: --preset {out / 'preset.toml'}")
    write_json(json, "tune", seed, {"model": model, "path": out, **result.to_json()})
