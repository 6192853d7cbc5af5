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
    """The result of the variant whose lift is surest (highest lower end); the others stand in ``details``.

    Raises:
        ConfigError: There is no variant.
    """
    if not variants:
        raise ConfigError(f"the attack {attack.name!r} tried nothing")
    found = {
        name: result_of(attack, subject, scores, tried=tried, note=note, curves=curves)
        for name, scores in variants.items()
    }
    worst = max(found, key=lambda name: (found[name].lift.low, found[name].lift.mean))
    table = {
        name: {
            "leak": result.leak,
            "lift": result.lift.to_json(),
            "controls": {key: value.mean for key, value in result.controls.items()},
            "facts": len(result.per_fact),
        }
        for name, result in found.items()
    }
    return replace(found[worst], details={"worst": worst, "variants": table, **(details or {})})


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
