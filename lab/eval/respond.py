"""A model as respondent: all probes of all cases go through as few forward passes as their kinds allow."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch

from lab.decoding import Start, continue_rows
from lab.errors import ConfigError
from lab.eval.probe import Observation, Probe, Rating
from lab.rowwise import NOBODY, RowPatches
from lab.scoring import greedy_tokens, log_probs
from lab.shared_prefix import Line, line_logits
from lab.tokens import encode_ids, join_target

if TYPE_CHECKING:
    from lab.handle import ModelHandle

# Whose question it is (the patch), the prompt, the target, and whether the whole distribution is wanted.
_Key = tuple[int, str, str, bool]
_Asked = Sequence[tuple[int, Probe]]


@dataclass(frozen=True)
class _Row:
    """One row of a forward pass.

    Attributes:
        owner: The patch it carries.
        ids: Its tokens.
        prompt: How many of them are the prompt of its longest question.
        reads: What is read from it: the question, the column that predicts the target's first token, and the target.
    """

    owner: int
    ids: tuple[int, ...]
    prompt: int
    reads: list[tuple[_Key, int, tuple[int, ...]]] = field(default_factory=list)


class ModelRespondent:
    """Asks the model of a handle as it stands, with whatever is applied to it.

    Args:
        handle: The model.
        batch_size: Rows in one forward pass.
    """

    def __init__(self, handle: ModelHandle, *, batch_size: int = 64) -> None:
        if batch_size < 1:
            raise ConfigError(f"batch_size must be at least 1, it is {batch_size}")
        self.handle = handle
        self.batch_size = batch_size

    def observe(self, probes: Sequence[Probe]) -> list[Observation]:
        """Answers all probes, in order; equal questions are asked once."""
        return self._answers([(NOBODY, probe) for probe in probes], None)

    def observe_each(self, patches: RowPatches, asked: Sequence[Sequence[Probe]]) -> list[list[Observation]]:
        """Answers of many patched models at once.

        Args:
            patches: The patches.
            asked: ``asked[i]`` is put to the model under patch ``i`` alone.

        Returns:
            Answers in the order of ``asked``.
        """
        if len(asked) != len(patches):
            raise ConfigError(f"{len(asked)} lists of probes for {len(patches)} patches")
        flat = [(owner, probe) for owner, probes in enumerate(asked) for probe in probes]
        with self.handle.writing():
            seen = iter(self._answers(flat, patches))
        return [[next(seen) for _ in probes] for probes in asked]

    def _answers(self, asked: _Asked, patches: RowPatches | None) -> list[Observation]:
        ratings = self._rate(asked, patches)
        texts = self._write(asked, patches)
        answers = []
        for index, (owner, probe) in enumerate(asked):
            if probe.task == "generate":
                text = self.handle.decode(texts[index])
                ids = tuple(encode_ids(self.handle.tokenizer, text, special=False))
                answers.append(Observation(probe.id, text=text, text_tokens=ids))
            else:
                keys = [(owner, probe.prompt, target, probe.distribution) for target in probe.targets]
                answers.append(Observation(probe.id, ratings=tuple(ratings[key] for key in keys)))
        return answers

    # -- ratings ------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _rate(self, asked: _Asked, patches: RowPatches | None) -> dict[_Key, Rating]:
        found: dict[_Key, Rating] = {}
        rows = self._rows(asked)
        lines = [
            Line(row.ids, min(first for _, first, _ in row.reads), row.owner, row.prompt) for row in rows
        ]
        for part in line_logits(self.handle, lines, patches=patches, batch_size=self.batch_size):
            chunk = [rows[index] for index in part.lines]
            places = [
                (number, first - offset + step, token)
                for number, (row, offset) in enumerate(zip(chunk, part.offsets, strict=True))
                for _, first, target in row.reads
                for step, token in enumerate(target)
            ]
            numbers, columns, tokens = torch.tensor(places, device=part.logits.device).unbind(1)
            wanted = part.logits[numbers, columns]
            table, predicted = log_probs(wanted), greedy_tokens(wanted)
            scores = table.gather(-1, tokens.unsqueeze(-1)).squeeze(-1).tolist()
            correct, said = (predicted == tokens).tolist(), predicted.tolist()
            at = 0
            for key, size in ((key, len(target)) for row in chunk for key, _, target in row.reads):
                span = slice(at, at + size)
                whole = table[span].cpu().numpy().astype(np.float32) if key[3] else None
                found[key] = Rating(tuple(scores[span]), tuple(correct[span]), tuple(said[span]), whole)
                at += size
        return found

    def _rows(self, asked: _Asked) -> list[_Row]:
        """Rows that hold all questions; one that begins another row is read from that row.

        Under a memory that acts inside the pass, only rows whose prompts end at one place are shared: it decides there.
        """
        keys = dict.fromkeys(
            (owner, probe.prompt, target, probe.distribution)
            for owner, probe in asked
            if probe.task == "score"
            for target in probe.targets
        )
        prompts = list(dict.fromkeys(key[1] for key in keys))
        fed = dict(zip(prompts, self.handle.rewrite(prompts), strict=True))
        decides = self.handle.stack.memory_inside
        joined: dict[tuple[str, str], tuple[list[int], list[int]]] = {}
        questions = []
        for key in keys:
            pair = key[1], key[2]
            if pair not in joined:
                joined[pair] = join_target(self.handle.tokenizer, fed[key[1]], key[2])
            head, tail = joined[pair]
            head = head or [self._start()]
            # The last target token predicts nothing that is asked for.
            questions.append((key[0], (*head, *tail[:-1]), key, len(head) - 1, tuple(tail)))
        questions.sort(key=lambda question: question[:2])
        rows: list[_Row] = []
        for owner, ids, key, first, tail in reversed(questions):
            host = rows[-1] if rows else None
            apart = decides and host is not None and host.prompt != first + 1
            if host is None or apart or host.owner != owner or host.ids[: len(ids)] != ids:
                host = _Row(owner, ids, first + 1)
                rows.append(host)
            host.reads.append((key, first, tail))
        return rows

    def _start(self) -> int:
        start = self.handle.tokenizer.bos_token_id
        return start if isinstance(start, int) else self.handle.pad_id

    # -- texts --------------------------------------------------------------------------------------------------------

    def _write(self, asked: _Asked, patches: RowPatches | None) -> dict[int, list[int]]:
        prompts = list(dict.fromkeys(probe.prompt for _, probe in asked if probe.task == "generate"))
        fed = dict(zip(prompts, self.handle.rewrite(prompts), strict=True))
        groups: dict[int | None, dict[Start, list[int]]] = {}
        for index, (owner, probe) in enumerate(asked):
            if probe.task == "generate":
                ids = tuple(encode_ids(self.handle.tokenizer, fed[probe.prompt])) or (self._start(),)
                # A limit on the whole text counts the prompt as it was asked, whatever is put before it.
                used = len(encode_ids(self.handle.tokenizer, probe.prompt)) or 1
                tokens = max(1, probe.tokens - used) if probe.whole else max(1, probe.tokens)
                # A sampled text is its probe's own, so that a prompt which a case repeats is continued in several ways.
                seed = 0 if probe.top_k is None else text_seed(probe)
                start = Start(ids, tokens, seed, owner)
                groups.setdefault(probe.top_k, {}).setdefault(start, []).append(index)
        texts: dict[int, list[int]] = {}
        for top_k, members in groups.items():
            written = continue_rows(
                self.handle, list(members), top_k=top_k, patches=patches, batch_size=self.batch_size
            )
            for text, indexes in zip(written, members.values(), strict=True):
                texts |= dict.fromkeys(indexes, text)
        return texts


def text_seed(probe: Probe) -> int:
    """Seed of a sampled text: of the probe's seed and its place in the case, whatever else is asked."""
    digest = hashlib.blake2b(f"{probe.seed}/{probe.id}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big")
