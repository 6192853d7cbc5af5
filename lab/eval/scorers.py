"""Pure scorers: observations in, numbers out; ``None`` means that the question does not apply.

Names follow the papers: *success* compares the length-normalised probabilities of two answers (Meng et al., 2022), *accuracy*
is the share of exact greedy answers under teacher forcing, *token accuracy* the share of greedy tokens (EasyEdit), *agreement* the
share of greedy tokens that stayed what they were.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np

from lab.data.text import normalize_answer
from lab.errors import MissingDependencyError
from lab.eval.probe import Observation, Probe, Rating


def _answer_and_rival(probe: Probe, seen: Observation) -> tuple[Rating, Rating] | None:
    # A rival spelled like the answer can neither win nor lose.
    if not probe.rival or not probe.answers or probe.rival.strip() == probe.answers[0].strip():
        return None
    return seen.ratings[0], seen.ratings[len(probe.answers)]


def success(probe: Probe, seen: Observation, before: Observation | None = None) -> float | None:
    """1 where the answer is more probable than its rival, by mean token log-probability; a tie is no success."""
    pair = _answer_and_rival(probe, seen)
    return None if pair is None else float(pair[0].mean_logprob > pair[1].mean_logprob)


def magnitude(probe: Probe, seen: Observation, before: Observation | None = None) -> float | None:
    """Probability of the answer minus that of its rival, each ``exp`` of the mean token log-probability."""
    pair = _answer_and_rival(probe, seen)
    return None if pair is None else pair[0].probability - pair[1].probability


def probability(probe: Probe, seen: Observation, before: Observation | None = None) -> float | None:
    """Probability of the answer: SADR's magnitude."""
    return seen.ratings[0].probability if probe.answers else None


def accuracy(probe: Probe, seen: Observation, before: Observation | None = None) -> float | None:
    """1 where every token of the answer is the most probable one."""
    return float(seen.ratings[0].all_correct) if probe.answers else None


def any_accuracy(probe: Probe, seen: Observation, before: Observation | None = None) -> float | None:
    """``accuracy`` of the best spelling of the answer."""
    return float(any(r.all_correct for r in seen.ratings[: len(probe.answers)])) if probe.answers else None


def token_accuracy(probe: Probe, seen: Observation, before: Observation | None = None) -> float | None:
    """Share of the answer's tokens that are the most probable ones, the earlier ones being fed."""
    return seen.ratings[0].accuracy if probe.answers else None


def any_token_accuracy(probe: Probe, seen: Observation, before: Observation | None = None) -> float | None:
    """``token_accuracy`` of the best spelling of the answer."""
    return max(r.accuracy for r in seen.ratings[: len(probe.answers)]) if probe.answers else None


def agreement(probe: Probe, seen: Observation, before: Observation | None = None) -> float | None:
    """Share of greedy tokens along the answer that are those of ``before``; unscored without a ``before``."""
    if before is None or not probe.answers:
        return None
    now, then = seen.ratings[0].predicted, before.ratings[0].predicted
    return sum(a == b for a, b in zip(now, then, strict=True)) / len(then)


def continuation_agreement(
    probe: Probe, seen: Observation, before: Observation | None = None
) -> float | None:
    """Share of the tokens of the continuation before that stand at the same place now (EasyEdit's Sanitation locality)."""
    if before is None or not before.text_tokens:
        return None
    same = sum(a == b for a, b in zip(seen.text_tokens, before.text_tokens, strict=False))
    return same / len(before.text_tokens)


def says_answer(probe: Probe, seen: Observation, before: Observation | None = None) -> float | None:
    """1 where the continuation holds the answer, whatever the case of letters."""
    return float(probe.answers[0].casefold() in seen.text.casefold()) if probe.answers else None


def says_rival(probe: Probe, seen: Observation, before: Observation | None = None) -> float | None:
    """1 where the continuation holds the rival, whatever the case of letters."""
    return float(probe.rival.casefold() in seen.text.casefold()) if probe.rival else None


def fluency(probe: Probe, seen: Observation, before: Observation | None = None) -> float | None:
    """100 times the n-gram entropy of prompt and continuation together, as ROME measures it."""
    gap = "" if not seen.text or seen.text[0].isspace() or probe.prompt[-1:].isspace() else " "
    return 100 * ngram_entropy(probe.prompt + gap + seen.text)


def exact_match(text: str, answers: Sequence[str]) -> bool:
    """Whether ``text`` is one of ``answers``, case, punctuation and articles aside."""
    said = normalize_answer(text)
    return any(said == normalize_answer(answer) for answer in answers)


def starts_with_answer(text: str, answers: Sequence[str]) -> bool:
    """Whether the first words of ``text`` are one of ``answers``: for continuations that run on after the answer."""
    said = normalize_answer(text).split()
    wanted = [normalize_answer(answer).split() for answer in answers]
    return any(words and said[: len(words)] == words for words in wanted)


def words(text: str) -> list[str]:
    """Word tokens as NLTK's Treebank tokenizer makes them, sentence by sentence.

    NLTK's own ``word_tokenize`` splits sentences with a model that has to be downloaded; here an untrained Punkt does, which
    takes the full stop of an abbreviation for the end of a sentence. Entropies move in the third digit at most.

    Raises:
        MissingDependencyError: ``nltk`` is not installed.
    """
    try:
        from nltk.tokenize import NLTKWordTokenizer
        from nltk.tokenize.punkt import PunktSentenceTokenizer
    except ImportError:
        raise MissingDependencyError("nltk", "the fluency metric", "train") from None
    tokenizer = NLTKWordTokenizer()
    return [
        word for sentence in PunktSentenceTokenizer().tokenize(text) for word in tokenizer.tokenize(sentence)
    ]


def ngram_entropy(text: str) -> float:
    """Mean of the entropies (base 2) of bigrams, weighted 2/3, and trigrams, weighted 4/3; 0 for fewer than two words."""
    tokens = words(text)
    return (2 / 3 * _entropy(tokens, 2) + 4 / 3 * _entropy(tokens, 3)) / 2


def _entropy(tokens: Sequence[str], n: int) -> float:
    counts = Counter(tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1))
    total = sum(counts.values())
    return -math.fsum(c / total * math.log2(c / total) for c in counts.values()) if total else 0.0


def opinion_success(
    same: Sequence[Observation], opposite: Sequence[Observation], same_before: Sequence[Observation]
) -> float | None:
    """ConvSent: ``z_sent * z_topic`` (Mitchell et al., 2022).

    ``z_sent`` is the logistic of the gap between the mean token log-probabilities of opinions of the wanted and of the other
    sentiment, ``z_topic`` how much of the wanted ones' probability is left, at most 1. Means are over tokens.
    """
    if not same or not opposite or not same_before:
        return None
    now, other, then = _mean_token(same), _mean_token(opposite), _mean_token(same_before)
    return 1 / (1 + math.exp(min(700.0, other - now))) * min(1.0, math.exp(min(0.0, now - then)))


def drift(seen: Sequence[Observation], before: Sequence[Observation]) -> float | None:
    """ConvSent's locality: KL(before ‖ after), mean over the tokens of the answers; lower is better."""
    total, count = 0.0, 0
    for now, then in zip(seen, before, strict=True):
        for after, prior in zip(now.ratings, then.ratings, strict=True):
            if after.distribution is None or prior.distribution is None:
                return None
            p, q = prior.distribution.astype(float), after.distribution.astype(float)
            total += float((np.exp(p) * (p - q)).sum())
            count += p.shape[0]
    return total / count if count else None


def _mean_token(seen: Sequence[Observation]) -> float:
    values = [value for observation in seen for value in observation.ratings[0].token_logprobs]
    return math.fsum(values) / len(values)
