"""Decoding over two streams in one batch: the same continuation after a prompt with documents and after one without.

Each question is two rows of one left-padded batch with one key/value cache; a step feeds the chosen token to both.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lab.decoding import end_tokens
from lab.errors import ConfigError, RequestError
from lab.handle import cut_at_stop
from lab.scoring import greedy_tokens, log_probs
from lab.tokens import Batch, encode_ids, pad_rows
from rag.decoding.rules import Rule

if TYPE_CHECKING:
    from lab.handle import ModelHandle


class TwoStreams:
    """Scores of the next token, step by step, of some questions at once.

    The caller holds ``handle.reading()`` from the first step to the last, so that no step sees other weights.

    Args:
        handle: The model.
        with_context: Token ids of each prompt with documents, ``[question]``.
        without: Token ids of each prompt without them; not looked at by a rule that does not use memory.
        rule: Makes one distribution of two.
    """

    def __init__(
        self,
        handle: ModelHandle,
        with_context: Sequence[Sequence[int]],
        without: Sequence[Sequence[int]],
        rule: Rule,
    ) -> None:
        from transformers import DynamicCache

        self.handle = handle
        self.rule = rule
        rows = [*with_context, *without] if rule.uses_memory else list(with_context)
        # Rows that are done are still fed beside the others, past the last place that they have.
        self._last_place = position_limit(handle) - 1
        self._batch = pad_rows(rows, handle.pad_id, "left", handle.device)
        self._count = len(with_context)
        self._cache = DynamicCache()

    def scores(self) -> Tensor:
        """Scores of the next token, ``[question, vocabulary]``; feeds what was not fed yet, so call it once a step."""
        inputs = self.handle.inputs(self._batch)
        logits = self.handle.model(
            **inputs, past_key_values=self._cache, use_cache=True, logits_to_keep=1
        ).logits
        table = log_probs(logits[:, -1])
        c = table[: self._count]
        return self.rule.combine(c, table[self._count :] if self.rule.uses_memory else c)

    def extend(self, tokens: Tensor) -> None:
        """Continues both streams of every question with ``tokens [question]``."""
        batch = self._batch
        fed = torch.cat([tokens, tokens]) if self.rule.uses_memory else tokens
        mask = torch.cat([batch.attention_mask, torch.ones_like(batch.attention_mask[:, :1])], dim=1)
        self._batch = Batch(fed[:, None], mask, (batch.position_ids[:, -1:] + 1).clamp_max(self._last_place))

    def keep(self, questions: Sequence[int]) -> None:
        """Goes on with these questions alone, by their places now; called between ``scores`` and ``extend``."""
        streams = 2 if self.rule.uses_memory else 1
        rows = [stream * self._count + place for stream in range(streams) for place in questions]
        chosen = torch.tensor(rows, device=self._batch.input_ids.device)
        self._cache.batch_select_indices(chosen)
        batch = self._batch
        self._batch = Batch(batch.input_ids[chosen], batch.attention_mask[chosen], batch.position_ids[chosen])
        self._count = len(questions)


@torch.no_grad()
def contrast_generate(
    handle: ModelHandle,
    with_context: Sequence[str],
    without: Sequence[str],
    rule: Rule,
    *,
    max_new_tokens: int = 24,
    stop: Sequence[str] = (),
    batch_size: int = 16,
) -> list[str]:
    """Continues prompts, taking at each step the best token of two streams.

    Both prompts of a question should end alike: a continuation that starts with a blank after one and without after the
    other is made of other tokens, and their difference is then one of spelling.

    Args:
        handle: The model, with its patches.
        with_context: Prompts with documents.
        without: The same questions without them, as many.
        rule: Makes one distribution of two.
        max_new_tokens: Longest continuation; it also ends where the model has no further position for the longer prompt.
        stop: A continuation ends before the first of these strings.
        batch_size: Questions in one forward pass, each of which is two rows.

    Returns:
        The continuations, in the order of the prompts.

    Raises:
        ConfigError: The two lists differ in length, or a number is below 1.
        RequestError: A prompt leaves no position for an answer.
    """
    if len(with_context) != len(without):
        raise ConfigError(
            f"{len(with_context)} prompts with documents, {len(without)} without; give one of each per question"
        )
    if max_new_tokens < 1 or batch_size < 1:
        raise ConfigError(
            f"max_new_tokens and batch_size must be at least 1, they are {max_new_tokens} and {batch_size}"
        )
    texts = [""] * len(with_context)
    with rule.active(handle), handle.reading():
        told, bare = (prompt_ids(handle, prompts) for prompts in (with_context, without))
        limit = position_limit(handle)
        for number, pair in enumerate(zip(told, bare, strict=True)):
            check_room(handle, number, max(map(len, pair)))
        order = sorted(range(len(texts)), key=lambda index: (len(told[index]), index))
        for begin in range(0, len(order), batch_size):
            chosen = order[begin : begin + batch_size]
            room = [limit - max(len(told[i]), len(bare[i])) for i in chosen]
            streams = TwoStreams(handle, [told[i] for i in chosen], [bare[i] for i in chosen], rule)
            longest = [min(max_new_tokens, left) for left in room]
            for index, text in zip(chosen, _decode(streams, longest, stop), strict=True):
                texts[index] = text
    return texts


def prompt_ids(handle: ModelHandle, prompts: Sequence[str]) -> list[list[int]]:
    """Token ids of prompts as they are fed; a prompt without tokens becomes one start (or padding) token."""
    start = handle.tokenizer.bos_token_id
    empty = [start if isinstance(start, int) else handle.pad_id]
    return [encode_ids(handle.tokenizer, prompt) or empty for prompt in handle.rewrite(prompts)]


def check_room(handle: ModelHandle, number: int, length: int) -> None:
    """Raises ``RequestError`` where a prompt of ``length`` tokens leaves no position for an answer."""
    limit = position_limit(handle)
    if length >= limit:
        raise RequestError(
            f"prompt {number} has {length} tokens and the model {handle.name!r} reads {limit} with the "
            "answer; give shorter or fewer documents"
        )


def position_limit(handle: ModelHandle) -> int:
    """Positions that the model has; without end where its config names none."""
    named = getattr(handle.config, "max_position_embeddings", None)
    return named if isinstance(named, int) and named > 0 else sys.maxsize


def _decode(streams: TwoStreams, longest: Sequence[int], stop: Sequence[str]) -> list[str]:
    """Continuations of every question, each of at most ``longest[question]`` tokens."""
    handle = streams.handle
    ends = set(end_tokens(handle))
    said: list[list[int]] = [[] for _ in longest]
    running = set(range(len(longest)))
    fed = list(range(len(longest)))
    while True:
        tokens = greedy_tokens(streams.scores())
        for row, token in zip(fed, tokens.tolist(), strict=True):
            if row not in running:
                continue
            if token in ends:
                running.discard(row)
                continue
            said[row].append(token)
            text = handle.decode(said[row])
            if len(said[row]) == longest[row] or any(mark in text for mark in stop):
                running.discard(row)
        if not running:
            return [cut_at_stop(handle.decode(row), stop) for row in said]
        if len(running) <= len(fed) // 2:
            # One long answer does not make all others be computed on.
            places = [place for place, row in enumerate(fed) if row in running]
            streams.keep(places)
            fed, tokens = [fed[place] for place in places], tokens[places]
        streams.extend(tokens)
