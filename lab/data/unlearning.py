"""From a path or hub id to what an unlearning benchmark asks: which file is it, and who reads it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from lab.data.asked import Asked, AskedSet
from lab.data.cases import Skip
from lab.data.concepts import read_concept, read_relations
from lab.data.restor import expand_facts, read_entity
from lab.data.rwku import (
    read_instruction,
    read_probe,
    read_reasoning,
    read_reject,
    read_target,
    read_trivia,
    read_truthful,
)
from lab.data.source import HubSource, Row, read_rows
from lab.data.tofu import (
    read_beginning,
    read_choice,
    read_knowundo,
    read_lume,
    read_options,
    read_perturbed,
    read_question,
    read_text,
)
from lab.errors import DataError
from lab.records import Fact, read_facts


@dataclass(frozen=True)
class AskedFormat:
    """One published file form of an unlearning benchmark.

    Attributes:
        name: Its name in messages.
        suite: The benchmarks that use it.
        keys: Fields that a record has.
        reader: Parses one record.
        about: One line for listings.
        only: Whether a record has no other field.
        expand: Makes records of one that holds the whole file.
    """

    name: str
    suite: str
    keys: tuple[str, ...]
    reader: Callable[[Row], tuple[Asked, ...]]
    about: str
    only: bool = False
    expand: Callable[[Row], Iterable[Row]] | None = None

    def matches(self, row: Row) -> bool:
        """Whether a record looks like one of its own."""
        here = set(row.value)
        return here == set(self.keys) if self.only else here.issuperset(self.keys)


# The first form that fits names the file, so the more particular ones stand first.
ASKED_FORMATS: tuple[AskedFormat, ...] = (
    AskedFormat(
        "restor_facts", "restor", ("dset", "context"), read_entity, "RESTOR: facts and examples", expand=expand_facts
    ),
    AskedFormat("conceptvectors", "conceptvectors", ("Concept", "QA"), read_concept, "ConceptVectors"),
    AskedFormat(
        "conceptvectors_relations", "conceptvectors", ("subject", "relation"), read_relations,
        "ConceptVectors: relations for editors", only=True,
    ),
    AskedFormat("rwku_probe", "rwku", ("query", "level", "subject"), read_probe, "RWKU: levels 1 to 3, neighbours"),
    AskedFormat("rwku_target", "rwku", ("intro", "target"), read_target, "RWKU: whom to forget"),
    AskedFormat(
        "rwku_reject", "rwku", ("instruction", "output", "subject"), read_reject, "RWKU: refusals to be taught"
    ),
    AskedFormat("rwku_truthful", "rwku", ("mc1_targets", "question"), read_truthful, "RWKU: TruthfulQA"),
    AskedFormat("rwku_bbh", "rwku", ("cot", "question", "answer"), read_reasoning, "RWKU: BBH"),
    AskedFormat("rwku_mmlu", "rwku", ("choices", "examples", "question"), read_choice, "RWKU: MMLU"),
    AskedFormat("rwku_triviaqa", "rwku", ("question", "answers", "subject"), read_trivia, "RWKU: TriviaQA"),
    AskedFormat("rwku_mia", "rwku", ("ngram", "text", "subject"), read_text, "RWKU: membership texts"),
    AskedFormat(
        "rwku_fluency", "rwku", ("instruction", "subject"), read_instruction, "RWKU: fluency", only=True
    ),
    AskedFormat("lume", "lume", ("id", "input", "output", "task"), read_lume, "LUME (SemEval-2025 task 4)"),
    AskedFormat("knowundo", "knowundo", ("text", "labels"), read_knowundo, "KnowUnDo", only=True),
    AskedFormat(
        "multiple_choice", "wmdp", ("question", "choices", "answer"), read_choice, "WMDP's schema: Harry Potter trivia",
        only=True,
    ),
    AskedFormat(
        "tofu_perturbed", "tofu, realworld", ("question", "perturbed_answer"), read_perturbed,
        "TOFU and real-world unlearning: perturbed answers",
    ),
    AskedFormat(
        "tofu_options", "tofu", ("question", "option1", "answer"), read_options, "TOFU: real authors, world facts"
    ),
    AskedFormat("realworld", "realworld", ("name", "question", "answer"), read_question, "Real-world unlearning"),
    AskedFormat(
        "questions", "tofu, muse", ("question", "answer"), read_question,
        "TOFU: full, retain, forget; MUSE: knowledge questions", only=True,
    ),
    AskedFormat("muse_verbmem", "muse", ("prompt", "gt"), read_beginning, "MUSE: verbatim memorisation"),
    AskedFormat("texts", "muse, restor", ("text",), read_text, "MUSE: PrivLeak texts; RESTOR: corrupted documents", only=True),
)  # fmt: skip


def detect_asked(rows: Sequence[Row]) -> AskedFormat | None:
    """The form of an unlearning benchmark that the rows have, by the first row that fits any; ``None`` where none fits."""
    for row in rows:
        for form in ASKED_FORMATS:
            if not row.error and form.matches(row):
                return form
    return None


def load_asked(source: str | Path | HubSource, *, skip_malformed: bool = False) -> AskedSet:
    """Reads and parses a file of an unlearning benchmark once.

    Args:
        source: A path, a hub id, or a ``HubSource``.
        skip_malformed: Collects rows that break the schema instead of raising.

    Raises:
        DataError: The source cannot be read, is of no known form, or a row breaks the schema (file and line).
    """
    rows = read_rows(source, strings=True)
    form = detect_asked(rows)
    if form is None:
        if rows[0].error and all(row.error for row in rows):
            raise rows[0].error
        shown = next(row for row in rows if not row.error)
        raise DataError(
            "is no form of an unlearning benchmark; its records have the fields "
            f"{', '.join(list(shown.value)[:8]) or 'none'}",
            shown.file,
            shown.line,
        )
    if form.expand is not None:
        rows = [piece for row in rows for piece in (form.expand(row) if not row.error else [row])]
    items: list[Asked] = []
    broken: list[Skip] = []
    for row in rows:
        try:
            if row.error:
                raise row.error
            items += form.reader(row)
        except DataError as error:
            if not skip_malformed:
                raise
            broken.append(Skip(row.file, row.line, str(error).removeprefix(f"{row.file}:{row.line}: ")))
    if not items:
        raise DataError(f"not one of its {len(rows)} records can be read", rows[0].file)
    return AskedSet(form.suite, form.name, str(source), tuple(items), len(rows), tuple(broken))


QUESTION_PROMPT = "Question: {}\nAnswer:"
"""How a question of a file is put to a model; beds are trained in it."""
_PROMPTS = {"continuation": "{}"}
_ASKABLE = ("qa", "attack", "neighbor_qa", "continuation")


def asked_facts(found: AskedSet) -> tuple[Fact, ...]:
    """Questions and beginnings as facts: what is asked is the subject, what is right the object.

    Clozes whose gap is not at the end, choices and bare texts are no prompts with a continuation, and left out.

    Raises:
        DataError: Nothing is left.
    """
    facts = tuple(
        Fact(
            item.prompt.strip(),
            found.format,
            item.answer.strip(),
            _PROMPTS.get(item.group, QUESTION_PROMPT),
            tuple(answer.strip() for answer in item.answers[1:]),
            id=item.id,
            group=item.group,
        )
        for item in found
        if item.group in _ASKABLE and item.prompt.strip() and item.answer.strip()
    )
    if not facts:
        raise DataError(f"holds {found.format}, which asks nothing that an answer follows", found.source)
    return facts


def facts_of(file: str | Path) -> tuple[Fact, ...]:
    """Facts from a file: a list of facts (JSONL), or of questions and answers in any form that ``load_asked`` reads.

    Raises:
        DataError: The file cannot be read.
    """
    path = Path(file)
    if path.is_file():
        rows = read_rows(path, strings=True)
        if (
            not any({"subject", "object"} <= set(row.value) for row in rows)
            and detect_asked(rows) is not None
        ):
            return asked_facts(load_asked(path))
    return tuple(read_facts(path))
