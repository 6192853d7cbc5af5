"""AlphaEdit: MEMIT's values, written only where general text has no keys (Fang et al., ICLR 2025, arXiv 2410.02355).

``P`` projects onto the eigenvectors of the key statistics whose eigenvalues lie below a threshold: directions that general
text hardly uses. With keys ``K_p`` of earlier edits, which the update must leave alone as well,
``Δᵀ = [P (K Kᵀ + K_p K_pᵀ) + λ₂ I]⁻¹ P K Rᵀ`` (the authors' code; solved over the edits, see ``null_space_factors``).

Every patch carries its keys, read under the weights it leaves behind. ``history`` hands them to the next edit; nothing else
remembers them.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from editors.base import Editor, EditorOptions, Method, check_layers, key_stats, settle
from editors.patches import carried, make_patch
from editors.rows import check_requests
from editors.spread import (
    PREFIX_LENGTHS,
    Ready,
    SpreadConfig,
    SpreadMethod,
    each_alone,
    prepare,
    spread,
    spread_note,
)
from editors.values import Progress
from lab.errors import ConfigError
from lab.handle import ModelHandle
from lab.patch import Carry, WeightPatch
from lab.records import EditRequest
from lab.stats import KeyStats, PastGram, Projector, null_space_factors

KIND = "alphaedit"
"""Of what its patches carry."""


@dataclass(frozen=True)
class AlphaEditConfig(SpreadConfig):
    """Settings beside those of the value search.

    Attributes:
        l2: λ₂: how much a large update costs.
        nullspace_threshold: Eigenvalues of the key statistics below this span where edits may go.
        threshold_mode: ``"absolute"`` is the paper's, on the scale of the model's activations; ``"relative"`` counts in mean
            eigenvalues, so that one threshold serves models of any scale.
    """

    l2: float = 10.0
    nullspace_threshold: float = 2e-2
    threshold_mode: Literal["absolute", "relative"] = "absolute"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("l2", "nullspace_threshold"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} must be positive, it is {getattr(self, name)}")
        if self.threshold_mode not in ("absolute", "relative"):
            raise ConfigError(f"unknown threshold_mode {self.threshold_mode!r}; use 'absolute' or 'relative'")


_METHOD = SpreadMethod("alphaedit", AlphaEditConfig)


@dataclass(frozen=True)
class AlphaEditor:
    """AlphaEdit; see the module. Make one with ``get_editor``.

    Attributes:
        options: How to run.
        grams: Layer to what was computed of the past; only saves time, whatever sequence comes next.
    """

    options: EditorOptions
    grams: dict[int, PastGram] = field(default_factory=dict, repr=False, compare=False)

    def edit(
        self,
        handle: ModelHandle,
        requests: Sequence[EditRequest],
        *,
        history: Sequence[WeightPatch] | None = None,
        progress: Progress | None = None,
    ) -> WeightPatch:
        """One patch for all requests together, which leaves the keys of earlier edits alone. See ``Editor.edit``.

        Args:
            handle: The model; usually with the patches of ``history`` applied.
            requests: What the model should say.
            history: Earlier patches, oldest first; what they carry is protected. Patches of other methods carry no keys, and
                are named in a warning and in ``provenance.extra["history"]``.
            progress: As in ``Editor.edit``.

        Raises:
            ConfigError: The threshold keeps no direction, or all of them; or an earlier patch has no keys of a layer.
            BaseMismatchError: An earlier patch was made for another model.
        """
        check_requests(requests, one_per_subject=False)
        with handle.writing():
            ready = prepare(handle, self.options, _METHOD, requests, progress)
            return self._patch(
                handle,
                requests,
                ready,
                tuple(history or ()),
                _projectors(ready.config, ready.stats),
                progress,
            )

    def edit_many(
        self, handle: ModelHandle, requests: Sequence[EditRequest], *, progress: Progress | None = None
    ) -> list[WeightPatch]:
        """One patch per request, each the first of its sequence, their values searched together. See ``ManyEditor``."""
        if not requests:
            return []
        with handle.writing():
            ready = prepare(handle, self.options, _METHOD, requests, progress)
            kept = _projectors(ready.config, ready.stats)
            return each_alone(
                requests, ready, lambda one, its: self._patch(handle, one, its, (), kept, None), progress
            )

    def ranks(self, handle: ModelHandle) -> dict[int, int]:
        """Layer to the rank of the null space that edits of this model are confined to.

        Raises:
            ConfigError: The threshold keeps no direction, or all of them.
        """
        config, _ = settle(handle, self.options, "alphaedit", AlphaEditConfig, PREFIX_LENGTHS)
        check_layers(handle, config.layers)
        kept = _projectors(config, key_stats(handle, self.options, config.layers, None))
        return {layer: projector.rank for layer, projector in kept.items()}

    def _patch(
        self,
        handle: ModelHandle,
        requests: Sequence[EditRequest],
        ready: Ready[AlphaEditConfig],
        history: Sequence[WeightPatch],
        kept: Mapping[int, Projector],
        progress: Progress | None,
    ) -> WeightPatch:
        layers = ready.config.layers
        blocks = past_keys(handle, history, ready)
        past = {
            layer: self.grams.setdefault(layer, PastGram()).over(kept[layer], blocks[layer])
            for layer in layers
        }

        def solve(layer: int, keys: Tensor, residuals: Tensor) -> tuple[Tensor, Tensor]:
            earlier, gram = past[layer]
            return null_space_factors(kept[layer], keys, residuals, earlier, ready.config.l2, gram)

        parents = [entry.patch.id for entry in handle.applied]
        done = spread(handle, requests, ready, _METHOD, solve, progress)
        # As precise as the model itself; half the size where that is fp32.
        dtype = torch.promote_types(handle.dtype, torch.float32)
        carry = Carry(KIND, {_name(layer): keys.to(dtype) for layer, keys in done.keys.items()})
        extra: dict[str, Any] = {
            **spread_note(_METHOD, requests, ready, done),
            "null_space": [_rank_note(layer, ready.stats[layer], kept[layer]) for layer in layers],
            "history": {
                "patches": [patch.id for patch in history],
                "keys": past[layers[0]][0].shape[1],
                "without_keys": [patch.id for patch in history if not carried([patch], KIND)],
            },
        }
        return make_patch(
            handle, self.options, ready.plan, requests, done.deltas, parents, extra, carry=(carry,)
        )


def past_keys(
    handle: ModelHandle, history: Sequence[WeightPatch], ready: Ready[AlphaEditConfig]
) -> dict[int, list[Tensor]]:
    """Keys of earlier edits, layer to ``[in, n_i]`` of each patch, oldest first.

    Raises:
        ConfigError: A patch carries keys, but not of a layer that is edited now.
        BaseMismatchError: A patch was made for another model.
    """
    carries = carried(history, KIND, handle)
    if without := [patch for patch in history if not carried([patch], KIND)]:
        logging.getLogger(__name__).warning(
            "%d of %d earlier patches carry no keys and are not protected: %s",
            len(without),
            len(history),
            ", ".join(f"{patch.id[:12]} ({patch.provenance.method})" for patch in without),
        )
    found = {}
    for layer in ready.config.layers:
        parts = []
        for carry in carries:
            if _name(layer) not in carry.tensors:
                raise ConfigError(
                    f"an earlier patch carries keys of {', '.join(sorted(carry.tensors))}, but layer {layer} is edited now; "
                    "edit the same layers throughout a sequence"
                )
            parts.append(carry.tensors[_name(layer)])
        found[layer] = parts
    return found


def _name(layer: int) -> str:
    return f"layer {layer}"


def _projectors(config: AlphaEditConfig, statistics: Mapping[int, KeyStats]) -> dict[int, Projector]:
    found = {}
    for layer in config.layers:
        stats = statistics[layer]
        scale = float(stats.moment.diagonal().mean()) if config.threshold_mode == "relative" else 1.0
        try:
            found[layer] = stats.null_space(config.nullspace_threshold * scale)
        except ConfigError as error:
            raise ConfigError(
                f"layer {layer}: {error} (setting nullspace_threshold, {config.threshold_mode}; a mean eigenvalue is "
                f"{float(stats.moment.diagonal().mean()):.3g})"
            ) from None
    return found


def _rank_note(layer: int, stats: KeyStats, projector: Projector) -> dict[str, Any]:
    return {
        "layer": layer,
        "rank": projector.rank,
        "width": len(stats.moment),
        "threshold": projector.threshold,
    }


def _build(options: EditorOptions) -> Editor:
    return AlphaEditor(options)


ALPHAEDIT = Method(
    "alphaedit",
    "MEMIT confined to the null space of general keys; made for sequences",
    "Fang et al. 2025, arXiv 2410.02355",
    "key statistics and one eigendecomposition per layer; then about a second per fact and one small solve per layer",
    True,
    _build,
)
