"""SERAC: edits are kept as texts, and a classifier routes prompts to a counterfactual model (Mitchell et al. 2022, arXiv 2206.06520).

``train_serac`` makes two things for one model, each on its own, as the paper does: the scope classifier, a map over frozen
sentence embeddings with binary cross entropy, and the counterfactual model. The latter is here the model itself with a LoRA
adapter trained to answer from an edit that stands above the prompt, so that it shares tokenizer and knowledge with the base.
An edit then costs one sentence embedding; the weights never change.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from editors.base import Editor, EditorOptions, Method
from editors.lessons import Lesson, Lessons, divide
from editors.lora import adapter, adapter_dropout
from editors.rows import check_requests
from editors.serac_memory import Entry, Scope, SeracMemory, above, adapter_of
from editors.trained import TrainedNetwork, check_bare, read_network, save_network, work_folder
from editors.training_run import RunResult, run_training
from editors.tuning import check_positive, configured, plain_settings, settle_bare, target_lines
from editors.values import Progress
from lab.embeddings import Embedder
from lab.errors import ConfigError, DataError, PatchFormatError
from lab.handle import ModelHandle
from lab.memory import MemoryPatch
from lab.patch import LowRank, Provenance, WeightPatch, library_versions
from lab.records import EditRequest
from lab.training import fit

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


@dataclass(frozen=True)
class SeracEditConfig:
    """Settings of an edit.

    Attributes:
        network: Folder that ``train_serac`` wrote.
        encoder: The sentence model at work, where several editors share one; made from the network's card without it.
    """

    network: str = ""
    encoder: Embedder | None = None


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


@dataclass
class _AdapterRun:
    """The trainer that ``fit`` drives; ``result`` says how it went."""

    handle: ModelHandle
    config: SeracConfig
    run: Any
    result: RunResult | None = field(default=None)

    def on(self, model: Any, reference: Any) -> _AdapterRun:
        return self

    def train(self) -> None:
        adapter_dropout(self.handle.model, False)
        learner = CounterfactualLearner(self.handle, self.config)
        self.result = self.run(learner)
        with torch.no_grad():
            for name, parameter in learner.parameters.items():
                parameter.copy_(self.result.best[name])


def train_serac(
    handle: ModelHandle,
    lessons: Sequence[Lesson],
    out: str | Path,
    *,
    work: str | Path | None = None,
    preset: str | None = None,
    settings: Mapping[str, Any] | None = None,
    seed: int = 0,
    resume: bool = True,
    overwrite: bool = False,
    progress: Progress | None = None,
    encoder: Embedder | None = None,
) -> TrainedNetwork:
    """Trains classifier and adapter for one model. See ``editors.trained.Train``.

    Args:
        encoder: The sentence model at work; made from the setting ``embedder`` without it.
    """
    check_bare(handle)
    config, source = configured(handle, "serac", "serac", SeracConfig, preset, settings or {})
    encoder = _encoder(config.embedder, encoder)
    divided = divide(lessons, seed=seed)
    if not any(lesson.wordings for lesson in divided.train):
        raise DataError(
            "no lesson holds a second wording of its edit; the classifier cannot learn what is in scope"
        )
    plain = plain_settings(config)
    identity = {"editor": "serac", "base": handle.fingerprint, "seed": seed, "lessons": divided.digest}
    identity |= {
        name: value for name, value in plain.items() if name not in ("steps", "patience", "threshold")
    }

    def run(learner: Any, phase: str) -> RunResult:
        return run_training(
            learner,
            divided,
            config,
            checkpoint=work_folder(out, work) / f"{phase}.safetensors",
            identity=identity,
            seed=seed,
            resume=resume,
            phase=phase,
            progress=progress,
        )

    scope = run(ScopeLearner(embed_lessons(divided, encoder, progress), divided, config), "scope")
    trainer = _AdapterRun(handle, config, lambda learner: run(learner, "counterfactual"))
    lora = adapter(handle, config.modules, config.layers, config.rank, config.alpha, 0.0)
    patch = fit(handle, trainer.on, lora=lora, seed=seed)
    assert trainer.result is not None  # fit has run it
    tensors = {"scope/map": scope.best["map"], "scope/log_scale": scope.best["log_scale"]}
    tensors |= {
        f"adapter/{name}/{part}": tensor
        for name, delta in patch.deltas.items()
        for part, tensor in delta.tensors().items()
    }
    card = {
        "config": plain,
        "preset": source.to_json(),
        "adapter": sorted(patch.deltas),
        "seed": seed,
        "lessons": {
            "train": len(divided.train),
            "validation": len(divided.validation),
            "digest": divided.digest,
        },
        "training": {"scope": scope.to_json(), "counterfactual": trainer.result.to_json()},
        "versions": library_versions(),
    }
    return save_network(out, "serac", handle, tensors, card, overwrite=overwrite)


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


@dataclass(frozen=True)
class SeracNetwork:
    """A trained network, read: ``scope``, ``adapter``, and the settings that an edit needs."""

    scope: Scope
    adapter: Mapping[str, LowRank]
    threshold: float
    embedder: str
    trained: TrainedNetwork


def load_serac(folder: str | Path, handle: ModelHandle) -> SeracNetwork:
    """Reads a network that ``train_serac`` wrote.

    Raises:
        ConfigError: No folder was named.
        PatchFormatError: The folder holds no network of SERAC, or a damaged one.
        BaseMismatchError: It was trained for another model.
    """
    trained, tensors = read_network(folder, "serac", handle)
    try:
        config = trained.card["config"]
        return SeracNetwork(
            Scope(tensors["scope/map"], tensors["scope/log_scale"]),
            adapter_of(tensors, trained.card["adapter"]),
            float(config["threshold"]),
            str(config["embedder"]),
            trained,
        )
    except (KeyError, TypeError, ValueError) as error:
        raise PatchFormatError(f"{trained.folder} is not a readable network of SERAC: {error}") from error


@dataclass(frozen=True)
class SeracEditor:
    """See the module. Make one with ``get_editor("serac", network=FOLDER)``; it keeps the sentence model it has loaded."""

    options: EditorOptions
    encoders: dict[str, Embedder] = field(default_factory=dict, repr=False)

    def edit(
        self,
        handle: ModelHandle,
        requests: Sequence[EditRequest],
        *,
        history: Sequence[WeightPatch] | None = None,
        progress: Progress | None = None,
    ) -> MemoryPatch:
        """One memory of all requests. See ``Editor.edit``."""
        check_requests(requests, one_per_subject=False)
        config = settle_bare(self.options, SeracEditConfig)
        network = load_serac(config.network, handle)
        encoder = config.encoder or self.encoders.get(network.embedder)
        encoder = self.encoders.setdefault(network.embedder, _encoder(network.embedder, encoder))
        entries = tuple(
            Entry(request.id, request.text, f"{request.text} {request.target_new.strip()}")
            for request in requests
        )
        keys = torch.from_numpy(encoder.encode([entry.prompt for entry in entries]))
        if progress is not None:
            progress("embeddings", len(entries), len(entries))
        memory = SeracMemory(
            entries,
            keys,
            network.scope,
            network.adapter,
            network.threshold,
            network.trained.id,
            network.embedder,
            encoder,
        )
        made = Provenance(
            method=self.options.spec,
            config={"network": network.trained.id},
            requests=tuple(request.to_json() for request in requests),
            seed=self.options.seed,
            versions=library_versions(),
            extra={"preset": network.trained.card["preset"]},
        )
        return MemoryPatch(
            handle.fingerprint, memory, made, tuple(entry.patch.id for entry in handle.applied)
        )


def _encoder(name: str, given: Embedder | None) -> Embedder:
    if given is not None and given.name != name:
        raise ConfigError(f"the sentence model is {given.name!r}, the network wants {name!r}")
    return given or Embedder(name)


def _build(options: EditorOptions) -> Editor:
    return SeracEditor(options)


SERAC = Method(
    "serac",
    "Edits kept as texts; a classifier routes prompts to a model that reads them",
    "Mitchell et al. 2022, arXiv 2206.06520",
    "a network trained once per model; then one sentence embedding",
    False,
    _build,
    train_serac,
)
