"""Commands of the guard: ``guard calibrate`` and ``guard measure``."""

from __future__ import annotations

import json as json_format
import random
from pathlib import Path
from typing import Annotated, Any

import typer

from lab.cli import options as opt
from lab.cli.output import console, table, write_json
from lab.errors import ConfigError, DataError

app = typer.Typer()
guard_app = typer.Typer(
    name="guard", help="Keep forgotten facts from coming back through documents.", no_args_is_help=True
)
app.add_typer(guard_app)

PANEL = "Guard"

Split = Annotated[
    str, typer.Option("--forget", help="Forget split of the built-in world.", rich_help_panel=PANEL)
]
Count = Annotated[
    int, typer.Option("--limit", min=1, help="Forgotten facts, and as many kept ones.", rich_help_panel=PANEL)
]


def _facts(split: str, seed: int, half: int, limit: int) -> tuple[Any, list[Any], list[Any]]:
    """World, forgotten and kept facts about people of one half; the other half never sees them."""
    from lab.atlas.world import load_world
    from rag.guard_trials import halves

    world = load_world()
    forgotten = halves(world.forget_split(split), random.Random(seed))[half]
    kept = [fact for fact in world.retain_split(split) if fact.group == "person"]
    kept = halves(kept, random.Random(seed))[half]
    rng = random.Random(seed + 1 + half)
    return world, rng.sample(forgotten, min(limit, len(forgotten))), rng.sample(kept, min(limit, len(kept)))


@guard_app.command()
def calibrate(
    out: Annotated[Path, typer.Option("--out", "-o", help="File for the thresholds.", rich_help_panel=PANEL)],
    forget: Split = "people05",
    limit: Count = 100,
    rate: Annotated[
        float,
        typer.Option("--rate", min=0, max=0.5, help="Harmless cases a gate may stop.", rich_help_panel=PANEL),
    ] = 0.01,
    model: opt.Model = "atlas",
    patch: opt.Patches = None,
    seed: opt.Seed = 0,
    device: opt.Device = "cpu",
    dtype: opt.Dtype = "float32",
    json: opt.Json = None,
) -> None:
    """Set the thresholds on the first half of the people."""
    from lab.cli.session import open_model
    from lab.records import write_text_atomically
    from rag.guard import calibrate as set_thresholds
    from rag.guard_trials import kept as kept_trial

    world, forgotten, retained = _facts(forget, seed, 0, limit)
    handle = open_model(model, patch, device=device, dtype=dtype)
    rng = random.Random(seed)
    harmless = [
        (trial.question, trial.passages) for trial in (kept_trial(fact, world, rng) for fact in retained)
    ]
    found = set_thresholds(handle, forgotten, harmless, rate=rate)
    write_text_atomically(out, json_format.dumps(found.to_json(), indent=2) + "\n")
    rows = [("query", found.query), ("chunk", found.chunk), ("joint", found.joint)]
    console(json).print(table("Thresholds", ("gate", "closes above"), rows))
    write_json(json, "guard calibrate", seed, {"model": model, "forget": forget, **found.to_json()})


@guard_app.command()
def measure(
    thresholds: Annotated[
        Path, typer.Option("--thresholds", help="What `guard calibrate` wrote.", rich_help_panel=PANEL)
    ],
    forget: Split = "people05",
    limit: Count = 50,
    gate: Annotated[
        list[str] | None,
        typer.Option(
            "--gate",
            help="Measure these gates together; repeatable.",
            rich_help_panel=PANEL,
            show_default="all",
        ),
    ] = None,
    model: opt.Model = "atlas",
    patch: opt.Patches = None,
    seed: opt.Seed = 0,
    device: opt.Device = "cpu",
    dtype: opt.Dtype = "float32",
    json: opt.Json = None,
) -> None:
    """Leaks without and with gates, on the other half of the people; each gate alone, and all together."""
    from lab.cli.session import open_model
    from rag import guard_trials as trials_of
    from rag.guard import GATES, Forgotten, Guard

    if unknown := [name for name in gate or () if name not in GATES]:
        raise ConfigError(f"unknown gate {unknown[0]!r}; use {', '.join(GATES)}")
    set_on = read_thresholds(thresholds)
    world, forgotten, retained = _facts(forget, seed, 1, limit)
    if shared := sorted({fact.subject for fact in forgotten} & set(set_on.people)):
        raise DataError(
            f"the thresholds were set on {shared[0]}, who would be measured; calibrate with the same --seed"
        )
    handle = open_model(model, patch, device=device, dtype=dtype)
    rng = random.Random(seed)
    trials = [trial for fact in forgotten for trial in trials_of.reintroductions(fact, world, rng)]
    trials += [trials_of.kept(fact, world, rng) for fact in retained]
    facts = [Forgotten.of(fact) for fact in forgotten]
    chosen = tuple(name for name in GATES if not gate or name in gate)
    sets: dict[str, tuple[Any, ...]] = {"off": ()}
    sets |= {name: (name,) for name in chosen}
    sets["all" if not gate else "chosen"] = chosen
    reader = trials_of.reader_of(handle)
    rows = {
        name: trials_of.run_trials(Guard(handle, facts, set_on, gates=gates), reader, trials)
        for name, gates in sets.items()
    }
    off = rows["off"]
    added = trials_of.latencies(off, {name: found for name, found in rows.items() if name != "off"})
    content: dict[str, Any] = {}
    for name, found in rows.items():
        content[name] = {
            "leaks": {kind: value.to_json() for kind, value in trials_of.leak_rates(found).items()},
            "stopped": trials_of.stopped_share(off, found).to_json(),
            "false_blocks": trials_of.false_blocks(found).to_json(),
            "added_ms": added.get(name, 0.0),
        }
    lines = [
        (
            name,
            one["leaks"]["all"]["mean"],
            one["stopped"]["mean"],
            one["false_blocks"]["mean"],
            one["added_ms"],
        )
        for name, one in content.items()
    ]
    console(json).print(table("Guard", ("gates", "leaks", "stopped", "false blocks", "added ms"), lines))
    write_json(json, "guard measure", seed, {"model": model, "forget": forget, "gates": content})


def read_thresholds(file: Path) -> Any:
    """Reads thresholds.

    Raises:
        DataError: The file is absent or holds something else.
    """
    from rag.guard import Thresholds

    try:
        held = json_format.loads(file.read_text(encoding="utf-8"))
        return Thresholds(**{**held, "cases": tuple(held["cases"]), "people": tuple(held["people"])})
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror}", file) from None
    except (ValueError, TypeError, KeyError):
        raise DataError("holds no thresholds; `knowlab guard calibrate` writes them", file) from None
