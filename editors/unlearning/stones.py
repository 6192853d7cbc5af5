"""Stepping stones: a clause before a surprising text, so that learning it spreads less to other prompts.

Sun et al. 2025, arXiv 2504.09522: what a model learns leaks into unrelated prompts when its keyword was improbable (below about
1e-3) where it first appeared; rewriting the text so that something leads up to the keyword takes most of that away. The paper
has a language model rewrite; here the clause is chosen from templates by what the model itself says (reconstructed).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from lab.handle import ModelHandle
from lab.scoring import score_targets


def stepping_stones(
    handle: ModelHandle,
    pairs: Sequence[tuple[str, str]],
    clauses: Sequence[Sequence[str]],
    *,
    below: float = 1e-3,
) -> list[tuple[str, str]]:
    """Rewrites those texts whose first token the model finds improbable; for any fine-tune.

    Args:
        handle: The model that will be trained.
        pairs: Prompt and the text that is to follow it.
        clauses: For each pair, clauses that may come between.
        below: Probability of the first token below which a text is rewritten.

    Returns:
        The pairs; a rewritten text begins with the clause after which its first token is likeliest, if that is likelier
        than it was.
    """
    plain = [_first(score.token_logprobs) for score in score_targets(handle, pairs)]
    surprising = [index for index, first in enumerate(plain) if first < math.log(below)]
    asked = [
        (index, clause, (f"{pairs[index][0]} {clause}", pairs[index][1]))
        for index in surprising
        for clause in clauses[index]
    ]
    best = dict(enumerate(plain))
    written = list(pairs)
    scores = score_targets(handle, [pair for _, _, pair in asked]) if asked else []
    for (index, clause, _), score in zip(asked, scores, strict=True):
        if (first := _first(score.token_logprobs)) > best[index]:
            best[index] = first
            written[index] = (pairs[index][0], f"{clause} {pairs[index][1]}")
    return written


def _first(logprobs: Sequence[float]) -> float:
    return logprobs[0]
