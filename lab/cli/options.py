"""Options that mean the same on every command, declared once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from lab.errors import ConfigError

MODEL_PANEL = "Model"
RUN_PANEL = "Run"
OUTPUT_PANEL = "Output"

Model = Annotated[
    str,
    typer.Option(
        "--model",
        "-m",
        help="A built-in model (`knowlab list models`), a folder, or a Hugging Face id.",
        rich_help_panel=MODEL_PANEL,
    ),
]
Patches = Annotated[
    list[Path] | None,
    typer.Option(
        "--patch",
        "-p",
        help="Patch folder or PEFT adapter folder to apply first; repeatable, applied in this order.",
        rich_help_panel=MODEL_PANEL,
        show_default=False,
    ),
]
Device = Annotated[
    str,
    typer.Option(
        "--device", help="Where the model runs: cpu, cuda, cuda:1, ...", rich_help_panel=MODEL_PANEL
    ),
]
Dtype = Annotated[
    str,
    typer.Option(
        "--dtype", help="Floating type of the weights: float32, bfloat16, ...", rich_help_panel=MODEL_PANEL
    ),
]
Quantize = Annotated[
    str | None,
    typer.Option(
        "--quantize",
        help="Hold the projections as whole numbers: int8 or int4. Patches then go beside them.",
        rich_help_panel=MODEL_PANEL,
        show_default="none",
    ),
]
Seed = Annotated[int, typer.Option("--seed", help="Seed of everything random.", rich_help_panel=RUN_PANEL)]
Seeds = Annotated[
    list[int] | None,
    typer.Option(
        "--seed", help="Seed of everything random; repeatable.", rich_help_panel=RUN_PANEL, show_default="0"
    ),
]
Limit = Annotated[
    int | None,
    typer.Option(
        "--limit", min=1, help="Stop after this many cases.", rich_help_panel=RUN_PANEL, show_default="all"
    ),
]
SkipMalformed = Annotated[
    bool,
    typer.Option(
        "--skip-malformed",
        help="Report rows that break the schema instead of stopping.",
        rich_help_panel=RUN_PANEL,
    ),
]
KnownOnly = Annotated[
    bool,
    typer.Option(
        "--known-only",
        help="Draw only cases that the model answers right before; of a bed, those that it was taught.",
        rich_help_panel=RUN_PANEL,
    ),
]
Json = Annotated[
    Path | None,
    typer.Option(
        "--json",
        help="Write the result as JSON to this file; `-` prints it.",
        rich_help_panel=OUTPUT_PANEL,
        show_default=False,
    ),
]
Out = Annotated[
    Path | None,
    typer.Option(
        "--out",
        "-o",
        help="Folder for what the command makes; must be empty.",
        rich_help_panel=OUTPUT_PANEL,
        show_default=False,
    ),
]
Reports = Annotated[
    Path,
    typer.Option(
        "--out", "-o", help="Folder for the reports and the finished runs.", rich_help_panel=OUTPUT_PANEL
    ),
]
Force = Annotated[
    bool,
    typer.Option("--force", help="Write into --out although it is not empty.", rich_help_panel=OUTPUT_PANEL),
]


def comma_list(words: str) -> list[str]:
    """The words between commas, without blanks; empty ones are left out."""
    return [word.strip() for word in words.split(",") if word.strip()]


def overrides(settings: list[str] | None) -> dict[str, Any]:
    """``name=value`` words as keyword arguments; values are read as TOML, and as text where they are none.

    Raises:
        ConfigError: A word without a name or a value.
    """
    import tomllib

    found: dict[str, Any] = {}
    for word in settings or ():
        name, equals, text = word.partition("=")
        if not equals or not name.isidentifier():
            raise ConfigError(f"--set takes name=value, not {word!r}")
        try:
            found[name] = tomllib.loads(f"value = {text}")["value"]
        except tomllib.TOMLDecodeError:
            found[name] = text
    return found
