"""Packs texts into rows of fixed lengths, without cutting any and with next to no padding."""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from lab.atlas.recipe import Recipe
from lab.errors import ConfigError

OTHER, ANSWER = 1, 2
_RARE = 0.005
# Capitalised words in a row, small words like "of" between them included; failing that, any single word.
_NAME = re.compile(r"[A-Z][\w'’-]+(?: (?:(?:of|the|and|du|da|de) )*[A-Z][\w'’-]+)+|[^\W_][\w'’-]*")


class TextWithAnswers(Protocol):
    """A text and the character ranges that a model should learn to produce."""

    @property
    def text(self) -> str: ...
    @property
    def answer_spans(self) -> tuple[tuple[int, int], ...]: ...


@dataclass(frozen=True)
class Coded:
    """Tokens of a text with the end token.

    Attributes:
        ids: The tokens.
        kinds: What each counts as: ``OTHER``, ``ANSWER``, or ``ANSWER + i`` for an answer of the ``i``-th stressed form of the
            recipe, from 1.
        inside: Whether each lies inside a name or word, that is, before its last token.
    """

    ids: list[int]
    kinds: list[int]
    inside: list[bool]


def encode_documents(
    tokenizer: PreTrainedTokenizerFast, documents: Sequence[TextWithAnswers], stressed: Sequence[str] = ()
) -> list[Coded]:
    """Tokenises texts; a token counts as answer when it overlaps an answer span.

    Args:
        tokenizer: A fast tokenizer.
        documents: Texts; where they have a ``form``, it is looked up in ``stressed``.
        stressed: Names of forms whose answers get a kind of their own.
    """
    numbers = {form: ANSWER + number for number, form in enumerate(stressed, start=1)}
    backend = tokenizer.backend_tokenizer
    coded = []
    encodings = backend.encode_batch([document.text for document in documents], add_special_tokens=False)
    for document, encoding in zip(documents, encodings, strict=True):
        kinds, inner, spans, index = [], [], sorted(document.answer_spans), 0
        names = list(_name_spans(document.text))
        name = 0
        answer = numbers.get(getattr(document, "form", ""), ANSWER)
        for start, stop in encoding.offsets:
            while index < len(spans) and spans[index][1] <= start:
                index += 1
            inside = index < len(spans) and stop > spans[index][0]
            kinds.append(answer if inside else OTHER)
            while name < len(names) and names[name][1] <= start:
                name += 1
            inner.append(name < len(names) and names[name][0] < stop < names[name][1])
        end = int(tokenizer.eos_token_id)  # type: ignore[arg-type]
        coded.append(Coded([*encoding.ids, end], [*kinds, OTHER], [*inner, False]))
    return coded


def _name_spans(text: str) -> Iterator[tuple[int, int]]:
    """Character ranges of names and words, in order."""
    return (found.span() for found in _NAME.finditer(text))


@dataclass(frozen=True)
class Shard:
    """Packed batches.

    Attributes:
        ids: ``[batches, tokens]`` uint16.
        texts: ``[batches, tokens]`` uint8, number of the text within its row from 1, 0 for padding.
        kinds: ``[batches, tokens]`` uint8, 0 for padding.
        inside: ``[batches, tokens]`` bool, as in ``Coded``.
        dropped: Texts that found no room.
    """

    ids: np.ndarray
    texts: np.ndarray
    kinds: np.ndarray
    inside: np.ndarray
    dropped: int

    def __len__(self) -> int:
        return len(self.ids)


def pack(coded: Iterable[Coded], recipe: Recipe, pad: int, rng: random.Random) -> Shard:
    """Packs texts into batches of the recipe's layout.

    Texts too long for the shorter rows are dealt to the longest rows first; then every row is filled with the longest text
    that still fits. Rows are filled in random order, so all batches hold the same mixture.

    Raises:
        ConfigError: More than a few texts are longer than the longest row, or there are too few texts for one batch.
    """
    texts = list(coded)
    rng.shuffle(texts)
    longest = max(length for length, _ in recipe.layout)
    second = max((length for length, _ in recipe.layout if length < longest), default=longest)
    over = [len(text.ids) for text in texts if len(text.ids) > longest]
    if len(over) > _RARE * len(texts):
        raise ConfigError(
            f"{len(over)} of {len(texts)} texts are longer than the longest row of the layout, {longest} tokens; "
            f"the longest has {max(over)}"
        )
    texts = [text for text in texts if len(text.ids) <= longest]
    long = [text for text in texts if len(text.ids) > second]
    total = sum(len(text.ids) for text in texts)
    batches = int(total / recipe.batch_tokens)
    if not batches:
        raise ConfigError(f"{total} tokens do not fill one batch of {recipe.batch_tokens}")
    rows: list[tuple[int, int, int]] = []
    for batch in range(batches):
        start = 0
        for length, count in recipe.layout:
            rows += [(batch, start + length * row, length) for row in range(count)]
            start += length * count
    rng.shuffle(rows)
    contents: list[list[Coded]] = [[] for _ in rows]
    room = [length for _, _, length in rows]

    def put(row: int, text: Coded) -> None:
        contents[row].append(text)
        room[row] -= len(text.ids)

    wide = [index for index, (_, _, length) in enumerate(rows) if length == longest]
    waiting = sorted(long, key=lambda text: -len(text.ids))
    dropped = len(over)
    for index, text in enumerate(waiting):
        place = wide[index] if index < len(wide) else next((r for r in wide if room[r] >= len(text.ids)), -1)
        if place < 0:
            dropped += 1
        else:
            put(place, text)
    shelves: list[list[Coded]] = [[] for _ in range(second + 1)]
    for text in texts:
        if len(text.ids) <= second:
            shelves[len(text.ids)].append(text)
    for row in range(len(rows)):
        size = min(room[row], second)
        while size > 0:
            if shelves[size]:
                put(row, shelves[size].pop())
                size = min(room[row], second)
            else:
                size -= 1
    dropped += sum(len(shelf) for shelf in shelves)
    return _arrays(rows, contents, batches, recipe.batch_tokens, pad, dropped, rng)


def _arrays(
    rows: Sequence[tuple[int, int, int]],
    contents: Sequence[list[Coded]],
    batches: int,
    tokens: int,
    pad: int,
    dropped: int,
    rng: random.Random,
) -> Shard:
    ids = np.full((batches, tokens), pad, np.uint16)
    texts, kinds = np.zeros((batches, tokens), np.uint8), np.zeros((batches, tokens), np.uint8)
    inside = np.zeros((batches, tokens), bool)
    for (batch, start, _), content in zip(rows, contents, strict=True):
        rng.shuffle(content)
        for number, text in enumerate(content, start=1):
            stop = start + len(text.ids)
            ids[batch, start:stop], texts[batch, start:stop], kinds[batch, start:stop] = (
                text.ids,
                number,
                text.kinds,
            )
            inside[batch, start:stop] = text.inside
            start = stop
    return Shard(ids, texts, kinds, inside, dropped)


@dataclass(frozen=True)
class Batch:
    """Inputs of ``lean.loss``; ``answers[m]`` marks the chosen positions inside answers."""

    ids: Tensor
    positions: Tensor
    masks: tuple[Tensor, ...]
    chosen: Tensor
    labels: Tensor
    weights: Tensor
    answers: Tensor
    keep: Tensor | None


def make_batch(shard: Shard, index: int, recipe: Recipe, seed: Sequence[int], device: torch.device) -> Batch:
    """Builds one batch: masks that keep texts apart, positions, and the positions whose loss counts.

    All answer tokens are chosen, and as many others as fit into ``recipe.learned``; the weight of these makes up for the ones
    left out. Positions of GPT-2 start at a random offset for each row, so that all of them are trained; rotary positions are
    relative, and count from the start of the row.

    Args:
        shard: Packed batches.
        index: Which batch.
        recipe: Layout and weights.
        seed: Fixes the draws.
        device: Where the tensors go.
    """
    rng = np.random.default_rng(list(seed))
    ids, texts, kinds = shard.ids[index], shard.texts[index], shard.kinds[index]
    masks, positions, target, start = [], [], np.zeros(len(ids), np.uint8), 0
    for length, count in recipe.layout:
        block = texts[start : start + length * count].reshape(count, length)
        follows = np.zeros((count, length), np.uint8)
        kind = kinds[start : start + length * count].reshape(count, length)
        follows[:, :-1] = np.where(block[:, 1:] == block[:, :-1], kind[:, 1:], 0)
        target[start : start + length * count] = follows.reshape(-1)
        same = torch.from_numpy(block[:, :, None] == block[:, None, :])
        mask = torch.zeros(same.shape).masked_fill_(~(same & torch.ones(length, length).tril().bool()), -1e4)
        masks.append(mask[:, None].to(device))
        offset = np.zeros(count, np.int64)
        if recipe.shape.family == "gpt2":
            offset = rng.integers(0, recipe.shape.context - length + 1, count)
        positions.append((offset[:, None] + np.arange(length)).reshape(-1))
        start += length * count
    answers, others = np.flatnonzero(target >= ANSWER), np.flatnonzero(target == OTHER)
    wanted = recipe.learned
    if len(answers) > wanted:
        answers = np.sort(rng.permutation(answers)[:wanted])
    drawn = np.sort(rng.permutation(others)[: wanted - len(answers)])
    spare = wanted - len(answers) - len(drawn)
    weight = recipe.other_weight * len(others) / max(1, len(drawn))
    chosen = np.concatenate([answers, drawn, np.zeros(spare, np.int64)])
    stress = np.array([0.0, 0.0, 1.0, *(value for _, value in recipe.stressed)])
    weights = np.concatenate([stress[target[answers]], np.full(len(drawn), weight), np.zeros(spare)])
    marked = np.arange(wanted) < len(answers)
    tokens = torch.from_numpy(ids.astype(np.int64))
    labels = tokens[torch.from_numpy(np.minimum(chosen + 1, len(ids) - 1))]
    return Batch(
        ids=tokens.to(device),
        positions=torch.from_numpy(np.concatenate(positions)).to(device),
        masks=tuple(masks),
        chosen=torch.from_numpy(chosen).to(device),
        labels=labels.to(device),
        weights=torch.from_numpy(weights.astype(np.float32)).to(device),
        answers=torch.from_numpy(marked).to(device),
        keep=_keep(recipe, shard.inside[index], (target >= ANSWER) & (kinds < ANSWER), rng, device),
    )


def _keep(
    recipe: Recipe, inside: np.ndarray, asking: np.ndarray, rng: np.random.Generator, device: torch.device
) -> Tensor | None:
    early = min(recipe.early_layers, recipe.shape.layers)
    shares = (recipe.inside_keep, recipe.asking_keep) if early else ()
    if min(*recipe.keep, *shares) >= 1:
        return None
    drawn = rng.random((len(recipe.keep), len(inside))) < np.array(recipe.keep)[:, None]
    for share, where in zip(shares, (inside, asking), strict=False):
        drawn[:early] &= ~where | (rng.random((early, len(inside))) < share)
    return torch.from_numpy(drawn.astype(np.float32)).to(device)
