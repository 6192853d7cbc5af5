"""LoRA fine-tuning on the edit itself (Hu et al. 2021, arXiv 2106.09685), through peft; the adapter leaves as a patch.

The adapter is trained by ``lab.training.fit`` on each target token after the ones before it, then taken off; its factors,
scaled by alpha / rank, are the patch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from editors.base import Editor, EditorOptions, Method, check_layers
from editors.rows import check_requests
from editors.tuning import (
    TargetLines,
    check_finite,
    check_positive,
    chunks,
    plain_settings,
    provenance,
    settle_plain,
    target_lines,
)
from editors.values import Progress
from lab.arch import Role
from lab.errors import ConfigError, MissingDependencyError
from lab.handle import ModelHandle
from lab.patch import WeightPatch
from lab.records import EditRequest
from lab.training import fit

MODULES = ("query_value", "mlp")


@dataclass(frozen=True)
class LoraEditConfig:
    """Settings.

    Attributes:
        layers: Blocks that get an adapter; all without any.
        modules: ``query_value``: the attention's query and value projections (fused with the key's in some families);
            ``mlp``: both projections of the MLP.
        rank, alpha, dropout: Of the adapter.
        steps: Passes over the requests.
        lr: Learning rate of Adam.
        batch_size: Requests per update.
        stop_below: Training ends when the mean loss of a pass is below this.
    """

    layers: tuple[int, ...] = ()
    modules: str = "query_value"
    rank: int = 8
    alpha: float = 32.0
    dropout: float = 0.1
    steps: int = 70
    lr: float = 5e-3
    batch_size: int = 32
    stop_below: float = 1e-2

    def __post_init__(self) -> None:
        check_positive(self, "rank", "alpha", "steps", "lr", "batch_size")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"dropout must lie in [0, 1), it is {self.dropout}")
        if self.modules not in MODULES:
            raise ConfigError(f"unknown modules {self.modules!r}; use one of {', '.join(MODULES)}")


@dataclass(frozen=True)
class LoraEditor:
    """See the module. Make one with ``get_editor``."""

    options: EditorOptions

    def edit(
        self,
        handle: ModelHandle,
        requests: Sequence[EditRequest],
        *,
        history: Sequence[WeightPatch] | None = None,
        progress: Progress | None = None,
    ) -> WeightPatch:
        """One low-rank patch for all requests together. See ``Editor.edit``."""
        check_requests(requests, one_per_subject=False)
        config, preset = settle_plain(handle, self.options, "lora", LoraEditConfig)
        if config.layers:
            check_layers(handle, config.layers)
        groups = chunks(requests, config.batch_size)
        batches = [
            target_lines(handle, [(request.text, request.target_new) for request in group])
            for group in groups
        ]
        trainer = EditTrainer(handle, groups, batches, config, progress)
        patch = fit(
            handle,
            trainer.on,
            lora=adapter(handle, config.modules, config.layers, config.rank, config.alpha, config.dropout),
            seed=self.options.seed,
        )
        made = provenance(self.options, plain_settings(config), preset, requests, trainer.notes)
        return replace(patch, provenance=made)


def adapter(
    handle: ModelHandle, modules: str, layers: Sequence[int], rank: int, alpha: float, dropout: float
) -> Any:
    """The ``peft.LoraConfig`` for some projections, named exactly (a name's ending would also match other layers').

    Args:
        handle: The model.
        modules: As in ``LoraEditConfig``.
        layers: Blocks; all without any.
        rank, alpha, dropout: Of the adapter.

    Raises:
        MissingDependencyError: peft is not installed.
    """
    try:
        from peft import LoraConfig
    except ImportError:
        raise MissingDependencyError("peft", "training a LoRA adapter", "train") from None
    paths: list[str] = []
    for layer in layers or range(handle.n_layers):
        if modules == "mlp":
            paths += [handle.arch.path(role, layer) for role in (Role.MLP_IN, Role.MLP_OUT)]
        else:
            paths += handle.arch.query_value_paths(layer)
    return LoraConfig(
        r=rank,
        lora_alpha=alpha,  # type: ignore[arg-type]
        lora_dropout=dropout,
        target_modules=paths,
        fan_in_fan_out=handle.named_weight(f"{paths[0]}.weight").transposed,
        task_type="CAUSAL_LM",
    )


def adapter_dropout(model: torch.nn.Module, on: bool) -> None:
    """Switches the dropout of all adapters in a model, and no other."""
    from peft.tuners.lora import LoraLayer

    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.lora_dropout.train(on)


@dataclass
class EditTrainer:
    """Trains whatever of a model asks for gradients on fixed batches; ``notes`` says how it went.

    Attributes:
        handle: The model; ``fit`` has put the adapter into it.
        groups: Requests per batch.
        batches: Their rows.
        config: Settings.
        progress: Told about every pass.
        notes: Mean loss of every pass, and each request's target probability with the finished adapter.
    """

    handle: ModelHandle
    groups: Sequence[Sequence[EditRequest]]
    batches: Sequence[TargetLines]
    config: LoraEditConfig
    progress: Progress | None = None
    notes: Mapping[str, Any] = field(default_factory=dict)

    def on(self, model: Any, reference: Any) -> EditTrainer:
        """As ``fit`` wants it; the adapter sits inside the handle's own model."""
        return self

    @torch.enable_grad()
    def train(self) -> None:
        """Runs all passes."""
        config, model = self.config, self.handle.model
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        adam = torch.optim.Adam(parameters, lr=config.lr)
        adapter_dropout(model, True)
        means: list[float] = []
        for step in range(config.steps):
            total = 0.0
            for group, lines in zip(self.groups, self.batches, strict=True):
                losses = self._losses(lines, grad=True)
                check_finite(losses, group, step)
                adam.zero_grad()
                losses.mean().backward()
                adam.step()
                total += float(losses.detach().sum())
            means.append(total / sum(len(group) for group in self.groups))
            done = means[-1] < config.stop_below
            if self.progress is not None:
                self.progress("steps", config.steps if done else step + 1, config.steps)
            if done:
                break
        adapter_dropout(model, False)
        last = []
        for group, lines in zip(self.groups, self.batches, strict=True):
            chances = (-self._losses(lines, grad=False)).exp().tolist()
            last += [
                {"id": request.id, "p_target": chance} for request, chance in zip(group, chances, strict=True)
            ]
        self.notes = {"losses": means, "last": last}

    def _losses(self, lines: TargetLines, *, grad: bool) -> torch.Tensor:
        logits = self.handle.logits(lines.batch, grad=grad, logits_to_keep=lines.keep)
        return lines.row_losses(lines.of(logits))


def _build(options: EditorOptions) -> Editor:
    return LoraEditor(options)


LORA = Method(
    "lora",
    "A LoRA adapter trained on the edit, through peft",
    "Hu et al. 2021, arXiv 2106.09685; EasyEdit, hparams/LoRA",
    "a few seconds per fact",
    False,
    _build,
)
