"""From a model and a source of questions to contexts, training data or an evaluation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lab.data import read_rows
from lab.errors import ConfigError
from lab.eval.evaluations import EvaluationRequest
from rag.decoding.contrast import position_limit
from rag.preference.check import read_training_rows
from rag.preference.knowpo import KnowPOConfig, TrainingData, applied_requests, knowpo_data, sft_rows
from rag.preference.memory import fitting_contexts, probe_memory
from rag.preference.pairs import read_contexts, split_by_title
from rag.preference.passages import contexts, counterfactuals
from rag.preference.sources import atlas_items, read_items, with_edits
from rag.preference.stage import Report, Stage, finish, records, share_of, to_dataset
from rag.preference.suites import abstention, cells, flip_rate, observe, preference_metrics
from rag.preference.synthesis import RECIPES, note_rows
from rag.preference.tagged import trust_rows, twin_rows
from rag.readers.prompted import DirectReader

if TYPE_CHECKING:
    from lab.handle import ModelHandle

# What a model does not do at all it cannot come to prefer: these are taught by SFT on one half of the titles, then by pairs on the
# other. The hierarchy's paper trains by SFT alone, trust tags are ours.
_TAUGHT_FIRST = ("hierarchy", "trust")
_HALVES = {"sft": 0.5, "dpo": 0.5}
# Strangers' questions to one that memory holds the answer of. The hierarchy is taught what to say where no source speaks, or the
# documents alone, by strangers only: few of them, asked again, are learnt by name.
_STRANGERS: Mapping[str, float] = {"hierarchy": 0.75}
_FEW_STRANGERS = 0.25
_TAUGHT = ("id", "title", "split", "context", "grade", "prompt", "completion")
METHODS = ("knowpo", "hierarchy", "notes", "dta", "context_dpo", "trust")


@dataclass(frozen=True)
class Difficulty:
    """How hard what is asked is.

    Attributes:
        documents, hard, most_hard: See ``contexts``.
        wording: Of the built-in world's items that are asked; see ``atlas_items``.
        train_wording: Of those that are trained on.
    """

    documents: int = 4
    hard: float = 0.5
    most_hard: int = 2
    wording: str = "main"
    train_wording: str = "main"

    def contexts(self) -> dict[str, Any]:
        """What ``contexts`` and ``KnowPOConfig`` take of it."""
        return {"documents": self.documents, "hard": self.hard, "most_hard": self.most_hard}


DIFFICULTIES: Mapping[str, Difficulty] = {
    "plain": Difficulty(),
    "hard": Difficulty(4, 1.0, 3, wording="held_out", train_wording="trained"),
}
SPLITS = ("dev", "test", "tune", "held")
_HELD_SHARE = 0.3


def question_items(
    source: str | None,
    *,
    split: str = "dev",
    limit: int | None = None,
    seed: int = 0,
    wording: str = "main",
    method: str = "",
) -> Stage:
    """Items of the built-in world (``atlas`` or nothing) or of a file.

    Args:
        source: ``atlas``, nothing, or a file.
        split: Part of the built-in world: ``dev`` (facts to train on), ``test``; ``tune`` and ``held`` are two parts of ``dev``
            without a shared title, for choosing settings.
        limit: Items at most.
        seed: Of every draw.
        wording: See ``atlas_items``.
        method: What is trained on them, of ``METHODS``: it settles how many strangers come along.

    Raises:
        ConfigError: There is no such split or wording.
    """
    if source not in (None, "atlas"):
        return read_items(str(source), limit=limit)
    from lab.atlas.world import load_world

    if split not in SPLITS:
        raise ConfigError(f"unknown split {split!r}; use {', '.join(SPLITS)}")
    world = load_world()
    facts = world.split("test" if split == "test" else "dev")
    if split in ("tune", "held"):
        # One division for every seed: what settings were chosen by is never trained on.
        facts = tuple(
            fact for fact in facts if (share_of(0, f"held/{fact.subject}") < _HELD_SHARE) == (split == "held")
        )
    return atlas_items(
        world,
        facts,
        seed=seed,
        strangers=recipe_settings(method)["strangers"],
        limit=limit,
        wording=wording,
        asked=split in ("test", "held"),
    )


def recipe_settings(method: str) -> dict[str, Any]:
    """What is settled by a method of ``METHODS`` itself and decides its rows: strangers, splits, keywords of its recipe."""
    return {
        "strangers": _STRANGERS.get(method, _FEW_STRANGERS),
        "shares": _HALVES if method in _TAUGHT_FIRST else None,
        **getattr(RECIPES.get(method), "keywords", {}),
    }


def prepare(
    handle: ModelHandle,
    items: Stage,
    *,
    documents: int = 4,
    hard: float = 0.5,
    most_hard: int = 2,
    samples: int = 0,
    shares: Mapping[str, float] | None = None,
    read: bool = False,
    seed: int = 0,
    progress: Report | None = None,
) -> dict[str, Stage]:
    """The stages up to contexts (and the model's reading of them), by name and in order; ``progress`` is told what is asked."""
    stages = {"items": items}
    stages["edits"] = with_edits(items.data, applied_requests(handle))
    stages["split"] = split_by_title(stages["edits"].data, shares or {"all": 1.0}, seed=seed)
    stages["memory"] = probe_memory(
        handle, stages["split"].data, samples=samples, seed=seed, progress=progress
    )
    stages["counterfactuals"] = counterfactuals(stages["memory"].data, seed=seed)
    stages["contexts"] = contexts(
        stages["counterfactuals"].data, documents=documents, hard=hard, most_hard=most_hard, seed=seed
    )
    made = stages.pop("contexts")
    stages["graded"], stages["contexts"] = made, fitting_contexts(handle, made.data)
    if read:
        stages["reading"] = read_contexts(handle, stages["contexts"].data, progress=progress)
    return stages


def training_data(
    handle: ModelHandle,
    method: str,
    items: Stage,
    *,
    config: KnowPOConfig | None = None,
    seed: int = 0,
    progress: Report | None = None,
) -> TrainingData:
    """The data of one method of ``METHODS``; ``progress`` is told what the model is asked.

    Raises:
        ConfigError: There is no such method.
    """
    if method not in METHODS:
        raise ConfigError(f"unknown training {method!r}; use {', '.join(METHODS)}")
    config = config or KnowPOConfig()
    if method == "knowpo":
        return knowpo_data(handle, items, config, seed=seed, progress=progress)
    stages = prepare(
        handle,
        items,
        documents=config.documents,
        hard=config.hard,
        most_hard=config.most_hard,
        samples=config.samples,
        shares=recipe_settings(method)["shares"],
        seed=seed,
        progress=progress,
    )
    # Only quadrants reject what the model reads; the others need the prompts alone.
    skip = () if method == "dta" else ("all",)
    stages["reading"] = read_contexts(handle, stages["contexts"].data, skip=skip, progress=progress)
    data = stages["reading"].data
    if method == "notes":
        stages["notes"] = note_rows(handle, data)
        return TrainingData(stages["notes"].data, None, stages)
    stages[method] = RECIPES[method](handle, data)
    if method not in _TAUGHT_FIRST:
        return TrainingData(None, stages[method].data, stages)
    made = records(stages[method].data)
    rows = [row | {"completion": row["chosen"]} for row in made if row["split"] == "sft"]
    if method == "trust":
        # Documents without a tag stay in, or the tag would be learnt as all that counts.
        stages["untagged"] = sft_rows(handle, data)
        rows += records(stages["untagged"].data)
    rows = [{name: row[name] for name in _TAUGHT} for row in rows]
    stages["sft"] = finish("sft", len(made), rows)
    pairs = [row for row in made if row["split"] != "sft"]
    stages["pairs"] = finish("pairs", len(made), pairs)
    return TrainingData(stages["sft"].data if rows else None, stages["pairs"].data if pairs else None, stages)


def ready_data(
    handle: ModelHandle,
    method: str,
    source: str,
    *,
    config: KnowPOConfig | None = None,
    limit: int | None = None,
    seed: int = 0,
    progress: Report | None = None,
) -> TrainingData:
    """What one method trains on: made of questions, or a file's own rows where they are ready to train on.

    Args:
        handle: The model to be trained, with its edits.
        method: One of ``METHODS``.
        source: ``atlas``, a file of questions, of pairs, or of SFT rows.
        config: Settings of the data.
        limit: Questions, or rows, at most.
        seed: Of every draw.
        progress: Told what the model is asked.

    Raises:
        ConfigError: There is no such method.
        DataError: The file is of no known form, or a row cannot be trained on.
    """
    if source == "atlas" or not _is_ready(source):
        items = question_items(source, split="dev", limit=limit, seed=seed, method=method)
        return training_data(handle, method, items, config=config, seed=seed, progress=progress)
    kind, rows = read_training_rows(source, handle.tokenizer, max_length=position_limit(handle))
    made = to_dataset(rows[:limit])
    return TrainingData(made if kind == "sft" else None, made if kind == "pairs" else None, {})


def _is_ready(source: str) -> bool:
    first = read_rows(source)[0].value
    return bool({"chosen", "rejected"} & set(first)) or "completion" in first


def evaluate_preference(request: EvaluationRequest) -> dict[str, Any]:
    """``knowlab eval preference``: adherence, robustness and what else ``preference_metrics`` holds, with cells and rows."""
    limit = request.limit or 100
    items = question_items(request.data, split=request.split, limit=limit, seed=request.seed)
    stages = prepare(request.handle, items, seed=request.seed)
    reader = DirectReader(request.handle)
    rows: Sequence[dict[str, Any]] = observe(request.handle, stages["contexts"].data, reader)
    tagged = trust_rows(reader, stages["contexts"].data)
    metrics = preference_metrics(rows) | {"flip_rate": flip_rate(tagged)} | abstention(twin_rows(rows))
    return {
        "data": request.data or "atlas",
        "n": len(rows),
        "cells": cells(rows),
        "metrics": {name: found.to_json() for name, found in metrics.items()},
        "manifests": {name: dict(stage.manifest) for name, stage in stages.items()},
        "rows": rows,
        "trust_rows": tagged,
    }
