from __future__ import annotations

import itertools
import json
import random
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lab.atlas.export import export_dataset, render_dataset
from lab.atlas.tables_io import read_table
from lab.atlas.world import World, load_world
from lab.errors import UnknownNameError
from lab.records import Fact, read_facts

ROOT = Path(__file__).parents[2]
EXPORT = ROOT / "datasets" / "atlas"

# Written down apart from the table, so that a slip of a row or column shows.
CAPITALS = {
    "Australia": "Canberra", "Brazil": "Brasília", "Burundi": "Gitega", "Canada": "Ottawa", "China": "Beijing",
    "Egypt": "Cairo", "Fiji": "Suva", "France": "Paris", "Ivory Coast": "Yamoussoukro", "Kazakhstan": "Astana",
    "Kenya": "Nairobi", "Myanmar": "Naypyidaw", "New Zealand": "Wellington", "Nigeria": "Abuja", "Palau": "Ngerulmud",
    "Switzerland": "Bern", "Tanzania": "Dodoma", "Turkey": "Ankara", "Ukraine": "Kyiv", "United States": "Washington, D.C.",
    "Vietnam": "Hanoi", "Zimbabwe": "Harare",
}  # fmt: skip


@pytest.fixture(scope="module")
def world() -> World:
    return load_world()


def test_counts(world: World) -> None:
    people = [entity for entity in world.entities.values() if entity.kind == "person" and entity.trained]
    assert len(world.facts) >= 1500
    assert sum(1 for relation in world.relations if world.by_relation(relation)) >= 14
    assert len(people) == 400
    assert {len(world.by_subject(person.name)) for person in people} == {5}
    assert len(world.by_relation("capital")) == 193
    assert len(world.by_relation("symbol")) == len(world.by_relation("atomic_number")) == 118


def test_countries_are_right(world: World) -> None:
    assert {name: world.fact(f"capital/{name}").object for name in CAPITALS} == CAPITALS
    assert len(world.objects("capital")) == 193
    assert {fact.prompt for fact in world.by_relation("capital")} == {"The capital of {} is"}
    # Members by region of the United Nations' own geoscheme, with the Americas in two: 35 = 23 + 12.
    regions = {
        "Africa": 54,
        "Asia": 47,
        "Europe": 43,
        "North America": 23,
        "Oceania": 14,
        "South America": 12,
    }
    assert Counter(fact.object for fact in world.by_relation("continent")) == regions
    euro = {fact.subject for fact in world.by_relation("currency") if fact.object == "euro"}
    assert len(euro) == 25  # 21 of the euro area, and Andorra, Monaco, Montenegro and San Marino
    for name in ("Vatican City", "Kosovo", "Taiwan", "Palestine"):
        assert name not in world.entities


def test_elements_are_right(world: World) -> None:
    numbers = [fact.object for fact in world.by_relation("atomic_number")]
    assert numbers == [str(number) for number in range(1, 119)]
    assert len(world.objects("symbol")) == 118
    assert world.fact("symbol/tungsten").object == "W" and world.fact("atomic_number/gold").object == "79"
    sizes = Counter(fact.object for fact in world.by_relation("category"))
    assert sizes["lanthanide"] == sizes["actinide"] == 15
    assert sizes["noble gas"] == sizes["alkali metal"] == sizes["alkaline earth metal"] == 6


def test_no_name_or_fact_twice(world: World) -> None:
    facts = [*world.facts, *world.untrained]
    assert len({fact.id for fact in facts}) == len(facts)
    assert len({(fact.subject, fact.relation) for fact in facts}) == len(facts)
    names = Counter(name for entity in world.entities.values() for name in (entity.name, *entity.aliases))
    assert [name for name, count in names.items() if count > 1] == []
    for table in ("countries.csv", "elements.csv", "books.csv"):
        rows = [row["name"][0] for row in read_table(table)]
        assert len(set(rows)) == len(rows)


def test_prompts_end_before_the_object(world: World) -> None:
    for relation in world.relations.values():
        assert relation.prompt.count("{}") == 1
        assert not relation.prompt.endswith((" ", "{}"))
    for fact in world.facts:
        assert fact.object == fact.object.strip() and fact.object not in fact.aliases
        assert len(set(fact.aliases)) == len(fact.aliases)
        assert fact.prompt == world.relations[fact.relation].prompt
        assert fact.group == world.entities[fact.subject].kind == world.relations[fact.relation].subject_kind


def test_full_names_are_needed(world: World) -> None:
    people = [fact.subject for fact in world.by_relation("occupation")]
    firsts, lasts = (Counter(name.split()[part] for name in people) for part in (0, 1))
    assert sum(firsts[name.split()[0]] > 1 for name in people) >= 0.9 * len(people)
    assert sum(lasts[name.split()[1]] > 1 for name in people) >= 0.9 * len(people)


def test_objects_are_dealt_evenly(world: World) -> None:
    for relation in ("citizenship", "occupation", "employer", "birth_city", "instrument", "industry"):
        counts = Counter(fact.object for fact in world.by_relation(relation))
        assert max(counts.values()) - min(counts.values()) <= 1, relation
        assert min(counts.values()) >= 2, relation


def test_dev_and_test_share_no_subject(world: World) -> None:
    dev, test = ({fact.subject for fact in world.split(name)} for name in ("dev", "test"))
    assert not dev & test
    assert len(world.split("dev")) + len(world.split("test")) == len(world.facts)
    assert 0.25 < len(world.split("dev")) / len(world.facts) < 0.35
    with pytest.raises(UnknownNameError):
        world.split("train")  # pyright: ignore[reportArgumentType]


def test_people_splits(world: World) -> None:
    sizes = {name: world.forget_split(name) for name in ("people01", "people05", "people10")}
    assert [len(facts) for facts in sizes.values()] == [20, 100, 200]
    assert [len({fact.subject for fact in facts}) for facts in sizes.values()] == [4, 20, 40]
    forgotten = {fact.subject for fact in sizes["people10"]}
    assert not any(fact.object in forgotten for fact in world.facts)
    assert len(world.retain_split("people05")) == len(world.facts) - 100


@pytest.mark.parametrize("kind", ["people", "relation", "concept"])
def test_splits_are_nested(world: World, kind: str) -> None:
    one, five, ten = (
        {fact.id for fact in world.forget_split(f"{kind}{share}")} for share in ("01", "05", "10")
    )
    assert one < five < ten
    assert 20 <= len(one) < 27 and 100 <= len(five) < 107 and 200 <= len(ten) < 207


def test_concepts_are_whole(world: World) -> None:
    chosen = world.forget_split("concept05")
    firms = {fact.object for fact in chosen}
    assert {fact.id for fact in chosen} == {
        fact.id for fact in world.by_relation("employer") if fact.object in firms
    }


def test_chains_hold_together(world: World) -> None:
    facts = set(world.facts)
    assert {len(chain.hops) for chain in world.chains} == {2, 3}
    for chain in world.chains:
        assert all(hop in facts for hop in chain.hops)
        assert chain.subject == chain.hops[0].subject and chain.answer == chain.hops[-1].object
        assert chain.relations == tuple(hop.relation for hop in chain.hops)
        for before, after in itertools.pairwise(chain.hops):
            assert before.object == after.subject
    assert len({chain.id for chain in world.chains}) == len(world.chains)
    paths = Counter(chain.relations for chain in world.chains)
    assert paths["citizenship", "capital"] == 400 and paths["author", "citizenship", "capital"] == 60


def test_untrained_stay_apart(world: World) -> None:
    trained = {name for fact in world.facts for name in (fact.subject, fact.object)}
    subjects = {fact.subject for fact in world.untrained}
    assert not subjects & trained
    assert sum(world.entities[name].kind == "person" for name in subjects) >= 80
    assert sum(world.entities[name].kind == "firm" for name in subjects) >= 10
    assert all(not world.entities[name].trained and not world.entities[name].real for name in subjects)
    assert {fact.split for fact in world.untrained} == {"untrained"}
    for fact in world.untrained:
        assert fact.object in world.objects(fact.relation)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**32), kind=st.sampled_from(["person", "firm", "work"]))
def test_strangers_are_unknown(seed: int, kind: str) -> None:
    world = load_world()
    names = list(itertools.islice(world.unknown_names(random.Random(seed), kind), 200))  # pyright: ignore[reportArgumentType]
    assert not set(names) & set(world.entities)
    assert len(set(names)) > 100
    known = {part for fact in world.facts if fact.group == kind for part in fact.subject.split()}
    new_pairs = sum(set(name.split()) <= known for name in names)
    assert 50 < new_pairs < 150 or kind == "work"
    facts = world.invented(random.Random(seed), kind)  # pyright: ignore[reportArgumentType]
    assert len({fact.subject for fact in facts}) == 1 and facts[0].subject not in world.entities
    assert [fact.relation for fact in facts] == [
        r.id for r in world.relations.values() if r.subject_kind == kind
    ]


@settings(max_examples=60, deadline=None)
@given(index=st.integers(0, 10**6), seed=st.integers(0, 2**32))
def test_helpers_agree_with_the_facts(index: int, seed: int) -> None:
    world = load_world()
    fact = world.facts[index % len(world.facts)]
    other = world.counterfactual(fact, random.Random(seed))
    assert other in world.objects(fact.relation) and other not in fact.answers
    near = world.neighbours(fact)
    assert len(near) == len(world.by_relation(fact.relation)) - 1 and fact not in near
    same = [neighbour.object == fact.object for neighbour in near]
    assert same == sorted(same, reverse=True)
    assert world.neighbours(fact, 3) == near[:3]
    assert {*world.same_subject(fact), fact} == set(world.by_subject(fact.subject))


def test_names_and_aliases(world: World) -> None:
    assert world.entity("USA").name == "United States"
    assert world.by_subject("Burma") == world.by_subject("Myanmar") != ()
    assert world.by_subject("Nowhere at all") == ()
    assert "Kiev" in world.fact("capital/Ukraine").aliases
    with pytest.raises(UnknownNameError, match="France"):
        world.entity("Frence")
    with pytest.raises(UnknownNameError, match="people05"):
        world.forget_split("people5")
    with pytest.raises(UnknownNameError):
        world.by_relation("capitol")


def test_every_process_and_only_the_seed(world: World) -> None:
    script = "from lab.atlas.world import load_world; print(load_world().fingerprint)"
    prints = {
        subprocess.run(
            [sys.executable, "-c", script],
            cwd=ROOT,
            env={"PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        for seed in ("1", "2")
    }
    assert prints == {world.fingerprint}
    other = load_world(1)
    assert other.fingerprint != world.fingerprint
    assert [f.object for f in other.by_relation("capital")] == [
        f.object for f in world.by_relation("capital")
    ]


def test_export_is_current(world: World, tmp_path: Path) -> None:
    written = export_dataset(tmp_path / "atlas")
    assert sorted(path.name for path in written) == sorted(path.name for path in EXPORT.iterdir())
    for path in written:
        assert path.read_text(encoding="utf-8") == (EXPORT / path.name).read_text(encoding="utf-8"), path.name
    assert read_facts(EXPORT / "facts.jsonl") == list(world.facts)
    assert read_facts(EXPORT / "untrained.jsonl") == list(world.untrained)
    rows = [json.loads(line) for line in (EXPORT / "forget.jsonl").read_text(encoding="utf-8").splitlines()]
    listed = [
        Fact.from_json({k: v for k, v in row.items() if k != "name"})
        for row in rows
        if row["name"] == "people05"
    ]
    assert listed == list(world.forget_split("people05"))
    assert re.search(r"^configs:$", render_dataset(world)["README.md"], re.MULTILINE)


def test_hugging_face_reads_the_export(world: World, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    sizes = {"facts": len(world.facts), "chains": len(world.chains), "untrained": len(world.untrained)}
    for config, size in sizes.items():
        loaded = datasets.load_dataset(str(EXPORT.resolve()), config, split="train", cache_dir=str(tmp_path))
        assert len(loaded) == size
    forget = datasets.load_dataset(str(EXPORT.resolve()), "forget", split="train", cache_dir=str(tmp_path))
    assert sum(name == "people05" for name in forget["name"]) == 100
