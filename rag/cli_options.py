"""Options of the comparisons that train adapters first, declared once."""

from __future__ import annotations

from typing import Annotated

import typer

PANEL = "Comparison"

TrainData = Annotated[
    str,
    typer.Option(
        "--train-data",
        help="What adapters are trained on: atlas (its facts for tuning), or a file of questions.",
        rich_help_panel=PANEL,
    ),
]
TrainLimit = Annotated[
    int, typer.Option("--train-limit", min=1, help="Questions trained on.", rich_help_panel=PANEL)
]
Samples = Annotated[
    int,
    typer.Option(
        "--samples",
        min=0,
        help="Sampled answers that must all be right for a fact to count as known in training.",
        rich_help_panel=PANEL,
    ),
]
Draws = Annotated[
    int,
    typer.Option(
        "--draws",
        min=1,
        help="Sets of contexts of each question that knowpo is trained on, drawn apart.",
        rich_help_panel=PANEL,
    ),
]
Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        help="NAME=VALUE: a setting of training that replaces the preset's; repeatable.",
        rich_help_panel=PANEL,
        show_default=False,
    ),
]
