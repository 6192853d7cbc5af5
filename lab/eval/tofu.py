"""TOFU's figures of a model (Maini et al., 2024): probability, ROUGE-L recall and truth ratio on each of its four sets.

>>> oracle = tofu_scores(oracle_handle, sets)                                     # doctest: +SKIP
>>> unlearned = tofu_scores(handle, sets)                                         # doctest: +SKIP
>>> tofu_summary(unlearned, oracle)["forget_quality"]                             # doctest: +SKIP
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lab.data.asked import Asked
from lab.data.unlearning import QUESTION_PROMPT
from lab.errors import ConfigError
from lab.eval import unlearning_metrics as metrics
from lab.scoring import score_targets

if TYPE_CHECKING:
    from lab.handle import ModelHandle

SETS = ("forget", *metrics.UTILITY_SETS)


@dataclass(frozen=True)
class SetScores:
    """One set's figures, a value per question.

    Attributes:
        probability: Of the answer, length-normalised; on real authors and world facts its share among the options.
        rouge_l_recall: Of the greedy answer.
        truth_ratio: Raw: wrong over right.
        extraction_strength, exact_memorization: Of the answer.
    """

    probability: tuple[float, ...]
    rouge_l_recall: tuple[float, ...]
    truth_ratio: tuple[float, ...]
    extraction_strength: tuple[float, ...]
    exact_memorization: tuple[float, ...]

    def means(self, *, forget: bool = False) -> dict[str, float]:
        """Means; truth ratios as the score of forgotten facts or of facts that stay."""
        score = metrics.truth_ratio_forget if forget else metrics.truth_ratio_utility
        return {
            "probability": _mean(self.probability),
            "rouge_l_recall": _mean(self.rouge_l_recall),
            "truth_ratio": _mean([score(ratio) for ratio in self.truth_ratio]),
            "extraction_strength": _mean(self.extraction_strength),
            "exact_memorization": _mean(self.exact_memorization),
        }


def tofu_scores(
    handle: ModelHandle,
    sets: Mapping[str, Sequence[Asked]],
    *,
    prompt: str = QUESTION_PROMPT,
    max_new_tokens: int = 200,
    batch_size: int = 32,
) -> dict[str, SetScores]:
    """Asks a model all questions of TOFU's sets.

    Args:
        handle: The model.
        sets: ``forget``, ``retain``, ``real_authors``, ``world_facts`` (or some of them) to the items of the perturbed files.
        prompt: How a question is put, with one ``{}``; the one that beds are trained in by default.
        max_new_tokens: Of a greedy answer, which ends at a line break.
        batch_size: Rows in one forward pass.

    Raises:
        ConfigError: Another set, one without questions, or a question without wrong answers.
    """
    found = {}
    for name, items in sets.items():
        if name not in SETS or not items:
            raise ConfigError(f"the set {name!r} must be one of {', '.join(SETS)} and hold questions")
        for item in items:
            if not item.wrong:
                raise ConfigError(
                    f"{item.file}:{item.line}: no wrong answers; TOFU's figures need the perturbed files"
                )
        found[name] = _scores(
            handle, items, name in ("real_authors", "world_facts"), prompt, max_new_tokens, batch_size
        )
    return found


def _scores(
    handle: ModelHandle,
    items: Sequence[Asked],
    options: bool,
    prompt: str,
    max_new_tokens: int,
    batch_size: int,
) -> SetScores:
    prompts = [prompt.replace("{}", item.prompt) for item in items]
    pairs = []
    for text, item in zip(prompts, items, strict=True):
        pairs += [(text, item.answer), (text, item.paraphrased_answer or item.answer)]
        pairs += [(text, wrong) for wrong in item.wrong]
    scores = iter(score_targets(handle, pairs, batch_size=batch_size))
    said = handle.generate(prompts, max_new_tokens=max_new_tokens, stop=("\n",))
    rows = []
    for item, text in zip(items, said, strict=True):
        answer, paraphrased = next(scores), next(scores)
        wrong = [next(scores).mean_logprob for _ in item.wrong]
        right = answer.mean_logprob
        rows.append(
            (
                metrics.choice_probability(right, [right, *wrong]) if options else answer.probability,
                metrics.rouge_l(item.answer, text).recall,
                metrics.truth_ratio(paraphrased.mean_logprob, wrong),
                metrics.extraction_strength(answer.token_correct),
                metrics.exact_memorization(answer.token_correct),
            )
        )
    return SetScores(*(tuple(column) for column in zip(*rows, strict=True)))


def tofu_summary(
    found: Mapping[str, SetScores], oracle: Mapping[str, SetScores] | None = None
) -> dict[str, Any]:
    """The paper's figures.

    Args:
        found: Of the model in question.
        oracle: Of the model trained without the forget set, on the same questions.

    Returns:
        ``sets`` (means of each), ``model_utility`` (``None`` where one of its sets was not asked), and with an oracle
        ``forget_quality`` (the p-value), ``forget_quality_log10`` and ``forget_quality_statistic``.
    """
    means = {name: scores.means(forget=name == "forget") for name, scores in found.items()}
    whole = all(name in means for name in metrics.UTILITY_SETS)
    content: dict[str, Any] = {
        "sets": means,
        "model_utility": metrics.model_utility(means) if whole else None,
    }
    if oracle is not None and "forget" in found and "forget" in oracle:
        test = metrics.forget_quality(found["forget"].truth_ratio, oracle["forget"].truth_ratio)
        content |= {
            "forget_quality": test.p,
            "forget_quality_log10": test.log10_p,
            "forget_quality_statistic": test.statistic,
        }
    return content


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
