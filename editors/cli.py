"""Commands that need an editing method."""

from __future__ import annotations

import typer

app = typer.Typer()
