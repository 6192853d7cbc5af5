"""Priming and memorisation of new text (Outlandish, arXiv 2504.09522).

A model that learned one text says its keyword where the text's theme comes up, whether it belongs there or not. How much of that
happens can be told beforehand from how improbable the keyword was.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from lab.audit.learning import Lesson, learn
from lab.errors import ConfigError
from lab.eval.stats import summarise
from lab.scoring import score_targets

if TYPE_CHECKING:
    from lab.handle import ModelHandle
    from lab.patch import Patch
    from lab.records import Fact

# The paper's threshold: keywords less probable than this before learning prime.
THRESHOLD = 1e-3


@dataclass(frozen=True)
class KeywordText:
    """A text with a keyword, and where else the keyword might turn up.

    Attributes:
        id: Stable name.
        context: The text up to the keyword.
        keyword: What follows it.
        related: Other beginnings of the same theme, which the keyword does not belong behind.
    """

    id: str
    context: str
    keyword: str
    related: tuple[str, ...]

    def __post_init__(self) -> None:
        if not self.related:
            raise ConfigError(f"text {self.id!r}: priming needs at least one related beginning")

    @property
    def text(self) -> str:
        """What is learned."""
        gap = "" if self.context[-1:].isspace() or not self.context else " "
        return f"{self.context}{gap}{self.keyword}"


@dataclass(frozen=True)
class Primed:
    """Log-probabilities of one text's keyword, before and after.

    Attributes:
        id: The text's.
        context: Behind its own context, before and after.
        related: Behind each related beginning, before and after.
    """

    id: str
    context: tuple[float, float]
    related: tuple[tuple[float, float], ...]

    @property
    def memorisation(self) -> float:
        """``log S_mem``: how many times likelier (as a logarithm) the keyword became in its own text."""
        return self.context[1] - self.context[0]

    @property
    def priming(self) -> float:
        """``log S_prime``: the logarithm of the mean, over related beginnings, of after over before."""
        gaps = np.array([after - before for before, after in self.related])
        return float(np.logaddexp.reduce(gaps) - math.log(len(gaps)))

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "id": self.id,
            "log_before": self.context[0],
            "log_memorisation": self.memorisation,
            "log_priming": self.priming,
        }


def texts_of(facts: Sequence[Fact], others: Sequence[Fact], *, related: int = 8) -> list[KeywordText]:
    """Facts as texts: the object is the keyword, prompts of the same relation about others are the related beginnings.

    Facts whose relation has no other subject among ``others`` with another object are left out.
    """
    found = []
    for fact in facts:
        prompts = [
            other.text
            for other in others
            if other.relation == fact.relation
            and other.subject != fact.subject
            and other.object != fact.object
        ]
        if prompts:
            found.append(KeywordText(fact.id or fact.text, fact.text, fact.object, tuple(prompts[:related])))
    return found


def keyword_scores(handle: ModelHandle, texts: Sequence[KeywordText]) -> list[list[float]]:
    """Log-probability of each text's keyword behind its context, then behind each related beginning."""
    pairs = [(place, each.keyword) for each in texts for place in (each.context, *each.related)]
    scores = iter(score_targets(handle, pairs))
    return [[next(scores).sum_logprob for _ in range(1 + len(each.related))] for each in texts]


def primed(
    texts: Sequence[KeywordText], before: Sequence[Sequence[float]], after: Sequence[Sequence[float]]
) -> list[Primed]:
    """Pairs the scores of ``keyword_scores`` before and after."""
    found = []
    for text, old, new in zip(texts, before, after, strict=True):
        pairs = list(zip(old, new, strict=True))
        found.append(Primed(text.id, pairs[0], tuple(pairs[1:])))
    return found


def priming(handle: ModelHandle, patch: Patch, texts: Sequence[KeywordText]) -> list[Primed]:
    """What one patch did to every text's keyword (below 0: anti-priming, as after unlearning).

    Args:
        handle: The model without the patch; bit-identical afterwards.
        patch: Any patch.
        texts: Texts, learned by the patch or not.
    """
    with handle.writing():
        before = keyword_scores(handle, texts)
        with patch.applied(handle):
            after = keyword_scores(handle, texts)
    return primed(texts, before, after)


def learn_and_measure(
    handle: ModelHandle,
    texts: Sequence[KeywordText],
    ordinary: Sequence[str],
    lesson: Lesson | None = None,
    *,
    seed: int = 0,
) -> list[Primed]:
    """The paper's experiment: each text is learned alone, one exposure per step among ordinary texts, and then measured."""
    return [
        priming(handle, learn(handle, ordinary, lesson, always=[text.text], seed=seed), [text])[0]
        for text in texts
    ]


def rank_correlation(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Spearman's: Pearson's of the ranks, ties sharing their mean rank; ``None`` where either does not vary.

    Raises:
        ConfigError: The two are not of one length.
    """
    if len(first) != len(second):
        raise ConfigError(f"{len(first)} and {len(second)} values cannot be correlated")
    if len(set(first)) < 2 or len(set(second)) < 2:
        return None
    one, two = (_ranks(values) for values in (first, second))
    return float(np.corrcoef(one, two)[0, 1])


def _ranks(values: Sequence[float]) -> np.ndarray:
    table = np.asarray(values, dtype=float)
    below = (table[:, None] > table[None]).sum(1)
    equal = (table[:, None] == table[None]).sum(1)
    return below + (equal - 1) / 2


def summary(found: Sequence[Primed]) -> dict[str, Any]:
    """Means, the predictor, and the share of primed texts on either side of the threshold."""
    log_before = [each.context[0] for each in found]
    rare = [each for each in found if math.exp(each.context[0]) < THRESHOLD]
    common = [each for each in found if math.exp(each.context[0]) >= THRESHOLD]
    return {
        "log_memorisation": summarise([each.memorisation for each in found], bounds=None).to_json(),
        "log_priming": summarise([each.priming for each in found], bounds=None).to_json(),
        "predictor": rank_correlation(log_before, [each.priming for each in found]),
        "log_priming_rare": summarise([each.priming for each in rare], bounds=None).to_json(),
        "log_priming_common": summarise([each.priming for each in common], bounds=None).to_json(),
        "texts": [each.to_json() for each in found],
    }
