"""Completing prompts token by token, many in one padded batch, with the text ready to be shown as it grows."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from lab.decoding import end_tokens
from lab.errors import ConfigError
from lab.handle import cut_at_stop
from lab.scoring import greedy_tokens
from rag.decoding.contrast import TwoStreams, check_room, position_limit, prompt_ids
from rag.decoding.rules import Greedy

if TYPE_CHECKING:
    from lab.handle import ModelHandle


@dataclass(frozen=True)
class Sampling:
    """How a continuation is made.

    Attributes:
        max_new_tokens: Its longest length.
        stop: It ends before the first of these strings.
        temperature: 0 takes the likeliest token.
        top_k: Sample among so many tokens; 0 for all.
        seed: Seeds every row alike, so that a text does not depend on its neighbours.

    Raises:
        ConfigError: A value that makes no sense.
    """

    max_new_tokens: int = 128
    stop: tuple[str, ...] = ()
    temperature: float = 0.0
    top_k: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1 or self.top_k < 0:
            raise ConfigError(
                f"max_new_tokens must be at least 1 and top_k at least 0, they are {self.max_new_tokens} and {self.top_k}"
            )
        if not math.isfinite(self.temperature) or self.temperature < 0:
            raise ConfigError(f"temperature must be a number of at least 0, it is {self.temperature}")
        if not all(self.stop):
            raise ConfigError("a stop string is empty; it would end every text before its first letter")


@dataclass(frozen=True)
class Completion:
    """A finished continuation.

    Attributes:
        text: What it says, without what stopped it.
        prompt_tokens: Tokens that were read.
        tokens: Tokens that were made, the one that ended it included.
        finish: ``stop`` where the model or a stop string ended it, ``length`` where there was no room for more.
    """

    text: str
    prompt_tokens: int
    tokens: int
    finish: Literal["stop", "length"]


@dataclass(frozen=True)
class Piece:
    """What one row gained in a step.

    Attributes:
        row: Index of the prompt.
        text: Text that will not change any more.
        done: The whole, with its last piece.
    """

    row: int
    text: str
    done: Completion | None = None


class _Line:
    """A text that grows: how much of it may be shown."""

    def __init__(self, handle: ModelHandle, prompt_tokens: int, room: int, stop: Sequence[str]) -> None:
        self.handle, self.prompt_tokens, self.room, self.stop = handle, prompt_tokens, room, stop
        self.said: list[int] = []
        self.shown = ""

    def add(self, token: int, ends: bool) -> tuple[str, Completion | None]:
        if not ends:
            self.said.append(token)
        whole = self.handle.decode(self.said)
        text = cut_at_stop(whole, self.stop)
        ended = ends or text != whole
        if ended or len(self.said) == self.room:
            piece, self.shown = text[len(self.shown) :], text
            tokens = len(self.said) + ends
            return piece, Completion(text, self.prompt_tokens, tokens, "stop" if ended else "length")
        safe = self._safe(text)
        piece = safe[len(self.shown) :] if safe.startswith(self.shown) else ""
        self.shown += piece
        return piece, None

    def _safe(self, text: str) -> str:
        # The bytes of one sign may come in several tokens, and the letters of a stop string too.
        text = text.rstrip("\ufffd")
        longest = max((len(mark) for mark in self.stop), default=1) - 1
        for length in range(min(longest, len(text)), 0, -1):
            if any(mark.startswith(text[-length:]) for mark in self.stop):
                return text[:-length]
        return text


@torch.no_grad()
def complete(
    handle: ModelHandle, prompts: Sequence[str], sampling: Sampling, *, batch_size: int = 16
) -> list[Completion]:
    """Completes prompts, ``batch_size`` in one forward pass.

    Raises:
        RequestError: A prompt leaves no position for an answer.
    """
    found: list[Completion | None] = [None] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda index: (len(prompts[index]), index))
    with handle.reading():
        for begin in range(0, len(order), batch_size):
            chosen = order[begin : begin + batch_size]
            for piece in pieces(handle, [prompts[index] for index in chosen], sampling):
                if piece.done is not None:
                    found[chosen[piece.row]] = piece.done
    return [completion for completion in found if completion is not None]


def pieces(handle: ModelHandle, prompts: Sequence[str], sampling: Sampling) -> Iterator[Piece]:
    """Completes prompts in one batch and gives every piece of text as soon as it is sure.

    The caller holds ``handle.reading()`` from the first piece to the last, in one thread, and has gradients off.

    Raises:
        RequestError: A prompt leaves no position for an answer.
    """
    if not prompts:
        return
    rows = prompt_ids(handle, prompts)
    for number, row in enumerate(rows):
        check_room(handle, number, len(row))
    limit = position_limit(handle)
    lines = [
        _Line(handle, len(row), min(sampling.max_new_tokens, limit - len(row)), sampling.stop) for row in rows
    ]
    streams = TwoStreams(handle, rows, rows, Greedy())
    ends = set(end_tokens(handle))
    luck = [torch.Generator().manual_seed(sampling.seed) for _ in rows]
    running = set(range(len(rows)))
    while True:
        tokens = _chosen(streams.scores(), sampling, luck)
        for row, token in enumerate(tokens.tolist()):
            if row in running:
                text, done = lines[row].add(token, token in ends)
                if done is not None:
                    running.discard(row)
                if text or done is not None:
                    yield Piece(row, text, done)
        if not running:
            return
        streams.extend(tokens)


def _chosen(scores: Tensor, sampling: Sampling, luck: Sequence[torch.Generator]) -> Tensor:
    """The next token of each row, ``[row]``, of log-probabilities ``[row, vocabulary]``."""
    if sampling.temperature == 0:
        return greedy_tokens(scores)
    sharpened = scores.double().cpu() / sampling.temperature
    if sampling.top_k:
        kept = sharpened.topk(min(sampling.top_k, sharpened.shape[-1]), dim=-1)
        sharpened = torch.full_like(sharpened, -math.inf).scatter(-1, kept.indices, kept.values)
    chances = sharpened.softmax(dim=-1)
    drawn = [torch.multinomial(row, 1, generator=dice) for row, dice in zip(chances, luck, strict=True)]
    return torch.cat(drawn).to(scores.device)
