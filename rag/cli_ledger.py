"""Commands over the ledger: ``ledger list|edit|forget|apply|restore|rollback|reconcile|check``."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lab.cli import options as opt
from lab.cli.output import console, table, write_json
from lab.errors import ConfigError
from rag.cli_ledger_options import (
    HOME,
    PANEL,
    Documents,
    Folder,
    Object,
    OnConflict,
    Prompt,
    Read,
    Relation,
    Store,
    Subject,
    open_ledger,
    open_store,
)

if TYPE_CHECKING:
    from rag.ledger import Entry, Outcome

app = typer.Typer()
ledger_app = typer.Typer(
    name="ledger",
    help="Change what is held true, in weights and documents at once, and take it back.",
    no_args_is_help=True,
)
app.add_typer(ledger_app)


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
    ledger: Folder = HOME,
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
    with open_ledger(ledger, open_store(store, documents, write=True), handle, read=read) as book:
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
    ledger: Folder = HOME,
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
    with open_ledger(ledger, open_store(store, documents, write=True), handle, read=read) as book:
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
    ledger: Folder = HOME,
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
    with open_ledger(ledger, open_store(store, documents, write=True), handle, read=read) as book:
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
    ledger: Folder = HOME,
    store: Store = None,
    documents: Documents = None,
    json: opt.Json = None,
) -> None:
    """Make a fact what it was before all entries about it."""
    from rag.facts import relation_name
    from rag.ledger.values import fact_id

    with open_ledger(ledger, open_store(store, documents, write=True), None) as book:
        outcome = book.restore(fact_id(subject, relation_name(relation)))
    _say("ledger restore", outcome, json)


@ledger_app.command()
def rollback(
    entry: Annotated[int, typer.Argument(help="Number of the entry.", show_default=False)],
    ledger: Folder = HOME,
    store: Store = None,
    documents: Documents = None,
    json: opt.Json = None,
) -> None:
    """Take an entry off, as if it had never been."""
    with open_ledger(ledger, open_store(store, documents, write=True), None) as book:
        outcome = book.rollback(entry)
    _say("ledger rollback", outcome, json)


@ledger_app.command("list")
def list_entries(
    ledger: Folder = HOME,
    json: opt.Json = None,
) -> None:
    """List all entries; needs no model and waits for nobody."""
    from rag.store import MemoryStore

    with open_ledger(ledger, MemoryStore(), None, write=False) as book:
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
    ledger: Folder = HOME,
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
    with open_ledger(ledger, open_store(store, documents, write=True), handle) as book:
        found = book.reconciled
    screen = console(json)
    for name, value in asdict(found).items():
        screen.print(f"{name}: {', '.join(str(one) for one in value) or 'nothing'}", markup=False)
    write_json(json, "ledger reconcile", None, asdict(found))


@ledger_app.command()
def check(
    ledger: Folder = HOME,
    store: Store = None,
    documents: Documents = None,
    json: opt.Json = None,
) -> None:
    """Say what does not agree; changes nothing, fails where something does not."""
    with open_ledger(ledger, open_store(store, documents, write=False), None, write=False) as book:
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
