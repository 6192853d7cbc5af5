"""What an unlearning run works on: facts to forget, facts to train beside them, and facts that are only asked about."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lab.data.unlearning import facts_of
from lab.handle import ModelHandle
from lab.records import Fact
from lab.scoring import score_targets

WORLD = "atlas:"
"""Before the name of one of the built-in world's forget splits, in place of a file."""


@dataclass(frozen=True)
class Material:
    """Facts by what they are for; a fact is in one place only, but for ``retain``, which is drawn from ``kept``.

    Attributes:
        forget: To be forgotten; all are asked about.
        kept: What a retain term may train on.
        retain: Of those, the ones that are asked about.
        neighbor: About the same subjects, or of the same relations, as what is forgotten; asked about, never trained.
        utility: What a model should know whatever it forgets; asked about, never trained.
    """

    forget: tuple[Fact, ...]
    kept: tuple[Fact, ...]
    retain: tuple[Fact, ...]
    neighbor: tuple[Fact, ...]
    utility: tuple[Fact, ...]


def gather(
    forget: str, retain: str | None = None, utility: str | None = None, *, limit: int = 100, seed: int = 0
) -> Material:
    """Reads and divides the facts.

    Args:
        forget: ``atlas:<split>`` (``atlas:people05``), or a file of facts, or of questions and answers.
        retain: Such a file; for a split of the built-in world, without it, everything else in that world.
        utility: Such a file; for a split of the built-in world, without it, its real-world facts.
        limit: Facts to ask about per group at most; neighbours and utility take no more than half of what there is.
        seed: Draws them.

    Raises:
        UnknownNameError: The world has no such split.
        DataError: A file cannot be read.
    """
    chooser = random.Random(f"unlearn:{seed}")
    others: list[Fact] = list(facts_of(retain)) if retain is not None else []
    real: list[Fact] = list(facts_of(utility)) if utility is not None else []
    if forget.startswith(WORLD):
        from lab.atlas.world import load_world

        world, name = load_world(), forget.removeprefix(WORLD)
        wanted = world.forget_split(name)
        if retain is None:
            others = list(world.retain_split(name))
        if utility is None:
            left = {fact.id for fact in wanted}
            real = [fact for fact in world.facts if world.entities[fact.subject].real and fact.id not in left]
    else:
        wanted = tuple(facts_of(forget))
    asked = _draw(real, limit if utility is not None else min(limit, len(real) // 2), chooser)
    taken = {_key(fact) for fact in (*wanted, *asked)}
    others = [fact for fact in others if _key(fact) not in taken]
    subjects, relations = ({getattr(fact, key) for fact in wanted} for key in ("subject", "relation"))
    near = [fact for fact in others if fact.subject in subjects or fact.relation in relations]
    neighbor = _draw(near, min(limit, len(near) // 2), chooser)
    taken |= {_key(fact) for fact in neighbor}
    kept = tuple(fact for fact in others if _key(fact) not in taken)
    return Material(wanted, kept, _draw(kept, limit, chooser), neighbor, asked)


def knowledge(handle: ModelHandle, facts: Sequence[Fact]) -> dict[str, Any] | None:
    """How well a model knows facts in their own prompts; ``None`` for no facts.

    Returns:
        ``probability``: mean over facts of the length-normalised probability of the answer; ``accuracy``: share of facts
        whose answer is greedily decoded; ``nll``: mean over facts of the loss per token.
    """
    if not facts:
        return None
    scores = score_targets(handle, [(fact.text, fact.object) for fact in facts])
    return {
        "probability": sum(score.probability for score in scores) / len(scores),
        "accuracy": sum(score.all_correct for score in scores) / len(scores),
        "nll": -sum(score.mean_logprob for score in scores) / len(scores),
    }


def oracle_name(model: str, forget: str) -> str | None:
    """The shipped model that was trained as ``model`` was, without these facts; ``None`` where there is none."""
    from lab.atlas.recipe import RECIPES
    from lab.atlas.weights import shipped

    name = f"{model}-oracle"
    recipe = RECIPES.get(name)
    if recipe is None or name not in shipped() or forget != f"{WORLD}{recipe.without}":
        return None
    return name


def _key(fact: Fact) -> tuple[str, str]:
    return fact.text, fact.object


def _draw(facts: Sequence[Fact], number: int, chooser: random.Random) -> tuple[Fact, ...]:
    """So many of the facts, in their own order."""
    chosen = sorted(chooser.sample(range(len(facts)), min(number, len(facts))))
    return tuple(facts[index] for index in chosen)
