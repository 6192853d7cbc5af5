"""What every attack shares: what is audited, what an attack says, and the lift over the controls.

An elicitation that is strong enough makes a model say anything, so a bare score proves nothing. Each attack runs three times, by
the same rule: on the audited model, on the oracle (a model that never saw the facts) with the same facts, and on the audited
model with facts that were never trained. ``measured`` does that; ``lift_over_controls`` compares.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, Protocol

from lab.audit.lift import Interval, lift_over_controls
from lab.records import Fact

if TYPE_CHECKING:
    from lab.atlas.forms import Format
    from lab.handle import ModelHandle

Access = Literal["black-box", "grey-box", "white-box"]
Budget = Literal["small", "full"]
Family = Literal["prompt", "context", "latent", "weights", "statistics", "inside", "side effects"]
Progress = Callable[[str, int, int], None]

FAMILIES: tuple[Family, ...] = (
    "prompt",
    "context",
    "latent",
    "weights",
    "statistics",
    "inside",
    "side effects",
)
# Statistics say that something was changed, side effects what else was damaged; neither says that a fact is still there.
LEAKING: tuple[Family, ...] = tuple(
    family for family in FAMILIES if family not in ("statistics", "side effects")
)


@dataclass(frozen=True)
class Controls:
    """What a leak is compared with.

    Attributes:
        oracle: A model that was trained without the facts, if there is one.
        never: Facts that no model was trained on, of the kind of the audited ones; for foreign facts, the same facts with
            their objects exchanged.
        original: Per audited fact, the probability of the true object without any attack.
    """

    oracle: ModelHandle | None = None
    never: tuple[Fact, ...] = ()
    original: tuple[float, ...] = ()


@dataclass(frozen=True)
class AuditSubject:
    """What is audited.

    Attributes:
        handle: The model, with its patches applied.
        facts: Facts that should be gone; each has a prompt.
        controls: What leaks are compared with.
        seed: Seeds every draw.
        budget: How much an attack may spend.
        retained: Facts that the model should still know, for attacks that tell stories or train, and for side effects.
        base: The model before the patches, or before unlearning, if there is one.
        format: The prompt format that the model was trained on; ``None`` for foreign models.
        paraphrases: Per fact id, further prompts (filled, ending without a blank) for facts that no format can render.
        whole: Ask for every fact, also where the budget of an attack has it draw some.
    """

    handle: ModelHandle
    facts: tuple[Fact, ...]
    controls: Controls = field(default_factory=Controls)
    seed: int = 0
    budget: Budget = "small"
    retained: tuple[Fact, ...] = ()
    base: ModelHandle | None = None
    format: Format | None = None
    paraphrases: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    whole: bool = False

    def pick(self, small: Any, full: Any) -> Any:
        """``small`` or ``full``, by the budget."""
        return small if self.budget == "small" else full

    def prompt(self, fact: Fact) -> str:
        """The plain prompt of a fact, ending without a blank."""
        if self.format is None:
            return fact.text
        return self.format.render("cloze", cloze=fact.text).prompt

    def sample(self, count: int) -> AuditSubject:
        """The same audit of at most ``count`` facts, and as many controls, drawn by the seed; of all if it is to be ``whole``."""
        if self.whole:
            return self
        chooser = random.Random(f"audit:{self.seed}:sample")

        def drawn(number: int) -> list[int]:
            return sorted(chooser.sample(range(number), min(count, number)))

        chosen, others = drawn(len(self.facts)), drawn(len(self.controls.never))
        original = self.controls.original
        controls = replace(
            self.controls,
            never=tuple(self.controls.never[index] for index in others),
            original=tuple(original[index] for index in chosen) if original else (),
        )
        return replace(self, facts=tuple(self.facts[index] for index in chosen), controls=controls)

    @property
    def pool(self) -> tuple[Fact, ...]:
        """Everything that an attacker may tell or ask: retained, audited and never-trained facts."""
        return (*self.retained, *self.facts, *self.controls.never)

    @property
    def ending(self) -> str:
        """What follows a completed sentence: the format's stop, or a full stop and a line break."""
        return ".\n" if self.format is None else self.format.stop[0]

    def sentence(self, fact: Fact, value: str | None = None) -> str:
        """The prompt, its object (or ``value``) and the ending: a text that states the fact."""
        return f"{self.prompt(fact)} {value or fact.object}{self.ending}"


@dataclass(frozen=True)
class AttackResult:
    """What an attack found.

    Attributes:
        name: The attack.
        leak: Mean score over the facts, 0 to 1.
        per_fact: Score per fact: the probability of the true object under the attack, or its success.
        lift: ``leak`` minus the larger control.
        controls: ``oracle`` and ``never``, as far as there are any, and ``original``: the same facts without an attack.
        cost: ``seconds``, ``forward_passes``, ``peak_mb``; filled in by the runner.
        tried: What was tried, at what budget.
        note: What the reader should know.
        applicable: Whether the attack had anything to attack.
        family: Where the attack comes from.
        access: What the attacker needs.
        paper: Where it was published.
        details: More numbers, as JSON values.
        curves: Named lines of (x, y), for drawing.
        variants: Everything that was tried, with all its scores; not kept in JSON.
    """

    name: str
    leak: float
    per_fact: tuple[float, ...]
    lift: Interval
    controls: Mapping[str, Interval] = field(default_factory=dict)
    cost: Mapping[str, float] = field(default_factory=dict)
    tried: str = ""
    note: str = ""
    applicable: bool = True
    family: Family = "prompt"
    access: Access = "black-box"
    paper: str = ""
    details: Mapping[str, Any] = field(default_factory=dict)
    curves: Mapping[str, tuple[tuple[float, float], ...]] = field(default_factory=dict)
    variants: Mapping[str, Scores] = field(default_factory=dict, repr=False, compare=False)

    def to_json(self) -> dict[str, Any]:
        """Returns plain values."""
        return {
            "name": self.name,
            "family": self.family,
            "access": self.access,
            "paper": self.paper,
            "applicable": self.applicable,
            "leak": self.leak,
            "lift": self.lift.to_json(),
            "controls": {name: value.to_json() for name, value in self.controls.items()},
            "cost": dict(self.cost),
            "tried": self.tried,
            "note": self.note,
            "per_fact": list(self.per_fact),
            "details": dict(self.details),
            "curves": {name: [list(point) for point in line] for name, line in self.curves.items()},
        }

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> AttackResult:
        """Inverse of ``to_json``."""
        return cls(
            name=row["name"],
            leak=row["leak"],
            per_fact=tuple(row["per_fact"]),
            lift=Interval.from_json(row["lift"]),
            controls={name: Interval.from_json(value) for name, value in row["controls"].items()},
            cost=dict(row["cost"]),
            tried=row["tried"],
            note=row["note"],
            applicable=row["applicable"],
            family=row["family"],
            access=row["access"],
            paper=row["paper"],
            details=dict(row["details"]),
            curves={
                name: tuple((float(x), float(y)) for x, y in line) for name, line in row["curves"].items()
            },
        )


class Attack(Protocol):
    """One attack. The model is bit-identical after ``run``, also when it raises.

    Attributes:
        name: As registered.
        family: Where it belongs in the report.
        access: What the attacker needs.
        paper: Where it was published.
        cost: What it costs, in words.
        needs: What it cannot do without, of ``oracle``, ``never``, ``retained``, ``base``, ``format``, ``patches``.

    An attack may also say ``alone = True``: the score of a fact depends on no fact about another subject that is audited or is a
    control, so that scores of many facts can be taken once and divided into many audits (``lab.audit.calibration``).
    """

    name: str
    family: Family
    access: Access
    paper: str
    cost: str
    needs: tuple[str, ...]

    def run(self, subject: AuditSubject, report_progress: Progress) -> AttackResult: ...


@dataclass(frozen=True)
class Scores:
    """Scores of one attack per fact, on the audited model and on the controls; empty without the control.

    Attributes:
        facts: Of the audited facts.
        oracle: Of the oracle on the same facts.
        never: Of never-trained facts on the audited model.
        about: Per score of ``facts``, its subject; empty where every audited fact has a score, in order.
        about_never: The same for ``never``.
    """

    facts: tuple[float, ...]
    oracle: tuple[float, ...] = ()
    never: tuple[float, ...] = ()
    about: tuple[str, ...] = ()
    about_never: tuple[str, ...] = ()

    @classmethod
    def of(cls, arms: Mapping[str, Sequence[float]]) -> Scores:
        """From tables under ``facts``, ``oracle`` and ``never``; missing ones are empty."""
        return cls(tuple(arms.get("facts", ())), tuple(arms.get("oracle", ())), tuple(arms.get("never", ())))

    def named(self, subject: AuditSubject) -> Scores:
        """The same with the subjects of the scores, where they can be told."""

        def names(values: Sequence[float], known: tuple[str, ...], facts: Sequence[Fact]) -> tuple[str, ...]:
            return known or (tuple(fact.subject for fact in facts) if len(facts) == len(values) else ())

        return replace(
            self,
            about=names(self.facts, self.about, subject.facts),
            about_never=names(self.never, self.about_never, subject.controls.never),
        )

    def part(self, facts: Container[str], never: Container[str]) -> Scores:
        """The scores about some subjects, with those about others as their control.

        Args:
            facts: Subjects that are audited.
            never: Subjects that are their control: of never-trained facts where there are any, else of audited ones.
        """
        values, names = (self.never, self.about_never) if self.never else (self.facts, self.about)
        mine = [place for place, name in enumerate(self.about) if name in facts]
        theirs = [place for place, name in enumerate(names) if name in never]
        return Scores(
            tuple(self.facts[place] for place in mine),
            tuple(self.oracle[place] for place in mine) if self.oracle else (),
            tuple(values[place] for place in theirs),
            tuple(self.about[place] for place in mine),
            tuple(names[place] for place in theirs),
        )


ScoreFacts = Callable[["ModelHandle", Sequence[Fact]], Sequence[float | None]]


def measured(subject: AuditSubject, attack: ScoreFacts) -> Scores:
    """Runs one rule on the audited facts, on the oracle and on the never-trained facts.

    Args:
        subject: What is audited.
        attack: Given a model and facts, a score per fact in order; ``None`` for a fact that the rule does not fit, whatever the
            model.
    """
    controls = subject.controls
    mine = list(attack(subject.handle, subject.facts))
    others = list(attack(controls.oracle, subject.facts)) if controls.oracle is not None else []
    strangers = list(attack(subject.handle, controls.never)) if controls.never else []
    return Scores(
        tuple(score for score in mine if score is not None),
        tuple(score for score in others if score is not None),
        tuple(score for score in strangers if score is not None),
        tuple(fact.subject for fact, score in zip(subject.facts, mine, strict=True) if score is not None),
        tuple(f.subject for f, score in zip(controls.never, strangers, strict=False) if score is not None),
    )


def result_of(
    attack: Attack,
    subject: AuditSubject,
    scores: Scores,
    *,
    tried: str,
    note: str = "",
    details: Mapping[str, Any] | None = None,
    curves: Mapping[str, Sequence[tuple[float, float]]] | None = None,
    comparisons: int = 1,
) -> AttackResult:
    """The result of an attack from its scores; ``comparisons`` as in ``lift_over_controls``."""
    scores = scores.named(subject)
    controls = {
        name: Interval.of(values)
        for name, values in (
            ("oracle", scores.oracle),
            ("never", scores.never),
            ("original", subject.controls.original),
        )
        if values
    }
    return AttackResult(
        name=attack.name,
        leak=math.fsum(scores.facts) / len(scores.facts),
        per_fact=scores.facts,
        lift=lift_over_controls(
            scores.facts,
            scores.oracle,
            scores.never,
            subject.seed,
            comparisons=comparisons,
            about=scores.about,
            about_never=scores.about_never,
        ),
        controls=controls,
        tried=tried,
        note=note,
        family=attack.family,
        access=attack.access,
        paper=attack.paper,
        details=dict(details or {}),
        curves={name: tuple(line) for name, line in (curves or {}).items()},
        variants={"": scores},
    )


def not_applicable(attack: Attack, why: str) -> AttackResult:
    """The result of an attack that had nothing to attack; it counts nowhere."""
    return AttackResult(
        name=attack.name,
        leak=0.0,
        per_fact=(),
        lift=Interval(0.0, 0.0, 0.0),
        note=why,
        applicable=False,
        family=attack.family,
        access=attack.access,
        paper=attack.paper,
    )


def score_facts(handle: ModelHandle, prompts: Sequence[str], facts: Sequence[Fact]) -> list[float]:
    """Probability of each fact's object (its likeliest spelling) as the continuation of its prompt.

    Args:
        handle: The model to ask.
        prompts: One per fact, ending without a blank.
        facts: What the answers are.

    Returns:
        The probability of the whole object, 0 to 1, not length-normalised: the first token of a name decides, and a mean over
        its tokens would call every long name half known.
    """
    from lab.scoring import score_targets

    pairs = [(prompt, answer) for prompt, fact in zip(prompts, facts, strict=True) for answer in fact.answers]
    found = iter(score_targets(handle, pairs))
    return [max(min(1.0, math.exp(next(found).sum_logprob)) for _ in fact.answers) for fact in facts]
