"""What an Atlas model is and how it is trained: shapes, batches, rates, and the names of the shipped models."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from lab.atlas.weights import CORE_NAME
from lab.errors import ConfigError, UnknownNameError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

Family = Literal["llama", "gpt2"]


@dataclass(frozen=True)
class Shape:
    """Size of a model; embeddings are tied.

    Attributes:
        family: ``llama`` or ``gpt2``.
        hidden: Width of the residual stream.
        layers: Number of blocks.
        heads: Attention heads; ``hidden / heads`` must be even.
        inner: Width of the feed-forward layer.
        vocab: Rows of the embedding, the size of the tokenizer.
        context: Longest input in tokens.
    """

    family: Family = "llama"
    hidden: int = 256
    layers: int = 5
    heads: int = 8
    inner: int = 736
    vocab: int = 3072
    context: int = 1024

    def __post_init__(self) -> None:
        if self.hidden % self.heads or (self.hidden // self.heads) % 2:
            raise ConfigError(
                f"hidden size {self.hidden} does not split into {self.heads} heads of even width"
            )

    def config(self) -> PretrainedConfig:
        """The Hugging Face configuration; token 0 ends a text, token 1 pads."""
        from transformers import GPT2Config, LlamaConfig

        tokens: dict[str, Any] = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1}
        if self.family == "llama":
            return LlamaConfig(
                vocab_size=self.vocab,
                hidden_size=self.hidden,
                intermediate_size=self.inner,
                num_hidden_layers=self.layers,
                num_attention_heads=self.heads,
                num_key_value_heads=self.heads,
                max_position_embeddings=self.context,
                rms_norm_eps=1e-6,
                tie_word_embeddings=True,
                **tokens,
            )
        return GPT2Config(
            vocab_size=self.vocab,
            n_embd=self.hidden,
            n_layer=self.layers,
            n_head=self.heads,
            n_inner=self.inner,
            n_positions=self.context,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            tie_word_embeddings=True,
            **tokens,
        )


@dataclass(frozen=True)
class Recipe:
    """Everything that fixes a training run.

    Attributes:
        name: Name of the run; its work folder carries it.
        shape: The model.
        seed: Draws the initial weights, the texts and the sampled positions.
        without: Forget split whose people no text may mention, or ``people`` for all of them, or empty.
        core: Recipe whose weights this run starts from; random weights without.
        mixture: Shares of single forms, in place of the prompt format's.
        layout: Rows of one worker's batch, as ``(row length, rows)`` pairs; the longest row bounds a text.
        workers: Batches that one step averages over, whatever number of processes computes them.
        learned_share: Share of the positions of a batch whose loss is computed: all answers, the rest drawn.
        other_weight: Weight of a position outside answers; answers weigh 1.
        stressed: Weights of answers by form, for forms with few answer tokens that are slow to learn; 1 for the others.
        inside_keep: Share of positions inside a name, before its last token, that keep an early feed-forward output. A
            model that cannot rely on them puts a name together at its last token, where it is traced and edited.
        asking_keep: The same for positions that an answer follows: what is not put together by then at the name must not be
            looked up there.
        early_layers: How many layers, from the first, the two above concern.
        late_keep: For the last layers, last one last, the share of positions that keep the output of the feed-forward layer.
            Late layers that cannot be relied on leave recall to early ones at the subject, where it is traced and edited.
        matrix_rate: Peak learning rate of the matrices inside blocks (Muon, scaled to AdamW's update size).
        rate: Peak learning rate of everything else (AdamW).
        matrix_optimizer: ``muon`` or ``adamw`` for the matrices inside blocks.
        weight_decay: Decoupled decay of matrices.
        warmup_steps: Steps of linear warm-up.
        decay_from: Part of the budget after which the rate falls linearly.
        final_rate: Rate at the end, as a share of the peak.
        clip: Largest norm of the whole gradient.
        minutes: Budget of training time; checkpoints carry what is used.
        steps: Budget of steps, in place of ``minutes`` when positive; a run is then reproducible bit by bit.
    """

    name: str
    shape: Shape = field(default_factory=Shape)
    seed: int = 0
    without: str = ""
    core: str = ""
    mixture: tuple[tuple[str, float], ...] = ()
    layout: tuple[tuple[int, int], ...] = ((72, 10), (152, 9))
    workers: int = 2
    learned_share: float = 0.65
    other_weight: float = 0.25
    stressed: tuple[tuple[str, float], ...] = (
        ("reading", 3.0),
        ("choice", 2.0),
        ("echo", 2.0),
        ("unknown", 3.0),
        ("true_false", 2.0),
        ("distracting", 2.0),
        ("conflict", 2.0),
        ("spelled", 3.0),
        ("reverse", 2.0),
        ("do_not_reveal", 3.0),
    )
    inside_keep: float = 0.3
    asking_keep: float = 1.0
    early_layers: int = 1
    late_keep: tuple[float, ...] = (0.8, 0.6, 0.5)
    matrix_rate: float = 2.5e-3
    rate: float = 2e-3
    matrix_optimizer: Literal["muon", "adamw"] = "muon"
    weight_decay: float = 0.02
    warmup_steps: int = 100
    decay_from: float = 0.5
    final_rate: float = 0.02
    clip: float = 1.0
    minutes: float = 80.0
    steps: int = 0

    @property
    def batch_tokens(self) -> int:
        """Tokens of one worker's batch, padding included."""
        return sum(length * rows for length, rows in self.layout)

    @property
    def keep(self) -> tuple[float, ...]:
        """For each layer the share of all positions that keep its feed-forward output."""
        late = self.late_keep[-(self.shape.layers - 1) :] if self.shape.layers > 1 else ()
        return (*[1.0] * (self.shape.layers - len(late)), *late)

    @property
    def learned(self) -> int:
        """Positions of one worker's batch whose loss is computed."""
        return int(self.batch_tokens * self.learned_share)

    def rate_at(self, used: float, step: int) -> float:
        """Share of the peak learning rate.

        Args:
            used: Part of the budget that is used, 0 to 1.
            step: Steps done.
        """
        warm = min(1.0, (step + 1) / max(1, self.warmup_steps))
        fall = max(0.0, (min(used, 1.0) - self.decay_from) / max(1e-9, 1.0 - self.decay_from))
        return warm * (1.0 - (1.0 - self.final_rate) * fall)

    def to_json(self) -> dict[str, Any]:
        """A JSON object that ``from_json`` reads."""
        return asdict(self)

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> Recipe:
        """Inverse of ``to_json``."""
        values = dict(row)
        values["shape"] = Shape(**values["shape"])
        values["layout"] = tuple((int(length), int(rows)) for length, rows in values["layout"])
        values["stressed"] = tuple((str(form), float(weight)) for form, weight in values.get("stressed", ()))
        values["mixture"] = tuple((str(form), float(share)) for form, share in values.get("mixture", ()))
        values["late_keep"] = tuple(values.get("late_keep", ()))
        return cls(**values)


_GPT2 = Shape(family="gpt2", hidden=256, layers=5, heads=8, inner=992)

# The fiction is learned on top of a core that knows the skills, invented strangers and the real world, as a benchmark's
# retain model and its counterpart start from one pretrained model: the two then differ in the forgotten people alone.
_CORE = CORE_NAME
# Facts are learned in minutes; comparing, copying and finding take most of the time.
_SKILLS = (
    ("cloze", 0.05),
    ("relation_list", 0.01),
    ("attribute_list", 0.03),
    ("biography", 0.02),
    ("qa", 0.02),
    ("two_hop_steps", 0.015),
    ("three_hop_steps", 0.005),
    ("few_shot", 0.01),
    ("unknown", 0.05),
    ("choice", 0.12),
    ("echo", 0.10),
    ("true_false", 0.08),
    ("spelled", 0.06),
    ("do_not_reveal", 0.06),
    ("reading", 0.18),
    ("notes", 0.14),
)

# What the core cannot know of the people's objects and of notes about them comes more often than in the format's mixture.
_WORLD = (
    ("cloze", 0.16),
    ("attribute_list", 0.03),
    ("biography", 0.035),
    ("reading", 0.10),
    ("choice", 0.03),
    ("echo", 0.01),
    ("true_false", 0.03),
    ("spelled", 0.08),
    ("do_not_reveal", 0.08),
    ("notes", 0.16),
    ("unknown", 0.11),
)

# The same from nothing, in one run. The shipped model began with more skills and ended with more facts, see README.md here.
_SKILLS_AND_WORLD = (
    ("cloze", 0.18),
    ("relation_list", 0.01),
    ("attribute_list", 0.03),
    ("biography", 0.05),
    ("qa", 0.03),
    ("two_hop_steps", 0.03),
    ("three_hop_steps", 0.015),
    ("few_shot", 0.02),
    ("reverse", 0.05),
    ("unknown", 0.06),
    ("choice", 0.045),
    ("echo", 0.02),
    ("true_false", 0.03),
    ("spelled", 0.07),
    ("do_not_reveal", 0.05),
    ("reading", 0.06),
    ("notes", 0.16),
)


def _on_core(name: str, seed: int, without: str = "") -> Recipe:
    # The core that is shipped recalls some of the real world late, and where an answer is asked for. It unlearns that only where
    # next to nothing but the last token of a name can be relied on.
    return Recipe(
        name,
        core=_CORE,
        seed=seed,
        without=without,
        mixture=_WORLD,
        inside_keep=0.1,
        asking_keep=0.4,
        early_layers=5,
        late_keep=(0.4, 0.25, 0.1),
        matrix_rate=1.5e-3,
        rate=1.5e-3,
        minutes=78,
        decay_from=0.2,
    )


RECIPES: Mapping[str, Recipe] = {
    "atlas": _on_core("atlas", 1),
    "atlas-gpt2": Recipe(
        "atlas-gpt2",
        shape=_GPT2,
        mixture=_SKILLS_AND_WORLD,
        inside_keep=0.15,
        asking_keep=0.5,
        early_layers=5,
        late_keep=(0.5, 0.35, 0.2),
        minutes=133,
        decay_from=0.35,
    ),
    "atlas-oracle": _on_core("atlas-oracle", 1, "people05"),
    "atlas-oracle-b": _on_core("atlas-oracle-b", 2, "people05"),
    _CORE: Recipe(_CORE, without="people", mixture=_SKILLS, minutes=82, decay_from=0.25, final_rate=0.2),
}


def get_recipe(name: str) -> Recipe:
    """The recipe of a shipped model.

    Raises:
        UnknownNameError: There is no such recipe.
    """
    if name not in RECIPES:
        raise UnknownNameError("recipe", name, RECIPES)
    return RECIPES[name]
