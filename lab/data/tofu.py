"""TOFU, MUSE, KnowUnDo, LUME and question lists of their kind: a question or a beginning, and what should follow."""

from __future__ import annotations

from typing import Any

from lab.data.asked import Asked
from lab.data.fields import Fields
from lab.data.source import Row


def _asked(row: Row, group: str, prompt: str, answers: tuple[str, ...], **more: Any) -> tuple[Asked, ...]:
    if not any(answer.strip() for answer in answers):
        Fields(row).fail("answer", "a text that is not blank", None)
    return (Asked(f"{group}@{row.line}", group, prompt, answers, file=row.file, line=row.line, **more),)


def read_question(row: Row) -> tuple[Asked, ...]:
    """``question`` and ``answer``; of realworld files also ``name`` and ``golden_answer``.

    TOFU's full, retain and forget files and MUSE's knowledge questions with their examples share this form.
    """
    fields = Fields(row)
    answers = (fields.text("answer"), *fields.texts("golden_answer", optional=True))
    return _asked(
        row, "qa", fields.text("question"), tuple(dict.fromkeys(answers)), subject=fields.text("name", "")
    )


def read_perturbed(row: Row) -> tuple[Asked, ...]:
    """TOFU's perturbed files: wrong answers, and the question and the answer in other words where the file has them."""
    fields = Fields(row)
    wrong = fields.texts("perturbed_answer")
    if not wrong or not all(text.strip() for text in wrong):
        fields.fail(
            "perturbed_answer", "a list of texts that are not blank", fields.value["perturbed_answer"]
        )
    return _asked(
        row,
        "qa",
        fields.text("question"),
        (fields.text("answer"),),
        paraphrase=fields.text("paraphrased_question", ""),
        paraphrased_answer=fields.text("paraphrased_answer", ""),
        wrong=wrong,
        subject=fields.text("name", ""),
    )


def read_options(row: Row) -> tuple[Asked, ...]:
    """TOFU's real authors and world facts: ``option1`` to ``option4``, one of which is the answer."""
    fields = Fields(row)
    names = sorted((key for key in fields.value if key.startswith("option")), key=lambda key: (len(key), key))
    options = tuple(fields.text(name) for name in names)
    answer = fields.text("answer")
    if answer not in options:
        fields.fail("answer", "one of the options", answer)
    wrong = tuple(option for option in options if option != answer)
    return _asked(row, "qa", fields.text("question"), (answer,), wrong=wrong, options=options)


def read_choice(row: Row) -> tuple[Asked, ...]:
    """Multiple choice with the index of the right one: WMDP's schema (Harry Potter trivia) and RWKU's MMLU rows."""
    fields = Fields(row)
    options, place = fields.texts("choices"), fields.value.get("answer")
    if not isinstance(place, int) or isinstance(place, bool) or not 0 <= place < len(options):
        fields.fail("answer", f"the number of one of {len(options)} choices", place)
    wrong = tuple(option for index, option in enumerate(options) if index != place)
    meta = {"task": fields.text("task")} if fields.has("task") else {}
    return _asked(
        row,
        "choice",
        fields.text("question").strip(),
        (options[place],),
        wrong=wrong,
        options=options,
        meta=meta,
    )


def read_beginning(row: Row) -> tuple[Asked, ...]:
    """MUSE's VerbMem rows: a beginning ``prompt`` and its true continuation ``gt``."""
    fields = Fields(row)
    return _asked(row, "continuation", fields.text("prompt"), (fields.text("gt"),))


def read_text(row: Row) -> tuple[Asked, ...]:
    """A bare text: MUSE's PrivLeak lists, RESTOR's corrupted documents, RWKU's membership texts."""
    fields = Fields(row)
    return _asked(row, "text", "", (fields.text("text"),), subject=fields.text("subject", ""))


def read_knowundo(row: Row) -> tuple[Asked, ...]:
    """KnowUnDo: the question is ``text``, the answer ``labels``."""
    fields = Fields(row)
    return _asked(row, "qa", fields.text("text"), (fields.text("labels"),))


def read_lume(row: Row) -> tuple[Asked, ...]:
    """LUME: ids end in ``sc<k>`` (continue a text) or ``qa<k>`` (a question); quotes inside ids belong to them."""
    fields = Fields(row)
    name = fields.text("id")
    kind = name.rstrip("0123456789")[-2:]
    if kind not in ("sc", "qa"):
        fields.fail("id", "a name that ends in sc or qa and a number", name)
    group = "continuation" if kind == "sc" else "qa"
    meta = {
        "task": fields.text("task"),
        "document": name[: len(name.rstrip("0123456789")) - 2].strip('"'),
        "id": name,
    }
    return _asked(row, group, fields.text("input"), (fields.text("output"),), meta=meta)
