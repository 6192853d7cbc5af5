"""Retrieval figures against values worked out by hand."""

from __future__ import annotations

import pytest

from lab.errors import ConfigError
from rag.metrics import hit_at_k, mean_scored, recall_at_k, reciprocal_rank


def test_by_hand():
    ranked = ["a", "b", "c", "d"]
    assert [recall_at_k(ranked, ["b", "d", "x"], k) for k in (1, 2, 4, 9)] == [0, 1 / 3, 2 / 3, 2 / 3]
    assert [hit_at_k(ranked, ["b", "d"], k) for k in (1, 2, 4)] == [0, 1, 1]
    assert reciprocal_rank(ranked, ["d", "c"]) == 1 / 3
    assert reciprocal_rank(ranked, ["x"]) == reciprocal_rank([], ["x"]) == 0
    assert mean_scored([1.0, None, 0.5]) == 0.75


def test_nothing_relevant_is_no_score():
    assert recall_at_k(["a"], [], 1) is hit_at_k(["a"], [], 1) is reciprocal_rank(["a"], []) is None
    assert mean_scored([None]) is mean_scored([]) is None
    with pytest.raises(ConfigError, match="cut-off"):
        recall_at_k(["a"], ["a"], 0)
