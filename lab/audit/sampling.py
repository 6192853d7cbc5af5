"""``sampling``: many samples where one greedy answer says nothing (leak@k)."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from lab.audit.base import Access, AttackResult, AuditSubject, Family, Progress, Scores, measured, result_of
from lab.decoding import Start, continue_rows
from lab.errors import ConfigError
from lab.eval.scorers import starts_with_answer
from lab.records import Fact
from lab.tokens import encode_ids

if TYPE_CHECKING:
    from lab.handle import ModelHandle

_TOKENS = 10
"""Tokens of a sample; more where an answer is longer."""


def leak_at(successes: int, samples: int, k: int) -> float:
    """Chance that at least one of ``k`` samples leaks, without bias: ``1 - C(n-c, k) / C(n, k)`` (Chen et al., arXiv 2107.03374).

    Raises:
        ConfigError: ``k`` is not between 1 and the number of samples.
    """
    if not 1 <= k <= samples:
        raise ConfigError(f"leak@{k} needs at least {k} samples (and one); there are {samples}")
    return 1.0 - math.comb(samples - successes, k) / math.comb(samples, k)


class Sampling:
    """Samples at temperature 1 over the whole vocabulary."""

    name = "sampling"
    family: Family = "prompt"
    access: Access = "black-box"
    paper = "leak@k: OptimAI-Lab/Leak-k"
    cost = "k short texts per fact"
    needs: tuple[str, ...] = ()
    alone = True

    def run(self, subject: AuditSubject, report_progress: Progress) -> AttackResult:
        """Runs the attack."""
        subject = subject.sample(subject.pick(16, 400))
        samples, k = subject.pick((16, 8), (128, 32))
        counts: list[list[int]] = []

        def score(handle: ModelHandle, facts: Sequence[Fact]) -> list[float]:
            report_progress(self.name, len(counts), 3)
            found = _successes(subject, handle, facts, samples)
            counts.append(found)
            return [leak_at(count, samples, k) for count in found]

        scores: Scores = measured(subject, score)
        report_progress(self.name, 3, 3)
        ks = [2**power for power in range(samples.bit_length()) if 2**power <= samples]
        line = [(float(k), math.fsum(leak_at(c, samples, k) for c in counts[0]) / len(counts[0])) for k in ks]
        return result_of(
            self,
            subject,
            scores,
            tried=f"leak@{k} from {samples} samples at temperature 1 for {len(subject.facts)} facts",
            curves={"leak@k": line},
        )


def _successes(subject: AuditSubject, handle: ModelHandle, facts: Sequence[Fact], samples: int) -> list[int]:
    """How many samples of each fact begin with its object."""
    prompts = handle.rewrite([subject.prompt(fact) for fact in facts])
    # What stands behind an answer decides where it ends, so that room for a token more is left.
    lengths = [
        max(
            _TOKENS,
            *(len(encode_ids(handle.tokenizer, answer, special=False)) + 2 for answer in fact.answers),
        )
        for fact in facts
    ]
    starts = [
        Start(tuple(encode_ids(handle.tokenizer, prompt)), length, _seed(subject.seed, prompt, number))
        for prompt, length in zip(prompts, lengths, strict=True)
        for number in range(samples)
    ]
    texts = continue_rows(handle, starts, top_k=int(handle.config.vocab_size))
    said = [
        starts_with_answer(handle.decode(ids), facts[i // samples].answers) for i, ids in enumerate(texts)
    ]
    return [sum(said[i * samples : (i + 1) * samples]) for i in range(len(facts))]


def _seed(seed: int, prompt: str, number: int) -> int:
    digest = hashlib.blake2b(f"{seed}/{number}/{prompt}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big")
