"""``knowlab eval``: a suite before and after edits."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from editors import cli_options as edit
from lab.cli import options as opt
from lab.cli.output import check_out, console, progress, table, write_json
from lab.errors import ConfigError

app = typer.Typer()

EXIT_SKIPPED = 3
REPORT_FORMS = ("json", "html", "md", "csv", "tex")
SUITE_PANEL = "Suite"

_HELP = """Edit the facts of a suite and measure what changed: the edit itself, its wordings, its neighborhood.

Suites: counterfact, knowedit, zsre, mquake, sadr, atlas, atlas_chains (`knowlab list suites`); without edits: preference.
A row that breaks the file's schema
stops the run with file and line; a row that the method cannot take is listed under `skipped` and another is drawn. More than 5 %
skipped ends with exit code 3. Without `--editor` the model is measured as it is.

Examples:

    knowlab eval atlas --editor rome+sadr --limit 50 --json report.json

    knowlab eval counterfact --data counterfact.json --model path/to/model --editor memit --limit 200 --out results/memit
"""


class Protocol(StrEnum):
    """How the edits of several cases meet."""

    SINGLE = "single"
    BATCH = "batch"
    SEQUENTIAL = "sequential"


class Split(StrEnum):
    """Part of the built-in world."""

    TEST = "test"
    DEV = "dev"


class Convention(StrEnum):
    """Which answer zsRE edits towards."""

    EASYEDIT = "easyedit"
    ROME = "rome"


@app.command("eval", help=_HELP)
def evaluate_suite(
    suite: Annotated[str, typer.Argument(help="Name of the suite.", show_default=False)],
    data: Annotated[
        str | None,
        typer.Option(
            "--data",
            help="The suite's file, or a hub id.",
            rich_help_panel=SUITE_PANEL,
            show_default="the suite's hub id",
        ),
    ] = None,
    split: Annotated[
        Split,
        typer.Option(
            "--split", help="For atlas: test for figures, dev for tuning.", rich_help_panel=SUITE_PANEL
        ),
    ] = Split.TEST,
    protocol: Annotated[
        Protocol,
        typer.Option(
            "--protocol",
            help="single: each case edits the model as it was; batch: all in one patch; sequential: patch on patch.",
            rich_help_panel=SUITE_PANEL,
        ),
    ] = Protocol.SINGLE,
    convention: Annotated[
        Convention,
        typer.Option("--convention", help="For zsre: which answer is taught.", rich_help_panel=SUITE_PANEL),
    ] = Convention.EASYEDIT,
    fluency: Annotated[
        bool | None,
        typer.Option(
            "--fluency/--no-fluency",
            help="Generate texts and measure their entropy.",
            rich_help_panel=SUITE_PANEL,
            show_default="as the suite does in print",
        ),
    ] = None,
    editor: Annotated[
        str | None,
        typer.Option(
            "--editor",
            "-e",
            help="Method, with penalties after a plus: rome, memit+sadr.",
            rich_help_panel=edit.PANEL,
            show_default="none",
        ),
    ] = None,
    preset: edit.Preset = None,
    settings: edit.Settings = None,
    corpus: edit.Corpus = "auto",
    model: opt.Model = "atlas",
    oracle: Annotated[
        str | None,
        typer.Option(
            "--oracle",
            help="For tofu: the model trained without the forget set, a name or a folder.",
            rich_help_panel=SUITE_PANEL,
            show_default="none",
        ),
    ] = None,
    patch: opt.Patches = None,
    limit: opt.Limit = None,
    known_only: opt.KnownOnly = False,
    skip_malformed: opt.SkipMalformed = False,
    batch_size: Annotated[
        int,
        typer.Option("--batch-size", min=1, help="Rows in one forward pass.", rich_help_panel=opt.RUN_PANEL),
    ] = 64,
    seed: opt.Seed = 0,
    device: opt.Device = "cpu",
    dtype: opt.Dtype = "float32",
    quantize: opt.Quantize = None,
    out: opt.Out = None,
    force: opt.Force = False,
    json: opt.Json = None,
) -> None:
    """Edit the facts of a suite and measure what changed."""
    if out is not None:
        check_out(out, force)
    from lab.eval.evaluations import EvaluationRequest, evaluations

    others = evaluations()
    if suite in others:
        if editor is not None or preset or settings or known_only:
            raise ConfigError(f"{suite!r} edits nothing: --editor and its options belong to suites of edits")
        from lab.cli.session import open_model

        handle = open_model(model, patch, device=device, dtype=dtype)
        other = None if oracle is None else open_model(oracle, device=device, dtype=dtype)
        found = others.get(suite)(EvaluationRequest(handle, data, split.value, limit, seed, other))
        _show(suite, model, found, seed, out, json)
        return
    if oracle is not None:
        raise ConfigError(
            f"--oracle belongs to evaluations that compare with one, such as tofu, not to {suite!r}"
        )
    from lab.eval import SuiteOptions, get_suite

    benchmark = get_suite(suite, SuiteOptions(fluency=fluency, convention=convention.value))
    method: Any = None
    if editor is not None:
        from editors import get_editor

        method = get_editor(editor, preset=preset, corpus=corpus, seed=seed, **edit.overrides(settings))
    elif preset or settings:
        raise ConfigError("--preset and --set belong to --editor")
    from lab.cli.session import open_model
    from lab.eval import ModelRespondent, evaluate, evaluate_editing, suite_cases

    cases = suite_cases(
        suite, data, split=split.value, seed=seed, skip_malformed=skip_malformed, convention=convention.value
    )
    handle = open_model(model, patch, device=device, dtype=dtype, quantize=quantize)
    with progress() as advance:
        if method is None:
            if known_only:
                raise ConfigError("--known-only belongs to --editor")
            report = evaluate(
                benchmark,
                ModelRespondent(handle, batch_size=batch_size),
                cases.cases,
                model=model,
                limit=limit,
                seed=seed,
            )
        else:
            report = evaluate_editing(
                benchmark,
                handle,
                method,
                cases,
                limit=limit,
                seed=seed,
                protocol=protocol.value,
                known_only=known_only,
                name=editor or "",
                batch_size=batch_size,
                progress=advance,
                settings={
                    "preset": preset,
                    "overrides": edit.overrides(settings),
                    "corpus": corpus,
                    "fluency": fluency,
                },
            )
    screen = console(json)
    screen.print(report.table())
    if out is not None:
        for form in REPORT_FORMS:
            report.save(out / f"report.{form}")
        screen.print(f"reports -> {out}")
    write_json(json, "eval", seed, report.to_json())
    if report.too_many_skipped:
        typer.echo(
            f"error: {len(report.skipped)} rows were skipped, more than 5 %; the figures may be biased",
            err=True,
        )
        raise typer.Exit(EXIT_SKIPPED)


def _show(
    suite: str, model: str, found: Mapping[str, Any], seed: int, out: Path | None, json: Path | None
) -> None:
    """Prints and writes the figures of an evaluation that edits nothing."""
    screen = console(json)
    columns = ("metric", "mean", "low", "high", "n")
    figures = [(name, *(value[key] for key in columns[1:])) for name, value in found["metrics"].items()]
    screen.print(table(f"{suite} on {model}", columns, figures))
    content = {"suite": suite, "model": model, **found}
    write_json(json, "eval", seed, content)
    if out is not None:
        write_json(out / "report.json", "eval", seed, content)
        screen.print(f"report -> {out}")
