"""Fine-tuning of chosen weights on the edit itself: the baselines FT-L, FT-L with an L∞ constraint, and FT-M.

``ft_l`` takes the cross entropy of *all* target tokens against the one distribution after the prompt (the ROME authors'
baseline, Meng et al. 2022, arXiv 2202.05262, section 3.4); targets of several tokens therefore come out jumbled. ``ft_l_inf``
also keeps every entry of the change within ±ε after each step (Zhu et al. 2020, arXiv 2012.00363). ``ft_m`` takes the cross
entropy of each target token after the ones before it, the prompt masked (EasyEdit's ``target_new`` objective).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from editors.base import Editor, EditorOptions, Method, check_layers
from editors.rows import check_requests
from editors.tuning import (
    Place,
    TargetLines,
    check_finite,
    check_positive,
    chunks,
    functional_logits,
    plain_settings,
    provenance,
    settle_plain,
    target_lines,
)
from editors.values import Progress, frozen
from lab.arch import Role
from lab.errors import ConfigError, NumericalError
from lab.handle import ModelHandle, Weight
from lab.patch import Dense, WeightPatch
from lab.records import EditRequest

ROLES = (Role.MLP_OUT, Role.MLP_IN, Role.ATTN_OUT)


@dataclass(frozen=True)
class FinetuneConfig:
    """Settings of all three.

    Attributes:
        layers: Blocks whose weight is trained.
        role: Which weight: ``mlp_out``, ``mlp_in`` or ``attn_out``.
        steps: Passes over the requests.
        lr: Learning rate of Adam.
        norm_constraint: ε: every entry of the change stays within ±ε; ``None`` leaves it free.
        batch_size: Requests per update.
        stop_below: A batch whose loss is below this makes no update; training ends when the mean of a pass is.
    """

    layers: tuple[int, ...] = (0,)
    role: str = "mlp_out"
    steps: int = 25
    lr: float = 5e-4
    norm_constraint: float | None = None
    batch_size: int = 32
    stop_below: float = 1e-2

    def __post_init__(self) -> None:
        check_positive(self, "steps", "lr", "batch_size")
        if self.norm_constraint is not None and not self.norm_constraint > 0:
            raise ConfigError(f"norm_constraint must be positive, not {self.norm_constraint}")
        if self.role not in ROLES:
            raise ConfigError(f"unknown role {self.role!r}; use one of {', '.join(ROLES)}")


@dataclass(frozen=True)
class FinetuneEditor:
    """One of the three; see the module. Make one with ``get_editor``.

    Attributes:
        options: How to run.
        section: The method's section of the preset table.
        place: Where target tokens are predicted.
        constrained: Whether ``norm_constraint`` must be given (true), must not (false), or may (none).
    """

    options: EditorOptions
    section: str
    place: Place
    constrained: bool | None

    def edit(
        self,
        handle: ModelHandle,
        requests: Sequence[EditRequest],
        *,
        history: Sequence[WeightPatch] | None = None,
        progress: Progress | None = None,
    ) -> WeightPatch:
        """One dense patch for all requests together. See ``Editor.edit``."""
        check_requests(requests, one_per_subject=False)
        config, preset = settle_plain(handle, self.options, self.section, FinetuneConfig)
        check_layers(handle, config.layers)
        if self.constrained is not None and self.constrained != (config.norm_constraint is not None):
            raise ConfigError(
                f"{self.options.spec!r} {'needs' if self.constrained else 'takes no'} norm_constraint; "
                "ft_l leaves the change free, ft_l_inf bounds it"
            )
        with handle.writing(), frozen(handle.model):
            parents = tuple(entry.patch.id for entry in handle.applied)
            weights = [handle.weight(Role(config.role), layer) for layer in config.layers]
            deltas, notes = self._train(handle, requests, weights, config, progress)
        made = provenance(self.options, plain_settings(config), preset, requests, notes)
        return WeightPatch(handle.fingerprint, deltas, made, parents)

    @torch.enable_grad()
    def _train(
        self,
        handle: ModelHandle,
        requests: Sequence[EditRequest],
        weights: Sequence[Weight],
        config: FinetuneConfig,
        progress: Progress | None,
    ) -> tuple[dict[str, Dense], dict[str, Any]]:
        groups = chunks(requests, config.batch_size)
        batches = [
            target_lines(handle, [(request.text, request.target_new) for request in group], self.place)
            for group in groups
        ]
        # The change itself is the variable: its bound is then exact, whatever the weight is rounded to.
        change = {weight.name: _zeros(weight) for weight in weights}
        adam = torch.optim.Adam(list(change.values()), lr=config.lr)
        updates, means, last = 0, [], {}
        for step in range(config.steps):
            for group, lines in zip(groups, batches, strict=True):
                losses = _losses(handle, lines, weights, change)
                check_finite(losses, group, step)
                last |= zip([request.id for request in group], losses.tolist(), strict=True)
                loss = losses.mean()
                if float(loss.detach()) < config.stop_below:
                    continue
                gradients = torch.autograd.grad(loss, list(change.values()))
                for variable, gradient in zip(change.values(), gradients, strict=True):
                    variable.grad = gradient
                adam.step()
                updates += 1
                _project(change.values(), config.norm_constraint)
            means.append(sum(last.values()) / len(last))
            done = means[-1] < config.stop_below
            if progress is not None:
                progress("steps", config.steps if done else step + 1, config.steps)
            if done:
                break
        notes = {
            "updates": updates,
            "losses": means,
            "last": [{"id": name, "loss": loss} for name, loss in last.items()],
        }
        return {weight.name: _delta(weight, change[weight.name]) for weight in weights}, notes


def _zeros(weight: Weight) -> Tensor:
    wide = torch.promote_types(weight.parameter.dtype, torch.float32)
    return torch.zeros_like(weight.parameter, dtype=wide, requires_grad=True)


def _losses(
    handle: ModelHandle, lines: TargetLines, weights: Sequence[Weight], change: Mapping[str, Tensor]
) -> Tensor:
    """Loss of each request under the changed weights, ``[request]``."""
    replaced = {}
    for weight in weights:
        delta = change[weight.name]
        base = weight.parameter.detach()
        replaced[weight.name] = (base.to(delta.dtype) + delta).to(base.dtype)
    return lines.row_losses(lines.of(functional_logits(handle, lines, replaced)))


@torch.no_grad()
def _project(changes: Any, bound: float | None) -> None:
    if bound is not None:
        for change in changes:
            change.clamp_(-bound, bound)


def _delta(weight: Weight, change: Tensor) -> Dense:
    found = change.detach()
    if not bool(torch.isfinite(found).all()):
        raise NumericalError(f"{weight.name!r}: the change holds NaN or infinity; try a smaller lr")
    return Dense(found.T if weight.transposed else found)


def _builder(section: str, place: Place, constrained: bool | None) -> Callable[[EditorOptions], Editor]:
    def build(options: EditorOptions) -> Editor:
        return FinetuneEditor(options, section, place, constrained)

    return build


FT_L = Method(
    "ft_l",
    "Fine-tuning of one MLP on the first-token distribution",
    "Meng et al. 2022, arXiv 2202.05262, baseline FT",
    "about a second per fact",
    False,
    _builder("ft_l", "last", False),
)
FT_L_INF = Method(
    "ft_l_inf",
    "FT-L with every entry of the change bounded",
    "Zhu et al. 2020, arXiv 2012.00363; Meng et al. 2022, baseline FT+L",
    "about a second per fact",
    False,
    _builder("ft_l_inf", "last", True),
)
FT_M = Method(
    "ft_m",
    "Fine-tuning of one MLP on the target, prompt masked",
    "EasyEdit, objective target_new",
    "about a second per fact",
    False,
    _builder("ft_m", "each", None),
)
