"""What every unlearner shares: the protocol, the registry, and how one is made from its name."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from editors.values import Progress
from lab.handle import ModelHandle
from lab.memory import MemoryPatch
from lab.patch import WeightPatch
from lab.records import Fact
from lab.registry import Registry

Family = Literal["parameter optimisation", "merging", "closed form", "surgery", "in-context"]
"""``parameter optimisation``: training on a loss. ``merging``: arithmetic on weights. ``closed form``: a solved equation.
``surgery``: chosen weights are overwritten. ``in-context``: a text before the prompt, and no weight changes."""


class Unlearner(Protocol):
    """Turns facts to forget into a patch. The model is bit-identical after ``unlearn``, also when it raises."""

    def unlearn(
        self,
        handle: ModelHandle,
        forget: Sequence[Fact],
        retain: Sequence[Fact] = (),
        *,
        progress: Progress | None = None,
    ) -> WeightPatch | MemoryPatch:
        """Computes a patch; the caller applies it.

        Args:
            handle: The model, with whatever is applied to it; those patches become the new one's parents.
            forget: What the model should no longer know; each fact needs a prompt.
            retain: What it should still know; only methods with a retain term look at it.
            progress: Called with a phase, how much of it is done, and how much there is.

        Raises:
            RequestError: The facts cannot be unlearned as they stand.
            ConfigError: A setting does not exist or makes no sense for this model.
            NumericalError: NaN or infinity on the way.
        """
        ...


@dataclass(frozen=True)
class UnlearnOptions:
    """How to run a method; what it computes with is in its config.

    Attributes:
        name: The method asked for.
        seed: Of the order of facts, the retained facts drawn beside them, and the refusals.
        overrides: Settings that differ from the method's own.
    """

    name: str
    seed: int = 0
    overrides: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class UnlearnMethod:
    """One row of the registry.

    Attributes:
        name: As in ``get_unlearner``.
        title: One line for lists.
        paper: Where it is described.
        cost: What it costs, in words.
        family: How it works (``Family``).
        source: ``verified``: the formula was compared with released code; ``reconstructed``: it follows from text alone.
        build: Makes the unlearner.
    """

    name: str
    title: str
    paper: str
    cost: str
    family: Family
    source: Literal["verified", "reconstructed"]
    build: Callable[[UnlearnOptions], Unlearner]


UNLEARNERS: Registry[UnlearnMethod] = Registry(
    "unlearner",
    {
        "ga": "editors.unlearning.methods:GA",
        "graddiff": "editors.unlearning.methods:GRADDIFF",
        "kl": "editors.unlearning.methods:KL",
        "npo": "editors.unlearning.methods:NPO",
        "npo_mean": "editors.unlearning.methods:NPO_MEAN",
        "simnpo": "editors.unlearning.methods:SIMNPO",
        "dpo": "editors.unlearning.methods:DPO",
        "refusal": "editors.unlearning.methods:REFUSAL",
        "wga": "editors.unlearning.methods:WGA",
        "undial": "editors.unlearning.methods:UNDIAL",
        "ce_u": "editors.unlearning.methods:CE_U",
        "satimp": "editors.unlearning.methods:SATIMP",
        "altpo": "editors.unlearning.further:ALTPO",
        "pdu": "editors.unlearning.further:PDU",
        "catnip": "editors.unlearning.further:CATNIP",
        "wpn": "editors.unlearning.further:WPN",
        "icu": "editors.unlearning.further:ICU",
        "tru": "editors.unlearning.further:TRU",
        "bidirectional": "editors.unlearning.further:BIDIRECTIONAL",
        "lfu": "editors.unlearning.further:LFU",
        "rmu": "editors.unlearning.robust:RMU",
        "lat": "editors.unlearning.robust:LAT",
        "adv_ga": "editors.unlearning.robust:ADV_GA",
        "adv_npo": "editors.unlearning.robust:ADV_NPO",
        "adv_rmu": "editors.unlearning.robust:ADV_RMU",
        "klue": "editors.unlearning.robust:KLUE",
        "roka": "editors.unlearning.robust:ROKA",
        "ga_lora": "editors.unlearning.robust:GA_LORA",
        "stepping_stone": "editors.unlearning.robust:STEPPING_STONE",
        "task_vector": "editors.unlearning.merging:TASK_VECTOR",
        "msa": "editors.unlearning.merging:MSA",
        "ignore_k": "editors.unlearning.merging:IGNORE_K",
        "rocr": "editors.unlearning.rocr:ROCR",
        "needle": "editors.unlearning.needle:NEEDLE",
        "erase_edit": "editors.unlearning.by_edit:ERASE_EDIT",
        "in_context": "editors.unlearning.by_edit:IN_CONTEXT",
    },
    group="knowlab.unlearners",
)


def get_unlearner(name: str, *, seed: int = 0, **overrides: Any) -> Unlearner:
    """Makes an unlearner from its name.

    Args:
        name: A method (``"npo"``).
        seed: Seeds everything that is drawn.
        **overrides: Single settings (``lr=1e-4``, ``epochs=3``, ``weights="lora"``).

    Raises:
        UnknownNameError: No such method; names its neighbours.
        ConfigError: A setting does not exist or makes no sense.

    Example:
        >>> patch = get_unlearner("npo", epochs=3).unlearn(handle, forget, retain)
    """
    return UNLEARNERS.get(name).build(UnlearnOptions(name, seed, overrides))
