"""Edits that meet documents: does a model with edits believe documents that agree with them, and hold against the old value."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lab.data.text import normalize_answer
from lab.errors import ConfigError
from lab.eval.stats import Estimate
from lab.records import EditRequest, Passage
from rag.makers import batch_maker
from rag.preference.knowpo import applied_requests
from rag.preference.match import says
from rag.preference.stage import Record, draw_for
from rag.preference.suites import rate

if TYPE_CHECKING:
    from lab.atlas.world import World
    from lab.handle import ModelHandle
    from lab.patch import Patch
    from lab.records import Fact
    from rag.readers.base import Reader

CONTEXTS = ("agrees", "old", "irrelevant")


def world_edits(handle: ModelHandle, method: str, count: int, *, split: str = "test", seed: int = 0) -> Patch:
    """One patch with edits of facts of the built-in world, each about another subject, each to another object of its relation.

    Args:
        handle: The model.
        method: An editor's specification.
        count: Number of edits.
        split: Part of the world, ``test`` or ``dev``.
        seed: Draws facts and objects.

    Raises:
        ConfigError: The split has too few subjects.
    """
    from lab.atlas.world import load_world

    world, rng = load_world(), draw_for(seed, "edits", split)
    facts = [fact for fact in world.split("dev" if split == "dev" else "test") if fact.prompt]
    rng.shuffle(facts)
    chosen = list({fact.subject: fact for fact in facts}.values())[:count]
    if len(chosen) < count:
        raise ConfigError(f"{count} edits need as many subjects; {split} has {len(chosen)}")
    requests = [EditRequest.from_fact(fact, world.counterfactual(fact, rng)) for fact in chosen]
    return batch_maker(handle, method, requests, seed=seed)()


def edited_facts(handle: ModelHandle, world: World) -> list[tuple[Fact, str]]:
    """Facts of the world that the applied edits changed, each with what the model shall say now."""
    known = {normalize_answer(fact.text): fact for fact in world.facts if fact.prompt}
    found: dict[str, tuple[Fact, str]] = {}
    for request in applied_requests(handle):
        if {"prompt", "subject", "target_new"} <= set(request):
            text = normalize_answer(request["prompt"].replace("{}", request["subject"]))
            if text in known:
                found[text] = (known[text], request["target_new"])
    return list(found.values())


def edit_rows(handle: ModelHandle, reader: Reader, *, documents: int = 4, seed: int = 0) -> list[Record]:
    """Asks about every edited fact below documents that agree with the edit, that state the old value, and that state neither.

    Beside the document that matters stand statements about other subjects of the relation that name neither value.

    Args:
        handle: The model with its edits.
        reader: How it is asked.
        documents: Documents in a context.
        seed: Draws questions and documents.

    Returns:
        Rows ``item_id, context, prediction, new, old`` for ``edit_metrics``.

    Raises:
        ConfigError: No applied edit is of a fact of the built-in world.
    """
    from lab.atlas.forms import load_format
    from lab.atlas.world import load_world

    world, format = load_world(), load_format()
    facts = edited_facts(handle, world)
    if not facts:
        raise ConfigError("no edit of a fact of the built-in world is applied")
    plan: list[tuple[Fact, str, str]] = []
    items = []
    for fact, new in facts:
        rng = draw_for(seed, "edited", fact.id)
        question = rng.choice(format.relations[fact.relation].questions).replace("{}", fact.subject)
        for context in CONTEXTS:
            told = _distractors(world, fact, new, rng, documents)
            if context != "irrelevant":
                told = [format.statement(fact, new if context == "agrees" else fact.object), *told[1:]]
            rng.shuffle(told)
            items.append((question, [Passage("", f"{text}.") for text in told]))
            plan.append((fact, new, context))
    made = []
    for (fact, new, context), reading in zip(plan, reader.read_many(items), strict=True):
        made.append(
            {
                "item_id": fact.id,
                "context": context,
                "prediction": reading.answer,
                "new": reading.known and says(reading.answer, [new]),
                "old": reading.known and says(reading.answer, fact.answers),
            }
        )
    return made


def _distractors(world: World, fact: Fact, new: str, rng: random.Random, count: int) -> list[str]:
    from lab.atlas.forms import load_format

    format, barred = load_format(), [new, *fact.answers]
    others = [
        other
        for other in world.by_relation(fact.relation)
        if other.subject != fact.subject and not says(other.object, barred)
    ]
    return [format.statement(other) for other in rng.sample(others, min(count, len(others)))]


def edit_metrics(rows: Sequence[Mapping[str, Any]]) -> dict[str, Estimate]:
    """``edit_adherence`` (the new value where documents agree), ``edit_robustness`` (the new value against the old document),
    ``edit_old_followed`` (the old value there), ``edit_memory`` (the new value where documents say neither)."""

    def share(context: str, value: str) -> Estimate:
        return rate(row[value] for row in rows if row["context"] == context)

    return {
        "edit_adherence": share("agrees", "new"),
        "edit_robustness": share("old", "new"),
        "edit_old_followed": share("old", "old"),
        "edit_memory": share("irrelevant", "new"),
    }
