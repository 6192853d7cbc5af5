"""Documents around a question: counterfactual passages with their provenance, and contexts graded by difficulty."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lab.data.text import normalize_answer
from lab.errors import ConfigError
from rag.preference.match import find_spans, same_as_any, says
from rag.preference.stage import Dataset, Record, Stage, draw_for, finish, records

# The best matches are looked for among this many passages, so that the cost stays linear.
_LOOKED_AT = 200
_TRIES = 50


@dataclass(frozen=True)
class Rewritten:
    """A passage with another answer.

    Attributes:
        text: The passage.
        edits: For every place, start and end in the *old* text, and what stood there.
    """

    text: str
    edits: tuple[tuple[int, int, str], ...]


def rewrite_passage(passage: str, answers: Sequence[str], replacement: str) -> Rewritten | None:
    """Puts ``replacement`` wherever one of ``answers`` stands, longest answer first and whole words only.

    Returns:
        The rewritten passage; ``None`` where no answer stands in it, or one still does afterwards.
    """
    spans = find_spans(passage, answers)
    if not spans:
        return None
    parts, at = [], 0
    for start, end in spans:
        parts += [passage[at:start], replacement]
        at = end
    text = "".join([*parts, passage[at:]])
    if find_spans(text, answers) or not find_spans(text, [replacement]):
        return None
    return Rewritten(text, tuple((start, end, passage[start:end]) for start, end in spans))


def counterfactuals(data: Dataset, *, seed: int = 0) -> Stage:
    """Gives every answerable item a wrong answer of the same type, and its passage rewritten to say so.

    The answer is the source's own where it brings one that fits, else drawn among the answers of the same type (for named
    relations: of the same relation) of the same data. It is never one that counts as right or as remembered, and never
    stands in the passage already. Items without an answer in their passage pass through without one. A source that brings
    a contradicting passage along has it taken as it is.

    Adds:
        ``counterfactual`` and ``counterfactual_passage`` (empty where there is none), ``passage_edits``.
    """
    rows = records(data)
    pools: dict[tuple[str, str], dict[str, None]] = {}
    for row in rows:
        if row["answers"]:
            pools.setdefault((row["split"], row["answer_type"]), {})[row["answers"][0]] = None
    dropped: Counter[str] = Counter()
    made = []
    for row in rows:
        row |= {"counterfactual": "", "counterfactual_passage": "", "passage_edits": []}
        made.append(row)
        if not row["answerable"] or not row["answers"]:
            continue
        if given := row["given_counterfactual_passage"]:
            row["counterfactual"], row["counterfactual_passage"] = row["given_counterfactual"], given
            continue
        if not find_spans(row["passage"], row["answers"]):
            dropped["the passage does not hold the answer"] += 1
            made.pop()
            continue
        pool = list(pools[row["split"], row["answer_type"]])
        found = _counterfactual(row, pool, draw_for(seed, "counterfactual", row["id"]))
        if found is None:
            dropped["kept without a counterfactual: no other answer of its type fits"] += 1
            continue
        answer, rewritten = found
        row["counterfactual"], row["counterfactual_passage"] = answer, rewritten.text
        row["passage_edits"] = [
            {"start": start, "end": end, "old": old} for start, end, old in rewritten.edits
        ]
    return finish("counterfactuals", len(rows), made, dropped, seed=seed)


def _counterfactual(row: Record, pool: Sequence[str], rng: random.Random) -> tuple[str, Rewritten] | None:
    barred = [*row["answers"], *row["memory"], row.get("prior", "")]
    drawn = [rng.choice(pool) for _ in range(_TRIES)]
    for answer in [row["given_counterfactual"], *drawn]:
        if not answer or same_as_any(answer, barred) or find_spans(row["passage"], [answer]):
            continue
        rewritten = rewrite_passage(row["passage"], row["answers"], answer)
        if rewritten is not None:
            return answer, rewritten
    return None


def contexts(
    data: Dataset, *, documents: int = 4, hard: float = 0.5, most_hard: int = 2, seed: int = 0
) -> Stage:
    """Makes the contexts of every item: ``related`` (right), ``conflict`` (counterfactual) and ``irrelevant``.

    A ``hard`` context has distractors that are about the same title, ask the same relation, or share most words with the
    question; an ``easy`` one has passages of other titles. No distractor holds an answer in question. Distractors come from
    the item's own split. The order is drawn for each context, so that the place of the answer tells nothing.

    Args:
        data: Items with ``split``, memory and counterfactuals.
        documents: Documents in a context, at most.
        hard: Share of hard contexts.
        most_hard: Hard distractors in a hard context, at most; there is at least one.
        seed: Draws grades, distractors and order.
    """
    if not 0 <= hard <= 1 or most_hard < 1:
        raise ConfigError(
            f"a share of hard contexts is between 0 and 1 and each has at least 1 hard distractor; got {hard} and {most_hard}"
        )
    if documents < 2:
        raise ConfigError(f"a context needs at least 2 documents to hide its answer among, not {documents}")
    rows = records(data)
    shelves: dict[str, list[Record]] = {}
    for row in rows:
        shelves.setdefault(row["split"], []).append(row)
    made: list[Record] = []
    dropped: Counter[str] = Counter()
    for row in rows:
        shelf = _Shelf(row, shelves[row["split"]])
        for context in ("related", "conflict", "irrelevant"):
            first, answers = _first(row, context)
            if first is None:
                continue
            rng = draw_for(seed, "context", row["id"], context)
            grade = "easy" if rng.random() < 1 - hard else "hard"
            others = shelf.draw(rng, documents - bool(first), hard=most_hard if grade == "hard" else 0)
            told = ([(first, "gold" if context == "related" else "counterfactual")] if first else []) + others
            if context == "irrelevant" and not row["answerable"]:
                # The passage of a question that nobody can answer from it is the hardest distractor there is.
                told, grade = [(row["passage"], "hard"), *others[:-1]], "hard"
            if len(told) < 2 or (grade == "hard" and all(kind != "hard" for _, kind in told)):
                dropped[f"{context}: too few passages of other titles"] += 1
                continue
            rng.shuffle(told)
            made.append(
                row
                | {
                    "context": context,
                    "grade": grade,
                    "documents": [text for text, _ in told],
                    "kinds": [kind for _, kind in told],
                    "gold_pos": next((at for at, (_, kind) in enumerate(told) if kind in ("gold", "counterfactual")), -1),
                    "context_answers": answers,
                }
            )  # fmt: skip
    return finish(
        "contexts", len(rows), made, dropped, documents=documents, hard=hard, most_hard=most_hard, seed=seed
    )


def _first(row: Mapping[str, object], context: str) -> tuple[str | None, list[str]]:
    """The passage with the answer (empty for none, ``None`` where the context cannot be made) and the answers it gives."""
    if context == "irrelevant":
        return "", []
    if context == "related":
        good = row["answerable"] and row["answers"]
        return (str(row["passage"]), list(row["answers"])) if good else (None, [])  # type: ignore[call-overload]
    return (
        (str(row["counterfactual_passage"]), [str(row["counterfactual"])])
        if row["counterfactual"]
        else (None, [])
    )


class _Shelf:
    """The distractors of one item."""

    def __init__(self, row: Record, shelf: Sequence[Record]) -> None:
        self.row = row
        self.shelf = shelf
        barred = [*row["answers"], *row["memory"], row["counterfactual"], row.get("prior", "")]
        if row["answer_type"] == "truth":  # "no" in a text answers nothing
            barred = []
        self.barred = [answer for answer in barred if answer and normalize_answer(answer) != "unknown"]

    def draw(self, rng: random.Random, count: int, *, hard: int) -> list[tuple[str, str]]:
        """``count`` distractors with their kinds, as far as there are any; one to ``hard`` of them are hard."""
        looked = rng.sample(self.shelf, min(len(self.shelf), _LOOKED_AT))
        wanted = rng.randint(1, min(hard, count)) if hard else 0
        near = [other for other in looked if self._near(other)]
        if wanted and not near:
            words = set(normalize_answer(self.row["question"]).split())
            near = sorted(
                (other for other in looked if other["title"] != self.row["title"]),
                key=lambda other: -len(words & set(normalize_answer(other["passage"]).split())),
            )[:5]
        # Easy distractors never share the relation, else a grade would say nothing.
        far = [other for other in looked if other["title"] != self.row["title"] and not self._near(other)]
        chosen = self._take(near, wanted, "hard", [])
        chosen += self._take(far, count - len(chosen), "easy", [text for text, _ in chosen])
        if hard and len(chosen) < count:
            chosen += self._take(near, count - len(chosen), "hard", [text for text, _ in chosen])
        return chosen

    def _near(self, other: Record) -> bool:
        if other["title"] == self.row["title"]:
            return other["passage"] != self.row["passage"]
        return bool(self.row["relation"]) and other["relation"] == self.row["relation"]

    def _take(
        self, pool: Sequence[Record], count: int, kind: str, taken: Sequence[str]
    ) -> list[tuple[str, str]]:
        found: list[tuple[str, str]] = []
        for other in pool:
            if len(found) >= count:
                break
            text = other["passage"]
            if text in taken or any(text == one for one, _ in found) or says(text, self.barred):
                continue
            found.append((text, kind))
        return found
