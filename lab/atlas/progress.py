"""What a training run tells and keeps: lines of progress, the log, checkpoints, probes, and the clock that ends it."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lab.atlas import lean
from lab.atlas.checkpoint import save_checkpoint

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from lab.atlas.recipe import Recipe
    from lab.atlas.train import Settings, Shared, Source

CHECKPOINT_SECONDS = 300.0


class Log:
    """Progress, checkpoints, probes and the clock; only the first process has one."""

    def __init__(
        self, recipe: Recipe, source: Source, tokenizer: Any, settings: Settings, shared: Shared
    ) -> None:
        self.recipe, self.settings, self.shared = recipe, settings, shared
        self.tokenizer = tokenizer
        self.probes = source.probes() if settings.probe_seconds else {}
        now = time.monotonic()
        self._last = self._saved = self._probed = self._told = now
        self._since = (now, float(shared.control[4]))
        self._losses: list[Tensor] = []
        self.halted = False

    def clock(self, last: bool) -> None:
        """Counts time and decides whether this step is the last; runs before the first meeting of a step."""
        control, now = self.shared.control, time.monotonic()
        # A pause of the whole machine is not training time.
        control[3] += min(now - self._last, 60.0)
        self._last = now
        if self.recipe.steps:
            control[0] = float(control[2]) / self.recipe.steps
            over = int(control[2]) + 1 >= self.recipe.steps
        else:
            control[0] = float(control[3]) / (60 * self.recipe.minutes)
            over = float(control[0]) >= 1.0
        control[1] = float(over or last or self.halted)

    def after_step(self, factor: float, stop: bool) -> None:
        """Counts the step; tells, probes and saves when it is time."""
        control, now = self.shared.control, time.monotonic()
        control[2] += 1
        control[4] += self.recipe.batch_tokens * self.recipe.workers
        self._losses.append(self.shared.losses.mean(0).clone())
        if now - self._told > 20 or stop:
            self._tell(factor, now)
        if self.probes and (now - self._probed > self.settings.probe_seconds or stop):
            self._write({"step": int(control[2]), "probes": self.recall()})
            self._probed = time.monotonic()
        if now - self._saved > CHECKPOINT_SECONDS or stop:
            self._save()
            self._saved = now

    def _tell(self, factor: float, now: float) -> None:
        control = self.shared.control
        began, tokens = self._since
        speed = (float(control[4]) - tokens) / max(1e-9, now - began)
        loss, answers = torch.stack(self._losses).mean(0).tolist()
        self._since, self._told, self._losses = (now, float(control[4])), now, []
        if self.recipe.steps:
            left = (self.recipe.steps - float(control[2])) * self.recipe.batch_tokens * self.recipe.workers
            left /= max(1e-9, speed)
        else:
            left = max(0.0, 60 * self.recipe.minutes - float(control[3]))
        self.settings.report(
            f"{self.recipe.name} step {int(control[2])} loss {loss:.3f} answers {answers:.3f} "
            f"{speed:.0f} tokens/s {float(control[4]) / 1e6:.1f} M tokens, {left / 60:.0f} min left"
        )
        row = {"step": int(control[2]), "tokens": int(control[4]), "seconds": round(float(control[3]), 1)}
        self._write(row | {"loss": loss, "answers": answers, "tokens_per_second": speed, "factor": factor})

    def _write(self, row: Mapping[str, Any]) -> None:
        if "probes" in row:
            figures = " ".join(f"{name} {value:.2f}" for name, value in row["probes"].items())
            self.settings.report(f"{self.recipe.name} step {row['step']} probes: {figures}")
        with (self.settings.work / "log.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(dict(row)) + "\n")

    def _save(self) -> None:
        control = self.shared.control
        progress = {"recipe": self.recipe.to_json(), "places": self.shared.places.tolist()}
        progress |= {
            "step": int(control[2]),
            "seconds": float(control[3]),
            "tokens": int(control[4]),
            "finished": int(control[2]) >= self.recipe.steps
            if self.recipe.steps
            else float(control[0]) >= 1.0,
        }
        save_checkpoint(self.settings.work, self.shared.params, self.shared.state, progress)

    def recall(self) -> dict[str, float]:
        """Share of each probe set whose greedy continuation is the answer, judged by one pass over prompt and answer."""
        return {
            name: recall(self.shared.params, self.recipe, self.tokenizer, pairs, self.settings)
            for name, pairs in self.probes.items()
        }


@torch.no_grad()
def recall(
    params: Mapping[str, Tensor],
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerFast,
    pairs: list[tuple[str, str]],
    settings: Settings,
) -> float:
    """Share of (prompt, answer) pairs in which every token of the answer is the most probable one."""
    shape, right = recipe.shape, 0
    leaves = lean.working_copy(params, shape, settings.dtype)
    device = torch.device(settings.device)
    rows = []
    for prompt, answer in pairs:
        head = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        rows.append((head, tokenizer(answer, add_special_tokens=False)["input_ids"]))
    rows.sort(key=lambda row: len(row[0]) + len(row[1]))
    for start in range(0, len(rows), 32):
        part = rows[start : start + 32]
        length = max(len(head) + len(tail) for head, tail in part)
        ids = torch.full((len(part), length), int(tokenizer.pad_token_id))  # type: ignore[arg-type]
        for row, (head, tail) in enumerate(part):
            ids[row, : len(head) + len(tail)] = torch.tensor([*head, *tail])
        mask = torch.full((1, 1, length, length), -1e4).triu(1).expand(len(part), -1, -1, -1)
        positions = torch.arange(length).repeat(len(part))
        hidden = lean.hidden_states(
            leaves,
            shape,
            ((length, len(part)),),
            ids.view(-1).to(device),
            positions.to(device),
            (mask.to(device),),
        )
        matrix = leaves[lean.embedding_name(shape)].to(hidden.dtype)
        for row, (head, tail) in enumerate(part):
            first = row * length + len(head) - 1
            best = (hidden[first : first + len(tail)] @ matrix.t()).argmax(-1).cpu()
            right += int(best.tolist() == tail)
    return right / max(1, len(rows))
