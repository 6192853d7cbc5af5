"""MEMIT: many facts in one update, spread over several layers (Meng et al., ICLR 2023, arXiv 2210.07229).

A value ``z`` is searched for each request at the output of the last layer's block. Then, layer by layer and on top of the
updates below, each down projection takes an equal share of what is still missing:
``Δ = R Kᵀ (λC + K Kᵀ)⁻¹`` with ``R = (Z − H) / (layers left)``.

Where a family normalises the MLP's output before adding it (Gemma 2 and 3), adding to the MLP's output is not adding to the
block's. There ``z`` and ``H`` are taken at the MLP output of the last layer; the patch says so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from editors.base import (
    Editor,
    EditorOptions,
    Method,
    Plan,
    check_layers,
    key_stats,
    low_rank,
    make_patch,
    settle,
    stats_note,
    temporarily,
    value_trace,
)
from editors.keys import mean_over_contexts, read_keys, read_sites
from editors.rows import FACT_TOKENS, FactToken, check_requests, request_rows
from editors.values import Progress, ValueResult, optimise_value
from lab.arch import Role
from lab.errors import ConfigError
from lab.handle import ModelHandle
from lab.patch import LowRank, WeightPatch
from lab.records import EditRequest
from lab.stats import KeyStats, woodbury_factors
from lab.trace import Site

PREFIX_LENGTHS = ((10, 5),)
"""Five prefixes of ten tokens; with the plain prompt as a group of its own (the authors' code)."""


@dataclass(frozen=True)
class MemitConfig:
    """Settings beside those of the value search.

    Attributes:
        layers: Where the update is spread, ascending; the value is searched at the last.
        mom2_weight: λ: how many average keys the statistics stand for against the new ones.
        fact_token: Where the edits act.
    """

    layers: tuple[int, ...] = (4, 5, 6, 7, 8)
    mom2_weight: float = 15000.0
    fact_token: FactToken = "subject_last"

    def __post_init__(self) -> None:
        if not self.mom2_weight > 0:
            raise ConfigError(f"mom2_weight must be positive, it is {self.mom2_weight}")
        if self.fact_token not in FACT_TOKENS:
            raise ConfigError(f"unknown fact_token {self.fact_token!r}; use one of {', '.join(FACT_TOKENS)}")


@dataclass(frozen=True)
class MemitEditor:
    """MEMIT; see the module. Make one with ``get_editor``."""

    options: EditorOptions

    def edit(
        self,
        handle: ModelHandle,
        requests: Sequence[EditRequest],
        *,
        history: Sequence[WeightPatch] | None = None,
        progress: Progress | None = None,
    ) -> WeightPatch:
        """One patch for all requests together. See ``Editor.edit``."""
        check_requests(requests, one_per_subject=False)
        with handle.writing():
            return self._patch(handle, requests, self._prepare(handle, requests, progress), progress)

    def edit_many(
        self, handle: ModelHandle, requests: Sequence[EditRequest], *, progress: Progress | None = None
    ) -> list[WeightPatch]:
        """One patch per request, each a batch of one, their values searched together. See ``ManyEditor``."""
        if not requests:
            return []
        patches = []
        with handle.writing():
            ready = self._prepare(handle, requests, progress)
            for index, (request, value) in enumerate(zip(requests, ready.values, strict=True)):
                patches.append(self._patch(handle, [request], replace(ready, values=(value,)), None))
                if progress is not None:
                    progress("edits", index + 1, len(requests))
        return patches

    def _prepare(
        self, handle: ModelHandle, requests: Sequence[EditRequest], progress: Progress | None
    ) -> _Ready:
        config, plan = settle(handle, self.options, "memit", MemitConfig, PREFIX_LENGTHS)
        check_layers(handle, config.layers)
        stats = key_stats(handle, self.options, config.layers, progress)
        values = optimise_value(
            handle,
            requests,
            config.layers[-1],
            value_role(handle),
            plan.prefixes,
            plan.values,
            plan.penalties,
            fact_token=config.fact_token,
            progress=progress,
        )
        return _Ready(config, plan, stats, tuple(values))

    def _patch(
        self, handle: ModelHandle, requests: Sequence[EditRequest], ready: _Ready, progress: Progress | None
    ) -> WeightPatch:
        """Spreads the values over the layers, each on top of the updates below."""
        config, role = ready.config, value_role(handle)
        parents = [entry.patch.id for entry in handle.applied]
        targets = torch.stack(
            [value.target.to(device="cpu", dtype=torch.float64) for value in ready.values], dim=1
        )
        contexts = ready.plan.prefixes.flat
        rows = [
            row for request in requests for row in request_rows(handle, request, contexts, config.fact_token)
        ]
        site = Site(role, config.layers[-1])
        weights = ready.plan.prefixes.weights("groups")
        deltas: dict[str, LowRank] = {}
        spread: list[dict[str, Any]] = []
        for index, layer in enumerate(config.layers):
            with temporarily(handle, deltas):
                read = read_keys(handle, rows, [layer])[layer]
                now = read_sites(handle, rows[:: len(contexts)], [site], site)[site].T
            keys = mean_over_contexts(read.keys, weights).T
            missing = targets - now
            factor = ready.stats[layer].factor(config.mom2_weight)
            left, right = woodbury_factors(factor, keys, missing / (len(config.layers) - index))
            weight = handle.weight(Role.MLP_OUT, layer)
            deltas[weight.name] = low_rank(left, right, f"layer {layer}")
            size = float(torch.linalg.matrix_norm(weight.canonical().float()))
            residual = float(torch.linalg.vector_norm(missing, dim=0).mean())
            relative = deltas[weight.name].norm() / size
            spread.append({"layer": layer, "residual": residual, "relative_norm": relative})
            if progress is not None:
                progress("layers", index + 1, len(config.layers))
        extra = {
            "values": [value_trace(*pair) for pair in zip(requests, ready.values, strict=True)],
            "layers": spread,
            "value_site": str(role.value),
            "adapted": role is not Role.BLOCK,
            "statistics": stats_note(ready.stats),
        }
        return make_patch(handle, self.options, ready.plan, requests, deltas, parents, extra)


@dataclass(frozen=True)
class _Ready:
    config: MemitConfig
    plan: Plan
    stats: Mapping[int, KeyStats]
    values: tuple[ValueResult, ...]


def value_role(handle: ModelHandle) -> Role:
    """Where MEMIT searches its values: at the block's output, or at the MLP's where that is normalised before it is added."""
    return Role.MLP if handle.arch.post_norm_mlp else Role.BLOCK


def _build(options: EditorOptions) -> Editor:
    return MemitEditor(options)


MEMIT = Method(
    "memit",
    "Many facts at once, spread over several MLPs",
    "Meng et al. 2023, arXiv 2210.07229",
    "key statistics once per model; then about a second per fact and one solve per layer",
    True,
    _build,
)
