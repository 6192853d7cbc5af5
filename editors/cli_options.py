"""Options of the commands that take an editor, declared once."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from lab.errors import ConfigError

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
