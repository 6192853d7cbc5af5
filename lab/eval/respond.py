"""A model as respondent: all probes of all cases go through as few forward passes as their kinds allow."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from lab.errors import ConfigError
from lab.eval.probe import Observation, Probe, Rating
from lab.scoring import greedy_tokens, log_probs
from lab.tokens import encode_ids, join_target, pad_rows

if TYPE_CHECKING:
    from lab.handle import ModelHandle


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
        ratings = self._rate(probes)
        texts = self._write(probes)
        answers = []
        for index, probe in enumerate(probes):
            if probe.task == "generate":
                text = texts[index]
                ids = tuple(encode_ids(self.handle.tokenizer, text, special=False))
                answers.append(Observation(probe.id, text=text, text_tokens=ids))
            else:
                found = tuple(ratings[probe.prompt, target, probe.distribution] for target in probe.targets)
                answers.append(Observation(probe.id, ratings=found))
        return answers

    @torch.no_grad()
    def _rate(self, probes: Sequence[Probe]) -> dict[tuple[str, str, bool], Rating]:
        keys = dict.fromkeys(
            (p.prompt, t, p.distribution) for p in probes if p.task == "score" for t in p.targets
        )
        asked = list(dict.fromkeys(prompt for prompt, _, _ in keys))
        fed = dict(zip(asked, self.handle.rewrite(asked), strict=True))
        rows = [(key, *join_target(self.handle.tokenizer, fed[key[0]], key[1])) for key in keys]
        rows = [(key, head or [self._start()], tail) for key, head, tail in rows]
        rows.sort(key=lambda row: (len(row[1]) + len(row[2]), row[0]))
        found: dict[tuple[str, str, bool], Rating] = {}
        for begin in range(0, len(rows), self.batch_size):
            chunk = rows[begin : begin + self.batch_size]
            # The last target token predicts nothing that is asked for.
            batch = pad_rows(
                [[*head, *tail[:-1]] for _, head, tail in chunk],
                self.handle.pad_id,
                device=self.handle.device,
                prompts=[len(head) for _, head, _ in chunk],
            )
            low = min(len(head) for _, head, _ in chunk) - 1
            keep = torch.arange(low, batch.input_ids.shape[1], device=self.handle.device)
            logits = self.handle.logits(batch, logits_to_keep=keep)
            for number, (key, head, tail) in enumerate(chunk):
                first = len(head) - 1 - low
                wanted = logits[number, first : first + len(tail)]
                table = log_probs(wanted)
                targets = torch.tensor(tail, device=table.device)
                predicted = greedy_tokens(wanted)
                found[key] = Rating(
                    tuple(table.gather(-1, targets.unsqueeze(-1)).squeeze(-1).tolist()),
                    tuple((predicted == targets).tolist()),
                    tuple(predicted.tolist()),
                    table.cpu().numpy().astype(np.float32) if key[2] else None,
                )
        return found

    def _start(self) -> int:
        start = self.handle.tokenizer.bos_token_id
        return start if isinstance(start, int) else self.handle.pad_id

    def _write(self, probes: Sequence[Probe]) -> dict[int, str]:
        groups: dict[tuple[int, int | None, int], list[int]] = {}
        for index, probe in enumerate(probes):
            if probe.task == "generate":
                used = len(encode_ids(self.handle.tokenizer, probe.prompt)) if probe.whole else 0
                length = max(1, probe.tokens - used)
                groups.setdefault((length, probe.top_k, probe.seed), []).append(index)
        texts: dict[int, str] = {}
        for (length, top_k, seed), members in groups.items():
            # A greedy continuation does not depend on how often it is asked for; a sampled one must be drawn each time.
            prompts = [probes[index].prompt for index in members]
            asked = list(dict.fromkeys(prompts)) if top_k is None else prompts
            out = self.handle.generate(
                asked,
                max_new_tokens=length,
                temperature=0.0 if top_k is None else 1.0,
                top_k=top_k,
                seed=seed,
                batch_size=self.batch_size,
            )
            if top_k is None:
                by_prompt = dict(zip(asked, out, strict=True))
                out = [by_prompt[prompt] for prompt in prompts]
            texts.update(zip(members, out, strict=True))
        return texts
