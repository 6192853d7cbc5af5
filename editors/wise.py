"""WISE: side memories of one projection, and a router that leaves other prompts alone (Wang et al., NeurIPS 2024, arXiv 2405.14768).

Edits train a copy of the projection's weight by gradient, inside a random part of its entries (section 3.3, knowledge shards).
The loss is the target's negative log-likelihood plus a margin loss that keeps the copy's activations close to the original ones
on an irrelevant prompt (below α), far on the edited one (above β), and γ apart (equation 5). Shards fill up and become memories
of their own; groups of them are merged with TIES. What a memory does is in ``editors.side_memory``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import cast

import torch
from torch import Tensor

from editors.base import Editor, EditorOptions, Method
from editors.memory import (
    Projection,
    TargetBatch,
    memory_patch,
    projection_role,
    settle_memory,
    the_layer,
)
from editors.prefixes import Prefixes
from editors.rows import EditRow, check_requests, request_rows
from editors.side_memory import (
    Activation,
    WiseMemory,
    activation_distance,
    activation_name,
    activation_of,
    shifted,
    ties,
)
from editors.values import Progress, frozen
from lab.errors import ConfigError, NumericalError
from lab.handle import ModelHandle
from lab.memory import MemoryPatch
from lab.patch import WeightPatch
from lab.records import EditRequest
from lab.tokens import encode_ids
from lab.trace import Recording, Site, trace

PREFIX_LENGTHS = ((5, 5), (10, 5))
"""Five prefixes of five tokens and five of ten (the authors' code)."""

IRRELEVANT = (
    "The weather on the coast in spring is",
    "To make a good cup of tea, one begins with",
    "The easiest way to learn a new language is",
    "Early in the morning the streets were",
    "The number that comes after nine is",
    "Most small birds build their nests in",
    "The recipe calls for flour, butter and",
    "When the music stopped, everybody",
)
"""Prompts that no edit is about, one with each edit; settings of a study replace them by prompts of its own domain."""


@dataclass(frozen=True)
class WiseConfig:
    """Settings.

    Attributes:
        layers: The one block of the side memories.
        projection: ``mlp_out`` or ``mlp_in``.
        steps: Updates per edit at most.
        lr: Learning rate of SGD.
        weight_decay: Pulls the trained entries of the copy towards zero.
        mask_ratio: Share of the entries that a shard may change.
        norm_constraint: No entry moves further than this.
        alpha, beta, gamma: Margins of the activation loss: irrelevant below α, edited above β, γ between them.
        act_ratio: A memory answers prompts that reach this share of its smallest edited prompt's distance.
        shard_size: Edits per shard.
        merge_size: Edits whose shards are merged into one memory.
        density: Share of a shard's entries that a merge keeps.
        retrieve: Merged memories stay beside each other; otherwise all shards are merged into one at the end.
        stop_below, stop_change: An edit is finished when its loss is this small and changes no more than this.
        irrelevant: Prompts that no edit is about.
    """

    layers: tuple[int, ...] = (27,)
    projection: Projection = "mlp_out"
    steps: int = 70
    lr: float = 1.0
    weight_decay: float = 1e-5
    mask_ratio: float = 0.2
    norm_constraint: float = 1.0
    alpha: float = 5.0
    beta: float = 20.0
    gamma: float = 10.0
    act_ratio: float = 0.88
    shard_size: int = 500
    merge_size: int = 1000
    density: float = 0.53
    retrieve: bool = True
    stop_below: float = 0.02
    stop_change: float = 1e-4
    irrelevant: tuple[str, ...] = IRRELEVANT

    def __post_init__(self) -> None:
        projection_role(self.projection)
        for name in ("steps", "lr", "norm_constraint", "shard_size", "act_ratio"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} must be positive, not {getattr(self, name)}")
        for name in ("mask_ratio", "density"):
            if not 0 < getattr(self, name) <= 1:
                raise ConfigError(f"{name} must lie in (0, 1], it is {getattr(self, name)}")
        if self.merge_size % self.shard_size:
            raise ConfigError(
                f"merge_size must be a multiple of shard_size ({self.shard_size}), it is {self.merge_size}"
            )
        if not self.irrelevant or not all(text.strip() for text in self.irrelevant):
            raise ConfigError("irrelevant must hold at least one prompt, and no empty one")


def margin_loss(inside: Tensor, outside: Tensor, alpha: float, beta: float, gamma: float) -> Tensor:
    """The activation loss of equation 5, each term the mean over what violates it.

    Args:
        inside: ``[row]``, distances of the edited prompt's rows.
        outside: ``[row]``, distances of irrelevant prompts.
        alpha, beta, gamma: Margins.
    """
    apart = outside[:, None] - inside[None] + gamma
    return _mean_positive(apart) + _mean_positive(outside - alpha) + _mean_positive(beta - inside)


def _mean_positive(values: Tensor) -> Tensor:
    positive = values > 0
    return torch.where(positive, values, 0.0).sum() / positive.sum().clamp_min(1)


@dataclass(frozen=True)
class WiseStep:
    """The loss of one edit at one step, and its parts."""

    total: float
    nll: float
    margin: float


class SideTraining:
    """The loss of a side memory on one request.

    Args:
        handle: The model.
        site: Output of the projection.
        request: What to say.
        contexts: Context templates, the plain one first.
        irrelevant: A prompt that the request is not about.
        activation: f.
        config: Margins.
    """

    def __init__(
        self,
        handle: ModelHandle,
        site: Site,
        request: EditRequest,
        contexts: Sequence[str],
        irrelevant: str,
        activation: Activation,
        config: WiseConfig,
    ) -> None:
        rows = request_rows(handle, request, contexts, "last")
        ids = tuple(encode_ids(handle.tokenizer, irrelevant))
        self._targets = TargetBatch.of(handle, [*rows, EditRow(ids, len(ids) - 1, len(ids) - 1)])
        batch = self._targets.batch
        columns = torch.arange(batch.input_ids.shape[1], device=handle.device)
        self._prompt = batch.attention_mask.bool() & (columns <= cast(Tensor, batch.prompt_last)[:, None])
        self._source = Site(site.role, site.layer, "in")
        self._activation, self._config = activation, config
        self._recording: Recording | None = None
        self._delta = self._own = self._side = torch.empty(0)

    def losses(self, recording: Recording, delta: Tensor) -> tuple[Tensor, Tensor]:
        """Negative log-likelihood and margin loss, differentiable in ``delta[out, in]``.

        Args:
            recording: A trace that reads the projection's input and writes ``self.write`` to its output.
            delta: On the projection's weight.
        """
        self._recording, self._delta = recording, delta
        logits = recording.run(self._targets.batch, logits_to_keep=self._targets.columns)
        nll = self._targets.nll(cast(Tensor, logits))[:-1].mean()
        moved = activation_distance(self._activation, self._own, self._side, self._prompt)
        config = self._config
        return nll, margin_loss(moved[:-1], moved[-1:], config.alpha, config.beta, config.gamma)

    def write(self, output: Tensor) -> Tensor:
        """Puts the side memory's output in place of the projection's, out of place."""
        self._own = output
        self._side = shifted(cast(Recording, self._recording)[self._source], output, self._delta)
        return self._side.to(output.dtype)


@dataclass(frozen=True)
class WiseEditor:
    """WISE; see the module. Make one with ``get_editor``."""

    options: EditorOptions

    def edit(
        self,
        handle: ModelHandle,
        requests: Sequence[EditRequest],
        *,
        history: Sequence[WeightPatch] | None = None,
        progress: Progress | None = None,
    ) -> MemoryPatch:
        """One patch for all requests, in their order; side memories that are applied stay as they are. See ``Editor.edit``."""
        check_requests(requests, one_per_subject=False)
        config, preset = settle_memory(handle, self.options, WiseConfig, "wise", ("prefix_lengths",))
        layer = the_layer(handle, config.layers)
        site = Site(projection_role(config.projection), layer)
        name = activation_name(handle)
        with handle.writing():
            prefixes = self._prefixes(handle)
            with handle.stack.aside("wise", (layer, config.projection, name)), frozen(handle.model):
                run = _Run(handle, site, activation_of(name), config, prefixes, self.options.seed)
                for number, request in enumerate(requests, start=1):
                    run.add(request)
                    if progress is not None:
                        progress("edits", number, len(requests))
                deltas, members = run.memories()
                distances = [run.smallest_distance(*pair) for pair in zip(deltas, members, strict=True)]
            memory = WiseMemory(
                layer,
                config.projection,
                name,
                torch.stack(deltas),
                tuple(distance * config.act_ratio for distance in distances),
                tuple(tuple(request.id for request in part) for part in members),
            )
            extra = {
                "prefixes": list(prefixes.flat),
                "values": run.notes,
                "memories": [
                    {"ids": list(names), "smallest_distance": distance}
                    for names, distance in zip(memory.ids, distances, strict=True)
                ],
            }
            return memory_patch(handle, self.options, config, preset, requests, memory, extra)

    def _prefixes(self, handle: ModelHandle) -> Prefixes:
        lengths = self.options.overrides.get("prefix_lengths", PREFIX_LENGTHS)
        fixed = self.options.prefixes
        if isinstance(fixed, Prefixes):
            return fixed
        spread = [(int(tokens), int(number)) for tokens, number in lengths]
        return fixed.get(handle, spread, self.options.seed)


class _Run:
    """Shards and memories while edits come in."""

    def __init__(
        self,
        handle: ModelHandle,
        site: Site,
        activation: Activation,
        config: WiseConfig,
        prefixes: Prefixes,
        seed: int,
    ) -> None:
        self.handle, self.site, self.activation, self.config = handle, site, activation, config
        self.contexts, self.seed = prefixes.flat, seed
        self.weight = handle.weight(site.role, site.layer).canonical()
        self.dtype = torch.promote_types(handle.dtype, torch.float32)
        self.source = Site(site.role, site.layer, "in")
        self.count = 0
        self.notes: list[dict[str, object]] = []
        self._shards: list[tuple[Tensor, list[EditRequest]]] = []
        self._merged: list[tuple[Tensor, list[EditRequest]]] = []
        self._delta = self._mask = torch.empty(0)
        self._members: list[EditRequest] = []

    def add(self, request: EditRequest) -> None:
        """Trains one more edit into the shard that is open."""
        config = self.config
        if not self._members:
            self._delta = torch.zeros(self.weight.shape, dtype=self.dtype, device=self.weight.device)
            generator = torch.Generator().manual_seed(self.seed * 1009 + self.count // config.shard_size)
            drawn = torch.rand(self.weight.shape, generator=generator) < config.mask_ratio
            self._mask = drawn.to(self.weight.device)
        irrelevant = config.irrelevant[(self.count + self.seed) % len(config.irrelevant)]
        self._train(request, irrelevant)
        self._members.append(request)
        self.count += 1
        if len(self._members) == config.shard_size:
            self._close()
        if config.retrieve and self.count % config.merge_size == 0:
            self._merge()

    def memories(self) -> tuple[list[Tensor], list[list[EditRequest]]]:
        """The deltas of all memories and the requests in each, once all edits are in."""
        self._close()
        if not self.config.retrieve:
            self._merge()
        found = self._merged + self._shards
        return [delta for delta, _ in found], [members for _, members in found]

    def smallest_distance(self, delta: Tensor, members: Sequence[EditRequest]) -> float:
        """How far a memory moves the activations of the prompt among its edits that it moves least."""
        smallest = math.inf
        with trace(self.handle, (self.source, self.site), stop=self.site) as recording:
            for begin in range(0, len(members), 64):
                batch = self.handle.encode([request.text for request in members[begin : begin + 64]])
                recording.run(batch)
                own = recording[self.site]
                side = shifted(recording[self.source], own, delta)
                moved = activation_distance(self.activation, own, side, batch.attention_mask.bool())
                smallest = min(smallest, float(moved.min()))
        return smallest

    def _close(self) -> None:
        if self._members:
            self._shards.append((self._delta, self._members))
            self._members = []

    def _merge(self) -> None:
        if len(self._shards) > 1:
            deltas = torch.stack([delta for delta, _ in self._shards])
            members = [request for _, part in self._shards for request in part]
            self._shards = [(ties(deltas, self.config.density), members)]
        self._merged += self._shards
        self._shards = []

    def _train(self, request: EditRequest, irrelevant: str) -> None:
        handle, config = self.handle, self.config
        training = SideTraining(
            handle, self.site, request, self.contexts, irrelevant, self.activation, config
        )
        delta = self._delta.requires_grad_()
        steps: list[WiseStep] = []
        with trace(handle, (self.source,), {self.site: training.write}, detach=False) as recording:
            for step in range(config.steps):
                nll, margin = training.losses(recording, delta)
                total = nll + margin
                steps.append(WiseStep(*(float(part.detach()) for part in (total, nll, margin))))
                if not math.isfinite(steps[-1].total):
                    raise NumericalError(
                        f"request {request.id!r}: the loss of the side memory became {steps[-1].total} at step "
                        f"{step}; try a smaller lr or a smaller norm_constraint, or load the model in float32"
                    )
                if step and steps[-1].total <= config.stop_below and _change(steps) <= config.stop_change:
                    break
                (gradient,) = torch.autograd.grad(total, delta)
                with torch.no_grad():
                    decay = config.weight_decay * (self.weight.to(delta.dtype) + delta)
                    delta -= config.lr * self._mask * (gradient + decay)
                    delta.clamp_(-config.norm_constraint, config.norm_constraint)
        self._delta = delta.detach()
        self.notes.append({"id": request.id, "steps": len(steps), "losses": [asdict(each) for each in steps]})


def _change(steps: Sequence[WiseStep]) -> float:
    return abs(steps[-1].total - steps[-2].total)


def _build(options: EditorOptions) -> Editor:
    return WiseEditor(options)


WISE = Method(
    "wise",
    "Side memories of one projection; a router sends only prompts like the edited ones to them",
    "Wang et al. 2024, arXiv 2405.14768",
    "a forward and a shallow backward pass of a dozen rows per step; seconds to minutes per fact",
    False,
    _build,
)
