"""``knowlab bench restor``: which unlearning methods bring true facts back, and which only remove the false."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from editors.cli_bench import settings_by_editor
from lab.cli import options as opt
from lab.cli.output import console, progress, table, write_json

PANEL = "Unlearning"

HELP = """Corrupt facts, unlearn the corruption, and ask for the true facts again (RESTOR): which methods recover what the clean
model knew, and which only forget.

Examples:

    knowlab bench restor --methods ga,kl,npo --facts atlas:people05 --json restor.json

    knowlab bench restor --methods npo --facts facts.jsonl --retain others.jsonl --set npo:epochs=8
"""


def bench_restor(
    methods: Annotated[
        str,
        typer.Option(
            "--methods",
            help="Methods with commas between them (`knowlab list unlearners`).",
            rich_help_panel=PANEL,
        ),
    ] = "ga,graddiff,npo",
    facts: Annotated[
        str,
        typer.Option(
            "--facts", help="Facts to corrupt: atlas:SPLIT or a file (JSONL).", rich_help_panel=PANEL
        ),
    ] = "atlas:people05",
    retain: Annotated[
        Path | None,
        typer.Option(
            "--retain",
            help="Facts (JSONL) to keep.",
            rich_help_panel=PANEL,
            show_default="the rest of the world for atlas:SPLIT",
        ),
    ] = None,
    corruptor: Annotated[
        str,
        typer.Option("--corruptor", help="Editor that states the false facts.", rich_help_panel=PANEL),
    ] = "ft_m",
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            help="One setting of a method or of the corruptor, `NAME:name=value`; without a NAME, of all methods. Repeatable. "
            "What is not set is as `knowlab unlearn` has it for this model.",
            rich_help_panel=PANEL,
            show_default=False,
        ),
    ] = None,
    limit: Annotated[
        int, typer.Option("--limit", min=1, help="Facts to corrupt, at most.", rich_help_panel=opt.RUN_PANEL)
    ] = 50,
    model: opt.Model = "atlas",
    seed: opt.Seed = 0,
    device: opt.Device = "cpu",
    dtype: opt.Dtype = "float32",
    json: opt.Json = None,
) -> None:
    """Corrupt, unlearn, and see what comes back."""
    from editors.unlearning.base import UNLEARNERS
    from editors.unlearning.material import gather
    from editors.unlearning.presets import tuned_settings
    from editors.unlearning.restor import corruptions, run_restor
    from lab.cli.session import open_model

    names = opt.comma_list(methods)
    for name in names:
        UNLEARNERS.get(name)
    chosen = settings_by_editor(settings, [*names, corruptor])
    material = gather(facts, None if retain is None else str(retain), limit=limit, seed=seed)
    cases = corruptions(material.forget[:limit], (*material.forget, *material.kept), seed=seed)
    handle = open_model(model, device=device, dtype=dtype)
    rows = []
    with progress() as advance:
        for name in names:
            rows.append(
                run_restor(
                    handle,
                    name,
                    cases,
                    material.kept,
                    corruptor=corruptor,
                    corruptor_settings=chosen.get(corruptor),
                    settings={
                        **tuned_settings(handle, name),
                        **chosen.get("", {}),
                        **chosen.get(name, {}),
                    },
                    seed=seed,
                    progress=advance,
                )
            )
    lines = [
        (
            row["method"],
            *(row[side]["accuracy"]["mean"] for side in ("clean", "corrupted", "unlearned")),
            row["unlearned"]["false_accuracy"]["mean"],
            row["recovery"],
            row["forgotten"],
            row["verdict"],
        )
        for row in rows
    ]
    heads = (
        "method",
        "clean",
        "corrupted",
        "unlearned",
        "says the false",
        "recovery",
        "forgotten",
        "verdict",
    )
    console(json).print(table(f"RESTOR on {model}: accuracy on {len(cases)} true facts", heads, lines))
    write_json(
        json, "bench restor", seed, {"model": model, "facts": facts, "corruptor": corruptor, "rows": rows}
    )
