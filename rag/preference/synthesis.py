"""Further training data over the same contexts: Context-DPO, Divide-Then-Align, trust tags, the hierarchy of sources, notes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from math import ceil
from typing import TYPE_CHECKING

from lab.errors import ConfigError
from lab.records import Passage, Trust
from rag.notes import ReadingNote, render_notes
from rag.preference.match import same, same_as_any
from rag.preference.stage import Dataset, Record, Stage, draw_for, finish, records
from rag.prompts import FormatPrompts, Prompts, prompts_for

if TYPE_CHECKING:
    from lab.handle import ModelHandle

_KEPT = ("id", "title", "split", "context", "grade", "question", "prior_known")
TRUST_LEVELS: tuple[Trust, ...] = ("verified", "unverified", "superseded")


def _pair(prompts: Prompts, row: Record, prompt: str, chosen: str, rejected: str, **more: object) -> Record:
    stop = prompts.stop[0]
    return {key: row[key] for key in _KEPT} | {
        "prompt": prompt,
        "chosen": f" {chosen}{stop}",
        "rejected": f" {rejected}{stop}",
        "chosen_answer": chosen,
        "rejected_answer": rejected,
        **more,
    }


def context_dpo_pairs(handle: ModelHandle, data: Dataset) -> Stage:
    """A counterfactual passage alone: what it says is preferred to what is true (Context-DPO, arXiv:2412.15280).

    Both sides are the bare answer, so that their lengths and style are alike without further work.

    Args:
        handle: Gives the prompts.
        data: Contexts; those that contradict are used.
    """
    prompts, rows, made = prompts_for(handle), records(data), []
    for row in rows:
        if row["context"] != "conflict":
            continue
        prompt = prompts.direct(row["question"], [Passage("", row["counterfactual_passage"])])
        made.append(_pair(prompts, row, prompt, row["counterfactual"], row["answers"][0]))
    return finish("context_dpo", len(rows), made)


def dta_pairs(handle: ModelHandle, data: Dataset) -> Stage:
    """Preferences by quadrant: is the answer remembered, do the documents support it (Divide-Then-Align, arXiv:2505.20871).

    Where either holds, the right answer is preferred to an admission and to the model's own wrong answers; where neither
    does, the admission is preferred to everything else, the right answer included. Here a counterfactual document is noise,
    so contexts that contradict count as unsupported.

    Args:
        handle: Gives the prompts.
        data: Contexts with memory and the model's reading.

    Adds:
        ``quadrant``, ``rejected_from`` (``admission``, ``noise``, ``memory`` or ``gold``).
    """
    prompts, rows, made = prompts_for(handle), records(data), []
    for row in rows:
        if not row["answers"]:
            continue
        gold, supported = row["answers"], row["context"] == "related"
        quadrant = (
            f"{'known' if row['prior_known'] else 'unknown'}/{'supported' if supported else 'unsupported'}"
        )
        wrong = {
            "noise": row["read"]
            if prompts.knows(row["read"]) and not same_as_any(row["read"], gold)
            else None,
            "memory": row["prior"]
            if prompts.knows(row["prior"]) and not same_as_any(row["prior"], gold)
            else None,
        }
        right = row["prior"] if row["prior_known"] and same_as_any(row["prior"], gold) else gold[0]
        if quadrant == "unknown/unsupported":
            chosen, rejected = prompts.unknown, {**wrong, "gold": gold[0]}
        elif quadrant == "known/supported":
            chosen, rejected = right, {"admission": prompts.unknown}
        elif quadrant == "known/unsupported":
            chosen, rejected = right, {"noise": wrong["noise"], "admission": prompts.unknown}
        else:
            chosen, rejected = right, {**wrong, "admission": prompts.unknown}
        for source, answer in rejected.items():
            if answer is not None and not same(chosen, answer):
                made.append(
                    _pair(
                        prompts, row, row["prompt"], chosen, answer, quadrant=quadrant, rejected_from=source
                    )
                )
    return finish("dta", len(rows), made)


def trust_pairs(handle: ModelHandle, data: Dataset) -> Stage:
    """The same contradicting document under every trust tag: verified, it is believed; else memory is.

    Memory holds the current value, an edited one included, which is what supersedes an old document.

    Args:
        handle: Gives the prompts.
        data: Contexts with memory; those that contradict a known fact are used.

    Adds:
        ``trust``.
    """
    prompts, rows, made = prompts_for(handle), records(data), []
    for row in rows:
        if (
            row["context"] != "conflict"
            or not row["prior_known"]
            or same(row["prior"], row["counterfactual"])
        ):
            continue
        for trust in TRUST_LEVELS:
            prompt = prompts.direct(row["question"], [Passage("", row["counterfactual_passage"], "", trust)])
            sides = (row["counterfactual"], row["prior"])
            chosen, rejected = sides if trust == "verified" else sides[::-1]
            made.append(_pair(prompts, row, prompt, chosen, rejected, trust=trust))
    return finish("trust", len(rows), made)


def hierarchy_pairs(handle: ModelHandle, data: Dataset, *, beside: int = 1) -> Stage:
    """Instruction over context over memory (arXiv:2407.13048): the highest source that determines the answer gives it.

    The user's assumption is the instruction. The rejected answer is that of the next lower source that speaks, or where none
    does, of whatever else is in the prompt.

    Args:
        handle: Gives the prompts.
        data: Contexts with memory; those that contradict are used.
        beside: How many documents and assumptions on something else each question is asked beside, one at a time.

    Adds:
        ``cell``: which of I, C and P speak, lower case where a source speaks of something else.
    """
    prompts, rows = prompts_for(handle), records(data)
    conflicts = [row for row in rows if row["context"] == "conflict" and row["cloze"]]
    values: dict[str, list[str]] = {}
    for row in conflicts:
        held = values.setdefault(row["answer_type"], [])
        if row["answers"][0] not in held:
            held.append(row["answers"][0])
    made = []
    for place, row in enumerate(conflicts):
        others = [conflicts[(place + step) % len(conflicts)] for step in range(1, beside + 1)]
        known, told = row["prior_known"], row["counterfactual"]
        # The third value: the user's own, of the same relation, none of the other two. Drawn, as one for all of a type would be
        # learnt by itself.
        barred = [told, *row["answers"], *row["memory"], row["prior"]]
        free = [value for value in values[row["answer_type"]] if not same_as_any(value, barred)]
        third = draw_for(0, "third", row["id"]).choice(free) if free else None
        if third is None or others[0]["title"] == row["title"]:
            continue
        mine, claim = row["counterfactual_passage"], f"{row['cloze']} {third}"
        unknown, memory = prompts.unknown, row["prior"]
        lower = memory if known else unknown
        table: list[tuple[str, str | None, Sequence[str], str, str]] = [
            ("I,C,P" if known else "I,C", claim, [mine], third, told),
            ("I,P" if known else "I", claim, [], third, lower),
            ("C,P" if known else "C", None, [mine], told, lower),
        ]
        for other in others:
            if other["title"] == row["title"]:
                continue
            its, about = other["answers"][0], f"{other['cloze']} {other['answers'][0]}"
            table.append(("P,i" if known else "i", about, [], lower, its))
            table.append(("P,c" if known else "c", None, [other["passage"]], lower, its))
        if known:
            table.append(("P", None, [], memory, unknown))
        for cell, assumption, documents, chosen, rejected in table:
            if not same(chosen, rejected):
                prompt = assumed(prompts, row["question"], documents, assumption)
                made.append(_pair(prompts, row, prompt, chosen, rejected, cell=cell))
    return finish("hierarchy", len(rows), made, beside=beside)


def assumed(prompts: Prompts, question: str, documents: Sequence[str], assumption: str | None) -> str:
    """The prompt of a question under a user's assumption, with or without documents."""
    passages = [Passage("", text) for text in documents]
    if assumption is None:
        return prompts.direct(question, passages) if passages else prompts.closed(question)
    if isinstance(prompts, FormatPrompts):
        return prompts.format.render(
            "assumption", assumption=assumption, question=question, documents=passages
        ).prompt
    asked = f"Suppose that {assumption}. {question}"
    return prompts.direct(asked, passages) if passages else prompts.closed(asked)


def note_rows(handle: ModelHandle, data: Dataset, *, share: float = 0.5) -> Stage:
    """Reading notes and the answer after them (Chain-of-Note, arXiv:2311.09210), half of them; the answer alone, the others.

    The mixture is the paper's hybrid training. A note says what its document says: ``direct`` where it answers, ``contextual``
    where it is about the same title, ``irrelevant`` otherwise.

    Args:
        handle: Gives the prompts.
        data: Contexts with memory and ``prompt``.
        share: Part of the rows that take notes; none for the reader that notes are measured against.

    Raises:
        ConfigError: ``share`` is no share.

    Adds:
        ``prompt``, ``completion``, ``cell`` (``notes`` or ``answer``).
    """
    if not 0 <= share <= 1:
        raise ConfigError(f"the share of rows with notes lies between 0 and 1, it is {share}")
    prompts, rows = prompts_for(handle), records(data)
    shelf = {row["passage"]: row for row in rows}
    made: list[Record] = []
    dropped: Counter[str] = Counter()
    for row in rows:
        answer = _answer(prompts, row)
        if answer is None:
            dropped["memory is unsure"] += 1
            continue
        kept, stop = {key: row[key] for key in _KEPT}, prompts.stop[0]
        if ceil((len(made) + 1) * share) == ceil(len(made) * share):
            made.append(kept | {"prompt": row["prompt"], "completion": f" {answer}{stop}", "cell": "answer"})
            continue
        notes = [
            _note(row, text, kind, shelf) for text, kind in zip(row["documents"], row["kinds"], strict=True)
        ]
        if any(note is None for note in notes):
            dropped["a document's fact is not known"] += 1
            continue
        passages = [Passage("", text) for text in row["documents"]]
        prompt = prompts.notes(row["question"], passages)
        completion = _written(prompts, [note for note in notes if note is not None], answer, row["question"])
        made.append(kept | {"prompt": prompt, "completion": completion, "cell": "notes"})
    return finish("notes", len(rows), made, dropped, share=share)


def _answer(prompts: Prompts, row: Record) -> str | None:
    if row["context"] != "irrelevant":
        return row["context_answers"][0]
    if row["prior_known"]:
        return row["prior"]
    return None if row["memory"] and row["prior_unknown"] < 0.5 else prompts.unknown


def _note(row: Record, text: str, kind: str, shelf: Mapping[str, Record]) -> tuple[str, str, str, str] | None:
    """Kind, subject, relation and object of the note on one document."""
    if kind in ("gold", "counterfactual"):
        return "direct", row["subject"] or row["title"], row["relation"], row["context_answers"][0]
    other = shelf.get(text)
    if other is None or not other["answers"]:
        return None
    about = "contextual" if other["title"] == row["title"] else "irrelevant"
    return about, other["subject"] or other["title"], other["relation"], other["answers"][0]


def _written(prompts: Prompts, notes: Sequence[tuple[str, str, str, str]], answer: str, question: str) -> str:
    if isinstance(prompts, FormatPrompts):
        format = prompts.format
        made = [
            format.note(kind, subject=subject, label=format.relations[relation].label, object=object)
            for kind, subject, relation, object in notes
        ]
        return (
            " "
            + format.render(
                "notes_then_answer", documents=[], question=question, notes=made, answer=answer
            ).answer
            + prompts.stop[0]
        )
    lines = [
        ReadingNote(number, kind, f"{subject}: {object}")
        for number, (kind, subject, _, object) in enumerate(notes, start=1)
    ]
    # The prompt already holds the beginning of the first note.
    return render_notes(lines, answer).removeprefix("Note 1 (") + "\n"


PairRecipe = Callable[["ModelHandle", Dataset], Stage]
# What belongs to another question is what memory is mistaken for most often.
_TAUGHT_BESIDE = 2
RECIPES: Mapping[str, PairRecipe] = {
    "context_dpo": context_dpo_pairs,
    "dta": dta_pairs,
    "trust": trust_pairs,
    "hierarchy": partial(hierarchy_pairs, beside=_TAUGHT_BESIDE),
}
