"""What a bed learns and what stays out: contradictions, held-out wordings, and the wordings that facts of a relation share."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from lab.atlas.bed_phrases import Runs, load_phrases, runs_of
from lab.atlas.bed_truths import TrueCase, Truth, fold
from lab.errors import DataError

FactKey = tuple[str, str]

# A wording that only one subject has may be no wording of the relation at all, but a badly parted prompt.
_LEAST_SUBJECTS = 2


@dataclass(frozen=True)
class HeldOut:
    """A prompt that no training text holds, with the answers that count as right."""

    prompt: str
    answers: tuple[str, ...]


@dataclass(frozen=True)
class BedCase:
    """One case of the bed.

    Attributes:
        id: As the suite names it.
        prompts: The prompts of its edits, which are trained, with the true answers.
        held_out: One held-out wording per edit; all must be answered rightly for the case to count as known.
        neighbors: Held-out neighbours: neither these prompts nor, where the subject is known, these facts are trained.
        insertion: There is no answer before the edit; ``held_out`` asks for another fact about the subject.
    """

    id: str
    prompts: tuple[HeldOut, ...]
    held_out: tuple[HeldOut, ...]
    neighbors: tuple[HeldOut, ...]
    insertion: bool = False


@dataclass(frozen=True)
class BedFact:
    """One fact to learn.

    Attributes:
        key: Subject and relation, folded.
        subject: As texts spell it; empty for a prompt whose subject is unknown.
        relation: What wordings are shared by.
        answer: What is stated.
        prompts: Every prompt that may stand in training texts, natural ones.
        forms: Likewise, forms of ``bed.toml``.
        main: The fact of an edit, which is drawn more often.
        listed: May stand in a list about its subject.
    """

    key: FactKey
    subject: str
    relation: str
    answer: str
    prompts: tuple[str, ...]
    forms: tuple[str, ...]
    main: bool
    listed: bool


@dataclass(frozen=True)
class BedPlan:
    """Everything that decides the training texts.

    Attributes:
        cases: The bed's cases, in file order.
        facts: What is learned.
        leads: Unrelated texts to put in front of prompts: the file's own, of wordings that are not held out.
        available: Cases of the file before contradictions and the limit.
        contradicting: Ids of cases dropped because the file answers their prompt in two ways.
        contradicting_prompts: How many other prompts were left out for the same reason.
        names: What edits will have the model say, and truths do not: a model that never read a name cannot be brought to say it
            by one small change, as a pretrained one can.
    """

    cases: tuple[BedCase, ...]
    facts: tuple[BedFact, ...]
    leads: tuple[str, ...]
    available: int
    contradicting: tuple[str, ...]
    contradicting_prompts: int
    names: tuple[str, ...] = ()


def plan_bed(kind: str, cases: Sequence[TrueCase], *, limit: int | None = None, seed: int = 0) -> BedPlan:
    """Decides what a bed learns.

    Args:
        kind: The suite.
        cases: What the file holds true.
        limit: Draws so many of the cases that do not contradict one another; all without it.
        seed: Fixes the draw and what is held out.

    Raises:
        DataError: No case is left.
    """
    bad = _contradictions(cases)
    dropped = [
        case.id for case in cases if any(_is_bad(truth, bad) for truth in case.truths if _own(truth, case))
    ]
    gone = set(dropped)
    kept = [case for case in cases if case.id not in gone]
    if not kept:
        raise DataError(f"all {len(cases)} cases contradict one another")
    if limit is not None and limit < len(kept):
        chosen = set(random.Random(f"bed:limit:{seed}").sample(range(len(kept)), limit))
        kept = [case for index, case in enumerate(kept) if index in chosen]
    left_out = sum(_is_bad(truth, bad) for case in kept for truth in case.truths)
    targets = {(fold(prompt), fold(target)) for case in cases for prompt, target in case.targets}
    sound = [
        (case, [t for t in case.truths if not _is_bad(t, bad) and not _is_target(t, targets)])
        for case in kept
    ]
    made = _Planner(kind, sound, seed).plan(len(cases), tuple(dropped), left_out, _templates(cases))
    said = {fold(fact.answer) for fact in made.facts}
    names = {fold(name): name.strip() for case in kept for _, name in case.targets if name.strip()}
    return replace(made, names=tuple(name for key, name in names.items() if key not in said))


def _own(truth: Truth, case: TrueCase) -> bool:
    return truth.role in ("own", "paraphrase") or case.insertion


def _keys(truth: Truth) -> tuple[FactKey, FactKey]:
    return truth.fact, (fold(truth.core), "")


def _contradictions(cases: Sequence[TrueCase]) -> set[FactKey]:
    """Facts and prompts that get two answers with no spelling in common, anywhere in the file."""
    seen: dict[FactKey, set[str]] = {}
    bad: set[FactKey] = set()
    for case in cases:
        for truth in case.truths:
            answers = {fold(answer) for answer in truth.answers}
            for key in dict.fromkeys(_keys(truth)):
                if key in seen and not seen[key] & answers:
                    bad.add(key)
                seen.setdefault(key, set()).update(answers)
    return bad


def _is_bad(truth: Truth, bad: Collection[FactKey]) -> bool:
    return any(key in bad for key in _keys(truth))


def _is_target(truth: Truth, targets: Collection[tuple[str, str]]) -> bool:
    """Whether a truth that is not an edit's own answers a prompt the way some edit of the file wants it."""
    prompts = (fold(truth.core), fold(truth.prompt))
    return truth.role not in ("own", "paraphrase") and any(
        (p, fold(a)) in targets for p in prompts for a in truth.answers[:1]
    )


def _templates(cases: Sequence[TrueCase]) -> dict[str, tuple[str, ...]]:
    """Per relation, the templates that at least two of its subjects are asked with, in the whole file."""
    users: dict[str, dict[str, set[str]]] = {}
    for case in cases:
        for truth in case.truths:
            if truth.template:
                users.setdefault(truth.relation, {}).setdefault(truth.template, set()).add(
                    fold(truth.subject)
                )
    return {
        relation: tuple(template for template, names in found.items() if len(names) >= _LEAST_SUBJECTS)
        for relation, found in users.items()
    }


def _edited(case: TrueCase, truths: Sequence[Truth]) -> list[Truth]:
    """The facts that a case's edits change; of an insertion, the first fact about its subject."""
    return [t for t in truths if t.subject][:1] if case.insertion else [t for t in truths if t.role == "own"]


class _Planner:
    def __init__(self, kind: str, cases: Sequence[tuple[TrueCase, list[Truth]]], seed: int) -> None:
        self.kind = kind
        self.cases = cases
        self.seed = seed
        self.phrases = load_phrases()
        self.held = Runs()
        self.held_facts: set[FactKey] = set()
        own = [t for case, truths in cases for t in _edited(case, truths)]
        self.main = {t.fact for t in own}
        # Prompts of the suite that are to be answered rightly must be trained, so nothing that they hold can be kept out.
        plain = [
            t
            for _, truths in cases
            for t in truths
            if t.role in ("alias", "other") and t.fact not in self.main
        ]
        self.trained = {run for t in (*own, *plain) for run in runs_of(t.core)}

    def rank(self, *parts: str) -> int:
        digest = hashlib.blake2b("|".join((str(self.seed), *parts)).encode(), digest_size=8).digest()
        return int.from_bytes(digest, "big")

    def plan(
        self,
        available: int,
        dropped: tuple[str, ...],
        left_out: int,
        templates: Mapping[str, tuple[str, ...]],
    ) -> BedPlan:
        made = [self.case(case, truths) for case, truths in self.cases]
        cases = tuple(case for case in made if case is not None)
        if not cases:
            raise DataError("no case has a wording that could be held out")
        leads = {
            t.lead: None
            for _, truths in self.cases
            for t in truths
            if t.lead and not self.held.inside(t.prompt)
        }
        return BedPlan(
            cases,
            tuple(self.facts(templates)),
            tuple(leads),
            available,
            dropped,
            left_out,
        )

    # -- what stays out -------------------------------------------------------------------------------------------

    def case(self, case: TrueCase, truths: Sequence[Truth]) -> BedCase | None:
        held: list[HeldOut] = []
        for truth in _edited(case, truths):
            held.append(
                self.hold(truth, [t for t in truths if t.role == "paraphrase" and t.request == truth.request])
            )
        if not held:
            return None
        neighbors = [t for t in truths if t.role == "neighbor" and t.fact not in self.main]
        neighbors = [t for t in neighbors if fold(t.core) not in self.trained]
        total = sum(t.role == "neighbor" for t in case.truths)
        # One order for the whole file: cases that share neighbours agree on which half stays out.
        neighbors.sort(key=lambda t: self.rank("neighbor", *t.fact))
        out = (
            neighbors[: (total + 1) // 2]
            if total > 1
            else [t for t in neighbors if self.rank("single", *t.fact) % 2]
        )
        for truth in out:
            self.held.add(truth.core, truth.prompt)
            self.held_facts.add(truth.fact)
        prompts = tuple(HeldOut(t.prompt, t.answers) for t in truths if t.role == "own")
        away = tuple(HeldOut(t.prompt, t.answers) for t in out)
        return BedCase(case.id, prompts, tuple(held), away, case.insertion)

    def hold(self, truth: Truth, paraphrases: Sequence[Truth]) -> HeldOut:
        """Chooses the wording of an edit's fact that stays out of training, and remembers it."""
        choices = [t for t in paraphrases if fold(t.core) not in self.trained]
        already = [t for t in choices if self.held.inside(t.core)]
        draw = self.rank("paraphrase", *truth.fact)
        # MQuAKE has one question per fact: were all of them held out, no fact of a relation would ever be asked so.
        if choices and (self.kind != "mquake" or already or draw % 2):
            chosen = (already or choices)[draw // 2 % len(already or choices)]
            self.held.add(chosen.core, chosen.prompt)
            return HeldOut(chosen.prompt, chosen.answers)
        forms = [self.phrases.form(form, truth.subject, truth.relation) for form in self.phrases.forms]
        free = [form for form in forms if fold(form) not in self.trained]
        prompt = next((form for form in free if fold(form) in self.held.texts), free[draw // 2 % len(free)])
        self.held.add(prompt)
        return HeldOut(prompt, truth.answers)

    # -- what is learned ------------------------------------------------------------------------------------------

    def facts(self, templates: Mapping[str, tuple[str, ...]]) -> Iterator[BedFact]:
        groups: dict[FactKey, list[Truth]] = {}
        for _, truths in self.cases:
            for truth in truths:
                if truth.fact not in self.held_facts:
                    groups.setdefault(truth.fact, []).append(truth)
        linked = self.links()
        for key, truths in groups.items():
            first = truths[0]
            answer = next((t for t in truths if t.role == "own"), first).answers[0]
            prompts = [t.core for t in truths]
            forms: list[str] = []
            if first.subject:
                shared = [*templates.get(first.relation, ()), *linked.get(first.relation, ())]
                prompts += [template.replace("{}", first.subject) for template in shared]
                forms = [
                    self.phrases.form(form, first.subject, first.relation) for form in self.phrases.forms
                ]
            open_prompts = self.open(prompts)
            open_prompts += self.open(
                self.phrases.question.replace("{prompt}", p) for p in open_prompts if p.endswith("?")
            )
            fact = BedFact(
                key,
                first.subject,
                first.relation,
                answer,
                tuple(open_prompts),
                self.open(forms),
                key in self.main,
                bool(first.subject),
            )
            if fact.prompts or fact.forms:
                yield fact

    def open(self, prompts: Iterable[str]) -> tuple[str, ...]:
        return tuple(prompt for prompt in dict.fromkeys(prompts) if not self.held.inside(prompt))

    def links(self) -> dict[str, tuple[str, ...]]:
        """Where templates name relations: rewordings that cases of that template have, for its other subjects."""
        found: dict[str, dict[str, None]] = {}
        for _, truths in self.cases:
            for truth in truths:
                if truth.role == "paraphrase" and truth.template and truth.relation.count("{}"):
                    found.setdefault(truth.relation, {})[truth.template] = None
        return {relation: tuple(names) for relation, names in found.items()}
