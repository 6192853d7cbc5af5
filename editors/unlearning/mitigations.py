"""What learning one text primes elsewhere, and how much of it two mitigations take away (Outlandish, arXiv 2504.09522).

``ignore_k`` puts the largest changes of a finished fine-tune back to what they were; ``stepping_stone`` rewrites a text whose keyword
is improbable, so that a clause leads up to it. Neither may cost what was learned, so memorisation is told beside priming.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from editors.unlearning.merging import ignore_top
from editors.unlearning.settings import CLAUSES
from editors.unlearning.sides import other_answers
from editors.unlearning.stones import stepping_stones
from lab.audit.learning import Lesson, learn
from lab.audit.side_effects.priming import KeywordText, Primed, priming, texts_of
from lab.errors import ConfigError
from lab.eval.stats import Estimate, summarise

if TYPE_CHECKING:
    from editors.values import Progress
    from lab.handle import ModelHandle
    from lab.records import Fact

MITIGATIONS = ("plain", "ignore_k", "stepping_stone")
"""``plain`` is learning without any."""

OTHERS_FIRST = "neither {} nor {}, but"
_RESAMPLES = 2000


@dataclass(frozen=True)
class MitigationOptions:
    """How texts are learned and mitigated.

    Attributes:
        lesson: The fine-tune of one text, beside ordinary ones.
        share: ``ignore_k``: share of the changed entries that goes back; the paper's 8 %.
        below: ``stepping_stone``: probability of a keyword's first token below which its text is rewritten.
        clauses: ``stepping_stone``: what may lead up to a keyword, with ``{subject}`` and ``{relation}``; a clause that names two other
            answers of the relation is always among them.
    """

    lesson: Lesson = field(default_factory=lambda: Lesson(steps=12))
    share: float = 0.08
    below: float = 1e-3
    clauses: tuple[str, ...] = CLAUSES


@dataclass(frozen=True)
class Mitigated:
    """One text under every mitigation.

    Attributes:
        found: By mitigation, what its keyword gained. Memorisation is that behind the text as it was learned.
        rewritten: The text as ``stepping_stone`` learned it; ``None`` where it was left as it is.
    """

    found: dict[str, Primed]
    rewritten: str | None

    def priming(self, mitigation: str) -> float:
        """``S_prime``: how many times likelier the keyword became where it does not belong, on average."""
        return float(np.exp(self.found[mitigation].priming))


def measure_mitigations(
    handle: ModelHandle,
    facts: Sequence[Fact],
    pool: Sequence[Fact],
    ordinary: Sequence[str],
    options: MitigationOptions | None = None,
    *,
    seed: int = 0,
    progress: Progress | None = None,
) -> list[Mitigated]:
    """Learns each fact alone, plainly and with each mitigation; the model is bit-identical afterwards.

    Args:
        handle: The model.
        facts: Facts to learn, one at a time; those without a related beginning in ``pool`` are left out.
        pool: Facts whose prompts are related beginnings, and whose objects clauses may name.
        ordinary: Sentences that every step has beside the learned one.
        options: How; the defaults without it.
        seed: Of the batches and of the names in clauses.
        progress: Told about every text.

    Raises:
        ConfigError: No fact has a related beginning.
    """
    options = options or MitigationOptions()
    by_id = {fact.id or fact.text: fact for fact in facts}
    texts = texts_of(facts, pool)
    if not texts:
        raise ConfigError("priming needs facts with others of their relations, whose objects differ")
    written = _rewritten(handle, texts, [by_id[text.id] for text in texts], pool, options, seed)
    results = []
    for number, (text, stone) in enumerate(zip(texts, written, strict=True)):
        lesson = learn(handle, ordinary, options.lesson, always=[text.text], seed=seed)
        found = {
            "plain": priming(handle, lesson, [text])[0],
            "ignore_k": priming(handle, ignore_top(lesson, options.share), [text])[0],
        }
        found["stepping_stone"] = (
            found["plain"]
            if stone is text
            else priming(
                handle, learn(handle, ordinary, options.lesson, always=[stone.text], seed=seed), [stone]
            )[0]
        )
        results.append(Mitigated(found, None if stone is text else stone.text))
        if progress is not None:
            progress("texts", number + 1, len(texts))
    return results


def _rewritten(
    handle: ModelHandle,
    texts: Sequence[KeywordText],
    facts: Sequence[Fact],
    pool: Sequence[Fact],
    options: MitigationOptions,
    seed: int,
) -> list[KeywordText]:
    """Each text with the clause that makes its keyword likeliest; the same object where none does or none is needed."""
    rng = random.Random(f"stones:{seed}")
    clauses = []
    for fact in facts:
        words = {"subject": fact.subject, "relation": fact.relation.replace("_", " ")}
        own = [clause.format_map(words) for clause in options.clauses]
        others = other_answers(fact, pool)
        if len(others) > 1:
            own.append(OTHERS_FIRST.format(*rng.sample(others, 2)))
        clauses.append(own)
    pairs = [(text.context, text.keyword) for text in texts]
    found = stepping_stones(handle, pairs, clauses, below=options.below)
    return [
        text
        if said == text.keyword
        else replace(text, context=f"{text.context} {said.removesuffix(text.keyword).rstrip()}")
        for text, (_, said) in zip(texts, found, strict=True)
    ]


def fall(results: Sequence[Mitigated], mitigation: str, *, seed: int = 0) -> Estimate:
    """Part of the median ``S_prime`` of plain learning that a mitigation takes away, bootstrapped over texts (95 %)."""
    plain, after = (np.array([each.priming(name) for each in results]) for name in ("plain", mitigation))
    drawn = np.random.default_rng(seed).integers(len(plain), size=(_RESAMPLES, len(plain)))
    parts = 1 - np.median(after[drawn], axis=1) / np.median(plain[drawn], axis=1)
    low, high = np.quantile(parts, (0.025, 0.975))
    return Estimate(float(1 - np.median(after) / np.median(plain)), float(low), float(high), len(plain))


def mitigation_table(results: Sequence[Mitigated], *, seed: int = 0) -> list[dict[str, Any]]:
    """A row per mitigation.

    Returns:
        ``mitigation``, ``median_priming`` (``S_prime``), ``log_priming`` with interval, ``fall`` (of the median, against plain; ``None``
        for plain itself), ``probability`` of the keyword behind its text after learning and ``probability_before``, ``rewritten``:
        texts that were.
    """
    rows = []
    for name in MITIGATIONS:
        found = [each.found[name] for each in results]
        rows.append(
            {
                "mitigation": name,
                "median_priming": float(np.median([each.priming(name) for each in results])),
                "log_priming": summarise([each.priming for each in found], bounds=None).to_json(),
                "fall": None if name == "plain" else fall(results, name, seed=seed).to_json(),
                "probability_before": summarise([float(np.exp(each.context[0])) for each in found]).to_json(),
                "probability": summarise([float(np.exp(each.context[1])) for each in found]).to_json(),
                "rewritten": sum(each.rewritten is not None for each in results)
                if name == "stepping_stone"
                else 0,
            }
        )
    return rows
