"""Commands that answer with documents: ``read``, ``index``, ``ledger``, ``guard``, ``serve``, ``train`` and ``bench preference``."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lab.cli import options as opt
from lab.cli.output import console, table, write_json
from lab.errors import ConfigError, DataError
from rag import cli_bench, cli_guard, cli_ledger, cli_preference
from rag.index_cli import app as index_app

if TYPE_CHECKING:
    from lab.records import Passage, Trust
    from rag.verdict import Policy

app = typer.Typer()
app.add_typer(index_app, name="index")
app.add_typer(cli_ledger.app)
app.add_typer(cli_guard.app)
app.add_typer(cli_preference.app)
app.add_typer(cli_bench.app)

READ_PANEL = "Reading"


_HELP = """Read documents with a question: the reader's answer and notes, and a verdict on memory against documents.

The verdict hears memory and every document apart and names a winner by the policy; the reader's answer shows what the model
says when it has all of them before it.

Examples:

    knowlab read "What is the capital of France?" --document "The capital of France is Rome."

    knowlab read "Who wrote it?" -d report.txt -d verified:note.txt --decoding cad:alpha=0.5 --policy trust

    knowlab read "What is the capital of France?" --index store --k 3
"""


@app.command(help=_HELP)
def read(
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
    index: Annotated[
        Path | None,
        typer.Option(
            "--index",
            help="Index folder whose best chunks are read after the documents; see `knowlab index add`.",
            rich_help_panel=READ_PANEL,
            show_default=False,
        ),
    ] = None,
    k: Annotated[
        int, typer.Option("--k", min=1, help="How many chunks of the index.", rich_help_panel=READ_PANEL)
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
        str, typer.Option("--policy", help="Who wins: context, memory or trust.", rich_help_panel=READ_PANEL)
    ] = "context",
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
    """Read documents with a question."""
    from rag.decoding import get_rule
    from rag.readers import READERS
    from rag.verdict import POLICIES, judge

    chosen: Policy | None = next((name for name in POLICIES if name == policy), None)
    if chosen is None:
        raise ConfigError(f"unknown policy {policy!r}; use {', '.join(POLICIES)}")
    if not question.strip():
        raise ConfigError("the question is empty")
    rule, kind = get_rule(decoding), READERS.get(reader)
    passages = [_passage(number, text) for number, text in enumerate(document or (), start=1)]
    if index is not None:
        from rag.index import open_index

        with open_index(index) as opened:
            passages += [found.chunk.passage for found in opened.search(question, k)]
    from lab.cli.session import open_model

    handle = open_model(model, patch, device=device, dtype=dtype, quantize=quantize)
    asked = kind(handle, rule, max_new_tokens=max_new_tokens)
    with asked.holding():
        reading = asked.read(question, passages)
        verdict = judge(handle, question, passages, chosen)
    out = console(json)
    out.print(f"The model answers: {reading.answer}", markup=False)
    if reading.notes:
        rows = [(note.document, note.kind, note.text) for note in reading.notes]
        out.print(table("Notes", ("document", "kind", "note"), rows))
    voices = [
        (voice.source, voice.answer, voice.confidence, voice.trust)
        for voice in (verdict.memory, *verdict.documents)
    ]
    out.print(table("Who says what", ("source", "answer", "confidence", "trust"), voices))
    out.print(
        f"Verdict: {verdict.answer} (policy {policy}: {verdict.winner}; {verdict.agreement})", markup=False
    )
    content = {
        "model": model,
        "reader": reader,
        "decoding": decoding,
        "documents": [asdict(passage) for passage in passages],
        "reading": reading.to_json(),
        "verdict": verdict.to_json(),
        "patches": [
            {"id": entry.patch.id, "method": entry.patch.provenance.method} for entry in handle.applied
        ],
    }
    write_json(json, "read", None, content)


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
