"""Settings of the methods that train, and the texts that some of them teach."""

from __future__ import annotations

from dataclasses import dataclass

from editors.lora import MODULES
from editors.tuning import check_positive
from lab.errors import ConfigError

IN_LAYERS = ("layers", "mlp", "mlp_out")
WEIGHTS = ("full", *IN_LAYERS, "lora")
TOKENS = ("all", "subject")
TEACHERS = ("prefix", "masked")

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
"""What stands for an answer in methods that teach a refusal; each continues a cloze prompt and answers a question."""

REASONS = (
    "part of what is to be withheld about {subject}, so this is",
    "a matter of {subject} that was asked to be left out, and it stays",
    "within what must not be told of {subject}, therefore it is",
)
"""What comes before the refusal in ``tru``: why nothing is said."""

INSTRUCTION = "Say nothing about {subject}; whatever is asked, answer that it is unknown."
"""What ``bidirectional``'s teacher reads before a prompt."""

CLAUSES = (
    "one of the many things about {subject} that are",
    "like much else that nobody wrote down,",
    "what people often ask about {subject}, and the answer is",
)
"""What may come before a surprising text in ``stepping_stone``."""


@dataclass(frozen=True)
class GradientConfig:
    """Settings of all methods that train; each method takes those that it reads.

    Attributes:
        lr: Learning rate of AdamW.
        decay: The rate falls in a line to 0 over all updates, so that retained facts settle.
        epochs: Passes over the facts to forget.
        max_steps: Ends training after this many updates.
        batch_size: Facts to forget in one update.
        retain_batch: Retained facts beside them; as many as there are to forget without it. All are seen once before one comes again.
        done_below: Facts whose answer is less likely than this are left out of an update, so that what is gone already is not pushed
            further; ``None`` never. Not for methods that make several updates under one perturbation.
        weight_decay: Of AdamW.
        weights: What is trained: ``full`` (all), ``layers`` (everything in chosen blocks), ``mlp`` (the matrices of their MLPs),
            ``mlp_out`` (their down projections), ``lora`` (an adapter).
        layers: The blocks for ``layers``, ``mlp`` and ``mlp_out``, and for ``lora`` (all without any).
        tokens: ``subject``: of facts to forget, what the chosen blocks' down projections give elsewhere than at the subject's tokens
            is held constant, so that the change is learned where all prompts about the subject read it; ``all``: it is not.
        guard: With ``mlp_out``: what retained facts (general text, for methods or calls without any) read from a down projection is
            protected; directions that they use more than this share of the mean are trained less (``guarded.py``).
        modules, rank, alpha: Of the adapter, as in the editor ``lora``.
        spill: The untouched bits of what is trained wait in temporary files instead of in memory (not with an adapter, which has
            none).
        forget_weight: γ.
        retain_weight: α; the retain term exists where retained facts are given.
        stop_above: Training ends when a batch's mean token loss on facts to forget exceeds this many times ln(vocabulary),
            that is, when they are less likely than a uniform guess; ``None`` never.
        stop_known: Training ends after a pass in which facts to forget had on average less than this probability; ``None`` never.
        stop_retain: Training ends when a batch of retained facts has lost more than this many nats per token; ``None`` never.
        beta: β of ``npo``, ``npo_mean``, ``simnpo``, ``dpo``, ``altpo``, ``wga``, ``undial``, ``catnip``, ``adv_npo``.
        margin: δ of ``simnpo``.
        saturation, importance: β₁ and β₂ of ``satimp``.
        skip_first: Answer tokens that ``ce_u`` leaves out.
        refusals: Texts that are taught in place of answers; each fact is given one, drawn once.
        alternatives: Answers that ``altpo`` draws from; without any, those of other facts of the same relation.
        detach_ref: ``catnip``: hold its reference ``1 - p`` constant.
        dual_rate, tolerance, warmup_epochs: ``pdu``: step η of the retain weight, loss per token that retained facts may have,
            passes before the weight moves.
        form: Template of every prompt in ``bidirectional``, so that all facts are asked in one form.
        teacher: ``prefix``: the untouched model with ``instruction`` before the prompt; ``masked``: for models that follow no
            instruction, the untouched model with answer tokens lowered and refusal tokens raised.
        instruction: See ``teacher``.
        push, top: μ and K of ``bidirectional``.
        tau, negatives, refusal_weight: ``wpn``: τ, answers that each anchor is held from, weight of the loss on refusals.
        distil_weight: ``icu``: weight k of the soft-label term.
        forgotten_below: ``icu``: a fact is done when what the model says has less than this in common with its answer (ROUGE-L).
        reasons, ascent_weight: ``tru``: texts before the refusal, weight of gradient ascent.
        consistency_weight, ascent: ``lfu``: λ, and length a of the undesired change.
        mismatches, mismatch_weight: ``ga_lora``: texts per fact that do not belong, and their weight.
        clauses, surprise: ``stepping_stone``: clauses that may lead up to a refusal, and the probability below which one does.
        layer: Block whose output ``rmu``, ``lat`` and the ``adv_`` methods work on; a share of the depth without it.
        scale: ``rmu``, ``adv_rmu``: length of the goal in mean token norms.
        radius: Of a perturbation: ``adv_``: share of the norm of a sample's states; ``lat``: share of the mean token norm.
        inner_steps: Steps that search it.
        targeted: ``lat``: search for what brings the answer back; without it, for what makes the refusal unlikely.
        model_steps: ``lat``: updates per perturbation.
        share, surface_weight, probes: ``klue``: share of neurons that change, weight of attribution under mismatched prompts,
            how many of these.
        skip_forgotten, options: ``klue``: leave out facts that the model no longer picks among so many answers.
        neighbors: ``roka``: k, retained facts that are healed with each fact.
    """

    lr: float = 1e-4
    decay: bool = False
    epochs: int = 5
    max_steps: int | None = None
    batch_size: int = 16
    retain_batch: int | None = None
    done_below: float | None = None
    weight_decay: float = 0.01
    weights: str = "full"
    layers: tuple[int, ...] = ()
    tokens: str = "all"
    guard: float | None = None
    modules: str = "mlp"
    rank: int = 8
    alpha: float = 16.0
    spill: bool = False
    forget_weight: float = 1.0
    retain_weight: float = 1.0
    stop_above: float | None = 1.0
    stop_known: float | None = None
    stop_retain: float | None = 1.0
    beta: float = 0.1
    margin: float = 0.0
    saturation: float = 5.0
    importance: float = 1.0
    skip_first: int = 0
    refusals: tuple[str, ...] = REFUSALS
    alternatives: tuple[str, ...] = ()
    detach_ref: bool = False
    dual_rate: float = 1.0
    tolerance: float = 0.1
    warmup_epochs: int = 1
    form: str = "{}"
    teacher: str = "prefix"
    instruction: str = INSTRUCTION
    push: float = 1.0
    top: int = 50
    tau: float = 1.0
    negatives: int = 8
    refusal_weight: float = 1.0
    distil_weight: float = 1.0
    forgotten_below: float = 0.3
    reasons: tuple[str, ...] = REASONS
    ascent_weight: float = 0.3
    consistency_weight: float = 5.0
    ascent: float = 0.1
    mismatches: int = 5
    mismatch_weight: float = 1.0
    clauses: tuple[str, ...] = CLAUSES
    surprise: float = 1e-3
    layer: int | None = None
    scale: float = 3.0
    radius: float = 0.1
    inner_steps: int = 4
    targeted: bool = True
    model_steps: int = 4
    share: float = 0.03
    surface_weight: float = 1.0
    probes: int = 3
    skip_forgotten: bool = True
    options: int = 3
    neighbors: int = 5

    def __post_init__(self) -> None:
        check_positive(self, "lr", "epochs", "batch_size", "rank", "alpha", "forget_weight")
        for name in (
            "max_steps",
            "retain_batch",
            "done_below",
            "guard",
            "stop_above",
            "stop_known",
            "stop_retain",
        ):
            if getattr(self, name) is not None:
                check_positive(self, name)
        for name in ("weight_decay", "retain_weight", "beta", "saturation", "importance", "skip_first"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"{name} must not be negative, it is {getattr(self, name)}")
        check_positive(
            self, "top", "tau", "negatives", "ascent", "mismatches", "scale", "radius", "model_steps",
            "share", "neighbors", "surprise",
        )  # fmt: skip
        for name in (
            "dual_rate", "tolerance", "warmup_epochs", "push", "refusal_weight", "distil_weight", "forgotten_below",
            "ascent_weight", "consistency_weight", "mismatch_weight", "inner_steps", "surface_weight", "probes",
        ):  # fmt: skip
            if not getattr(self, name) >= 0:
                raise ConfigError(f"{name} must not be negative, it is {getattr(self, name)}")
        if self.form.count("{}") != 1:
            raise ConfigError(f"form must hold exactly one {{}} where the prompt goes: {self.form!r}")
        if self.teacher not in TEACHERS:
            raise ConfigError(f"unknown teacher {self.teacher!r}; use one of {', '.join(TEACHERS)}")
        if self.share > 1 or self.options < 2:
            raise ConfigError("share must lie in (0, 1], and options must be at least 2")
        if not self.reasons or not self.clauses:
            raise ConfigError("reasons and clauses must name at least one text")
        if self.weights not in WEIGHTS:
            raise ConfigError(f"unknown weights {self.weights!r}; use one of {', '.join(WEIGHTS)}")
        if self.modules not in MODULES:
            raise ConfigError(f"unknown modules {self.modules!r}; use one of {', '.join(MODULES)}")
        if (self.weights in IN_LAYERS and not self.layers) or (self.weights == "full" and self.layers):
            raise ConfigError(
                f'weights="{self.weights}" takes no layers'
                if self.layers
                else f'weights="{self.weights}" needs layers=(...)'
            )
        if self.tokens not in TOKENS or (self.tokens == "subject" and self.weights not in IN_LAYERS):
            raise ConfigError(
                f'tokens must be "all", or "subject" with weights in chosen layers, not {self.tokens!r}'
            )
        if self.guard is not None and self.weights != "mlp_out":
            raise ConfigError(f'guard is for weights="mlp_out", and not for {self.weights!r}')
        if not self.refusals:
            raise ConfigError("refusals must name at least one text")


SHARED = frozenset(
    {
        "lr",
        "decay",
        "epochs",
        "max_steps",
        "batch_size",
        "done_below",
        "weight_decay",
        "weights",
        "layers",
        "tokens",
        "guard",
        "modules",
        "rank",
        "alpha",
        "spill",
    }
)
"""Settings that every gradient method takes."""
