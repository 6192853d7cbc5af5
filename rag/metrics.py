"""How well retrieval finds what it should: pure functions of ranked names."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from lab.errors import ConfigError


def recall_at_k(ranked: Sequence[str], relevant: Collection[str], k: int) -> float | None:
    """Share of the relevant names among the first ``k``; ``None`` where nothing is relevant.

    Raises:
        ConfigError: ``k`` is below 1.
    """
    _check(k)
    wanted = set(relevant)
    return len(wanted & set(ranked[:k])) / len(wanted) if wanted else None


def hit_at_k(ranked: Sequence[str], relevant: Collection[str], k: int) -> float | None:
    """1 where a relevant name is among the first ``k``, else 0; ``None`` where nothing is relevant.

    Raises:
        ConfigError: ``k`` is below 1.
    """
    _check(k)
    wanted = set(relevant)
    return float(not wanted.isdisjoint(ranked[:k])) if wanted else None


def reciprocal_rank(ranked: Sequence[str], relevant: Collection[str]) -> float | None:
    """One over the rank of the first relevant name, from 1; 0 where none was found, ``None`` where nothing is relevant.

    Its mean over questions is the MRR.
    """
    wanted = set(relevant)
    if not wanted:
        return None
    return next((1 / rank for rank, name in enumerate(ranked, start=1) if name in wanted), 0.0)


def mean_scored(values: Sequence[float | None]) -> float | None:
    """Mean over the values that are there; ``None`` where none is."""
    found = [value for value in values if value is not None]
    return sum(found) / len(found) if found else None


def _check(k: int) -> None:
    if k < 1:
        raise ConfigError(f"a cut-off is at least 1, it is {k}")
