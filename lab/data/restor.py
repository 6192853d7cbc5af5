"""RESTOR's facts (Rezaei et al., 2024): one object of entities, each with questions by property, and examples by property."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

from lab.data.asked import Asked
from lab.data.fields import Fields
from lab.data.source import Row


def expand_facts(row: Row) -> Iterator[Row]:
    """One row per entity (section ``dset``) and per property with examples (``context``), each with its own line."""
    fields = Fields(row)
    lines: dict[str, int] = {}
    path = Path(row.file)
    if path.is_file():
        for number, text in enumerate(path.read_text(encoding="utf-8-sig").split("\n"), start=1):
            lines.setdefault(text.strip().partition(": ")[0], number)
    for section in ("dset", "context"):
        for name, value in fields.sub(section).value.items():
            line = lines.get(json.dumps(name, ensure_ascii=False), row.line)
            yield Row({"name": name, "value": value}, row.file, line, section)


def read_entity(row: Row) -> tuple[Asked, ...]:
    """All questions about one entity (group ``qa``), or the examples of one property (``example``)."""
    name, value = row.value["name"], row.value["value"]
    fields = Fields(row)
    if row.section == "context":
        shots = fields.subs("value")
        return tuple(
            _asked(
                row,
                "example",
                number,
                shot.text("question"),
                (shot.text("answer"),),
                shot.text("entity"),
                name,
            )
            for number, shot in enumerate(shots)
        )
    if not isinstance(value, Mapping):
        fields.fail(name, "an object of properties", value)
    found = []
    for number, property in enumerate(value):
        question = Fields(row, value[property], f"{name}.{property}")
        answers = question.answers("answers")
        if not answers:
            question.fail(f"{name}.{property}.answers", "a list with an answer", None)
        found.append(_asked(row, "qa", number, question.text("question"), answers, name, property))
    return tuple(found)


def _asked(
    row: Row, group: str, number: int, prompt: str, answers: tuple[str, ...], subject: str, property: str
) -> Asked:
    return Asked(
        f"{group}@{row.line}/{row.value['name']}/{number}",
        group,
        prompt,
        answers,
        subject=subject,
        file=row.file,
        line=row.line,
        meta={"property": property},
    )
