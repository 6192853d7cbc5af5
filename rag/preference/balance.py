"""How many rows of each kind are trained on: rows brought to a ratio."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from lab.errors import ConfigError
from rag.preference.stage import Dataset, Record, Stage, draw_for, finish, records


def water_fill(
    counts: Mapping[str, int], ratios: Mapping[str, float], total: int | None = None
) -> dict[str, int]:
    """How many of each kind to keep so that their numbers come closest to ``ratios``.

    Kinds that have fewer than their part give all they have, and the others share out what is left over in their ratio.

    Args:
        counts: How many there are of each kind.
        ratios: Wanted parts; kinds without one are left out.
        total: How many to keep in all; without it, as many as every kind that exists can match exactly.
    """
    open_ = {name: ratio for name, ratio in ratios.items() if ratio > 0 and counts.get(name, 0) > 0}
    if total is None:
        scale = min((counts[name] / ratio for name, ratio in open_.items()), default=0.0)
        # A count divided and multiplied again must not end just below itself.
        return {name: int(ratio * scale + 1e-9) if name in open_ else 0 for name, ratio in ratios.items()}
    kept = dict.fromkeys(ratios, 0)
    left = float(total)
    while open_:
        scale = left / sum(open_.values())
        full = [name for name, ratio in open_.items() if counts[name] <= ratio * scale]
        if not full:
            return kept | {name: int(ratio * scale + 1e-9) for name, ratio in open_.items()}
        for name in full:
            kept[name] = counts[name]
            left -= counts[name]
            del open_[name]
    return kept


def balance(
    data: Dataset,
    ratios: Mapping[str, float],
    *,
    key: Sequence[str] = ("error_type",),
    total: int | None = None,
    repeat: int = 1,
    seed: int = 0,
) -> Stage:
    """Brings kinds of rows to a ratio: common kinds are thinned out, rare ones repeated.

    Args:
        data: Rows.
        ratios: Kind (values of ``key`` joined by ``/``) to its part.
        key: Columns that make the kind.
        total: How many rows in all, see ``water_fill``; without it, the ratio is met exactly, with at most as many rows as came.
        repeat: How often a row may occur.
        seed: Draws which rows stay or come again.
    """
    if repeat < 1:
        raise ConfigError(f"repeat counts how often a row may occur; it is {repeat}, give at least 1")
    rows = records(data)
    kinds = ["/".join(str(row[name]) for name in key) for row in rows]
    counts = Counter(kinds)
    if missing := [name for name in counts if name not in ratios]:
        raise ConfigError(f"no ratio for {missing[0]!r}; name every kind: {', '.join(sorted(counts))}")
    most = {kind: count * repeat for kind, count in counts.items()}
    wanted = water_fill(most, ratios, total)
    if total is None and sum(wanted.values()) > len(rows):
        wanted = water_fill(most, ratios, len(rows))
    made: list[Record] = []
    for kind, number in wanted.items():
        places = [place for place, other in enumerate(kinds) if other == kind]
        rounds, rest = divmod(number, len(places)) if places else (0, 0)
        drawn = draw_for(seed, "balance", kind).sample(places, rest)
        made += [rows[place] | {"_place": place} for place in [*places * rounds, *drawn]]
    made.sort(key=lambda row: row["_place"])
    made = [{name: value for name, value in row.items() if name != "_place"} for row in made]
    settings: dict[str, Any] = {"requested": dict(ratios), "achieved": wanted, "available": dict(counts)}
    gone = {f"beyond the part of {kind}": max(0, counts[kind] - wanted[kind]) for kind in counts}
    again = {kind: max(0, wanted[kind] - counts[kind]) for kind in counts}
    return finish(
        "balance", len(rows), made, gone, key=list(key), total=total, repeat=repeat, repeated=again, seed=seed,
        **settings,
    )  # fmt: skip
