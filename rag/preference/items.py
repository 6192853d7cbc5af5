"""What an item is: a question, a passage about it and its answers, with the type of the answer.

``memory`` holds the answers that the model's own memory should give: the right ones, or, for a model that carries an edit, the
edited one (``with_edits`` in ``sources``).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from lab.data.text import distinct

if TYPE_CHECKING:
    from rag.preference.stage import Record

_NUMBER = re.compile(r"[\d.,\s%-]*\d[\d.,\s%-]*")
_YEAR = re.compile(
    r"(?:\d{1,2}\s+)?(?:jan|feb|mar|apr|may|jun|jul|aug|sep|oct|nov|dec)\w*\b.*\d|(?:1\d|20)\d\d",
    re.IGNORECASE,
)


def item(
    id: str,
    question: str,
    passage: str,
    answers: Sequence[str],
    *,
    title: str = "",
    subject: str = "",
    relation: str = "",
    cloze: str = "",
    answerable: bool = True,
    source: str = "",
    counterfactual: str = "",
    counterfactual_passage: str = "",
) -> Record:
    """One item as a row.

    Args:
        id: Unique in its source.
        question: As asked.
        passage: States the answer where ``answerable``; is about the same title otherwise.
        answers: Right answers, the main one first; empty where nobody can know.
        title: What passages are grouped and split by; the question's own id without one.
        subject: Whom it is about, where known.
        relation: Named relation of the answer, where known; it is then the answer's type.
        cloze: The statement without its object, where known: what edits name a fact by.
        answerable: Whether the passage states the answer.
        source: Where it comes from.
        counterfactual: A wrong answer that the source brings along.
        counterfactual_passage: A passage of the source that states it; without one the passage is rewritten.
    """
    found = list(distinct(list(answers)))
    return {
        "id": id,
        "question": question.strip(),
        "passage": " ".join(passage.split()),
        "title": title or id,
        "answers": found,
        "memory": found,
        "answer_type": relation or answer_type(found[0] if found else ""),
        "relation": relation,
        "subject": subject,
        "cloze": cloze,
        "answerable": answerable,
        "source": source,
        "given_counterfactual": counterfactual,
        "given_counterfactual_passage": " ".join(counterfactual_passage.split()),
    }


def answer_type(answer: str) -> str:
    """``truth``, ``date``, ``number``, ``name`` (capitals) or ``other``: a coarse type, so that a year never stands for a person."""
    text = answer.strip()
    if text.casefold() in ("true", "false", "yes", "no"):
        return "truth"
    if _YEAR.fullmatch(text):
        return "date"
    if _NUMBER.fullmatch(text):
        return "number"
    if re.search(r"[㐀-鿿]", text):
        return "cjk"
    return "name" if text[:1].isupper() else "other"
