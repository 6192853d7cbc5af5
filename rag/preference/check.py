"""Refuses training rows that a trainer would drop, cut or learn nothing from; every message has the row's number."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lab.data import read_rows
from lab.data.text import normalize_answer
from lab.errors import DataError
from lab.tokens import encode_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PAIR_FIELDS = ("prompt", "chosen", "rejected")
SFT_FIELDS = ("prompt", "completion")


def check_rows(
    rows: Sequence[Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    fields: Sequence[str],
    *,
    max_length: int,
    file: str | Path | None = None,
    lines: Sequence[int] | None = None,
) -> int:
    """Checks rows of ``prompt`` and continuations before anything is trained.

    Trainers cut long rows and leave out those whose prompt fills the length, both without a word; a prompt whose last token
    merges with the continuation is cut as well.

    Args:
        rows: The rows.
        tokenizer: Counts.
        fields: ``PAIR_FIELDS`` or ``SFT_FIELDS``.
        max_length: Longest row in tokens, with the token that ends a text.
        file: For messages.
        lines: Line of each row in the file; the row's place, from 1, without it.

    Returns:
        Tokens of the longest row, with the end.

    Raises:
        DataError: There are no rows; a field is missing or empty; chosen equals rejected; a row is too long; the prompt does
            not end on a token boundary.
    """
    if not rows:
        raise DataError("holds no rows to train on", file)
    longest = 0
    for place, row in enumerate(rows, start=1):
        line = lines[place - 1] if lines is not None else place
        for field in fields:
            if not isinstance(row.get(field), str) or not row[field].strip():
                raise DataError(
                    f"row {place}: field {field!r} must be text that is not empty; a row needs {', '.join(fields)}",
                    file,
                    line,
                )
        if "chosen" in fields and normalize_answer(row["chosen"]) == normalize_answer(row["rejected"]):
            raise DataError(
                f"row {place}: chosen and rejected are the same answer ({row['chosen'].strip()!r}); nothing can be preferred",
                file,
                line,
            )
        prompt = encode_ids(tokenizer, row["prompt"])
        if len(prompt) >= max_length:
            raise DataError(
                f"row {place}: the prompt alone has {len(prompt)} tokens of {max_length}; shorten its documents or raise the length",
                file,
                line,
            )
        for field in fields[1:]:
            whole = encode_ids(tokenizer, row["prompt"] + row[field])
            if whole[: len(prompt)] != prompt:
                raise DataError(
                    f"row {place}: the prompt's last token merges with {field!r}; move the blank from the prompt's end to the "
                    "continuation's beginning",
                    file,
                    line,
                )
            if len(whole) + 1 > max_length:
                raise DataError(
                    f"row {place}: prompt and {field!r} have {len(whole)} tokens and would be cut at {max_length}; shorten "
                    "them or raise the length",
                    file,
                    line,
                )
            longest = max(longest, len(whole) + 1)
    return longest


def read_training_rows(
    path: str | Path, tokenizer: PreTrainedTokenizerBase, *, max_length: int
) -> tuple[str, list[dict[str, Any]]]:
    """Reads a file of finished pairs (``prompt, chosen, rejected``), of SFT rows, or KnowPO's ``instruction, chosen, rejected``.

    Returns:
        ``"pairs"`` or ``"sft"``, and the rows.

    Raises:
        DataError: See ``check_rows``.
    """
    rows, lines = [], []
    for row in read_rows(path):
        if row.error is not None:
            raise row.error
        value = dict(row.value)
        if "instruction" in value and "prompt" not in value:
            value["prompt"] = value.pop("instruction")
        rows.append(value)
        lines.append(row.line)
    kind = "sft" if "completion" in rows[0] else "pairs"
    fields = SFT_FIELDS if kind == "sft" else PAIR_FIELDS
    check_rows(rows, tokenizer, fields, max_length=max_length, file=path, lines=lines)
    return kind, [{field: row[field] for field in fields} for row in rows]
