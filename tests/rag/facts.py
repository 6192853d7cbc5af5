"""Known facts of the built-in world and documents that contradict them."""

from __future__ import annotations

import random
from dataclasses import dataclass

from lab.atlas.forms import load_format
from lab.atlas.world import load_world
from lab.records import Passage


@dataclass(frozen=True)
class Conflict:
    question: str
    known: str
    told: str
    document: Passage
    agreeing: Passage
    about_another: Passage


def conflicts(count: int, seed: int = 0) -> list[Conflict]:
    rng, format, facts = random.Random(seed), load_format(), load_world().facts
    made = []
    for fact in rng.sample(list(facts), count):
        told = rng.choice(
            [
                other.object
                for other in facts
                if other.relation == fact.relation and other.object != fact.object
            ]
        )
        other = rng.choice(
            [
                other
                for other in facts
                if other.relation == fact.relation and other.object not in (told, fact.object)
            ]
        )
        question = format.relations[fact.relation].questions[0].replace("{}", fact.subject)
        made.append(
            Conflict(
                question,
                fact.object,
                told,
                *(
                    Passage(name, f"{statement}.")
                    for name, statement in (
                        ("told", format.statement(fact, told)),
                        ("known", format.statement(fact)),
                        ("other", format.statement(other)),
                    )
                ),
            )
        )
    return made
