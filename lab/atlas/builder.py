"""Makes the facts of the world from its tables: real ones as they stand there, fictional ones drawn with a seed."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lab.atlas.tables_io import read_table, read_toml
from lab.records import Fact

PERSON_RELATIONS = ("citizenship", "occupation", "employer", "birth_city", "instrument")
FIRM_RELATIONS = ("headquarters", "industry")
WORK_RELATIONS = ("author", "genre")

DEV_SHARE = 0.3
FORGET_COUNTS = {"people01": 4, "people05": 20, "people10": 40}


@dataclass(frozen=True)
class Entity:
    """Something that facts are about.

    Attributes:
        name: The main name; facts use it as their subject.
        kind: For example ``country`` or ``person``.
        aliases: Other names.
        real: Whether it exists outside this world.
        trained: Whether the models' training states its facts; false for the never-trained entities.
    """

    name: str
    kind: str
    aliases: tuple[str, ...] = ()
    real: bool = True
    trained: bool = True


@dataclass(frozen=True)
class Relation:
    """One relation: the kinds it joins and its main cloze prompt (one ``{}``, ends where the object begins)."""

    id: str
    subject_kind: str
    object_kind: str
    prompt: str


@dataclass(frozen=True)
class Parts:
    """Everything the builder hands to the world; see ``World`` for the meaning of the fields."""

    relations: Mapping[str, Relation]
    paths: tuple[tuple[str, ...], ...]
    entities: Mapping[str, Entity]
    facts: tuple[Fact, ...]
    untrained: tuple[Fact, ...]
    forgettable: tuple[str, ...]
    fiction: Mapping[str, Any]


def read_relations() -> dict[str, Relation]:
    """The relations by id, in the order of their table."""
    return {name: Relation(name, **row) for name, row in read_toml("relations_core.toml")["relation"].items()}


def make_fact(relation: Relation, subject: str, answers: Sequence[str], split: str = "") -> Fact:
    """A fact about ``subject``; the first of ``answers`` is the object, the rest are its aliases."""
    return Fact(
        subject=subject,
        relation=relation.id,
        object=answers[0],
        prompt=relation.prompt,
        aliases=tuple(answers[1:]),
        id=f"{relation.id}/{subject}",
        split=split,
        group=relation.subject_kind,
    )


def work_title(first: str, last: str) -> str:
    """The title of a fictional work from its two parts."""
    return f"The {first} of {last}"


class _Draft:
    """Facts and entities as they are collected."""

    def __init__(self, relations: Mapping[str, Relation]) -> None:
        self.relations = relations
        self.entities: dict[str, Entity] = {}
        self.facts: list[Fact] = []
        self.untrained: list[Fact] = []

    def entity(self, names: Sequence[str], kind: str, *, real: bool, trained: bool = True) -> str:
        self.entities.setdefault(names[0], Entity(names[0], kind, tuple(names[1:]), real, trained))
        return names[0]

    def state(self, relation: str, subject: str, answers: Sequence[str]) -> None:
        known = self.entities.get(answers[0])
        if len(answers) == 1 and known is not None:
            answers = (known.name, *known.aliases)
        fact = make_fact(self.relations[relation], subject, answers)
        (self.facts if self.entities[subject].trained else self.untrained).append(fact)


def _add_real(draft: _Draft) -> None:
    for table, kind in (("countries.csv", "country"), ("elements.csv", "element")):
        for row in read_table(table):
            subject = draft.entity(row["name"], kind, real=True)
            for column, answers in row.items():
                if column != "name" and answers:
                    draft.state(column, subject, answers)
    for table in ("space.csv", "geography.csv"):
        for row in read_table(table):
            (relation,) = row["relation"]
            subject = draft.entity(row["name"], draft.relations[relation].subject_kind, real=True)
            draft.state(relation, subject, row["object"])
    for row in read_table("books.csv"):
        draft.state("author", draft.entity(row["name"], "work", real=True), row["author"])


def _pairs(parts: Mapping[str, Any], rng: random.Random) -> Iterator[tuple[str, str]]:
    pairs = list(itertools.product(parts["first"], parts["last"]))
    rng.shuffle(pairs)
    return iter(pairs)


def _dealt(pool: Sequence[str], count: int, rng: random.Random) -> list[str]:
    """``count`` draws in which every member of ``pool`` occurs equally often, up to one."""
    deck = list(pool)
    rng.shuffle(deck)
    cards = [deck[i % len(deck)] for i in range(count)]
    rng.shuffle(cards)
    return cards


def _add_fiction(draft: _Draft, fiction: Mapping[str, Any], seed: int) -> tuple[str, ...]:
    """Adds firms, people and works; returns the people that may be forgotten, in the order in which splits take them."""
    rng = random.Random(f"atlas:fiction:{seed}")
    cities = [entity.name for entity in draft.entities.values() if entity.kind == "city"]

    def cast(kind: str, table: Mapping[str, Any], pools: Mapping[str, Sequence[str]]) -> list[str]:
        count, unseen = int(table["count"]), int(table["untrained"])
        pairs = _pairs(table, rng)
        names = [
            draft.entity((" ".join(next(pairs)),), kind, real=False, trained=index < count)
            for index in range(count + unseen)
        ]
        for start, stop in ((0, count), (count, count + unseen)):
            columns = {id: _dealt(pool, stop - start, rng) for id, pool in pools.items()}
            for offset, name in enumerate(names[start:stop]):
                for id, column in columns.items():
                    draft.state(id, name, (column[offset],))
        return names[:count]

    firm_pools = {"headquarters": cities, "industry": fiction["firms"]["industry"]}
    firms = cast("firm", fiction["firms"], {id: firm_pools[id] for id in FIRM_RELATIONS})
    person_pools = {
        "citizenship": fiction["people"]["citizenship"],
        "occupation": fiction["people"]["occupation"],
        "employer": firms,
        "birth_city": cities,
        "instrument": fiction["people"]["instrument"],
    }
    people = cast("person", fiction["people"], {id: person_pools[id] for id in PERSON_RELATIONS})

    forgettable = rng.sample(people, max(FORGET_COUNTS.values()))
    free = [name for name in people if name not in forgettable]
    works = fiction["works"]
    titles = [work_title(*pair) for pair in itertools.islice(_pairs(works, rng), int(works["count"]))]
    authors = _dealt(rng.sample(free, int(works["authors"])), len(titles), rng)
    for title, author, genre in zip(titles, authors, _dealt(works["genre"], len(titles), rng), strict=True):
        draft.entity((title,), "work", real=False)
        draft.state("author", title, (author,))
        draft.state("genre", title, (genre,))
    return tuple(forgettable)


def _splits(entities: Mapping[str, Entity], seed: int) -> dict[str, str]:
    """``dev`` or ``test`` by subject, the dev share held within every kind; ``untrained`` for the never-trained."""
    rng = random.Random(f"atlas:split:{seed}")
    kinds: dict[str, list[str]] = {}
    for entity in entities.values():
        if entity.trained:
            kinds.setdefault(entity.kind, []).append(entity.name)
    splits = {name: "untrained" for name, entity in entities.items() if not entity.trained}
    for names in kinds.values():
        rng.shuffle(names)
        cut = round(DEV_SHARE * len(names))
        splits |= {name: "dev" if index < cut else "test" for index, name in enumerate(names)}
    return splits


def build(seed: int) -> Parts:
    """Builds the world's parts; equal for equal seeds, in every process."""
    core = read_toml("relations_core.toml")
    relations = read_relations()
    fiction = read_toml("fiction.toml")
    draft = _Draft(relations)
    _add_real(draft)
    forgettable = _add_fiction(draft, fiction, seed)
    splits = _splits(draft.entities, seed)
    order = {id: index for index, id in enumerate(relations)}
    facts = sorted(
        (replace(fact, split=splits[fact.subject]) for fact in draft.facts),
        key=lambda fact: order[fact.relation],
    )
    untrained = tuple(replace(fact, split=splits[fact.subject]) for fact in draft.untrained)
    paths = tuple(tuple(path) for path in core["chains"]["paths"])
    return Parts(relations, paths, draft.entities, tuple(facts), untrained, forgettable, fiction)
