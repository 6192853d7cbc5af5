"""Out-of-context reasoning: what a model concludes from new facts without being told (OCR, arXiv 2506.10887).

A model learns that some subjects with property ``b`` also have ``c``; does it then give ``c`` to others of whom it learned only
``b``? Where ``b`` causes ``c`` that is generalisation, where it does not it is hallucination, and the mechanism is one. In a
one-layer attention model it comes from factorising the value-output matrix: gradient descent on the factors favours a small
nuclear norm, which shares directions between subjects, on the merged matrix a small Frobenius norm, which does not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from lab.audit.learning import Lesson, learn
from lab.errors import ConfigError
from lab.eval.stats import summarise
from lab.scoring import score_targets

if TYPE_CHECKING:
    from lab.handle import ModelHandle
    from lab.patch import Patch

Form = Literal["factorised", "merged"]


@dataclass(frozen=True)
class ToyWorld:
    """Rules ``b_i -> c_i``, and subjects that belong to one rule each.

    Tokens are one-hot: all subjects, then the two relations; answers are all ``b``, then all ``c``.

    Attributes:
        rules: Number of rules.
        train: Subjects per rule of whom both ``b`` and ``c`` are taught.
        test: Subjects per rule of whom only ``b`` is taught.
    """

    rules: int = 4
    train: int = 4
    test: int = 2

    def __post_init__(self) -> None:
        if self.rules < 2 or self.train < 1 or self.test < 1:
            raise ConfigError("a toy world needs two rules, and a train and a test subject for each")

    @property
    def subjects(self) -> int:
        """Number of subjects; those of a rule stand together, its train subjects first."""
        return self.rules * (self.train + self.test)

    @property
    def tokens(self) -> int:
        """Number of input tokens."""
        return self.subjects + 2

    def rule(self, subject: int) -> int:
        """The rule of a subject."""
        return subject // (self.train + self.test)

    def taught(self, subject: int) -> bool:
        """Whether the subject's ``c`` is taught."""
        return subject % (self.train + self.test) < self.train

    def lessons(self) -> tuple[Tensor, Tensor]:
        """What is learned: token pairs (subject, relation) ``[row, 2]`` and answers ``[row]``."""
        rows = [(subject, self.subjects, self.rule(subject)) for subject in range(self.subjects)]
        rows += [
            (subject, self.subjects + 1, self.rules + self.rule(subject))
            for subject in range(self.subjects)
            if self.taught(subject)
        ]
        table = torch.tensor(rows)
        return table[:, :2], table[:, 2]

    def implications(self) -> tuple[Tensor, Tensor]:
        """What was never taught: (test subject, second relation) and the ``c`` that its rule implies."""
        rows = [
            (subject, self.subjects + 1, self.rules + self.rule(subject))
            for subject in range(self.subjects)
            if not self.taught(subject)
        ]
        table = torch.tensor(rows)
        return table[:, :2], table[:, 2]


class OneLayer(nn.Module):
    """One layer of linear attention over one-hot tokens: ``f(X) = W_OV Xᵀ (X W_KQ x_T)``.

    Args:
        world: Gives tokens and answers.
        form: ``"factorised"``: ``W_OV = W_O W_Vᵀ`` and both factors are learned; ``"merged"``: ``W_OV`` itself is.
        width: Inner width of the factors; at least the number of answers, so that both forms can express the same.
        scale: Standard deviation of the start.
        train_attention: Learn ``W_KQ`` too; else it stays at all ones, which attends to both tokens alike.
        seed: Draws the start.
    """

    def __init__(
        self,
        world: ToyWorld,
        form: Form,
        *,
        width: int = 16,
        scale: float = 0.01,
        train_attention: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        answers, tokens = 2 * world.rules, world.tokens
        if width < answers:
            raise ConfigError(
                f"width {width} is less than {answers} answers: the factors could not express every matrix"
            )
        generator = torch.Generator().manual_seed(seed)

        def start(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(*shape, generator=generator, dtype=torch.float64) * scale)

        self.form = form
        self.key_query = nn.Parameter(
            torch.ones(tokens, tokens, dtype=torch.float64), requires_grad=train_attention
        )
        if form == "factorised":
            self.output, self.value = start(answers, width), start(tokens, width)
        elif form == "merged":
            self.output_value = start(answers, tokens)
        else:
            raise ConfigError(f"unknown form {form!r}; use 'factorised' or 'merged'")

    def matrix(self) -> Tensor:
        """``W_OV``, ``[answer, token]``."""
        return self.output @ self.value.T if self.form == "factorised" else self.output_value

    def forward(self, pairs: Tensor) -> Tensor:
        """Logits ``[row, answer]`` behind the last token of each row ``[row, 2]``."""
        attention = self.key_query[pairs, pairs[:, -1:]]
        return (self.matrix().T[pairs] * attention[..., None]).sum(1)


@dataclass(frozen=True)
class ToyResult:
    """What a toy model learned.

    Attributes:
        loss: On what was taught, at the end.
        taught: Accuracy there.
        implied: Accuracy on what follows, among the ``c``.
        margin: There, logit of the implied ``c`` minus the best other one, mean over subjects, with ``W_OV`` scaled to
            Frobenius norm 1.
        nuclear: Nuclear norm of ``W_OV`` over its Frobenius norm.
    """

    loss: float
    taught: float
    implied: float
    margin: float
    nuclear: float


def train_toy(model: OneLayer, world: ToyWorld, *, steps: int = 2000, rate: float = 0.5) -> ToyResult:
    """Full-batch gradient descent on the cross-entropy of what is taught, then a look at what follows."""
    pairs, answers = world.lessons()
    learned = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.SGD(learned, lr=rate)
    with torch.enable_grad():
        for _ in range(steps):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(pairs), answers).backward()
            optimizer.step()
    with torch.no_grad():
        said = model(pairs)
        asked, implied = world.implications()
        among = model(asked)[:, world.rules :]
        right = implied - world.rules
        own = among.gather(1, right[:, None]).squeeze(1)
        others = among.scatter(1, right[:, None], float("-inf")).amax(1)
        values = torch.linalg.svdvals(model.matrix())
        norm = float(values.norm())
        return ToyResult(
            float(nn.functional.cross_entropy(said, answers)),
            float((said.argmax(1) == answers).double().mean()),
            float((own > others).double().mean()),
            float((own - others).mean()) / norm,
            float(values.sum()) / norm,
        )


@dataclass(frozen=True)
class Implication:
    """A question whose answer was never taught but follows from what was.

    Attributes:
        id: Stable name.
        prompt: The question.
        implied: The answer that follows.
        others: The other candidates.
    """

    id: str
    prompt: str
    implied: str
    others: tuple[str, ...]


def implied_ranks(handle: ModelHandle, implications: Sequence[Implication]) -> list[float]:
    """Rank of the implied answer among the candidates by log-probability per token, 0 the best, ties sharing the middle."""
    pairs = [(each.prompt, answer) for each in implications for answer in (each.implied, *each.others)]
    scores = iter(score_targets(handle, pairs))
    found = []
    for each in implications:
        own = next(scores).mean_logprob
        others = [next(scores).mean_logprob for _ in each.others]
        found.append(sum(other > own for other in others) + 0.5 * sum(other == own for other in others))
    return found


def reasoning(handle: ModelHandle, patch: Patch, implications: Sequence[Implication]) -> dict[str, Any]:
    """Mean rank of implied answers before and after a patch, beside chance.

    After learning facts, a lower rank is out-of-context reasoning; after forgetting them, a rank that stays low is a residue
    that follows from what was to be forgotten.

    Args:
        handle: The model without the patch; bit-identical afterwards.
        patch: Any patch (``learn_rules`` makes one).
        implications: What follows.

    Raises:
        ConfigError: No implications.
    """
    if not implications:
        raise ConfigError("out-of-context reasoning needs implications to ask for")
    with handle.writing():
        before = implied_ranks(handle, implications)
        with patch.applied(handle):
            after = implied_ranks(handle, implications)
    rise = [old - new for old, new in zip(before, after, strict=True)]
    return {
        "rank_before": summarise(before, bounds=None).to_json(),
        "rank_after": summarise(after, bounds=None).to_json(),
        "rise": summarise(rise, bounds=None).to_json(),
        "chance": sum(len(each.others) for each in implications) / (2 * len(implications)),
        "per_question": [
            {"id": each.id, "before": old, "after": new}
            for each, old, new in zip(implications, before, after, strict=True)
        ],
    }


def learn_rules(
    handle: ModelHandle,
    properties: Sequence[str],
    consequences: Sequence[str],
    lesson: Lesson | None = None,
    *,
    seed: int = 0,
) -> Patch:
    """Learns statements of properties (about all subjects) and of their consequences (about some)."""
    return learn(handle, [*properties, *consequences], lesson, seed=seed)
