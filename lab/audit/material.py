"""Facts for an audit: what should be gone, what should stay, and facts that no model was trained on."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from lab.data.unlearning import facts_of
from lab.errors import DataError
from lab.records import Fact

if TYPE_CHECKING:
    from lab.atlas.forms import Format

WORLD = "atlas:"
"""Before the name of one of the built-in world's forget splits, in place of a file."""
_RETAINED = 400


@dataclass(frozen=True)
class Material:
    """What an audit asks about.

    Attributes:
        facts: Facts that should be gone.
        never: Facts that no model was trained on.
        retained: Facts that should have stayed.
        format: The prompt format of the model, for the built-in world.
        control: How the never-trained facts were made.
    """

    facts: tuple[Fact, ...]
    never: tuple[Fact, ...]
    retained: tuple[Fact, ...]
    format: Format | None
    control: str


def gather(facts: str, retained: str | None = None, *, limit: int | None = None, seed: int = 0) -> Material:
    """Reads facts and makes their controls.

    Args:
        facts: ``atlas:<split>`` (``atlas:people05``), a facts file, or questions and answers of an unlearning benchmark (TOFU,
            RWKU, the texts to complete of ConceptVectors).
        retained: Such a file; for a split of the built-in world, without it, the rest of the world.
        limit: Facts to audit at most, drawn by the seed.
        seed: Draws facts and controls.

    Raises:
        UnknownNameError: The world has no such split.
        DataError: A file cannot be read, or a fact has no prompt.
    """
    chooser = random.Random(f"audit:{seed}:material")
    kept = facts_of(retained) if retained is not None else ()
    if facts.startswith(WORLD):
        from lab.atlas.forms import load_format
        from lab.atlas.world import load_world

        world, name = load_world(), facts.removeprefix(WORLD)
        wanted = _draw(world.forget_split(name), limit, chooser)
        if retained is None:
            kept = world.retain_split(name)
        relations = {fact.relation for fact in wanted}
        strangers = [fact for fact in world.untrained if fact.relation in relations]
        never = _draw(strangers, len(wanted), chooser)
        return Material(
            wanted,
            never,
            _nearest(kept, wanted, chooser),
            load_format(),
            "people of the world that no text mentions",
        )
    rows = facts_of(facts)
    for number, fact in enumerate(rows, start=1):
        if not fact.prompt:
            raise DataError(f"fact {number} ({fact.subject!r}) has no prompt to ask with", facts)
    wanted = _draw(rows, limit, chooser)
    others = permuted(wanted, chooser)
    return Material(
        wanted, others, _nearest(kept, wanted, chooser), None, "the same subjects with exchanged objects"
    )


def strangers_of_the_world(seed: int = 0) -> Material:
    """The built-in world's never-trained facts as the ones to audit, without any control beside them.

    Args:
        seed: Draws the facts that the model does know.
    """
    from lab.atlas.forms import load_format
    from lab.atlas.world import load_world

    world = load_world()
    kept = _nearest(world.facts, world.untrained, random.Random(f"audit:{seed}:material"))
    return Material(world.untrained, (), kept, load_format(), "the other half of them")


def permuted(facts: Sequence[Fact], chooser: random.Random) -> tuple[Fact, ...]:
    """The facts with objects of other facts of the same relation; facts that find no other object are left out."""
    objects: dict[str, list[Fact]] = defaultdict(list)
    for fact in facts:
        objects[fact.relation].append(fact)
    found = []
    for fact in facts:
        others = [other for other in objects[fact.relation] if not set(other.answers) & set(fact.answers)]
        if others:
            other = chooser.choice(others)
            found.append(
                replace(
                    fact, object=other.object, aliases=other.aliases, id=f"exchanged/{fact.id or fact.text}"
                )
            )
    return tuple(found)


def _draw(facts: Sequence[Fact], number: int | None, chooser: random.Random) -> tuple[Fact, ...]:
    """So many of the facts, in their own order; all of them without a number."""
    if number is None or number >= len(facts):
        return tuple(facts)
    chosen = sorted(chooser.sample(range(len(facts)), number))
    return tuple(facts[index] for index in chosen)


def _nearest(facts: Sequence[Fact], wanted: Sequence[Fact], chooser: random.Random) -> tuple[Fact, ...]:
    """Facts that are of use beside the wanted ones: about their objects first, then of their relations, then any."""
    asked = {(fact.subject, fact.relation) for fact in wanted}
    objects = {answer for fact in wanted for answer in fact.answers}
    relations = {fact.relation for fact in wanted}
    usable = [fact for fact in facts if (fact.subject, fact.relation) not in asked]
    about = [fact for fact in usable if fact.subject in objects]
    alike = [fact for fact in usable if fact.subject not in objects and fact.relation in relations]
    rest = [fact for fact in usable if fact.subject not in objects and fact.relation not in relations]
    chooser.shuffle(alike)
    chooser.shuffle(rest)
    return tuple([*about, *alike[: _RETAINED // 2], *rest][:_RETAINED])
