"""KnowPO from items to training data: all stages in order, each with its manifest."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lab.errors import ConfigError
from rag.preference.balance import balance
from rag.preference.memory import fitting_contexts, probe_memory
from rag.preference.pairs import (
    BARE,
    DEFAULT_SHARES,
    Frame,
    pairs,
    read_contexts,
    split_by_title,
    word_pairs,
)
from rag.preference.passages import contexts, counterfactuals
from rag.preference.sources import with_edits
from rag.preference.stage import Dataset, Report, Stage, draw_for, finish, records
from rag.prompts import prompts_for

if TYPE_CHECKING:
    from lab.handle import ModelHandle

# The two errors about adherence to the two about robustness as 2 to 1, each pair half and half.
RATIOS: Mapping[str, float] = {
    "ignorance": 2.0,
    "overinclusion_mixed": 2.0,
    "overinclusion_known": 1.0,
    "overinclusion_unknown": 1.0,
}
# Notes leave out what is about others, so that below them few documents are left to be overread: mistakes of both kinds of
# overinclusion that memory knows count half, and those that want an admission, which hardly occur, next to nothing.
NOTES_RATIOS: Mapping[str, float] = {
    "ignorance": 2.0,
    "overinclusion_mixed": 1.0,
    "overinclusion_known": 1.0,
    "overinclusion_unknown": 0.1,
}
# Ours. KnowPO's released code takes related, conflict, irrelevant and empty as 5 to 5 to 4 to 1, but documents that agree with
# memory, and questions without any, teach nothing about which of the two to believe.
AT_MOST: Mapping[str, float] = {"related": 0.5, "empty": 0.125}


@dataclass(frozen=True)
class KnowPOConfig:
    """Settings of KnowPO's data.

    Attributes:
        documents, hard, most_hard: See ``contexts``.
        draws: Sets of contexts of each question, each with a counterfactual, distractors and an order of its own, in place of
            further passes over the same sets.
        reader: How contexts are read, the name of a reader: answers are trained where this one gives them, with ``con`` after notes.
        samples, temperature, delta: See ``probe_memory``; all samples must be right for a fact to count as known.
        ratios: Parts of the errors; without them ``RATIOS``, and ``NOTES_RATIOS`` where the reader writes notes.
        total: Pairs in all; see ``balance``.
        repeat: How often a pair of a rare error may occur. Ours; without repetition the rarest error decides how few pairs remain.
        shares: Splits by title; ``sft`` and ``dpo`` are trained on.
        at_most: Kind of context to its most rows in the SFT step, see ``thinned``; empty for all that there are.
        after_first: Whether the mistakes to be unlearned are those of the model as the first step leaves it, which is the one that the
            second step trains; off, those of the model before.
        rewrite, balanced: Off for the ablations.
        frame: How answers are worded.
    """

    documents: int = 4
    hard: float = 0.5
    most_hard: int = 2
    draws: int = 1
    reader: str = "direct"
    samples: int = 10
    temperature: float = 0.7
    delta: float = 1.0
    ratios: Mapping[str, float] | None = None
    total: int | None = None
    repeat: int = 4
    shares: Mapping[str, float] = field(default_factory=lambda: dict(DEFAULT_SHARES))
    at_most: Mapping[str, float] = field(default_factory=lambda: dict(AT_MOST))
    after_first: bool = True
    rewrite: bool = True
    balanced: bool = True
    frame: Frame = BARE

    def settled_ratios(self) -> Mapping[str, float]:
        """The parts of the errors."""
        from rag.readers import READERS

        return self.ratios or (NOTES_RATIOS if READERS.get(self.reader).takes_notes else RATIOS)

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self)


@dataclass(frozen=True)
class TrainingData:
    """What a recipe hands to training.

    Attributes:
        sft: Rows ``prompt, completion``; ``None`` for a recipe without this step.
        pairs: Rows ``prompt, chosen, rejected``; ``None`` likewise.
        stages: Every stage by its name, in order.
        then: Completes the data with pairs that the model as the first step leaves it is asked for; ``None`` where they are there.
    """

    sft: Dataset | None
    pairs: Dataset | None
    stages: Mapping[str, Stage]
    then: Callable[[ModelHandle], TrainingData] | None = None

    def save(self, folder: str | Path) -> None:
        """Writes rows and manifest of every stage."""
        for number, (name, stage) in enumerate(self.stages.items()):
            stage.save(folder, f"{number:02d}-{name}")


def applied_requests(handle: ModelHandle) -> list[Mapping[str, Any]]:
    """What the patches on a model were asked to change."""
    return [request for entry in handle.applied for request in entry.patch.provenance.requests]


def knowpo_data(
    handle: ModelHandle,
    items: Stage,
    config: KnowPOConfig | None = None,
    *,
    seed: int = 0,
    progress: Report | None = None,
) -> TrainingData:
    """All stages: edits, split, memory, draws, counterfactuals, contexts; SFT rows, thinned; reading, pairs, rewriting, balance.

    With ``config.after_first`` those from the reading on are left to ``then``, which the model is handed to after the first step.

    Args:
        handle: The model to be trained, with its edits: its memory and its mistakes are asked for.
        items: Items of any source.
        config: Settings.
        seed: Of every draw.
        progress: Told what memory and readings are asked for.
    """
    config = config or KnowPOConfig()
    stages = {"items": items}

    def add(name: str, stage: Stage) -> Dataset:
        stages[name] = stage
        return stage.data

    data = add("edits", with_edits(items.data, applied_requests(handle)))
    data = add("split", split_by_title(data, config.shares, seed=seed))
    data = add(
        "memory",
        probe_memory(
            handle,
            data,
            samples=config.samples,
            temperature=config.temperature,
            delta=config.delta,
            seed=seed,
            progress=progress,
        ),
    )
    if config.draws != 1:
        data = add("draws", repeated(data, config.draws))
    data = add("counterfactuals", counterfactuals(data, seed=seed))
    data = add(
        "contexts",
        contexts(data, documents=config.documents, hard=config.hard, most_hard=config.most_hard, seed=seed),
    )
    data = add("fitting", fitting_contexts(handle, data))
    # Nothing is rejected here; a reader with notes is asked for them all the same.
    shown = add(
        "shown",
        read_contexts(handle, _only(data, "sft"), skip=("sft",), reader=config.reader, progress=progress),
    )
    taught = add("sft", sft_rows(handle, shown, config.frame))
    if config.at_most:
        taught = add("thinned", thinned(taught, config.at_most, seed=seed))
    made = TrainingData(taught, None, stages)
    if not config.after_first:
        return knowpo_pairs(handle, made, config, seed=seed, progress=progress)
    return replace(
        made, then=lambda trained: knowpo_pairs(trained, made, config, seed=seed, progress=progress)
    )


# What comes after it differs between KnowPO and its ablations.
_BEFORE_WORDING = "pairs"


def knowpo_pairs(
    handle: ModelHandle,
    data: TrainingData,
    config: KnowPOConfig,
    *,
    seed: int = 0,
    progress: Report | None = None,
) -> TrainingData:
    """The data with pairs: the model's answers to the contexts, what is wrong about them, rewriting, balance.

    Args:
        handle: The model that makes the mistakes.
        data: What ``knowpo_data`` made. Where it has been completed before, as for an ablation, the answers and the pairs are kept, and
            worded and balanced anew.
        config: Settings.
        seed: Of every draw.
        progress: Told what readings are asked for.
    """
    names = list(data.stages)
    if done := _BEFORE_WORDING in names:
        names = names[: names.index(_BEFORE_WORDING) + 1]
    stages = {name: data.stages[name] for name in names}

    def add(name: str, stage: Stage) -> Dataset:
        stages[name] = stage
        return stage.data

    if not done:
        asked = _only(stages["fitting"].data, "dpo")
        read = add("reading", read_contexts(handle, asked, reader=config.reader, progress=progress))
        add(_BEFORE_WORDING, pairs(handle, read, seed=seed))
    made = stages[_BEFORE_WORDING].data
    made = add("rewrite", word_pairs(handle, made, frame=config.frame, rewrite=config.rewrite))
    if config.balanced:
        made = add(
            "balance",
            balance(made, config.settled_ratios(), total=config.total, repeat=config.repeat, seed=seed),
        )
    return TrainingData(data.sft, made, stages)


def repeated(data: Dataset, draws: int) -> Stage:
    """Every item ``draws`` times, under names of its own from the second on, so that what is drawn for it differs.

    Raises:
        ConfigError: Fewer than one.
    """
    if draws < 1:
        raise ConfigError(f"each question needs at least one set of contexts, not {draws}")
    rows = records(data)
    made = [
        row | {"id": f"{row['id']}#{draw}" if draw else row["id"]} for draw in range(draws) for row in rows
    ]
    return finish("draws", len(rows), made, draws=draws)


def thinned(data: Dataset, at_most: Mapping[str, float], *, seed: int = 0) -> Stage:
    """Leaves out rows of contexts that hardly tell memory and documents apart.

    Args:
        data: SFT rows.
        at_most: Kind of context to its most rows, as a part of the mean number of those that contradict and those that are
            irrelevant. Where there is neither, all rows stay.
        seed: Draws which rows stay.
    """
    rows = records(data)
    kinds = Counter(row["context"] for row in rows)
    telling = (kinds["conflict"] + kinds["irrelevant"]) / 2
    gone: set[int] = set()
    for kind, part in at_most.items():
        places = [place for place, row in enumerate(rows) if row["context"] == kind]
        beyond = len(places) - round(part * telling) if telling else 0
        gone.update(draw_for(seed, "thinned", kind).sample(places, max(0, beyond)))
    made = [row for place, row in enumerate(rows) if place not in gone]
    return finish(
        "thinned", len(rows), made, {"beyond their part": len(gone)}, at_most=dict(at_most), seed=seed
    )


def _only(data: Dataset, split: str) -> Dataset:
    return data.filter(lambda row: row["split"] == split, keep_in_memory=True, load_from_cache_file=False)


def sft_rows(handle: ModelHandle, data: Dataset, frame: Frame = BARE, *, split: str = "sft") -> Stage:
    """The right answer of every context of a split, worded as in the pairs, and of the question alone.

    Contexts that do not help are answered from memory where it knows, and with an admission where it has nothing.
    """
    prompts = prompts_for(handle)
    rows = [row for row in records(data) if row["split"] == split]
    made, skipped, asked = [], 0, set()
    for row in rows:
        if row["context"] != "irrelevant":
            role, answer = "context", row["context_answers"][0]
        elif row["prior_known"]:
            role, answer = "memory", row["prior"]
        elif row["memory"] and row["prior_unknown"] < 0.5:
            skipped += 1
            continue
        else:
            role, answer = "unknown", prompts.unknown
        answered = f" {frame.word(role, answer)}{prompts.stop[0]}"
        kept = {key: row[key] for key in ("id", "title", "split", "context", "grade")}
        made.append(kept | {"prompt": row["prompt"], "completion": row.get("lead", "") + answered})
        # Once a question, however many contexts were drawn for it.
        if row["context"] == "irrelevant" and row["question"] not in asked:
            asked.add(row["question"])
            made.append(
                kept
                | {
                    "context": "empty",
                    "grade": "",
                    "prompt": prompts.closed(row["question"]),
                    "completion": answered,
                }
            )
    return finish("sft", len(rows), made, {"memory is unsure": skipped}, split=split)
