"""What editors put into a patch: deltas, provenance, what earlier patches hand on, and notes on searches and statistics."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from editors.base import EditorOptions, Plan
from editors.values import ValueResult
from lab.errors import BaseMismatchError, NumericalError
from lab.handle import ModelHandle
from lab.patch import Carry, Delta, LowRank, Provenance, WeightPatch, library_versions
from lab.records import EditRequest
from lab.stats import KeyStats


def make_patch(
    handle: ModelHandle,
    options: EditorOptions,
    plan: Plan,
    requests: Sequence[EditRequest],
    deltas: Mapping[str, Delta],
    parents: Sequence[str],
    extra: Mapping[str, Any],
    *,
    carry: tuple[Carry, ...] = (),
) -> WeightPatch:
    """A patch with its provenance, and with what it hands on to later edits."""
    provenance = Provenance(
        method=options.spec,
        config=plan.config,
        requests=tuple(request.to_json() for request in requests),
        seed=options.seed,
        versions=library_versions(),
        extra={"preset": plan.preset.to_json(), "prefixes": list(plan.prefixes.flat), **extra},
    )
    return WeightPatch(handle.fingerprint, dict(deltas), provenance, tuple(parents), carry)


def carried(
    history: Sequence[WeightPatch], kind: str, handle: ModelHandle | None = None
) -> tuple[Carry, ...]:
    """What earlier patches hand on, oldest first.

    Args:
        history: Earlier patches.
        kind: Of what is wanted (``Carry.kind``).
        handle: The model that is edited now; the patches must be its own.

    Raises:
        BaseMismatchError: A patch was made for another model.
    """
    # A session may hold patches of other kinds, which carry nothing.
    weights = [patch for patch in history if isinstance(patch, WeightPatch)]
    for patch in weights:
        if handle is not None and patch.base != handle.fingerprint:
            raise BaseMismatchError(
                f"a patch in the history was made for base {patch.base[:12]}, {handle.name!r} is {handle.fingerprint[:12]}; "
                "a sequence of edits stays on one model"
            )
    return tuple(carry for patch in weights for carry in patch.carry if carry.kind == kind)


def low_rank(left: Tensor, right: Tensor, what: str) -> LowRank:
    """A delta that is known to be finite.

    Raises:
        NumericalError: It is not; names ``what``.
    """
    delta = LowRank(left, right)
    if not all(bool(part.isfinite().all()) for part in delta.tensors().values()):
        raise NumericalError(f"{what}: the update holds NaN or infinity; the model stays as it was")
    return delta


def value_trace(request: EditRequest, result: ValueResult) -> dict[str, Any]:
    """What a patch says about one value search."""
    return {
        "id": request.id,
        "steps": len(result.losses),
        "p_target": result.p_target,
        "losses": [dataclasses.asdict(step) for step in result.losses],
    }


def stats_note(stats: Mapping[int, KeyStats]) -> list[dict[str, Any]]:
    """What a patch says about the key statistics behind it."""
    return [
        {
            "layer": layer,
            "tokens": each.count,
            "source": each.source,
            "convergence": [list(pair) for pair in each.convergence],
            "warning": each.warning,
            "relative_ridge": each.factor().relative_ridge,
        }
        for layer, each in sorted(stats.items())
    ]


@contextmanager
def temporarily(handle: ModelHandle, deltas: Mapping[str, LowRank]) -> Iterator[None]:
    """Adds deltas beside the weights for the length of a ``with``; no weight is written."""
    if not deltas:
        yield
        return
    patch = WeightPatch(handle.fingerprint, dict(deltas), Provenance("unfinished"))
    with patch.applied(handle, mode="sidecar"):
        yield
