"""General ability beside a comparison: lm-eval's tasks before the edits and under them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from editors.bench import BenchOptions
    from lab.eval.lm_eval import Ability
    from lab.handle import ModelHandle
    from lab.records import EditRequest


def ability_row(
    handle: ModelHandle,
    kept: Sequence[tuple[tuple[EditRequest, ...], Any]],
    options: BenchOptions,
    before: Ability,
) -> dict[str, Any]:
    """Ability before and after: under all patches together, or of single edits under each of the first few alone.

    Args:
        handle: The model as it was.
        kept: Patches with their requests, in the order of the edits.
        options: Tasks, and the protocol.
        before: What the model scored as it was; filled by the first call.

    Returns:
        ``edits`` (how many patches the second figure is over) and ``tasks``: task to metric to ``before`` and ``after``. Of single
        edits, ``after`` is the mean over patches and its interval the mean interval of one.
    """
    from lab.eval.lm_eval import general_ability

    def asked() -> Ability:
        return general_ability(
            handle,
            options.general_ability,
            task_path=options.task_path,
            limit=options.task_limit,
            batch_size=options.batch_size,
        )

    if not before:
        before.update(asked())
    patches = [patch for _, patch in kept]
    if options.protocol == "single":
        # A later round of one case stands on the one before it and is no edit of its own.
        alone = [patch for patch in patches if not patch.parents][: options.drift]
        found = []
        for patch in alone:
            with patch.applied(handle):
                found.append(asked())
    else:
        alone = patches
        with ExitStack() as stack:
            for patch in patches:
                stack.enter_context(patch.applied(handle))
            found = [asked()]
    return {
        "edits": len(alone),
        "tasks": {
            task: {
                name: {
                    "before": figure.to_json(),
                    "after": _mean([each[task][name].to_json() for each in found]),
                }
                for name, figure in figures.items()
            }
            for task, figures in before.items()
        },
    }


def _mean(figures: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    if not figures:
        return None
    means = {
        name: math.fsum(figure[name] for figure in figures) / len(figures) for name in ("mean", "low", "high")
    }
    return means | {"n": figures[0]["n"]}


def ability_lines(rows: Sequence[dict[str, Any]]) -> list[list[Any]]:
    """Lines of a table: editor, suite, model, task, metric, before, after."""
    lines = []
    for row in rows:
        for task, metrics in (row.get("general_ability") or {}).get("tasks", {}).items():
            for name, pair in metrics.items():
                after = pair["after"]
                figures = (pair["before"]["mean"], None if after is None else after["mean"])
                lines.append([row["editor"], row["suite"], row["model"], task, name, *figures])
    return lines
