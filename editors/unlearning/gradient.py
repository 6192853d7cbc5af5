"""``GradientUnlearner``: minimises a forget loss, with or without a retain term, and gives back what changed as a patch.

One class serves every method that trains; a method is an ``Objective`` and its settings (``methods.py``), with a ``Procedure``
where its updates are more than a loss of answers. Losses fall on answer tokens only. What the untouched model says is computed
once, before the first update, on that very model: there is no second one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from editors.base import EditorOptions, check_layers, key_stats
from editors.lora import adapter
from editors.tuning import plain_settings
from editors.unlearning.base import Unlearner
from editors.unlearning.checkpoint import Checkpoint
from editors.unlearning.settings import GradientConfig
from editors.unlearning.trainer import Objective, UnlearningTrainer
from editors.values import Progress
from lab.arch import Role
from lab.errors import ConfigError, RequestError
from lab.handle import ModelHandle
from lab.patch import Provenance, WeightPatch, library_versions
from lab.records import Fact
from lab.stats import StatsCache
from lab.training import fit


@dataclass(frozen=True)
class GradientUnlearner:
    """A method that trains; make one with ``get_unlearner``.

    Attributes:
        name: The method.
        objective: Its terms.
        config: Its settings.
        settings: Names of the settings that it takes, for the provenance.
        seed: Seeds everything that is drawn.
        checkpoint: Folder that keeps the state after every pass; a run that finds its own there goes on from it.
    """

    name: str
    objective: Objective
    config: GradientConfig
    settings: frozenset[str]
    seed: int = 0
    checkpoint: Path | None = None

    def unlearn(
        self,
        handle: ModelHandle,
        forget: Sequence[Fact],
        retain: Sequence[Fact] = (),
        *,
        progress: Progress | None = None,
    ) -> WeightPatch:
        """One patch for all facts together. See ``Unlearner.unlearn``."""
        config, objective = self.config, self.objective
        check_facts(self.name, forget, retain, needs_retain=objective.needs_retain)
        if config.layers:
            check_layers(handle, config.layers)
        trainer = UnlearningTrainer(
            handle,
            objective,
            config,
            forget=forget,
            retain=retain if objective.retain is not None and config.retain_weight > 0 else (),
            seed=self.seed,
            progress=progress,
            others=retain,
            checkpoint=self._checkpoint(handle, forget, retain),
            moments=self._moments(handle, retain, progress),
        )
        if config.weights == "lora":
            lora = adapter(handle, config.modules, config.layers, config.rank, config.alpha, 0.0)
            patch = fit(handle, trainer.on, lora=lora, seed=self.seed)
        else:
            names = trained(handle, config.layers, self._only(handle))
            patch = fit(handle, trainer.on, weights=names, seed=self.seed, spill=config.spill)
        plain = {name: value for name, value in plain_settings(config).items() if name in self.settings}
        requests = tuple(fact.to_json() for fact in forget)
        made = Provenance(self.name, plain, requests, self.seed, library_versions(), trainer.notes)
        return replace(patch, provenance=made)

    def _moments(
        self, handle: ModelHandle, retain: Sequence[Fact], progress: Progress | None
    ) -> Mapping[str, Tensor]:
        """Of general text, where the guard cannot ask retained facts."""
        config = self.config
        reads = self.objective.retain is not None and config.retain_weight > 0 and bool(retain)
        if config.guard is None or reads:
            return {}
        with handle.writing():
            stats = key_stats(
                handle, EditorOptions(self.name, stats=StatsCache(), corpus="auto"), config.layers, progress
            )
        return {handle.weight(Role.MLP_OUT, layer).name: each.moment for layer, each in stats.items()}

    def _checkpoint(
        self, handle: ModelHandle, forget: Sequence[Fact], retain: Sequence[Fact]
    ) -> Checkpoint | None:
        if self.checkpoint is None:
            return None
        identity = {
            "model": handle.fingerprint,
            "applied": [entry.patch.id for entry in handle.applied],
            "method": self.name,
            "config": plain_settings(self.config),
            "seed": self.seed,
            "facts": [[fact.to_json() for fact in facts] for facts in (forget, retain)],
        }
        return Checkpoint(self.checkpoint, identity)

    def _only(self, handle: ModelHandle) -> Sequence[str] | None:
        """Names of what is trained where it is neither everything nor whole blocks."""
        config = self.config
        if config.weights == "full":
            return self.objective.trains(handle, config) if self.objective.trains is not None else None
        return mlp_weights(handle, config) if config.weights in ("mlp", "mlp_out") else None


def with_checkpoint(unlearner: Unlearner, folder: Path) -> GradientUnlearner:
    """The same method, which keeps its state in a folder and goes on from what it finds there.

    Raises:
        ConfigError: The method does not train in passes.
    """
    if not isinstance(unlearner, GradientUnlearner):
        raise ConfigError(
            "only methods that train pass by pass keep checkpoints; this one has nothing to go on from"
        )
    return replace(unlearner, checkpoint=folder)


def mlp_weights(handle: ModelHandle, config: GradientConfig) -> list[str]:
    """The matrices of the MLPs of ``config.layers`` (all without any); with ``mlp_out`` the down projections alone."""
    out = config.weights == "mlp_out"
    roles = (Role.MLP_OUT,) if out else (Role.MLP_IN, Role.MLP_UP, Role.MLP_OUT)
    layers = config.layers or range(handle.n_layers)
    return [
        handle.weight(role, layer).name for layer in layers for role in roles if role in handle.arch.paths
    ]


def check_facts(
    name: str, forget: Sequence[Fact], retain: Sequence[Fact], *, needs_retain: bool = False
) -> None:
    """Refuses facts that no method can work on.

    Raises:
        RequestError: Nothing to forget, nothing to retain where that is needed, or a fact in both lists.
    """
    if not forget:
        raise RequestError("no facts to forget were given")
    if needs_retain and not retain:
        raise RequestError(f"{name!r} holds retained facts in place; give some")
    wanted = {(fact.text, fact.object) for fact in forget}
    for fact in retain:
        if (fact.text, fact.object) in wanted:
            raise RequestError(f"the fact {fact.text!r} is both to be forgotten and to be retained")


def trained(handle: ModelHandle, layers: Sequence[int], only: Sequence[str] | None = None) -> list[str]:
    """Names of all floating-point parameters, of those in some blocks, or of chosen ones; a tied one comes once.

    Raises:
        ConfigError: One of them is narrower than fp32, or the model is quantised.
    """
    if handle.quantized:
        raise ConfigError(
            f"{handle.name!r} is quantised, so that most of its weights cannot be trained; load it without quantisation"
        )
    blocks = [handle.module(Role.BLOCK, layer) for layer in layers]
    inside = {id(parameter) for block in blocks for parameter in block.parameters()}
    names = []
    for name, parameter in handle.model.named_parameters():
        chosen = (not layers or id(parameter) in inside) if only is None else name in only
        if parameter.is_floating_point() and chosen:
            if parameter.element_size() < 4:
                raise ConfigError(
                    f"{name!r} is {parameter.dtype}, which rounds small updates away; load the model in float32 "
                    'or set weights="lora"'
                )
            names.append(name)
    return names
