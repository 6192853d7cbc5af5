"""Spreading a residual over layers: what MEMIT and the methods after it (PMET, EMMET, AlphaEdit) have in common.

A value is searched for each request at one place of the last edited layer. Then, layer by layer and on top of the updates
below, a share of what is still missing there becomes the residual of that layer's down projection. How a share becomes an
update is the method's own equation, and all that its file holds.

Where a family normalises the MLP's output before adding it (Gemma 2 and 3), adding to the MLP's output is not adding to the
block's. There methods that search at the block's output take value and residual at the MLP's; the patch says ``adapted``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from editors.base import EditorOptions, Plan, check_layers, key_stats, settle
from editors.easing import Easing
from editors.keys import mean_over_contexts
from editors.patches import low_rank, make_patch, stats_note, temporarily, value_trace
from editors.rows import FACT_TOKENS, EditRow, FactToken, check_requests, request_rows
from editors.values import Progress, ValueResult, optimise_value
from lab.arch import Role
from lab.errors import ConfigError
from lab.handle import ModelHandle
from lab.patch import LowRank, WeightPatch
from lab.records import EditRequest
from lab.resume import HeldRows
from lab.stats import KeyStats
from lab.trace import Site

PREFIX_LENGTHS = ((10, 5),)
"""Five prefixes of ten tokens; with the plain prompt as a group of its own (MEMIT's authors' code)."""

Solve = Callable[[int, Tensor, Tensor], tuple[Tensor, Tensor]]
"""Layer, keys ``[in, B]`` and residuals ``[d, B]`` to the factors ``[d, r]`` and ``[r, in]`` of an update, all fp64."""


@dataclass(frozen=True)
class SpreadConfig:
    """Settings that these methods share, beside those of the value search.

    Attributes:
        layers: Where the update is spread, ascending; the value is searched at the last.
        fact_token: Where the edits act.
    """

    layers: tuple[int, ...] = (4, 5, 6, 7, 8)
    fact_token: FactToken = "subject_last"

    def __post_init__(self) -> None:
        if self.fact_token not in FACT_TOKENS:
            raise ConfigError(f"unknown fact_token {self.fact_token!r}; use one of {', '.join(FACT_TOKENS)}")


ConfigT = TypeVar("ConfigT", bound=SpreadConfig)


def value_role(handle: ModelHandle) -> Role:
    """Where MEMIT searches its values: at the block's output, or at the MLP's where that is normalised before it is added."""
    return Role.MLP if handle.arch.post_norm_mlp else Role.BLOCK


def block_output(handle: ModelHandle) -> tuple[Role, ...]:
    """The one tap of most methods: ``value_role``."""
    return (value_role(handle),)


def no_easing(config: SpreadConfig) -> Easing | None:
    """The value search of most methods: nothing is eased."""
    return None


@dataclass(frozen=True)
class SpreadMethod(Generic[ConfigT]):
    """What tells one of these methods from another.

    Attributes:
        section: Of ``presets.toml``.
        config: Its settings.
        divisor: Layers left, this one included, to what the missing part is divided by.
        taps: Where the search adds its δ; the first is where values and residuals are read.
        block_value: The value is meant for the block's output, so that another tap is an adaptation.
        easing: Of the value search.
    """

    section: str
    config: type[ConfigT]
    divisor: Callable[[int], float] = float
    taps: Callable[[ModelHandle], tuple[Role, ...]] = block_output
    block_value: bool = True
    easing: Callable[[ConfigT], Easing | None] = no_easing


@dataclass(frozen=True)
class Ready(Generic[ConfigT]):
    """Everything before the first layer.

    Attributes:
        config: Settings of the method.
        plan: Settings of the value search, prefixes, preset.
        stats: Key statistics by layer.
        values: One per request.
        role: Where values and residuals are read, in the last layer.
    """

    config: ConfigT
    plan: Plan
    stats: Mapping[int, KeyStats]
    values: tuple[ValueResult, ...]
    role: Role


@dataclass(frozen=True)
class Spread:
    """What the layers were given.

    Attributes:
        deltas: The updates of all layers, by parameter.
        notes: What a patch says about each.
        keys: Layer to each request's mean key, ``[in, B]`` fp64: under the updates below, and so under all of them, for a key does
            not depend on what its own layer and those above write.
    """

    deltas: dict[str, LowRank]
    notes: list[dict[str, Any]]
    keys: dict[int, Tensor]


def prepare(
    handle: ModelHandle,
    options: EditorOptions,
    method: SpreadMethod[ConfigT],
    requests: Sequence[EditRequest],
    progress: Progress | None,
) -> Ready[ConfigT]:
    """Settles the settings, gets the key statistics, and searches all values together."""
    config, plan = settle(handle, options, method.section, method.config, PREFIX_LENGTHS)
    check_layers(handle, config.layers)
    stats = key_stats(handle, options, config.layers, progress)
    roles = method.taps(handle)
    values = optimise_value(
        handle,
        requests,
        config.layers[-1],
        roles,
        plan.prefixes,
        plan.values,
        plan.penalties,
        easing=method.easing(config),
        fact_token=config.fact_token,
        progress=progress,
    )
    return Ready(config, plan, stats, tuple(values), roles[0])


def context_rows(
    handle: ModelHandle, requests: Sequence[EditRequest], ready: Ready[ConfigT]
) -> list[EditRow]:
    """Every request in every context, a request's rows together and its plain prompt first."""
    contexts, token = ready.plan.prefixes.flat, ready.config.fact_token
    return [row for request in requests for row in request_rows(handle, request, contexts, token)]


def spread(
    handle: ModelHandle,
    requests: Sequence[EditRequest],
    ready: Ready[ConfigT],
    method: SpreadMethod[ConfigT],
    solve: Solve,
    progress: Progress | None,
) -> Spread:
    """Turns what is missing at the last layer into an update of each layer, on top of the updates below.

    Raises:
        NumericalError: An update holds NaN or infinity; names the layer.
    """
    layers = ready.config.layers
    targets = torch.stack(
        [value.target.to(device="cpu", dtype=torch.float64) for value in ready.values], dim=1
    )
    rows = [row.prompt for row in context_rows(handle, requests, ready)]
    weights = ready.plan.prefixes.weights("groups")
    site = Site(ready.role, layers[-1])
    deltas: dict[str, LowRank] = {}
    notes: list[dict[str, Any]] = []
    read: dict[int, Tensor] = {}
    # Blocks below the first written one are run once, those above as often as something below them has changed.
    held = HeldRows(handle, rows, layers[0], layers[-1])
    plain = held.every(len(weights))
    for index, layer in enumerate(layers):
        key = Site(Role.MLP_OUT, layer, "in")
        with temporarily(handle, deltas):
            held.move_to(layer)
            # Only down projections change, which come after the attention of their block.
            states = held.read([key], key, keep_attention=True)[key]
            plain.stand_with(held, len(weights))
            keys = read[layer] = mean_over_contexts(states, weights).T
            now = plain.read([site], site)[site].T
        missing = targets - now
        left, right = solve(layer, keys, missing / method.divisor(len(layers) - index))
        weight = handle.weight(Role.MLP_OUT, layer)
        deltas[weight.name] = low_rank(left, right, f"layer {layer}")
        size = float(torch.linalg.matrix_norm(weight.canonical().float()))
        residual = float(torch.linalg.vector_norm(missing, dim=0).mean())
        notes.append(
            {
                "layer": layer,
                "residual": residual,
                "relative_norm": deltas[weight.name].norm() / size,
            }
        )
        if progress is not None:
            progress("layers", index + 1, len(layers))
    return Spread(deltas, notes, read)


def spread_note(
    method: SpreadMethod[ConfigT], requests: Sequence[EditRequest], ready: Ready[ConfigT], done: Spread
) -> dict[str, Any]:
    """What a patch says about the search, the layers and the statistics."""
    return {
        "values": [value_trace(*pair) for pair in zip(requests, ready.values, strict=True)],
        "layers": done.notes,
        "value_site": str(ready.role.value),
        "adapted": method.block_value and ready.role is not Role.BLOCK,
        "statistics": stats_note(ready.stats),
    }


def each_alone(
    requests: Sequence[EditRequest],
    ready: Ready[ConfigT],
    patch: Callable[[Sequence[EditRequest], Ready[ConfigT]], WeightPatch],
    progress: Progress | None,
) -> list[WeightPatch]:
    """One patch per request, each a batch of one, from values that were searched together."""
    patches = []
    for index, (request, value) in enumerate(zip(requests, ready.values, strict=True)):
        patches.append(patch([request], replace(ready, values=(value,))))
        if progress is not None:
            progress("edits", index + 1, len(requests))
    return patches


@dataclass(frozen=True)
class SpreadEditor(Generic[ConfigT]):
    """An editor whose update of a layer follows from that layer's statistics, keys and residuals alone.

    Attributes:
        options: How to run.
        method: What tells it from the others.
        update: Its equation: settings, statistics, keys ``[in, B]`` and residuals ``[d, B]`` to the factors of the update.
    """

    options: EditorOptions
    method: SpreadMethod[ConfigT]
    update: Callable[[ConfigT, KeyStats, Tensor, Tensor], tuple[Tensor, Tensor]]

    def edit(
        self,
        handle: ModelHandle,
        requests: Sequence[EditRequest],
        *,
        history: Sequence[WeightPatch] | None = None,
        progress: Progress | None = None,
    ) -> WeightPatch:
        """One patch for all requests together; earlier edits are not looked at. See ``Editor.edit``."""
        check_requests(requests, one_per_subject=False)
        with handle.writing():
            ready = prepare(handle, self.options, self.method, requests, progress)
            return self._patch(handle, requests, ready, progress)

    def edit_many(
        self, handle: ModelHandle, requests: Sequence[EditRequest], *, progress: Progress | None = None
    ) -> list[WeightPatch]:
        """One patch per request, each a batch of one, their values searched together. See ``ManyEditor``."""
        if not requests:
            return []
        with handle.writing():
            ready = prepare(handle, self.options, self.method, requests, progress)
            return each_alone(requests, ready, lambda one, its: self._patch(handle, one, its, None), progress)

    def _patch(
        self,
        handle: ModelHandle,
        requests: Sequence[EditRequest],
        ready: Ready[ConfigT],
        progress: Progress | None,
    ) -> WeightPatch:
        def solve(layer: int, keys: Tensor, residuals: Tensor) -> tuple[Tensor, Tensor]:
            return self.update(ready.config, ready.stats[layer], keys, residuals)

        parents = [entry.patch.id for entry in handle.applied]
        done = spread(handle, requests, ready, self.method, solve, progress)
        extra = spread_note(self.method, requests, ready, done)
        return make_patch(handle, self.options, ready.plan, requests, done.deltas, parents, extra)
