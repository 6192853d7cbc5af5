"""Cells of a comparison of unlearning methods by method: what each kept and lost over all seeds."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from editors.unlearning.bench import STAYS, Row
from lab.eval.stats import Estimate, summarise


@dataclass(frozen=True)
class MethodResult:
    """One method over all seeds.

    Attributes:
        method: Its name.
        rows: Its cells.
        kept: Per group that stays: ``after`` (probability), ``drop`` (of the probability) and ``accuracy_drop``, with intervals.
            A fact that several seeds asked counts once, with its mean.
        forms: Per form, the mean probability after.
        matched: Whether every seed reached the reference.
    """

    method: str
    rows: tuple[Row, ...]
    kept: Mapping[str, Mapping[str, Estimate]]
    forms: Mapping[str, float]
    matched: bool

    @property
    def drop(self) -> float | None:
        """Mean over the groups that stay of what is lost; what methods are ranked by, least first."""
        found = [table["drop"].mean for table in self.kept.values() if table["drop"].mean is not None]
        return sum(found) / len(found) if found else None

    def mean(self, name: str) -> float | None:
        """Mean of a plain figure over the seeds that have it."""
        found = [row[name] for row in self.rows if row[name] is not None]
        return sum(found) / len(found) if found else None

    def to_json(self) -> Row:
        """Everything but the cells."""
        return {
            "method": self.method,
            "seeds": [row["seed"] for row in self.rows],
            "matched": self.matched,
            "drop": self.drop,
            "forms": dict(self.forms),
            **{
                name: self.mean(name)
                for name in ("dose", "gap", "form_independence", "seconds", "peak_mb", "norm")
            },
            **{group: {name: e.to_json() for name, e in table.items()} for group, table in self.kept.items()},
        }


def pool(rows: Iterable[Row]) -> tuple[MethodResult, ...]:
    """Cells by method: matched ones by what they lose, least first, then the others by name."""
    by_method: dict[str, list[Row]] = {}
    for row in rows:
        if "error" not in row:
            by_method.setdefault(row["method"], []).append(row)
    found = [_pooled(method, cells) for method, cells in by_method.items()]
    ranked = sorted(
        (r for r in found if r.matched), key=lambda r: (r.drop if r.drop is not None else math.inf, r.method)
    )
    return (*ranked, *sorted((r for r in found if not r.matched), key=lambda r: r.method))


def _pooled(method: str, rows: Sequence[Row]) -> MethodResult:
    kept = {}
    for group in STAYS:
        facts: dict[str, list[Row]] = {}
        for row in rows:
            for fact in row["facts"][group]:
                facts.setdefault(fact["id"], []).append(fact)

        def mean(read: Callable[[Row], float], facts: dict[str, list[Row]] = facts) -> list[float]:
            return [math.fsum(read(one) for one in same) / len(same) for same in facts.values()]

        kept[group] = {
            "after": summarise(mean(lambda fact: fact["after"][0])),
            "drop": summarise(mean(lambda fact: fact["before"][0] - fact["after"][0]), (-1.0, 1.0)),
            "accuracy_drop": summarise(mean(lambda fact: fact["before"][1] - fact["after"][1]), (-1.0, 1.0)),
        }
    names = list(dict.fromkeys(form for row in rows for form in row["forms"]))
    forms = {
        form: math.fsum(row["forms"][form]["after"] for row in rows) / len(rows)
        for form in names
        if all(form in row["forms"] for row in rows)
    }
    return MethodResult(method, tuple(rows), kept, forms, all(row["matched"] for row in rows))
