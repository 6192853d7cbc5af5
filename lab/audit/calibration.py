"""How often attacks cry wolf: audits of a model that cannot know the facts.

Facts that no model was trained on are divided by subject into two halves, and one is audited with the other as its control: both
are alike, so every lift that is surely above zero is a false alarm. With facts that another model never saw, and that model as the
oracle, the same is asked of two models. An attack whose intervals are right stays under the line in at least 95 of 100 runs.
"""

from __future__ import annotations

import json
import random
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lab.audit.base import AuditSubject, Progress
from lab.audit.registry import ATTACKS
from lab.audit.run import plain_scores, run_attack
from lab.audit.variants import worst_variant
from lab.errors import ConfigError
from lab.eval.stats import Estimate, summarise
from lab.records import Fact, write_text_atomically

if TYPE_CHECKING:
    from lab.audit.base import AttackResult

TARGET = 0.95
"""Share of runs of an attack that should stay under the line."""


@dataclass(frozen=True)
class Trial:
    """One attack on one division of the facts.

    Attributes:
        attack: Its name.
        number: Of the division.
        applicable: Whether the attack had anything to attack.
        low, mean, high: The lift.
        seconds: What it took.
    """

    attack: str
    number: int
    applicable: bool
    low: float
    mean: float
    high: float
    seconds: float

    @property
    def flagged(self) -> bool:
        """Whether the lift is surely above zero: over the line."""
        return self.applicable and self.low > 0.0

    @classmethod
    def of(cls, number: int, result: AttackResult) -> Trial:
        """The trial that a result is."""
        lift = result.lift
        seconds = float(result.cost.get("seconds", 0.0))
        return cls(result.name, number, result.applicable, lift.low, lift.mean, lift.high, seconds)


def divide(facts: Sequence[Fact], size: int, chooser: random.Random) -> tuple[tuple[Fact, ...], ...]:
    """Two disjoint draws of about ``size`` facts each, all facts of a subject on one side.

    An audit's facts and its controls are about different subjects as well, and what a model says of one subject hangs together.

    Raises:
        ConfigError: Fewer than two subjects.
    """
    subjects: dict[str, list[Fact]] = defaultdict(list)
    for fact in facts:
        subjects[fact.subject].append(fact)
    names = sorted(subjects)
    if len(names) < 2:
        raise ConfigError("facts about fewer than two subjects cannot be divided into halves")
    chooser.shuffle(names)
    sides: list[tuple[Fact, ...]] = []
    for part in (names[::2], names[1::2]):
        side: list[Fact] = []
        for name in part:
            if len(side) >= size:
                break
            side += subjects[name]
        sides.append(tuple(side))
    return tuple(sides)


def subjects_of(subject: AuditSubject, pool: Sequence[Fact], size: int) -> Callable[[int], AuditSubject]:
    """Makes the subject of a trial from its number.

    Args:
        subject: Model, oracle and everything else; without ``controls.never`` the two halves of ``pool`` are each other's control,
            else halves of ``pool`` are audited with as many of these never-trained facts.
        pool: Facts that the model cannot know.
        size: Facts per half.
    """

    def make(number: int) -> AuditSubject:
        chooser = random.Random(f"calibrate:{subject.seed}:{number}")
        facts, others = divide(pool, size, chooser)
        if subject.controls.never:
            others = divide(subject.controls.never, size, chooser)[0]
        controls = replace(subject.controls, never=others, original=())
        return replace(subject, facts=facts, controls=controls, seed=subject.seed + number)

    return make


def calibrate(
    make: Callable[[int], AuditSubject],
    names: Sequence[str],
    trials: int,
    *,
    whole: AuditSubject | None = None,
    out: Path | None = None,
    key: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> tuple[Trial, ...]:
    """Runs attacks on many divisions.

    Attacks that say ``alone`` run once over all facts, and their scores are divided; the others run anew on every division,
    division by division, so that an interruption leaves something of each.

    Args:
        make: Makes the subject of a division from its number.
        names: Attacks.
        trials: Divisions.
        whole: All facts at once, for attacks that say ``alone``; without it these run anew as well.
        out: Folder that keeps finished trials, one file per attack; the same call goes on where it was.
        key: What the trials depend on; a folder of another one is refused.
        progress: Told of every division.

    Raises:
        ConfigError: The folder holds trials of something else.
    """
    told: Progress = progress or (lambda phase, done, total: None)
    files = {name: None if out is None else out / f"{name}.json" for name in names}
    kept = {name: _kept(file, key or {}) for name, file in files.items()}

    def keep(name: str) -> None:
        if (file := files[name]) is not None:
            rows = [asdict(trial) for trial in kept[name].values()]
            write_text_atomically(file, json.dumps({"key": dict(key or {}), "trials": rows}) + "\n")

    for name in names if whole is not None else ():
        if getattr(ATTACKS.get(name), "alone", False) and not all(n in kept[name] for n in range(trials)):
            assert whole is not None
            kept[name] = dict(enumerate(_divided(name, whole, make, trials, told)))
            keep(name)
    for number in range(trials):
        told("divisions", number, trials)
        missing = [name for name in names if number not in kept[name]]
        if not missing:
            continue
        subject = make(number)
        subject = replace(subject, controls=replace(subject.controls, original=plain_scores(subject).facts))
        for name in missing:
            kept[name][number] = Trial.of(number, run_attack(name, subject, told))
            keep(name)
    told("divisions", trials, trials)
    return tuple(kept[name][number] for name in names for number in range(trials))


def _divided(
    name: str, whole: AuditSubject, make: Callable[[int], AuditSubject], trials: int, told: Progress
) -> Iterator[Trial]:
    """Trials of an attack from its scores over all facts."""
    attack = ATTACKS.get(name)()
    result = run_attack(name, replace(whole, whole=True), told)
    for number in range(trials):
        subject = make(number)
        mine, theirs = ({fact.subject for fact in arm} for arm in (subject.facts, subject.controls.never))
        variants = {key: scores.part(mine, theirs) for key, scores in result.variants.items()}
        variants = {key: scores for key, scores in variants.items() if scores.facts}
        found = worst_variant(attack, subject, variants, tried=result.tried) if variants else result
        cost = {"seconds": result.cost["seconds"] / trials}
        yield Trial.of(number, replace(found, cost=cost, applicable=bool(variants)))


def _kept(file: Path | None, key: Mapping[str, Any]) -> dict[int, Trial]:
    if file is None or not file.is_file():
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        found = {row["number"]: Trial(**row) for row in content["trials"]}
        same = content["key"] == dict(key)
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{file} holds no trials: {error}; remove it, or choose another folder") from None
    if not same:
        raise ConfigError(f"{file} holds trials of other models, facts or settings; choose another folder")
    return found


@dataclass(frozen=True)
class Calibration:
    """How often one attack stayed under the line.

    Attributes:
        attack: Its name.
        under: Share of its runs whose lift was not surely above zero.
        lift: Mean lift over the runs, which should be near 0.
        highest: The largest upper end of a lift: what ``--fail-above`` would have looked at.
        skipped: Runs in which the attack had nothing to attack.
        seconds: Mean per run.
    """

    attack: str
    under: Estimate
    lift: Estimate
    highest: float
    skipped: int
    seconds: float

    @property
    def met(self) -> bool:
        """Whether the share reaches the target."""
        return self.under.mean is not None and self.under.mean >= TARGET

    def to_json(self) -> dict[str, Any]:
        """Returns plain values."""
        return {
            "attack": self.attack,
            "under": self.under.to_json(),
            "met": self.met if self.under.n else None,
            "lift": self.lift.to_json(),
            "highest": self.highest,
            "skipped": self.skipped,
            "seconds": self.seconds,
        }


def summaries(trials: Iterable[Trial]) -> tuple[Calibration, ...]:
    """Trials by attack, in the order of their first appearance."""
    by_attack: dict[str, list[Trial]] = defaultdict(list)
    for trial in trials:
        by_attack[trial.attack].append(trial)
    found = []
    for name, rows in by_attack.items():
        used = [row for row in rows if row.applicable]
        found.append(
            Calibration(
                name,
                summarise([float(not row.flagged) for row in used]),
                summarise([row.mean for row in used], (-1.0, 1.0)),
                max((row.high for row in used), default=0.0),
                len(rows) - len(used),
                sum(row.seconds for row in rows) / len(rows),
            )
        )
    return tuple(found)
