"""Commands that change what a model knows: ``edit``, ``eval``, ``bench``, ``train-editor``, ``tune``, ``unlearn`` and ``demo``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from editors import (
    cli_bench,
    cli_bench_audit,
    cli_bench_priming,
    cli_bench_restor,
    cli_bench_sadr,
    cli_bench_sequence,
    cli_bench_unlearning,
    cli_eval,
    cli_train,
    cli_tune,
    cli_unlearn,
)
from editors import cli_options as options
from lab.cli import options as opt
from lab.cli.output import check_out, console, progress, table, write_json
from lab.errors import ConfigError, PatchError, RequestError

if TYPE_CHECKING:
    from lab.handle import ModelHandle
    from lab.records import EditRequest

app = typer.Typer()
app.add_typer(cli_eval.app)
# With `bench sadr`, which joins the same group.
app.add_typer(cli_bench_sadr.app)
cli_bench.bench.command("unlearning", help=cli_bench_unlearning.HELP)(cli_bench_unlearning.bench_unlearning)
cli_bench.bench.command("sequence", help=cli_bench_sequence.HELP)(cli_bench_sequence.bench_sequence)
cli_bench.bench.command("audit", help=cli_bench_audit.HELP)(cli_bench_audit.bench_audit)
cli_bench.bench.command("restor", help=cli_bench_restor.HELP)(cli_bench_restor.bench_restor)
cli_bench.bench.command("priming", help=cli_bench_priming.HELP)(cli_bench_priming.bench_priming)
app.add_typer(cli_train.app)
app.add_typer(cli_tune.app)
app.add_typer(cli_unlearn.app)

EditorSpec = Annotated[
    str,
    typer.Option(
        "--editor",
        "-e",
        help="Method, with penalties after a plus: rome, memit, rome+sadr (`knowlab list editors`).",
        rich_help_panel=options.PANEL,
    ),
]

_EDIT_HELP = """Change what a model says about a subject, prove that the change comes off again, and save it as a patch.

Examples:

    knowlab edit --prompt "The capital of {} is" --subject France --target Rome --out edits/rome

    knowlab edit --editor memit+sadr --requests facts.jsonl --out edits/batch --json edit.json

A requests file holds facts as JSON lines; `object` is what the model shall say: {"id": "a", "subject": "France",
"relation": "capital", "object": "Rome", "aliases": [], "prompt": "The capital of {} is"}
"""


# What the demo shows on the terminal; its page has everything.
MAIN_FIGURES = ("efficacy", "paraphrase", "neighborhood", "distract_neighborhood", "relation", "score")


@dataclass(frozen=True)
class Reply:
    """What a model says after a prompt, and how likely the target is (exp of the mean token log-probability)."""

    completion: str
    p_target: float

    def to_json(self) -> dict[str, Any]:
        """Returns plain values."""
        return {"completion": self.completion, "p_target": self.p_target}


def reply(handle: ModelHandle, requests: list[EditRequest], max_new_tokens: int = 12) -> list[Reply]:
    """Asks each request's own prompt."""
    from lab.scoring import score_targets

    texts = [request.text for request in requests]
    completions = handle.generate(texts, max_new_tokens=max_new_tokens, stop=(".\n", "\n"))
    scores = score_targets(handle, [(request.text, request.target_new) for request in requests])
    return [Reply(text.strip(), score.probability) for text, score in zip(completions, scores, strict=True)]


def _requests(
    file: Path | None, prompt: str | None, subject: str | None, target: str | None
) -> list[EditRequest]:
    from lab.records import EditRequest, read_facts

    single = (prompt, subject, target)
    if file is not None:
        if any(value is not None for value in single):
            raise ConfigError("give either --requests, or --prompt with --subject and --target")
        facts = read_facts(file)
        made = [
            EditRequest(fact.id or f"{file.name}:{number}", fact.prompt, fact.subject, fact.object)
            for number, fact in enumerate(facts, start=1)
        ]
        if len({request.id for request in made}) < len(made):
            raise RequestError(f"{file}: two facts have the same id")
        return made
    if prompt is None or subject is None or target is None:
        raise ConfigError("give --prompt, --subject and --target, or --requests FILE")
    if "{}" in prompt:
        return [EditRequest("request", prompt, subject, target)]
    return [EditRequest.from_text("request", prompt, subject, target)]


def _side(replies: list[Reply]) -> dict[str, Any]:
    if len(replies) == 1:
        return replies[0].to_json()
    mean = sum(one.p_target for one in replies) / len(replies)
    return {"completion": [one.completion for one in replies], "p_target": mean}


@app.command(help=_EDIT_HELP)
def edit(
    prompt: Annotated[
        str | None,
        typer.Option(
            "--prompt",
            help="Prompt with `{}` where the subject goes.",
            rich_help_panel=options.PANEL,
            show_default=False,
        ),
    ] = None,
    subject: Annotated[
        str | None,
        typer.Option(
            "--subject", help="Who or what it is about.", rich_help_panel=options.PANEL, show_default=False
        ),
    ] = None,
    target: Annotated[
        str | None,
        typer.Option(
            "--target", help="What the model shall say.", rich_help_panel=options.PANEL, show_default=False
        ),
    ] = None,
    requests: Annotated[
        Path | None,
        typer.Option(
            "--requests",
            help="Facts (JSONL) to teach instead.",
            rich_help_panel=options.PANEL,
            show_default=False,
        ),
    ] = None,
    editor: EditorSpec = "rome",
    preset: options.Preset = None,
    settings: options.Settings = None,
    corpus: options.Corpus = "auto",
    model: opt.Model = "atlas",
    patch: opt.Patches = None,
    seed: opt.Seed = 0,
    device: opt.Device = "cpu",
    dtype: opt.Dtype = "float32",
    quantize: opt.Quantize = None,
    out: opt.Out = None,
    force: opt.Force = False,
    json: opt.Json = None,
) -> None:
    """Change what a model says about a subject."""
    wanted = _requests(requests, prompt, subject, target)
    if out is not None:
        check_out(out, force)
    from editors import get_editor
    from lab.cli.session import open_model
    from lab.patch import WeightPatch

    method = get_editor(editor, preset=preset, corpus=corpus, seed=seed, **options.overrides(settings))
    handle = open_model(model, patch, device=device, dtype=dtype, quantize=quantize)
    before = reply(handle, wanted)
    bits, state = handle.weights_digest(), handle.state
    with progress() as advance:
        change = method.edit(handle, wanted, progress=advance)
    with change.applied(handle):
        after = reply(handle, wanted)
    identical = handle.weights_digest() == bits and handle.state == state
    saved = change.save(out, overwrite=force) if out is not None else None

    rows = [
        (
            request.text,
            request.target_new,
            first.completion,
            first.p_target,
            second.completion,
            second.p_target,
        )
        for request, first, second in zip(wanted, before, after, strict=True)
    ]
    screen = console(json)
    columns = ("prompt", "target", "before", "p(target)", "after", "p(target)")
    screen.print(table(f"{editor} on {model}", columns, rows))
    weights = isinstance(change, WeightPatch)
    size = {"rank": change.rank} if weights else {"kind": change.memory.kind}
    what = f"rank: {change.rank}" if weights else f"memory: {change.memory.kind}"
    screen.print(
        f"undo bit-identical: {'yes' if identical else 'NO'}   {what}   saved: {saved or 'no (give --out)'}"
    )
    items = [
        {**request.to_json(), "before": first.to_json(), "after": second.to_json()}
        for request, first, second in zip(wanted, before, after, strict=True)
    ]
    content = {
        "model": model,
        "editor": editor,
        "before": _side(before),
        "after": _side(after),
        "patch": {"path": saved, "id": change.id, **size},
        "undo": {"bit_identical": identical},
        "items": items,
    }
    write_json(json, "edit", seed, content)
    if not identical:
        raise PatchError("taking the patch off did not restore the weights bit for bit; reload the model")


_DEMO_HELP = """The main job in small: edit facts that the built-in model knows with ROME and with ROME+SADR, show what it says before
and after, where the heads look, and that every edit comes off bit for bit. Writes demo.html.

Examples:

    knowlab demo

    knowlab demo --limit 10 --editor memit --editor memit+sadr --out results/memit
"""


@app.command(help=_DEMO_HELP)
def demo(
    editor: Annotated[
        list[str] | None,
        typer.Option(
            "--editor",
            "-e",
            help="Method; repeatable.",
            rich_help_panel=options.PANEL,
            show_default="rome, rome+sadr",
        ),
    ] = None,
    limit: Annotated[
        int, typer.Option("--limit", min=1, help="How many facts to edit.", rich_help_panel=opt.RUN_PANEL)
    ] = 5,
    model: opt.Model = "atlas",
    patch: opt.Patches = None,
    seed: opt.Seed = 0,
    device: opt.Device = "cpu",
    dtype: opt.Dtype = "float32",
    quantize: opt.Quantize = None,
    out: Annotated[
        Path,
        typer.Option(
            "--out", "-o", help="Folder for demo.html; must be empty.", rich_help_panel=opt.OUTPUT_PANEL
        ),
    ] = Path("results/demo"),
    force: opt.Force = False,
    json: opt.Json = None,
) -> None:
    """Edit facts, look at everything around them, take the edits off again."""
    check_out(out, force)
    from editors import get_editor
    from editors.demo import choose_cases, run_demo
    from editors.demo_page import demo_page
    from lab.cli.session import open_model
    from lab.records import write_text_atomically

    names = list(dict.fromkeys(editor or ("rome", "rome+sadr")))
    methods = {name: get_editor(name, seed=seed) for name in names}
    handle = open_model(model, patch, device=device, dtype=dtype, quantize=quantize)
    cases = choose_cases(handle, limit, seed)
    with progress() as advance:
        found = run_demo(handle, methods, cases, seed=seed, progress=advance)
    screen = console(json)
    for case in found.cases:
        (request,) = case.requests
        rows = [
            (line.kind, line.prompt, line.before, *(line.after[name] for name in names))
            for line in found.lines
            if line.case == case.id
        ]
        heading = f"{request.text} {request.target_old} -> {request.target_new}"
        screen.print(table(heading, ("kind", "prompt", "before", *names), rows))
    columns = [
        ("before", found.reports[0].before),
        *((report.editor, report.metrics) for report in found.reports),
    ]
    figures = [
        (name, *(metrics[name].mean for _, metrics in columns))
        for name in MAIN_FIGURES
        if name in columns[0][1]
    ]
    screen.print(
        table("Fractions over the edited facts", ("figure", *(head for head, _ in columns)), figures)
    )
    drift = [(name, max(float(value) for value in report.max_head)) for name, report in found.drift.items()]
    screen.print(
        table("Attention to the edited subject: largest head drift of any layer", ("editor", "drift"), drift)
    )
    for name, held in found.undone.items():
        screen.print(f"{name}: every edit undone, weights bit-identical: {'yes' if held else 'NO'}")
    page = out / "demo.html"
    write_text_atomically(page, demo_page(found))
    screen.print(f"{found.seconds:.1f} s, report -> {page}")
    write_json(json, "demo", seed, {**found.to_json(), "report": page})
    if not all(found.undone.values()):
        raise PatchError("an edit did not come off bit for bit; reload the model")
