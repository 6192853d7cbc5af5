"""Spans and joins on a tiny byte-level tokenizer and on the real GPT-2 one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lab.errors import EmptyTargetError, SubjectNotFoundError
from lab.tokens import filled_subject, filled_subject_last, join_target, pad_rows, subject_span
from tests.tiny import tiny_tokenizer


@pytest.fixture(scope="module")
def gpt2_tokenizer(shared_data: Path):
    from transformers import GPT2TokenizerFast

    return GPT2TokenizerFast.from_pretrained(shared_data / "gpt2_tokenizer")


CASES = [
    ("{} is the capital of France", "Paris"),
    ("The capital of {} is", "Côte d'Ivoire"),
    ("The wife of {}'s brother is", "Barack Obama"),
    ("What is the twin city of {}? It is", "東京"),
    ("As {} said to Rome, Rome burns in", "Rome"),
]


@pytest.mark.parametrize(("prompt", "subject"), CASES)
def test_span_covers_the_subject(prompt: str, subject: str) -> None:
    tokenizer = tiny_tokenizer()
    text, ids, span = filled_subject(tokenizer, prompt, subject, "Because. {}")
    assert text == "Because. " + prompt.replace("{}", subject)
    assert subject in tokenizer.decode(ids[span.start : span.stop])
    assert subject not in tokenizer.decode(ids[span.start : span.stop - 1])
    assert filled_subject_last(tokenizer, prompt, subject, "Because. {}") == (ids, span[-1])


@settings(max_examples=60, deadline=None)
@given(
    subject=st.text(min_size=1, max_size=12).filter(
        lambda text: text.strip() == text and "{" not in text and text.isprintable()
    ),
    before=st.sampled_from(["", "The capital of ", "(", "Von "]),
    after=st.sampled_from(["", " is", "'s wife is", ", it is said,"]),
)
def test_span_property(subject: str, before: str, after: str) -> None:
    tokenizer = tiny_tokenizer()
    text = before + subject + after
    span = subject_span(tokenizer, text, subject, start=len(before))
    ids = tokenizer(text)["input_ids"]
    assert subject in tokenizer.decode(ids[span.start : span.stop])


def test_the_last_occurrence_wins_unless_told() -> None:
    tokenizer = tiny_tokenizer()
    text = "Paris and Paris"
    assert subject_span(tokenizer, text, "Paris")[0] > subject_span(tokenizer, text, "Paris", start=0)[-1]


def test_absent_subject_is_named() -> None:
    with pytest.raises(SubjectNotFoundError, match="'Rome' does not occur"):
        subject_span(tiny_tokenizer(), "The capital of France", "Rome")
    with pytest.raises(SubjectNotFoundError):
        subject_span(tiny_tokenizer(), "The capital of France", "France", start=1)


@pytest.mark.parametrize("target", ["Rome", " Rome", "  Rome "])
def test_exactly_one_space_before_a_target(target: str) -> None:
    tokenizer = tiny_tokenizer()
    head, tail = join_target(tokenizer, "The capital of France is", target)
    assert tokenizer.decode(tail) == " Rome"
    assert tokenizer.decode(head) == "The capital of France is"
    assert tokenizer.decode(join_target(tokenizer, "Answer:\n", target)[1]) == "Rome"


def test_empty_target() -> None:
    with pytest.raises(EmptyTargetError):
        join_target(tiny_tokenizer(), "The capital of France is", "  ")


def test_padding_sides_keep_rows_and_positions() -> None:
    rows = [[5, 6, 7], [8]]
    for side in ("right", "left"):
        batch = pad_rows(rows, 0, side)
        for index, row in enumerate(rows):
            real = batch.attention_mask[index].bool()
            assert batch.input_ids[index][real].tolist() == row
            assert batch.position_ids[index][real].tolist() == list(range(len(row)))
            assert int(batch.last[index] - batch.first[index]) + 1 == len(row) == int(batch.lengths[index])
    with pytest.raises(ValueError, match="at least one"):
        pad_rows([[1], []], 0)


def test_real_gpt2_tokens(gpt2_tokenizer) -> None:
    ids, last = filled_subject_last(gpt2_tokenizer, "{}'s wife is named", "Barack Obama")
    assert gpt2_tokenizer.convert_ids_to_tokens(ids)[last] == "ĠObama"
    head, tail = join_target(gpt2_tokenizer, "The Eiffel Tower is in", "Rome")
    assert gpt2_tokenizer.convert_ids_to_tokens(tail) == ["ĠRome"]
    assert torch.tensor(head).numel() == len(gpt2_tokenizer("The Eiffel Tower is in")["input_ids"])
    _, ids, span = filled_subject(gpt2_tokenizer, "The mother tongue of {} is", "Nápravník")
    assert gpt2_tokenizer.decode(ids[span.start : span.stop]) == " Nápravník"
