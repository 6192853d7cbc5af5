"""Rows of published files as items, each form as it is published."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lab.data.fields import Fields
from lab.data.source import Row
from lab.data.text import normalize_answer
from lab.errors import DataError
from rag.preference.items import item
from rag.preference.match import same_as_any, says
from rag.preference.stage import Record
from rag.questions import conflictqa_question, nq_synth_question, realtimeqa_question, rgb_question

__all__ = ["items_of"]

_DENIAL = re.compile(
    r"\b(?:not|no|never|cannot|neither|nor|nobody|nothing|unlikely|impossible|false)\b|n't\b", re.IGNORECASE
)


@dataclass(frozen=True)
class _Form:
    """One way in which rows are published.

    Attributes:
        name: For messages.
        matches: Whether a row has this form.
        items: Reads a row; takes the file's name too.
        empty: Why a good row may give no item.
    """

    name: str
    matches: Callable[[Mapping[str, Any]], bool]
    items: Callable[[Row, str], list[Record]]
    empty: str = ""


def items_of(row: Row) -> tuple[list[Record], str]:
    """The items of a row.

    Returns:
        The items; and, where a row that should be counted has none, the reason.

    Raises:
        DataError: The row is of no known form, has no document or no question, or breaks its schema; names file and line.
    """
    form = next((form for form in _FORMS if form.matches(row.value)), None)
    if form is None:
        raise DataError(_unread(row.value), row.file, row.line)
    made = form.items(row, Path(row.file).name)
    return made, "" if made else form.empty


def _unread(value: Mapping[str, Any]) -> str:
    """Why a row is not read, and what would do."""
    if _asks(value):
        return (
            "the row has a question and an answer but no document: a field 'context' with the passage that states the answer "
            "would do; questions alone (question, answers) are for `knowlab rag eval --data`"
        )
    if "search_result" in value:
        return (
            "the row has search results but no question: RealTimeQA's past_qa files hold the questions; search results are "
            "for `knowlab rag eval --documents`"
        )
    names = ", ".join(dict.fromkeys(form.name for form in _FORMS))
    return f"a row with {', '.join(sorted(value))} is none of: {names}"


def _asks(value: Mapping[str, Any]) -> bool:
    return "question" in value and ("answers" in value or "answer" in value)


def _squad(row: Row, source: str) -> list[Record]:
    """SQuAD: its own files are one object around everything."""
    value = row.value
    if isinstance(value.get("data"), list):
        return [
            made
            for entry in value["data"]
            for made in items_of(replace(row, value=entry if isinstance(entry, dict) else {}))[0]
        ]
    return [
        made
        for paragraph in _list(row, value["paragraphs"], "paragraphs")
        for made in _questions(row, paragraph, str(value.get("title", "")), source)
    ]


def _mrqa(row: Row, source: str) -> list[Record]:
    """MRQA: files begin with a line about themselves."""
    return _questions(row, row.value, str(row.value.get("title", "")), source) if "qas" in row.value else []


def _questions(row: Row, paragraph: Any, title: str, source: str) -> list[Record]:
    if not isinstance(paragraph, Mapping) or not isinstance(paragraph.get("context"), str):
        raise DataError("a paragraph needs a 'context' of text", row.file, row.line)
    made = []
    for asked in _list(row, paragraph.get("qas"), "qas"):
        if not isinstance(asked, Mapping) or not isinstance(asked.get("question"), str):
            raise DataError("an entry of 'qas' needs a 'question' of text", row.file, row.line)
        made.append(
            item(
                str(asked.get("id", asked.get("qid", ""))),
                asked["question"],
                paragraph["context"],
                _answers(row, asked.get("answers", [])),
                title=title or paragraph["context"][:40],
                answerable=not asked.get("is_impossible", False),
                source=source,
            )
        )
    return made


def _knowpo(row: Row, source: str) -> list[Record]:
    """KnowPO's processed files: the first document; of a row without an answer, what the authors' model remembered."""
    value = row.value
    documents = _list(row, value["doc"], "doc")
    if not documents:
        raise DataError("field 'doc' must hold a document", row.file, row.line)
    unanswerable = value.get("type") == "irrelavant"  # the files' own spelling
    # Of an irrelevant row the answer is a sentence around what the authors' model remembered.
    answers = [] if unanswerable else [_text(row, "answer")]
    made = item(
        "",
        _text(row, "question"),
        str(documents[0]),
        answers,
        title=str(value.get("title", "")),
        answerable=not unanswerable,
        source=source,
    )
    remembered = value.get("inner_answer")
    return [made | ({"memory": [remembered]} if isinstance(remembered, str) and remembered else {})]


def _rgb(row: Row, source: str) -> list[Record]:
    """RGB: the first document that tells the answer, and the false answer where the row brings one."""
    read = rgb_question(row, "")
    told = next((text for text in read.relevant if says(text, read.answers)), "".join(read.relevant[:1]))
    fake = row.value.get("fakeanswer", "")
    return [item(
        read.id, read.question, told, read.answers, source=source,
        counterfactual=fake if isinstance(fake, str) else "",
    )]  # fmt: skip


def _news_quiz(row: Row, source: str) -> list[Record]:
    """RealTimeQA: the right choice is the answer; where it is none of them, or the evidence lacks it, nothing tells it."""
    read = realtimeqa_question(row, "")
    told = "".join(read.relevant[:1])
    answers = [each for each in read.answers[:1] if normalize_answer(each) != "none of above"]
    return [item(read.id, read.question, told, answers, answerable=says(told, answers), source=source)]


def _conflictqa(row: Row, source: str) -> list[Record]:
    """ConflictQA: the evidence for the true answer and that for its opposite; nothing where it does not show which is which.

    Memory is the belief that the file's authors found in their model, true or not. Which of the two opposite answers denies
    tells which of them says no.
    """
    texts = {name: _text(row, name) for name in ("memory_answer", "counter_answer")}
    denied = [name for name, text in texts.items() if _DENIAL.search(text)]
    if len(denied) != 1:
        return []
    sides = [_text(row, f"{side}_memory_aligned_evidence") for side in ("parametric", "counter")]
    read = conflictqa_question(row, "")
    true = bool(read.answers) and read.answers[0].casefold() in ("true", "yes")
    believed_true = denied[0] != "memory_answer"
    told, contradicting = sides if believed_true == true else sides[::-1]
    made = item(
        read.id, read.question, told, list(read.answers), source=source,
        counterfactual="False" if true else "True", counterfactual_passage=contradicting,
    )  # fmt: skip
    return [made | {"memory": ["True", "yes"] if believed_true else ["False", "no"]}]


def _confiqa(row: Row, source: str) -> list[Record]:
    """ConFiQA: the passage with the true answer and the counterfactual one."""
    answers = [_text(row, "orig_answer"), *_answers(row, row.value.get("orig_alias") or [])]
    return [item(
        str(row.value.get("id", "")), _text(row, "question"), _text(row, "orig_context"), answers, source=source,
        counterfactual=_text(row, "cf_answer"), counterfactual_passage=_text(row, "cf_context"),
    )]  # fmt: skip


def _mquake(row: Row, source: str) -> list[Record]:
    """MQuAKE: the hops before the edits are the passage, those after them the one that contradicts.

    A case whose new answer is right without the edits too, or whose new hops name the old answer, contradicts nothing: it brings
    no wrong answer along.
    """
    fields = Fields(row)
    answers = [_filled(fields, "answer"), *fields.texts("answer_alias", optional=True)]
    wrong, contradicting = _filled(fields, "new_answer"), _stated(fields, "new_single_hops")
    contradicts = not same_as_any(wrong, answers) and not says(contradicting, answers)
    questions = fields.texts("questions")
    if not questions or not questions[0].strip():
        raise DataError("field 'questions' must begin with a question", row.file, row.line)
    return [item(
        str(row.value.get("case_id", "")), questions[0], _stated(fields, "single_hops"), answers,
        title=_filled(fields.subs("requested_rewrite")[0], "subject"), source=source,
        counterfactual=wrong if contradicts else "",
        counterfactual_passage=contradicting if contradicts else "",
    )]  # fmt: skip


def _stated(fields: Fields, key: str) -> str:
    """Single hops as sentences, one after the other; none ends in two full stops ("Washington, D.C.")."""
    hops = [f"{_filled(hop, 'cloze')} {_filled(hop, 'answer')}" for hop in fields.subs(key)]
    return " ".join(hop if hop.endswith((".", "!", "?")) else f"{hop}." for hop in hops)


def _nq_synth(row: Row, source: str) -> list[Record]:
    """NQ-Synth: each question comes twice; the row of process 1 lacks the document, which states the substituted answer."""
    if row.value.get("assigned_process") == 1:
        return []
    answers = [_text(row, "gold_answers")]
    read = nq_synth_question(row, "")
    if not (read.question and read.relevant and read.answers):
        raise DataError(
            "field 'context_string' must hold a document, a line 'Using only the references ...' and a line 'Question: ...'",
            row.file,
            row.line,
        )
    return [item(read.id, read.question, read.relevant[0], answers, source=source)]


def _flat(row: Row, source: str) -> list[Record]:
    """A question with its answers and its context; a context in pieces is joined."""
    value = row.value
    context = value["context"] if isinstance(value["context"], list) else [value["context"]]
    if not all(isinstance(text, str) for text in context) or not any(text.strip() for text in context):
        raise DataError(
            "field 'context' must be a text or a list of texts, and not empty", row.file, row.line
        )
    answers = _answers(row, value.get("answers", value.get("answer")))
    id = str(value.get("id", value.get("idx", "")))
    return [item(id, _text(row, "question"), " ".join(context), answers, source=source)]


def _answers(row: Row, found: Any) -> list[str]:
    if isinstance(found, str):
        return [found.strip()]
    answers: list[str] = []
    for each in _list(row, found, "answers"):
        text = each.get("text") if isinstance(each, Mapping) else each
        answers += _answers(row, text) if isinstance(text, list) else [str(text)]
    return answers


def _list(row: Row, value: Any, name: str) -> list[Any]:
    if not isinstance(value, list):
        raise DataError(f"field {name!r} must be a list", row.file, row.line)
    return value


def _text(row: Row, name: str) -> str:
    return _filled(Fields(row), name)


def _filled(fields: Fields, key: str) -> str:
    """Text that is not empty, of a row or of an object inside it; without blanks around it."""
    found = fields.text(key).strip()
    if not found:
        name = f"{fields.path}.{key}" if fields.path else key
        raise DataError(f"field {name!r} must be text that is not empty", fields.row.file, fields.row.line)
    return found


def _has(*names: str) -> Callable[[Mapping[str, Any]], bool]:
    return lambda value: all(name in value for name in names)


# Order matters: the first form that fits reads the row, so the more particular ones stand first.
_FORMS: tuple[_Form, ...] = (
    _Form("SQuAD", lambda value: isinstance(value.get("data"), list) or "paragraphs" in value, _squad),
    _Form("MRQA", lambda value: "qas" in value or "header" in value, _mrqa),
    _Form("KnowPO", _has("doc", "question"), _knowpo),
    _Form("RGB", _has("query", "answer", "positive"), _rgb),
    _Form("RealTimeQA", _has("question_sentence", "choices", "answer"), _news_quiz),
    _Form(
        "ConflictQA",
        _has("ground_truth", "memory_answer", "counter_answer"),
        _conflictqa,
        "neither or both of two opposite answers deny, so that none is known to be true",
    ),
    _Form("ConFiQA", _has("orig_context", "cf_context"), _confiqa),
    _Form(
        "MQuAKE",
        lambda value: isinstance(value.get("requested_rewrite"), list) or "single_hops" in value,
        _mquake,
    ),
    _Form("NQ-Synth", _has("context_string"), _nq_synth, "the question of another row without its document"),
    _Form("question-answers-context", lambda value: _asks(value) and "context" in value, _flat),
)
