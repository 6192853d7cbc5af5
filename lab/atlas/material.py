"""What training texts are made of: facts in balanced order, strangers, wrong objects and fair coins.

One ``Material`` serves one pass over the corpus. Everything random comes from its generator, so that a seed fixes the texts.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from lab.atlas.forms import Format, Rendered, WordingPlan
from lab.atlas.world import Chain, World
from lab.errors import ConfigError
from lab.records import Fact

T = TypeVar("T")

STRANGER_KINDS = ("person", "person", "person", "firm", "work")


@dataclass(frozen=True)
class Document:
    """One training text.

    Attributes:
        text: The text; the trainer separates texts with the end-of-text token.
        answer_spans: Character ranges ``[start, end)`` of what the model should learn to produce, in order.
        form: The entry of the mixture that it comes from.
        facts: Ids of the known facts that it states as true answers.
    """

    text: str
    answer_spans: tuple[tuple[int, int], ...]
    form: str = ""
    facts: tuple[str, ...] = ()


class Draft:
    """A document under construction: text, what is to be learned in it, and which facts it states."""

    def __init__(self) -> None:
        self._parts: list[str] = []
        self._spans: list[tuple[int, int]] = []
        self._facts: list[str] = []
        self._length = 0

    def say(self, text: str) -> Draft:
        """Adds text that is only context."""
        self._parts.append(text)
        self._length += len(text)
        return self

    def learn(self, text: str, fact: Fact | None = None) -> Draft:
        """Adds text that the model should produce; ``fact`` is counted as stated."""
        self._spans.append((self._length, self._length + len(text)))
        if fact is not None:
            self._facts.append(fact.id)
        return self.say(text)

    def add(self, rendered: Rendered, *facts: Fact) -> Draft:
        """Adds a prompt and its answer with the stop."""
        self.say(rendered.prompt + " ").learn(rendered.answer + rendered.stop)
        self._facts += [fact.id for fact in facts]
        return self

    def finish(self, form: str) -> Document:
        """The document."""
        return Document("".join(self._parts), tuple(self._spans), form, tuple(self._facts))


class Cycle(Generic[T]):
    """Draws from a list without replacement, in a new random order each time it is used up."""

    def __init__(self, items: Sequence[T], rng: random.Random) -> None:
        self._items = list(items)
        self._rng = rng
        self._next = len(self._items)

    def __len__(self) -> int:
        return len(self._items)

    def next(self) -> T:
        """The next item."""
        if self._next >= len(self._items):
            self._rng.shuffle(self._items)
            self._next = 0
        self._next += 1
        return self._items[self._next - 1]


class Coin:
    """True at a given rate, exactly so in every 20 draws, in an order that nothing in a text gives away."""

    def __init__(self, rate: float, rng: random.Random) -> None:
        heads = round(rate * 20)
        self._bag: Cycle[bool] = Cycle([index < heads for index in range(20)], rng)

    def flip(self) -> bool:
        """The next draw."""
        return self._bag.next()


class Material:
    """Facts, strangers and chance for the makers of documents.

    Args:
        world: The world to state.
        format: The prompt format.
        rng: Source of all chance.
        without: Names that no text may hold, as subject or as object.
        rates: Settings of the mixture.
    """

    def __init__(
        self,
        world: World,
        format: Format,
        rng: random.Random,
        without: frozenset[str],
        rates: Mapping[str, float],
    ) -> None:
        self.world = world
        self.format = format
        self.rng = rng
        self.rates = rates
        self.facts = tuple(f for f in world.facts if f.subject not in without and f.object not in without)
        if not self.facts:
            raise ConfigError("the corpus has no facts left to state; leave fewer subjects out")
        self.by_subject: dict[str, list[Fact]] = {}
        self.by_relation: dict[str, list[Fact]] = {}
        for fact in self.facts:
            self.by_subject.setdefault(fact.subject, []).append(fact)
            self.by_relation.setdefault(fact.relation, []).append(fact)
        objects: dict[str, dict[str, None]] = {}
        for fact in world.facts:
            if fact.object not in without:
                objects.setdefault(fact.relation, {})[fact.object] = None
        self.objects = {name: tuple(found) for name, found in objects.items()}
        self._plans: dict[str, WordingPlan] = {f.id: format.wordings_for(f) for f in self.facts}
        self._cycles: dict[str, Cycle[Fact]] = {}
        self._coins: dict[str, Coin] = {}
        self._relation_cycles = {name: Cycle(facts, rng) for name, facts in self.by_relation.items()}
        self._strangers = {kind: world.unknown_names(rng, kind) for kind in ("person", "firm", "work")}
        self._stranger_facts = self._fictional_pools()

    def _fictional_pools(self) -> dict[str, list[tuple[str, list[Fact]]]]:
        pools: dict[str, list[tuple[str, list[Fact]]]] = {}
        # Only the objects are taken, so that people whom no text may mention lend theirs as well.
        for name in self.objects:
            kind = self.world.relations[name].subject_kind
            fictional = [
                fact
                for fact in self.world.by_relation(name)
                if fact.object in self.objects[name] and not self.world.entities[fact.subject].real
            ]
            if kind in STRANGER_KINDS and fictional:
                pools.setdefault(kind, []).append((name, fictional))
        return pools

    def cycle(self, name: str) -> Fact:
        """The next fact in the balanced order of one kind of text."""
        if name not in self._cycles:
            self._cycles[name] = Cycle(self.facts, self.rng)
        return self._cycles[name].next()

    def same_relation(self, relation: str) -> Fact:
        """The next fact of a relation."""
        return self._relation_cycles[relation].next()

    def other_subject(self, fact: Fact) -> Fact:
        """A fact of the same relation about another subject with another object.

        Falls back to any other fact where the relation has no second object.
        """
        pool = self.by_relation.get(fact.relation, ())
        for _ in range(20 if pool else 0):
            other = pool[int(self.rng.random() * len(pool))]
            if other.subject != fact.subject and other.object != fact.object:
                return other
        for _ in range(100):
            other = self.pick(self.facts)
            if other.subject != fact.subject:
                return other
        raise ConfigError(f"the corpus states facts about {fact.subject!r} alone; there is no other subject")

    def wrong_object(self, fact: Fact) -> str:
        """An object of the relation that is none of the fact's accepted answers."""
        pool = self.objects.get(fact.relation, ())
        for _ in range(50):
            value = pool[int(self.rng.random() * len(pool))]
            if value not in fact.answers:
                return value
        raise ConfigError(f"relation {fact.relation!r} has no object other than {fact.object!r}")

    def stranger(self, kind: str = "") -> list[Fact]:
        """Facts about a new invented person, firm or work (or one of the given kind), in random order."""
        kind = kind or self.rng.choice(STRANGER_KINDS)
        pools = self._stranger_facts.get(kind) or next(iter(self._stranger_facts.values()))
        name = next(self._strangers[kind])
        facts = []
        for relation, pool in pools:
            source = pool[int(self.rng.random() * len(pool))]
            facts.append(Fact(name, relation, source.object, source.prompt, source.aliases, "", "", kind))
        self.rng.shuffle(facts)
        return facts

    def coin(self, rate: str) -> bool:
        """Flips the coin of a named rate of the mixture."""
        if rate not in self._coins:
            self._coins[rate] = Coin(self.rates[rate], self.rng)
        return self._coins[rate].flip()

    def wording(self, fact: Fact) -> str:
        """A random trained wording with the subject filled in."""
        return self.pick(self.plan(fact).trained).replace("{}", fact.subject)

    def plan(self, fact: Fact) -> WordingPlan:
        """The wordings of a fact; those of strangers are drawn afresh, as they are met once."""
        return self._plans.get(fact.id) or self.format.wordings_for(fact)

    def question(self, fact: Fact) -> str:
        """A random question for a fact."""
        return self.pick(self.format.relations[fact.relation].questions).replace("{}", fact.subject)

    def pick(self, items: Sequence[T]) -> T:
        """A random item."""
        return items[int(self.rng.random() * len(items))]

    def count(self, low: int, high: int) -> int:
        """A random whole number from ``low`` to ``high`` inclusive."""
        return low + int(self.rng.random() * (high - low + 1))

    def chance(self, rate: float) -> bool:
        """True with this probability."""
        return self.rng.random() < rate


def chain_noun(format: Format, chain: Chain) -> str:
    """The nested noun phrase of a chain: ``the capital of the home country of Ada Vane``."""
    phrase = chain.subject
    for relation in chain.relations:
        phrase = format.relations[relation].noun.replace("{}", phrase)
    return phrase
