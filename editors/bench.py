"""Benchmark cells: one editor on one suite, model and seed each; what a cell is, how one is run, how seeds are pooled."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import reduce
from operator import add
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lab.errors import ConfigError, KnowLabError

if TYPE_CHECKING:
    from editors.base import Editor
    from editors.timing import Clock
    from lab.data.cases import CaseSet
    from lab.eval.baseline import BaselineCache
    from lab.eval.report import Report
    from lab.eval.suite import Suite, Values
    from lab.handle import ModelHandle
    from lab.patch import WeightPatch
    from lab.records import EditRequest

# Rises when cells of an older version must not be taken for finished.
CELL_VERSION = 1
_MOMENTS = 20

Row = dict[str, Any]
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Cell:
    """One run of a comparison.

    Attributes:
        editor: Specification.
        suite: Name of the suite.
        model: Built-in name, folder or hub id.
        seed: Draws cases and generated prefixes.
    """

    editor: str
    suite: str
    model: str
    seed: int = 0

    def __str__(self) -> str:
        return f"{self.editor} on {self.suite}, {self.model}, seed {self.seed}"


@dataclass(frozen=True)
class BenchOptions:
    """What all cells of a comparison share.

    Attributes:
        data: Suite to its file or hub id, for suites that need one.
        limit: Cases per cell; all without it.
        protocol: ``single``, ``batch`` or ``sequential``.
        settings: Settings of editors; those under ``""`` go to all, those under a specification to that one.
        corpus: Text for key statistics.
        fluency: Whether texts are generated; without a choice as the suite does in print.
        split, convention, known_only, skip_malformed: As in ``knowlab eval``.
        device, dtype, quantize: Where and how the model runs.
        drift: Cases whose attention drift is measured, where the editor searches a value.
        general_ability: Tasks of lm-eval that are asked before and after the edits.
        task_path: Folder with further tasks.
        task_limit: Rows of each task.
        batch_size: Rows in one forward pass.
        threads: Torch's threads in each process; torch's own choice without it.
    """

    data: Mapping[str, str] = field(default_factory=dict)
    limit: int | None = None
    protocol: str = "single"
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    corpus: str = "auto"
    fluency: bool | None = None
    split: str = "test"
    convention: str = "easyedit"
    known_only: bool = False
    skip_malformed: bool = False
    device: str = "cpu"
    dtype: str = "float32"
    quantize: str | None = None
    drift: int = 4
    general_ability: tuple[str, ...] = ()
    task_path: str | None = None
    task_limit: int | None = None
    batch_size: int = 64
    threads: int | None = None

    def settings_of(self, editor: str) -> dict[str, Any]:
        """Settings of one editor."""
        return {**self.settings.get("", {}), **self.settings.get(editor, {})}


def plan_cells(
    editors: Sequence[str], suites: Sequence[str], models: Sequence[str], seeds: Sequence[int]
) -> tuple[Cell, ...]:
    """All cells, those of one model together.

    Raises:
        ConfigError: One of the lists is empty.
        UnknownNameError: No such editor, penalty or suite.
    """
    from editors.base import get_editor
    from lab.eval.suites import get_suite

    for name, items in (("editor", editors), ("suite", suites), ("model", models), ("seed", seeds)):
        if not items:
            raise ConfigError(f"a comparison needs at least one {name}")
    for editor in editors:
        get_editor(editor)
    for suite in suites:
        get_suite(suite)
    return tuple(
        Cell(editor, suite, model, seed)
        for model in dict.fromkeys(models)
        for suite in dict.fromkeys(suites)
        for seed in dict.fromkeys(seeds)
        for editor in dict.fromkeys(editors)
    )


def cell_file(cell: Cell, options: BenchOptions) -> str:
    """Name of the file that keeps a finished cell: readable, and different for everything that its figures depend on."""
    decisive = asdict(options)
    for name in ("batch_size", "threads", "settings", "data"):
        del decisive[name]
    # What was not asked for is not named, so that cells from before there was a choice stay valid.
    if options.quantize is None:
        del decisive["quantize"]
    if not options.general_ability:
        for name in ("general_ability", "task_path", "task_limit"):
            del decisive[name]
    source = options.data.get(cell.suite)
    decisive |= {
        "version": CELL_VERSION,
        "cell": asdict(cell),
        "settings": options.settings_of(cell.editor),
        "data": None if source is None else [source, content_digest(Path(source))],
        "model": weights_stamp(cell.model),
    }
    digest = hashlib.sha256(json.dumps(decisive, sort_keys=True, default=str).encode()).hexdigest()[:12]
    words = [cell.editor, cell.suite, Path(cell.model).name, str(cell.seed)]
    return "-".join(re.sub(r"[^\w+.]+", "_", word) for word in words) + f"-{digest}.json"


def content_digest(file: Path) -> str:
    """Hash of a file; empty where there is none."""
    return hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else ""


def weights_stamp(model: str) -> list[Any]:
    """What tells the weights in a folder from others in the same folder, without reading them."""
    from lab.atlas.weights import MODEL_NAMES, weights_path

    folder = weights_path(model) if model in MODEL_NAMES else Path(model)
    files = sorted(folder.glob("*.safetensors")) if folder is not None and folder.is_dir() else []
    return [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]


# ---- running -----------------------------------------------------------------------------------------------------------


class Workshop:
    """Runs cells one after another; keeps the last model, and what it answered as it was.

    Args:
        options: What the cells share.
    """

    def __init__(self, options: BenchOptions) -> None:

        self.options = options
        self._model: tuple[str, ModelHandle, BaselineCache] | None = None
        self._cases: dict[tuple[str, int], CaseSet] = {}
        self._abilities: dict[str, Any] = {}

    def attempt(self, cell: Cell) -> Row:
        """``run``, with an error as a row of its own: one broken cell must not take the others down."""
        try:
            return self.run(cell)
        except KnowLabError as error:
            return asdict(cell) | {"error": str(error)}
        except Exception as error:
            return asdict(cell) | {"error": f"{type(error).__name__}: {error}"}

    def run(self, cell: Cell) -> Row:
        """Runs one cell.

        Returns:
            Plain values: ``editor``, ``suite``, ``model``, ``seed``, ``n``, ``metrics``, ``before``, ``seconds_per_edit``,
            ``seconds_preparing``, ``peak_mb``, ``attention_drift``, ``cases`` with the values of each, and the rest of a report.

        Raises:
            KnowLabError: The cell cannot be run.
        """
        import torch

        from editors.base import get_editor
        from editors.timing import Clock, timed
        from lab.eval.run import evaluate_editing
        from lab.eval.suites import SuiteOptions, get_suite
        from lab.peak import peak_memory

        options = self.options
        if options.threads is not None:
            torch.set_num_threads(options.threads)
        handle, cache = self._open(cell.model)
        suite = get_suite(cell.suite, SuiteOptions(fluency=options.fluency, convention=options.convention))
        cases = self.cases_of(cell)
        editor = get_editor(
            cell.editor, corpus=options.corpus, seed=cell.seed, **options.settings_of(cell.editor)
        )
        total = min(len(cases), options.limit or len(cases))
        shown = options.drift if _searches(cell.editor) else 0
        clock = Clock(keep=self._kept(shown, total))
        with peak_memory(handle.device) as peak:
            preparing = self._prepare(editor, handle, cases)
            report = evaluate_editing(
                suite,
                handle,
                timed(editor, clock),
                cases,
                limit=options.limit,
                seed=cell.seed,
                protocol=options.protocol,  # type: ignore[arg-type]
                known_only=options.known_only,
                name=cell.editor,
                batch_size=options.batch_size,
                retention_every=math.ceil(total / _MOMENTS) if options.protocol == "sequential" else 0,
                cache=cache,
            )
        drift = drift_of(handle, clock.kept[:shown], options.protocol)
        row = _row(cell, report, clock, preparing, peak.mb, drift)
        if options.general_ability:
            from editors.bench_ability import ability_row

            before = self._abilities.setdefault(cell.model, {})
            row["general_ability"] = ability_row(handle, clock.kept, options, before)
        return row

    def _kept(self, shown: int, total: int) -> int:
        """How many patches are looked at afterwards: ability after a sequence or batch is that after all of it."""
        if not self.options.general_ability:
            return shown
        return max(shown, self.options.drift if self.options.protocol == "single" else total)

    def _open(self, name: str) -> tuple[ModelHandle, Any]:
        from lab.cli.session import open_model
        from lab.eval.baseline import BaselineCache

        if self._model is None or self._model[0] != name:
            # The old model goes before the new one comes.
            self._model = None
            options = self.options
            handle = open_model(name, device=options.device, dtype=options.dtype, quantize=options.quantize)
            self._model = (name, handle, BaselineCache())
        return self._model[1], self._model[2]

    def open(self, name: str) -> ModelHandle:
        """The model of that name; the one that is open already, where it is that."""
        return self._open(name)[0]

    def cache(self, name: str) -> BaselineCache:
        """What the model of that name answered as it was, as far as it was asked."""
        return self._open(name)[1]

    def cases_of(self, cell: Cell) -> CaseSet:
        """The cases that a cell draws from."""
        from lab.eval.sources import suite_cases

        key = (cell.suite, cell.seed)
        if key not in self._cases:
            options = self.options
            self._cases[key] = suite_cases(
                cell.suite,
                options.data.get(cell.suite),
                split=options.split,
                seed=cell.seed,
                skip_malformed=options.skip_malformed,
                convention=options.convention,
            )
        return self._cases[key]

    def _prepare(self, editor: Editor, handle: ModelHandle, cases: CaseSet) -> float:
        """One edit outside the clock: key statistics, prefixes and the like are made once per model, not per edit."""
        first = next((case.requests[:1] for case in cases if not case.unsupported and case.requests), None)
        begin = time.perf_counter()
        if first is not None:
            # What is wrong with it, the run itself says.
            with contextlib.suppress(KnowLabError):
                editor.edit(handle, list(first))
        return time.perf_counter() - begin


def _searches(spec: str) -> bool:
    from editors.base import EDITORS

    # What takes penalties searches a value, whose pull on the attention is what the penalty is about.
    return EDITORS.get(spec.split("+")[0]).takes_penalties


def drift_of(
    handle: ModelHandle, kept: Sequence[tuple[tuple[EditRequest, ...], Any]], protocol: str
) -> Row | None:
    """Attention drift of the kept patches, mean over their prompts: each alone, or of a sequence all together."""
    from editors.demo import joined
    from lab.attention import attention_drift
    from lab.patch import WeightPatch

    pairs = [(requests, patch) for requests, patch in kept if isinstance(patch, WeightPatch)]
    if not pairs:
        return None
    if protocol == "sequential":
        whole = replace(reduce(add, [p for _, p in pairs]), parents=())
        pairs = [(tuple(request for requests, _ in pairs for request in requests), whole)]
    else:
        # Rounds of one case stand on each other.
        made = {patch.id: patch for _, patch in pairs}
        pairs = [(requests, _with_parents(patch, made)) for requests, patch in pairs]
    pieces = [
        attention_drift(handle, patch, [r.prompt for r in requests], [r.subject for r in requests])
        for requests, patch in pairs
    ]
    return joined(pieces).to_json()


def _with_parents(patch: WeightPatch, made: Mapping[str, WeightPatch]) -> WeightPatch:
    """The patch together with those of ``made`` that it was computed on."""
    below = [made[id] for id in patch.parents if id in made]
    if not below:
        return patch
    others = tuple(id for id in patch.parents if id not in made)
    return replace(reduce(add, [*below, patch]), parents=others)


def _row(
    cell: Cell, report: Report, clock: Clock, preparing: float, peak: float | None, drift: Row | None
) -> Row:
    found = report.to_json("bench editing")
    found |= asdict(cell) | {
        "edits": clock.edits,
        "seconds_per_edit": clock.seconds / clock.edits if clock.edits else None,
        "seconds_preparing": preparing,
        "peak_mb": peak,
        "attention_drift": drift,
        "cases": [
            {
                "id": row.id,
                "values": row.values,
                "before": row.before,
                "right_after": row.right_after,
                "known": row.known,
            }
            for row in report.cases
        ],
    }
    return found


# ---- pooling seeds -----------------------------------------------------------------------------------------------------


def pool_cases(suite: Suite, cases: Iterable[Row]) -> tuple[Row, int]:
    """Cases of several seeds as one sample.

    A case that several seeds drew counts once, with the mean of its values: counted twice it would make intervals narrower
    than what was seen.

    Returns:
        Estimates ``metrics``, ``before`` and (empty outside a sequence) ``right_after_edit``, and the number of different cases.
    """
    by_id: dict[str, list[Row]] = {}
    for case in cases:
        by_id.setdefault(case["id"], []).append(case)
    tables = {
        name: suite.summarise([_mean_values([row[source] for row in rows]) for rows in by_id.values()])
        for name, source in (
            ("metrics", "values"),
            ("before", "before"),
            ("right_after_edit", "right_after"),
        )
    }
    return tables, len(by_id)


def _mean_values(found: Sequence[Values]) -> Values:
    if len(found) == 1:
        return found[0]
    names = dict.fromkeys(name for values in found for name in values)
    mean: Values = {}
    for name in names:
        lists = [values[name] for values in found if name in values]
        if len({len(values) for values in lists}) == 1:
            mean[name] = [math.fsum(column) / len(column) for column in zip(*lists, strict=True)]
        else:
            # Other prompts were asked under another seed; all of them are the case's.
            mean[name] = [value for values in lists for value in values]
    return mean
