"""Ways of answering with documents side by side: prompts, decoding rules and trained adapters on the very same contexts."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lab.errors import ConfigError, UnknownNameError
from lab.eval.stats import Estimate, summarise
from lab.records import Passage
from rag.preference.knowpo import KnowPOConfig, TrainingData
from rag.preference.prepare import prepare, question_items, training_data
from rag.preference.stage import Dataset, Record, records
from rag.preference.suites import observe, preference_metrics

if TYPE_CHECKING:
    from lab.handle import ModelHandle
    from rag.preference.train import TrainConfig
    from rag.readers.base import Reader

Row = Mapping[str, Any]
Report = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Way:
    """One way of answering.

    Attributes:
        title: What it is, in a few words.
        reader: The reader's name.
        rule: The decoding rule's name.
        training: What an adapter is trained on; empty without one. ``sft`` is the first step of ``knowpo`` alone.
    """

    title: str
    reader: str = "direct"
    rule: str = "greedy"
    training: str = ""


WAYS: Mapping[str, Way] = {
    "base": Way("documents above the question"),
    "faithful": Way("a prompt that asks to keep to the documents", reader="faithful"),
    "con": Way("notes first (Chain-of-Note)", reader="con"),
    "cad": Way("context-aware decoding", rule="cad"),
    "adacad": Way("adaptive context-aware decoding", rule="adacad"),
    "coiecd": Way("decoding by entropy", rule="coiecd"),
    "ck_plug": Way("decoding by confidence gain", rule="ck_plug"),
    "parammute": Way("memory's layers muted", rule="parammute"),
    "sft": Way("the first step of KnowPO alone", training="sft"),
    "context_dpo": Way("documents over memory", training="context_dpo"),
    "knowpo": Way("adherence and robustness", training="knowpo"),
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
        split: Part of the built-in world that is asked.
        limit: Questions asked at most; each gives up to three contexts.
        train_limit: Questions trained on at most.
        documents: Documents in a context.
        samples: Sampled answers of memory for training; see ``probe_memory``.
        latency: Contexts that are asked one at a time, to measure seconds.
        adapters: Way to folder of an adapter that is trained already.
    """

    data: str = "atlas"
    train_data: str = "atlas"
    split: str = "test"
    limit: int = 100
    train_limit: int = 400
    documents: int = 4
    samples: int = 10
    latency: int = 8
    adapters: Mapping[str, str] = field(default_factory=dict)


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


def cell_name(handle: ModelHandle, way: str, bench: PreferenceBench, training: TrainConfig, seed: int) -> str:
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
        "data": _content(bench.data),
        **{name: getattr(bench, name) for name in ("split", "limit", "documents", "latency")},
    }
    if given is not None:
        told["adapter"] = [_content(str(file)) for file in sorted(Path(given).glob("*.*")) if file.is_file()]
    elif trained:
        told |= {
            "train": _content(bench.train_data),
            "train_limit": bench.train_limit,
            "samples": bench.samples,
            "config": asdict(training),
        }
    text = json.dumps(told, sort_keys=True, default=str)
    return f"{way}-{seed}-{hashlib.sha256(text.encode()).hexdigest()[:12]}.json"


def _content(source: str) -> str:
    path = Path(source)
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else source


class PreferenceWorkshop:
    """Runs cells on one model; contexts are made once a seed and are the same for all ways.

    Args:
        handle: The model, with its patches.
        bench: What is asked and trained on.
        training: How adapters are trained.
        progress: Told about every update of a training.
    """

    def __init__(
        self,
        handle: ModelHandle,
        bench: PreferenceBench,
        training: TrainConfig,
        *,
        progress: Report | None = None,
    ) -> None:
        self.handle, self.bench, self.training, self.progress = handle, bench, training, progress
        self._contexts: dict[int, Dataset] = {}

    def run(self, way: str, seed: int) -> Record:
        """One cell: rows, metrics, seconds, and what was trained."""
        contexts = self.contexts(seed)
        with ExitStack() as stack:
            trained = self._adapted(way, seed, stack)
            reader = self._reader(way)
            with reader.holding():
                rows = observe(self.handle, contexts, reader)
                seconds = self._latency(reader, contexts)
        metrics = {name: found.to_json() for name, found in preference_metrics(rows).items()}
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
        }

    def contexts(self, seed: int) -> Dataset:
        """What is asked."""
        if seed not in self._contexts:
            bench = self.bench
            items = question_items(bench.data, split=bench.split, limit=bench.limit, seed=seed)
            made = prepare(self.handle, items, documents=bench.documents, seed=seed)
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
        items = question_items(self.bench.train_data, split="dev", limit=self.bench.train_limit, seed=seed)
        config = KnowPOConfig(documents=self.bench.documents, samples=self.bench.samples)
        data = training_data(
            self.handle, "knowpo" if method == "sft" else method, items, config=config, seed=seed
        )
        if method == "sft":
            data = TrainingData(data.sft, None, data.stages)
        trained = train_preference(
            self.handle, data, self.training, method=method, seed=seed, progress=self.progress
        )
        stack.enter_context(trained.patch.applied(self.handle))
        return {
            "rows": {name: len(rows) for name, rows in (("sft", data.sft), ("pairs", data.pairs)) if rows},
            "stages": {name: dict(stage.manifest) for name, stage in data.stages.items()},
            "curves": trained.curves,
            "seconds": time.perf_counter() - start,
        }

    def _latency(self, reader: Reader, contexts: Dataset) -> list[float]:
        found = []
        for row in records(contexts)[: self.bench.latency]:
            start = time.perf_counter()
            reader.read(row["question"], [Passage("", text) for text in row["documents"]])
            found.append(time.perf_counter() - start)
        return found


def pooled(cells: Sequence[Row]) -> dict[str, Estimate]:
    """The figures of one way over all its seeds: every context of every seed counts once."""
    found = preference_metrics([row for cell in cells for row in cell["rows"]])
    return found | {"latency": summarise([value for cell in cells for value in cell["latencies"]], None)}
