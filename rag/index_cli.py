"""``knowlab rag index|search|show``: bring documents in, search them, show what is there."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lab.cli import options as opt
from lab.cli.output import console, progress, table, write_json
from lab.errors import ConfigError

if TYPE_CHECKING:
    from lab.records import Trust
    from rag.index.chroma import Mode

app = typer.Typer()

INDEX_PANEL = "Index"
Place = Annotated[
    str,
    typer.Option(
        "--store",
        help="Index folder, or the address of a Chroma server (http://127.0.0.1:8000).",
        rich_help_panel=INDEX_PANEL,
        show_default=False,
    ),
]
Embedding = Annotated[
    str | None,
    typer.Option(
        "--embeddings",
        help="minilm (offline), a folder or a sentence-transformers id.",
        rich_help_panel=INDEX_PANEL,
        show_default="those of the index; minilm for a new one",
    ),
]

_INDEX = """Bring a folder of text, Markdown, HTML, PDF and JSONL into an index; again, to bring in what changed.

A JSONL row is a document: `text`, and if wanted `id`, `trust` and further fields. What cannot be read is listed and left out, and
what the index holds of it stays; with --strict nothing is written then.

Examples:

    knowlab rag index docs --store store

    knowlab rag index docs --store store --prune
"""


@app.command("index", help=_INDEX)
def bring_in(
    folder: Annotated[Path, typer.Argument(help="Folder, or one file.", show_default=False)],
    store: Place,
    name: Annotated[
        str,
        typer.Option(
            "--name",
            help="Begins the names of the documents.",
            rich_help_panel=INDEX_PANEL,
            show_default="the folder's name",
        ),
    ] = "",
    trust: Annotated[
        str | None,
        typer.Option(
            "--trust",
            help="verified, unverified or superseded, for documents that do not say.",
            rich_help_panel=INDEX_PANEL,
            show_default=False,
        ),
    ] = None,
    prune: Annotated[
        bool,
        typer.Option("--prune", help="Remove what the folder no longer holds.", rich_help_panel=INDEX_PANEL),
    ] = False,
    strict: Annotated[
        bool,
        typer.Option(
            "--strict", help="Write nothing where something cannot be read.", rich_help_panel=INDEX_PANEL
        ),
    ] = False,
    size: Annotated[
        int, typer.Option("--size", min=1, help="Characters of a chunk.", rich_help_panel=INDEX_PANEL)
    ] = 800,
    overlap: Annotated[
        int,
        typer.Option(
            "--overlap", min=0, help="Characters shared with the chunk before.", rich_help_panel=INDEX_PANEL
        ),
    ] = 80,
    embeddings: Embedding = None,
    json: opt.Json = None,
) -> None:
    """Bring documents into an index."""
    from rag.index import ingest, open_index
    from rag.index.ingest import Chunking

    chunking = Chunking(size, overlap)
    level = _trust(trust)
    if not folder.exists():
        raise ConfigError(f"no such folder: {folder}")
    with open_index(store, embeddings=embeddings, write=True) as opened, progress() as advance:
        done = ingest(
            opened,
            folder,
            name=name,
            trust=level,
            chunking=chunking,
            prune=prune,
            strict=strict,
            progress=advance,
        )
    out = console(json)
    out.print(
        f"{done.documents} documents: {done.added} chunks added, {done.updated} updated, {done.removed} removed, "
        f"{done.unchanged} unchanged"
    )
    if done.problems:
        rows = [(problem.source, problem.reason) for problem in done.problems]
        out.print(table("Not read", ("file", "reason"), rows))
    if done.missing:
        out.print(f"{len(done.missing)} documents are no longer in the folder; --prune removes them")
    if done.skipped:
        out.print(f"{len(done.skipped)} files of other kinds were passed over")
    write_json(json, "rag index", None, {"store": store, "folder": folder, **done.to_json()})


@app.command()
def search(
    query: Annotated[str, typer.Argument(help="A question, or words.", show_default=False)],
    store: Place,
    k: Annotated[int, typer.Option("--k", min=1, help="How many chunks.", rich_help_panel=INDEX_PANEL)] = 5,
    mode: Annotated[
        str,
        typer.Option(
            "--mode",
            help="dense (meaning), words (BM25), or hybrid (both, joined by rank).",
            rich_help_panel=INDEX_PANEL,
        ),
    ] = "hybrid",
    mmr: Annotated[
        float | None,
        typer.Option(
            "--mmr",
            help="Prefer chunks that differ: 1 looks at the query alone, 0 at the chunks chosen before.",
            rich_help_panel=INDEX_PANEL,
            show_default=False,
        ),
    ] = None,
    source: Annotated[
        list[str] | None,
        typer.Option(
            "--source",
            help="Only chunks of this document; repeatable.",
            rich_help_panel=INDEX_PANEL,
            show_default=False,
        ),
    ] = None,
    trust: Annotated[
        str | None,
        typer.Option(
            "--trust", help="Only chunks of this trust.", rich_help_panel=INDEX_PANEL, show_default=False
        ),
    ] = None,
    embeddings: Embedding = None,
    json: opt.Json = None,
) -> None:
    """Search an index."""
    from rag.index import open_index
    from rag.index.chroma import MODES
    from rag.store import Scalar

    chosen: Mode | None = next((known for known in MODES if known == mode), None)
    if chosen is None:
        raise ConfigError(f"unknown search mode {mode!r}; use {', '.join(MODES)}")
    level = _trust(trust)
    where: dict[str, list[Scalar]] = {"source": [*source]} if source else {}
    if level:
        where["trust"] = [level]
    with open_index(store, embeddings=embeddings) as opened:
        found = opened.search(query, k, where, mode=chosen, mmr=mmr)
    out = console(json)
    rows = [(hit.score, hit.chunk.source, hit.chunk.trust, hit.chunk.text) for hit in found]
    out.print(table("Found", ("score", "document", "trust", "text"), rows))
    content = {
        "store": store,
        "query": query,
        "mode": mode,
        "found": [
            {
                "id": hit.chunk.id,
                "score": hit.score,
                "source": hit.chunk.source,
                "position": hit.chunk.position,
                "trust": hit.chunk.trust,
                "note": hit.chunk.note,
                "text": hit.chunk.text,
                "extra": hit.chunk.extra,
            }
            for hit in found
        ],
    }
    write_json(json, "rag search", None, content)


@app.command()
def show(store: Place, embeddings: Embedding = None, json: opt.Json = None) -> None:
    """Show what an index holds."""
    from collections import Counter

    from rag.index import open_index

    with open_index(store, embeddings=embeddings) as opened:
        chunks, name = opened.chunks(), opened.embedding
    sources = Counter(chunk.source for chunk in chunks)
    statuses = Counter(chunk.status for chunk in chunks)
    out = console(json)
    out.print(f"{len(chunks)} chunks of {len(sources)} documents, embedded by {name}", markup=False)
    out.print(table("Chunks", ("status", "chunks"), sorted(statuses.items())))
    out.print(table("Documents", ("document", "chunks"), sorted(sources.items())))
    content = {
        "store": store,
        "embeddings": name,
        "chunks": len(chunks),
        "statuses": dict(statuses),
        "documents": dict(sorted(sources.items())),
    }
    write_json(json, "rag show", None, content)


def _trust(written: str | None) -> Trust | None:
    from rag.store import TRUSTS

    found: Trust | None = next((level for level in TRUSTS if level == written), None)
    if written is not None and found is None:
        raise ConfigError(f"unknown trust {written!r}; use {', '.join(TRUSTS)}")
    return found
