"""Arithmetic on weights: task-vector negation, model-state arithmetic, and leaving out a patch's largest changes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from editors.base import check_names
from editors.tuning import check_positive
from editors.unlearning import losses
from editors.unlearning.base import UNLEARNERS, Unlearner, UnlearnMethod, UnlearnOptions
from editors.unlearning.gradient import check_facts
from editors.unlearning.methods import builder
from editors.unlearning.plain import names_of, origin, told, weight_patch
from editors.unlearning.settings import SHARED, GradientConfig
from editors.unlearning.sides import Kind
from editors.unlearning.trainer import Objective
from editors.values import Progress
from lab.errors import BaseMismatchError, ConfigError
from lab.handle import ModelHandle
from lab.patch import Delta, Dense, WeightPatch
from lab.records import Fact


def _learn(batch: Mapping[Kind, Any], config: GradientConfig) -> Tensor:
    return losses.answer_nll(batch["answer"].logits, batch["answer"].labels)


_REINFORCE = builder(Objective(_learn, retain=None), stop_above=None)


def reinforce(
    handle: ModelHandle,
    facts: Sequence[Fact],
    *,
    seed: int = 0,
    progress: Progress | None = None,
    **training: Any,
) -> WeightPatch:
    """Fine-tunes on facts: the vector that merging subtracts, or a text learned by heart before ``ga_lora`` is to take it away.

    Args:
        handle: The model; left as it was.
        facts: What to learn.
        seed: Of the order.
        progress: Told about every update.
        **training: Settings that all methods that train share (``lr``, ``epochs``, ``weights``).
    """
    made = _REINFORCE(UnlearnOptions("reinforce", seed, training))
    patch = made.unlearn(handle, facts, progress=progress)
    assert isinstance(patch, WeightPatch)
    return patch


@dataclass(frozen=True)
class MergeConfig:
    """Settings beside those of the training.

    Attributes:
        strength: α: how often the vector of the facts to forget is subtracted.
        keep_strength: β of ``msa``: how often that of retained facts is added.
        before: ``msa``: a handle, or a folder or name, of the model from before it learned the facts; vectors are taken from
            there. Without it they are taken from the model itself.
    """

    strength: float = 1.0
    keep_strength: float = 1.0
    before: str | ModelHandle | None = None

    def __post_init__(self) -> None:
        check_positive(self, "strength")
        if not self.keep_strength >= 0:
            raise ConfigError(f"keep_strength must not be negative, it is {self.keep_strength}")


@dataclass(frozen=True)
class MergeUnlearner:
    """``θ - α(θ₁ - θ₀) + β(θ₂ - θ₀)`` with θ₁, θ₂ trained from θ₀ on facts to forget and on retained ones.

    Attributes:
        options: How to run.
        config: Settings.
        training: Settings of both fine-tunes.
        keeps: Whether the second vector is there (``msa``).
        settings: Names of all settings.
    """

    options: UnlearnOptions
    config: MergeConfig
    training: Mapping[str, Any]
    keeps: bool
    settings: frozenset[str]

    def unlearn(
        self,
        handle: ModelHandle,
        forget: Sequence[Fact],
        retain: Sequence[Fact] = (),
        *,
        progress: Progress | None = None,
    ) -> WeightPatch:
        """See ``Unlearner.unlearn``.

        Raises:
            BaseMismatchError: ``before`` is a model of other shapes.
        """
        config, seed = self.config, self.options.seed
        check_facts(self.options.name, forget, retain, needs_retain=self.keeps)
        start = self._start(handle)
        away = reinforce(start, forget, seed=seed, progress=progress, **self.training)
        deltas = _scaled(away, -config.strength)
        notes = {"forget": away.provenance.extra}
        if self.keeps and config.keep_strength:
            kept = reinforce(start, retain, seed=seed, progress=progress, **self.training)
            total = replace(away, deltas=deltas) + replace(kept, deltas=_scaled(kept, config.keep_strength))
            deltas, notes = dict(total.deltas), {**notes, "retain": kept.provenance.extra}
        for name, delta in deltas.items():
            if tuple(delta.shape) != _shape(handle, name):
                raise BaseMismatchError(
                    f"{name!r} is {tuple(delta.shape)} in {start.name!r} and {_shape(handle, name)} in {handle.name!r}; "
                    "before= must be an earlier state of the same model"
                )
        settings = {**told(config), **self.training, "before": start.name if config.before else None}
        own = {name: value for name, value in settings.items() if name in self.settings}
        return weight_patch(handle, deltas, origin(self.options, own, forget, notes))

    def _start(self, handle: ModelHandle) -> ModelHandle:
        before = self.config.before
        if before is None or isinstance(before, ModelHandle):
            return before or handle
        return ModelHandle.load(before, dtype=handle.dtype, device=handle.device)


def _shape(handle: ModelHandle, name: str) -> tuple[int, ...]:
    weight = handle.named_weight(name)
    return tuple(weight.shape) if weight.parameter.dim() == 2 else tuple(weight.parameter.shape)


def _scaled(patch: WeightPatch, factor: float) -> dict[str, Delta]:
    return {name: delta.scaled(factor) for name, delta in patch.deltas.items()}


def ignore_top(patch: WeightPatch, share: float) -> WeightPatch:
    """A patch without its largest changes: Outlandish's pruning (Sun et al. 2025, arXiv 2504.09522; from the paper's text).

    Args:
        patch: Of any fine-tune.
        share: Share of all changed entries, by size over all weights together, that goes back to what it was.

    Raises:
        ConfigError: The share does not lie in [0, 1).
    """
    if not 0 <= share < 1:
        raise ConfigError(f"share must lie in [0, 1), it is {share}")
    dense = {name: delta.dense() for name, delta in patch.deltas.items()}
    sizes = torch.cat([change.abs().flatten() for change in dense.values()] or [torch.zeros(0)])
    changed = int((sizes > 0).sum())
    dropped = int(share * changed)
    if not dropped:
        return patch
    # kthvalue and not topk: every entry at the limit goes, so that the order of weights decides nothing.
    limit = sizes.kthvalue(len(sizes) - dropped + 1).values
    deltas = {
        name: Dense(torch.where(change.abs() >= limit, torch.zeros_like(change), change))
        for name, change in dense.items()
    }
    extra = {**patch.provenance.extra, "ignored": share, "ignored_from": patch.id}
    return replace(patch, deltas=deltas, provenance=replace(patch.provenance, extra=extra))


@dataclass(frozen=True)
class IgnoreUnlearner:
    """Another method, and ``ignore_top`` behind it.

    Attributes:
        options: How to run.
        host: The method.
        share: See ``ignore_top``.
        settings: Names of all settings.
    """

    options: UnlearnOptions
    host: Unlearner
    share: float
    settings: frozenset[str]

    def unlearn(
        self,
        handle: ModelHandle,
        forget: Sequence[Fact],
        retain: Sequence[Fact] = (),
        *,
        progress: Progress | None = None,
    ) -> WeightPatch:
        """See ``Unlearner.unlearn``."""
        made = self.host.unlearn(handle, forget, retain, progress=progress)
        if not isinstance(made, WeightPatch):
            raise ConfigError(
                f"{made.provenance.method!r} changes no weight, so none of its changes can be left out"
            )
        pruned = ignore_top(made, self.share)
        config = {**made.provenance.config, "method": made.provenance.method, "share": self.share}
        return replace(pruned, provenance=origin(self.options, config, forget, pruned.provenance.extra))


def _merge(keeps: bool, **defaults: Any) -> Callable[[UnlearnOptions], MergeUnlearner]:
    own = names_of(MergeConfig) if keeps else frozenset({"strength"})

    def build(options: UnlearnOptions) -> MergeUnlearner:
        check_names(options.name, options.overrides, own | SHARED)
        chosen = {**defaults, **options.overrides}
        training = {name: value for name, value in chosen.items() if name in SHARED}
        _REINFORCE(UnlearnOptions(options.name, options.seed, training))  # refuses what makes no sense now
        config = MergeConfig(**{name: value for name, value in chosen.items() if name in own})
        return MergeUnlearner(options, config, training, keeps, own | SHARED)

    return build


def _ignore(options: UnlearnOptions) -> IgnoreUnlearner:
    chosen = dict(options.overrides)
    name, share = chosen.pop("method", "npo"), chosen.pop("share", 0.08)
    if not 0 <= share < 1:
        raise ConfigError(f"share must lie in [0, 1), it is {share}")
    host = UNLEARNERS.get(name).build(UnlearnOptions(name, options.seed, chosen))
    known = getattr(host, "settings", frozenset())
    return IgnoreUnlearner(options, host, share, frozenset({"method", "share"}) | known)


TASK_VECTOR = UnlearnMethod(
    "task_vector",
    "Subtracts what a fine-tune on the facts changes",
    "Ilharco et al. 2023, arXiv 2212.04089, as in Shi et al. 2024, arXiv 2407.06460",
    "as ga",
    "merging",
    "verified",
    _merge(False),
)
MSA = UnlearnMethod(
    "msa",
    "Model-state arithmetic: minus the facts to forget, plus the retained ones, from an earlier state",
    "Model-state arithmetic, as described beside arXiv 2407.06460",
    "twice task_vector, and the earlier state in memory",
    "merging",
    "reconstructed",
    _merge(True),
)
IGNORE_K = UnlearnMethod(
    "ignore_k",
    "Another method without the largest of its changes",
    "Sun et al. 2025, arXiv 2504.09522",
    "that of the other method",
    "surgery",
    "reconstructed",
    _ignore,
)
