"""``knowlab rag ask``: one question, an answer from memory and documents, and who said what."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lab.cli import options as opt
from lab.cli.output import console, table, write_json
from lab.errors import ConfigError, DataError

if TYPE_CHECKING:
    from lab.records import Passage, Trust

app = typer.Typer()

READ_PANEL = "Reading"

_HELP = """Ask a question with documents: the reader's answer and notes, and a verdict on memory, documents and ledger.

The verdict hears memory and every document apart and names a winner by the policy; the reader's answer shows what the model
says when it has all of them before it. With --ledger, the model carries what the ledger holds, and what is to be forgotten there
does not come back through a document.

Examples:

    knowlab rag ask "What is the capital of France?" --store store --reader con --policy trust

    knowlab rag ask "Who wrote it?" -d report.txt -d verified:note.txt --decoding cad:alpha=0.5

    knowlab rag ask "What is the capital of France?" --store store --ledger ledger --policy ledger
"""


@app.command(help=_HELP)
def ask(
    question: Annotated[str, typer.Argument(help="The question.", show_default=False)],
    document: Annotated[
        list[str] | None,
        typer.Option(
            "--document",
            "-d",
            help="A text, or a file that holds one; repeatable. `verified:`, `unverified:` or `superseded:` before it "
            "gives its trust.",
            rich_help_panel=READ_PANEL,
            show_default=False,
        ),
    ] = None,
    store: Annotated[
        str | None,
        typer.Option(
            "--store",
            help="Index whose best chunks are read after the documents, a folder or a Chroma server; see `knowlab rag index`.",
            rich_help_panel=READ_PANEL,
            show_default=False,
        ),
    ] = None,
    k: Annotated[
        int, typer.Option("--k", min=1, help="How many chunks of the store.", rich_help_panel=READ_PANEL)
    ] = 5,
    reader: Annotated[
        str, typer.Option("--reader", help="See `knowlab list readers`.", rich_help_panel=READ_PANEL)
    ] = "con",
    decoding: Annotated[
        str,
        typer.Option(
            "--decoding",
            help="greedy, cad, adacad, coiecd, ck_plug or parammute, with settings as in `cad:alpha=0.5`.",
            rich_help_panel=READ_PANEL,
        ),
    ] = "greedy",
    policy: Annotated[
        str,
        typer.Option(
            "--policy", help="Who wins: context, memory, trust or ledger.", rich_help_panel=READ_PANEL
        ),
    ] = "context",
    ledger: Annotated[
        Path | None,
        typer.Option(
            "--ledger",
            help="Folder of a ledger; its patches are on the model.",
            rich_help_panel=READ_PANEL,
            show_default=False,
        ),
    ] = None,
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", min=1, help="Longest answer.", rich_help_panel=opt.RUN_PANEL)
    ] = 24,
    model: opt.Model = "atlas",
    patch: opt.Patches = None,
    device: opt.Device = "cpu",
    dtype: opt.Dtype = "float32",
    quantize: opt.Quantize = None,
    json: opt.Json = None,
) -> None:
    """Ask a question with documents."""
    from rag.asking import Asker, check_policy
    from rag.decoding import get_rule
    from rag.readers import READERS

    # A wrong word is named before a model is loaded for it.
    check_policy(policy)
    if policy == "ledger" and ledger is None:
        raise ConfigError("the policy ledger needs --ledger FOLDER")
    if not question.strip():
        raise ConfigError("the question is empty")
    get_rule(decoding), READERS.get(reader)
    given = [_passage(number, text) for number, text in enumerate(document or (), start=1)]
    with ExitStack() as held:
        from rag.index import open_index

        found = None if store is None else held.enter_context(open_index(store))
        from lab.cli.session import open_model

        handle = open_model(model, patch, device=device, dtype=dtype, quantize=quantize)
        book = None
        if ledger is not None:
            from rag.ledger import HandleWeights, Ledger
            from rag.store import MemoryStore

            book = Ledger(ledger, found or MemoryStore(), HandleWeights(handle), write=False)
            held.enter_context(book)
            book.hold_weights()
        asker = Asker(
            handle,
            found,
            book,
            reader=reader,
            decoding=decoding,
            documents=k,
            max_new_tokens=max_new_tokens,
        )
        said = asker.ask(question, policy=policy, given=given)
    verdict = said["verdict"]
    out = console(json)
    out.print(f"The model answers: {said['answer']}", markup=False)
    if said["notes"]:
        rows = [(note["document"], note["kind"], note["text"]) for note in said["notes"]]
        out.print(table("Notes", ("document", "kind", "note"), rows))
    names = {passage["id"]: passage["source"] for passage in said["passages"]}
    voices = [
        (names.get(voice["source"]) or voice["source"], voice["answer"], voice["confidence"], voice["trust"])
        for voice in (verdict["memory"], *verdict["context"])
    ]
    if verdict["ledger"]:
        voices.append(("ledger", verdict["ledger"]["answer"], None, None))
    out.print(table("Who says what", ("source", "answer", "confidence", "trust"), voices))
    out.print(
        f"Verdict: {verdict['answer']} (policy {policy}: {verdict['winner']}; {verdict['agreement']})",
        markup=False,
    )
    patches = [{"id": entry.patch.id, "method": entry.patch.provenance.method} for entry in handle.applied]
    content = {"model": model, "reader": reader, "decoding": decoding, "patches": patches}
    write_json(json, "rag ask", None, {**said, **content})


def _passage(number: int, written: str) -> Passage:
    """The passage of one ``--document``.

    Raises:
        ConfigError: There is no text.
        DataError: The file is not UTF-8 text.
    """
    from lab.atlas.forms import load_format
    from lab.records import Passage

    head, found, rest = written.partition(":")
    trust: Trust | None = next(
        (level for level in load_format().trust_levels if found and level == head), None
    )
    body = rest if trust else written
    source = ""
    # A long text is no file name; asking the file system for it would be an error of its own.
    if len(body) < 256 and "\n" not in body and Path(body).is_file():
        source = body
        try:
            body = Path(body).read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise DataError(f"not a UTF-8 text: {error}", source) from None
    text = " ".join(body.split())
    if not text:
        raise ConfigError(f"document {number} is empty")
    return Passage(str(number), text, source, trust)
