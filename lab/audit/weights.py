"""Attacks on the weights themselves: quantisation, pruning, and taking removable patches off.

What unlearning changed by less than half a step of a coarser grid comes back when weights are rounded to that grid
(arXiv 2410.16454).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lab.arch import Role
from lab.audit.base import (
    Access,
    AttackResult,
    AuditSubject,
    Family,
    Progress,
    Scores,
    measured,
    not_applicable,
    result_of,
    score_facts,
)
from lab.audit.variants import worst_variant
from lab.errors import ConfigError
from lab.records import Fact

if TYPE_CHECKING:
    from lab.handle import ModelHandle, Weight

_GROUP = 64


@contextmanager
def held(handle: ModelHandle, names: Sequence[str] | None = None) -> Iterator[dict[str, nn.Parameter]]:
    """Parameters that may be written inside the ``with``; every bit is back after it.

    Holds the write lock throughout.

    Args:
        handle: The model.
        names: Which parameters; all of them without it.
    """
    with handle.writing():
        everything = dict(handle.model.named_parameters())
        chosen = {name: everything[name] for name in (everything if names is None else names)}
        kept = {name: parameter.detach().clone() for name, parameter in chosen.items()}
        try:
            yield chosen
        finally:
            with torch.no_grad():
                for name, parameter in chosen.items():
                    parameter.copy_(kept[name])


def projections(handle: ModelHandle) -> list[Weight]:
    """The weight matrices of all blocks; embeddings and norms are left alone, as quantisers leave them."""
    found = []
    for layer in range(handle.n_layers):
        path = handle.arch.path(Role.BLOCK, layer)
        for name, module in handle.module(Role.BLOCK, layer).named_modules():
            if isinstance(module, (nn.Linear, Conv1D)):
                found.append(handle.named_weight(f"{path}.{name}.weight"))
    return found


def rounding_step(weight: Tensor, bits: int, group: int | None = None) -> Tensor:
    """Step of the symmetric grid of each weight, ``[out, in]``: per output channel, or per ``group`` inputs of one.

    Args:
        weight: ``[out, in]``.
        bits: 2 to 16.
        group: Inputs that share a step; the whole row without it.

    Raises:
        ConfigError: Impossible bits.
    """
    if not 2 <= bits <= 16:
        raise ConfigError(f"weights are rounded to 2 to 16 bits, not {bits}")
    size = weight.shape[1] if group is None else min(group, weight.shape[1])
    columns = []
    for part in weight.float().abs().split(size, dim=1):
        step = part.amax(dim=1, keepdim=True) / (2 ** (bits - 1) - 1)
        columns.append(step.expand_as(part))
    return torch.cat(columns, dim=1)


def round_to_grid(weight: Tensor, bits: int, group: int | None = None) -> Tensor:
    """``s * round(w / s)`` in the type of ``weight``; rows of zeros stay zeros."""
    step = rounding_step(weight, bits, group)
    wide = weight.float()
    return torch.where(step > 0, step * (wide / step.clamp_min(1e-30)).round(), wide).to(weight.dtype)


def cut_smallest(weight: Tensor, share: float) -> Tensor:
    """``weight`` with the given share of its entries, those of smallest magnitude, set to 0."""
    count = int(share * weight.numel())
    if not count:
        return weight.clone()
    order = weight.detach().abs().reshape(-1).argsort(stable=True)
    flat = weight.detach().clone().reshape(-1)
    flat[order[:count]] = 0
    return flat.reshape(weight.shape)


def _plain(subject: AuditSubject, handle: ModelHandle, facts: Sequence[Fact]) -> list[float]:
    return score_facts(handle, [subject.prompt(fact) for fact in facts], facts)


def _changed(
    subject: AuditSubject, change: Callable[[Tensor], Tensor]
) -> Callable[[ModelHandle, Sequence[Fact]], list[float]]:
    """Scores facts while every projection is replaced by ``change`` of its canonical weight."""

    def score(handle: ModelHandle, facts: Sequence[Fact]) -> list[float]:
        weights = projections(handle)
        with held(handle, [weight.name for weight in weights]), torch.no_grad():
            for weight in weights:
                fresh = change(weight.canonical())
                weight.parameter.copy_(fresh.T if weight.transposed else fresh)
            return _plain(subject, handle, facts)

    return score


def swallowed(handle: ModelHandle, bits: int) -> float | None:
    """Share of the weights' changes by merged patches that are below half a step of the grid; ``None`` without a change.

    Such a change is rounded away wherever its weight stood at a grid point before.
    """
    below = total = 0
    for weight in projections(handle):
        before = handle.stack.pristine(weight.name, weight.parameter)
        old = before.T if weight.transposed else before
        change = (weight.canonical().float() - old.float()).abs()
        moved = change > 0
        if bool(moved.any()):
            below += int((change < rounding_step(old, bits) / 2)[moved].sum())
            total += int(moved.sum())
    return below / total if total else None


class Quantize:
    """Rounds the weights to 8 and 4 bits and asks again."""

    name = "quantize"
    family: Family = "weights"
    access: Access = "white-box"
    paper = "arXiv 2410.16454"
    cost = "a forward pass per fact and grid"
    needs: tuple[str, ...] = ()
    alone = True

    def run(self, subject: AuditSubject, report_progress: Progress) -> AttackResult:
        """Runs the attack."""
        grids: list[tuple[str, int, int | None]] = [("int8", 8, None), ("int4", 4, None)]
        grids += subject.pick([], [("int4_groups", 4, _GROUP), ("int3", 3, None)])
        found: dict[str, Scores] = {}
        for done, (label, bits, group) in enumerate(grids):
            report_progress(self.name, done, len(grids))
            found[label] = measured(
                subject, _changed(subject, lambda weight, b=bits, g=group: round_to_grid(weight, b, g))
            )
        report_progress(self.name, len(grids), len(grids))
        shares = {label: swallowed(subject.handle, bits) for label, bits, _ in grids}
        return worst_variant(
            self,
            subject,
            found,
            tried=f"round to nearest, symmetric, per output channel: {', '.join(found)}",
            note="libraries that quantise with data or outlier columns are not tried",
            details={"change_below_half_a_step": shares},
        )


class Prune:
    """Sets the smallest weights to zero and asks again."""

    name = "prune"
    family: Family = "weights"
    access: Access = "white-box"
    paper = "arXiv 2410.16454 (rounding); magnitude pruning after arXiv 1506.02626"
    cost = "a forward pass per fact and share"
    needs: tuple[str, ...] = ()
    alone = True

    def run(self, subject: AuditSubject, report_progress: Progress) -> AttackResult:
        """Runs the attack."""
        shares = subject.pick((0.1, 0.3), (0.05, 0.1, 0.2, 0.3, 0.5))
        found: dict[str, Scores] = {}
        for done, share in enumerate(shares):
            report_progress(self.name, done, len(shares))
            found[f"{share:g}"] = measured(
                subject, _changed(subject, lambda weight, s=share: cut_smallest(weight, s))
            )
        report_progress(self.name, len(shares), len(shares))
        return worst_variant(
            self,
            subject,
            found,
            tried=f"the smallest {', '.join(found)} of every projection set to zero",
            curves={"leak by share pruned": _line(found)},
        )


def _line(found: dict[str, Scores]) -> list[tuple[float, float]]:
    return [(float(name), sum(scores.facts) / len(scores.facts)) for name, scores in found.items()]


class AdapterRemoval:
    """Takes off what is not merged into the weights: patches beside them, and memories."""

    name = "adapter_removal"
    family: Family = "weights"
    access: Access = "white-box"
    paper = ""
    cost = "a forward pass per fact"
    needs: tuple[str, ...] = ("patches",)

    def run(self, subject: AuditSubject, report_progress: Progress) -> AttackResult:
        """Runs the attack."""
        loose = [entry for entry in subject.handle.applied if entry.mode != "merge"]
        if not loose:
            return not_applicable(
                self, "nothing can be taken off: no patch is applied, or all are merged into the weights"
            )
        report_progress(self.name, 0, 1)

        def score(handle: ModelHandle, facts: Sequence[Fact]) -> list[float]:
            if handle is not subject.handle:
                return _plain(subject, handle, facts)
            with _merged_only(handle):
                return _plain(subject, handle, facts)

        scores = measured(subject, score)
        report_progress(self.name, 1, 1)
        kinds: dict[str, Any] = {
            "removed": [{"id": entry.patch.id, "mode": entry.mode} for entry in loose],
        }
        return result_of(
            self, subject, scores, tried=f"{len(loose)} removable patch(es) taken off", details=kinds
        )


@contextmanager
def _merged_only(handle: ModelHandle) -> Iterator[None]:
    """The model with the patches that are part of its weights, and no others."""
    merged = {
        name: handle.named_weight(name).parameter
        for entry in handle.applied
        if entry.mode == "merge"
        for name in entry._deltas
    }
    bits = {name: parameter.detach().clone() for name, parameter in merged.items()}
    with handle.stack.suspended(), torch.no_grad():
        for name, parameter in merged.items():
            parameter.copy_(bits[name])
        yield
