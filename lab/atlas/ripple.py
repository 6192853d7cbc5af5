"""What an edit means for the chains of the world: which answers must follow it, and which must stay."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TypeVar

from lab.atlas.world import Chain, World
from lab.records import Fact

Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True)
class Consequence:
    """A chain whose answer follows an edit.

    Attributes:
        chain: As it is without the edit.
        hops: Its facts after the edit; they branch off at the edited one.
    """

    chain: Chain
    hops: tuple[Fact, ...]

    @property
    def answers(self) -> tuple[str, ...]:
        """The answer after the edit and its aliases."""
        return self.hops[-1].answers


@dataclass(frozen=True)
class Ripple:
    """The chains around one edit.

    Attributes:
        changed: Chains through the edited fact that get another answer.
        same_subject: Chains that start where a changed one starts and do not pass the edited fact.
        same_path: Chains of a changed one's relations that start elsewhere and do not pass it.
        hops: The other facts of the changed chains, before and after.
    """

    changed: tuple[Consequence, ...]
    same_subject: tuple[Chain, ...]
    same_path: tuple[Chain, ...]
    hops: tuple[Fact, ...]


class Ripples:
    """Finds the chains around edits of one world.

    Args:
        world: The world.
        split: Only chains whose subject belongs to this split; all without it.
    """

    def __init__(self, world: World, split: str = "") -> None:
        self.world = world
        self._chains = tuple(chain for chain in world.chains if not split or chain.split == split)

    @cached_property
    def _facts(self) -> dict[tuple[str, str], Fact]:
        return {(fact.relation, fact.subject): fact for fact in self.world.facts}

    @cached_property
    def _through(self) -> dict[str, list[Chain]]:
        return _grouped(self._chains, lambda chain: [hop.id for hop in chain.hops])

    @cached_property
    def _from(self) -> dict[str, list[Chain]]:
        return _grouped(self._chains, lambda chain: [chain.subject])

    @cached_property
    def _along(self) -> dict[tuple[str, ...], list[Chain]]:
        return _grouped(self._chains, lambda chain: [chain.relations])

    def through(self, fact: Fact) -> tuple[Chain, ...]:
        """The chains that use a fact."""
        return tuple(self._through.get(fact.id, ()))

    def follow(self, chain: Chain, fact: Fact, target: str) -> tuple[Fact, ...] | None:
        """The facts of a chain where ``fact`` says ``target``; ``None`` where nothing is known of what it leads to."""
        hops: list[Fact] = []
        subject = chain.subject
        for relation in chain.relations:
            hop = self._facts.get((relation, subject))
            if hop is None:
                return None
            if hop.id == fact.id:
                same = (other for other in self.world.by_relation(relation) if other.object == target)
                aliases = next((other.aliases for other in same), ())
                hop = replace(hop, object=target, aliases=aliases)
            hops.append(hop)
            subject = hop.object
        return tuple(hops)

    def around(self, fact: Fact, target: str) -> Ripple:
        """The chains around an edit.

        Args:
            fact: The edited fact.
            target: Its new object.
        """
        changed = []
        for chain in self.through(fact):
            hops = self.follow(chain, fact, target)
            if hops is not None and not _overlap(hops[-1].answers, chain.answers):
                changed.append(Consequence(chain, hops))
        passing = {chain.id for chain in self.through(fact)}
        subjects = dict.fromkeys(found.chain.subject for found in changed)
        paths = dict.fromkeys(found.chain.relations for found in changed)
        beside = [chain for subject in subjects for chain in self._from[subject]]
        along = [chain for path in paths for chain in self._along[path] if chain.subject not in subjects]
        steps = {
            hop.id: hop for found in changed for hop in (*found.chain.hops, *found.hops) if hop.id != fact.id
        }
        return Ripple(
            tuple(changed),
            tuple(chain for chain in beside if chain.id not in passing),
            tuple(chain for chain in along if chain.id not in passing),
            tuple(steps.values()),
        )


def _grouped(chains: Iterable[Chain], keys: Callable[[Chain], Iterable[Key]]) -> dict[Key, list[Chain]]:
    groups: dict[Key, list[Chain]] = {}
    for chain in chains:
        for key in keys(chain):
            groups.setdefault(key, []).append(chain)
    return groups


def _overlap(first: Iterable[str], second: Iterable[str]) -> bool:
    return bool({text.casefold() for text in first} & {text.casefold() for text in second})
