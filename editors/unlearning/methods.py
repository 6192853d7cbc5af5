"""The gradient methods: each a forget loss, a retain term, the settings that it takes, and where it comes from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from editors.base import check_names
from editors.unlearning import losses
from editors.unlearning.base import UnlearnMethod, UnlearnOptions
from editors.unlearning.gradient import GradientUnlearner
from editors.unlearning.procedure import Answers
from editors.unlearning.settings import SHARED, GradientConfig
from editors.unlearning.sides import Kind
from editors.unlearning.trainer import Objective

Batch = Mapping[Kind, Answers]


def _ga(batch: Batch, config: GradientConfig) -> Tensor:
    return losses.gradient_ascent(batch["answer"].logits, batch["answer"].labels)


def _npo(batch: Batch, config: GradientConfig) -> Tensor:
    answer = batch["answer"]
    return losses.npo(answer.logits, answer.labels, answer.reference, beta=config.beta)


def _npo_mean(batch: Batch, config: GradientConfig) -> Tensor:
    answer = batch["answer"]
    return losses.npo(answer.logits, answer.labels, answer.reference, beta=config.beta, reduction="row_mean")


def _simnpo(batch: Batch, config: GradientConfig) -> Tensor:
    answer = batch["answer"]
    return losses.simnpo(answer.logits, answer.labels, beta=config.beta, margin=config.margin)


def _dpo(batch: Batch, config: GradientConfig) -> Tensor:
    chosen, rejected = batch["refusal"], batch["answer"]
    return losses.dpo(
        chosen.logits,
        chosen.labels,
        chosen.reference,
        rejected.logits,
        rejected.labels,
        rejected.reference,
        beta=config.beta,
    )


def _refusal(batch: Batch, config: GradientConfig) -> Tensor:
    return losses.answer_nll(batch["refusal"].logits, batch["refusal"].labels)


def _wga(batch: Batch, config: GradientConfig) -> Tensor:
    return losses.wga(batch["answer"].logits, batch["answer"].labels, beta=config.beta)


def _undial(batch: Batch, config: GradientConfig) -> Tensor:
    answer = batch["answer"]
    return losses.undial(answer.logits, answer.labels, answer.table, beta=config.beta)


def _ce_u(batch: Batch, config: GradientConfig) -> Tensor:
    return losses.ce_u(batch["answer"].logits, batch["answer"].labels, skip_first=config.skip_first)


def _satimp(batch: Batch, config: GradientConfig) -> Tensor:
    answer = batch["answer"]
    return losses.satimp(
        answer.logits, answer.labels, saturation=config.saturation, importance=config.importance
    )


def builder(
    objective: Objective, own: tuple[str, ...] = (), **defaults: Any
) -> Callable[[UnlearnOptions], GradientUnlearner]:
    """Makes the unlearner.

    Args:
        objective: The method's terms.
        own: Settings that it reads beside those that all share.
        **defaults: What differs from the config's.
    """
    settings = SHARED.union(
        own, ("forget_weight", "retain_weight", "retain_batch", "stop_retain") if objective.retain else ()
    )
    # Nothing looks at the answers of a method that reads refusals only.
    settings |= {"stop_above", "stop_known"} if "answer" in objective.reads else set()

    def build(options: UnlearnOptions) -> GradientUnlearner:
        check_names(options.name, options.overrides, settings)
        # Lists come from command lines; configs are compared and hashed.
        chosen: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in {**defaults, **options.overrides}.items()
        }
        return GradientUnlearner(options.name, objective, GradientConfig(**chosen), settings, options.seed)

    return build


GA = UnlearnMethod(
    "ga",
    "Gradient ascent on the answers",
    "Jang et al. 2023, arXiv 2210.01504",
    "one pass over the forgotten facts per epoch",
    "parameter optimisation",
    "verified",
    builder(Objective(_ga, retain=None)),
)
GRADDIFF = UnlearnMethod(
    "graddiff",
    "Gradient ascent, and descent on retained facts",
    "Liu et al. 2022, arXiv 2203.12817",
    "twice ga",
    "parameter optimisation",
    "verified",
    builder(Objective(_ga, needs_retain=True)),
)
KL = UnlearnMethod(
    "kl",
    "Gradient ascent, with retained answers held to the untouched model's distributions",
    "Maini et al. 2024, arXiv 2401.06121 (KL minimisation)",
    "twice ga, and a distribution in memory per retained token",
    "parameter optimisation",
    "verified",
    builder(Objective(_ga, retain="kl", needs_retain=True)),
)
NPO = UnlearnMethod(
    "npo",
    "Negative preference optimisation: ascent that fades as an answer is forgotten",
    "Zhang et al. 2024, arXiv 2404.05868",
    "as ga; twice that with retained facts",
    "parameter optimisation",
    "verified",
    builder(Objective(_npo, reference=True), ("beta",), lr=2e-4, beta=0.1),
)
NPO_MEAN = UnlearnMethod(
    "npo_mean",
    "NPO by token means, so that long answers are not done first",
    "RESTOR's variant of Zhang et al. 2024, arXiv 2404.05868",
    "as npo",
    "parameter optimisation",
    "verified",
    builder(Objective(_npo_mean, reference=True), ("beta",), lr=2e-4, beta=0.1),
)
SIMNPO = UnlearnMethod(
    "simnpo",
    "NPO without a reference, by token means",
    "Fan et al. 2024, arXiv 2410.07163",
    "as npo",
    "parameter optimisation",
    "verified",
    builder(Objective(_simnpo), ("beta", "margin"), lr=2e-4, beta=4.5, forget_weight=0.125),
)
DPO = UnlearnMethod(
    "dpo",
    "Preference for refusals over answers (IdkDPO)",
    "Rafailov et al. 2023, arXiv 2305.18290; Maini et al. 2024, arXiv 2401.06121",
    "twice npo",
    "parameter optimisation",
    "verified",
    builder(Objective(_dpo, reads=("answer", "refusal"), reference=True), ("beta", "refusals"), beta=0.1),
)
REFUSAL = UnlearnMethod(
    "refusal",
    "Fine-tuning on refusals (IDK); the answers stay in the weights",
    "Maini et al. 2024, arXiv 2401.06121 (IDK)",
    "as ga; twice that with retained facts",
    "parameter optimisation",
    "verified",
    builder(Objective(_refusal, reads=("refusal",)), ("refusals",)),
)
WGA = UnlearnMethod(
    "wga",
    "Gradient ascent weighted by each token's probability",
    "Wang et al. 2025, arXiv 2502.19301",
    "as ga; twice that with retained facts",
    "parameter optimisation",
    "verified",
    builder(Objective(_wga), ("beta",), beta=1.0),
)
UNDIAL = UnlearnMethod(
    "undial",
    "Distillation from the untouched model with the answers' logits lowered",
    "Dong et al. 2024, arXiv 2402.10052",
    "as ga, and a distribution in memory per forgotten token",
    "parameter optimisation",
    "verified",
    builder(Objective(_undial, table=True), ("beta",), lr=5e-4, beta=10.0),
)
CE_U = UnlearnMethod(
    "ce_u",
    "Cross entropy with the model's own distribution without the answer",
    "Yang 2025, arXiv 2503.01224",
    "as ga",
    "parameter optimisation",
    "verified",
    builder(Objective(_ce_u, retain=None), ("skip_first",)),
)
SATIMP = UnlearnMethod(
    "satimp",
    "Gradient ascent weighted by saturation and importance",
    "Yang et al. 2025, arXiv 2505.11953",
    "as wga",
    "parameter optimisation",
    "verified",
    builder(Objective(_satimp), ("saturation", "importance")),
)
