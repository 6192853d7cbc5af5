"""RWKU (Jin et al., 2024): probes of three levels about 200 people, their neighbours, and what should stay."""

from __future__ import annotations

from lab.data.asked import Asked
from lab.data.fields import Fields
from lab.data.source import Row

_GROUPS = {"1": "cloze", "2": "qa", "3": "attack"}


def _one(
    row: Row, group: str, prompt: str, answers: tuple[str, ...], subject: str, **meta: str
) -> tuple[Asked, ...]:
    return (
        Asked(
            f"{group}@{row.line}",
            group,
            prompt,
            answers,
            subject=subject,
            file=row.file,
            line=row.line,
            meta=meta,
        ),
    )


def read_probe(row: Row) -> tuple[Asked, ...]:
    """Level 1 (cloze), 2 (question) and 3 (attack, its kind in ``meta``); rows with ``neighbor`` are about somebody near."""
    fields = Fields(row)
    level = fields.text("level")
    if level not in _GROUPS:
        fields.fail("level", "1, 2 or 3", level)
    answer = fields.text("answer")
    if not answer.strip():
        fields.fail("answer", "a text that is not blank", None)
    near = fields.text("neighbor", "")
    group = f"neighbor_{_GROUPS[level]}" if near else _GROUPS[level]
    # Kinds of attack carry a language in brackets, and one is spelled with a hyphen once.
    kind = fields.text("type").replace("-", " ")
    return _one(row, group, fields.text("query"), (answer,), fields.text("subject"), type=kind, neighbor=near)


def read_target(row: Row) -> tuple[Asked, ...]:
    """Whom to forget, with the one-line introduction that asks for it."""
    fields = Fields(row)
    target = fields.text("target")
    return _one(row, "target", fields.text("intro"), (target,), target)


def read_reject(row: Row) -> tuple[Asked, ...]:
    """A question and the refusal to be taught for it."""
    fields = Fields(row)
    return _one(row, "refusal", fields.text("instruction"), (fields.text("output"),), fields.text("subject"))


def read_truthful(row: Row) -> tuple[Asked, ...]:
    """TruthfulQA MC1: the choices, of which the one labelled 1 is right (always the first: shuffle before showing them)."""
    fields = Fields(row)
    targets = fields.sub("mc1_targets")
    options, labels = targets.texts("choices"), targets.value.get("labels")
    if not isinstance(labels, list) or len(labels) != len(options) or labels.count(1) != 1:
        targets.fail("mc1_targets.labels", f"a list of {len(options)} labels, one of them 1", labels)
    right = options[labels.index(1)]
    wrong = tuple(option for option in options if option != right)
    return (
        Asked(
            f"choice@{row.line}",
            "choice",
            fields.text("question"),
            (right,),
            wrong=wrong,
            options=options,
            file=row.file,
            line=row.line,
        ),
    )


def read_trivia(row: Row) -> tuple[Asked, ...]:
    """TriviaQA: a question and every accepted spelling."""
    fields = Fields(row)
    # The row's ``subject`` is whose folder it lay in, not what it is about.
    return _one(row, "qa", fields.text("question"), fields.answers("answers"), "")


def read_reasoning(row: Row) -> tuple[Asked, ...]:
    """BBH: worked examples (``cot``) above a question."""
    fields = Fields(row)
    prompt = f"{fields.text('cot')}\n\nQ: {fields.text('question')}\nA:"
    return _one(row, "qa", prompt, (fields.text("answer"),), "", task=fields.text("task"))


def read_instruction(row: Row) -> tuple[Asked, ...]:
    """An instruction to write something, for fluency; no answer is right or wrong."""
    return _one(row, "instruction", Fields(row).text("instruction"), (), "")
