"""Commands over the ledger: ``ledger list|edit|forget|apply|restore|rollback|reconcile|check``, and ``serve``."""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lab.cli import options as opt
from lab.cli.output import console, table, write_json
from lab.errors import ConfigError, RequestError

if TYPE_CHECKING:
    from lab.handle import ModelHandle
    from rag.ledger import Entry, Ledger, Outcome
    from rag.store import DocumentStore

app = typer.Typer()
ledger_app = typer.Typer(
    name="ledger",
    help="Change what is held true, in weights and documents at once, and take it back.",
    no_args_is_help=True,
)
app.add_typer(ledger_app)

PANEL = "Ledger"

Folder = Annotated[Path, typer.Option("--ledger", help="Folder of the ledger.", rich_help_panel=PANEL)]
Store = Annotated[
    Path | None,
    typer.Option(
        "--store", help="Index of documents (`knowlab rag index`).", rich_help_panel=PANEL, show_default=False
    ),
]
Documents = Annotated[
    Path | None,
    typer.Option(
        "--documents",
        help="Folder of text files, read at every start, instead of an index.",
        rich_help_panel=PANEL,
        show_default=False,
    ),
]
Subject = Annotated[str, typer.Option("--subject", help="Who or what it is about.", rich_help_panel=PANEL)]
Relation = Annotated[
    str, typer.Option("--relation", help="Which of its attributes: capital.", rich_help_panel=PANEL)
]
Object = Annotated[
    str,
    typer.Option(
        "--object",
        help="What has been right so far, where the built-in world does not know.",
        rich_help_panel=PANEL,
        show_default=False,
    ),
]
Prompt = Annotated[
    str,
    typer.Option(
        "--prompt",
        help="Cloze with `{}` for the subject, where the built-in world has none.",
        rich_help_panel=PANEL,
        show_default=False,
    ),
]
OnConflict = Annotated[
    str,
    typer.Option(
        "--on-conflict",
        help="What happens to documents that say otherwise: edit_wins, annotate, rewrite, doc_wins or ask.",
        rich_help_panel=PANEL,
    ),
]
Read = Annotated[
    bool,
    typer.Option(
        "--read-documents/--match-words",
        help="Find conflicts by the model's notes on each document, or by words alone.",
        rich_help_panel=PANEL,
    ),
]
_HOME = Path("ledger")


def _store(store: Path | None, documents: Path | None, *, write: bool) -> DocumentStore:
    from rag.store import MemoryStore

    if store is not None and documents is not None:
        raise ConfigError("give --store or --documents, not both")
    if store is not None:
        from rag.index import open_index

        return open_index(store, write=write)
    if documents is not None:
        from rag.app.service import read_folder

        return MemoryStore(read_folder(documents))
    return MemoryStore()


def _open(
    folder: Path, store: DocumentStore, handle: ModelHandle | None, *, read: bool = False, write: bool = True
) -> Ledger:
    from rag.ledger import HandleWeights, Ledger, NotesFinder

    finder = NotesFinder(handle) if read and handle is not None else None
    weights = HandleWeights(handle) if handle is not None else None
    return Ledger(folder, store, weights, finder=finder, write=write)


def _say(command: str, outcome: Outcome, json: Path | None, **more: Any) -> None:
    screen = console(json)
    if outcome.conflicts:
        rows = [(one.source, one.label, one.value, one.scorer) for one in outcome.conflicts]
        screen.print(table("Documents that say otherwise", ("document", "says", "object", "found by"), rows))
    said = f"entry {outcome.entry}, {len(outcome.changed)} chunks changed" if outcome.done else outcome.reason
    screen.print(said, markup=False)
    if outcome.stale:
        later = ", ".join(str(number) for number in outcome.stale)
        screen.print(f"later entries in force were computed on top of it: {later}", markup=False)
    write_json(json, command, more.pop("seed", None), {**outcome.to_json(), **more})
    if not outcome.done:
        raise typer.Exit(1)


@ledger_app.command()
def edit(
    subject: Subject,
    relation: Relation,
    target: Annotated[str, typer.Option("--target", help="The new object.", rich_help_panel=PANEL)],
    object: Object = "",
    prompt: Prompt = "",
    editor: Annotated[
        str, typer.Option("--editor", "-e", help="`knowlab list editors`.", rich_help_panel=PANEL)
    ] = "rome",
    on_conflict: OnConflict = "edit_wins",
    read: Read = False,
    ledger: Folder = _HOME,
    store: Store = None,
    documents: Documents = None,
    model: opt.Model = "atlas",
    patch: opt.Patches = None,
    seed: opt.Seed = 0,
    device: opt.Device = "cpu",
    dtype: opt.Dtype = "float32",
    json: opt.Json = None,
) -> None:
    """Change a fact in the weights, in the ledger and for the documents, or nowhere."""
    from lab.cli.session import open_model
    from rag.facts import named_fact, names_of, question_of
    from rag.makers import edit_maker

    policy = _policy(on_conflict)
    fact = named_fact(subject, relation, object=object, prompt=prompt)
    handle = open_model(model, patch, device=device, dtype=dtype)
    make = edit_maker(handle, editor, fact, target, seed=seed)
    with _open(ledger, _store(store, documents, write=True), handle, read=read) as book:
        outcome = book.edit(
            fact, target, make, on_conflict=policy, question=question_of(fact), names=names_of(fact)
        )
    _say("ledger edit", outcome, json, seed=seed, model=model, editor=editor)


@ledger_app.command()
def forget(
    subject: Subject,
    relation: Relation,
    object: Object = "",
    prompt: Prompt = "",
    method: Annotated[
        str,
        typer.Option(
            "--method",
            help="An unlearner or an editor, which then teaches `unknown`; `none` where the model does not know it.",
            rich_help_panel=PANEL,
        ),
    ] = "rome",
    on_conflict: OnConflict = "edit_wins",
    read: Read = False,
    ledger: Folder = _HOME,
    store: Store = None,
    documents: Documents = None,
    model: opt.Model = "atlas",
    patch: opt.Patches = None,
    seed: opt.Seed = 0,
    device: opt.Device = "cpu",
    dtype: opt.Dtype = "float32",
    json: opt.Json = None,
) -> None:
    """Have a fact forgotten by the model and blocked in the documents."""
    from lab.cli.session import open_model
    from rag.facts import named_fact, names_of, question_of
    from rag.makers import forget_maker

    policy = _policy(on_conflict)
    fact = named_fact(subject, relation, object=object, prompt=prompt)
    handle = open_model(model, patch, device=device, dtype=dtype)
    make = None if method == "none" else forget_maker(handle, method, fact, seed=seed)
    with _open(ledger, _store(store, documents, write=True), handle, read=read) as book:
        outcome = book.forget(
            fact, make, on_conflict=policy, question=question_of(fact), names=names_of(fact)
        )
    _say("ledger forget", outcome, json, seed=seed, model=model, method=method)


_APPLY = """Carry out the changes of a file, one transaction a line, in their order; stops at the first that is refused.

A line is a fact in the one file form of all commands, and what becomes of it in `op`: `edit` (the default: `object` is what the
model shall say), `forget` or `restore`. What was carried out before a refusal stays; `knowlab ledger rollback` takes it back.
"""


@ledger_app.command("apply", help=_APPLY)
def apply_file(
    file: Annotated[Path, typer.Argument(help="JSON lines: subject, relation, object, op.")],
    editor: Annotated[
        str, typer.Option("--editor", "-e", help="`knowlab list editors`.", rich_help_panel=PANEL)
    ] = "rome",
    method: Annotated[
        str,
        typer.Option("--method", help="For `forget`: as for `knowlab ledger forget`.", rich_help_panel=PANEL),
    ] = "rome",
    on_conflict: OnConflict = "edit_wins",
    read: Read = False,
    ledger: Folder = _HOME,
    store: Store = None,
    documents: Documents = None,
    model: opt.Model = "atlas",
    patch: opt.Patches = None,
    seed: opt.Seed = 0,
    device: opt.Device = "cpu",
    dtype: opt.Dtype = "float32",
    json: opt.Json = None,
) -> None:
    """Carry out the changes of a file."""
    from lab.cli.session import open_model
    from rag.changes import carry_out, read_changes

    policy = _policy(on_conflict)
    changes = read_changes(file)
    handle = open_model(model, patch, device=device, dtype=dtype)
    outcomes = []
    with _open(ledger, _store(store, documents, write=True), handle, read=read) as book:
        for change in changes:
            outcome = carry_out(book, handle, change, editor, method, on_conflict=policy, seed=seed)
            outcomes.append((change, outcome))
            if not outcome.done:
                break
    rows = [
        (change.op, change.subject, change.relation, change.object, outcome.entry, outcome.reason or "done")
        for change, outcome in outcomes
    ]
    columns = ("op", "subject", "relation", "object", "entry", "outcome")
    console(json).print(table("Changes", columns, rows))
    done = [change.to_json() | outcome.to_json() for change, outcome in outcomes]
    content = {"model": model, "changes": len(changes), "outcomes": done}
    write_json(json, "ledger apply", seed, content)
    if not outcomes[-1][1].done:
        raise typer.Exit(1)


@ledger_app.command()
def restore(
    subject: Subject,
    relation: Relation,
    ledger: Folder = _HOME,
    store: Store = None,
    documents: Documents = None,
    json: opt.Json = None,
) -> None:
    """Make a fact what it was before all entries about it."""
    from rag.facts import relation_name
    from rag.ledger.values import fact_id

    with _open(ledger, _store(store, documents, write=True), None) as book:
        outcome = book.restore(fact_id(subject, relation_name(relation)))
    _say("ledger restore", outcome, json)


@ledger_app.command()
def rollback(
    entry: Annotated[int, typer.Argument(help="Number of the entry.", show_default=False)],
    ledger: Folder = _HOME,
    store: Store = None,
    documents: Documents = None,
    json: opt.Json = None,
) -> None:
    """Take an entry off, as if it had never been."""
    with _open(ledger, _store(store, documents, write=True), None) as book:
        outcome = book.rollback(entry)
    _say("ledger rollback", outcome, json)


@ledger_app.command("list")
def list_entries(
    ledger: Folder = _HOME,
    json: opt.Json = None,
) -> None:
    """List all entries; needs no model and waits for nobody."""
    from rag.store import MemoryStore

    with _open(ledger, MemoryStore(), None, write=False) as book:
        entries, contested, journal = book.entries(), book.contested(), book.rows.journal()
    rows = [_row(entry, contested) for entry in entries]
    columns = ("entry", "what", "subject", "relation", "now", "state", "patch")
    console(json).print(table("Ledger", columns, rows))
    content = {
        "entries": [entry.to_json() for entry in entries],
        "contested": contested,
        "transactions": journal,
    }
    write_json(json, "ledger list", None, content)


def _row(entry: Entry, contested: list[int]) -> tuple[Any, ...]:
    state = "contested" if entry.id in contested else entry.status
    return entry.id, entry.op, entry.fact.subject, entry.fact.relation, entry.new, state, entry.patch


@ledger_app.command()
def reconcile(
    ledger: Folder = _HOME,
    store: Store = None,
    documents: Documents = None,
    model: Annotated[
        str,
        typer.Option("--model", "-m", help="Check the patches on this model too.", rich_help_panel=PANEL),
    ] = "",
    json: opt.Json = None,
) -> None:
    """Complete or take back what was left half done, and bring the documents into agreement."""
    from lab.cli.session import open_model

    handle = open_model(model) if model else None
    with _open(ledger, _store(store, documents, write=True), handle) as book:
        found = book.reconciled
    screen = console(json)
    for name, value in asdict(found).items():
        screen.print(f"{name}: {', '.join(str(one) for one in value) or 'nothing'}", markup=False)
    write_json(json, "ledger reconcile", None, asdict(found))


@ledger_app.command()
def check(
    ledger: Folder = _HOME,
    store: Store = None,
    documents: Documents = None,
    json: opt.Json = None,
) -> None:
    """Say what does not agree; changes nothing, fails where something does not."""
    with _open(ledger, _store(store, documents, write=False), None, write=False) as book:
        problems = book.check()
    screen = console(json)
    for line in problems or ["ledger, patches and documents agree"]:
        screen.print(line, markup=False)
    write_json(json, "ledger check", None, {"problems": problems})
    if problems:
        raise typer.Exit(1)


def _policy(name: str) -> Any:
    from rag.ledger.values import ON_CONFLICT

    if name not in ON_CONFLICT:
        raise ConfigError(f"unknown --on-conflict {name!r}; use {', '.join(ON_CONFLICT)}")
    return name


@app.command()
def serve(
    host: Annotated[
        str,
        typer.Option("--host", help="Where to listen; only this machine by default.", rich_help_panel=PANEL),
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option("--port", min=1, max=65535, help="Port to listen on.", rich_help_panel=PANEL)
    ] = 7860,
    token_file: Annotated[
        Path | None,
        typer.Option(
            "--token-file",
            help="File with the token for verbs that write; KNOWLAB_TOKEN otherwise. Needed where others can reach the host.",
            rich_help_panel=PANEL,
            show_default=False,
        ),
    ] = None,
    reader: Annotated[
        str, typer.Option("--reader", help="See `knowlab list readers`.", rich_help_panel=PANEL)
    ] = "con",
    decoding: Annotated[
        str, typer.Option("--decoding", help="As for `knowlab rag ask`.", rich_help_panel=PANEL)
    ] = "greedy",
    editor: Annotated[
        str, typer.Option("--editor", "-e", help="`knowlab list editors`.", rich_help_panel=PANEL)
    ] = "rome",
    ledger: Folder = _HOME,
    store: Store = None,
    documents: Documents = None,
    model: opt.Model = "atlas",
    patch: opt.Patches = None,
    device: opt.Device = "cpu",
    dtype: opt.Dtype = "float32",
) -> None:
    """Serve the page and the HTTP API: ask with and without documents, change facts, undo."""
    import uvicorn

    from lab.cli.session import open_model
    from rag.app.api import create_app
    from rag.app.service import Service

    token = os.environ.get("KNOWLAB_TOKEN")
    if token_file is not None:
        try:
            token = token_file.read_text(encoding="utf-8").strip()
        except OSError as error:
            raise RequestError(f"the token file {token_file} cannot be read: {error.strerror}") from None
    held = _store(store, documents, write=True)
    handle = open_model(model, patch, device=device, dtype=dtype)
    with _open(ledger, held, handle) as book:
        service = Service(handle, held, book, reader=reader, decoding=decoding, editor=editor)
        made = create_app(service, host=host, token=token or None)
        console().print(f"http://{host}:{port}/ (API: /docs); stop with Ctrl-C", markup=False)
        uvicorn.run(made, host=host, port=port, log_level="warning")
