"""Settings of the gradient methods, and the refusals that two of them teach."""

from __future__ import annotations

from dataclasses import dataclass

from editors.lora import MODULES
from editors.tuning import check_positive
from lab.errors import ConfigError

WEIGHTS = ("full", "layers", "lora")

REFUSALS = (
    "not known to me",
    "something I cannot say",
    "unknown",
    "not something I know",
    "nothing I have learned",
    "beyond what I know",
    "a question I cannot answer",
    "not in my memory",
    "something I was never told",
    "hard to say, as I do not know it",
)
"""What stands for an answer in ``dpo`` and ``refusal``; each continues a cloze prompt and answers a question."""


@dataclass(frozen=True)
class GradientConfig:
    """Settings of all gradient methods; each method takes those that its loss reads.

    Attributes:
        lr: Learning rate of AdamW.
        epochs: Passes over the facts to forget.
        max_steps: Ends training after this many updates.
        batch_size: Facts to forget in one update; as many retained ones are drawn beside them.
        weight_decay: Of AdamW.
        weights: What is trained: ``full`` (all), ``layers`` (everything in chosen blocks), ``lora`` (an adapter).
        layers: The blocks for ``layers``, and for ``lora`` (all without any).
        modules, rank, alpha: Of the adapter, as in the editor ``lora``.
        forget_weight: γ.
        retain_weight: α; the retain term exists where retained facts are given.
        stop_above: Training ends when a batch's mean token loss on facts to forget exceeds this many times ln(vocabulary),
            that is, when they are less likely than a uniform guess; ``None`` never.
        stop_retain: Training ends when a batch of retained facts has lost more than this many nats per token; ``None`` never.
        beta: β of ``npo``, ``npo_mean``, ``simnpo``, ``dpo``, ``wga``, ``undial``.
        margin: δ of ``simnpo``.
        saturation, importance: β₁ and β₂ of ``satimp``.
        skip_first: Answer tokens that ``ce_u`` leaves out.
        refusals: Texts of ``dpo`` and ``refusal``; each fact is given one, drawn once.
    """

    lr: float = 1e-4
    epochs: int = 5
    max_steps: int | None = None
    batch_size: int = 16
    weight_decay: float = 0.01
    weights: str = "full"
    layers: tuple[int, ...] = ()
    modules: str = "mlp"
    rank: int = 8
    alpha: float = 16.0
    forget_weight: float = 1.0
    retain_weight: float = 1.0
    stop_above: float | None = 1.0
    stop_retain: float | None = 1.0
    beta: float = 0.1
    margin: float = 0.0
    saturation: float = 5.0
    importance: float = 1.0
    skip_first: int = 0
    refusals: tuple[str, ...] = REFUSALS

    def __post_init__(self) -> None:
        check_positive(self, "lr", "epochs", "batch_size", "rank", "alpha", "forget_weight")
        for name in ("max_steps", "stop_above", "stop_retain"):
            if getattr(self, name) is not None:
                check_positive(self, name)
        for name in ("weight_decay", "retain_weight", "beta", "saturation", "importance", "skip_first"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"{name} must not be negative, it is {getattr(self, name)}")
        if self.weights not in WEIGHTS:
            raise ConfigError(f"unknown weights {self.weights!r}; use one of {', '.join(WEIGHTS)}")
        if self.modules not in MODULES:
            raise ConfigError(f"unknown modules {self.modules!r}; use one of {', '.join(MODULES)}")
        if (self.weights == "layers" and not self.layers) or (self.weights == "full" and self.layers):
            raise ConfigError('weights="layers" needs layers=(...), and weights="full" takes none')
        if not self.refusals:
            raise ConfigError("refusals must name at least one text")


SHARED = frozenset(
    {
        "lr",
        "epochs",
        "max_steps",
        "batch_size",
        "weight_decay",
        "weights",
        "layers",
        "modules",
        "rank",
        "alpha",
    }
)
"""Settings that every gradient method takes."""
