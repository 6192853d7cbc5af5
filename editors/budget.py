"""What an edit may do to everything else: measured before it is used, refused or reported where it goes too far."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Literal

from lab.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

    from lab.eval.patches import Patch
    from lab.handle import ModelHandle
    from lab.records import EditRequest

_ROWS = 64


@dataclass(frozen=True)
class SideEffects:
    """What a patch does beside its edit; ``None`` where it was not measured.

    Attributes:
        relative_norm: Largest Frobenius norm of a delta over that of the weight it changes, over all parameters.
        neighborhood_kl: KL(before ‖ after) of the next token after prompts that the edit is not about, mean over prompts.
        attention_drift: How much more the most drawn head of any layer looks at the edited subject (SADR's measure).
    """

    relative_norm: float | None = None
    neighborhood_kl: float | None = None
    attention_drift: float | None = None


@dataclass(frozen=True)
class Budget:
    """Limits on the side effects of each edit of a session, against the model right before it.

    Attributes:
        relative_norm, neighborhood_kl, attention_drift: As in ``SideEffects``; ``None`` sets no limit, and is not measured.
        action: ``refuse`` leaves an edit out, ``warn`` makes it and says so.
        prompts: What must stay as it is; without it, the neighbors that a case brings along.

    Raises:
        ConfigError: A limit that is no number from 0 on, or an unknown action.
    """

    relative_norm: float | None = None
    neighborhood_kl: float | None = None
    attention_drift: float | None = None
    action: Literal["refuse", "warn"] = "refuse"
    prompts: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.action not in ("refuse", "warn"):
            raise ConfigError(f"unknown action {self.action!r} of a budget; use refuse or warn")
        for name, limit in self.limits.items():
            if not 0 <= limit < math.inf:
                raise ConfigError(f"the limit {name} of a budget must be a number from 0 on, it is {limit}")

    @property
    def limits(self) -> dict[str, float]:
        """The limits that are set."""
        named = {field.name: getattr(self, field.name) for field in fields(SideEffects)}
        return {name: limit for name, limit in named.items() if limit is not None}

    def exceeded(self, effects: SideEffects) -> tuple[str, ...]:
        """Which limits ``effects`` exceed, in words."""
        found = []
        for name, limit in self.limits.items():
            value = getattr(effects, name)
            # A figure that is no number is no proof of harmlessness.
            if value is not None and not value <= limit:
                found.append(f"{name} {value:.3g} is over the limit {limit:.3g}")
        return tuple(found)

    def measure(
        self, handle: ModelHandle, patch: Patch, requests: Sequence[EditRequest], neighbors: Sequence[str]
    ) -> SideEffects:
        """Measures what is limited; the model is left as it was.

        Args:
            handle: The model without the patch.
            patch: Weights or memory; a memory has no norm.
            requests: What the patch is for.
            neighbors: Prompts that it is not for; ``prompts`` goes before them.

        Raises:
            ConfigError: ``neighborhood_kl`` is limited and there is no prompt to measure it on.
        """
        prompts = self.prompts or tuple(dict.fromkeys(neighbors))
        if self.neighborhood_kl is not None and not prompts:
            named = ", ".join(request.id for request in requests)
            raise ConfigError(
                f"the budget limits neighborhood_kl, but {named} has no neighbors; give prompts="
            )
        return SideEffects(
            None if self.relative_norm is None else relative_norm(handle, patch),
            None if self.neighborhood_kl is None else neighborhood_kl(handle, patch, prompts),
            None if self.attention_drift is None else _drift(handle, patch, requests),
        )


def relative_norm(handle: ModelHandle, patch: Patch) -> float | None:
    """See ``SideEffects``; ``None`` for what changes no weight."""
    from lab.eval.patches import parts
    from lab.patch import WeightPatch

    found = []
    for part in parts(patch):
        if isinstance(part, WeightPatch):
            for name, norm in part.norms().items():
                size = float(handle.named_weight(name).canonical().double().norm())
                found.append(norm / size if size else math.inf)
    return max(found, default=None)


def neighborhood_kl(handle: ModelHandle, patch: Patch, prompts: Sequence[str]) -> float:
    """See ``SideEffects``."""
    from lab.scoring import kl_divergence

    total = 0.0
    for begin in range(0, len(prompts), _ROWS):
        chunk = prompts[begin : begin + _ROWS]
        before = _next_token(handle, chunk)
        with patch.applied(handle):
            after = _next_token(handle, chunk)
        total += float(kl_divergence(before, after, reduction="sum"))
    return total / len(prompts)


def _next_token(handle: ModelHandle, prompts: Sequence[str]) -> Tensor:
    """Log-probabilities ``[prompt, vocabulary]`` of the token after each prompt."""
    from lab.scoring import log_probs

    return log_probs(
        handle.logits(handle.encode(handle.rewrite(prompts), side="left"), logits_to_keep=1)[:, -1]
    )


def _drift(handle: ModelHandle, patch: Any, requests: Sequence[EditRequest]) -> float:
    from lab.attention import attention_drift

    prompts = [request.prompt for request in requests]
    report = attention_drift(handle, patch, prompts, [request.subject for request in requests])
    return float(report.max_head.max())
