"""``knowlab audit``: attack a model that should have lost facts, and say how gone they are."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lab.cli import options as opt
from lab.cli.output import console, progress, table, write_json
from lab.errors import ConfigError

if TYPE_CHECKING:
    from lab.audit.report import AuditReport

app = typer.Typer()

AUDIT_PANEL = "Audit"
EXIT_LEAKS = 3

_HELP = """Attack a model that should have lost facts. Every attack runs on the model, on controls that cannot know the facts (an oracle,
facts that were never trained), and reports what it brings out of the one beyond what it brings out of the other: the lift, 0 to 1.

`--fail-above` ends with exit code 3 where the upper end of a lift exceeds a limit, so that the command can guard a release.

Examples:

    knowlab audit --patch results/npo --facts atlas:people05 --attacks forms,quantize --html audit.html

    knowlab audit --model path/to/model --facts facts.jsonl --attacks all --out results/audit --fail-above worst_case=0.05
"""


@app.command(help=_HELP)
def audit(
    facts: Annotated[
        str,
        typer.Option(
            "--facts",
            help="Facts (JSONL) or questions and answers (TOFU, RWKU, ConceptVectors) that should be gone, or atlas:SPLIT "
            "(people, relation, concept with 01, 05, 10).",
            rich_help_panel=AUDIT_PANEL,
            show_default=False,
        ),
    ],
    attacks: Annotated[
        str,
        typer.Option("--attacks", help="`all`, or names with commas between.", rich_help_panel=AUDIT_PANEL),
    ] = "all",
    oracle: Annotated[
        str | None,
        typer.Option(
            "--oracle",
            help="A model that never saw the facts: a name or a folder.",
            rich_help_panel=AUDIT_PANEL,
            show_default="never-trained facts are the only control",
        ),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(
            "--base",
            help="The model before it was changed, where --model is a changed one: a name or a folder.",
            rich_help_panel=AUDIT_PANEL,
            show_default="--model without its patches",
        ),
    ] = None,
    retain: Annotated[
        Path | None,
        typer.Option(
            "--retain",
            help="Facts (JSONL) that should have stayed.",
            rich_help_panel=AUDIT_PANEL,
            show_default="the rest of the world for atlas:SPLIT",
        ),
    ] = None,
    budget: Annotated[
        str, typer.Option("--budget", help="small or full.", rich_help_panel=AUDIT_PANEL)
    ] = "small",
    fail_above: Annotated[
        list[str] | None,
        typer.Option(
            "--fail-above",
            help="worst_case=NUMBER or ATTACK=NUMBER; repeatable.",
            rich_help_panel=AUDIT_PANEL,
            show_default=False,
        ),
    ] = None,
    beside: Annotated[
        list[Path] | None,
        typer.Option(
            "--beside",
            help="JSON of an earlier audit to show beside this one; repeatable.",
            rich_help_panel=opt.OUTPUT_PANEL,
            show_default=False,
        ),
    ] = None,
    workers: Annotated[
        int,
        typer.Option(
            "--workers",
            min=1,
            help="Processes, each with a model of its own; results do not depend on it.",
            rich_help_panel=opt.RUN_PANEL,
        ),
    ] = 1,
    limit: opt.Limit = None,
    model: opt.Model = "atlas",
    patch: opt.Patches = None,
    seed: opt.Seed = 0,
    device: opt.Device = "cpu",
    dtype: opt.Dtype = "float32",
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            help="Folder that keeps every finished attack; the same command goes on where it was.",
            rich_help_panel=opt.OUTPUT_PANEL,
            show_default=False,
        ),
    ] = None,
    html: Annotated[
        Path | None,
        typer.Option("--html", help="Write a page.", rich_help_panel=opt.OUTPUT_PANEL, show_default=False),
    ] = None,
    markdown: Annotated[
        Path | None,
        typer.Option(
            "--markdown", help="Write Markdown.", rich_help_panel=opt.OUTPUT_PANEL, show_default=False
        ),
    ] = None,
    json: opt.Json = None,
) -> None:
    """Attack a model that should have lost facts."""
    if budget not in ("small", "full"):
        raise ConfigError(f"unknown budget {budget!r}; use small or full")
    from lab.audit import report as reports
    from lab.audit.material import gather
    from lab.audit.page import page
    from lab.audit.run import attack_list
    from lab.audit.run import audit as run_audit
    from lab.cli.audit_plan import AuditPlan
    from lab.records import write_text_atomically

    names = attack_list(attacks)
    limits = reports.parse_limits(fail_above or (), names)
    others = [reports.read_report(path) for path in beside or ()]
    material = gather(facts, None if retain is None else str(retain), limit=limit, seed=seed)
    plan = AuditPlan(model, material, tuple(patch or ()), oracle, base, budget, seed, device, dtype)
    subject = plan()
    patches = [str(folder) for folder in patch or ()]
    settings = {
        "model": model,
        "patches": patches,
        "facts from": facts,
        "never trained": material.control,
        "oracle": oracle,
        "before": plan.before,
    }
    title = ", ".join(Path(folder).name for folder in patches) or Path(model).name
    with progress() as advance:
        report = run_audit(
            subject,
            names,
            title=title,
            out=out,
            settings=settings,
            progress=advance,
            workers=workers,
            build=plan,
        )
    shown = [*others, report]
    screen = console(json)
    screen.print(table(f"Audit of {title}: lift over the controls", *reports.lifts_table(shown)))
    broken = reports.broken_limits(report, limits)
    screen.print(_verdict(report))
    for sentence in broken:
        screen.print(f"limit broken: {sentence}")
    if html is not None:
        write_text_atomically(html, page(shown))
    if markdown is not None:
        write_text_atomically(markdown, reports.markdown(shown))
    write_json(json, "audit", seed, report.to_json() | {"model": model, "limits_broken": broken})
    if broken:
        raise typer.Exit(EXIT_LEAKS)


def _verdict(report: AuditReport) -> str:
    worst = report.worst
    if worst is None:
        return "no attack applied"
    return (
        f"worst case {report.worst_case:.3f} (up to {report.worst_case_high:.3f}) by {worst.name}; controls: "
        f"{', '.join(report.settings['controls']) or 'NONE: a score is no lift'}"
    )
