"""MEND: a trained network turns an edit's gradient into an update (Mitchell et al., ICLR 2022, arXiv 2110.11309).

``train_mend`` makes the network of one model: for each lesson the gradient of its edit goes through the network, the update is
put in place of the weights out of place, and ``edit_weight · NLL(target | edited) + locality_weight · KL(base ‖ edited)`` is
taken down the network's own gradient. The editor reads the network that its setting ``network`` names; an edit is then one
forward and one backward pass.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from editors.base import Editor, EditorOptions, Method
from editors.lessons import Lesson, divide
from editors.mend_network import Factors, MendNetwork, edit_losses, edited_weights, gradient_factors
from editors.patches import low_rank
from editors.rows import check_requests
from editors.trained import (
    TrainedNetwork,
    check_bare,
    read_network,
    save_network,
    work_folder,
)
from editors.training_run import run_training
from editors.tuning import (
    check_finite,
    check_positive,
    configured,
    plain_settings,
    settle_bare,
    target_lines,
)
from editors.values import Progress, frozen
from lab.errors import ConfigError, PatchFormatError
from lab.handle import ModelHandle
from lab.patch import LowRank, Provenance, WeightPatch, library_versions
from lab.records import EditRequest

FIRST_LESSONS = 50
"""Lessons whose gradients are in the running statistics before the first update."""


@dataclass(frozen=True)
class MendConfig:
    """Settings of training.

    Attributes:
        blocks: The MLPs of this many last blocks are edited.
        layers: Blocks to edit instead.
        rank: Of the network's low-rank layers.
        edit_rate: η at the start.
        lr: Adam's learning rate of the network.
        rate_lr: Adam's learning rate of η.
        edit_weight, locality_weight: Of the two losses.
        locality_prompts: How many prompts of a lesson must stay as they are, at each step.
        steps: Updates at most.
        lessons_per_step: Lessons, each an edit of its own, whose gradients one update averages.
        eval_every: Updates between validations.
        patience: Updates without a better validation loss after which training ends.
    """

    blocks: int = 3
    layers: tuple[int, ...] = ()
    rank: int = 1920
    edit_rate: float = 1e-4
    lr: float = 1e-6
    rate_lr: float = 1e-4
    edit_weight: float = 0.1
    locality_weight: float = 1.0
    locality_prompts: int = 2
    steps: int = 10_000
    lessons_per_step: int = 10
    eval_every: int = 200
    patience: int = 2000

    def __post_init__(self) -> None:
        check_positive(
            self, "blocks", "rank", "edit_rate", "lr", "rate_lr", "locality_prompts", "steps",
            "lessons_per_step", "eval_every", "patience",
        )  # fmt: skip
        if self.edit_weight < 0 or self.locality_weight < 0:
            raise ConfigError("edit_weight and locality_weight must not be negative")

    def chosen_layers(self, handle: ModelHandle) -> tuple[int, ...]:
        """The blocks to edit in this model."""
        layers = self.layers or tuple(range(max(0, handle.n_layers - self.blocks), handle.n_layers))
        if list(layers) != sorted(set(layers)) or not 0 <= layers[0] <= layers[-1] < handle.n_layers:
            raise ConfigError(
                f"layers {list(layers)} must be existing blocks in ascending order; {handle.name!r} has 0 to "
                f"{handle.n_layers - 1}"
            )
        return layers


@dataclass(frozen=True)
class MendEditConfig:
    """Settings of an edit.

    Attributes:
        network: Folder that ``train_mend`` wrote.
        batch_size: Requests in one pass.
    """

    network: str = ""
    batch_size: int = 32

    def __post_init__(self) -> None:
        check_positive(self, "batch_size")


class MendLearner:
    """The network in training.

    Args:
        handle: The model, its parameters frozen.
        network: What is trained.
        config: Settings.
    """

    def __init__(self, handle: ModelHandle, network: MendNetwork, config: MendConfig) -> None:
        self.handle, self.network, self.config = handle, network, config

    def tensors(self) -> Mapping[str, Tensor]:
        """See ``Learner.tensors``."""
        return self.network.state_dict()

    def optimizer(self) -> torch.optim.Optimizer:
        """Adam, with a rate of its own for η."""
        others = [value for name, value in self.network.named_parameters() if name != "rates"]
        return torch.optim.Adam(
            [
                {"params": others, "lr": self.config.lr},
                {"params": [self.network.rates], "lr": self.config.rate_lr},
            ]
        )

    def prepare(self, lessons: Sequence[Lesson]) -> None:
        """Takes gradients of some lessons into the statistics, so that the first updates are normalised by sound ones."""
        for lesson in lessons[:FIRST_LESSONS]:
            self.network.observe(self._factors(lesson))

    def loss(self, lesson: Lesson, rng: random.Random) -> Tensor:
        """See ``Learner.loss``."""
        factors = self._factors(lesson)
        self.network.observe(factors)
        edit, locality = self._losses(lesson, factors, rng)
        return self.config.edit_weight * edit + self.config.locality_weight * locality

    @torch.no_grad()
    def validate(self, lessons: Sequence[Lesson]) -> Mapping[str, float]:
        """Losses on held-out lessons, each with a fixed draw of its prompts."""
        edits, localities = [], []
        for number, lesson in enumerate(lessons):
            edit, locality = self._losses(lesson, self._factors(lesson), random.Random(number))
            edits.append(float(edit))
            localities.append(float(locality))
        edit, locality = sum(edits) / len(edits), sum(localities) / len(localities)
        total = self.config.edit_weight * edit + self.config.locality_weight * locality
        return {"loss": total, "edit": edit, "locality": locality}

    def _factors(self, lesson: Lesson) -> dict[str, Factors]:
        request = lesson.request
        with torch.enable_grad():
            lines = target_lines(self.handle, [(request.text, request.target_new)])
            return gradient_factors(self.handle, self.network.weights, lines)[0]

    def _losses(
        self, lesson: Lesson, factors: Mapping[str, Factors], rng: random.Random
    ) -> tuple[Tensor, Tensor]:
        """NLL of the target under the edited model, and divergence from the base model where it must stay as it is."""
        kept = rng.sample(lesson.locality, min(self.config.locality_prompts, len(lesson.locality)))
        lines = target_lines(self.handle, [lesson.pair(rng), *kept])
        return edit_losses(self.handle, self.network, factors, lines)


def train_mend(
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
) -> TrainedNetwork:
    """Trains the network of one model. See ``editors.trained.Train``."""
    check_bare(handle)
    config, source = configured(handle, "mend", "mend", MendConfig, preset, settings or {})
    divided = divide(lessons, seed=seed)
    plain = plain_settings(config)
    identity = {"editor": "mend", "base": handle.fingerprint, "seed": seed, "lessons": divided.digest}
    identity |= {name: value for name, value in plain.items() if name not in ("steps", "patience")}
    with handle.writing(), frozen(handle.model):
        network = make_network(handle, config.chosen_layers(handle), config.rank, config.edit_rate, seed)
        result = run_training(
            MendLearner(handle, network, config),
            divided,
            config,
            checkpoint=work_folder(out, work) / "mend.safetensors",
            identity=identity,
            seed=seed,
            resume=resume,
            progress=progress,
        )
    card = {
        "config": plain,
        "preset": source.to_json(),
        "layers": list(config.chosen_layers(handle)),
        "seed": seed,
        "lessons": {
            "train": len(divided.train),
            "validation": len(divided.validation),
            "digest": divided.digest,
        },
        "training": {"network": result.to_json()},
        "versions": library_versions(),
    }
    return save_network(out, "mend", handle, result.best, card, overwrite=overwrite)


def make_network(
    handle: ModelHandle, layers: Sequence[int], rank: int, rate: float, seed: int = 0
) -> MendNetwork:
    """A fresh network for a model, on its device."""
    dtype = torch.promote_types(handle.dtype, torch.float32)
    weights = edited_weights(handle, layers)
    return MendNetwork(weights, rank=rank, rate=rate, seed=seed, dtype=dtype).to(handle.device)


def load_mend(folder: str | Path, handle: ModelHandle) -> tuple[MendNetwork, TrainedNetwork]:
    """Reads a network that ``train_mend`` wrote.

    Raises:
        ConfigError: No folder was named.
        PatchFormatError: The folder holds no network of MEND, or a damaged one.
        BaseMismatchError: It was trained for another model.
    """
    trained, tensors = read_network(folder, "mend", handle)
    try:
        config = trained.card["config"]
        network = make_network(
            handle,
            trained.card["layers"],
            int(config["rank"]),
            float(config["edit_rate"]),
            int(trained.card["seed"]),
        )
        network.load_state_dict(tensors)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise PatchFormatError(f"{trained.folder} is not a readable network of MEND: {error}") from error
    return network.requires_grad_(False), trained


@dataclass(frozen=True)
class MendEditor:
    """See the module. Make one with ``get_editor("mend", network=FOLDER)``."""

    options: EditorOptions

    def edit(
        self,
        handle: ModelHandle,
        requests: Sequence[EditRequest],
        *,
        history: Sequence[WeightPatch] | None = None,
        progress: Progress | None = None,
    ) -> WeightPatch:
        """One patch for all requests: the sum of their single updates. See ``Editor.edit``."""
        check_requests(requests, one_per_subject=False)
        with self._ready(handle) as (config, network, trained):
            updates = self._updates(handle, requests, config, network, progress)
            deltas = {
                name: low_rank(
                    torch.cat([update[name].left for update in updates], dim=1),
                    torch.cat([update[name].right for update in updates], dim=0),
                    name,
                )
                for name in updates[0]
            }
            return self._patch(handle, requests, deltas, trained)

    def edit_many(
        self, handle: ModelHandle, requests: Sequence[EditRequest], *, progress: Progress | None = None
    ) -> list[WeightPatch]:
        """One patch per request, their gradients made together. See ``ManyEditor``."""
        if not requests:
            return []
        with self._ready(handle) as (config, network, trained):
            updates = self._updates(handle, requests, config, network, progress)
            return [
                self._patch(handle, [request], update, trained)
                for request, update in zip(requests, updates, strict=True)
            ]

    @contextmanager
    def _ready(self, handle: ModelHandle) -> Iterator[tuple[MendEditConfig, MendNetwork, TrainedNetwork]]:
        config = settle_bare(self.options, MendEditConfig)
        network, trained = load_mend(config.network, handle)
        with handle.writing(), frozen(handle.model):
            yield config, network, trained

    def _updates(
        self,
        handle: ModelHandle,
        requests: Sequence[EditRequest],
        config: MendEditConfig,
        network: MendNetwork,
        progress: Progress | None,
    ) -> list[dict[str, LowRank]]:
        """The update of each request."""
        found: list[dict[str, LowRank]] = []
        for start in range(0, len(requests), config.batch_size):
            group = requests[start : start + config.batch_size]
            lines = target_lines(handle, [(request.text, request.target_new) for request in group])
            factors, losses = gradient_factors(handle, network.weights, lines)
            check_finite(losses, group, 0, "it has no gradient; load the model in float32")
            with torch.no_grad():
                updates = network(factors)
            for index, request in enumerate(group):
                own = {}
                for name, (left, right) in updates.items():
                    terms = factors[name].row == index
                    own[name] = low_rank(left[:, terms], right[terms], f"request {request.id!r}, {name}")
                found.append(own)
            if progress is not None:
                progress("gradients", len(found), len(requests))
        return found

    def _patch(
        self,
        handle: ModelHandle,
        requests: Sequence[EditRequest],
        deltas: Mapping[str, LowRank],
        trained: TrainedNetwork,
    ) -> WeightPatch:
        made = Provenance(
            method=self.options.spec,
            config={"network": trained.id},
            requests=tuple(request.to_json() for request in requests),
            seed=self.options.seed,
            versions=library_versions(),
            extra={"preset": trained.card["preset"], "network": {"layers": trained.card["layers"]}},
        )
        parents = tuple(entry.patch.id for entry in handle.applied)
        return WeightPatch(handle.fingerprint, dict(deltas), made, parents)


def _build(options: EditorOptions) -> Editor:
    return MendEditor(options)


MEND = Method(
    "mend",
    "A trained network turns the edit's gradient into an update",
    "Mitchell et al. 2022, arXiv 2110.11309",
    "a network trained once per model; then one forward and one backward pass",
    False,
    _build,
    train_mend,
)
