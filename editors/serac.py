"""SERAC: edits are kept as texts, and a classifier routes prompts to a counterfactual model (Mitchell et al. 2022, arXiv 2206.06520).

``train_serac`` makes two things for one model, each on its own: the scope classifier, a map over frozen
sentence embeddings with binary cross entropy, and the counterfactual model. The latter is here the model itself with a LoRA
adapter trained to answer from an edit that stands above the prompt, so that it shares tokenizer and knowledge with the base.
An edit then costs one sentence embedding; the weights never change.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from editors.base import Editor, EditorOptions, Method
from editors.lessons import Lesson, divide
from editors.lora import adapter, adapter_dropout
from editors.rows import check_requests
from editors.serac_learners import CounterfactualLearner, ScopeLearner, SeracConfig, embed_lessons
from editors.serac_memory import Entry, Scope, SeracMemory, adapter_of
from editors.trained import TrainedNetwork, check_bare, read_network, save_network, work_folder
from editors.training_run import RunResult, run_training
from editors.tuning import configured, plain_settings, settle_bare
from editors.values import Progress
from lab.embeddings import Embedder
from lab.errors import ConfigError, DataError, PatchFormatError
from lab.handle import ModelHandle
from lab.memory import MemoryPatch
from lab.patch import LowRank, Provenance, WeightPatch, library_versions
from lab.records import EditRequest
from lab.training import fit


@dataclass(frozen=True)
class SeracEditConfig:
    """Settings of an edit.

    Attributes:
        network: Folder that ``train_serac`` wrote.
        encoder: The sentence model at work, where several editors share one; made from the network's card without it.
    """

    network: str = ""
    encoder: Embedder | None = None


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
        result = self.run(learner)
        with torch.no_grad():
            for name, parameter in learner.parameters.items():
                parameter.copy_(result.best[name])
        self.result = result


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
