"""Commands that answer with documents: ``rag``, ``ledger``, ``guard``, ``serve``, ``train``, ``bench preference`` and ``bench notes``."""

from __future__ import annotations

import typer

from rag import (
    cli_ask,
    cli_bench,
    cli_bench_notes,
    cli_eval,
    cli_guard,
    cli_ledger,
    cli_preference,
    cli_serve,
    index_cli,
)

app = typer.Typer()
rag_app = typer.Typer(
    name="rag", help="Answer with documents: index them, ask, measure who wins.", no_args_is_help=True
)
for part in (index_cli, cli_ask, cli_eval):
    rag_app.add_typer(part.app)
app.add_typer(rag_app)
app.add_typer(cli_serve.app)
app.add_typer(cli_ledger.app)
app.add_typer(cli_guard.app)
app.add_typer(cli_preference.app)
app.add_typer(cli_bench.app)
app.add_typer(cli_bench_notes.app)
