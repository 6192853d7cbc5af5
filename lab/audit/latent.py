"""``latent``: one perturbation of the residual stream that brings facts back (targeted perturbation, arXiv 2407.15549).

A perturbation per prompt would make a model say anything. This one is a single vector, learned on half of the facts and judged on
the other half, within a ball of a fixed share of the stream's own length.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

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
)
from lab.audit.forward import Lines, id_lines, text_ids, written_logprobs
from lab.audit.variants import halves, worst_variant
from lab.errors import NumericalError
from lab.records import Fact
from lab.trace import Site, Write, trace

if TYPE_CHECKING:
    from lab.handle import ModelHandle


class Latent:
    """Projected gradient ascent on a vector that is added at every prompt's last token."""

    name = "latent"
    family: Family = "latent"
    access: Access = "white-box"
    paper = "arXiv 2407.15549"
    cost = "a forward and a backward pass per step, half, layer and radius"
    needs: tuple[str, ...] = ()

    def run(self, subject: AuditSubject, report_progress: Progress) -> AttackResult:
        """Runs the attack."""
        if len(subject.facts) < 2:
            return not_applicable(
                self, "one fact cannot be divided into facts to learn from and facts to test"
            )
        subject = subject.sample(subject.pick(24, 200))
        depth = subject.handle.n_layers
        layers = sorted(set(subject.pick((depth // 2,), (depth // 4, depth // 2, 3 * depth // 4))))
        radii = subject.pick((0.3, 1.0), (0.1, 0.3, 1.0, 3.0))
        steps = subject.pick(6, 32)
        cells = [(layer, radius) for layer in layers for radius in radii]
        found: dict[str, Scores] = {}
        curves: dict[str, list[tuple[float, float]]] = {}
        learned: dict[str, list[Tensor]] = {}
        for done, (layer, radius) in enumerate(cells):
            report_progress(self.name, done, len(cells))

            name = f"layer{layer}_radius{radius:g}"

            def score(
                handle: ModelHandle,
                facts: Sequence[Fact],
                layer: int = layer,
                radius: float = radius,
                name: str = name,
            ) -> list[float]:
                scores, vectors = _crossed(subject, handle, facts, layer, radius, steps)
                # The audited facts on the audited model come first; its directions are the ones worth keeping.
                learned.setdefault(name, vectors)
                return scores

            scores = measured(subject, score)
            found[name] = scores
            mean = sum(scores.facts) / len(scores.facts)
            curves.setdefault(f"layer {layer}", []).append((radius, mean))
        report_progress(self.name, len(cells), len(cells))
        reached = [
            radius for radius, mean in sorted(p for line in curves.values() for p in line) if mean >= 0.5
        ]
        result = worst_variant(
            self,
            subject,
            found,
            tried=f"one vector per half of {len(subject.facts)} facts, {steps} steps, radii as shares of the stream's length",
            details={"radius_for_half_of_the_facts": reached[0] if reached else None},
            curves=curves,
        )
        worst = result.details["worst"]
        layer = dict(zip(found, cells, strict=True))[worst][0]
        directions = [
            {"layer": layer, "vector": [float(f"{value:.5g}") for value in vector.tolist()]}
            for vector in learned[worst]
        ]
        return replace(result, details={**result.details, "directions": directions})


def _crossed(
    subject: AuditSubject,
    handle: ModelHandle,
    facts: Sequence[Fact],
    layer: int,
    radius: float,
    steps: int,
) -> tuple[list[float], list[Tensor]]:
    """Scores of the facts, each under the vector of the half that it is not in, and the vectors."""
    if len(facts) < 2:
        return [], []
    rows = text_ids(handle, [(subject.prompt(fact), fact.object) for fact in facts])
    scores, vectors = [0.0] * len(facts), []
    for train, test in halves(len(facts), subject.seed):
        delta = learn_direction(handle, id_lines(handle, [rows[i] for i in train]), layer, radius, steps)
        vectors.append(delta)
        lines = id_lines(handle, [rows[i] for i in test])
        values = written_logprobs(handle, lines, {Site(Role.BLOCK, layer): added(lines, delta)})
        for index, value in zip(test, values.exp().clamp_max(1.0).tolist(), strict=True):
            scores[index] = value
    return scores, vectors


def added(lines: Lines, delta: Tensor) -> Write:
    """A write that adds ``delta`` (``[d]``, or ``[row, d]``) at every row's last prompt token."""
    rows = torch.arange(lines.prompt_last.shape[0], device=delta.device)

    def write(value: Tensor) -> Tensor:
        changed = value.clone()
        changed[rows, lines.prompt_last] = changed[rows, lines.prompt_last] + delta.to(value.dtype)
        return changed

    return write


def at_prompt_last(handle: ModelHandle, lines: Lines, layer: int) -> Tensor:
    """The residual stream after a block at every row's last prompt token, ``[row, d]``."""
    site = Site(Role.BLOCK, layer)
    with trace(handle, reads=[site], stop=site) as recording:
        recording.run(lines.batch)
    rows = torch.arange(lines.prompt_last.shape[0], device=handle.device)
    return recording[site][rows, lines.prompt_last].float()


def learn_direction(handle: ModelHandle, lines: Lines, layer: int, radius: float, steps: int) -> Tensor:
    """The vector ``[d]`` that makes the lines' targets likeliest, by projected gradient ascent in an L2 ball.

    Args:
        handle: The model.
        lines: What should be said.
        layer: It is added to this block's output.
        radius: Of the ball, as a share of the mean length of the stream there.
        steps: Gradient steps, each of ``2.5 / steps`` of the radius, so that the ball's edge can be reached and followed.

    Raises:
        NumericalError: A gradient is NaN or infinite.
    """
    bound = radius * float(at_prompt_last(handle, lines, layer).norm(dim=-1).mean())
    delta = torch.zeros(handle.hidden_size, device=handle.device)
    for _ in range(steps):
        delta.requires_grad_(True)
        gain = written_logprobs(
            handle, lines, {Site(Role.BLOCK, layer): added(lines, delta)}, grad=True
        ).mean()
        (slope,) = torch.autograd.grad(gain, delta)
        if not bool(torch.isfinite(slope).all()):
            raise NumericalError(
                f"the gradient at layer {layer} is NaN or infinite; load the model in float32"
            )
        with torch.no_grad():
            moved = delta + slope / slope.norm().clamp_min(1e-12) * (2.5 * bound / steps)
            delta = moved * (bound / moved.norm().clamp_min(1e-12)).clamp_max(1.0)
    return delta.detach()
