"""``knowlab bench priming``: what learning one text primes elsewhere, and how much of it two mitigations take away."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Annotated

import typer

from lab.cli import options as opt
from lab.cli.output import console, progress, table, write_json
from lab.errors import ConfigError

PANEL = "Priming"

HELP = """Learn surprising facts one at a time and see where else their answers turn up (priming, Outlandish): plainly, with the
largest changes put back (ignore_k), and with a clause that leads up to the answer (stepping_stone).

Examples:

    knowlab bench priming --limit 64 --json priming.json

    knowlab bench priming --model ./model --facts new.jsonl --ordinary known.jsonl --share 0.2
"""


def bench_priming(
    facts: Annotated[
        Path | None,
        typer.Option(
            "--facts",
            help="Facts (JSONL) that the model does not know, several of each relation.",
            rich_help_panel=PANEL,
            show_default="never-trained people for atlas",
        ),
    ] = None,
    ordinary: Annotated[
        Path | None,
        typer.Option(
            "--ordinary",
            help="Facts (JSONL) that every step has beside the learned one.",
            rich_help_panel=PANEL,
            show_default="what atlas knows, for atlas",
        ),
    ] = None,
    steps: Annotated[
        int, typer.Option("--steps", min=1, help="Steps of learning one fact.", rich_help_panel=PANEL)
    ] = 12,
    rate: Annotated[
        float, typer.Option("--rate", min=0.0, help="Learning rate (AdamW).", rich_help_panel=PANEL)
    ] = 1e-3,
    share: Annotated[
        float,
        typer.Option(
            "--share",
            min=0.0,
            max=0.99,
            help="ignore_k: share of the changed entries put back.",
            rich_help_panel=PANEL,
        ),
    ] = 0.08,
    below: Annotated[
        float,
        typer.Option(
            "--below",
            min=0.0,
            max=1.0,
            help="stepping_stone: probability below which an answer is led up to.",
            rich_help_panel=PANEL,
        ),
    ] = 1e-3,
    limit: Annotated[
        int, typer.Option("--limit", min=2, help="Facts to learn, at most.", rich_help_panel=opt.RUN_PANEL)
    ] = 32,
    model: opt.Model = "atlas",
    patch: opt.Patches = None,
    seed: opt.Seed = 0,
    device: opt.Device = "cpu",
    dtype: opt.Dtype = "float32",
    json: opt.Json = None,
) -> None:
    """Learn facts one at a time, with and without mitigations, and measure priming."""
    from editors.unlearning.mitigations import MitigationOptions, measure_mitigations, mitigation_table
    from lab.atlas.weights import shipped
    from lab.atlas.world import load_world
    from lab.audit.learning import Lesson
    from lab.cli.session import open_model
    from lab.data.unlearning import facts_of

    if (facts is None or ordinary is None) and model not in shipped():
        raise ConfigError(
            f"{model!r} is no built-in model: give --facts (what it does not know) and --ordinary (what it does)"
        )
    pool = list(facts_of(facts)) if facts is not None else list(load_world().untrained)
    known = facts_of(ordinary) if ordinary is not None else load_world().facts
    chosen = list(pool)
    random.Random(f"priming:{seed}").shuffle(chosen)
    options = MitigationOptions(Lesson(steps=steps, rate=rate), share, below)
    handle = open_model(model, patch, device=device, dtype=dtype)
    with progress() as advance:
        results = measure_mitigations(
            handle,
            chosen[:limit],
            pool,
            [f"{fact.text} {fact.object}." for fact in known],
            options,
            seed=seed,
            progress=advance,
        )
    rows = mitigation_table(results, seed=seed)
    heads = (
        "mitigation",
        "median priming",
        "falls by",
        "low",
        "high",
        "answer before",
        "answer after",
        "rewritten",
    )
    lines = [
        (
            row["mitigation"],
            row["median_priming"],
            *((row["fall"] or {}).get(name) for name in ("mean", "low", "high")),
            row["probability_before"]["mean"],
            row["probability"]["mean"],
            row["rewritten"],
        )
        for row in rows
    ]
    console(json).print(
        table(f"Priming by {len(results)} facts learned one at a time on {model}", heads, lines)
    )
    texts = [
        {"rewritten": each.rewritten, **{name: found.to_json() for name, found in each.found.items()}}
        for each in results
    ]
    write_json(
        json,
        "bench priming",
        seed,
        {
            "model": model,
            "steps": steps,
            "rate": rate,
            "share": share,
            "below": below,
            "rows": rows,
            "texts": texts,
        },
    )
