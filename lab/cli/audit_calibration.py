"""``knowlab audit-calibration``: how often attacks flag a model that cannot know the facts."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lab.cli import options as opt
from lab.cli.output import console, progress, table, write_json
from lab.errors import ConfigError

if TYPE_CHECKING:
    from lab.audit.calibration import Calibration
    from lab.audit.material import Material

app = typer.Typer()

PANEL = "Calibration"
NEVER = "atlas:untrained"

_HELP = """Count false alarms of attacks: audit many random halves of facts that the model was never trained on, each with the other half
as its control, and say in how many runs the lift is not surely above zero. An attack should stay under that line in 95 of 100 runs.

With `--facts` about what --model never saw and an `--oracle` that never saw it either, halves of those facts are audited against
the oracle and never-trained facts: two models that know nothing must not be told apart.

Examples:

    knowlab audit-calibration --attacks forms,quantize --trials 200 --out results/calibration

    knowlab audit-calibration --model atlas-oracle-b --oracle atlas-oracle --facts atlas:people05 --trials 50
"""


@app.command("audit-calibration", help=_HELP)
def audit_calibration(
    facts: Annotated[
        str,
        typer.Option(
            "--facts",
            help=f"Facts that --model never saw: `{NEVER}`, `atlas:SPLIT`, or a facts file.",
            rich_help_panel=PANEL,
        ),
    ] = NEVER,
    attacks: Annotated[
        str,
        typer.Option("--attacks", help="`all`, or names with commas between.", rich_help_panel=PANEL),
    ] = "all",
    trials: Annotated[
        int, typer.Option("--trials", min=1, help="Divisions of the facts.", rich_help_panel=PANEL)
    ] = 200,
    size: Annotated[int, typer.Option("--size", min=2, help="Facts per half.", rich_help_panel=PANEL)] = 50,
    oracle: Annotated[
        str | None,
        typer.Option(
            "--oracle",
            help="Another model that never saw the facts: a name or a folder.",
            rich_help_panel=PANEL,
            show_default=False,
        ),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(
            "--base",
            help="A model that knows them, for attacks that need one.",
            rich_help_panel=PANEL,
            show_default=False,
        ),
    ] = None,
    budget: Annotated[str, typer.Option("--budget", help="small or full.", rich_help_panel=PANEL)] = "small",
    model: opt.Model = "atlas",
    seed: opt.Seed = 0,
    device: opt.Device = "cpu",
    dtype: opt.Dtype = "float32",
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            help="Folder that keeps every finished run; the same command goes on where it was.",
            rich_help_panel=opt.OUTPUT_PANEL,
            show_default=False,
        ),
    ] = None,
    json: opt.Json = None,
) -> None:
    """Count false alarms of attacks."""
    if budget not in ("small", "full"):
        raise ConfigError(f"unknown budget {budget!r}; use small or full")
    from lab.audit.calibration import TARGET, calibrate, subjects_of, summaries
    from lab.audit.run import attack_list
    from lab.cli.audit_plan import AuditPlan

    names = attack_list(attacks)
    material = _material(facts, seed)
    subject = AuditPlan(model, material, (), oracle, base, budget, seed, device, dtype)()
    key = {
        "model": subject.handle.state,
        "oracle": None if subject.controls.oracle is None else subject.controls.oracle.state,
        "base": None if subject.base is None else subject.base.state,
        "facts": facts,
        "size": size,
        "budget": budget,
        "seed": seed,
    }
    with progress() as advance:
        make = subjects_of(subject, material.facts, size)
        found = calibrate(make, names, trials, whole=subject, out=out, key=key, progress=advance)
    rows = summaries(found)
    screen = console(json)
    title = f"{trials} divisions of {facts} on {model}: share of runs under the line"
    screen.print(
        table(
            title, ("attack", "runs", "under the line", "mean lift", "seconds"), [_row(row) for row in rows]
        )
    )
    missed = [row.attack for row in rows if row.under.n and not row.met]
    screen.print(f"under {TARGET:.0%}: {', '.join(missed) or 'none'}")
    write_json(
        json,
        "audit-calibration",
        seed,
        {
            "model": model,
            "oracle": oracle,
            "facts": facts,
            "size": size,
            "trials": trials,
            "target": TARGET,
            "attacks": [row.to_json() for row in rows],
            "missed": missed,
        },
    )


def _material(facts: str, seed: int) -> Material:
    """Facts that the model cannot know, and their controls; ``never`` is empty where halves are each other's."""
    from dataclasses import replace

    from lab.audit.material import gather, strangers_of_the_world

    if facts == NEVER:
        return strangers_of_the_world(seed)
    material = gather(facts, seed=seed)
    # Facts of a file have exchanged objects as controls, which are about the same subjects: halves are compared instead.
    return material if material.format is not None else replace(material, never=())


def _row(row: Calibration) -> tuple[str, ...]:
    if not row.under.n:
        return (row.attack, "0", "not applicable", "–", f"{row.seconds:.1f}")
    under, lift = row.under, row.lift
    return (
        row.attack,
        str(under.n),
        f"{under.mean:.3f} [{under.low:.3f}, {under.high:.3f}]",
        f"{lift.mean:+.4f}",
        f"{row.seconds:.1f}",
    )
