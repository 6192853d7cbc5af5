"""Further methods that train on answers, refusals or reasons; each with its terms, its settings and where it comes from."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from editors.unlearning import losses, state_losses
from editors.unlearning.base import UnlearnMethod
from editors.unlearning.methods import builder
from editors.unlearning.procedure import Answers
from editors.unlearning.rounds import Contrast, Dual, Instructed, Rounds, Undesired
from editors.unlearning.settings import GradientConfig
from editors.unlearning.sides import Kind
from editors.unlearning.trainer import Objective

Batch = Mapping[Kind, Answers]


def _altpo(batch: Batch, config: GradientConfig) -> Tensor:
    chosen, rejected = batch["alternative"], batch["answer"]
    return losses.dpo(
        chosen.logits,
        chosen.labels,
        chosen.reference,
        rejected.logits,
        rejected.labels,
        rejected.reference,
        beta=config.beta,
    )


def _pdu(batch: Batch, config: GradientConfig) -> Tensor:
    return state_losses.flatness(batch["answer"].logits, batch["answer"].labels)


def _catnip(batch: Batch, config: GradientConfig) -> Tensor:
    answer = batch["answer"]
    return losses.catnip(answer.logits, answer.labels, beta=config.beta, detach_ref=config.detach_ref)


def _tru(batch: Batch, config: GradientConfig) -> Tensor:
    reasoned, answer = batch["reasoned"], batch["answer"]
    taught = losses.answer_nll(reasoned.logits, reasoned.labels)
    return taught + config.ascent_weight * losses.gradient_ascent(answer.logits, answer.labels)


ALTPO = UnlearnMethod(
    "altpo",
    "Preference for other plausible answers over the right ones",
    "Mekala et al. 2024, arXiv 2409.13474",
    "twice npo",
    "parameter optimisation",
    "verified",
    builder(
        Objective(_altpo, reads=("answer", "alternative"), reference=True),
        ("beta", "alternatives"),
        beta=0.1,
    ),
)
PDU = UnlearnMethod(
    "pdu",
    "Flat logits on answers, with the retain weight as a dual variable",
    "Entesari et al. 2025, arXiv 2506.05314",
    "twice ga",
    "parameter optimisation",
    "verified",
    builder(
        Objective(_pdu, needs_retain=True, procedure=Dual),
        ("dual_rate", "tolerance", "warmup_epochs"),
        retain_weight=50.0,
    ),
)
CATNIP = UnlearnMethod(
    "catnip",
    "NPO token by token against the model's own doubt: no reference, no retained facts",
    "arXiv 2602.02824",
    "as ga",
    "parameter optimisation",
    "reconstructed",
    builder(Objective(_catnip, retain=None), ("beta", "detach_ref"), beta=1.0),
)
WPN = UnlearnMethod(
    "wpn",
    "Weighted positional N-pair: states held near refusals and far from answers",
    "arXiv 2408.09459",
    "three times ga, and a distribution in memory per retained token",
    "parameter optimisation",
    "reconstructed",
    builder(
        Objective(reads=("answer", "refusal"), retain="kl", procedure=Contrast),
        ("tau", "negatives", "refusal_weight", "refusals"),
    ),
)
ICU = UnlearnMethod(
    "icu",
    "Iterative contrastive unlearning: ascent with the nearest retained facts beside it, until a fact is gone",
    "Tang et al. 2024, arXiv 2407.20271",
    "three times ga, and short generations after every pass",
    "parameter optimisation",
    "verified",
    builder(
        Objective(retain="kl", needs_retain=True, procedure=Rounds),
        ("distil_weight", "forgotten_below"),
        retain_weight=0.5,
    ),
)
TRU = UnlearnMethod(
    "tru",
    "Targeted reasoning: fine-tuning on why nothing is said, with GradDiff behind it",
    "arXiv 2603.09980",
    "three times ga",
    "parameter optimisation",
    "reconstructed",
    builder(
        Objective(_tru, reads=("answer", "reasoned"), needs_retain=True),
        ("reasons", "refusals", "ascent_weight"),
        retain_weight=0.3,
    ),
)
BIDIRECTIONAL = UnlearnMethod(
    "bidirectional",
    "Distillation from the model told to say nothing: pulled to its logits, pushed off what it would have said",
    "arXiv 2604.15482",
    "as undial, and two distributions in memory per forgotten token",
    "parameter optimisation",
    "reconstructed",
    builder(
        Objective(retain="pull", table=True, teacher="instructed", procedure=Instructed),
        ("form", "teacher", "instruction", "push", "top", "refusals"),
    ),
)
LFU = UnlearnMethod(
    "lfu",
    "Refusals, with hidden states held against the change that would undo them",
    "arXiv 2511.13052",
    "twice refusal",
    "parameter optimisation",
    "reconstructed",
    builder(Objective(reads=("refusal",), procedure=Undesired), ("consistency_weight", "ascent", "refusals")),
)
