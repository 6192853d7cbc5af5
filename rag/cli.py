"""Commands that answer with documents; none is registered yet."""

from __future__ import annotations

import typer

app = typer.Typer()
