"""``knowlab bench sequence``: how many edits in a row a model takes, and where each editor breaks."""

from __future__ import annotations

import hashlib
import json as json_text
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from editors import cli_eval
from editors import cli_options as edit
from editors.cli_bench import settings_by_editor, sources
from lab.cli import options as opt
from lab.cli.cells import CELLS, read_cell, write_cell
from lab.cli.output import check_out, console, progress, table, write_json
from lab.errors import ConfigError

if TYPE_CHECKING:
    from editors.bench import BenchOptions, Workshop
    from editors.sequence_curve import SequencePlan

COMMAND = "bench sequence"
RUNS = "runs"

HELP = """Edit in batches on top of each other, each about subjects of its own, and ask all edits so far again along the way.

N is half of the rank of AlphaEdit's null space (at least 200), and the curve goes on to 2N. Prints efficacy, paraphrase, neighborhood
and relation over all edits at each mark, with 95 % intervals, and says where each editor breaks: efficacy under 0.90, or more than 5
points of neighborhood lost. Neighbors that the same sequence edits are not asked. Writes sequence.json, sequence.html and curve.png
into --out; finished batches are kept in --out/runs and --out/cells, and the same command goes on where it was interrupted.

Example:

    knowlab bench sequence --editors alphaedit,memit --batch 25 --out results/sequence
"""


def bench_sequence(
    editors: Annotated[
        str,
        typer.Option("--editors", "-e", help="Methods with commas between them.", rich_help_panel=edit.PANEL),
    ] = "alphaedit,memit",
    batch: Annotated[
        int, typer.Option("--batch", min=1, help="Cases in one edit.", rich_help_panel=edit.PANEL)
    ] = 25,
    half: Annotated[
        int | None,
        typer.Option(
            "--half",
            min=1,
            help="N, a multiple of --batch; the curve goes on to 2N.",
            rich_help_panel=edit.PANEL,
            show_default="half of the rank of AlphaEdit's null space, at least 200",
        ),
    ] = None,
    suite: Annotated[
        str, typer.Option("--suite", help="Name of the suite.", rich_help_panel=cli_eval.SUITE_PANEL)
    ] = "atlas",
    data: Annotated[
        str | None,
        typer.Option(
            "--data",
            help="The suite's file, or a hub id.",
            rich_help_panel=cli_eval.SUITE_PANEL,
            show_default=False,
        ),
    ] = None,
    split: Annotated[
        cli_eval.Split,
        typer.Option(
            "--split",
            help="For atlas: test for figures, dev for tuning.",
            rich_help_panel=cli_eval.SUITE_PANEL,
        ),
    ] = cli_eval.Split.TEST,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            help="One setting of all editors, `name=value`, or of one, `EDITOR:name=value`; repeatable.",
            rich_help_panel=edit.PANEL,
            show_default=False,
        ),
    ] = None,
    corpus: edit.Corpus = "auto",
    model: opt.Model = "atlas",
    batch_size: Annotated[
        int,
        typer.Option("--batch-size", min=1, help="Rows in one forward pass.", rich_help_panel=opt.RUN_PANEL),
    ] = 64,
    seed: opt.Seed = 0,
    device: opt.Device = "cpu",
    dtype: opt.Dtype = "float32",
    out: opt.Reports = Path("results/sequence"),
    force: opt.Force = False,
    json: opt.Json = None,
) -> None:
    """Edit in batches on top of each other."""
    if not (out / CELLS).is_dir():
        check_out(out, force)
    from editors.bench import BenchOptions, Workshop
    from editors.sequence_curve import curve_plot, page, table_lines, verdict
    from lab.files import replacing
    from lab.records import write_text_atomically

    names = opt.comma_list(editors)
    if not names:
        raise ConfigError("the comparison needs at least one editor")
    options = BenchOptions(
        data=sources(None if data is None else [data], [suite]),
        settings=settings_by_editor(settings, names),
        corpus=corpus,
        fluency=False,
        split=split.value,
        device=device,
        dtype=dtype,
        batch_size=batch_size,
    )
    shop = Workshop(options)
    plan = _plan(shop, options, suite, model, seed, half, batch)
    curves = {}
    with progress() as advance:
        for name in names:
            curves[name] = _run(shop, options, name, suite, model, seed, plan, out, advance)
    said = {name: verdict(rows, plan.half) for name, rows in curves.items()}
    title = f"{plan.edits} edits in batches of {batch}, {suite}, {model}"
    screen = console(json)
    screen.print(table(title, *table_lines(curves)))
    for name, found in said.items():
        screen.print(
            f"{name}: N = {plan.half} {'held' if found['holds_at_n'] else 'not held'}; holds until {found['holds_until']}, "
            f"breaks at {found['breaks_at'] or 'no mark'}"
        )
    content = {
        "suite": suite,
        "model": model,
        "batch": batch,
        "n": plan.half,
        "edits": plan.edits,
        "null_space": {str(layer): rank for layer, rank in plan.ranks.items()},
        "out": out,
        "rows": [{"editor": name, **row} for name, rows in curves.items() for row in rows],
        "verdict": said,
    }
    with replacing(out / "curve.png") as temporary:
        curve_plot(curves, plan.half).savefig(temporary, dpi=120, format="png")
    write_text_atomically(out / "sequence.html", page(curves, plan.half, title))
    write_json(out / "sequence.json", COMMAND, seed, content)
    screen.print(f"reports -> {out}")
    write_json(json, COMMAND, seed, content)


def _plan(
    shop: Workshop, options: BenchOptions, suite: str, model: str, seed: int, half: int | None, batch: int
) -> SequencePlan:
    from editors.alphaedit import AlphaEditor
    from editors.base import get_editor
    from editors.bench import Cell
    from editors.sequence_curve import distinct_cases, half_of, plan_sequence
    from lab.eval.suites import SuiteOptions, get_suite

    handle = shop.open(model)
    cases = shop.cases_of(Cell("alphaedit", suite, model, seed))
    chosen = distinct_cases(get_suite(suite, SuiteOptions(fluency=False)), handle, cases.cases, seed)
    ranks: Mapping[int, int] = {}
    if half is None:
        own = options.settings_of("alphaedit")
        editor = get_editor("alphaedit", corpus=options.corpus, seed=seed, **own)
        if not isinstance(editor, AlphaEditor):
            raise ConfigError("another package has put its own editor in the place of alphaedit; give --half")
        ranks = editor.ranks(handle)
        half = half_of(ranks, batch)
    return plan_sequence(chosen, half, batch, ranks)


def _run(
    shop: Workshop,
    options: BenchOptions,
    name: str,
    suite: str,
    model: str,
    seed: int,
    plan: SequencePlan,
    out: Path,
    advance: Any,
) -> list[dict[str, Any]]:
    from editors.base import get_editor
    from editors.sequence_curve import SequenceRun
    from editors.session_folder import SessionFolder
    from lab.eval.respond import ModelRespondent
    from lab.eval.suites import SuiteOptions, get_suite

    handle, cache = shop.open(model), shop.cache(model)
    cases = [case for batch in plan.batches for case in batch]
    asked = hashlib.sha256(json_text.dumps([asdict(case) for case in cases], default=str).encode())
    own = options.settings_of(name)
    identity = {
        "model": handle.fingerprint,
        "editor": name,
        "settings": own,
        "corpus": options.corpus,
        "seed": seed,
        "cases": asked.hexdigest(),
        "batches": [len(batch) for batch in plan.batches],
    }
    stem = f"{name}-{hashlib.sha256(json_text.dumps(identity, default=str).encode()).hexdigest()[:12]}"
    run = SequenceRun(
        get_suite(suite, SuiteOptions(fluency=False)),
        handle,
        plan,
        ModelRespondent(handle, batch_size=options.batch_size),
        cache,
        SessionFolder(out / RUNS / stem, identity, handle),
        lambda edits: _recalled(out / CELLS / f"{stem}-{edits}.json"),
        lambda edits, row: write_cell(out / CELLS / f"{stem}-{edits}.json", row),
        lambda stage, done, total: advance(f"{name}: {stage}", done, total),
    )
    return run.execute(get_editor(name, corpus=options.corpus, seed=seed, **own))


def _recalled(file: Path) -> dict[str, Any] | None:
    row = read_cell(file)
    return None if row is None else {name: value for name, value in row.items() if name != "schema_version"}
