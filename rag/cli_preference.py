"""``knowlab train``: teach a model when to believe documents, its memory or its user."""

from __future__ import annotations

import json as json_module
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from lab.cli import options as opt
from lab.cli.output import check_out, console, progress, table, write_json
from lab.errors import ConfigError

app = typer.Typer()

TRAIN_PANEL = "Training"


class Method(StrEnum):
    """What is taught."""

    KNOWPO = "knowpo"
    HIERARCHY = "hierarchy"
    NOTES = "notes"
    DTA = "dta"
    CONTEXT_DPO = "context_dpo"
    TRUST = "trust"


_HELP = """Teach a model when to believe documents, its memory or its user, and save the adapter.

Methods: knowpo (adherence and robustness), hierarchy (user over documents over memory), notes (Chain-of-Note), dta (answer or
admit), context_dpo (documents over memory), trust (believe what is verified). The data is made with the model itself: its own
memory and its own mistakes, edits included. A file may also hold finished pairs or SFT rows.

The folder holds the adapter as a patch (`--patch` takes it), the edits below it, the rows of every stage and the curves.

Examples:

    knowlab train knowpo --data atlas --out results/knowpo --limit 200

    knowlab train dta --model path/to/model --data squad.json --out results/dta --max-steps 100 --work results/dta-work
"""


@app.command("train", help=_HELP)
def train(
    method: Annotated[Method, typer.Argument(help="What is taught.", show_default=False)],
    data: Annotated[
        str,
        typer.Option(
            "--data",
            help="atlas; a file of questions with passages (SQuAD, MRQA, KnowPO, RGB, RealTimeQA, ConflictQA, ConFiQA, MQuAKE, "
            "NQ-Synth, question-answers-context); or a file of finished pairs.",
            rich_help_panel=TRAIN_PANEL,
        ),
    ] = "atlas",
    max_steps: Annotated[
        int | None,
        typer.Option(
            "--max-steps", min=1, help="Ends each of SFT and DPO early.", rich_help_panel=TRAIN_PANEL
        ),
    ] = None,
    epochs: Annotated[
        float | None,
        typer.Option(
            "--epochs",
            min=0.01,
            help="Passes over the data.",
            rich_help_panel=TRAIN_PANEL,
            show_default="the preset's, or 2 for SFT and 1 for DPO",
        ),
    ] = None,
    lr: Annotated[
        float | None,
        typer.Option(
            "--lr",
            min=0,
            help="Learning rate of the preference step.",
            rich_help_panel=TRAIN_PANEL,
            show_default="the preset's, or 2e-5",
        ),
    ] = None,
    sft_lr: Annotated[
        float | None,
        typer.Option(
            "--sft-lr",
            min=0,
            help="That of SFT.",
            rich_help_panel=TRAIN_PANEL,
            show_default="the preset's, or 1e-4",
        ),
    ] = None,
    beta: Annotated[
        float | None,
        typer.Option(
            "--beta",
            min=0,
            help="Beta of the preference step.",
            rich_help_panel=TRAIN_PANEL,
            show_default="the preset's, or 0.1",
        ),
    ] = None,
    rank: Annotated[
        int | None,
        typer.Option(
            "--rank",
            min=1,
            help="Rank of the adapter.",
            rich_help_panel=TRAIN_PANEL,
            show_default="the preset's, or 16",
        ),
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(
            "--batch-size",
            min=1,
            help="Rows in a step.",
            rich_help_panel=TRAIN_PANEL,
            show_default="the preset's, or 8",
        ),
    ] = None,
    objective: Annotated[
        str | None,
        typer.Option(
            "--objective",
            help="Of the preference step: dpo, kto, orpo, simpo.",
            rich_help_panel=TRAIN_PANEL,
            show_default="dpo",
        ),
    ] = None,
    samples: Annotated[
        int,
        typer.Option(
            "--samples",
            min=0,
            help="Sampled answers that must all be right for a fact to count as known.",
            rich_help_panel=TRAIN_PANEL,
        ),
    ] = 10,
    draws: Annotated[
        int,
        typer.Option(
            "--draws",
            min=1,
            help="For knowpo: sets of contexts of each question, drawn apart.",
            rich_help_panel=TRAIN_PANEL,
        ),
    ] = 1,
    reader: Annotated[
        str,
        typer.Option(
            "--reader",
            help="For knowpo: train the answers of this reader, direct or (after its notes) con.",
            rich_help_panel=TRAIN_PANEL,
        ),
    ] = "direct",
    total: Annotated[
        int | None,
        typer.Option(
            "--total",
            min=1,
            help="Pairs of knowpo in all; rare errors are repeated, common ones thinned out.",
            rich_help_panel=TRAIN_PANEL,
            show_default="all, rare errors repeated up to 4 times",
        ),
    ] = None,
    rewrite: Annotated[
        bool,
        typer.Option(
            "--rewrite/--no-rewrite",
            help="For knowpo: word both answers of a pair alike; off, the rejected one stays as the model wrote it.",
            rich_help_panel=TRAIN_PANEL,
        ),
    ] = True,
    balance: Annotated[
        bool,
        typer.Option(
            "--balance/--no-balance",
            help="For knowpo: keep the ratio of the errors; off, all pairs as they come.",
            rich_help_panel=TRAIN_PANEL,
        ),
    ] = True,
    work: Annotated[
        Path | None,
        typer.Option(
            "--work",
            help="Folder of checkpoints; the same command goes on from there.",
            rich_help_panel=TRAIN_PANEL,
            show_default=False,
        ),
    ] = None,
    model: opt.Model = "atlas",
    patch: opt.Patches = None,
    limit: opt.Limit = None,
    seed: opt.Seed = 0,
    device: opt.Device = "cpu",
    dtype: opt.Dtype = "float32",
    out: opt.Out = None,
    force: opt.Force = False,
    json: opt.Json = None,
) -> None:
    """Teach a model when to believe documents, its memory or its user."""
    if out is None:
        raise ConfigError("--out names the folder that the adapter is saved to")
    plain = rewrite and balance and total is None and draws == 1 and reader == "direct"
    if not plain and method is not Method.KNOWPO:
        raise ConfigError(
            f"--draws, --reader, --total, --no-rewrite and --no-balance belong to knowpo, not to {method.value}"
        )
    check_out(out, force)
    from lab.cli.session import open_model
    from rag.preference.bundle import save_bundle
    from rag.preference.knowpo import KnowPOConfig
    from rag.preference.prepare import ready_data
    from rag.preference.presets import train_config
    from rag.preference.train import train_preference

    handle = open_model(model, patch, device=device, dtype=dtype)
    settings = KnowPOConfig(
        samples=samples, draws=draws, reader=reader, total=total, rewrite=rewrite, balanced=balance
    )
    config = train_config(
        handle,
        method.value,
        rank=rank,
        sft_lr=sft_lr,
        dpo_lr=lr,
        sft_epochs=epochs,
        dpo_epochs=epochs,
        beta=beta,
        batch_size=batch_size,
        objective=objective,
        max_steps=max_steps,
    )
    with progress() as advance:
        ready = ready_data(
            handle, method.value, data, config=settings, limit=limit, seed=seed, progress=advance
        )
        trained = train_preference(
            handle, ready, config, method=method.value, work=work, seed=seed, progress=advance
        )
    ready = trained.data

    def more(folder: Path) -> None:
        ready.save(folder / "data")
        (folder / "curves.json").write_text(json_module.dumps(trained.curves, indent=1), encoding="utf-8")

    saved = save_bundle(out, handle, trained.patch, more=more, overwrite=force)
    rows_of = {"sft": ready.sft, "dpo": ready.pairs}
    shown = [
        (name, len(rows_of[name] or ()), len(curve), curve[0]["loss"], curve[-1]["loss"])
        for name, curve in trained.curves.items()
    ]
    screen = console(json)
    screen.print(
        table(f"{method.value} on {model}", ("step", "rows", "updates", "first loss", "last loss"), shown)
    )
    if stage := ready.stages.get("balance"):
        settings = stage.manifest["settings"]
        parts = [
            (kind, settings["available"].get(kind, 0), count) for kind, count in settings["achieved"].items()
        ]
        screen.print(table("Pairs by error", ("error", "found", "trained on"), parts))
        for kind, found, _ in parts:
            if not found:
                typer.echo(f"warning: no pair of {kind} was found; nothing is learnt about it", err=True)
    screen.print(f"adapter -> {saved}", markup=False)
    content = {
        "model": model,
        "method": method.value,
        "data": data,
        "rows": {name: len(rows) for name, rows in rows_of.items() if rows is not None},
        "stages": {name: dict(stage.manifest) for name, stage in ready.stages.items()},
        "curves": trained.curves,
        "patch": {"path": str(saved), "id": trained.patch.id, "parents": list(trained.patch.parents)},
    }
    write_json(json, "train", seed, content)
