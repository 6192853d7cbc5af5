"""``knowlab bench editing``: editors x suites x models x seeds to one comparison."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from editors import cli_eval
from editors import cli_options as edit
from lab.cli import options as opt
from lab.cli.cells import CELLS, read_cell, write_cell
from lab.cli.output import check_out, console, document, progress, table, write_json
from lab.errors import ConfigError

if TYPE_CHECKING:
    from editors.bench import BenchOptions, Cell, Row

app = typer.Typer()
bench = typer.Typer(help="Comparisons over many runs.", no_args_is_help=True)
app.add_typer(bench, name="bench")

COMMAND = "bench editing"

_HELP = """Compare editors: every editor on every suite, model and seed, to one table with intervals, time and memory.

Writes bench.json, .html, .md, .csv and .tex into --out. Each finished run is kept in --out/cells; the same command goes on where
it was interrupted, and runs again only what other options change. `--editors` takes names with commas between them.

Examples:

    knowlab bench editing --suite atlas --editors rome,rome+sadr,memit --limit 50 --out results/atlas

    knowlab bench editing --suite counterfact --suite zsre --data counterfact=cf.json --data zsre=zsre.json --model path/to/model
    --editors rome,memit --seed 0 --seed 1 --protocol sequential --workers 4
"""


@bench.command("editing", help=_HELP)
def bench_editing(
    suite: Annotated[
        list[str] | None,
        typer.Option(
            "--suite",
            help="Name of a suite (`knowlab list suites`); repeatable.",
            rich_help_panel=cli_eval.SUITE_PANEL,
            show_default="atlas",
        ),
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(
            "--data",
            help="A suite's file or hub id; SUITE=FILE where several suites need one. Repeatable.",
            rich_help_panel=cli_eval.SUITE_PANEL,
            show_default=False,
        ),
    ] = None,
    editors: Annotated[
        str,
        typer.Option(
            "--editors",
            "-e",
            help="Methods with commas between them: rome,rome+sadr,memit.",
            rich_help_panel=edit.PANEL,
        ),
    ] = "rome,rome+sadr",
    model: Annotated[
        list[str] | None,
        typer.Option(
            "--model",
            "-m",
            help="A built-in model, a folder, or a Hugging Face id; repeatable.",
            rich_help_panel=opt.MODEL_PANEL,
            show_default="atlas",
        ),
    ] = None,
    seed: opt.Seeds = None,
    protocol: Annotated[
        cli_eval.Protocol,
        typer.Option(
            "--protocol",
            help="single: each case edits the model as it was; batch: all in one patch; sequential: patch on patch.",
            rich_help_panel=cli_eval.SUITE_PANEL,
        ),
    ] = cli_eval.Protocol.SINGLE,
    split: Annotated[
        cli_eval.Split,
        typer.Option(
            "--split",
            help="For atlas: test for figures, dev for tuning.",
            rich_help_panel=cli_eval.SUITE_PANEL,
        ),
    ] = cli_eval.Split.TEST,
    convention: Annotated[
        cli_eval.Convention,
        typer.Option(
            "--convention", help="For zsre: which answer is taught.", rich_help_panel=cli_eval.SUITE_PANEL
        ),
    ] = cli_eval.Convention.EASYEDIT,
    fluency: Annotated[
        bool | None,
        typer.Option(
            "--fluency/--no-fluency",
            help="Generate texts and measure their entropy.",
            rich_help_panel=cli_eval.SUITE_PANEL,
            show_default="as the suites do in print",
        ),
    ] = None,
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
    limit: opt.Limit = None,
    known_only: opt.KnownOnly = False,
    skip_malformed: opt.SkipMalformed = False,
    batch_size: Annotated[
        int,
        typer.Option("--batch-size", min=1, help="Rows in one forward pass.", rich_help_panel=opt.RUN_PANEL),
    ] = 64,
    workers: Annotated[
        int,
        typer.Option(
            "--workers",
            min=1,
            help="Runs at a time, each in a process of its own.",
            rich_help_panel=opt.RUN_PANEL,
        ),
    ] = 1,
    threads: Annotated[
        int | None,
        typer.Option(
            "--threads",
            min=1,
            help="Torch threads of each run.",
            rich_help_panel=opt.RUN_PANEL,
            show_default="all cores, shared by the workers",
        ),
    ] = None,
    ray: Annotated[
        str | None,
        typer.Option(
            "--ray",
            help="Run on Ray instead: local, auto, or host:port of a cluster.",
            rich_help_panel=opt.RUN_PANEL,
            show_default=False,
        ),
    ] = None,
    general_ability: Annotated[
        str | None,
        typer.Option(
            "--general-ability",
            help="Tasks of lm-eval, with commas between them, asked before and under the edits.",
            rich_help_panel=cli_eval.SUITE_PANEL,
            show_default=False,
        ),
    ] = None,
    task_path: Annotated[
        Path | None,
        typer.Option(
            "--task-path",
            help="Folder with further tasks of lm-eval (YAML).",
            rich_help_panel=cli_eval.SUITE_PANEL,
            show_default=False,
        ),
    ] = None,
    task_limit: Annotated[
        int | None,
        typer.Option(
            "--task-limit",
            min=1,
            help="Rows of each task of lm-eval.",
            rich_help_panel=cli_eval.SUITE_PANEL,
            show_default="all",
        ),
    ] = None,
    device: opt.Device = "cpu",
    dtype: opt.Dtype = "float32",
    quantize: opt.Quantize = None,
    out: opt.Reports = Path("results/bench"),
    force: opt.Force = False,
    json: opt.Json = None,
) -> None:
    """Compare editors over suites, models and seeds."""
    if not (out / CELLS).is_dir():
        check_out(out, force)
    from editors.bench import BenchOptions, cell_file, plan_cells
    from editors.bench_ability import ability_lines
    from editors.bench_report import Comparison, columns
    from lab.eval.render import rich_table

    tasks = tuple(opt.comma_list(general_ability or ""))
    if tasks:
        from lab.eval.lm_eval import require_lm_eval

        require_lm_eval()
    elif task_path is not None or task_limit is not None:
        raise ConfigError("--task-path and --task-limit belong to --general-ability")
    names = opt.comma_list(editors)
    suites, seeds = suite or ["atlas"], seed or [0]
    cells = plan_cells(names, suites, model or ["atlas"], seeds)
    options = BenchOptions(
        data=sources(data, suites),
        limit=limit,
        protocol=protocol.value,
        settings=settings_by_editor(settings, names),
        corpus=corpus,
        fluency=fluency,
        split=split.value,
        convention=convention.value,
        known_only=known_only,
        skip_malformed=skip_malformed,
        device=device,
        dtype=dtype,
        quantize=quantize,
        general_ability=tasks,
        task_path=None if task_path is None else str(task_path),
        task_limit=task_limit,
        batch_size=batch_size,
        threads=threads if threads is not None else _share(workers),
    )
    files = {cell: out / CELLS / cell_file(cell, options) for cell in cells}
    rows = {cell: found for cell, file in files.items() if (found := read_cell(file)) is not None}
    kept = len(rows)
    with progress() as advance:
        _run([cell for cell in cells if cell not in rows], options, workers, ray, files, rows, advance)
    found = Comparison.of([rows[cell] for cell in cells])
    screen = console(json)
    heads, lines = found.overview()
    screen.print(table("Editors compared", heads, lines))
    for group in found.groups():
        screen.print(rich_table(columns(group)))
    if lines := ability_lines(found.rows):
        heads = ("editor", "suite", "model", "task", "metric", "before", "after")
        screen.print(table("General ability", heads, lines))
    content = found.to_json() | {
        "seeds": seeds,
        "protocol": protocol.value,
        "limit": limit,
        "kept": kept,
        "out": out,
    }
    if found.entries:
        found.save(out, document(COMMAND, seeds[0], content))
        screen.print(f"{len(cells)} runs, {kept} of them finished before; reports -> {out}")
    write_json(json, COMMAND, seeds[0], content)
    for row in found.failed:
        typer.echo(f"error: {row['editor']} on {row['suite']}, {row['model']}: {row['error']}", err=True)
    if found.failed:
        raise typer.Exit(1)
    if any(row["too_many_skipped"] for row in rows.values()):
        typer.echo(
            "error: more than 5 % of some run's rows were skipped; its figures may be biased", err=True
        )
        raise typer.Exit(cli_eval.EXIT_SKIPPED)


def _run(
    cells: list[Cell],
    options: BenchOptions,
    workers: int,
    ray: str | None,
    files: dict[Cell, Path],
    rows: dict[Cell, Row],
    advance: Any,
) -> None:
    """Runs what is not finished; every finished cell is written before the next one is asked for."""
    from editors.bench_pool import load_ray, run_here, run_in_processes, run_on_ray

    total = len(files)
    advance("runs", total - len(cells), total)

    def done(cell: Cell, row: Row) -> None:
        rows[cell] = write_cell(files[cell], row)
        advance("runs", len(rows), total)

    if ray is not None:
        run_on_ray(load_ray(), ray, cells, options, workers, done)
    elif workers > 1:
        run_in_processes(cells, options, workers, done)
    else:
        run_here(cells, options, done)


def _share(workers: int) -> int | None:
    """Torch threads of one of several workers; ``None`` leaves a single one alone."""
    import os

    return None if workers == 1 else max(1, (os.cpu_count() or 1) // workers)


def sources(words: list[str] | None, suites: list[str]) -> dict[str, str]:
    """``SUITE=FILE`` words as a table; a plain word belongs to the one suite that takes a file.

    Raises:
        ConfigError: A word names a suite that is not compared, or it is not clear whose it is.
    """
    from lab.eval.sources import BUILT_IN

    takers = [name for name in dict.fromkeys(suites) if name not in BUILT_IN]
    found: dict[str, str] = {}
    for word in words or ():
        name, equals, file = word.partition("=")
        if not equals or name not in suites:
            if len(takers) != 1:
                raise ConfigError(
                    f"--data {word!r} must say whose it is: SUITE=FILE with one of {', '.join(takers) or 'no suite'}"
                )
            name, file = takers[0], word
        if name in BUILT_IN:
            raise ConfigError(f"the suite {name} is built in; it takes --split, not --data")
        if name in found:
            raise ConfigError(f"--data names two files for the suite {name}")
        found[name] = file
    return found


def settings_by_editor(words: list[str] | None, editors: list[str]) -> dict[str, dict[str, Any]]:
    """``name=value`` and ``EDITOR:name=value`` words as one table per editor; those of all stand under an empty name.

    Raises:
        ConfigError: A word is neither, or names an editor that is not compared.
    """
    found: dict[str, dict[str, Any]] = {}
    for word in words or ():
        owner, colon, rest = word.partition(":")
        mine = bool(colon) and "=" not in owner
        if mine and owner not in editors:
            raise ConfigError(f"--set {word!r} is for {owner!r}, which is not compared: {', '.join(editors)}")
        found.setdefault(owner if mine else "", {}).update(edit.overrides([rest if mine else word]))
    return found
