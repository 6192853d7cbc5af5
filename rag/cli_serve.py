"""``knowlab serve``: the page and the HTTP API."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from lab.cli import options as opt
from lab.cli.output import console
from lab.errors import RequestError
from rag.cli_ledger_options import HOME, PANEL, Documents, Folder, Store, open_ledger, open_store

app = typer.Typer()


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
    ledger: Folder = HOME,
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
    held = open_store(store, documents, write=True)
    handle = open_model(model, patch, device=device, dtype=dtype)
    with open_ledger(ledger, held, handle) as book:
        service = Service(handle, held, book, reader=reader, decoding=decoding, editor=editor)
        made = create_app(service, host=host, token=token or None)
        console().print(f"http://{host}:{port}/ (API: /docs); stop with Ctrl-C", markup=False)
        uvicorn.run(made, host=host, port=port, log_level="warning")
