"""General ability and calibration: perplexity on text, choice questions, and whether confidence still means anything."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from lab.errors import ConfigError
from lab.eval.stats import summarise
from lab.scoring import nll, score_targets
from lab.tokens import encode_ids, pad_rows

if TYPE_CHECKING:
    from lab.audit.knowledge import Candidates
    from lab.handle import ModelHandle


@dataclass(frozen=True)
class Choice:
    """A choice question as a model answered it.

    Attributes:
        confidence: Probability, among the options, of the one that it prefers.
        right: Probability, among the options, of the right one.
        correct: Whether the two are one.
    """

    confidence: float
    right: float
    correct: bool


@torch.no_grad()
def text_losses(
    handle: ModelHandle, texts: Sequence[str], *, max_tokens: int = 256, batch_size: int = 16
) -> list[tuple[float, int]]:
    """Sum of negative log-likelihoods and number of predicted tokens of each text; a text of one token predicts none.

    Args:
        handle: The model, with whatever is applied to it.
        texts: Read up to ``max_tokens`` each.
        max_tokens: Tokens per text at most.
        batch_size: Texts per forward pass.
    """
    rows = [encode_ids(handle.tokenizer, text)[:max_tokens] or [handle.pad_id] for text in texts]
    found = []
    for start in range(0, len(rows), batch_size):
        batch = pad_rows(rows[start : start + batch_size], handle.pad_id, device=handle.device)
        if batch.input_ids.shape[1] < 2:
            found += [(0.0, 0)] * batch.input_ids.shape[0]
            continue
        logits = handle.logits(batch)
        sums = nll(logits[:, :-1], batch.input_ids[:, 1:], batch.attention_mask[:, 1:], reduction="row_sum")
        found += list(zip(sums.tolist(), (batch.lengths - 1).tolist(), strict=True))
    return found


def perplexity(losses: Sequence[tuple[float, int]]) -> float:
    """``exp`` of the mean loss per token over all texts.

    Raises:
        ConfigError: No token was predicted.
    """
    count = sum(size for _, size in losses)
    if not count:
        raise ConfigError("perplexity needs a text of at least two tokens")
    return math.exp(math.fsum(loss for loss, _ in losses) / count)


def choose(handle: ModelHandle, questions: Sequence[Candidates]) -> list[Choice]:
    """Answers choice questions: options weighed by probability, which is set to sum to one over the options.

    The log-probability is that per token, so that a long name is not an unlikely one.
    """
    pairs = [(question.prompt, answer) for question in questions for answer in question.answers]
    scores = iter(score_targets(handle, pairs))
    found = []
    for question in questions:
        table = np.array([next(scores).mean_logprob for _ in question.answers])
        shares = np.exp(table - np.logaddexp.reduce(table))
        found.append(Choice(float(shares.max()), float(shares[0]), bool(shares[0] >= shares[1:].max())))
    return found


def expected_calibration_error(confidence: Sequence[float], correct: Sequence[bool], bins: int = 10) -> float:
    """Mean over equally wide bins of the gap between confidence and accuracy, weighted by how many fall in (Naeini et al. 2015).

    Raises:
        ConfigError: Nothing to calibrate, or the two do not pair up.
    """
    if not confidence or len(confidence) != len(correct) or bins < 1:
        raise ConfigError(
            "calibration needs one verdict for each confidence, at least one, and at least one bin"
        )
    sure, hit = np.asarray(confidence, dtype=float), np.asarray(correct, dtype=float)
    place = np.minimum((sure * bins).astype(int), bins - 1)
    return math.fsum(
        abs(float(sure[place == each].mean() - hit[place == each].mean())) * float((place == each).mean())
        for each in range(bins)
        if bool((place == each).any())
    )


def brier(confidence: Sequence[float], correct: Sequence[bool]) -> list[float]:
    """Squared distance of each confidence from what came true; 0 is best."""
    return [(sure - float(hit)) ** 2 for sure, hit in zip(confidence, correct, strict=True)]


def calibration(choices: Sequence[Choice], bins: int = 10) -> dict[str, Any]:
    """ECE, Brier score, mean confidence and accuracy of choice questions."""
    sure, hit = [each.confidence for each in choices], [each.correct for each in choices]
    return {
        "ece": expected_calibration_error(sure, hit, bins),
        "brier": summarise(brier(sure, hit)).to_json(),
        "confidence": summarise(sure).to_json(),
        "accuracy": summarise([float(each) for each in hit]).to_json(),
    }


def ability_change(
    before: Sequence[tuple[float, int]],
    after: Sequence[tuple[float, int]],
    choices_before: Sequence[Choice] = (),
    choices_after: Sequence[Choice] = (),
) -> dict[str, Any]:
    """Perplexity and choice accuracy before and after; changes are paired, text by text and question by question."""
    found: dict[str, Any] = {}
    pairs = [(old, new, size) for (old, size), (new, _) in zip(before, after, strict=True) if size]
    if pairs:
        found["perplexity"] = {"before": perplexity(before), "after": perplexity(after)}
        found["loss_change"] = summarise(
            [(new - old) / size for old, new, size in pairs], bounds=None
        ).to_json()
    if choices_before:
        found["choice"] = {
            "before": summarise([float(each.correct) for each in choices_before]).to_json(),
            "after": summarise([float(each.correct) for each in choices_after]).to_json(),
            "change": summarise(
                [
                    float(new.correct) - old.correct
                    for old, new in zip(choices_before, choices_after, strict=True)
                ],
                bounds=(-1.0, 1.0),
            ).to_json(),
        }
    return found
