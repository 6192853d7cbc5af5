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
Count = Annotated[int, typer.Option("--limit", min=1, help="Forgotten facts.", rich_help_panel=PANEL)]
Kept = Annotated[
    int | None,
    typer.Option("--kept", min=1, help="Facts that are kept.", rich_help_panel=PANEL, show_default="as many"),
]


def _facts(
    split: str, seed: int, half: int, limit: int, count: int | None
) -> tuple[Any, list[Any], list[Any]]:
    """World, forgotten and kept facts about people of one half; the other half never sees them."""
    from lab.atlas.world import load_world
    from rag.guard_trials import halves

    world = load_world()
    forgotten = halves(world.forget_split(split), random.Random(seed))[half]
    kept = [fact for fact in world.retain_split(split) if fact.group == "person"]
    kept = halves(kept, random.Random(seed))[half]
    rng = random.Random(seed + 1 + half)
    chosen = rng.sample(forgotten, min(limit, len(forgotten)))
    return world, chosen, rng.sample(kept, min(count or limit, len(kept)))


@guard_app.command()
def calibrate(
    out: Annotated[Path, typer.Option("--out", "-o", help="File for the thresholds.", rich_help_panel=PANEL)],
    forget: Split = "people05",
    limit: Count = 100,
    kept: Kept = None,
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

    world, forgotten, retained = _facts(forget, seed, 0, limit, kept)
    handle = open_model(model, patch, device=device, dtype=dtype)
    rng, people = random.Random(seed), sorted({fact.subject for fact in forgotten})
    trials = [kept_trial(fact, world, rng, people) for fact in retained]
    harmless = [(trial.question, trial.passages) for trial in trials]
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
    kept: Kept = None,
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
    from lab.eval.render import cell
    from rag import guard_trials as trials_of
    from rag.guard import GATES, Forgotten, Guard

    if unknown := [name for name in gate or () if name not in GATES]:
        raise ConfigError(f"unknown gate {unknown[0]!r}; use {', '.join(GATES)}")
    set_on = read_thresholds(thresholds)
    world, forgotten, retained = _facts(forget, seed, 1, limit, kept)
    if shared := sorted({fact.subject for fact in forgotten} & set(set_on.people)):
        raise DataError(
            f"the thresholds were set on {shared[0]}, who would be measured; calibrate with the same --seed"
        )
    handle = open_model(model, patch, device=device, dtype=dtype)
    rng = random.Random(seed)
    trials = [trial for fact in forgotten for trial in trials_of.reintroductions(fact, world, rng)]
    people = sorted({fact.subject for fact in forgotten})
    trials += [trials_of.kept(fact, world, rng, people) for fact in retained]
    facts = [Forgotten.of(fact) for fact in forgotten]
    chosen = tuple(name for name in GATES if not gate or name in gate)
    sets: dict[str, tuple[Any, ...]] = {"off": ()}
    sets |= {name: (name,) for name in chosen}
    sets["all" if not gate else "chosen"] = chosen
    reader = trials_of.reader_of(handle)
    answers = trials_of.read_all(reader, trials)
    rows = {
        name: trials_of.run_trials(Guard(handle, facts, set_on, gates=gates), reader, trials, answers)
        for name, gates in sets.items()
    }
    off = rows["off"]
    added = {name: trials_of.latency(found) for name, found in rows.items()}
    content: dict[str, Any] = {}
    for name, found in rows.items():
        content[name] = {
            "leaks": {kind: value.to_json() for kind, value in trials_of.leak_rates(found).items()},
            "stopped": trials_of.stopped_share(off, found).to_json(),
            "false_blocks": trials_of.false_blocks(found).to_json(),
            "added_ms": added[name].to_json(),
        }
    screen = console(json)
    lines = [
        [
            name,
            cell("leaks", trials_of.leak_rates(found)["all"]),
            cell("stopped", trials_of.stopped_share(off, found)),
            cell("false blocks", trials_of.false_blocks(found)),
            f"{added[name].mean or 0:.0f}",
        ]
        for name, found in rows.items()
    ]
    screen.print(table("Guard", ("gates", "leaks", "stopped", "false blocks", "added ms"), lines))
    kinds = [
        [name, *(cell(kind, value, interval=False) for kind, value in trials_of.leak_rates(found).items())]
        for name, found in rows.items()
    ]
    screen.print(table("Leaks by the way back", ("gates", *trials_of.KINDS, "all"), kinds))
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
