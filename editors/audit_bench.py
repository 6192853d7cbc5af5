"""Ways of forgetting side by side under every attack, each at the least dose that forgets as much.

An entrant is an unlearning method, an editor whose target is a text that says nothing, or a saved patch. Each is scaled until the
facts are said no more often than by a model that never saw them, in the prompts it was trained on (or in every form), and is then
audited there. Everything that is finished is kept in a folder of the entrant's own.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from editors.unlearning.bench import UnlearnBenchOptions, UnlearnWorkshop, knows
from editors.unlearning.dose import match_dose
from editors.unlearning.forms import form_probabilities, worst_form
from editors.unlearning.presets import tuned_settings
from lab.audit.base import AuditSubject, Controls
from lab.audit.material import gather
from lab.audit.report import AuditReport, lifts_table
from lab.audit.run import audit
from lab.errors import ConfigError
from lab.memory import MemoryPatch
from lab.patch import WeightPatch
from lab.patch_io import read_patch
from lab.records import write_text_atomically

if TYPE_CHECKING:
    from editors.unlearning.bench import Task
    from lab.audit.base import Progress
    from lab.handle import ModelHandle
    from lab.patch import Patch

MatchOn = Literal["prompt", "forms"]
STAYS = ("retain", "neighbor", "utility")
_PROMPTS = ("main_prompt", "prompt")


@dataclass(frozen=True)
class Entrant:
    """One column of the comparison.

    Attributes:
        name: Its title and the name of its folder.
        method: An unlearning method, or ``""`` for a saved patch.
        settings: Settings of the method that replace tuned ones.
        patch: Folder of a saved patch.
    """

    name: str
    method: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
    patch: Path | None = None


def entrants(
    methods: Sequence[str],
    editors: Sequence[str] = (),
    patches: Mapping[str, Path] | None = None,
    *,
    target: str = "unknown",
    settings: Mapping[str, Mapping[str, Any]] | None = None,
) -> tuple[Entrant, ...]:
    """Columns from names.

    Args:
        methods: Unlearning methods.
        editors: Editors, each asked to say ``target`` in place of every object.
        patches: Saved patches by title.
        target: See ``editors``.
        settings: Settings by method; those under ``""`` go to all.

    Raises:
        ConfigError: None is named, or a title stands for two of them or cannot name a folder.
        UnknownNameError: No such method or editor.
    """
    from editors.base import EDITORS
    from editors.unlearning.base import UNLEARNERS

    chosen = settings or {}
    found = []
    for method in methods:
        UNLEARNERS.get(method)
        found.append(Entrant(method, method, {**chosen.get("", {}), **chosen.get(method, {})}))
    for editor in editors:
        EDITORS.get(editor.split("+")[0])
        own = {"editor": editor, "target": target, **chosen.get(editor, {})}
        found.append(Entrant(editor, "erase_edit", own))
    found += [Entrant(name, patch=folder) for name, folder in (patches or {}).items()]
    names = [entrant.name for entrant in found]
    if not names:
        raise ConfigError("nothing to compare: name methods, editors or patches")
    for name in names:
        if names.count(name) > 1 or not re.fullmatch(r"[\w+.-]+", name) or name.startswith("."):
            raise ConfigError(f"{name!r} must be a title of its own, of letters, digits and _ + . -")
    return tuple(found)


@dataclass(frozen=True)
class AuditBenchOptions:
    """What all entrants share.

    Attributes:
        facts: ``atlas:SPLIT`` or a file of facts.
        attacks: Names.
        model: Built-in name, folder or hub id.
        oracle: The same model trained without the facts.
        untrained: File of facts that no model was trained on, in place of an oracle, to match with.
        retain: File of facts to keep.
        match: ``prompt``: the facts' own prompts decide how far each entrant is scaled; ``forms``: the form that leaks most.
        tolerance: How near the oracle (or never-trained facts) an entrant must come, in probability.
        most_dose: Largest dose tried.
        limit: Facts audited, and asked per group that stays, at most.
        budget, seed, device, dtype: As for an audit.
    """

    facts: str
    attacks: tuple[str, ...]
    model: str = "atlas"
    oracle: str | None = None
    untrained: str | None = None
    retain: str | None = None
    match: MatchOn = "prompt"
    tolerance: float = 0.05
    most_dose: float = 4.0
    limit: int = 100
    budget: Literal["small", "full"] = "small"
    seed: int = 0
    device: str = "cpu"
    dtype: str = "float32"


@dataclass(frozen=True)
class Column:
    """What came of one entrant.

    Attributes:
        entrant: Its name.
        dose: The factor of its patch.
        matched: Whether it forgets as much as the reference there.
        gap: By how much more than the reference it knows, in the prompts that decide.
        lost: Per group that stays, the mean loss of probability.
        report: Its audit.
    """

    entrant: str
    dose: float
    matched: bool
    gap: float
    lost: Mapping[str, float | None]
    report: AuditReport

    def to_json(self) -> dict[str, Any]:
        """Returns plain values."""
        return {
            "name": self.entrant,
            "dose": self.dose,
            "matched": self.matched,
            "gap": self.gap,
            "lost": dict(self.lost),
            "audit": self.report.to_json(),
        }


class AuditBench:
    """Runs entrants one after another; keeps models and facts.

    Args:
        options: What they share.
        out: Folder for all that is kept.
    """

    def __init__(self, options: AuditBenchOptions, out: Path) -> None:
        self.options, self.out = options, out
        self._workshop = UnlearnWorkshop(
            UnlearnBenchOptions(
                options.facts,
                options.model,
                options.oracle,
                options.untrained,
                options.retain,
                tolerance=options.tolerance,
                limit=options.limit,
                most_dose=options.most_dose,
                device=options.device,
                dtype=options.dtype,
            )
        )
        self._subject: AuditSubject | None = None

    @property
    def handle(self) -> ModelHandle:
        """The model, without any patch between runs."""
        return self._workshop.handle

    def run(self, entrant: Entrant, progress: Progress | None = None) -> Column:
        """Forgets (or reads the patch), finds the dose, and audits there.

        Raises:
            KnowLabError: The method, the patch or an attack failed.
        """
        options, folder = self.options, self.out / entrant.name
        patch = self._patch(entrant, folder, progress)
        task = self._workshop.task(options.seed)
        dose, matched, gap, lost = self._dose(patch, task, folder / "dose.json")
        shown = patch.scaled(dose) if isinstance(patch, WeightPatch) else patch
        with shown.applied(self.handle):
            report = audit(
                self._audited(),
                options.attacks,
                title=entrant.name,
                out=folder,
                settings={
                    "model": options.model,
                    "facts from": options.facts,
                    "method": entrant.method or str(entrant.patch),
                    "dose": dose,
                    "matched": matched,
                    **{f"lost: {group}": value for group, value in lost.items()},
                },
                progress=progress,
            )
        return Column(entrant.name, dose, matched, gap, lost, report)

    def _audited(self) -> AuditSubject:
        if self._subject is None:
            options = self.options
            from lab.cli.session import open_model

            def load(name: str) -> ModelHandle:
                return open_model(name, device=options.device, dtype=options.dtype)

            material = gather(options.facts, options.retain, limit=options.limit, seed=options.seed)
            self._subject = AuditSubject(
                self.handle,
                material.facts,
                Controls(None if options.oracle is None else load(options.oracle), material.never),
                seed=options.seed,
                budget=options.budget,
                retained=material.retained,
                base=load(options.model),
                format=material.format,
            )
        return self._subject

    def _patch(self, entrant: Entrant, folder: Path, progress: Progress | None) -> Patch:
        from editors.unlearning.base import get_unlearner

        if entrant.patch is not None:
            return read_patch(entrant.patch, self.handle)
        place = folder / "patch"
        note = folder / "settings.json"
        settings = {**tuned_settings(self.handle, entrant.method), **entrant.settings}
        wanted = json.dumps({"method": entrant.method, "settings": settings}, sort_keys=True, default=str)
        if place.is_dir():
            if not note.is_file() or note.read_text(encoding="utf-8") != wanted:
                raise ConfigError(
                    f"{place} was made with other settings; remove {folder}, or choose another --out"
                )
            return read_patch(place, self.handle)
        material = self._workshop.task(self.options.seed).material
        unlearner = get_unlearner(entrant.method, seed=self.options.seed, **settings)
        patch = unlearner.unlearn(self.handle, material.forget, material.kept, progress=progress)
        write_text_atomically(note, wanted)
        patch.save(place)
        return patch

    def _dose(
        self, patch: Patch, task: Task, file: Path
    ) -> tuple[float, bool, float, dict[str, float | None]]:
        """The least dose that forgets as much as the reference, whether there is one, the gap, and what is lost there."""
        key = [patch.id, self.options.match, self.options.tolerance, self.options.most_dose]
        if file.is_file():
            kept = json.loads(file.read_text(encoding="utf-8"))
            if kept["key"] == key:
                return kept["dose"], kept["matched"], kept["gap"], kept["lost"]
        forms = {
            name: pairs
            for name, pairs in task.forms.items()
            if self.options.match == "forms" or name in _PROMPTS
        }

        def dosed(dose: float) -> Patch:
            return patch.scaled(dose) if isinstance(patch, WeightPatch) else patch

        def gap(dose: float) -> float:
            with dosed(dose).applied(self.handle):
                return worst_form(form_probabilities(self.handle, forms), task.reference)[1]

        if isinstance(patch, MemoryPatch):
            tried: Sequence[tuple[float, float]] = ((1.0, gap(1.0)),)
            dose, found = tried[0]
            matched = abs(found) <= self.options.tolerance
        else:
            match = match_dose(gap, self.options.tolerance, most=self.options.most_dose)
            matched = match.dose is not None
            dose, found = min(match.tried, key=lambda pair: abs(pair[1]))
            if match.dose is not None:
                dose, found = match.dose, match.gap
        lost: dict[str, float | None] = {}
        with dosed(dose).applied(self.handle):
            for group in STAYS:
                after = knows(self.handle, getattr(task.material, group))
                gaps = [old[0] - new[0] for old, new in zip(task.known[group], after, strict=True)]
                lost[group] = math.fsum(gaps) / len(gaps) if gaps else None
        row = {"key": key, "dose": dose, "matched": matched, "gap": found, "lost": lost}
        write_text_atomically(file, json.dumps(row) + "\n")
        return dose, matched, found, lost


def comparison(columns: Sequence[Column]) -> tuple[list[str], list[list[str]]]:
    """Heads and rows: dose, what is said without an attack, what else is lost, then every attack's lift.

    Raises:
        ConfigError: No column.
    """
    heads, rows = lifts_table([column.report for column in columns])

    def line(name: str, values: Sequence[float | None]) -> list[str]:
        return [name, "", "", *("–" if value is None else f"{value:.3f}" for value in values)]

    above: list[list[str]] = [
        line("dose", [column.dose for column in columns]),
        ["matched", "", "", *("yes" if column.matched else f"no ({column.gap:+.3f})" for column in columns)],
        line("said without an attack", [column.report.unattacked.get("facts") for column in columns]),
        *(line(f"lost: {group}", [column.lost.get(group) for column in columns]) for group in STAYS),
    ]
    return heads, [*above, *rows]


def summary(columns: Sequence[Column]) -> tuple[list[str], list[list[Any]]]:
    """Heads and rows: one line per entrant, with the attack that brings out the most."""
    heads = [
        "forgotten by",
        "dose",
        "matched",
        "said",
        "retain lost",
        "neighbor lost",
        "worst case",
        "up to",
        "by",
    ]
    rows: list[list[Any]] = []
    for column in columns:
        report = column.report
        rows.append(
            [
                column.entrant,
                column.dose,
                "yes" if column.matched else f"no ({column.gap:+.3f})",
                report.unattacked.get("facts"),
                column.lost.get("retain"),
                column.lost.get("neighbor"),
                report.worst_case,
                report.worst_case_high,
                "–" if report.worst is None else report.worst.name,
            ]
        )
    return heads, rows
