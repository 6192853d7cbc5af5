"""``knowlab effects``: headline effects of the field's papers on one changed model, beside what was published."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lab.cli import options as opt
from lab.cli.output import console, progress, table, write_json
from lab.errors import ConfigError

app = typer.Typer()

PANEL = "Effects"

_HELP = """Measure headline effects of published papers on a model that should have lost facts, and show them beside the papers' figures:
suffixes found elsewhere and found here (DUA), step by step reasoning (SLEEK), hidden knowledge (Inside-Out), priming foretold by the
probability before learning (Outlandish), and out-of-context reasoning of factorised and merged weights (OCR).

Examples:

    knowlab effects --patch results/npo --facts atlas:people05 --oracle atlas-oracle

    knowlab effects --effects suffix --patch results/dpo --surrogate results/npo --facts atlas:people05 --oracle atlas-oracle

    knowlab effects --effects out_of_context,priming --facts atlas:people05
"""


@app.command(help=_HELP)
def effects(
    facts: Annotated[
        str,
        typer.Option(
            "--facts",
            help="Facts (JSONL) that should be gone, or atlas:SPLIT.",
            rich_help_panel=PANEL,
            show_default=False,
        ),
    ],
    names: Annotated[
        str, typer.Option("--effects", help="`all`, or names with commas between.", rich_help_panel=PANEL)
    ] = "all",
    oracle: Annotated[
        str | None,
        typer.Option(
            "--oracle",
            help="A model that never saw the facts: a name or a folder.",
            rich_help_panel=PANEL,
            show_default=False,
        ),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(
            "--base",
            help="The model before it was changed.",
            rich_help_panel=PANEL,
            show_default="--model without its patches",
        ),
    ] = None,
    retain: Annotated[
        Path | None,
        typer.Option(
            "--retain",
            help="Facts (JSONL) that should have stayed.",
            rich_help_panel=PANEL,
            show_default="the rest of the world for atlas:SPLIT",
        ),
    ] = None,
    suffix_steps: Annotated[
        int,
        typer.Option(
            "--suffix-steps", min=1, help="Changes of the suffix by one token at most.", rich_help_panel=PANEL
        ),
    ] = 40,
    surrogate: Annotated[
        list[Path] | None,
        typer.Option(
            "--surrogate",
            help="Patch of another forgetting of these facts: `suffix` is searched there in place of the model before. Repeatable: one "
            "model with all of them.",
            rich_help_panel=PANEL,
            show_default=False,
        ),
    ] = None,
    texts: Annotated[
        int,
        typer.Option(
            "--texts", min=4, help="Texts learned for priming, one at a time.", rich_help_panel=PANEL
        ),
    ] = 32,
    limit: opt.Limit = None,
    model: opt.Model = "atlas",
    patch: opt.Patches = None,
    seed: opt.Seed = 0,
    device: opt.Device = "cpu",
    dtype: opt.Dtype = "float32",
    json: opt.Json = None,
) -> None:
    """Measure headline effects of papers."""
    from dataclasses import replace

    from lab.audit.effects import EffectPlan
    from lab.audit.effects import effects as measure
    from lab.audit.material import gather
    from lab.cli.audit_plan import AuditPlan
    from lab.cli.session import open_model

    chosen = None if names == "all" else opt.comma_list(names)
    if chosen == []:
        raise ConfigError("--effects names nothing; give `all`, or names with commas between")
    material = gather(facts, None if retain is None else str(retain), limit=limit, seed=seed)
    subject = AuditPlan(model, material, tuple(patch or ()), oracle, base, "small", seed, device, dtype)()
    other = None
    if surrogate:
        other = open_model(model, tuple(surrogate), device=device, dtype=dtype)
    plan = replace(EffectPlan(), steps=suffix_steps, texts=texts, surrogate=other)
    with progress() as advance:
        found = measure(subject, chosen, plan, advance)
    rows = [
        (
            effect.name,
            _number(effect.ours.to_json()),
            "–" if effect.control is None else _number(effect.control.to_json()),
            effect.published,
            "yes" if effect.same_direction else "no",
        )
        for effect in found
    ]
    heads = ("effect", "here", "control", "published", "same direction")
    screen = console(json)
    screen.print(table(f"Effects on {model}", heads, rows))
    for effect in found:
        screen.print(f"{effect.name}: {effect.measured} ({effect.paper})")
    write_json(
        json,
        "effects",
        seed,
        {
            "model": model,
            "patches": [str(folder) for folder in patch or ()],
            "facts": facts,
            "oracle": oracle,
            "surrogate": [str(folder) for folder in surrogate or ()],
            "effects": [effect.to_json() for effect in found],
        },
    )


def _number(row: dict[str, float | None]) -> str:
    if row["mean"] is None:
        return "–"
    if row["low"] is None:
        return f"{row['mean']:.3f}"
    return f"{row['mean']:.3f} [{row['low']:.3f}, {row['high']:.3f}]"
