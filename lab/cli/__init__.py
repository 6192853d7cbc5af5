"""The command line: one Typer app whose commands come from this package and from entry points."""

from __future__ import annotations


def main() -> None:
    """Console script ``knowlab``."""
    from lab.cli.root import run

    raise SystemExit(run())
