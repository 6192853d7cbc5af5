"""What commands over the ledger share: options, and opening what they name."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lab.errors import ConfigError

if TYPE_CHECKING:
    from lab.handle import ModelHandle
    from rag.ledger import Ledger
    from rag.store import DocumentStore

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
HOME = Path("ledger")


def open_store(store: Path | None, documents: Path | None, *, write: bool) -> DocumentStore:
    """The documents that a command is about: an index, a folder, or none.

    Raises:
        ConfigError: Both are given.
    """
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


def open_ledger(
    folder: Path, store: DocumentStore, handle: ModelHandle | None, *, read: bool = False, write: bool = True
) -> Ledger:
    """The ledger in a folder, over those documents and, with a model, its weights."""
    from rag.ledger import HandleWeights, Ledger, NotesFinder

    finder = NotesFinder(handle) if read and handle is not None else None
    weights = HandleWeights(handle) if handle is not None else None
    return Ledger(folder, store, weights, finder=finder, write=write)
