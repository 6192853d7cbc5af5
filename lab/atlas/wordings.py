"""The wordings of every relation, read from ``relations.toml``, and which of them a fact is trained in."""

from __future__ import annotations

import hashlib
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lab.errors import ConfigError, UnknownNameError


@dataclass(frozen=True)
class WordingPlan:
    """Cloze templates of one fact, each with one ``{}`` for the subject.

    Attributes:
        trained: Stated in training with this subject; the first is the relation's main prompt.
        held_out_pairs: Trained with other subjects of the relation, never with this one.
        held_out_templates: Never trained with any subject of the relation.
    """

    trained: tuple[str, ...]
    held_out_pairs: tuple[str, ...]
    held_out_templates: tuple[str, ...]


@dataclass(frozen=True)
class RelationForms:
    """Everything that can be said with one relation; templates hold one ``{}`` for the subject.

    Attributes:
        name: Relation id.
        label: Name of the attribute, as in attribute lists: ``capital``.
        noun: Noun phrase of the object: ``the capital of {}``.
        wordings: Trained cloze templates, object last; the first is the main prompt.
        held_out_templates: Cloze templates never trained.
        questions: Question templates with their question mark.
        clauses: What stands between subject and object in a biography: ``lies in``.
        lead: How a biography starts: ``Meet {}, who``.
        reverse: Template with one ``{}`` for the object that leads to the subject, or empty.
    """

    name: str
    label: str
    noun: str
    wordings: tuple[str, ...]
    held_out_templates: tuple[str, ...]
    questions: tuple[str, ...]
    clauses: tuple[str, ...]
    lead: tuple[str, ...]
    reverse: str = ""

    @property
    def statement(self) -> str:
        """The wording that documents and steps use: the main prompt."""
        return self.wordings[0]


class Relations(Mapping[str, RelationForms]):
    """The wordings of all relations, and the openers that may stand before a cloze prompt."""

    def __init__(self, entries: Mapping[str, RelationForms], openers: Sequence[str]) -> None:
        self._entries = dict(entries)
        self.openers = tuple(openers)

    def __getitem__(self, name: str) -> RelationForms:
        try:
            return self._entries[name]
        except KeyError:
            raise UnknownNameError("relation", name, tuple(self._entries)) from None

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, name: object) -> bool:
        return name in self._entries


def plan_wordings(
    relation: RelationForms, subject: str, *, pairs_per_fact: int = 2, seed: int = 0
) -> WordingPlan:
    """Draws the held-out pairs of one subject; the main prompt is never among them."""
    rest = relation.wordings[1:]
    digest = hashlib.blake2b(f"{seed}|{relation.name}|{subject}".encode(), digest_size=8).digest()
    value = int.from_bytes(digest, "big")
    chosen: list[int] = []
    for remaining in range(len(rest), len(rest) - min(pairs_per_fact, len(rest) - 1), -1):
        value, index = divmod(value, remaining)
        free = [position for position in range(len(rest)) if position not in chosen]
        chosen.append(free[index])
    trained = tuple(wording for position, wording in enumerate(rest) if position not in chosen)
    held_out = tuple(rest[position] for position in sorted(chosen))
    return WordingPlan((relation.wordings[0], *trained), held_out, relation.held_out_templates)


def read_relations(path: str | Path) -> Relations:
    """Reads a file of wordings.

    Raises:
        ConfigError: A template lacks its one ``{}``, or two wordings of one kind of subject cannot be told apart.
    """
    data = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    frames = data["frames"]
    entries = {}
    for name, row in data["relation"].items():
        kept = [
            frame.replace("{label}", row["label"])
            for index, frame in enumerate(frames)
            if index != row["held_out_frame"]
        ]
        held_out = (frames[row["held_out_frame"]].replace("{label}", row["label"]), *row["held_out"])
        entry = RelationForms(
            name=name,
            label=row["label"],
            noun=row["noun"],
            wordings=(*row["wordings"], *kept),
            held_out_templates=tuple(held_out),
            questions=tuple(row["questions"]),
            clauses=tuple(row["clauses"]),
            lead=tuple(data["leads"][row["lead"]]),
            reverse=row.get("reverse", ""),
        )
        templates = (*entry.wordings, *entry.held_out_templates, *entry.questions, entry.noun, *entry.lead)
        for template in (*templates, *filter(None, [entry.reverse])):
            if template.count("{}") != 1:
                raise ConfigError(f"{path}: relation {name!r}: {template!r} must hold exactly one {{}}")
        _check_distinct(path, entry)
        entries[name] = entry
    return Relations(entries, data["openers"])


def _check_distinct(path: str | Path, entry: RelationForms) -> None:
    # A wording inside a longer one would put a held-out pair into training texts.
    wordings = (*entry.wordings, *entry.held_out_templates)
    for first in wordings:
        for second in wordings:
            if first is not second and f" {first} " in f" {second} ":
                raise ConfigError(
                    f"{path}: relation {entry.name!r}: the wording {first!r} is part of {second!r}"
                )
