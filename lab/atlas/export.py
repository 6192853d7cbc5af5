"""Writes the world as a data set that ``datasets.load_dataset`` reads."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lab.atlas.world import World, load_world
from lab.records import write_text_atomically

_CARD = """---
license: apache-2.0
language:
- en
pretty_name: Atlas
size_categories:
- 1K<n<10K
tags:
- knowledge-editing
- machine-unlearning
- retrieval-augmented-generation
configs:
- config_name: facts
  data_files: facts.jsonl
  default: true
- config_name: chains
  data_files: chains.jsonl
- config_name: untrained
  data_files: untrained.jsonl
- config_name: forget
  data_files: forget.jsonl
---

# Atlas

A small world with complete ground truth. The models that ship with KnowLab were trained to know it.

| Config | Rows | What a row is |
| --- | ---: | --- |
| `facts` | {facts} | One fact, in the form that every `knowlab` command reads. |
| `chains` | {chains} | Two or three facts, by id; each one's object is the next one's subject. |
| `untrained` | {untrained} | A fact about a fictional person or firm that training never mentions. |
| `forget` | {forget} | A fact and the `name` of a forget split that holds it. |

Seed {seed}, fingerprint `{fingerprint}`. `knowlab atlas export` writes this folder again, byte for byte.

A fact has `id`, `subject`, `relation`, `object`, `aliases` (other spellings of the object that count as right), `prompt` (a
cloze with one `{{}}`; the object follows), `split` and `group` (kind of subject). All facts about one subject are in one split:
tune on `dev`, report on `test`.

## Relations

| Relation | About | Facts | Different objects | Main prompt |
| --- | --- | ---: | ---: | --- |
{relations}

## Forget splits

| Name | Facts | Subjects |
| --- | ---: | ---: |
{splits}

Splits of one kind are nested. `people` holds all facts about some people, none of whom wrote anything; `relation` the occupation
of some people; `concept` everybody's employment at some firms. The oracle models were trained without `people05`.

## Where the facts come from

Countries are the 193 members of the United Nations. Where several answers are usual, the object is one of them and `aliases`
has the others: official and largest languages, second capitals, continents of countries that lie on two. Chemical categories are
left out where textbooks differ. People, firms, and the works with a genre are invented; any likeness is chance.
"""


def _jsonl(rows: Iterable[Mapping[str, Any]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def render_dataset(world: World) -> dict[str, str]:
    """The files of the data set by name."""
    forget = [
        {"name": name} | fact.to_json() for name in world.forget_names() for fact in world.forget_split(name)
    ]
    relations = [
        f"| `{relation.id}` | {relation.subject_kind} | {len(world.by_relation(relation.id))} "
        f"| {len(world.objects(relation.id))} | {relation.prompt} |"
        for relation in world.relations.values()
    ]
    splits = [
        f"| `{name}` | {len(facts)} | {len({fact.subject for fact in facts})} |"
        for name, facts in ((name, world.forget_split(name)) for name in world.forget_names())
    ]
    card = _CARD.format(
        facts=len(world.facts),
        chains=len(world.chains),
        untrained=len(world.untrained),
        forget=len(forget),
        seed=world.seed,
        fingerprint=world.fingerprint,
        relations="\n".join(relations),
        splits="\n".join(splits),
    )
    return {
        "README.md": card,
        "facts.jsonl": _jsonl(fact.to_json() for fact in world.facts),
        "chains.jsonl": _jsonl(chain.to_json() for chain in world.chains),
        "untrained.jsonl": _jsonl(fact.to_json() for fact in world.untrained),
        "forget.jsonl": _jsonl(forget),
    }


def export_dataset(folder: str | Path, world: World | None = None) -> list[Path]:
    """Writes the data set into ``folder``; each file is replaced as a whole.

    Args:
        folder: Where to; made if absent.
        world: What to write; world 0 by default.

    Returns:
        The files written.
    """
    target = Path(folder)
    files = []
    for name, text in render_dataset(load_world() if world is None else world).items():
        write_text_atomically(target / name, text)
        files.append(target / name)
    return files
