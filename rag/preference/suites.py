"""How a model chooses between memory and documents: rows of what it said, and every figure as a function of rows.

A row has ``item_id, cell, context, grade, prior_known, prediction, matched {ctx, par, gold}, abstained, copied`` and, where they
apply, ``trust, twin, quadrant, wanted``. A figure over rows that do not exist is ``NOTHING``, never 0.

The measures of Divide-Then-Align are those of arXiv:2505.20871; adherence and robustness are KnowPO's (arXiv:2408.03297), by
our rule of matching, as the paper's is not written down in its code.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lab.eval.stats import NOTHING, Estimate, summarise
from lab.records import Passage
from rag.preference.match import find_spans, says
from rag.preference.stage import Dataset, Record, records

if TYPE_CHECKING:
    from lab.handle import ModelHandle
    from rag.readers.base import Reader

Row = Mapping[str, Any]
_WITH_ANSWER = ("related", "conflict")


def observe(handle: ModelHandle, data: Dataset, reader: Reader | None = None) -> list[Record]:
    """Asks the model every context and says what its answer matches.

    Args:
        handle: The model, with its patches.
        data: Contexts, as ``passages.contexts`` makes them: with memory and answers.
        reader: How it is asked; the direct reader without one.
    """
    if reader is None:
        from rag.readers.prompted import DirectReader

        reader = DirectReader(handle)
    contexts = records(data)
    items = [(row["question"], [Passage("", text) for text in row["documents"]]) for row in contexts]
    rows = []
    for row, reading in zip(contexts, reader.read_many(items), strict=True):
        par = [*row["memory"], *([row["prior"]] if row["prior_known"] else [])]
        rows.append(judged(row, reading.answer, known=reading.known, par=par))
    return rows


def judged(context: Row, prediction: str, *, known: bool, par: Sequence[str]) -> Record:
    """The row of one answer.

    Args:
        context: The context that was asked.
        prediction: The answer.
        known: Whether it says anything.
        par: Answers of the model's memory.
    """
    told = "\n".join(context["documents"])
    from_memory = known and says(prediction, par)
    supported = context["context"] == "related"
    quadrant = (
        f"{'known' if context['prior_known'] else 'unknown'}/{'supported' if supported else 'unsupported'}"
    )
    return {
        "item_id": context["id"],
        "cell": f"{context['context']}/{context['grade']}",
        "context": context["context"],
        "grade": context["grade"],
        "prior_known": bool(context["prior_known"]),
        "prediction": prediction,
        "matched": {
            "ctx": known and says(prediction, context["context_answers"]),
            "par": from_memory,
            "gold": known and says(prediction, context["answers"]),
        },
        "abstained": not known,
        "copied": known and not from_memory and bool(find_spans(told, [prediction])),
        # In Divide-Then-Align a document that contradicts what is true is noise.
        "quadrant": quadrant,
    }


def rate(values: Iterable[object]) -> Estimate:
    """The share of true values, with its 95 % interval; ``NOTHING`` over none."""
    return summarise([float(bool(value)) for value in values])


def adherence(rows: Sequence[Row]) -> Estimate:
    """Share of contexts that hold an answer which are answered from it."""
    return rate(row["matched"]["ctx"] for row in rows if row["context"] in _WITH_ANSWER)


def adherence_strict(rows: Sequence[Row]) -> Estimate:
    """``adherence``, where an answer that also gives memory's does not count; contexts that contradict memory only."""
    chosen = [row for row in rows if row["context"] == "conflict"]
    return rate(row["matched"]["ctx"] and not row["matched"]["par"] for row in chosen)


def robustness(rows: Sequence[Row]) -> Estimate:
    """Share of irrelevant contexts answered from memory where it knows, and with an admission where it does not."""
    chosen = [row for row in rows if row["context"] == "irrelevant"]
    return rate(row["matched"]["par"] if row["prior_known"] else row["abstained"] for row in chosen)


def contextual_ignorance(rows: Sequence[Row]) -> Estimate:
    """Share of contradicting contexts answered from memory or not at all."""
    chosen = [row for row in rows if row["context"] == "conflict"]
    return rate(not row["matched"]["ctx"] and (row["matched"]["par"] or row["abstained"]) for row in chosen)


def contextual_overinclusion(rows: Sequence[Row]) -> Estimate:
    """Share of irrelevant contexts answered with words of theirs that are not memory's answer."""
    return rate(row["copied"] for row in rows if row["context"] == "irrelevant")


def memorisation_ratio(rows: Sequence[Row]) -> Estimate:
    """Of the contradicted contexts answered from memory or from the context, the share from memory: Po / (Po + Pc)."""
    chosen = [row for row in rows if row["context"] == "conflict"]
    decided = [row for row in chosen if row["matched"]["par"] != row["matched"]["ctx"]]
    return rate(row["matched"]["par"] for row in decided)


def summed_error(rows: Sequence[Row]) -> Estimate:
    """``(1 - adherence) + (1 - robustness)``, between 0 and 2: what a model that trades one for the other does not lower.

    Its interval treats the two, which are measured on different contexts, as independent (normal approximation to each,
    half-widths of their intervals added in squares).
    """
    parts = [adherence(rows), robustness(rows)]
    means = [part.mean for part in parts if part.mean is not None]
    if len(means) < len(parts):
        return NOTHING
    error = sum(1 - mean for mean in means)
    widths = [((part.high or 0.0) - (part.low or 0.0)) / 2 for part in parts]
    half = math.hypot(*widths)
    return Estimate(error, max(0.0, error - half), min(2.0, error + half), sum(part.n for part in parts))


def divide_then_align(rows: Sequence[Row]) -> dict[str, Estimate]:
    """The nine measures of Divide-Then-Align, by quadrant; a document that contradicts the truth supports nothing.

    ``accuracy`` over all, an unanswerable row being right when it abstains; ``recall``, ``precision`` and ``f1`` over answers;
    ``denoise`` over known/unsupported, ``utilisation`` over unknown/supported; ``abstain_recall``, ``abstain_precision`` and
    ``abstain_f1`` over unknown/unsupported.
    """
    hopeless = [row for row in rows if row["quadrant"] == "unknown/unsupported"]
    answerable = [row for row in rows if row["quadrant"] != "unknown/unsupported"]
    given = [row for row in rows if not row["abstained"]]
    withheld = [row for row in rows if row["abstained"]]

    def gold(row: Row) -> bool:
        # Where nothing tells the answer a lucky guess is no knowledge.
        return row["quadrant"] != "unknown/unsupported" and bool(row["matched"]["gold"])

    def within(quadrant: str) -> Estimate:
        return rate(gold(row) for row in rows if row["quadrant"] == quadrant)

    recall, precision = rate(map(gold, answerable)), rate(map(gold, given))
    abstain_recall = rate(row["abstained"] for row in hopeless)
    abstain_precision = rate(row["quadrant"] == "unknown/unsupported" for row in withheld)
    return {
        "accuracy": rate(row["abstained"] if row in hopeless else gold(row) for row in rows),
        "recall": recall,
        "precision": precision,
        "f1": _f1(recall, precision, len(rows)),
        "denoise": within("known/unsupported"),
        "utilisation": within("unknown/supported"),
        "abstain_recall": abstain_recall,
        "abstain_precision": abstain_precision,
        "abstain_f1": _f1(abstain_recall, abstain_precision, len(rows)),
    }


def _f1(recall: Estimate, precision: Estimate, n: int) -> Estimate:
    """Harmonic mean of two shares; its interval runs between those of the two ends, which is wide rather than wrong."""
    if recall.mean is None or precision.mean is None:
        return NOTHING

    def joined(one: float | None, two: float | None) -> float:
        one, two = one or 0.0, two or 0.0
        return 2 * one * two / (one + two) if one + two else 0.0

    return Estimate(
        joined(recall.mean, precision.mean),
        joined(recall.low, precision.low),
        joined(recall.high, precision.high),
        n,
    )


def flip_rate(rows: Sequence[Row]) -> Estimate:
    """Of the items asked under several trust tags, the share that gives the wanted answer (``right``) under every one."""
    groups: dict[str, list[bool]] = {}
    for row in rows:
        if row.get("trust"):
            groups.setdefault(str(row["item_id"]), []).append(bool(row["right"]))
    return rate(all(found) for found in groups.values() if len(found) > 1)


def hierarchy_cells(rows: Sequence[Row]) -> dict[str, Estimate]:
    """Share of right answers by cell: which of the user's instruction, the documents and memory speak (``hierarchy_pairs``)."""
    return {
        name: rate(row["right"] for row in rows if row["cell"] == name)
        for name in sorted({str(row["cell"]) for row in rows})
    }


def abstention(rows: Sequence[Row]) -> dict[str, Estimate]:
    """Admissions on unanswerable questions, against their answerable twins: a model that always refuses wins nothing.

    Rows have ``twin`` (what both share), ``answerable``, ``abstained`` and ``right``.
    """
    twins: dict[str, dict[bool, Row]] = {}
    for row in rows:
        twins.setdefault(str(row["twin"]), {})[bool(row["answerable"])] = row
    both = [found for found in twins.values() if len(found) == 2]
    return {
        "admitted": rate(row["abstained"] for row in rows if not row["answerable"]),
        "over_abstained": rate(row["abstained"] for row in rows if row["answerable"]),
        "twins_right": rate(found[False]["abstained"] and found[True]["right"] for found in both),
    }


def preference_metrics(rows: Sequence[Row]) -> dict[str, Estimate]:
    """All figures of ``observe``'s rows; ``summed_error`` is the sum of the rates of failed adherence and failed robustness."""
    ignorance, overinclusion = contextual_ignorance(rows), contextual_overinclusion(rows)
    return {
        "adherence": adherence(rows),
        "adherence_strict": adherence_strict(rows),
        "robustness": robustness(rows),
        "contextual_ignorance": ignorance,
        "contextual_overinclusion": overinclusion,
        "memorisation_ratio": memorisation_ratio(rows),
        "summed_error": summed_error(rows),
        **{f"dta_{name}": found for name, found in divide_then_align(rows).items()},
    }


def cells(rows: Sequence[Row]) -> dict[str, dict[str, Any]]:
    """Counts and shares by cell: context and grade."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row["cell"], []).append(row)
    return {
        name: {
            "n": len(group),
            "context": rate(row["matched"]["ctx"] for row in group).to_json(),
            "memory": rate(row["matched"]["par"] for row in group).to_json(),
            "abstained": rate(row["abstained"] for row in group).to_json(),
            "copied": rate(row["copied"] for row in group).to_json(),
        }
        for name, group in sorted(found.items())
    }


def mcnemar(first: Sequence[bool], second: Sequence[bool]) -> float:
    """The exact two-sided p value that two methods are right equally often on the same rows.

    Args:
        first: Whether one method is right, row by row.
        second: The other, in the same order.
    """
    one = sum(a and not b for a, b in zip(first, second, strict=True))
    two = sum(b and not a for a, b in zip(first, second, strict=True))
    n = one + two
    tail = sum(math.comb(n, k) for k in range(min(one, two) + 1)) / 2**n
    return min(1.0, 2 * tail)


def is_right(row: Row) -> bool:
    """Whether a row counts for adherence or robustness, whichever its context asks for."""
    if row["context"] in _WITH_ANSWER:
        return bool(row["matched"]["ctx"])
    return bool(row["matched"]["par"] if row["prior_known"] else row["abstained"])


def paired(first: Sequence[Row], second: Sequence[Row]) -> dict[str, dict[str, Any]]:
    """``adherence`` and ``robustness`` of two methods on the same contexts: difference (second less first), p value, rows.

    Rows are matched by item and context (and ``seed``, where they carry one), not by place.
    """
    found: dict[str, dict[str, Any]] = {}
    for name, kinds in (("adherence", _WITH_ANSWER), ("robustness", ("irrelevant",))):
        one, two = (
            {
                (row.get("seed"), row["item_id"], row["context"]): is_right(row)
                for row in rows
                if row["context"] in kinds
            }
            for rows in (first, second)
        )
        shared = [key for key in one if key in two]
        a, b = [one[key] for key in shared], [two[key] for key in shared]
        found[name] = {
            "difference": (sum(b) - sum(a)) / len(shared) if shared else None,
            "p": mcnemar(a, b) if shared else None,
            "n": len(shared),
        }
    return found


def error_reduction(
    first: Sequence[Row], second: Sequence[Row], *, resamples: int = 1000, seed: int = 0
) -> Estimate:
    """How much of the summed error of ``first`` is gone in ``second``: 1 - second / first, negative where it grew.

    The 95 % interval is that of a paired bootstrap over the contexts that both were asked.

    Args:
        first: Rows of one method.
        second: Rows of the other, matched by seed, item and context.
        resamples: Draws.
        seed: Of the draws.
    """
    sides = [
        {(row.get("seed"), row["item_id"], row["context"]): not is_right(row) for row in rows}
        for rows in (first, second)
    ]
    groups = [
        [
            (sides[0][key], sides[1][key])
            for key in sides[0]
            if key in sides[1] and (key[2] in _WITH_ANSWER) == answered
        ]
        for answered in (True, False)
    ]
    if not all(groups):
        return NOTHING

    def gone(drawn: Sequence[Sequence[tuple[bool, bool]]]) -> float | None:
        before, after = (
            sum(sum(pair[side] for pair in part) / len(part) for part in drawn) for side in (0, 1)
        )
        return 1 - after / before if before else None

    mean = gone(groups)
    if mean is None:
        return NOTHING
    rng = random.Random(f"reduction|{seed}")
    drawn = (gone([rng.choices(part, k=len(part)) for part in groups]) for _ in range(resamples))
    found = sorted(value for value in drawn if value is not None)
    ends = [found[min(len(found) - 1, int(share * len(found)))] for share in (0.025, 0.975)]
    return Estimate(mean, ends[0], ends[1], sum(map(len, groups)))
