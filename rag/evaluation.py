"""How a model chooses between memory and documents: questions under several conditions, asked by every reader and decoding rule.

A cell is one condition, one reader and one rule; it holds a row per question, and every figure is a function of rows. A figure
that a condition does not define is ``NOTHING``, never 0.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise, product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lab.errors import ConfigError
from lab.eval.scorers import exact_match
from lab.eval.stats import NOTHING, Z95, Estimate, summarise
from lab.records import Passage, write_text_atomically

if TYPE_CHECKING:
    from lab.atlas.world import World
    from lab.handle import ModelHandle
    from lab.records import Fact

CONDITIONS = ("agree", "contradict", "irrelevant", "none", "several")
# Asked where they are named: what notes on documents are for.
FURTHER = ("noisy", "unanswerable")
# Documents that say nothing of the question; Atlas has read no more at once.
_NOISE = 3
METRICS = ("accuracy", "adherence", "robustness", "memory", "unknown")
DIAL = tuple(number / 10 for number in range(11))
_SCHEMA = 1

Row = Mapping[str, Any]
Match = Callable[[str, Sequence[str]], bool]


@dataclass(frozen=True)
class Asked:
    """A question with the documents that are read with it.

    Attributes:
        id: Its name.
        question: As asked.
        answers: What is right, the main answer first; empty where only the word for unknown is.
        passages: The documents.
        told: What the documents state about the question; empty where they say nothing of it or nobody knows.
    """

    id: str
    question: str
    answers: tuple[str, ...]
    passages: tuple[Passage, ...] = ()
    told: tuple[str, ...] = ()


@dataclass(frozen=True)
class Cell:
    """What is asked in one go.

    Attributes:
        condition: Which documents are read.
        reader: A reader's name.
        decoding: A rule's name, with settings if wanted.
    """

    condition: str
    reader: str
    decoding: str


def plan(conditions: Sequence[str], readers: Sequence[str], decodings: Sequence[str]) -> list[Cell]:
    """Every condition with every reader and rule; names are checked and each counts once.

    Raises:
        UnknownNameError: There is no such reader or rule.
        ConfigError: A rule refuses its settings, or there is nothing to ask.
    """
    from rag.decoding import get_rule
    from rag.readers import READERS

    for reader in readers:
        READERS.get(reader)
    for decoding in decodings:
        get_rule(decoding)
    cells = [Cell(*found) for found in product(conditions, readers, decodings)]
    if not cells:
        raise ConfigError("there is nothing to ask; name at least one condition, reader and decoding rule")
    return list(dict.fromkeys(cells))


def check_conditions(conditions: Sequence[str], known: Sequence[str] = (*CONDITIONS, *FURTHER)) -> None:
    """Refuses a condition that is not known.

    Raises:
        ConfigError: There is no such condition.
    """
    if unknown := [name for name in conditions if name not in known]:
        raise ConfigError(f"unknown condition {unknown[0]!r}; use {', '.join(known)}")


def dial_cells(readers: Sequence[str]) -> list[Cell]:
    """The dial of CK-PLUG from the documents (0) to memory (1), below a document that contradicts."""
    return plan(["contradict"], readers, [f"ck_plug:memory={value}" for value in DIAL])


def atlas_questions(world: World, count: int | None, seed: int) -> dict[str, list[Asked]]:
    """The same facts of the built-in world under every condition.

    ``agree`` is one document that states the fact, ``contradict`` one that states another object, ``irrelevant`` one that states the
    same attribute of somebody else, ``none`` no document, and ``several`` three documents against memory: two for one wrong
    object, in two wordings, and one for another, where the relation has one. ``noisy`` is three documents that state the same
    attribute of others. ``unanswerable`` asks about a name that nobody has, with the documents of ``noisy``.

    Args:
        world: The world; facts come from its test split.
        count: How many facts; all of them by default.
        seed: Draws facts, wordings and wrong objects.
    """
    rng = random.Random(seed)
    facts = list(world.split("test"))
    rng.shuffle(facts)
    made: dict[str, list[Asked]] = {condition: [] for condition in (*CONDITIONS, *FURTHER)}
    # Of its own, so that what the five conditions ask does not depend on the further ones.
    noise = random.Random(f"{seed}/noise")
    names = world.unknown_names(noise)
    for fact in facts[:count]:
        found = _conditions(fact, world, rng)
        found |= _noisy(found["none"], fact, next(names), world, noise)
        for condition, asked in found.items():
            made[condition].append(asked)
    return made


def _noisy(asked: Asked, fact: Fact, nobody: str, world: World, rng: random.Random) -> dict[str, Asked]:
    from lab.atlas.forms import load_format

    format, strangers = load_format(), _strangers(fact, world)
    chosen = rng.sample(strangers, min(_NOISE, len(strangers)))
    passages = tuple(Passage(str(at), f"{format.statement(one)}.") for at, one in enumerate(chosen, start=1))
    question = asked.question.replace(fact.subject, nobody)
    return {
        "noisy": replace(asked, passages=passages),
        "unanswerable": Asked(f"{fact.id}/nobody", question, (), passages),
    }


def _strangers(fact: Fact, world: World) -> list[Fact]:
    """Facts of the same relation about others, with another object."""
    right = {answer.casefold() for answer in fact.answers}
    return [
        other
        for other in world.by_relation(fact.relation)
        if other.subject != fact.subject and other.object.casefold() not in right
    ]


def _conditions(fact: Fact, world: World, rng: random.Random) -> dict[str, Asked]:
    from lab.atlas.forms import load_format

    format = load_format()
    forms = format.relations[fact.relation]
    question = rng.choice(forms.questions).replace("{}", fact.subject)
    wrong = world.counterfactual(fact, rng)
    right = {answer.casefold() for answer in fact.answers}
    pool = [other for other in world.objects(fact.relation) if other.casefold() not in right]
    second = rng.choice([other for other in pool if other != wrong] or [wrong])
    reworded = f"{rng.choice(forms.held_out_templates).replace('{}', fact.subject)} {wrong}"
    several = [format.statement(fact, wrong), reworded, format.statement(fact, second)]
    rng.shuffle(several)
    strangers = _strangers(fact, world)
    texts: dict[str, tuple[Sequence[str], tuple[str, ...]]] = {
        "agree": ([format.statement(fact)], fact.answers),
        "contradict": ([format.statement(fact, wrong)], (wrong,)),
        "irrelevant": ([format.statement(rng.choice(strangers))], ()),
        "none": ((), ()),
        "several": (several, tuple(dict.fromkeys((wrong, second)))),
    }
    return {
        condition: Asked(
            fact.id,
            question,
            fact.answers,
            tuple(Passage(str(number), f"{text}.") for number, text in enumerate(said, start=1)),
            told,
        )
        for condition, (said, told) in texts.items()
    }


def closed_book(handle: ModelHandle, asked: Sequence[Asked], max_new_tokens: int) -> list[str | None]:
    """What memory says to each question, ``None`` where it says nothing: plain decoding without documents."""
    from rag.readers import READERS

    reader = READERS.get("direct")(handle, max_new_tokens=max_new_tokens)
    readings = reader.read_many([(one.question, ()) for one in asked])
    return [reading.answer if reading.known else None for reading in readings]


def run_cell(
    handle: ModelHandle,
    cell: Cell,
    asked: Sequence[Asked],
    memory: Sequence[str | None],
    *,
    max_new_tokens: int = 24,
    match: Match = exact_match,
    drafts: MutableMapping[str, str] | None = None,
) -> list[dict[str, Any]]:
    """Asks all questions of a cell together.

    Args:
        handle: The model, with its patches.
        cell: Reader and rule.
        asked: Questions with documents.
        memory: What memory says to each, as from ``closed_book``.
        max_new_tokens: Longest answer.
        match: Whether an answer says one of some answers.
        drafts: Notes that cells of several rules share; see ``Reader``.

    Returns:
        A row per question: ``id, question, answer, known, memory, right, follows, keeps``; ``follows`` is ``None`` where the
        documents state nothing about the question, ``keeps`` where memory says nothing.
    """
    from rag.decoding import get_rule
    from rag.readers import READERS

    reader = READERS.get(cell.reader)(handle, get_rule(cell.decoding), max_new_tokens=max_new_tokens)
    reader.drafts = drafts
    readings = reader.read_many([(one.question, one.passages) for one in asked])
    return [
        {
            "id": one.id,
            "question": one.question,
            "answer": reading.answer,
            "known": reading.known,
            "memory": said,
            "right": reading.known and match(reading.answer, one.answers)
            if one.answers
            else not reading.known,
            "follows": reading.known and match(reading.answer, one.told) if one.told else None,
            "keeps": None if said is None else reading.known and match(reading.answer, (said,)),
        }
        for one, reading, said in zip(asked, readings, memory, strict=True)
    ]


def figures(condition: str, rows: Sequence[Row]) -> dict[str, Estimate]:
    """``METRICS`` of a cell.

    ``accuracy`` is the share of right answers; where nobody knows, of those that say nothing. ``adherence`` is that of answers that
    say what the documents state, ``robustness``, with irrelevant documents alone, that of questions with a closed-book answer that
    keep it; ``memory`` is the same share under any condition; ``unknown`` that of answers that say nothing.
    """
    follows = [float(row["follows"]) for row in rows if row["follows"] is not None]
    keeps = summarise([float(row["keeps"]) for row in rows if row["keeps"] is not None])
    return {
        "accuracy": summarise([float(row["right"]) for row in rows]),
        "adherence": summarise(follows),
        "robustness": keeps if condition in ("irrelevant", "noisy") else NOTHING,
        "memory": keeps,
        "unknown": summarise([float(not row["known"]) for row in rows]),
    }


@dataclass(frozen=True)
class Keeper:
    """Finished cells in a folder, so that an interrupted run goes on.

    Attributes:
        folder: Where they lie.
        settings: Everything beside the cell that its rows depend on; a cell of other settings is asked again.
    """

    folder: Path
    settings: Mapping[str, Any]

    def file(self, cell: Cell) -> Path:
        """Where a cell lies."""
        told = json.dumps([_SCHEMA, cell.__dict__, dict(self.settings)], sort_keys=True, default=str)
        digest = hashlib.sha256(told.encode()).hexdigest()[:12]
        return self.folder / f"{cell.condition}-{cell.reader}-{cell.decoding.partition(':')[0]}-{digest}.json"

    def read(self, cell: Cell) -> list[dict[str, Any]] | None:
        """The rows of a finished cell; ``None`` where there is none that can be read."""
        try:
            rows = json.loads(self.file(cell).read_text(encoding="utf-8"))["rows"]
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return rows if isinstance(rows, list) else None

    def write(self, cell: Cell, rows: Sequence[Row]) -> None:
        """Keeps a finished cell."""
        content = {
            "schema_version": _SCHEMA,
            **cell.__dict__,
            "settings": dict(self.settings),
            "rows": list(rows),
        }
        write_text_atomically(
            self.file(cell), json.dumps(content, ensure_ascii=False, indent=1, default=str) + "\n"
        )


def run(
    handle: ModelHandle,
    cells: Sequence[Cell],
    questions: Mapping[str, Sequence[Asked]],
    keeper: Keeper,
    *,
    max_new_tokens: int = 24,
    match: Match = exact_match,
    progress: Callable[[str, int, int], None] | None = None,
) -> dict[Cell, list[dict[str, Any]]]:
    """Asks every cell that is not finished; each is kept before the next is asked.

    Args:
        handle: The model, with its patches.
        cells: What to ask.
        questions: By condition.
        keeper: Finished cells.
        max_new_tokens: Longest answer.
        match: Whether an answer says one of some answers.
        progress: Called with a phase, what is done of it, and its total.
    """
    found: dict[Cell, list[dict[str, Any]]] = {}
    memories: dict[tuple[str, ...], list[str | None]] = {}
    drafts: dict[str, str] = {}
    for number, cell in enumerate(cells):
        if progress:
            progress("cells", number, len(cells))
        rows = keeper.read(cell)
        if rows is None:
            asked = questions[cell.condition]
            bare = tuple(one.question for one in asked)
            if bare not in memories:
                memories[bare] = closed_book(handle, asked, max_new_tokens)
            rows = run_cell(
                handle, cell, asked, memories[bare], max_new_tokens=max_new_tokens, match=match, drafts=drafts
            )
            keeper.write(cell, rows)
        found[cell] = rows
    if progress:
        progress("cells", len(cells), len(cells))
    return found


def gain(before: Sequence[Row], after: Sequence[Row]) -> Estimate:
    """How many more answers are right after a change than before, question by question.

    The interval is that of paired shares after Agresti and Min (Statistics in Medicine, 2005): half a case more in each cell of the
    table of pairs, so that equal answers do not look certain.

    Raises:
        ConfigError: The rows are not of the same questions in the same order.
    """
    if [row["id"] for row in before] != [row["id"] for row in after]:
        raise ConfigError("a gain is of the same questions in the same order")
    if not before:
        return NOTHING
    pairs = [(bool(old["right"]), bool(new["right"])) for old, new in zip(before, after, strict=True)]
    won, lost, n = pairs.count((False, True)), pairs.count((True, False)), len(pairs)
    centre = (won - lost) / (n + 2)
    half = Z95 * math.sqrt((won + lost + 1) - (won - lost) ** 2 / (n + 2)) / (n + 2)
    return Estimate((won - lost) / n, max(-1.0, centre - half), min(1.0, centre + half), n)


def never_falls(values: Sequence[float | None]) -> bool:
    """Whether no value is below the one before it; values that are not there do not count."""
    held = [value for value in values if value is not None]
    return all(later >= earlier for earlier, later in pairwise(held))
