"""Records that cross package borders: facts, requests, questions and passages.

``Fact`` JSONL is the one file form of every command that takes facts (``--requests``, ``--forget``, ``--retain``, ``--facts``).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lab.errors import DataError, EmptyTargetError, RequestError, SubjectNotFoundError
from lab.files import replacing

Trust = Literal["verified", "unverified", "superseded"]


def check_template(prompt: str) -> None:
    """Raises ``RequestError`` unless ``prompt`` holds exactly one ``{}``."""
    if prompt.count("{}") != 1:
        raise RequestError(
            f"the prompt {prompt!r} must hold exactly one {{}} where the subject goes, it holds {prompt.count('{}')}"
        )


@dataclass(frozen=True)
class Fact:
    """One statement about one subject.

    Attributes:
        subject: What the statement is about.
        relation: Name of the relation, for example ``capital``.
        object: The right answer.
        prompt: Cloze template with one ``{}`` for the subject, or empty.
        aliases: Other spellings of ``object`` that count as right.
        id: Stable name, for example ``capital/France``.
        split: ``dev``, ``test`` or empty.
        group: Kind of subject, for example ``country``.
    """

    subject: str
    relation: str
    object: str
    prompt: str = ""
    aliases: tuple[str, ...] = ()
    id: str = ""
    split: str = ""
    group: str = ""

    @property
    def answers(self) -> tuple[str, ...]:
        """The object and its aliases."""
        return (self.object, *self.aliases)

    @property
    def text(self) -> str:
        """The prompt with the subject filled in."""
        check_template(self.prompt)
        return self.prompt.replace("{}", self.subject)

    def to_json(self) -> dict[str, Any]:
        """Returns the JSONL row; empty optional fields are left out."""
        row: dict[str, Any] = {
            "id": self.id,
            "subject": self.subject,
            "relation": self.relation,
            "object": self.object,
        }
        row |= {"aliases": list(self.aliases), "prompt": self.prompt}
        row |= {key: value for key, value in (("split", self.split), ("group", self.group)) if value}
        return row

    @classmethod
    def from_json(
        cls, row: Mapping[str, Any], file: str | Path | None = None, line: int | None = None
    ) -> Fact:
        """Parses one row.

        Raises:
            DataError: A field is missing, empty or of the wrong type; names file and line.
        """
        if not isinstance(row, Mapping):
            raise DataError(f"a fact must be a JSON object, this is {type(row).__name__}", file, line)
        known = {"subject", "relation", "object", "prompt", "aliases", "id", "split", "group"}
        if unknown := sorted(set(row) - known):
            raise DataError(
                f"unknown field {unknown[0]!r}; a fact has {', '.join(sorted(known))}", file, line
            )
        for key in ("subject", "object"):
            if not isinstance(row.get(key), str) or not row[key].strip():
                raise DataError(f"field {key!r} must be a non-empty string", file, line)
        for key in ("relation", "prompt", "id", "split", "group"):
            if not isinstance(row.get(key, ""), str):
                raise DataError(f"field {key!r} must be a string", file, line)
        aliases = row.get("aliases", [])
        if not isinstance(aliases, (list, tuple)) or not all(isinstance(alias, str) for alias in aliases):
            raise DataError("field 'aliases' must be a list of strings", file, line)
        prompt = row.get("prompt", "")
        if prompt and prompt.count("{}") != 1:
            raise DataError(f"field 'prompt' must hold exactly one {{}}: {prompt!r}", file, line)
        return cls(
            subject=row["subject"],
            relation=row.get("relation", ""),
            object=row["object"],
            prompt=prompt,
            aliases=tuple(aliases),
            id=row.get("id", ""),
            split=row.get("split", ""),
            group=row.get("group", ""),
        )


def read_facts(path: str | Path) -> list[Fact]:
    """Reads a ``Fact`` JSONL file; blank lines are skipped.

    Raises:
        DataError: The file is absent, is empty, or a row is malformed (names file and line).
    """
    file = Path(path)
    if not file.is_file():
        raise DataError("no such file", file)
    facts = []
    for number, text in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
        if not text.strip():
            continue
        try:
            row = json.loads(text)
        except json.JSONDecodeError as error:
            raise DataError(f"not JSON: {error.msg} at column {error.colno}", file, number) from None
        facts.append(Fact.from_json(row, file, number))
    if not facts:
        raise DataError("holds no facts", file)
    return facts


def write_facts(path: str | Path, facts: Iterable[Fact]) -> None:
    """Writes facts as JSONL; the old file stays until the new one is complete."""
    write_text_atomically(
        path, "".join(json.dumps(fact.to_json(), ensure_ascii=False) + "\n" for fact in facts)
    )


def write_text_atomically(path: str | Path, text: str) -> None:
    """Writes ``text`` so that a reader sees the old or the new content, never a part; a full disk leaves the old file."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@dataclass(frozen=True)
class EditRequest:
    """One fact to change.

    Attributes:
        id: Stable name; part of the patch's provenance.
        prompt: Template with one ``{}`` for the subject; the target follows it.
        subject: Fills the ``{}``.
        target_new: What the model should say.
        target_old: What it said before, where known.

    Raises:
        RequestError: The template does not hold exactly one ``{}``.
        SubjectNotFoundError: The subject is empty.
        EmptyTargetError: ``target_new`` is blank.
    """

    id: str
    prompt: str
    subject: str
    target_new: str
    target_old: str | None = None

    def __post_init__(self) -> None:
        check_template(self.prompt)
        if not self.subject.strip():
            raise SubjectNotFoundError(f"request {self.id!r}: the subject is empty")
        if not self.target_new.strip():
            raise EmptyTargetError(f"request {self.id!r}: the new target is empty")

    @property
    def text(self) -> str:
        """The prompt with the subject filled in."""
        return self.prompt.replace("{}", self.subject)

    @classmethod
    def from_fact(cls, fact: Fact, target_new: str) -> EditRequest:
        """A request that replaces the object of ``fact``."""
        return cls(fact.id or fact.text, fact.prompt, fact.subject, target_new, fact.object)

    @classmethod
    def from_text(
        cls, id: str, text: str, subject: str, target_new: str, target_old: str | None = None
    ) -> EditRequest:
        """A request from a filled prompt; the last occurrence of ``subject`` becomes the ``{}``.

        Raises:
            SubjectNotFoundError: ``subject`` does not occur in ``text``.
        """
        start = text.rfind(subject) if subject else -1
        if start < 0:
            raise SubjectNotFoundError(
                f"request {id!r}: the subject {subject!r} does not occur in the prompt {text!r}"
            )
        if "{}" in text:
            raise RequestError(f"request {id!r}: the filled prompt {text!r} must not hold {{}}")
        return cls(id, text[:start] + "{}" + text[start + len(subject) :], subject, target_new, target_old)

    def to_json(self) -> dict[str, Any]:
        """Returns the request as plain values, for provenance."""
        row = {"id": self.id, "prompt": self.prompt, "subject": self.subject, "target_new": self.target_new}
        return row if self.target_old is None else row | {"target_old": self.target_old}


@dataclass(frozen=True)
class ForgetRequest:
    """What to remove and what to keep.

    Attributes:
        forget: Texts to forget.
        retain: Texts to keep.
        facts: The facts behind ``forget``, where known.
        concept: Name of a concept to remove, where the method works on one.
    """

    forget: tuple[str, ...]
    retain: tuple[str, ...] = ()
    facts: tuple[Fact, ...] = ()
    concept: str | None = None


@dataclass(frozen=True)
class Question:
    """A question with every answer that counts as right."""

    id: str
    text: str
    answers: tuple[str, ...]
    subject: str = ""
    relation: str = ""


@dataclass(frozen=True)
class Passage:
    """A retrieved document or a piece of one."""

    id: str
    text: str
    source: str = ""
    trust: Trust | None = None
