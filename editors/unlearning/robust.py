"""Methods on hidden states, under perturbations, on chosen neurons, and on rewritten texts, as rows of the registry."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from editors.unlearning import losses
from editors.unlearning.base import UnlearnMethod, UnlearnOptions
from editors.unlearning.gradient import GradientUnlearner, mlp_weights
from editors.unlearning.localised import Healing, Localised
from editors.unlearning.methods import builder
from editors.unlearning.perturbed import Latent, Misdirect, MisdirectPerturbed, Perturbed, rmu_weights
from editors.unlearning.procedure import Answers
from editors.unlearning.settings import GradientConfig
from editors.unlearning.sides import Kind
from editors.unlearning.trainer import Objective
from lab.errors import ConfigError

Batch = Mapping[Kind, Answers]
_RMU = {"lr": 1e-3, "epochs": 20, "retain_weight": 10.0}


def _ga(batch: Batch, config: GradientConfig) -> Tensor:
    return losses.gradient_ascent(batch["answer"].logits, batch["answer"].labels)


def _npo(batch: Batch, config: GradientConfig) -> Tensor:
    answer = batch["answer"]
    return losses.npo(answer.logits, answer.labels, answer.reference, beta=config.beta)


def _stone(batch: Batch, config: GradientConfig) -> Tensor:
    return losses.answer_nll(batch["stone"].logits, batch["stone"].labels)


def _opt(batch: Batch, config: GradientConfig) -> Tensor:
    answer, mismatch = batch["answer"], batch["mismatch"]
    away = losses.gradient_ascent(answer.logits, answer.labels)
    # The forget weight is on the ascent alone, and is divided out of the other term.
    other = losses.answer_nll(mismatch.logits, mismatch.labels)
    return away + config.mismatch_weight / config.forget_weight * other


def _lat(options: UnlearnOptions) -> GradientUnlearner:
    made = _LAT(options)
    steps = made.config.model_steps
    return replace(made, objective=replace(made.objective, procedure=lambda: Latent(steps)))


def _klue(options: UnlearnOptions) -> GradientUnlearner:
    made = _KLUE(options)
    if made.config.weights != "full":
        raise ConfigError("'klue' chooses its weights itself; leave weights and layers out")
    return made


_KLUE = builder(
    Objective(_ga, needs_retain=True, procedure=Localised, trains=mlp_weights),
    ("share", "surface_weight", "probes", "skip_forgotten", "options"),
    lr=1e-3,
    weight_decay=0.0,
)

_LAT = builder(
    Objective(reads=("answer", "refusal"), procedure=Latent),
    ("layer", "radius", "inner_steps", "targeted", "model_steps", "refusals"),
    lr=5e-4,
    radius=0.3,
    inner_steps=8,
    weights="lora",
    rank=16,
)

RMU = UnlearnMethod(
    "rmu",
    "States of facts to forget sent to a random direction, those of retained facts held",
    "Li et al. 2024, arXiv 2403.03218",
    "as graddiff; two matrices change",
    "parameter optimisation",
    "verified",
    builder(
        Objective(needs_retain=True, procedure=Misdirect, trains=rmu_weights), ("layer", "scale"), **_RMU
    ),
)
LAT = UnlearnMethod(
    "lat",
    "Latent adversarial training: refusals under a perturbation that brings the answer back",
    "Sheshadri et al. 2024, arXiv 2407.15549; untargeted: Casper et al. 2024, arXiv 2403.05030",
    "ten times dpo",
    "parameter optimisation",
    "verified",
    _lat,
)
ADV_GA = UnlearnMethod(
    "adv_ga",
    "Gradient ascent under a perturbation that restores the answer",
    "Yuan et al. 2024, arXiv 2408.10682",
    "five times ga",
    "parameter optimisation",
    "verified",
    builder(Objective(_ga, procedure=Perturbed), ("layer", "radius", "inner_steps"), lr=5e-5),
)
ADV_NPO = UnlearnMethod(
    "adv_npo",
    "NPO under a perturbation that restores the answer",
    "Yuan et al. 2024, arXiv 2408.10682",
    "five times npo",
    "parameter optimisation",
    "verified",
    builder(
        Objective(_npo, reference=True, procedure=Perturbed),
        ("beta", "layer", "radius", "inner_steps"),
        lr=5e-5,
    ),
)
ADV_RMU = UnlearnMethod(
    "adv_rmu",
    "RMU under a perturbation that restores the answer",
    "Yuan et al. 2024, arXiv 2408.10682",
    "five times rmu",
    "parameter optimisation",
    "verified",
    builder(
        Objective(needs_retain=True, procedure=MisdirectPerturbed, trains=rmu_weights),
        ("layer", "scale", "radius", "inner_steps"),
        **_RMU,
    ),
)
KLUE = UnlearnMethod(
    "klue",
    "Gradient ascent on the weights of the neurons that know the facts, until they are no longer picked",
    "arXiv 2502.19207",
    "as graddiff, and an attribution after every pass",
    "parameter optimisation",
    "reconstructed",
    _klue,
)
ROKA = UnlearnMethod(
    "roka",
    "Gradient ascent, with the facts that rest on the same neurons held to what the model says of them",
    "arXiv 2603.00436",
    "three times ga",
    "parameter optimisation",
    "reconstructed",
    builder(Objective(needs_retain=True, procedure=Healing), ("neighbors",), retain_weight=2.0),
)
GA_LORA = UnlearnMethod(
    "ga_lora",
    "Gradient ascent and answers that do not belong, in an adapter, with retained answers held",
    "Yao et al. 2023, arXiv 2310.10683, and arXiv 2405.15152",
    "seven times ga",
    "parameter optimisation",
    "verified",
    builder(
        Objective(_opt, reads=("answer", "mismatch"), retain="kl"),
        ("mismatches", "mismatch_weight"),
        forget_weight=0.5,
        weights="lora",
        modules="query_value",
    ),
)
STEPPING_STONE = UnlearnMethod(
    "stepping_stone",
    "Refusals that are led up to, so that learning them spreads less",
    "Sun et al. 2025, arXiv 2504.09522",
    "as refusal",
    "parameter optimisation",
    "reconstructed",
    builder(Objective(_stone, reads=("stone",)), ("clauses", "surprise", "refusals")),
)
