"""A plain fine-tune on a few texts: what measures of learning need before they can measure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from lab.arch import Role
from lab.errors import ConfigError
from lab.patch import WeightPatch
from lab.scoring import nll

if TYPE_CHECKING:
    from lab.handle import ModelHandle


@dataclass(frozen=True)
class Lesson:
    """How texts are learned.

    Attributes:
        steps: Steps of AdamW.
        rate: Its learning rate.
        batch_size: Texts per step.
        weights: Parameters that may move; all down projections without it.
    """

    steps: int = 20
    rate: float = 1e-3
    batch_size: int = 8
    weights: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch_size < 1 or self.rate <= 0:
            raise ConfigError(
                "a lesson needs at least one step, one text per step and a positive learning rate"
            )


def learn(
    handle: ModelHandle,
    texts: Sequence[str],
    lesson: Lesson | None = None,
    *,
    always: Sequence[str] = (),
    seed: int = 0,
) -> WeightPatch:
    """Fine-tunes on texts and returns the change; the model itself is bit-identical afterwards.

    Args:
        handle: The model, with whatever is applied to it.
        texts: Drawn from at each step.
        lesson: How; the defaults without it.
        always: Texts that are part of every step beside those drawn (one exposure per step).
        seed: Draws the batches.

    Raises:
        ConfigError: Nothing to learn from.
    """
    from lab.training import fit

    if not texts and not always:
        raise ConfigError("learning needs texts")
    plan = lesson or Lesson()
    names = plan.weights or tuple(handle.weight(Role.MLP_OUT, layer).name for layer in range(handle.n_layers))

    class Loop:
        def __init__(self, model: Any) -> None:
            self.model = model

        def train(self) -> None:
            moving = [weight for weight in self.model.parameters() if weight.requires_grad]
            optimizer = torch.optim.AdamW(moving, lr=plan.rate, weight_decay=0.0)
            chooser = torch.Generator().manual_seed(seed)
            for _ in range(plan.steps):
                count = min(plan.batch_size, len(texts))
                drawn = torch.randperm(len(texts), generator=chooser)[:count].tolist()
                picked: list[str] = [*always, *(str(texts[index]) for index in drawn)]
                batch = handle.encode(picked)
                logits = self.model(**handle.inputs(batch), use_cache=False).logits
                loss = nll(logits[:, :-1], batch.input_ids[:, 1:], batch.attention_mask[:, 1:])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()

    settings = {"steps": plan.steps, "rate": plan.rate, "batch_size": plan.batch_size, "texts": len(texts)}
    return fit(
        handle, lambda model, _: Loop(model), weights=names, method="learn", config=settings, seed=seed
    )
