"""What editors that must be trained learn from: lessons, made of the built-in world's tuning facts or of a benchmark file.

A lesson is one edit with other wordings that it must reach and prompts that it must leave alone. Lessons never hold what an
evaluation asks: those of the built-in world are about ``dev`` subjects only, and those of a file can leave out another file.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lab.data import EditCase, load_cases
from lab.errors import DataError
from lab.records import EditRequest, Fact

if TYPE_CHECKING:
    from lab.atlas.forms import Format
    from lab.atlas.world import World

ATLAS = "atlas"
_NEIGHBOURS = 4
_REACHED = ("paraphrase", "paraphrase_trained", "paraphrase_templates")
_LEFT_ALONE = ("locality", "neighborhood", "relation")


@dataclass(frozen=True)
class Lesson:
    """One edit to learn from.

    Attributes:
        request: The edit.
        wordings: Further filled prompts that the new target must follow.
        locality: Filled prompts that must keep their answer, with the answer that is true there.
    """

    request: EditRequest
    wordings: tuple[str, ...] = ()
    locality: tuple[tuple[str, str], ...] = ()

    @property
    def subject(self) -> str:
        """The subject, folded for comparison."""
        return _fold(self.request.subject)

    @property
    def statement(self) -> str:
        """The edit as a sentence."""
        return f"{self.request.text} {self.request.target_new.strip()}"

    def pair(self, rng: random.Random) -> tuple[str, str]:
        """One prompt that the edit must reach, the edit's own included, and the target."""
        return rng.choice((self.request.text, *self.wordings)), self.request.target_new


@dataclass(frozen=True)
class Lessons:
    """Lessons for training and for validation; no subject is in both.

    Attributes:
        train, validation: Never empty.
        digest: Names all of them.
    """

    train: tuple[Lesson, ...]
    validation: tuple[Lesson, ...]
    digest: str


def load_lessons(source: str, *, seed: int = 0, exclude: Sequence[str | Path] = ()) -> tuple[Lesson, ...]:
    """Lessons of the built-in world or of a benchmark file.

    Args:
        source: ``"atlas"``, or anything ``lab.data.load_cases`` reads: zsRE's training rows, CounterFact, ...
        seed: Draws the built-in world's wrong objects and neighbours.
        exclude: Files whose subjects and prompts must not occur: those that the editor will be evaluated on.

    Raises:
        DataError: A file cannot be read, or no usable row is left.
    """
    found = atlas_lessons(seed=seed) if source == ATLAS else case_lessons(load_cases(source).cases)
    for file in exclude:
        found = without(found, load_cases(file).cases)
    if not found:
        raise DataError("holds no edit that a network could be trained on", source)
    return found


def atlas_lessons(
    *, seed: int = 0, draws: int = 3, world: World | None = None, format: Format | None = None
) -> tuple[Lesson, ...]:
    """Lessons about the built-in world's ``dev`` facts; facts of its ``test`` split occur nowhere in them.

    Args:
        seed: Draws wrong objects and neighbours.
        draws: Lessons per fact, each with another wrong object where the relation has several.
        world: The world; world 0 without it.
        format: The prompt format; the packaged one without it.
    """
    from lab.atlas.forms import load_format
    from lab.atlas.world import load_world

    world, format = world or load_world(), format or load_format()
    lessons = []
    for fact in world.split("dev"):
        rng = random.Random(f"lessons/{seed}/{fact.id}")
        targets = dict.fromkeys(world.counterfactual(fact, rng) for _ in range(draws))
        wordings = _wordings(fact, format)
        same = [(other.text, other.object) for other in world.same_subject(fact)]
        near = [(other.text, other.object) for other in world.neighbours(fact) if other.split == fact.split]
        for number, target in enumerate(targets):
            request = EditRequest(f"{fact.id}#{number}", fact.prompt, fact.subject, target, fact.object)
            chosen = rng.sample(near, min(_NEIGHBOURS, len(near)))
            lessons.append(Lesson(request, wordings, (*same, *chosen)))
    return tuple(lessons)


def case_lessons(cases: Sequence[EditCase]) -> tuple[Lesson, ...]:
    """Lessons of benchmark cases; those with several edits, whose prompts belong to no single one, are left out."""
    lessons = []
    for case in cases:
        if case.unsupported or len(case.requests) != 1:
            continue
        (request,) = case.requests
        wordings = [probe.prompt for group in _REACHED for probe in case.of(group)]
        locality = [
            (probe.prompt, probe.answers[0])
            for group in _LEFT_ALONE
            for probe in case.of(group)
            if probe.answers
        ]
        lessons.append(Lesson(request, tuple(wordings), tuple(locality)))
    return tuple(lessons)


def without(lessons: Sequence[Lesson], cases: Sequence[EditCase]) -> tuple[Lesson, ...]:
    """The lessons whose subject occurs in none of ``cases``, without the prompts that those ask."""
    subjects = {subject for case in cases for subject in case.subjects}
    asked = {_fold(probe.prompt) for case in cases for probe in case.probes}
    asked |= {_fold(request.text) for case in cases for request in case.requests}
    kept = []
    for lesson in lessons:
        if lesson.subject in subjects or _fold(lesson.request.text) in asked:
            continue
        wordings = tuple(text for text in lesson.wordings if _fold(text) not in asked)
        locality = tuple(pair for pair in lesson.locality if _fold(pair[0]) not in asked)
        kept.append(Lesson(lesson.request, wordings, locality))
    return tuple(kept)


def divide(lessons: Sequence[Lesson], *, share: float = 0.1, most: int = 100, seed: int = 0) -> Lessons:
    """Holds some subjects out for validation.

    Args:
        lessons: All of them.
        share: Share of the subjects that is held out, at least one.
        most: Validation lessons at most.
        seed: Draws the subjects.

    Raises:
        DataError: All lessons are about one subject, or none has a prompt that must stay as it is.
    """
    subjects = sorted({lesson.subject for lesson in lessons})
    if len(subjects) < 2:
        raise DataError(f"training needs edits of at least two subjects, there are {len(subjects)}")
    if not any(lesson.locality for lesson in lessons):
        raise DataError("no lesson holds a prompt that must stay as it is; use data with locality prompts")
    random.Random(f"divide/{seed}").shuffle(subjects)
    held = set(subjects[: max(1, round(share * len(subjects)))])
    train = tuple(lesson for lesson in lessons if lesson.subject not in held)
    validation = tuple(lesson for lesson in lessons if lesson.subject in held)[:most]
    rows = [[each.request.to_json(), each.wordings, each.locality] for each in (*train, *validation)]
    digest = hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()
    return Lessons(train, validation, digest)


def _wordings(fact: Fact, format: Format) -> tuple[str, ...]:
    plan = format.wordings_for(fact)
    texts = [
        template.replace("{}", fact.subject)
        for template in (*plan.trained, *plan.held_out_pairs)
        if template != fact.prompt
    ]
    questions = [text.replace("{}", fact.subject) for text in format.relations[fact.relation].questions]
    return (*texts, *(format.render("qa", question=question).prompt for question in questions))


def _fold(text: str) -> str:
    return " ".join(text.split()).casefold()
