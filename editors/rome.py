"""ROME: one fact, one layer, a rank-one update (Meng et al., NeurIPS 2022, arXiv 2202.05262), and its stable variant R-ROME.

With key statistics ``C``, mean key ``k̄``, plain-prompt key ``k0`` and value ``v0``, and searched value ``z``:
``u = C⁻¹ k̄``, ``Δ = (z − v0) uᵀ / (k0·u)``, so that ``(W + Δ) k0 = z``. ``rome_identity`` leaves ``C`` out (what EasyEdit's
configs do under the name ROME). ``r_rome`` uses one key throughout (Gupta et al., 2024, arXiv 2403.07175).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from editors.base import Editor, EditorOptions, Method, Plan, check_layers, key_stats, settle
from editors.keys import KeyValue, mean_over_contexts, read_keys
from editors.patches import low_rank, make_patch, stats_note, temporarily, value_trace
from editors.rows import FACT_TOKENS, FactToken, check_requests, request_rows
from editors.values import Progress, ValueResult, optimise_value
from lab.arch import Role
from lab.errors import ConfigError, NumericalError
from lab.handle import ModelHandle
from lab.patch import LowRank, WeightPatch
from lab.records import EditRequest
from lab.stats import Factor

KeyRule = Literal["mixed", "mean", "prompt"]

PREFIX_LENGTHS = ((5, 10), (10, 10))
"""Ten prefixes of five tokens and ten of ten (ROME, appendix E.5)."""

# Beyond these an update is flagged: it is about to hurt what it was not asked to touch.
SMALLEST_RELATIVE_COSINE = 0.1
LARGEST_RELATIVE_NORM = 0.3


@dataclass(frozen=True)
class RomeConfig:
    """Settings beside those of the value search.

    Attributes:
        layers: Usually one; several are edited in turn, each on top of the ones below.
        fact_token: Where the edit acts.
        key: ``"mixed"``: mean key in ``u``, plain key in the denominator (ROME). ``"mean"`` or ``"prompt"``: that one key
            throughout (R-ROME).
        covariance: Use key statistics; the identity without.
    """

    layers: tuple[int, ...] = (5,)
    fact_token: FactToken = "subject_last"
    key: KeyRule = "mixed"
    covariance: bool = True

    def __post_init__(self) -> None:
        if self.fact_token not in FACT_TOKENS:
            raise ConfigError(f"unknown fact_token {self.fact_token!r}; use one of {', '.join(FACT_TOKENS)}")
        if self.key not in ("mixed", "mean", "prompt"):
            raise ConfigError(f"unknown key rule {self.key!r}; use mixed, mean or prompt")


@dataclass(frozen=True)
class RankOne:
    """An update and the numbers that tell whether it is sound.

    Attributes:
        left: ``[d]`` fp64.
        right: ``[in]`` fp64, a unit vector.
        cosine: Of ``right`` with the key that is divided by.
        mean_cosine: Of ``right`` with the mean key; what ``cosine`` is compared with.
    """

    left: Tensor
    right: Tensor
    cosine: float
    mean_cosine: float

    @property
    def norm(self) -> float:
        """Frobenius norm."""
        return float(torch.linalg.vector_norm(self.left) * torch.linalg.vector_norm(self.right))


def rank_one_update(mean_key: Tensor, key: Tensor, residual: Tensor, factor: Factor | None) -> RankOne:
    """The update that adds ``residual`` to the output for ``key``.

    Args:
        mean_key: ``[in]``, gives the direction ``u = C⁻¹ mean_key``.
        key: ``[in]``, the key at which the residual holds exactly.
        residual: ``[d]``.
        factor: Of ``C``; the identity where absent.

    Raises:
        NumericalError: ``key`` is orthogonal to the direction, so that no rank-one update exists.
    """
    direction = mean_key if factor is None else factor.solve(mean_key)
    right = direction / torch.linalg.vector_norm(direction)
    reach = key @ right
    cosine = float(reach / torch.linalg.vector_norm(key))
    mean_cosine = float(mean_key @ right / torch.linalg.vector_norm(mean_key))
    if not bool(torch.isfinite(reach)) or abs(cosine) < 1e-12:
        raise NumericalError(
            "the key of the plain prompt is orthogonal to the mean key under the statistics; try r_rome"
        )
    return RankOne(residual / reach, right, cosine, mean_cosine)


@dataclass(frozen=True)
class RomeEditor:
    """ROME and R-ROME; see the module. Make one with ``get_editor``."""

    options: EditorOptions
    allowed: Mapping[str, tuple[Any, ...]]

    def edit(
        self,
        handle: ModelHandle,
        requests: Sequence[EditRequest],
        *,
        history: Sequence[WeightPatch] | None = None,
        progress: Progress | None = None,
    ) -> WeightPatch:
        """One patch for all requests: each is computed on top of the ones before it. See ``Editor.edit``."""
        check_requests(requests, one_per_subject=True)
        with handle.writing():
            config, plan, factors, extra = self._prepare(handle, progress)
            parents = [entry.patch.id for entry in handle.applied]
            deltas: dict[str, LowRank] = {}
            traces, guards = [], []
            for index, request in enumerate(requests):
                with temporarily(handle, deltas):
                    part = self._one(handle, request, config, plan, factors)
                deltas = _stacked(deltas, part.deltas)
                traces.extend(part.traces)
                guards.extend(part.guards)
                if progress is not None:
                    progress("edits", index + 1, len(requests))
            extra = {**extra, "values": traces, "guards": guards}
            return make_patch(handle, self.options, plan, requests, deltas, parents, extra)

    def edit_many(
        self, handle: ModelHandle, requests: Sequence[EditRequest], *, progress: Progress | None = None
    ) -> list[WeightPatch]:
        """One patch per request, each as if it were alone, their values searched together.

        The patches equal those of single calls up to rounding. Requests may share subjects: no edit sees another.

        Raises:
            ConfigError: The preset edits several layers, which must be done one after another.
        """
        if not requests:
            return []
        with handle.writing():
            config, plan, factors, extra = self._prepare(handle, progress)
            if len(config.layers) != 1:
                raise ConfigError("edit_many edits one layer; give layers=(...,) with a single one")
            parents = [entry.patch.id for entry in handle.applied]
            parts = self._layer(handle, requests, config.layers[0], config, plan, factors, progress)
            return [
                make_patch(
                    handle,
                    self.options,
                    plan,
                    [request],
                    part.deltas,
                    parents,
                    {**extra, "values": part.traces, "guards": part.guards},
                )
                for request, part in zip(requests, parts, strict=True)
            ]

    def _prepare(
        self, handle: ModelHandle, progress: Progress | None
    ) -> tuple[RomeConfig, Plan, dict[int, Factor], dict[str, Any]]:
        options = _with(self.options, self.allowed)
        config, plan = settle(handle, options, "rome", RomeConfig, PREFIX_LENGTHS)
        check_layers(handle, config.layers)
        stats = key_stats(handle, options, config.layers, progress) if config.covariance else {}
        extra = {"statistics": stats_note(stats)} if stats else {}
        return config, plan, {layer: each.factor() for layer, each in stats.items()}, extra

    def _one(
        self,
        handle: ModelHandle,
        request: EditRequest,
        config: RomeConfig,
        plan: Plan,
        factors: Mapping[int, Factor],
    ) -> _Part:
        whole = _Part({}, [], [])
        for layer in config.layers:
            with temporarily(handle, whole.deltas):
                (part,) = self._layer(handle, [request], layer, config, plan, factors, None)
            whole = _Part(
                {**whole.deltas, **part.deltas}, whole.traces + part.traces, whole.guards + part.guards
            )
        return whole

    def _layer(
        self,
        handle: ModelHandle,
        requests: Sequence[EditRequest],
        layer: int,
        config: RomeConfig,
        plan: Plan,
        factors: Mapping[int, Factor],
        progress: Progress | None,
    ) -> list[_Part]:
        """The updates of one layer for several requests that do not see each other."""
        contexts = plan.prefixes.flat
        rows = [
            row for request in requests for row in request_rows(handle, request, contexts, config.fact_token)
        ]
        read = read_keys(handle, rows, [layer])[layer]
        values = optimise_value(
            handle,
            requests,
            layer,
            Role.MLP,
            plan.prefixes,
            plan.values,
            plan.penalties,
            fact_token=config.fact_token,
            progress=progress,
        )
        weight = handle.weight(Role.MLP_OUT, layer)
        size = float(torch.linalg.matrix_norm(weight.canonical().float()))
        mean = KeyValue(
            *(mean_over_contexts(part, plan.prefixes.weights("mean")) for part in (read.keys, read.values))
        )
        plain = KeyValue(read.keys[:: len(contexts)], read.values[:: len(contexts)])
        parts = []
        for index, (request, value) in enumerate(zip(requests, values, strict=True)):
            update = _update(config.key, index, mean, plain, value, factors.get(layer))
            delta = low_rank(
                update.left[:, None], update.right[None], f"request {request.id!r}, layer {layer}"
            )
            guard = _guard(request, layer, update, size)
            parts.append(
                _Part({weight.name: delta}, [{"layer": layer, **value_trace(request, value)}], [guard])
            )
        return parts


@dataclass(frozen=True)
class _Part:
    deltas: dict[str, LowRank]
    traces: list[dict[str, Any]]
    guards: list[dict[str, Any]]


def _update(
    rule: KeyRule, index: int, mean: KeyValue, plain: KeyValue, value: ValueResult, factor: Factor | None
) -> RankOne:
    target = value.target.detach().to(device="cpu", dtype=torch.float64)
    if rule == "mean":
        return rank_one_update(mean.keys[index], mean.keys[index], target - mean.values[index], factor)
    direction = mean.keys[index] if rule == "mixed" else plain.keys[index]
    return rank_one_update(direction, plain.keys[index], target - plain.values[index], factor)


def _guard(request: EditRequest, layer: int, update: RankOne, size: float) -> dict[str, Any]:
    """Records how sound an update is, and says so aloud when it is not."""
    norm = update.norm / size
    flags = []
    if abs(update.cosine) < SMALLEST_RELATIVE_COSINE * abs(update.mean_cosine):
        flags.append("plain key far from the mean key")
    if norm > LARGEST_RELATIVE_NORM:
        flags.append("large update")
    if flags:
        logging.getLogger(__name__).warning(
            "request %r, layer %d: %s (norm %.2f of the weight's, key cosine %.3g against %.3g of the mean key)",
            request.id,
            layer,
            " and ".join(flags),
            norm,
            update.cosine,
            update.mean_cosine,
        )
    return {
        "id": request.id,
        "layer": layer,
        "relative_norm": norm,
        "cosine": update.cosine,
        "mean_cosine": update.mean_cosine,
        "flags": flags,
    }


def _stacked(first: Mapping[str, LowRank], second: Mapping[str, LowRank]) -> dict[str, LowRank]:
    out = dict(first)
    for name, delta in second.items():
        if name in out:
            before = out[name]
            delta = LowRank(
                torch.cat([before.left, delta.left], dim=1), torch.cat([before.right, delta.right], dim=0)
            )
        out[name] = delta
    return out


def _with(options: EditorOptions, allowed: Mapping[str, tuple[Any, ...]]) -> EditorOptions:
    """The options with the editor's own choices put in; a choice that belongs to another editor is refused."""
    chosen = {name: options.overrides.get(name, choices[0]) for name, choices in allowed.items()}
    for name, value in chosen.items():
        if value not in allowed[name]:
            raise ConfigError(
                f"{options.spec!r} means {name}={' or '.join(map(repr, allowed[name]))}, not {value!r}; "
                "rome, rome_identity and r_rome are different editors"
            )
    return replace(options, overrides={**options.overrides, **chosen})


def _builder(**allowed: tuple[Any, ...]) -> Callable[[EditorOptions], Editor]:
    def build(options: EditorOptions) -> Editor:
        return RomeEditor(options, allowed)

    return build


ROME = Method(
    "rome",
    "Rank-one edit of one MLP, with key statistics",
    "Meng et al. 2022, arXiv 2202.05262",
    "key statistics once per model; then seconds per fact",
    True,
    _builder(key=("mixed",), covariance=(True,)),
)
ROME_IDENTITY = Method(
    "rome_identity",
    "ROME without key statistics (C = I), EasyEdit's default",
    "Meng et al. 2022, arXiv 2202.05262; EasyEdit, mom2_adjustment: false",
    "seconds per fact",
    True,
    _builder(key=("mixed",), covariance=(False,)),
    section="rome",
)
R_ROME = Method(
    "r_rome",
    "ROME with one key throughout, stable in sequences",
    "Gupta et al. 2024, arXiv 2403.07175",
    "key statistics once per model; then seconds per fact",
    True,
    _builder(key=("mean", "prompt"), covariance=(True,)),
    section="rome",
)
