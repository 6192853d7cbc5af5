"""Token rows and spans: padding, joining a prompt with its target, and finding a subject by character offsets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lab.errors import EmptyTargetError, SubjectNotFoundError, UnsupportedModelError

Side = Literal["right", "left"]


@dataclass(frozen=True)
class Batch:
    """Padded token rows.

    Attributes:
        input_ids: ``[batch, pos]`` int64.
        attention_mask: ``[batch, pos]`` int64, 1 on real tokens.
        position_ids: ``[batch, pos]`` int64, counted from 0 over real tokens.
        prompt_last: ``[batch]`` int64, column of each row's last prompt token where a continuation follows it in the same
            row; ``None`` where rows are prompts as a whole. Only memory patches look at it: they decide there.
    """

    input_ids: Tensor
    attention_mask: Tensor
    position_ids: Tensor
    prompt_last: Tensor | None = None

    def rows(self, chosen: slice) -> Batch:
        """Some rows, with the padding that they have."""
        last = None if self.prompt_last is None else self.prompt_last[chosen]
        return Batch(self.input_ids[chosen], self.attention_mask[chosen], self.position_ids[chosen], last)

    @property
    def lengths(self) -> Tensor:
        """Real tokens per row, ``[batch]``."""
        return self.attention_mask.sum(dim=1)

    @property
    def last(self) -> Tensor:
        """Column of the last real token of each row, ``[batch]``."""
        columns = torch.arange(self.input_ids.shape[1], device=self.input_ids.device)
        return (self.attention_mask * columns).argmax(dim=1)

    @property
    def first(self) -> Tensor:
        """Column of the first real token of each row, ``[batch]``."""
        return self.attention_mask.argmax(dim=1)


def pad_rows(
    rows: Sequence[Sequence[int]],
    pad_id: int,
    side: Side = "right",
    device: torch.device | str = "cpu",
    *,
    prompts: Sequence[int] | None = None,
) -> Batch:
    """Pads token rows to one length.

    Args:
        rows: Token ids, at least one row and one token in each.
        pad_id: Fills the rest; masked, so its value does not matter.
        side: Where the padding goes.
        device: Where the batch lives.
        prompts: How many tokens of each row are its prompt, where a continuation follows.
    """
    if not rows or not all(len(row) for row in rows):
        raise ValueError("pad_rows needs at least one row and at least one token in each")
    width = max(len(row) for row in rows)
    ids = torch.full((len(rows), width), pad_id, dtype=torch.long)
    mask = torch.zeros((len(rows), width), dtype=torch.long)
    for index, row in enumerate(rows):
        where = slice(0, len(row)) if side == "right" else slice(width - len(row), width)
        ids[index, where] = torch.tensor(list(row), dtype=torch.long)
        mask[index, where] = 1
    positions = (mask.cumsum(dim=1) - 1).clamp_min(0)
    last = None
    if prompts is not None:
        starts = [0 if side == "right" else width - len(row) for row in rows]
        last = torch.tensor([start + length - 1 for start, length in zip(starts, prompts, strict=True)])
    return Batch(
        ids.to(device),
        mask.to(device),
        positions.to(device),
        None if last is None else last.to(device),
    )


def encode_ids(tokenizer: PreTrainedTokenizerBase, text: str, *, special: bool = True) -> list[int]:
    """Token ids of ``text``; with ``special`` as the model expects a start, without a closing token."""
    ids = list(tokenizer(text, add_special_tokens=special)["input_ids"])  # type: ignore[arg-type]
    # Some tokenizers close every text; a prompt must stay open.
    if special and ids and ids[-1] == tokenizer.eos_token_id and not text.endswith(str(tokenizer.eos_token)):
        ids = ids[:-1]
    return ids


def join_target(tokenizer: PreTrainedTokenizerBase, prompt: str, target: str) -> tuple[list[int], list[int]]:
    """Token ids of a prompt and of the target that continues it.

    Exactly one space stands between the two, none where the prompt already ends in white space. The ids are split where
    the prompt's own ids end; where a tokenizer merges across the border, the two are tokenised apart, so that the prompt
    is always what the model sees without a target.

    Raises:
        EmptyTargetError: The target has no tokens.
    """
    body = target.strip()
    if not body:
        raise EmptyTargetError(f"the target after {prompt!r} is empty")
    gap = "" if not prompt or prompt[-1].isspace() else " "
    head = encode_ids(tokenizer, prompt)
    full = encode_ids(tokenizer, prompt + gap + body)
    if len(full) > len(head) and full[: len(head)] == head:
        return head, full[len(head) :]
    tail = encode_ids(tokenizer, gap + body, special=False)
    if not tail:
        raise EmptyTargetError(f"the target {target!r} has no tokens")
    return head, tail


def subject_span(
    tokenizer: PreTrainedTokenizerBase, text: str, subject: str, *, start: int | None = None
) -> range:
    """Token positions of a subject in ``text`` as the model sees it (special tokens included).

    A token belongs to the subject when it covers any of its characters, so a token that runs over the border
    (``"Obama's"``) counts. The last position is where locate-then-edit methods work (ROME, section 3.1).

    Args:
        tokenizer: A fast tokenizer, which knows character offsets.
        text: The filled prompt.
        subject: What to look for.
        start: Character where the wanted occurrence begins; the last occurrence without it.

    Raises:
        SubjectNotFoundError: The subject is empty or does not occur (at ``start``).
        UnsupportedModelError: The tokenizer gives no offsets.
    """
    begin = text.rfind(subject) if start is None else start
    if not subject or begin < 0 or text[begin : begin + len(subject)] != subject:
        raise SubjectNotFoundError(f"the subject {subject!r} does not occur in the prompt {text!r}")
    if not tokenizer.is_fast:
        raise UnsupportedModelError(
            f"{type(tokenizer).__name__} gives no character offsets; load its fast version"
        )
    end = begin + len(subject)
    offsets = tokenizer(text, return_offsets_mapping=True)["offset_mapping"]
    inside = [
        index for index, (left, right) in enumerate(offsets) if left < end and right > begin and right > left
    ]  # type: ignore[misc]
    if not inside:
        raise SubjectNotFoundError(f"no token covers the subject {subject!r} in {text!r}")
    return range(inside[0], inside[-1] + 1)


def filled_subject(
    tokenizer: PreTrainedTokenizerBase, prompt: str, subject: str, prefix: str = "{}"
) -> tuple[str, list[int], range]:
    """Fills a prompt template, puts it into a prefix template, and finds the subject.

    Args:
        tokenizer: A fast tokenizer.
        prompt: Template with one ``{}`` for the subject.
        subject: Fills the ``{}``; other occurrences of it in the text do not matter.
        prefix: Template with one ``{}`` for the filled prompt (``"The. {}"``).

    Returns:
        The text, its token ids, and the subject's token positions in them.
    """
    before, after = prompt.split("{}")
    lead, tail = prefix.split("{}")
    text = lead + before + subject + after + tail
    span = subject_span(tokenizer, text, subject, start=len(lead) + len(before))
    return text, encode_ids(tokenizer, text), span


def filled_subject_last(
    tokenizer: PreTrainedTokenizerBase, prompt: str, subject: str, prefix: str = "{}"
) -> tuple[list[int], int]:
    """Token ids of a filled prompt and the position of the subject's last token; see ``filled_subject``."""
    _, ids, span = filled_subject(tokenizer, prompt, subject, prefix)
    return ids, span[-1]
