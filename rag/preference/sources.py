"""Questions with a passage that answers them: from the built-in world and from files of others.

What an item is, ``items`` says; which files are read, ``forms``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lab.data import read_rows
from lab.data.text import normalize_answer
from lab.errors import ConfigError
from rag.preference.forms import items_of
from rag.preference.items import answer_type, item
from rag.preference.stage import Dataset, Record, Stage, draw_for, finish, records, share_of

if TYPE_CHECKING:
    from lab.atlas.world import World
    from lab.records import Fact

__all__ = ["WORDINGS", "answer_type", "atlas_items", "item", "read_items", "with_edits"]

WORDINGS = ("main", "trained", "held_out")


def atlas_items(
    world: World,
    facts: Sequence[Fact],
    *,
    seed: int = 0,
    strangers: float = 0.25,
    limit: int | None = None,
    wording: str = "main",
    asked: bool | None = None,
) -> Stage:
    """Items about the built-in world: known facts, and invented people whom no model can know.

    Args:
        world: The world.
        facts: The known facts to ask for, for example those of one split.
        seed: Draws wordings, order and strangers.
        strangers: Number of strangers' items per known item.
        limit: Known items at most.
        wording: How passages state a fact and how it is asked: ``main`` (the first wording, every question), ``trained`` (every
            wording that the model was trained on, every question but the last), ``held_out`` (wordings it never read, the
            last question). What learns from ``trained`` items meets nothing of the words of ``held_out`` ones.
        asked: Strangers' names come in two halves: those that are asked about (true) and those trained on (false), so that none
            is both. Without it any name may come.

    Raises:
        ConfigError: There is no such wording.
    """
    from lab.atlas.forms import load_format

    if wording not in WORDINGS:
        raise ConfigError(f"unknown wording {wording!r}; use {', '.join(WORDINGS)}")
    format, rng = load_format(), draw_for(seed, "atlas")
    chosen = list(facts)
    rng.shuffle(chosen)
    chosen = chosen[:limit]
    rows = []

    def state(fact: Fact) -> str:
        if wording == "main":
            return format.statement(fact)
        plan = format.wordings_for(fact)
        template = rng.choice(plan.trained if wording == "trained" else plan.held_out_templates)
        return f"{template.replace('{}', fact.subject)} {fact.object}"

    def add(fact: Fact, siblings: Sequence[Fact], id: str, memory: bool) -> None:
        questions = format.relations[fact.relation].questions
        chosen = {"main": questions, "trained": questions[:-1], "held_out": questions[-1:]}[wording]
        question = rng.choice(chosen).replace("{}", fact.subject)
        told = [fact, *rng.sample(list(siblings), min(len(siblings), rng.choice((0, 0, 1))))]
        rng.shuffle(told)
        passage = " ".join(f"{state(each)}." for each in told)
        row = item(
            id,
            question,
            passage,
            fact.answers,
            title=fact.subject,
            subject=fact.subject,
            relation=fact.relation,
            cloze=fact.text if fact.prompt else "",
            source="atlas",
        )
        rows.append(row if memory else row | {"memory": []})

    for fact in chosen:
        add(fact, world.same_subject(fact), fact.id, True)
    for number in range(round(strangers * len(chosen))):
        kind = rng.choice(("person", "firm", "work"))
        invented = world.invented(rng, kind)
        while asked is not None and (share_of(0, f"stranger/{invented[0].subject}") < 0.5) != asked:
            invented = world.invented(rng, kind)
        fact = rng.choice(invented)
        rest = [other for other in invented if other.relation != fact.relation]
        add(fact, rest, f"stranger/{number}/{fact.relation}/{fact.subject}", False)
    return finish(
        "items",
        len(facts),
        rows,
        seed=seed,
        strangers=strangers,
        limit=limit,
        wording=wording,
        source="atlas",
    )


def read_items(path: str | Path, *, limit: int | None = None) -> Stage:
    """Items of a file: SQuAD (1 or 2), MRQA, KnowPO's processed files, RGB, RealTimeQA, ConflictQA, ConFiQA, MQuAKE, NQ-Synth, flat rows.

    A flat row has ``question, context`` and ``answers`` or ``answer``; IfQA, CoConflictQA (parts of MRQA) and FaithEval are of
    this form. Rows of ConflictQA, ConFiQA and MQuAKE bring the passage that contradicts along. Every item has a document.

    Raises:
        DataError: The file is of none of these forms, has no documents or no questions, or a row breaks its schema (names file
            and line).
    """
    rows: list[Record] = []
    came, dropped = read_rows(path), Counter[str]()
    for row in came:
        if row.error is not None:
            raise row.error
        made, reason = items_of(row)
        if reason:
            dropped[reason] += 1
        rows += made
    for number, made in enumerate(rows):
        made["id"] = made["id"] or str(number)
    if len({made["id"] for made in rows}) < len(rows):
        rows = [made | {"id": f"{number}:{made['id']}"} for number, made in enumerate(rows)]
    return finish("items", len(came), rows[:limit], dropped, limit=limit, source=Path(path).name)


def with_edits(data: Dataset, requests: Sequence[Mapping[str, Any]]) -> Stage:
    """Sets the memory of items that a model's edits speak of: the edited answer is then what it should remember.

    Args:
        data: Items.
        requests: Requests as patches record them: ``prompt``, ``subject``, ``target_new``.
    """
    edited = {
        normalize_answer(request["prompt"].replace("{}", request["subject"])): request["target_new"]
        for request in requests
        if {"prompt", "subject", "target_new"} <= set(request)
    }
    rows = []
    for row in records(data):
        target = edited.get(normalize_answer(row["cloze"])) if row["cloze"] else None
        rows.append(row | {"edited": target is not None} | ({"memory": [target]} if target else {}))
    found = sum(row["edited"] for row in rows)
    return finish("edits", len(rows), rows, edits=len(edited), found=found)
