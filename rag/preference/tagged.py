"""Further suites over the same contexts: trust tags, the hierarchy of sources, unanswerable questions with answerable twins."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lab.records import Passage, Trust
from rag.preference.match import same, says
from rag.preference.stage import Dataset, Record, records
from rag.preference.suites import is_right
from rag.preference.synthesis import TRUST_LEVELS, hierarchy_pairs
from rag.prompts import prompts_for

if TYPE_CHECKING:
    from lab.handle import ModelHandle
    from rag.readers.base import Reader


def trust_rows(reader: Reader, data: Dataset) -> list[Record]:
    """Asks a contradicting passage alone under every trust tag: verified, it should be believed; else memory should be.

    Args:
        reader: How the model is asked; its prompts must show the tag.
        data: Contexts with memory; those that contradict a known fact are asked.

    Returns:
        Rows ``item_id, trust, prediction, wanted, right`` for ``flip_rate``.
    """
    asked = [
        row
        for row in records(data)
        if row["context"] == "conflict"
        and row["prior_known"]
        and not same(row["prior"], row["counterfactual"])
    ]
    plan: list[tuple[Record, Trust]] = [(row, trust) for row in asked for trust in TRUST_LEVELS]
    if not plan:
        return []
    items = [
        (row["question"], [Passage("", row["counterfactual_passage"], "", trust)]) for row, trust in plan
    ]
    made = []
    for (row, trust), reading in zip(plan, reader.read_many(items), strict=True):
        wanted = row["counterfactual"] if trust == "verified" else row["prior"]
        made.append(
            {
                "item_id": row["id"],
                "trust": trust,
                "prediction": reading.answer,
                "wanted": wanted,
                "right": reading.known and says(reading.answer, [wanted]),
            }
        )
    return made


def hierarchy_rows(handle: ModelHandle, data: Dataset) -> list[Record]:
    """Asks every cell of instruction, documents and memory once for each contradicting context, by plain decoding.

    Args:
        handle: The model, with its patches.
        data: Contexts with memory; see ``hierarchy_pairs``, whose chosen answer is the wanted one.

    Returns:
        Rows ``item_id, cell, prediction, wanted, right``.
    """
    prompts = prompts_for(handle)
    asked = records(hierarchy_pairs(handle, data).data)
    texts = handle.generate([row["prompt"] for row in asked], max_new_tokens=24, stop=prompts.stop)
    made = []
    for row, text in zip(asked, texts, strict=True):
        answer, wanted = prompts.answer(text), row["chosen_answer"]
        silent = not prompts.knows(wanted)
        right = not prompts.knows(answer) if silent else says(answer, [wanted])
        made.append(
            {
                "item_id": row["id"],
                "cell": row["cell"],
                "prediction": answer,
                "wanted": wanted,
                "right": right,
            }
        )
    return made


def twin_rows(rows: Sequence[Mapping[str, Any]]) -> list[Record]:
    """The rows of ``observe`` whose answer memory does not hold, for ``abstention``.

    With documents that tell it the question is answerable; with irrelevant ones the same question is its unanswerable twin.
    """
    return [
        {
            "twin": row["item_id"],
            "answerable": row["context"] == "related",
            "abstained": row["abstained"],
            "right": is_right(row),
        }
        for row in rows
        if not row["prior_known"] and row["context"] in ("related", "irrelevant")
    ]
