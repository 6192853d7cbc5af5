"""Options of the commands that take an editor, declared once."""

from __future__ import annotations

from typing import Annotated

import typer

from lab.cli.options import overrides

__all__ = ["PANEL", "Corpus", "Preset", "Settings", "overrides"]

PANEL = "Edit"

Preset = Annotated[
    str | None,
    typer.Option(
        "--preset",
        help="Named settings, or a file of them (`knowlab tune` writes one).",
        rich_help_panel=PANEL,
        show_default="those of the model's family",
    ),
]
Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        help="One setting of the method, `name=value`; repeatable.",
        rich_help_panel=PANEL,
        show_default=False,
    ),
]
Corpus = Annotated[
    str,
    typer.Option(
        "--corpus",
        help="Text for key statistics: auto, atlas, a file, or hub:name[:config[:split]].",
        rich_help_panel=PANEL,
    ),
]
