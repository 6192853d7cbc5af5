"""Ranking by shared words (BM25), joining rankings, and choosing results that differ."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

_WORD = re.compile(r"\w+")
# The constant of Cormack, Clarke and Büttcher (SIGIR 2009).
_RANK_OFFSET = 60


def words(text: str) -> list[str]:
    """The words of a text, case folded."""
    return _WORD.findall(text.casefold())


class WordRanking:
    """BM25 over some texts.

    Args:
        ids: Their names.
        texts: The texts, as many.
    """

    def __init__(self, ids: Sequence[str], texts: Sequence[str]) -> None:
        import bm25s

        self._ids = np.asarray(ids, dtype=object)
        corpus = [words(text) for text in texts]
        self._model: Any = None
        # The library cannot index texts without a single word among them.
        if any(corpus):
            self._model = bm25s.BM25()
            self._model.index(corpus, show_progress=False)

    def rank(self, query: str, k: int, keep: set[str] | None = None) -> list[tuple[str, float]]:
        """Ids and scores of the texts that share a word with the query, at most ``k``, best first.

        Args:
            query: Any text.
            k: How many.
            keep: Only these ids; all without it.
        """
        asked = words(query)
        if self._model is None or not asked:
            return []
        scores = np.asarray(self._model.get_scores(asked))
        hits = np.flatnonzero(scores > 0)
        if keep is not None:
            hits = np.asarray([index for index in hits if self._ids[index] in keep], dtype=int)
        if len(hits) > k:
            # All that reach the score of the last place; sorting every text that shares a word would cost most of a search.
            reached = scores[hits]
            hits = hits[reached >= np.partition(reached, len(hits) - k)[len(hits) - k]]
        best = sorted(hits.tolist(), key=lambda index: (-scores[index], self._ids[index]))[:k]
        return [(str(self._ids[index]), float(scores[index])) for index in best]


def fuse(rankings: Sequence[Sequence[str]]) -> list[tuple[str, float]]:
    """Joins rankings of ids by the sum of ``1 / (60 + rank)`` (reciprocal rank fusion, SIGIR 2009), ranks from 1; best first."""
    total: dict[str, float] = {}
    for ranking in rankings:
        for rank, id in enumerate(ranking, start=1):
            total[id] = total.get(id, 0.0) + 1 / (_RANK_OFFSET + rank)
    return sorted(total.items(), key=lambda item: (-item[1], item[0]))


def diverse(query: np.ndarray, vectors: np.ndarray, k: int, weight: float) -> list[int]:
    """Chooses rows that are like the query and unlike each other (maximal marginal relevance, SIGIR 1998).

    Args:
        query: ``[width]``.
        vectors: ``[row, width]``.
        k: How many.
        weight: 1 looks at the query alone, 0 at the rows already chosen.

    Returns:
        Indices of rows, in the order chosen.
    """
    from langchain_core.vectorstores.utils import maximal_marginal_relevance

    return [int(i) for i in maximal_marginal_relevance(query, list(vectors), lambda_mult=weight, k=k)]
