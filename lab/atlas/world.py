"""The built-in world: every fact, who it is about, how facts connect, and what may be forgotten.

Real facts (countries, elements, planets, places, books) can be checked by anyone; fictional people, firms and works are drawn
with a seed. ``load_world`` gives the same world in every process.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

from lab.atlas.builder import FORGET_COUNTS, Entity, Relation, build, make_fact, work_title
from lab.errors import ConfigError, UnknownNameError
from lab.records import Fact

Kind = Literal["person", "firm", "work"]

_PARTS: Mapping[str, str] = {"person": "people", "firm": "firms", "work": "works"}
_SHARES: Mapping[str, float] = {"01": 0.01, "05": 0.05, "10": 0.10}
_RELATION_TO_FORGET = "occupation"
_CONCEPT_RELATION = "employer"


@dataclass(frozen=True)
class Chain:
    """Facts in a row: the object of each hop is the subject of the next.

    Attributes:
        subject: Subject of the first hop.
        relations: Relation of every hop.
        hops: The facts; two or three.
        answer: Object of the last hop.
        split: Split of the subject, ``dev`` or ``test``.
        id: For example ``citizenship/capital/<person>``.
    """

    subject: str
    relations: tuple[str, ...]
    hops: tuple[Fact, ...]
    answer: str
    split: str = ""
    id: str = ""

    @property
    def answers(self) -> tuple[str, ...]:
        """The answer and its aliases."""
        return self.hops[-1].answers

    def to_json(self) -> dict[str, Any]:
        """Returns the JSONL row; hops are fact ids."""
        row: dict[str, Any] = {"id": self.id, "subject": self.subject, "relations": list(self.relations)}
        return row | {
            "hops": [hop.id for hop in self.hops],
            "answer": self.answer,
            "aliases": list(self.answers[1:]),
            "split": self.split,
        }


@dataclass(frozen=True)
class World:
    """A world with complete ground truth.

    Attributes:
        facts: What models are trained to know.
        entities: Everything that facts are about, by name, the never-trained included.
        chains: All two- and three-hop chains over ``facts``.
        untrained: Facts about entities that training never mentions (split ``untrained``).
        relations: The relations by id.
        seed: What the fiction was drawn with.
        forgettable: People of the largest forget split, in the order in which smaller splits take them.
        fiction: The name parts and pools of the fictional kinds.
    """

    facts: tuple[Fact, ...]
    entities: Mapping[str, Entity]
    chains: tuple[Chain, ...]
    untrained: tuple[Fact, ...]
    relations: Mapping[str, Relation]
    seed: int
    forgettable: tuple[str, ...]
    fiction: Mapping[str, Any] = field(repr=False)

    @functools.cached_property
    def _subjects(self) -> Mapping[str, tuple[Fact, ...]]:
        return _grouped(itertools.chain(self.facts, self.untrained), lambda fact: fact.subject)

    @functools.cached_property
    def _relations(self) -> Mapping[str, tuple[Fact, ...]]:
        return _grouped(self.facts, lambda fact: fact.relation)

    @functools.cached_property
    def _names(self) -> Mapping[str, str]:
        aliases = {alias: entity.name for entity in self.entities.values() for alias in entity.aliases}
        return aliases | {name: name for name in self.entities}

    @functools.cached_property
    def _ids(self) -> Mapping[str, Fact]:
        return {fact.id: fact for fact in itertools.chain(self.facts, self.untrained)}

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the exported facts, chains and never-trained facts."""
        digest = hashlib.sha256()
        for row in itertools.chain(self.facts, self.chains, self.untrained):
            digest.update((json.dumps(row.to_json(), ensure_ascii=False, sort_keys=True) + "\n").encode())
        return digest.hexdigest()

    def entity(self, name: str) -> Entity:
        """The entity with this name or alias.

        Raises:
            UnknownNameError: Nothing in the world is called that.
        """
        if name not in self._names:
            raise UnknownNameError("entity", name, self._names)
        return self.entities[self._names[name]]

    def fact(self, id: str) -> Fact:
        """The fact with this id, such as ``capital/France``.

        Raises:
            UnknownNameError: There is no such fact.
        """
        if id not in self._ids:
            raise UnknownNameError("fact", id, self._ids)
        return self._ids[id]

    def by_subject(self, name: str) -> tuple[Fact, ...]:
        """All facts about an entity, given by name or alias; never-trained ones included. Empty when there are none."""
        return self._subjects.get(self._names.get(name, name), ())

    def by_relation(self, relation: str) -> tuple[Fact, ...]:
        """All trained facts of a relation.

        Raises:
            UnknownNameError: There is no such relation.
        """
        if relation not in self.relations:
            raise UnknownNameError("relation", relation, self.relations)
        return self._relations.get(relation, ())

    def split(self, name: Literal["dev", "test"]) -> tuple[Fact, ...]:
        """The trained facts of one split; all facts about one subject are in the same.

        Raises:
            UnknownNameError: Neither ``dev`` nor ``test``.
        """
        if name not in ("dev", "test"):
            raise UnknownNameError("split", name, ("dev", "test"))
        return tuple(fact for fact in self.facts if fact.split == name)

    def objects(self, relation: str) -> tuple[str, ...]:
        """The different objects of a relation, in order of first occurrence."""
        return tuple(dict.fromkeys(fact.object for fact in self.by_relation(relation)))

    def counterfactual(self, fact: Fact, rng: random.Random) -> str:
        """A wrong object for ``fact``: another one of its relation, none of its accepted answers.

        Raises:
            ConfigError: The relation has no other object.
        """
        right = {answer.casefold() for answer in fact.answers}
        pool = [other for other in self.objects(fact.relation) if other.casefold() not in right]
        if not pool:
            raise ConfigError(f"relation {fact.relation!r} has no object other than {fact.object!r}")
        return rng.choice(pool)

    def same_subject(self, fact: Fact) -> tuple[Fact, ...]:
        """The other facts about the subject of ``fact``."""
        return tuple(other for other in self.by_subject(fact.subject) if other.relation != fact.relation)

    def neighbours(self, fact: Fact, limit: int | None = None) -> tuple[Fact, ...]:
        """Facts of the same relation about other subjects: those with the same object first, then the rest."""
        others = [other for other in self.by_relation(fact.relation) if other.subject != fact.subject]
        return tuple(sorted(others, key=lambda other: other.object != fact.object))[:limit]

    def forget_names(self) -> tuple[str, ...]:
        """The names that ``forget_split`` takes."""
        return tuple(f"{kind}{share}" for kind in ("people", "relation", "concept") for share in _SHARES)

    def forget_split(self, name: str) -> tuple[Fact, ...]:
        """The facts of a forget split; splits of one kind are nested (01 in 05 in 10 per cent).

        ``people``: all facts about 4, 20 or 40 people. ``relation``: the occupation of some people. ``concept``: everybody's
        employment at some firms, whole firms at a time. Shares are of all facts about people.

        Raises:
            UnknownNameError: There is no such split.
        """
        if name not in self.forget_names():
            raise UnknownNameError("forget split", name, self.forget_names())
        kind, share = name[:-2], _SHARES[name[-2:]]
        if kind == "people":
            return tuple(
                fact for person in self.forgettable[: FORGET_COUNTS[name]] for fact in self.by_subject(person)
            )
        people = [fact for fact in self.facts if fact.group == "person"]
        wanted = round(share * len(people))
        rng = random.Random(f"atlas:forget:{kind}:{self.seed}")
        if kind == "relation":
            facts = [fact for fact in people if fact.relation == _RELATION_TO_FORGET]
            return tuple(rng.sample(facts, len(facts))[:wanted])
        firms = list(self.objects(_CONCEPT_RELATION))
        rng.shuffle(firms)
        chosen: list[Fact] = []
        for firm in firms:
            if len(chosen) >= wanted:
                break
            chosen += [fact for fact in self.by_relation(_CONCEPT_RELATION) if fact.object == firm]
        return tuple(chosen)

    def retain_split(self, name: str) -> tuple[Fact, ...]:
        """All trained facts that ``forget_split(name)`` does not hold."""
        forgotten = {fact.id for fact in self.forget_split(name)}
        return tuple(fact for fact in self.facts if fact.id not in forgotten)

    def unknown_names(self, rng: random.Random, kind: Kind = "person") -> Iterator[str]:
        """Endless full names of this kind that no entity has, trained or not.

        Half of them are new pairs of known parts, so that neither part alone tells a stranger; half are made of syllables.
        A name can come twice.
        """
        parts, syllables = self.fiction[_PARTS[kind]], self.fiction["syllables"]

        def coined(end: str) -> str:
            pieces = [rng.choice(syllables[part]) for part in ("onset", "vowel", "middle", end)]
            return "".join(pieces)

        while True:
            if rng.random() < 0.5:
                first, last = rng.choice(parts["first"]), rng.choice(parts["last"])
            elif kind == "person":
                first, last = coined("end"), coined("last_end")
            elif kind == "firm":
                first, last = coined("last_end"), rng.choice(parts["last"])
            else:
                first, last = rng.choice(parts["first"]), coined("end")
            name = work_title(first, last) if kind == "work" else f"{first} {last}"
            if name not in self._names:
                yield name

    def invented(self, rng: random.Random, kind: Kind = "person") -> tuple[Fact, ...]:
        """Facts about a stranger: a new name, and for every relation of the kind a random object of that relation."""
        name = next(self.unknown_names(rng, kind))
        facts = []
        for relation in self.relations.values():
            if relation.subject_kind == kind:
                source = rng.choice(self._fictional(relation.id))
                facts.append(make_fact(relation, name, source.answers))
        return tuple(facts)

    def _fictional(self, relation: str) -> tuple[Fact, ...]:
        return tuple(fact for fact in self.by_relation(relation) if not self.entities[fact.subject].real)


def _grouped(facts: Iterable[Fact], key: Callable[[Fact], str]) -> dict[str, tuple[Fact, ...]]:
    groups: dict[str, list[Fact]] = {}
    for fact in facts:
        groups.setdefault(key(fact), []).append(fact)
    return {name: tuple(group) for name, group in groups.items()}


def _chains(facts: Iterable[Fact], paths: Iterable[tuple[str, ...]]) -> tuple[Chain, ...]:
    table: dict[str, dict[str, Fact]] = {}
    for fact in facts:
        table.setdefault(fact.relation, {})[fact.subject] = fact
    chains = []
    for path in paths:
        for first in table[path[0]].values():
            hops = [first]
            for relation in path[1:]:
                following = table[relation].get(hops[-1].object)
                if following is None:
                    break
                hops.append(following)
            if len(hops) == len(path):
                id = f"{'/'.join(path)}/{first.subject}"
                chains.append(Chain(first.subject, path, tuple(hops), hops[-1].object, first.split, id))
    return tuple(chains)


@functools.cache
def load_world(seed: int = 0) -> World:
    """Builds the world; the tables are read on the first call.

    Args:
        seed: Draws the fictional names, facts and splits; the shipped models know world 0.
    """
    parts = build(seed)
    return World(
        facts=parts.facts,
        entities=MappingProxyType(dict(parts.entities)),
        chains=_chains(parts.facts, parts.paths),
        untrained=parts.untrained,
        relations=MappingProxyType(dict(parts.relations)),
        seed=seed,
        forgettable=parts.forgettable,
        fiction=MappingProxyType(dict(parts.fiction)),
    )
