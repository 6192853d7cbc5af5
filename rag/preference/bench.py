"""Ways of answering with documents side by side: prompts, decoding rules and trained adapters on the very same contexts."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lab.errors import ConfigError, UnknownNameError
from lab.eval.stats import Estimate, summarise
from lab.records import Passage
from rag.preference.control import equal_token_sft
from rag.preference.edited import edit_metrics, edit_rows
from rag.preference.knowpo import KnowPOConfig, TrainingData, knowpo_pairs
from rag.preference.prepare import DIFFICULTIES, prepare, question_items, recipe_settings, training_data
from rag.preference.presets import CONTROLS, train_config
from rag.preference.stage import Dataset, Record, Report, Stage, records
from rag.preference.suites import flip_rate, hierarchy_cells, observe, preference_metrics
from rag.preference.tagged import hierarchy_rows, trust_rows

if TYPE_CHECKING:
    from lab.handle import ModelHandle
    from rag.preference.train import Trained
    from rag.readers.base import Reader

SUITES = ("trust", "hierarchy", "edits")
# What is asked are other titles: nothing is set aside of the questions trained on.
_BOTH: Mapping[str, float] = {"sft": 0.4, "dpo": 0.6}
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Way:
    """One way of answering.

    Attributes:
        title: What it is, in a few words.
        reader: The reader's name.
        rule: The decoding rule's name.
        training: What an adapter is trained on; empty without one. ``sft`` and ``sft_first`` are the controls of ``knowpo``, with the
            chosen answers and without: see ``equal_token_sft``.
        changes: Settings of ``KnowPOConfig`` that differ: the ablations.
    """

    title: str
    reader: str = "direct"
    rule: str = "greedy"
    training: str = ""
    changes: Mapping[str, Any] = field(default_factory=dict)


WAYS: Mapping[str, Way] = {
    "base": Way("documents above the question"),
    "faithful": Way("a prompt that asks to keep to the documents", reader="faithful"),
    "con": Way("notes first (Chain-of-Note)", reader="con"),
    "cad": Way("context-aware decoding", rule="cad"),
    "adacad": Way("adaptive context-aware decoding", rule="adacad"),
    "coiecd": Way("decoding by entropy", rule="coiecd"),
    "ck_plug": Way("decoding by confidence gain", rule="ck_plug"),
    "parammute": Way("memory's layers muted", rule="parammute"),
    "sft": Way("what KnowPO prefers, by SFT in as many tokens", training="sft"),
    "sft_first": Way("KnowPO's first step alone, in as many tokens", training="sft_first"),
    "context_dpo": Way("documents over memory", training="context_dpo"),
    "knowpo": Way("adherence and robustness", training="knowpo"),
    "sft_con": Way("the same after notes", reader="con", training="sft", changes={"reader": "con"}),
    "sft_first_con": Way(
        "KnowPO's first step alone after notes", reader="con", training="sft_first", changes={"reader": "con"}
    ),
    "knowpo_con": Way("KnowPO after notes", reader="con", training="knowpo", changes={"reader": "con"}),
    "knowpo_no_rewrite": Way("KnowPO without rewriting", training="knowpo", changes={"rewrite": False}),
    "knowpo_no_ratio": Way("KnowPO without balancing", training="knowpo", changes={"balanced": False}),
    "knowpo_con_no_rewrite": Way(
        "KnowPO after notes without rewriting",
        reader="con",
        training="knowpo",
        changes={"reader": "con", "rewrite": False},
    ),
    "knowpo_con_no_ratio": Way(
        "KnowPO after notes without balancing",
        reader="con",
        training="knowpo",
        changes={"reader": "con", "balanced": False},
    ),
    "dta": Way("answer or admit (Divide-Then-Align)", training="dta"),
    "hierarchy": Way("user over documents over memory", training="hierarchy"),
    "trust": Way("believe what is verified", training="trust"),
}


@dataclass(frozen=True)
class PreferenceBench:
    """What all cells of a comparison share.

    Attributes:
        data: ``atlas`` or a file: what is asked.
        train_data: ``atlas`` (its facts for tuning) or another file: what adapters are trained on.
        split: Part of the built-in world that is asked: ``test``, or ``held`` to choose settings by; adapters are then trained on
            the rest of the facts for tuning (see ``question_items``).
        difficulty: Of what is asked, a name of ``DIFFICULTIES``; adapters are trained on contexts as hard.
        suites: What is measured beside adherence and robustness: of ``SUITES``.
        limit: Questions asked at most; each gives up to three contexts.
        train_limit: Questions trained on at most.
        samples: Sampled answers of memory for training; see ``probe_memory``.
        draws: Sets of contexts of each question trained on; see ``KnowPOConfig``.
        latency: Contexts that are asked one at a time, to measure seconds.
        adapters: Way to folder of an adapter that is trained already.
    """

    data: str = "atlas"
    train_data: str = "atlas"
    split: str = "test"
    difficulty: str = "plain"
    suites: tuple[str, ...] = ()
    limit: int = 100
    train_limit: int = 400
    samples: int = 10
    draws: int = 1
    latency: int = 8
    adapters: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for given, known, what in (
            (self.difficulty, DIFFICULTIES, "difficulty"),
            (self.split, ("test", "held"), "split"),
            *((name, SUITES, "suite") for name in self.suites),
        ):
            if given not in known:
                raise UnknownNameError(what, given, tuple(known))


def check_ways(names: Sequence[str]) -> list[str]:
    """The names, once each.

    Raises:
        UnknownNameError: There is no such way.
        ConfigError: There is none at all.
    """
    for name in names:
        if name not in WAYS:
            raise UnknownNameError("method", name, tuple(WAYS))
    if not names:
        raise ConfigError(f"name at least one method of {', '.join(WAYS)}")
    return list(dict.fromkeys(names))


def cell_name(
    handle: ModelHandle, way: str, bench: PreferenceBench, training: Mapping[str, Any], seed: int
) -> str:
    """The file of a cell: equal exactly where its figures are.

    Raises:
        ConfigError: An adapter is trained on the file that is asked.
    """
    trained, given = bool(WAYS[way].training), bench.adapters.get(way)
    if trained and given is None and bench.data != "atlas" and bench.data == bench.train_data:
        raise ConfigError(
            f"{way} would be trained on {bench.data}, which is what is asked; give another file with --train-data"
        )
    told: dict[str, Any] = {
        "state": handle.state,
        "way": asdict(WAYS[way]),
        "seed": seed,
        "data": content(bench.data),
        "asked": asdict(DIFFICULTIES[bench.difficulty]),
        **{name: getattr(bench, name) for name in ("split", "suites", "limit", "latency")},
    }
    if given is not None:
        told["adapter"] = [content(str(file)) for file in sorted(Path(given).glob("*.*")) if file.is_file()]
    elif trained:
        told |= {
            "train": content(bench.train_data),
            "train_limit": bench.train_limit,
            "data_config": data_config(way, bench).to_json(),
            "recipe": recipe_settings(WAYS[way].training),
            "config": asdict(train_config(handle, WAYS[way].training, **training)),
        }
    text = json.dumps(told, sort_keys=True, default=str)
    return f"{way}-{seed}-{hashlib.sha256(text.encode()).hexdigest()[:12]}.json"


def data_config(way: str, bench: PreferenceBench) -> KnowPOConfig:
    """Settings of the data that an adapter is trained on, the ratios of errors settled."""
    hard = DIFFICULTIES[bench.difficulty]
    settings = {"draws": bench.draws, "samples": bench.samples, "shares": _BOTH}
    config = KnowPOConfig(**hard.contexts(), **settings, **WAYS[way].changes)
    return replace(config, ratios=config.settled_ratios())


def content(source: str) -> str:
    """What a source of questions stands for in the name of a cell: a file's digest, else the source itself."""
    path = Path(source)
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else source


class PreferenceWorkshop:
    """Runs cells on one model; contexts are made once a seed and are the same for all ways.

    Args:
        handle: The model, with its patches.
        bench: What is asked and trained on.
        training: Settings of training that replace the preset's; see ``train_config``.
        progress: Told what the model is asked, and about every update of a training.
    """

    def __init__(
        self,
        handle: ModelHandle,
        bench: PreferenceBench,
        training: Mapping[str, Any],
        *,
        progress: Report | None = None,
    ) -> None:
        self.handle, self.bench, self.training, self.progress = handle, bench, training, progress
        self._contexts: dict[int, Dataset] = {}
        # What KnowPO, its ablations and its control share, by seed and by the reader that is trained: data with pairs, first step.
        self._begun: dict[tuple[int, str], tuple[TrainingData, Trained]] = {}

    def run(self, way: str, seed: int) -> Record:
        """One cell: rows, metrics, seconds, and what was trained."""
        contexts = self.contexts(seed)
        with ExitStack() as stack:
            trained = self._adapted(way, seed, stack)
            reader = self._reader(way)
            with reader.holding():
                rows = observe(self.handle, contexts, reader)
                seconds = self._latency(reader, contexts)
            further = self._further(reader, contexts, seed)
        metrics = {
            name: found.to_json()
            for name, found in (preference_metrics(rows) | further_metrics(further)).items()
        }
        return {
            "method": way,
            "title": WAYS[way].title,
            "model": self.handle.name,
            "seed": seed,
            "data": self.bench.data,
            "metrics": metrics | {"latency": summarise(seconds, None).to_json()},
            "latencies": seconds,
            "training": trained,
            "rows": rows,
            **further,
        }

    def contexts(self, seed: int) -> Dataset:
        """What is asked."""
        if seed not in self._contexts:
            bench = self.bench
            hard = DIFFICULTIES[bench.difficulty]
            items = question_items(
                bench.data, split=bench.split, limit=bench.limit, seed=seed, wording=hard.wording
            )
            made = prepare(self.handle, items, seed=seed, progress=self.progress, **hard.contexts())
            self._contexts[seed] = made["contexts"].data
        return self._contexts[seed]

    def _reader(self, way: str) -> Reader:
        from rag.decoding import get_rule
        from rag.readers import READERS

        return READERS.get(WAYS[way].reader)(self.handle, get_rule(WAYS[way].rule))

    def _adapted(self, way: str, seed: int, stack: ExitStack) -> Record:
        """Applies the adapter of a way, if it has one, until ``stack`` closes."""
        from lab.patch_io import load_saved
        from rag.preference.train import train_preference

        if (given := self.bench.adapters.get(way)) is not None:
            stack.enter_context(load_saved(given).applied(self.handle))
            return {"adapter": given}
        method = WAYS[way].training
        if not method:
            return {}
        start = time.perf_counter()
        training = train_config(self.handle, method, **self.training)
        first = None
        if method in (*CONTROLS, "knowpo"):
            data, first = self._two_steps(way, seed)
            if method in CONTROLS:
                data, training = equal_token_sft(self.handle, data, training, chosen=method == "sft")
                first = None
        else:
            data = training_data(
                self.handle,
                method,
                self._items(seed, method),
                config=data_config(way, self.bench),
                seed=seed,
                progress=self.progress,
            )
        trained = train_preference(
            self.handle, data, training, method=way, seed=seed, progress=self.progress, first=first
        )
        stack.enter_context(trained.patch.applied(self.handle))
        return {
            "rows": {name: len(rows) for name, rows in (("sft", data.sft), ("pairs", data.pairs)) if rows},
            "stages": {name: dict(stage.manifest) for name, stage in data.stages.items()},
            "curves": trained.curves,
            "seconds": time.perf_counter() - start,
        }

    def _two_steps(self, way: str, seed: int) -> tuple[TrainingData, Trained]:
        """KnowPO's data as a way wants it, with the pairs that come after the first step, and that step.

        The ablations differ in the second step only, and the control sees what both steps see, so they all go on from one first
        step and from the same pairs.
        """
        from rag.preference.train import train_preference

        config = data_config(way, self.bench)
        shared = (seed, config.reader)
        if shared not in self._begun:
            training = train_config(self.handle, "knowpo", **self.training)
            data = training_data(
                self.handle, "knowpo", self._items(seed), config=config, seed=seed, progress=self.progress
            )
            rows = replace(data, pairs=None, then=None)
            first = train_preference(
                self.handle, rows, training, method="knowpo", seed=seed, progress=self.progress
            )
            if data.then is not None:
                with first.patch.applied(self.handle):
                    data = data.then(self.handle)
            self._begun[shared] = data, first
        data, first = self._begun[shared]
        return knowpo_pairs(self.handle, data, config, seed=seed), first

    def _items(self, seed: int, method: str = "knowpo") -> Stage:
        """What adapters are trained on."""
        return question_items(
            self.bench.train_data,
            split="dev" if self.bench.split == "test" else "tune",
            limit=self.bench.train_limit,
            seed=seed,
            wording=DIFFICULTIES[self.bench.difficulty].train_wording,
            method=method,
        )

    def _further(self, reader: Reader, contexts: Dataset, seed: int) -> dict[str, list[Record]]:
        made: dict[str, list[Record]] = {}
        if "trust" in self.bench.suites:
            made["trust_rows"] = trust_rows(reader, contexts)
        if "hierarchy" in self.bench.suites:
            made["hierarchy_rows"] = hierarchy_rows(self.handle, contexts)
        if "edits" in self.bench.suites:
            made["edit_rows"] = edit_rows(self.handle, reader, seed=seed)
        return made

    def _latency(self, reader: Reader, contexts: Dataset) -> list[float]:
        found = []
        for row in records(contexts)[: self.bench.latency]:
            start = time.perf_counter()
            reader.read(row["question"], [Passage("", text) for text in row["documents"]])
            found.append(time.perf_counter() - start)
        return found


def further_metrics(rows: Mapping[str, Sequence[Row]]) -> dict[str, Estimate]:
    """Figures of the further suites, of as many as were asked."""
    found: dict[str, Estimate] = {}
    if trusted := rows.get("trust_rows"):
        found["flip_rate"] = flip_rate(trusted)
    if ranked := rows.get("hierarchy_rows"):
        found |= {f"cell {name}": value for name, value in hierarchy_cells(ranked).items()}
    if edited := rows.get("edit_rows"):
        found |= edit_metrics(edited)
    return found


def pooled(cells: Sequence[Row]) -> dict[str, Estimate]:
    """The figures of one way over all its seeds: every context of every seed counts once."""
    found = preference_metrics([row for cell in cells for row in cell["rows"]])
    # An item may come again with another seed; it is then another question.
    found |= further_metrics(
        {
            name: [
                row | {"item_id": f"{cell['seed']}/{row['item_id']}"}
                for cell in cells
                for row in cell.get(name, ())
            ]
            for name in ("trust_rows", "hierarchy_rows", "edit_rows")
        }
    )
    return found | {"latency": summarise([value for cell in cells for value in cell["latencies"]], None)}
