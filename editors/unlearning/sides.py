"""What an unlearning run trains on: for each fact the texts that stand where its answer stood."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from editors.unlearning.settings import GradientConfig
from editors.unlearning.stones import stepping_stones
from lab.errors import RequestError
from lab.handle import ModelHandle
from lab.records import Fact

Kind = Literal["answer", "refusal", "alternative", "reasoned", "mismatch", "instructed", "stone"]
"""``answer``: the facts themselves. ``refusal``: a refusal instead. ``alternative``: another fact's answer. ``reasoned``: why
nothing is said, then a refusal. ``mismatch``: several answers that do not belong. ``instructed``: the answer after a prompt
that says not to give it. ``stone``: the refusal after a clause that makes it less surprising."""


@dataclass
class Side:
    """Prompts with one kind of text, and what the untouched model says about those that were asked for.

    Attributes:
        pairs: Prompt and text; ``copies`` of them for each fact, next to each other.
        copies: Texts per fact.
        reference: Of a pair, log-probabilities of its text's tokens, ``[token]`` on the CPU.
        table: Of a pair, the distributions there, ``[token, vocabulary]`` on the CPU.
    """

    pairs: Sequence[tuple[str, str]]
    copies: int = 1
    reference: dict[int, Tensor] = field(default_factory=dict)
    table: dict[int, Tensor] = field(default_factory=dict)

    def places(self, facts: Sequence[int]) -> list[int]:
        """Indices of the pairs of some facts."""
        return [fact * self.copies + copy for fact in facts for copy in range(self.copies)]


def make_side(
    kind: Kind,
    handle: ModelHandle,
    forget: Sequence[Fact],
    retain: Sequence[Fact],
    refusals: Sequence[str],
    config: GradientConfig,
    seed: int,
) -> Side:
    """The pairs of one kind.

    Args:
        kind: Which.
        handle: The untouched model; only ``stone`` asks it.
        forget: Facts to forget.
        retain: Where answers of other facts may come from.
        refusals: One for each fact.
        config: Wordings.
        seed: Of what is drawn.

    Raises:
        RequestError: No other fact has an answer to draw.
    """
    chooser = random.Random(f"{kind}:{seed}")
    prompts = [config.form.replace("{}", fact.text) for fact in forget]
    if kind == "answer":
        texts = [fact.object for fact in forget]
    elif kind == "refusal":
        texts = list(refusals)
    elif kind == "alternative":
        texts = [
            chooser.choice(config.alternatives or other_answers(fact, [*forget, *retain])) for fact in forget
        ]
    elif kind == "reasoned":
        texts = [
            f"{_filled(chooser.choice(config.reasons), fact)} {refusal}"
            for fact, refusal in zip(forget, refusals, strict=True)
        ]
    elif kind == "mismatch":
        pools = [other_answers(fact, retain or forget, alike=False) for fact in forget]
        texts = [chooser.choice(pool) for pool in pools for _ in range(config.mismatches)]
        prompts = [prompt for prompt in prompts for _ in range(config.mismatches)]
        return Side(list(zip(prompts, texts, strict=True)), config.mismatches)
    elif kind == "instructed":
        prompts = [
            f"{_filled(config.instruction, fact)} {prompt}"
            for fact, prompt in zip(forget, prompts, strict=True)
        ]
        texts = [fact.object for fact in forget]
    else:
        clauses = [[_filled(clause, fact) for clause in config.clauses] for fact in forget]
        pairs = list(zip(prompts, refusals, strict=True))
        return Side(stepping_stones(handle, pairs, clauses, below=config.surprise))
    return Side(list(zip(prompts, texts, strict=True)))


def other_answers(fact: Fact, others: Sequence[Fact], *, alike: bool = True) -> list[str]:
    """Answers of other facts that are wrong for this one, of the same relation where there are any (``alike``).

    Raises:
        RequestError: There are none.
    """
    wrong = [other for other in others if other.object not in fact.answers]
    same = [other for other in wrong if other.relation == fact.relation] if alike else []
    found = sorted({other.object for other in same or wrong})
    if not found:
        raise RequestError(
            f"no other fact has an answer to stand for that of {fact.text!r}; give more facts, or retained ones"
        )
    return found


def _filled(template: str, fact: Fact) -> str:
    return template.format_map({"subject": fact.subject, "relation": fact.relation.replace("_", " ")})
