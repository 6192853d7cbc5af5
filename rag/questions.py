"""Question files of others, each as it is published: RGB, ConflictQA, RealTimeQA, PopQA and NQ, CoConflictQA, NQ-Synth.

Every row becomes a question with its answers and, where the file brings documents along, those that bear on the answer and those
that do not.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import unescape
from pathlib import Path
from typing import Any

from lab.data import Row, read_rows
from lab.data.text import distinct
from lab.errors import DataError
from rag.preference.match import says

__all__ = [
    "FileQuestion",
    "conflictqa_question",
    "documents_of",
    "nq_synth_question",
    "read_documents",
    "read_questions",
    "realtimeqa_question",
    "rgb_question",
    "says",
]

_SEARCHED = frozenset({"question_id", "search_result"})
_TAG = re.compile(r"<[^>]*>")
_YES = {"True": ("True", "yes"), "False": ("False", "no")}


@dataclass(frozen=True)
class FileQuestion:
    """A question of a file.

    Attributes:
        id: Its name in the file.
        question: As asked.
        answers: What is right, the main answer first.
        relevant: Documents that the file gives as evidence on the answer; none in files of questions alone.
        others: Further documents of the row: noise, and documents that state a wrong answer.
    """

    id: str
    question: str
    answers: tuple[str, ...]
    relevant: tuple[str, ...] = ()
    others: tuple[str, ...] = ()


def read_questions(file: str | Path) -> tuple[str, list[FileQuestion]]:
    """Reads a file of questions; rows without an answer or a question are left out.

    Returns:
        The name of its format, and the questions.

    Raises:
        DataError: The file is of no known format, or a row breaks its schema; names file and line.
    """
    return _read_as_questions(read_rows(file), file)


def _read_as_questions(rows: Sequence[Row], file: str | Path) -> tuple[str, list[FileQuestion]]:
    for row in rows:
        if row.error is not None:
            raise row.error
    first = rows[0]
    name = next((name for name, (keys, _) in _FORMATS.items() if keys <= set(first.value)), None)
    if name is None:
        known = "; ".join(f"{name}: {', '.join(sorted(keys))}" for name, (keys, _) in _FORMATS.items())
        raise DataError(
            f"a row with {', '.join(first.value)} is of no known format ({known})", first.file, first.line
        )
    keys, make = _FORMATS[name]
    made = []
    for number, row in enumerate(rows):
        if missing := keys - set(row.value):
            raise DataError(f"a {name} row needs the field {min(missing)!r}", row.file, row.line)
        found = make(row, str(number))
        if found.question and found.answers:
            made.append(found)
    if not made:
        raise DataError("no row has a question and an answer", file)
    return name, made


def documents_of(questions: Iterable[FileQuestion]) -> list[str]:
    """All documents that some questions bring along, each once."""
    return list(dict.fromkeys(text for one in questions for text in (*one.relevant, *one.others)))


def read_documents(path: str | Path) -> list[str]:
    """Documents to look answers up in: of a folder, of a file of questions, or of the search results that RealTimeQA publishes.

    Raises:
        DataError: The file is of no known format, a row breaks its schema, or there is no document; names file and line.
    """
    if Path(path).is_dir():
        from rag.index.load import read_folder

        found = [document.text for document in read_folder(path).documents]
    else:
        rows = read_rows(path)
        if rows[0].error is None and set(rows[0].value) >= _SEARCHED:
            found = [text for row in rows for text in _searched(row)]
        else:
            found = documents_of(_read_as_questions(rows, path)[1])
    if not found:
        raise DataError("it holds no document", path)
    return list(dict.fromkeys(found))


def _searched(row: Row) -> list[str]:
    if row.error is not None:
        raise row.error
    results = row.value.get("search_result")
    if not isinstance(results, list) or any(not isinstance(one, dict) for one in results):
        raise DataError("field 'search_result' must be a list of documents", row.file, row.line)
    return [
        " ".join(one["text"].split())
        for one in results
        if isinstance(one.get("text"), str) and one["text"].strip()
    ]


def _text(row: Row, key: str) -> str:
    value = row.value.get(key)
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"field {key!r} must be a text, it is {value!r}", row.file, row.line)
    return " ".join(value.split())


def _texts(value: Any) -> list[str]:
    """All texts of a value, nested lists flattened; what holds no text is left out."""
    if isinstance(value, list):
        return [text for item in value for text in _texts(item)]
    return [" ".join(value.split())] if isinstance(value, str) and value.strip() else []


def rgb_question(row: Row, number: str) -> FileQuestion:
    """A row of RGB."""
    value = row.value
    if not isinstance(value["positive"], list):
        raise DataError(
            f"field 'positive' must be a list of texts, it is {value['positive']!r}", row.file, row.line
        )
    others = [*_texts(value.get("positive_wrong")), *_texts(value.get("negative"))]
    return FileQuestion(
        str(value.get("id", number)),
        _text(row, "query"),
        distinct(_texts(value["answer"])),
        distinct(_texts(value["positive"])),
        distinct(others),
    )


def conflictqa_question(row: Row, number: str) -> FileQuestion:
    """A row of ConflictQA; a yes-or-no answer is right as ``True`` and as ``yes``."""
    truth = _texts(row.value["ground_truth"])
    answers = [answer for each in truth for answer in _YES.get(each, (each,))]
    evidence = [*_texts(row.value["parametric_memory_aligned_evidence"])]
    evidence += _texts(row.value["counter_memory_aligned_evidence"])
    return FileQuestion(number, _text(row, "question"), distinct(answers), distinct(evidence))


def realtimeqa_question(row: Row, number: str) -> FileQuestion:
    """A row of RealTimeQA."""
    choices, chosen = _texts(row.value["choices"]), _texts(row.value["answer"])
    try:
        answers = [choices[int(place)] for place in chosen]
    except (ValueError, IndexError):
        raise DataError(
            f"'answer' {chosen} names none of {len(choices)} choices", row.file, row.line
        ) from None
    evidence = unescape(_TAG.sub("", str(row.value.get("evidence") or "")))
    return FileQuestion(
        str(row.value.get("question_id", number)),
        _text(row, "question_sentence"),
        distinct(answers),
        distinct(_texts(evidence)),
    )


def _open(row: Row, number: str) -> FileQuestion:
    answers = row.value["answers"]
    if isinstance(answers, str):
        # PopQA writes a list as a text.
        try:
            answers = json.loads(answers)
        except ValueError:
            answers = [answers]
    # Natural Questions, as CoConflictQA has them, bring a passage along, with the tags of the page.
    passages = [_TAG.sub(" ", text) for text in _texts(row.value.get("context"))]
    return FileQuestion(
        str(row.value.get("ids", number)),
        _text(row, "question"),
        distinct(_texts(answers)),
        distinct(_texts(passages)),
    )


def nq_synth_question(row: Row, number: str) -> FileQuestion:
    """A row of NQ-Synth; without its document it has no answers."""
    context, found, rest = str(row.value["context_string"]).rpartition("\nQuestion:")
    if not found:
        raise DataError("'context_string' holds no line 'Question:'", row.file, row.line)
    document, listed, _ = context.partition("\nUsing only the references")
    question = rest.partition("\nAnswer:")[0]
    # Every question comes twice, once without its document; that one is left out.
    answers = distinct(_texts(row.value["gold_answers"])) if listed else ()
    index = str(row.value.get("input_index", number))
    return FileQuestion(index, " ".join(question.split()), answers, distinct(_texts(document)))


_FORMATS: Mapping[str, tuple[frozenset[str], Callable[[Row, str], FileQuestion]]] = {
    "rgb": (frozenset({"query", "answer", "positive"}), rgb_question),
    "conflictqa": (
        frozenset(
            {
                "question",
                "ground_truth",
                "parametric_memory_aligned_evidence",
                "counter_memory_aligned_evidence",
            }
        ),
        conflictqa_question,
    ),
    "realtimeqa": (frozenset({"question_sentence", "choices", "answer"}), realtimeqa_question),
    "nq_synth": (frozenset({"context_string", "gold_answers"}), nq_synth_question),
    "questions": (frozenset({"question", "answers"}), _open),
}
