"""A reader trained to take notes beside one trained to answer at once: the same base, the same contexts, as many tokens.

That is how the paper measures Chain-of-Note (arXiv:2311.09210, section 4): both readers are trained, half of the notes' rows ask
for the answer alone, and what counts is the gain where documents are noise and where nobody knows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rag.evaluation import CONDITIONS, FURTHER, Asked, Cell, Keeper, atlas_questions, figures, gain, run
from rag.preference.bench import content
from rag.preference.control import trained_tokens
from rag.preference.knowpo import TrainingData
from rag.preference.pairs import read_contexts
from rag.preference.prepare import prepare, question_items
from rag.preference.stage import Report, Stage, digest, finish, records
from rag.preference.synthesis import note_rows

if TYPE_CHECKING:
    from lab.eval.stats import Estimate
    from lab.handle import ModelHandle
    from lab.patch import WeightPatch

Row = Mapping[str, Any]

READERS = ("direct", "con_unchecked", "con")
PLAIN = "direct"
# What a model was trained to, to the readers that ask it; nothing was trained in ``base``.
ARMS: Mapping[str, tuple[str, ...]] = {"base": READERS, "answers": (PLAIN,), "notes": READERS}
# Whose direct reader an arm's gain is over: trained against trained, untrained against untrained.
AGAINST: Mapping[str, str] = {"base": "base", "notes": "answers"}
# Atlas reads three documents at most. All of them may be about the same attribute of others: telling those apart is what is learnt.
_CONTEXTS: Mapping[str, Any] = {"documents": 3, "hard": 1.0, "most_hard": 3}


@dataclass(frozen=True)
class NotesBench:
    """What all cells share.

    Attributes:
        limit: Facts that are asked, each under every condition.
        train_limit: Questions trained on; strangers' are added to them.
        train_data: ``atlas`` (its facts for tuning), or a file of questions.
        conditions: See ``rag.evaluation``.
        decoding: The rule of all readers.
        samples: See ``probe_memory``.
    """

    limit: int = 300
    train_limit: int = 400
    train_data: str = "atlas"
    conditions: tuple[str, ...] = (*CONDITIONS, *FURTHER)
    decoding: str = "greedy"
    samples: int = 4


def notes_data(
    handle: ModelHandle,
    bench: NotesBench,
    asked: Sequence[Asked],
    seed: int,
    progress: Report | None = None,
) -> dict[str, TrainingData]:
    """What ``answers`` and ``notes`` are trained on: the same contexts, none about a name that is asked.

    Args:
        handle: Its memory decides what is right below noise.
        bench: Settings.
        asked: What is asked afterwards.
        seed: Of every draw.
        progress: Told what memory is asked for.
    """
    items = question_items(bench.train_data, split="dev", limit=bench.train_limit, seed=seed)
    text = " ".join(one.question for one in asked)
    free = [row for row in records(items.data) if not row["title"] or row["title"] not in text]
    items = finish("free", len(items.data), free)
    stages = prepare(handle, items, samples=bench.samples, seed=seed, progress=progress, **_CONTEXTS)  # fmt: skip
    stages["reading"] = read_contexts(handle, stages["contexts"].data, skip=("all",))
    made = {}
    for arm, share in (("answers", 0.0), ("notes", 0.5)):
        rows: Stage = note_rows(handle, stages["reading"].data, share=share)
        made[arm] = TrainingData(rows.data, None, {**stages, "notes": rows})
    return made


def train_arms(
    handle: ModelHandle,
    bench: NotesBench,
    asked: Sequence[Asked],
    training: Mapping[str, Any],
    seed: int,
    progress: Report | None = None,
) -> dict[str, tuple[WeightPatch, dict[str, Any]]]:
    """Trains both arms in equally many tokens: as many as ``notes`` takes by the preset's epochs.

    Args:
        handle: The model.
        bench, asked, seed: See ``notes_data``.
        training: Settings that replace the preset's; see ``train_config``.
        progress: Told what memory is asked for, and about every update.

    Returns:
        Adapter, and rows, tokens and epochs, by arm.
    """
    from rag.preference.presets import train_config
    from rag.preference.train import train_preference

    config = train_config(handle, "notes", **training)
    data = notes_data(handle, bench, asked, seed, progress)
    once = {
        arm: trained_tokens(handle.tokenizer, records(each.sft), ("completion",))
        for arm, each in data.items()
    }
    made = {}
    for arm, each in data.items():
        own = replace(config, sft_epochs=config.sft_epochs * once["notes"] / once[arm])
        trained = train_preference(handle, each, own, method=arm, seed=seed, progress=progress)
        about = {
            "rows": len(records(each.sft)),
            "epochs": own.sft_epochs,
            "tokens": round(once[arm] * own.sft_epochs),
            "curve": trained.curves["sft"],
        }
        made[arm] = (trained.patch, about)
    return made


def run_seed(
    handle: ModelHandle,
    bench: NotesBench,
    training: Mapping[str, Any],
    seed: int,
    folder: Path,
    progress: Report | None = None,
) -> tuple[dict[tuple[str, Cell], list[dict[str, Any]]], dict[str, Any]]:
    """All cells of a seed, and what was trained; adapters and finished cells are kept in ``folder``.

    Returns:
        Arm and cell to rows whose ids carry the seed; arm to what ``train_arms`` says of it.
    """
    import json

    from lab.atlas.world import load_world
    from lab.patch_io import load_saved
    from lab.records import write_text_atomically

    questions = atlas_questions(load_world(), bench.limit, seed)
    # Whatever is asked now: an adapter that is kept may be asked under other conditions later.
    asked = [one for each in questions.values() for one in each]
    told = {
        "state": handle.state,
        "seed": seed,
        "training": dict(training),
        "train": content(bench.train_data),
    }
    told |= {name: getattr(bench, name) for name in ("limit", "train_limit", "samples")}
    place = folder / "adapters" / digest([told])[:12]
    if not (place / "about.json").is_file():
        made = train_arms(handle, bench, asked, training, seed, progress)
        for arm, (patch, _) in made.items():
            patch.save(place / arm, overwrite=True)
        write_text_atomically(
            place / "about.json", json.dumps({arm: about for arm, (_, about) in made.items()}) + "\n"
        )
    about = json.loads((place / "about.json").read_text(encoding="utf-8"))
    found: dict[tuple[str, Cell], list[dict[str, Any]]] = {}
    for arm, readers in ARMS.items():
        cells = [Cell(one, reader, bench.decoding) for one in bench.conditions for reader in readers]
        kept = Keeper(folder / "cells", told | {"arm": arm})
        if arm == "base":
            rows = run(handle, cells, questions, kept, progress=progress)
        else:
            with load_saved(place / arm).applied(handle):
                rows = run(handle, cells, questions, kept, progress=progress)
        for cell, each in rows.items():
            found[arm, cell] = [row | {"id": f"{seed}/{row['id']}"} for row in each]
    return found, about


def pooled(
    seeds: Sequence[Mapping[tuple[str, Cell], Sequence[Row]]],
) -> dict[tuple[str, Cell], list[Row]]:
    """The rows of every arm and cell over all seeds."""
    return {key: [row for found in seeds for row in found[key]] for key in seeds[0]}


def gains(found: Mapping[tuple[str, Cell], Sequence[Row]]) -> list[dict[str, Any]]:
    """What readers with notes gain over the direct reader of the arm that they are measured against, question by question."""
    made = []
    for (arm, cell), rows in found.items():
        if arm not in AGAINST or cell.reader == PLAIN:
            continue
        before = found[AGAINST[arm], replace(cell, reader=PLAIN)]
        made.append(
            {
                "arm": arm,
                "condition": cell.condition,
                "reader": cell.reader,
                "direct": figures(cell.condition, before)["accuracy"],
                "notes": figures(cell.condition, rows)["accuracy"],
                "gain": gain(before, rows),
            }
        )
    return made


def summary(found: Mapping[tuple[str, Cell], Sequence[Row]]) -> list[tuple[str, Cell, Mapping[str, Estimate]]]:  # fmt: skip
    """Arm, cell and metrics."""
    return [(arm, cell, figures(cell.condition, rows)) for (arm, cell), rows in found.items()]
