"""Attacks that try several things: which of them counts, and how facts are divided where an attack learns."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from lab.audit.base import Attack, AttackResult, AuditSubject, Scores, result_of
from lab.errors import ConfigError


def worst_variant(
    attack: Attack,
    subject: AuditSubject,
    variants: Mapping[str, Scores],
    *,
    tried: str,
    note: str = "",
    details: Mapping[str, Any] | None = None,
    curves: Mapping[str, Sequence[tuple[float, float]]] | None = None,
) -> AttackResult:
    """The result of the worst variant; the others stand in ``details``.

    The worst is the one whose lift is surest (highest lower end) where any lift is surely above zero, else the one with the
    largest lift. The intervals hold for all variants together. A variant that suits no control is never the worst where others
    have controls: its score is no lift.

    Raises:
        ConfigError: There is no variant.
    """
    if not variants:
        raise ConfigError(f"the attack {attack.name!r} tried nothing")
    found = {
        name: result_of(
            attack, subject, scores, tried=tried, note=note, curves=curves, comparisons=len(variants)
        )
        for name, scores in variants.items()
    }
    compared = [name for name, scores in variants.items() if scores.oracle or scores.never] or list(found)
    sure = [name for name in compared if found[name].lift.low > 0]
    worst = max(sure or compared, key=lambda name: found[name].lift.low if sure else found[name].lift.mean)
    table = {
        name: {
            "leak": result.leak,
            "lift": result.lift.to_json(),
            "controls": {key: value.mean for key, value in result.controls.items()},
            "facts": len(result.per_fact),
        }
        for name, result in found.items()
    }
    return replace(
        found[worst],
        details={"worst": worst, "variants": table, **(details or {})},
        variants={name: result.variants[""] for name, result in found.items()},
    )


def halves(count: int, seed: int) -> tuple[tuple[list[int], list[int]], ...]:
    """Two ways to divide ``count`` facts into facts to learn from and facts to test on, each fact tested once.

    Raises:
        ConfigError: Fewer than two facts.
    """
    if count < 2:
        raise ConfigError(f"{count} fact(s) cannot be divided into facts to learn from and facts to test on")
    order = list(range(count))
    random.Random(f"audit:{seed}:halves").shuffle(order)
    first, second = sorted(order[: count // 2]), sorted(order[count // 2 :])
    return ((first, second), (second, first))
