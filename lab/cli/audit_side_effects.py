"""``knowlab side-effects``: what a patch damages besides what it was for."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lab.cli import options as opt
from lab.cli.output import console, progress, table, write_json
from lab.errors import ConfigError

if TYPE_CHECKING:
    from lab.audit.side_effects.run import Ground
    from lab.handle import ModelHandle

app = typer.Typer()

GROUND_PANEL = "What to measure on"

_HELP = """Measure what patches damage: retained facts that were suppressed, questions that are refused now, ignorance that is admitted,
calibration, general ability, attention, priming of related texts, and what follows from the change.

Several patches are measured as one change, applied in the order given. A measure that has nothing to measure on is skipped, and
says so, unless `--measures` names it.

Examples:

    knowlab side-effects --patch edits/people --facts atlas:people05

    knowlab side-effects --model MODEL --patch DIR --facts changed.jsonl --retain kept.jsonl --text corpus.txt --json effects.json
"""


@app.command("side-effects", help=_HELP)
def side_effects(
    patch: Annotated[
        list[Path],
        typer.Option(
            "--patch",
            "-p",
            help="Patch folder whose side effects are measured; repeatable, applied in this order.",
            rich_help_panel=opt.MODEL_PANEL,
            show_default=False,
        ),
    ],
    facts: Annotated[
        str,
        typer.Option(
            "--facts",
            help="Facts that the patches are about: a facts file, or `atlas:SPLIT`.",
            rich_help_panel=GROUND_PANEL,
            show_default=False,
        ),
    ],
    retain: Annotated[
        Path | None,
        typer.Option(
            "--retain",
            help="Facts file of what should be as before.",
            rich_help_panel=GROUND_PANEL,
            show_default="the rest of the world, for `atlas:SPLIT`",
        ),
    ] = None,
    unknown: Annotated[
        Path | None,
        typer.Option(
            "--unknown",
            help="Facts file of what no model can know.",
            rich_help_panel=GROUND_PANEL,
            show_default="never-trained facts, for `atlas:SPLIT`",
        ),
    ] = None,
    implied: Annotated[
        Path | None,
        typer.Option(
            "--implied",
            help="Facts file of what follows from the change without being part of it.",
            rich_help_panel=GROUND_PANEL,
            show_default=False,
        ),
    ] = None,
    text: Annotated[
        str,
        typer.Option(
            "--text",
            help="General text: `auto`, `atlas`, a file, or `hub:NAME`.",
            rich_help_panel=GROUND_PANEL,
        ),
    ] = "auto",
    texts: Annotated[
        int, typer.Option("--texts", min=0, help="How many texts to read.", rich_help_panel=GROUND_PANEL)
    ] = 64,
    measures: Annotated[
        str,
        typer.Option(
            "--measures", help="`all`, or names with commas between.", rich_help_panel=opt.RUN_PANEL
        ),
    ] = "all",
    model: opt.Model = "atlas",
    limit: opt.Limit = 100,
    seed: opt.Seed = 0,
    device: opt.Device = "cpu",
    dtype: opt.Dtype = "float32",
    json: opt.Json = None,
) -> None:
    """Measure what patches damage besides what they were for."""
    from lab.audit.side_effects.run import side_effects as measure
    from lab.cli.session import open_model

    names = None if measures == "all" else opt.comma_list(measures)
    if names == []:
        raise ConfigError("--measures names nothing; give `all`, or names with commas between")
    handle = open_model(model, device=device, dtype=dtype)
    change = _change(handle, patch)
    ground = _ground(handle, model, facts, retain, unknown, implied, (text, texts), limit, seed)
    with progress() as advance:
        found = measure(handle, change, ground, names, progress=advance)
    rows = [(name, key, value) for name, part in found.items() for key, value in _headlines(part)]
    console(json).print(table(f"Side effects on {model}", ("measure", "number", "value"), rows))
    content = {
        "model": model,
        "patches": [str(folder) for folder in patch],
        "facts": facts,
        "asked": {
            "facts": len(ground.forgotten),
            "retained": len(ground.retained),
            "unanswerable": len(ground.unanswerable),
            "implied": len(ground.implied),
            "texts": len(ground.texts),
        },
        "measures": found,
    }
    write_json(json, "side-effects", seed, content)


def _change(handle: ModelHandle, folders: list[Path]) -> Any:
    """The patches as one; a memory stands alone, for it cannot be added to anything."""
    from lab.patch import WeightPatch
    from lab.patch_io import read_patch

    found = [read_patch(folder, handle) for folder in folders]
    if len(found) == 1:
        return found[0]
    total = None
    for folder, part in zip(folders, found, strict=True):
        if not isinstance(part, WeightPatch):
            raise ConfigError(f"{folder} is no patch of weights and cannot be measured together with others")
        total = part if total is None else total + part
    return total


def _ground(
    handle: ModelHandle,
    model: str,
    facts: str,
    retain: Path | None,
    unknown: Path | None,
    implied: Path | None,
    text: tuple[str, int],
    limit: int | None,
    seed: int,
) -> Ground:
    from lab.atlas.forms import load_format
    from lab.atlas.weights import MODEL_NAMES
    from lab.audit.material import WORLD, gather
    from lab.audit.side_effects.run import Ground
    from lab.records import read_facts
    from lab.sources import text_source

    material = gather(facts, None if retain is None else str(retain), limit=limit, seed=seed)
    # Controls of a facts file have exchanged objects: their questions do have an answer.
    strangers = material.never if facts.startswith(WORLD) else ()
    if unknown is not None:
        strangers = tuple(read_facts(unknown))
    spec, count = text
    return Ground(
        forgotten=material.facts,
        retained=material.retained[:limit],
        unanswerable=strangers[:limit],
        texts=tuple(itertools.islice(text_source(spec, handle).texts(), count)) if count else (),
        format=load_format() if model in MODEL_NAMES else None,
        implied=() if implied is None else tuple(read_facts(implied))[:limit],
        seed=seed,
    )


def _headlines(part: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """The numbers of one measure for the table: plain ones, and the means of intervals."""
    found: list[tuple[str, Any]] = []
    for key, value in part.items():
        if isinstance(value, dict) and "mean" in value:
            found.append((prefix + key, value["mean"]))
        elif isinstance(value, dict):
            found += _headlines(value, f"{prefix}{key} ")
        elif isinstance(value, (int, float, str)) or value is None:
            found.append((prefix + key, value))
    return found
