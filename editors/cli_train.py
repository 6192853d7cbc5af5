"""``knowlab train-editor``: the network of an editor that must be trained once per model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from editors import cli_options as options
from lab.cli import options as opt
from lab.cli.output import check_out, console, progress, table, write_json
from lab.errors import ConfigError

app = typer.Typer()

TRAIN_PANEL = "Training"

_HELP = """Train the network that an editor needs for one model, or go on with an interrupted run.

Data is `atlas` (the built-in world's tuning facts, never those that suites ask) or a benchmark file with locality prompts, such as
zsRE's training rows; `--exclude` keeps everything that an evaluation file asks out of it. Some subjects are held out; training ends
when their loss no longer falls, and the best network is kept. A checkpoint is written at every validation, into OUT.work.

Examples:

    knowlab train-editor mend --model path/to/model --data zsre_mend_train.json --exclude zsre_mend_eval.json --out networks/mend

    knowlab train-editor mend --out networks/mend --steps 500 --set lr=3e-4 --json train.json

    knowlab edit --editor mend --set network=networks/mend --prompt "The capital of {} is" --subject France --target Rome
"""


@app.command("train-editor", help=_HELP)
def train_editor(
    editor: Annotated[str, typer.Argument(help="Editor to train for: mend or serac.", show_default=False)],
    data: Annotated[
        str,
        typer.Option(
            "--data", help="What to learn from: atlas, or a benchmark file.", rich_help_panel=TRAIN_PANEL
        ),
    ] = "atlas",
    exclude: Annotated[
        list[Path] | None,
        typer.Option(
            "--exclude",
            help="Evaluation file whose subjects and prompts stay out; repeatable.",
            rich_help_panel=TRAIN_PANEL,
            show_default=False,
        ),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(
            "--steps",
            min=1,
            help="Updates at most.",
            rich_help_panel=TRAIN_PANEL,
            show_default="the preset's",
        ),
    ] = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume/--restart", help="Go on from the last checkpoint.", rich_help_panel=TRAIN_PANEL
        ),
    ] = True,
    work: Annotated[
        Path | None,
        typer.Option(
            "--work", help="Folder for checkpoints.", rich_help_panel=TRAIN_PANEL, show_default="OUT.work"
        ),
    ] = None,
    preset: options.Preset = None,
    settings: options.Settings = None,
    model: opt.Model = "atlas",
    seed: opt.Seed = 0,
    device: opt.Device = "cpu",
    dtype: opt.Dtype = "float32",
    out: opt.Out = None,
    force: opt.Force = False,
    json: opt.Json = None,
) -> None:
    """Train the network that an editor needs."""
    if out is None:
        raise ConfigError("give --out, the folder for the network")
    check_out(out, force)
    from editors import EDITORS
    from editors.lessons import load_lessons
    from lab.cli.session import open_model

    train = EDITORS.get(editor).train
    if train is None:
        trainable = [name for name in EDITORS.names() if EDITORS.get(name).train is not None]
        raise ConfigError(f"{editor!r} needs no training; these do: {', '.join(trainable)}")
    chosen = {**options.overrides(settings), **({"steps": steps} if steps is not None else {})}
    lessons = load_lessons(data, seed=seed, exclude=exclude or ())
    handle = open_model(model, None, device=device, dtype=dtype)
    with progress() as advance:
        trained = train(
            handle,
            lessons,
            out,
            work=work,
            preset=preset,
            settings=chosen,
            seed=seed,
            resume=resume,
            overwrite=force,
            progress=advance,
        )
    screen = console(json)
    for name, run in trained.card["training"].items():
        history = run["history"]
        columns = [key for key in history[0] if key != "step"]
        rows = [
            (int(each["step"]), *(each[key] for key in columns), each["step"] == run["best_step"])
            for each in history
        ]
        screen.print(
            table(f"{editor} for {model}: {name}, held-out lessons", ("step", *columns, "kept"), rows)
        )
    screen.print(f"network -> {out}   use it with: --editor {editor} --set network={out}")
    content = {
        "model": model,
        "editor": editor,
        "data": data,
        "path": out,
        "network": trained.id,
        "base": trained.card["base"],
        "config": trained.card["config"],
        "lessons": trained.card["lessons"],
        "training": trained.card["training"],
    }
    write_json(json, "train-editor", seed, content)
