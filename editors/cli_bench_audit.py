"""``knowlab bench audit``: ways of forgetting side by side under every attack."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from editors.cli_bench import settings_by_editor
from lab.cli import options as opt
from lab.cli.output import check_out, console, progress, table, write_json
from lab.errors import ConfigError, KnowLabError

COMMAND = "bench audit"
PANEL = "What is compared"

HELP = """Attack many ways of forgetting and put them side by side: unlearning methods, editors that are asked to say nothing in place
of each object, and saved patches. Each is scaled to the least dose at which the facts are said no more often than by the oracle (or
than never-trained facts), and audited there, so that none leaks less because it forgot more.

`--match prompt` looks at the prompts that were trained on, as a developer would; what leaks in other forms then shows as a leak of
`forms`. `--match forms` asks every form to be as low. What cannot be matched is marked, and audited at its nearest dose.

Writes audit.json, .html and .md into --out. Patches and finished attacks are kept there; the same command goes on where it was.

Examples:

    knowlab bench audit --methods npo,graddiff,rmu,rocr --editors rome,memit,alphaedit --facts atlas:people05 --out results/audits

    knowlab bench audit --methods "" --patch mine=results/npo --attacks forms,relearn,quantize --out results/mine
"""


def bench_audit(
    methods: Annotated[
        str,
        typer.Option(
            "--methods",
            help="Unlearning methods with commas between them (`knowlab list unlearners`).",
            rich_help_panel=PANEL,
        ),
    ] = "graddiff,npo,simnpo,rmu",
    editors: Annotated[
        str,
        typer.Option(
            "--editors",
            help="Editors with commas between them; each says --target in place of every object.",
            rich_help_panel=PANEL,
        ),
    ] = "",
    patch: Annotated[
        list[str] | None,
        typer.Option(
            "--patch", "-p", help="NAME=FOLDER of a saved patch; repeatable.", rich_help_panel=PANEL
        ),
    ] = None,
    target: Annotated[
        str, typer.Option("--target", help="What edited objects become.", rich_help_panel=PANEL)
    ] = "unknown",
    facts: Annotated[
        str,
        typer.Option(
            "--facts",
            help="Facts (JSONL) to forget, or atlas:SPLIT (people, relation, concept with 01, 05, 10).",
            rich_help_panel=PANEL,
        ),
    ] = "atlas:people05",
    oracle: Annotated[
        str | None,
        typer.Option(
            "--oracle",
            help="The model trained without the facts.",
            rich_help_panel=PANEL,
            show_default="the shipped one where there is one",
        ),
    ] = None,
    untrained: Annotated[
        Path | None,
        typer.Option(
            "--untrained",
            help="Facts (JSONL) that no model was trained on, to match with in place of an oracle.",
            rich_help_panel=PANEL,
            show_default=False,
        ),
    ] = None,
    retain: Annotated[
        Path | None,
        typer.Option(
            "--retain",
            help="Facts (JSONL) to keep.",
            rich_help_panel=PANEL,
            show_default="the rest of the world for atlas:SPLIT",
        ),
    ] = None,
    attacks: Annotated[
        str,
        typer.Option("--attacks", help="`all`, or names with commas between.", rich_help_panel=PANEL),
    ] = "all",
    budget: Annotated[str, typer.Option("--budget", help="small or full.", rich_help_panel=PANEL)] = "small",
    match: Annotated[
        str,
        typer.Option("--match", help="prompt or forms: what must be as low.", rich_help_panel=PANEL),
    ] = "prompt",
    match_forget: Annotated[
        float,
        typer.Option(
            "--match-forget",
            min=0.0,
            help="How near the reference counts as matched, in probability.",
            rich_help_panel=PANEL,
        ),
    ] = 0.05,
    most_dose: Annotated[
        float, typer.Option("--most-dose", min=1.0, help="Largest dose tried.", rich_help_panel=PANEL)
    ] = 4.0,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            help="One setting of all methods, `name=value`, or of one, `NAME:name=value`; repeatable.",
            rich_help_panel=PANEL,
            show_default=False,
        ),
    ] = None,
    limit: Annotated[
        int,
        typer.Option(
            "--limit",
            min=2,
            help="Facts audited, and asked per group, at most.",
            rich_help_panel=opt.RUN_PANEL,
        ),
    ] = 100,
    model: opt.Model = "atlas",
    seed: opt.Seed = 0,
    device: opt.Device = "cpu",
    dtype: opt.Dtype = "float32",
    out: Annotated[
        Path,
        typer.Option("--out", "-o", help="Folder that keeps everything.", rich_help_panel=opt.OUTPUT_PANEL),
    ] = Path("results/audit"),
    json: opt.Json = None,
) -> None:
    """Ways of forgetting side by side under every attack."""
    if budget not in ("small", "full"):
        raise ConfigError(f"unknown budget {budget!r}; use small or full")
    if match not in ("prompt", "forms"):
        raise ConfigError(f"unknown way to match {match!r}; use prompt or forms")
    from editors.audit_bench import AuditBench, AuditBenchOptions, comparison, entrants, summary
    from editors.unlearning.material import oracle_name
    from lab.audit.page import page
    from lab.audit.report import markdown, markdown_table
    from lab.audit.run import attack_list
    from lab.records import write_text_atomically

    check_out(out, True)
    names, chosen = opt.comma_list(methods), opt.comma_list(editors)
    saved = {}
    for word in patch or ():
        title, equals, folder = word.partition("=")
        if not equals:
            raise ConfigError(f"--patch takes NAME=FOLDER, not {word!r}")
        saved[title] = Path(folder)
    runs = entrants(
        names, chosen, saved, target=target, settings=settings_by_editor(settings, [*names, *chosen])
    )
    options = AuditBenchOptions(
        facts,
        attack_list(attacks),
        model,
        oracle or oracle_name(model, facts),
        None if untrained is None else str(untrained),
        None if retain is None else str(retain),
        "prompt" if match == "prompt" else "forms",
        match_forget,
        most_dose,
        limit,
        "small" if budget == "small" else "full",
        seed,
        device,
        dtype,
    )
    bench = AuditBench(options, out)
    columns, failed = [], {}
    with progress() as advance:
        for done, entrant in enumerate(runs):
            advance("entrants", done, len(runs))
            try:
                columns.append(bench.run(entrant, advance))
            except KnowLabError as error:  # one broken method must not take the others down
                failed[entrant.name] = str(error)
        advance("entrants", len(runs), len(runs))
    screen = console(json)
    content = {
        "model": model,
        "facts": facts,
        "oracle": options.oracle,
        "match": match,
        "match_forget": match_forget,
        "attacks": list(options.attacks),
        "columns": [column.to_json() for column in columns],
        "failed": failed,
        "out": out,
    }
    if columns:
        heads, rows = comparison(columns)
        # A screen is too narrow for a column per entrant; the whole table is in the files.
        screen.print(table(f"Audits of {facts} on {model}", *summary(columns)))
        reports = [column.report for column in columns]
        title = f"{facts} forgotten by {model}: dose, losses and lifts"
        write_text_atomically(out / "audit.html", page(reports, above=(title, heads, rows)))
        text = "\n".join([f"# {title}", "", *markdown_table(heads, rows), "", markdown(reports)])
        write_text_atomically(out / "audit.md", text)
        write_json(out / "audit.json", COMMAND, seed, content)
        screen.print(f"reports -> {out}")
    write_json(json, COMMAND, seed, content)
    for name, reason in failed.items():
        typer.echo(f"error: {name}: {reason}", err=True)
    if failed:
        raise typer.Exit(1)
