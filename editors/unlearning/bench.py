"""Unlearning methods compared at equal forgetting: one method and seed is a cell; what it is and how it is run."""

from __future__ import annotations

import hashlib
import json
import math
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from editors.bench import content_digest, weights_stamp
from editors.unlearning.dose import Match, match_dose
from editors.unlearning.forms import form_probabilities, own_forms, world_forms, worst_form
from editors.unlearning.material import WORLD, Material, gather, oracle_name
from editors.unlearning.presets import read_unlearning_table, settings_in, tuned_settings
from lab.data.unlearning import facts_of
from lab.errors import ConfigError, KnowLabError, PatchError
from lab.eval.unlearning_metrics import form_independence
from lab.records import Fact
from lab.scoring import score_targets

if TYPE_CHECKING:
    from editors.values import Progress
    from lab.handle import ModelHandle

# Rises when cells of an older version must not be taken for finished.
CELL_VERSION = 2
# Doses are told apart down to this part of themselves; every halving asks all forms once more.
DOSE_WIDTH = 0.1
STAYS = ("retain", "neighbor", "utility")

Row = dict[str, Any]


@dataclass(frozen=True)
class UnlearnCell:
    """One run of a comparison.

    Attributes:
        method: Name of an unlearner.
        seed: Of the method, and of the facts that are asked.
    """

    method: str
    seed: int = 0


@dataclass(frozen=True)
class UnlearnBenchOptions:
    """What all cells of a comparison share.

    Attributes:
        forget: ``atlas:SPLIT`` or a file of facts.
        model: Built-in name, folder or hub id.
        oracle: The same model trained without the facts: a name or folder; the shipped one where there is one.
        untrained: Facts (JSONL) that no model was trained on, in place of an oracle; for the built-in world, without either, its
            never-trained people.
        retain, utility: Files of facts, as in ``knowlab unlearn``.
        tolerance: How near the reference a method must come, in probability.
        limit: Facts asked per group at most, the forgotten ones included.
        most_dose: Largest dose tried.
        curve: Doses at which everything is measured.
        settings: Settings of methods; those under ``""`` go to all, those under a name to that one.
        device, dtype: Where and how the model runs.
    """

    forget: str
    model: str = "atlas"
    oracle: str | None = None
    untrained: str | None = None
    retain: str | None = None
    utility: str | None = None
    tolerance: float = 0.05
    limit: int = 100
    most_dose: float = 4.0
    curve: tuple[float, ...] = (0.25, 0.5, 0.75, 1.0)
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    device: str = "cpu"
    dtype: str = "float32"

    def settings_of(self, method: str) -> dict[str, Any]:
        """Settings of one method."""
        return {**self.settings.get("", {}), **self.settings.get(method, {})}


def plan_unlearning(methods: Sequence[str], seeds: Sequence[int]) -> tuple[UnlearnCell, ...]:
    """All cells, seed by seed.

    Raises:
        ConfigError: No method or no seed.
        UnknownNameError: No such method.
    """
    from editors.unlearning.base import UNLEARNERS

    if not methods or not seeds:
        raise ConfigError("a comparison needs at least one method and one seed")
    for method in methods:
        UNLEARNERS.get(method)
    return tuple(
        UnlearnCell(method, seed) for seed in dict.fromkeys(seeds) for method in dict.fromkeys(methods)
    )


def unlearn_cell_file(cell: UnlearnCell, options: UnlearnBenchOptions) -> str:
    """Name of the file that keeps a finished cell: readable, and different for everything that its figures depend on."""
    decisive = asdict(options) | {"version": CELL_VERSION, "cell": asdict(cell)}
    decisive["settings"] = options.settings_of(cell.method)
    decisive["presets"] = [settings_in(row, cell.method) for row in read_unlearning_table()]
    files = (options.forget, options.retain, options.utility, options.untrained)
    decisive["files"] = [
        "" if name is None or name.startswith(WORLD) else content_digest(Path(name)) for name in files
    ]
    oracle = options.oracle or oracle_name(options.model, options.forget)
    decisive["weights"] = [weights_stamp(name) for name in (options.model, oracle) if name is not None]
    digest = hashlib.sha256(json.dumps(decisive, sort_keys=True, default=str).encode()).hexdigest()[:12]
    words = [cell.method, Path(options.model).name, Path(options.forget).name, str(cell.seed)]
    return "-".join(re.sub(r"[^\w+.]+", "_", word) for word in words) + f"-{digest}.json"


@dataclass(frozen=True)
class Task:
    """What one seed's cells share: the facts, how the untouched model knows them, and what forgetting is compared with.

    Attributes:
        material: The facts.
        forms: Prompts and answers of the facts to forget, per form.
        before: Mean probability per form, untouched.
        reference: The same on the oracle, or of never-trained facts on the untouched model.
        kind: ``oracle`` or ``untrained``.
        known: Per group that stays, probability and accuracy of each fact, untouched.
    """

    material: Material
    forms: Mapping[str, tuple[tuple[str, str], ...]]
    before: Mapping[str, float]
    reference: Mapping[str, float]
    kind: str
    known: Mapping[str, tuple[tuple[float, float], ...]]


class UnlearnWorkshop:
    """Runs cells one after another; keeps the model, and what it knew as it was.

    Args:
        options: What the cells share.
    """

    def __init__(self, options: UnlearnBenchOptions) -> None:
        self.options = options
        self._handle: ModelHandle | None = None
        self._oracle: ModelHandle | None = None
        self._tasks: dict[int, Task] = {}

    @property
    def handle(self) -> ModelHandle:
        """The model; loaded on first use."""
        if self._handle is None:
            self._handle = self._load(self.options.model)
        return self._handle

    def _load(self, name: str) -> ModelHandle:
        from lab.cli.session import open_model

        return open_model(name, device=self.options.device, dtype=self.options.dtype)

    def task(self, seed: int) -> Task:
        """The facts of one seed and what is known of them.

        Raises:
            ConfigError: There is nothing to compare forgetting with, or nothing to forget.
        """
        if seed not in self._tasks:
            self._tasks[seed] = self._task(seed)
        return self._tasks[seed]

    def _task(self, seed: int) -> Task:
        options = self.options
        material = gather(options.forget, options.retain, options.utility, limit=options.limit, seed=seed)
        forms = self._forms(_spread(material.forget, options.limit), seed)
        before = form_probabilities(self.handle, forms)
        oracle = options.oracle or oracle_name(options.model, options.forget)
        if oracle is not None:
            if self._oracle is None:
                self._oracle = self._load(oracle)
            reference, kind = form_probabilities(self._oracle, forms), "oracle"
        else:
            reference, kind = (
                form_probabilities(self.handle, self._forms(self._strangers(material), seed)),
                "untrained",
            )
        # Some forms do not suit facts about strangers.
        forms = {form: pairs for form, pairs in forms.items() if form in reference}
        before = {form: before[form] for form in forms}
        form, gap = worst_form(before, reference)
        if gap <= options.tolerance:
            raise ConfigError(
                f"nothing to forget: even as {form!r} the model knows the facts only {gap:.3f} better than the {kind} reference"
            )
        known = {group: knows(self.handle, getattr(material, group)) for group in STAYS}
        return Task(material, forms, before, reference, kind, known)

    def _forms(self, facts: Sequence[Fact], seed: int) -> dict[str, tuple[tuple[str, str], ...]]:
        return world_forms(facts, seed=seed) if self.options.forget.startswith(WORLD) else own_forms(facts)

    def _strangers(self, material: Material) -> tuple[Fact, ...]:
        if self.options.untrained is not None:
            return _spread(tuple(facts_of(self.options.untrained)), self.options.limit)
        if not self.options.forget.startswith(WORLD):
            raise ConfigError(
                "forgetting must be compared with something: give --oracle (the model trained without the facts) or "
                "--untrained (facts that it never saw)"
            )
        from lab.atlas.world import load_world

        relations = {fact.relation for fact in material.forget}
        facts = tuple(fact for fact in load_world().untrained if fact.relation in relations)
        return _spread(facts, self.options.limit)

    def attempt(self, cell: UnlearnCell, progress: Progress | None = None) -> Row:
        """``run``, with an error as a row of its own: one broken cell must not take the others down."""
        try:
            return self.run(cell, progress)
        except KnowLabError as error:
            return asdict(cell) | {"error": str(error)}

    def run(self, cell: UnlearnCell, progress: Progress | None = None) -> Row:
        """Unlearns, finds the dose that forgets as much as the reference, and measures there and along the curve.

        Returns:
            Plain values: ``method``, ``seed``, ``matched``, ``dose``, ``gap``, ``worst_form``, ``reference``, ``forms`` (per form
            ``before``, ``after``, ``reference``), ``form_independence``, ``facts`` (per group the ids, probabilities and accuracies
            before and after), ``curve``, ``tried``, ``retain_facts``, ``updates``, ``stopped``, ``seconds``, ``seconds_matching``,
            ``peak_mb``, ``norm``.

        Raises:
            KnowLabError: The cell cannot be run.
            PatchError: The model is not what it was, bit for bit.
        """
        from editors.unlearning.base import get_unlearner
        from lab.memory import MemoryPatch
        from lab.patch import WeightPatch
        from lab.peak import peak_memory

        options, handle, task = self.options, self.handle, self.task(cell.seed)
        settings = {**tuned_settings(handle, cell.method), **options.settings_of(cell.method)}
        unlearner = get_unlearner(cell.method, seed=cell.seed, **settings)
        bits = handle.weights_digest()
        started = time.perf_counter()
        with peak_memory(handle.device) as peak:
            patch = unlearner.unlearn(handle, task.material.forget, task.material.kept, progress=progress)
        seconds = time.perf_counter() - started
        scalable = isinstance(patch, WeightPatch)

        def dosed(dose: float) -> WeightPatch | MemoryPatch:
            return patch.scaled(dose) if isinstance(patch, WeightPatch) else patch

        seen: dict[float, dict[str, float]] = {}

        def gap(dose: float) -> float:
            with dosed(dose).applied(handle):
                seen[dose] = form_probabilities(handle, task.forms)
            return worst_form(seen[dose], task.reference)[1]

        started = time.perf_counter()
        if scalable:
            match = match_dose(gap, options.tolerance, most=options.most_dose, width=DOSE_WIDTH)
        else:
            # A memory is there or not; it has no dose.
            only = gap(1.0)
            match = Match(1.0 if abs(only) <= options.tolerance else None, only, ((1.0, only),))
        matching = time.perf_counter() - started
        shown = match.dose if match.dose is not None else min(match.tried, key=lambda pair: abs(pair[1]))[0]
        measured: dict[float, Mapping[str, tuple[tuple[float, float], ...]]] = {}
        for dose in dict.fromkeys((shown, *(options.curve if scalable else ()))):
            with dosed(dose).applied(handle):
                seen[dose] = seen.get(dose) or form_probabilities(handle, task.forms)
                measured[dose] = {group: knows(handle, getattr(task.material, group)) for group in STAYS}
        if handle.weights_digest() != bits:
            raise PatchError("taking the patch off did not restore the weights bit for bit; reload the model")
        after = seen[shown]
        start = {"dose": 0.0, **_point(task, task.before, task.known)}
        curve = [
            start,
            *({"dose": dose, **_point(task, seen[dose], found)} for dose, found in sorted(measured.items())),
        ]
        notes = patch.provenance.extra
        return asdict(cell) | {
            "model": options.model,
            "forget": options.forget,
            "matched": match.dose is not None,
            "dose": match.dose,
            "shown_dose": shown,
            "gap": match.gap,
            "worst_form": worst_form(after, task.reference)[0],
            "reference": task.kind,
            "forms": {
                form: {"before": task.before[form], "after": after[form], "reference": task.reference[form]}
                for form in task.forms
            },
            "form_independence": form_independence([task.before[form] - after[form] for form in task.forms]),
            "facts": {
                group: [
                    {"id": _id(fact), "before": list(old), "after": list(new)}
                    for fact, old, new in zip(
                        getattr(task.material, group), task.known[group], measured[shown][group], strict=True
                    )
                ]
                for group in STAYS
            },
            "curve": curve,
            "tried": [list(pair) for pair in match.tried],
            "forget_facts": len(task.material.forget),
            "retain_facts": len(task.material.kept),
            "updates": notes.get("updates"),
            "stopped": notes.get("stopped"),
            "seconds": seconds,
            "seconds_matching": matching,
            "peak_mb": peak.mb,
            "norm": math.sqrt(math.fsum(value**2 for value in patch.norms().values())) if scalable else None,
        }


def knows(handle: ModelHandle, facts: Sequence[Fact]) -> tuple[tuple[float, float], ...]:
    """Per fact, in its own prompt: length-normalised probability of the answer, and 1 where it is greedily decoded."""
    if not facts:
        return ()
    scores = score_targets(handle, [(fact.text, fact.object) for fact in facts])
    return tuple((score.probability, float(score.all_correct)) for score in scores)


def _spread(facts: Sequence[Fact], limit: int) -> tuple[Fact, ...]:
    """So many facts, evenly over their order, so that every subject has some."""
    step = max(1.0, len(facts) / limit)
    return tuple(facts[int(place * step)] for place in range(min(limit, len(facts))))


def _point(task: Task, forms: Mapping[str, float], known: Mapping[str, Sequence[tuple[float, float]]]) -> Row:
    form, gap = worst_form(forms, task.reference)
    means = {
        group: sum(p for p, _ in found) / len(found) if found else None for group, found in known.items()
    }
    return {"gap": gap, "worst_form": form, "forget": forms[form], **means}


def _id(fact: Fact) -> str:
    return fact.id or fact.text
