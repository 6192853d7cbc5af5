"""The two parts of SERAC in training: the scope classifier, and the adapter of the counterfactual model."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from editors.lessons import Lesson, Lessons
from editors.serac_memory import Scope, above
from editors.tuning import check_positive, target_lines
from editors.values import Progress
from lab.embeddings import Embedder
from lab.errors import ConfigError
from lab.handle import ModelHandle

_TEXTS = 256


@dataclass(frozen=True)
class SeracConfig:
    """Settings of training; both parts run under the same lengths.

    Attributes:
        embedder: Sentence model (``lab.embeddings``).
        threshold: Similarity from which a prompt is in the scope of an edit.
        scope_lr: Adam's learning rate of the classifier.
        negatives: Prompts out of scope per lesson and step: its own that must stay as they are, and other lessons'.
        layers, modules, rank, alpha: Of the adapter, as in ``editors.lora``.
        lr: Adam's learning rate of the adapter.
        steps: Updates at most.
        lessons_per_step: Lessons whose gradients one update averages.
        eval_every: Updates between validations.
        patience: Updates without a better validation loss after which a part's training ends.
    """

    embedder: str = "minilm"
    threshold: float = 0.5
    scope_lr: float = 1e-3
    negatives: int = 4
    layers: tuple[int, ...] = ()
    modules: str = "query_value"
    rank: int = 8
    alpha: float = 16.0
    lr: float = 1e-3
    steps: int = 1000
    lessons_per_step: int = 8
    eval_every: int = 50
    patience: int = 200

    def __post_init__(self) -> None:
        check_positive(
            self, "scope_lr", "negatives", "rank", "alpha", "lr", "steps", "lessons_per_step", "eval_every", "patience"
        )  # fmt: skip
        if not 0 < self.threshold < 1:
            raise ConfigError(f"threshold must lie between 0 and 1, it is {self.threshold}")


class ScopeLearner:
    """The classifier in training.

    Args:
        vectors: Embedding of every text that the lessons hold.
        lessons: Where prompts of other edits are drawn from.
        config: Settings.
    """

    def __init__(self, vectors: Mapping[str, Tensor], lessons: Lessons, config: SeracConfig) -> None:
        self.vectors, self.config = vectors, config
        self.others = [(lesson.subject, lesson.request.text) for lesson in lessons.train]
        self.scope = Scope.start(len(next(iter(vectors.values()))))
        for part in (self.scope.map, self.scope.log_scale):
            part.requires_grad_(True)

    def tensors(self) -> Mapping[str, Tensor]:
        """See ``Learner.tensors``."""
        return {"map": self.scope.map, "log_scale": self.scope.log_scale}

    def optimizer(self) -> torch.optim.Optimizer:
        """Adam."""
        return torch.optim.Adam(list(self.tensors().values()), lr=self.config.scope_lr)

    def prepare(self, lessons: Sequence[Lesson]) -> None:
        """Nothing to look at."""

    def loss(self, lesson: Lesson, rng: random.Random) -> Tensor:
        """See ``Learner.loss``."""
        return self._loss(self._log_similarities(lesson, rng))

    @torch.no_grad()
    def validate(self, lessons: Sequence[Lesson]) -> Mapping[str, float]:
        """Loss, and the shares of prompts that are rightly taken in and left out."""
        losses, inside, outside = [], [], []
        for number, lesson in enumerate(lessons):
            found = self._log_similarities(lesson, random.Random(number))
            losses.append(float(self._loss(found)))
            border = torch.tensor(self.config.threshold).log()
            inside += (found[0] >= border).tolist()
            outside += (found[1] < border).tolist()
        return {
            "loss": sum(losses) / len(losses),
            "inside": sum(inside) / max(1, len(inside)),
            "outside": sum(outside) / max(1, len(outside)),
        }

    def _log_similarities(self, lesson: Lesson, rng: random.Random) -> tuple[Tensor, Tensor]:
        """Of prompts in scope ``[prompt]`` and of prompts out of it ``[prompt]``."""
        count = self.config.negatives
        near = [prompt for prompt, _ in lesson.locality]
        far = [
            text
            for subject, text in rng.sample(self.others, min(count, len(self.others)))
            if subject != lesson.subject
        ]
        wordings = rng.sample(lesson.wordings, min(count, len(lesson.wordings)))
        return (
            self._to_key(lesson, [lesson.request.text, *wordings]),
            self._to_key(lesson, [*rng.sample(near, min(count, len(near))), *far]),
        )

    def _to_key(self, lesson: Lesson, prompts: Sequence[str]) -> Tensor:
        if not prompts:
            return torch.zeros(0)
        queries = torch.stack([self.vectors[prompt] for prompt in prompts])
        return self.scope.log_similarity(queries, self.vectors[lesson.request.text][None])[:, 0]

    def _loss(self, found: tuple[Tensor, Tensor]) -> Tensor:
        inside, outside = found
        loss = -inside.mean()
        if len(outside):
            # log(1 - exp(x)) for x <= 0, kept off the pole at x = 0.
            loss = loss - torch.log(-torch.expm1(outside.clamp_max(-1e-6))).mean()
        return loss


class CounterfactualLearner:
    """The adapter in training; ``fit`` has put it into the handle's model.

    Args:
        handle: The model.
        config: Settings.
    """

    def __init__(self, handle: ModelHandle, config: SeracConfig) -> None:
        self.handle, self.config = handle, config
        self.parameters = {
            name: parameter for name, parameter in handle.model.named_parameters() if parameter.requires_grad
        }

    def tensors(self) -> Mapping[str, Tensor]:
        """See ``Learner.tensors``."""
        return self.parameters

    def optimizer(self) -> torch.optim.Optimizer:
        """Adam."""
        return torch.optim.Adam(list(self.parameters.values()), lr=self.config.lr)

    def prepare(self, lessons: Sequence[Lesson]) -> None:
        """Nothing to look at."""

    def loss(self, lesson: Lesson, rng: random.Random) -> Tensor:
        """See ``Learner.loss``."""
        return self._losses([lesson], rng, grad=True).mean()

    def validate(self, lessons: Sequence[Lesson]) -> Mapping[str, float]:
        """Mean negative log-likelihood of the new targets under the edit, and the share that is likelier than not."""
        losses = [
            self._losses([lesson], random.Random(number), grad=False) for number, lesson in enumerate(lessons)
        ]
        table = torch.cat(losses)
        return {
            "loss": float(table.mean()),
            "followed": float((table < torch.tensor(2.0).log()).float().mean()),
        }

    def _losses(self, lessons: Sequence[Lesson], rng: random.Random, *, grad: bool) -> Tensor:
        pairs = []
        for lesson in lessons:
            prompt, target = lesson.pair(rng)
            pairs.append((above(lesson.statement, prompt), target))
        lines = target_lines(self.handle, pairs)
        logits = self.handle.logits(lines.batch, grad=grad, logits_to_keep=lines.keep)
        return lines.row_losses(lines.of(logits))


def embed_lessons(lessons: Lessons, encoder: Embedder, progress: Progress | None = None) -> dict[str, Tensor]:
    """The embedding of every prompt that the lessons hold, ``[width]`` each."""
    texts = list(
        dict.fromkeys(
            text
            for lesson in (*lessons.train, *lessons.validation)
            for text in (lesson.request.text, *lesson.wordings, *(prompt for prompt, _ in lesson.locality))
        )
    )
    found: dict[str, Tensor] = {}
    for start in range(0, len(texts), _TEXTS):
        chunk = texts[start : start + _TEXTS]
        found |= dict(zip(chunk, torch.from_numpy(encoder.encode(chunk)), strict=True))
        if progress is not None:
            progress("embeddings", len(found), len(texts))
    return found
