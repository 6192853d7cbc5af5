"""The loop that trains a network over lessons: accumulation, validation, early stop, and checkpoints that go on exactly.

Whatever is random is drawn from the seed and the step, so a run that was interrupted and taken up again ends in the same bits.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from editors.lessons import Lesson, Lessons
from editors.values import Progress
from lab.errors import ConfigError, DataError, NumericalError
from lab.files import replacing


class RunSettings(Protocol):
    """The settings of a run, as any config may hold them."""

    @property
    def steps(self) -> int:
        """Updates at most."""
        ...

    @property
    def lessons_per_step(self) -> int:
        """Lessons whose gradients one update averages."""
        ...

    @property
    def eval_every(self) -> int:
        """Updates between two validations; a checkpoint is written with each."""
        ...

    @property
    def patience(self) -> int:
        """Updates without a better validation loss after which the run ends."""
        ...


class Learner(Protocol):
    """What is trained."""

    def tensors(self) -> Mapping[str, Tensor]:
        """Everything that training changes, live: parameters and running statistics."""
        ...

    def optimizer(self) -> torch.optim.Optimizer:
        """A fresh optimizer over the parameters."""
        ...

    def prepare(self, lessons: Sequence[Lesson]) -> None:
        """Looks at the training lessons before the first validation of a fresh run."""
        ...

    def loss(self, lesson: Lesson, rng: random.Random) -> Tensor:
        """Loss of one lesson, with its graph."""
        ...

    def validate(self, lessons: Sequence[Lesson]) -> Mapping[str, float]:
        """Figures on held-out lessons; ``loss`` is what early stopping looks at. Changes nothing."""
        ...


@dataclass(frozen=True)
class RunResult:
    """How a run ended.

    Attributes:
        best: The tensors at the best validation.
        best_step: When that was.
        steps: Updates made.
        history: Figures of every validation, the one before the first update first.
    """

    best: Mapping[str, Tensor]
    best_step: int
    steps: int
    history: tuple[Mapping[str, float], ...]

    def to_json(self) -> dict[str, Any]:
        """Plain values for a network's card."""
        return {
            "steps": self.steps,
            "best_step": self.best_step,
            "history": [dict(one) for one in self.history],
        }


@dataclass
class _State:
    step: int
    best_step: int
    best: dict[str, Tensor]
    history: list[dict[str, float]]

    @property
    def best_loss(self) -> float:
        return next(one["loss"] for one in self.history if one["step"] == self.best_step)


def run_training(
    learner: Learner,
    lessons: Lessons,
    settings: RunSettings,
    *,
    checkpoint: Path,
    identity: Mapping[str, Any],
    seed: int = 0,
    resume: bool = True,
    phase: str = "training",
    progress: Progress | None = None,
) -> RunResult:
    """Trains; the learner's tensors end as the last step left them, the best ones are in the result.

    Args:
        learner: What to train.
        lessons: For training and validation.
        settings: Of the run.
        checkpoint: File that is written at every validation.
        identity: What a checkpoint must agree in to be taken up; plain values.
        seed: Seeds the order of the lessons and what is drawn from them.
        resume: Take the checkpoint up if there is one.
        phase: Name for the progress.
        progress: Told about every update.

    Raises:
        ConfigError: The checkpoint belongs to another run.
        NumericalError: A loss is not finite.
    """
    optimizer = learner.optimizer()
    live = learner.tensors()
    state = _load(checkpoint, live, optimizer, identity) if resume else None
    if state is None:
        learner.prepare(lessons.train)
        first = {"step": 0.0, **learner.validate(lessons.validation)}
        _check_finite(first["loss"], phase, 0)
        state = _State(0, 0, _copy(live), [first])
    order = _Order(lessons.train, seed)
    while state.step < settings.steps and state.step - state.best_step < settings.patience:
        optimizer.zero_grad(set_to_none=True)
        for part in range(settings.lessons_per_step):
            number = state.step * settings.lessons_per_step + part
            with torch.enable_grad():
                loss = learner.loss(order[number], random.Random(f"{phase}/{seed}/{number}"))
                _check_finite(float(loss.detach()), phase, state.step)
                (loss / settings.lessons_per_step).backward()
        optimizer.step()
        state.step += 1
        if progress is not None:
            progress(phase, state.step, settings.steps)
        if state.step % settings.eval_every == 0 or state.step == settings.steps:
            figures = {"step": float(state.step), **learner.validate(lessons.validation)}
            _check_finite(figures["loss"], phase, state.step)
            if figures["loss"] < state.best_loss:
                state.best_step, state.best = state.step, _copy(live)
            state.history.append(figures)
            _save(checkpoint, live, optimizer, identity, state)
    if progress is not None:
        progress(phase, settings.steps, settings.steps)
    return RunResult(state.best, state.best_step, state.step, tuple(state.history))


class _Order:
    """Lessons by running number: every epoch in another order, the same for the same seed."""

    def __init__(self, lessons: Sequence[Lesson], seed: int) -> None:
        self._lessons, self._seed = lessons, seed
        self._epoch, self._order = -1, list(range(len(lessons)))

    def __getitem__(self, number: int) -> Lesson:
        epoch, place = divmod(number, len(self._lessons))
        if epoch != self._epoch:
            self._epoch, self._order = epoch, list(range(len(self._lessons)))
            random.Random(f"order/{self._seed}/{epoch}").shuffle(self._order)
        return self._lessons[self._order[place]]


def _copy(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def _check_finite(loss: float, phase: str, step: int) -> None:
    if not math.isfinite(loss):
        raise NumericalError(f"{phase}: the loss became {loss} at step {step}; try a smaller lr")


def _save(
    file: Path,
    live: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer,
    identity: Mapping[str, Any],
    state: _State,
) -> None:
    from safetensors.torch import save_file

    tensors = {f"now/{name}": tensor for name, tensor in _copy(live).items()}
    tensors |= {f"best/{name}": tensor for name, tensor in state.best.items()}
    for index, values in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer/{index}/{key}": value.detach().clone() for key, value in values.items()}
    told = {
        "identity": dict(identity),
        "step": state.step,
        "best_step": state.best_step,
        "history": state.history,
    }
    with replacing(file) as temporary:
        save_file(
            {name: tensor.contiguous() for name, tensor in tensors.items()},
            temporary,
            {"run": json.dumps(told)},
        )


def _load(
    file: Path, live: Mapping[str, Tensor], optimizer: torch.optim.Optimizer, identity: Mapping[str, Any]
) -> _State | None:
    """Puts a checkpoint back into the learner and the optimizer; ``None`` where there is none."""
    from safetensors import safe_open

    if not file.is_file():
        return None
    with safe_open(file, "pt") as opened:
        text = (opened.metadata() or {}).get("run")
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    if text is None:
        raise DataError("is no checkpoint of a training run; move it away to train from the start", file)
    told = json.loads(text)
    wanted = json.loads(json.dumps(dict(identity)))
    if differing := sorted(
        key for key in {*wanted, *told["identity"]} if wanted.get(key) != told["identity"].get(key)
    ):
        raise ConfigError(
            f"{file} is a checkpoint of another run (it differs in {', '.join(differing)}); "
            "choose another folder, or start anew with resume=False (--restart)"
        )
    parts: dict[str, dict[str, Tensor]] = {"now": {}, "best": {}, "optimizer": {}}
    for name, tensor in tensors.items():
        part, _, rest = name.partition("/")
        parts[part][rest] = tensor
    with torch.no_grad():
        for name, tensor in live.items():
            tensor.copy_(parts["now"][name])
    moments: dict[int, dict[str, Tensor]] = {}
    for name, tensor in parts["optimizer"].items():
        index, _, key = name.partition("/")
        moments.setdefault(int(index), {})[key] = tensor
    optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})
    best = {name: parts["best"][name].to(tensor.device) for name, tensor in live.items()}
    return _State(int(told["step"]), int(told["best_step"]), best, list(told["history"]))
