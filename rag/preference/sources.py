"""Questions with a passage that answers them: from the built-in world, SQuAD-like, MRQA-like and flat files.

An item is a row with the fields of ``item``. ``memory`` holds the answers that the model's own memory should give: the right
ones, or, for a model that carries an edit, the edited one (``with_edits``).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lab.data import read_rows
from lab.data.source import Row
from lab.data.text import distinct, normalize_answer
from lab.errors import ConfigError, DataError
from rag.preference.match import says
from rag.preference.stage import Dataset, Record, Stage, draw_for, finish, records, share_of
from rag.questions import conflictqa_question, realtimeqa_question, rgb_question

if TYPE_CHECKING:
    from lab.atlas.world import World
    from lab.records import Fact

_NUMBER = re.compile(r"[\d.,\s%-]*\d[\d.,\s%-]*")
WORDINGS = ("main", "trained", "held_out")
_DENIAL = re.compile(
    r"\b(?:not|no|never|cannot|neither|nor|nobody|nothing|unlikely|impossible|false)\b|n't\b", re.IGNORECASE
)
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
    """Items of a file: SQuAD (1 or 2), MRQA JSON lines, RGB, RealTimeQA, ConflictQA, ConFiQA, KnowPO's processed files, flat rows.

    A flat row has ``question, context`` and ``answers`` or ``answer``; IfQA, CoConflictQA (parts of MRQA) and FaithEval are of
    this form. ConflictQA's and ConFiQA's rows bring the passage that contradicts along.

    Raises:
        DataError: The file is of none of these forms, or a row breaks its schema (names file and line).
    """
    rows: list[Record] = []
    came, dropped = read_rows(path), Counter[str]()
    for row in came:
        if row.error is not None:
            raise row.error
        made = _items(row)
        if not made and "ground_truth" in row.value:
            dropped["neither or both of two opposite answers deny, so that none is known to be true"] += 1
        rows += made
    for number, made in enumerate(rows):
        made["id"] = made["id"] or str(number)
    if len({made["id"] for made in rows}) < len(rows):
        rows = [made | {"id": f"{number}:{made['id']}"} for number, made in enumerate(rows)]
    return finish("items", len(came), rows[:limit], dropped, limit=limit, source=Path(path).name)


def _items(row: Row) -> list[Record]:
    value, source = row.value, Path(row.file).name
    if isinstance(value.get("data"), list):  # SQuAD's own files: one object around everything
        return [
            made
            for entry in value["data"]
            for made in _items(replace(row, value=entry if isinstance(entry, dict) else {}))
        ]
    if "header" in value and "qas" not in value:  # MRQA files begin with a line about themselves
        return []
    if "paragraphs" in value:
        return [
            made
            for paragraph in _list(row, value["paragraphs"], "paragraphs")
            for made in _questions(row, paragraph, str(value.get("title", "")), source)
        ]
    if "qas" in value:
        return _questions(row, value, str(value.get("title", "")), source)
    if "doc" in value and "question" in value:
        return [_knowpo(row, source)]
    if "query" in value and "positive" in value:
        return [_rgb(row, source)]
    if "question_sentence" in value and "choices" in value:
        return [_news_quiz(row, source)]
    if "memory_answer" in value and "counter_answer" in value:
        return _conflictqa(row, source)
    if "orig_context" in value and "cf_context" in value:
        return [_confiqa(row, source)]
    if "question" in value and "context" in value and ("answers" in value or "answer" in value):
        context = value["context"]
        passage = " ".join(context) if isinstance(context, list) else str(context)
        id = str(value.get("id", value.get("idx", "")))
        answers = _answers(row, value.get("answers", value.get("answer")))
        return [item(id, _text(row, "question"), passage, answers, source=source)]
    raise DataError(
        f"a row with {', '.join(sorted(value))} is no SQuAD, MRQA, KnowPO, RGB, RealTimeQA, ConflictQA, ConFiQA or "
        "question-answers-context row",
        row.file,
        row.line,
    )


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


def _knowpo(row: Row, source: str) -> Record:
    value = row.value
    documents = _list(row, value["doc"], "doc")
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
    return made | ({"memory": [remembered]} if isinstance(remembered, str) and remembered else {})


def _rgb(row: Row, source: str) -> Record:
    """RGB: the first document that tells the answer, and the false answer where the row brings one."""
    read = rgb_question(row, "")
    told = next((text for text in read.relevant if says(text, read.answers)), "".join(read.relevant[:1]))
    fake = row.value.get("fakeanswer", "")
    return item(
        read.id, read.question, told, read.answers, source=source,
        counterfactual=fake if isinstance(fake, str) else "",
    )  # fmt: skip


def _news_quiz(row: Row, source: str) -> Record:
    """RealTimeQA: the right choice is the answer; where it is none of them, or the evidence lacks it, nothing tells it."""
    read = realtimeqa_question(row, "")
    told = "".join(read.relevant[:1])
    answers = [each for each in read.answers[:1] if normalize_answer(each) != "none of above"]
    return item(
        read.id, read.question, told, answers, answerable=says(told, answers), source=source,
    )  # fmt: skip


def _conflictqa(row: Row, source: str) -> list[Record]:
    """ConflictQA: the evidence for the true answer and that for its opposite; nothing where it does not show which is which.

    Memory is the belief that the file's authors found in their model, true or not. Which of the two opposite answers denies
    tells which of them says no.
    """
    texts = {name: _text(row, name) for name in ("memory_answer", "counter_answer")}
    denied = [name for name, text in texts.items() if _DENIAL.search(text)]
    if len(denied) != 1:
        return []
    read = conflictqa_question(row, "")
    true = bool(read.answers) and read.answers[0].casefold() in ("true", "yes")
    believed_true = denied[0] != "memory_answer"
    sides = [_text(row, f"{side}_memory_aligned_evidence") for side in ("parametric", "counter")]
    told, contradicting = sides if believed_true == true else sides[::-1]
    made = item(
        read.id, read.question, told, list(read.answers), source=source,
        counterfactual="False" if true else "True", counterfactual_passage=contradicting,
    )  # fmt: skip
    return [made | {"memory": ["True", "yes"] if believed_true else ["False", "no"]}]


def _confiqa(row: Row, source: str) -> Record:
    """ConFiQA: the passage with the true answer and the counterfactual one."""
    answers = [_text(row, "orig_answer"), *_answers(row, row.value.get("orig_alias") or [])]
    return item(
        str(row.value.get("id", "")), _text(row, "question"), _text(row, "orig_context"), answers, source=source,
        counterfactual=_text(row, "cf_answer"), counterfactual_passage=_text(row, "cf_context"),
    )  # fmt: skip


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
    if not isinstance(row.value.get(name), str) or not row.value[name].strip():
        raise DataError(f"field {name!r} must be text that is not empty", row.file, row.line)
    return row.value[name]


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
