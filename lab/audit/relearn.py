"""``relearn``: a few steps of training on some of the facts, or on unrelated ones, and a look at the others.

Facts that come back although the attacker never had them were hidden, not removed (arXiv 2410.08827). The model is trained in
place on a kept copy of its bits, which comes back.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from lab.arch import Role
from lab.audit.base import (
    Access,
    AttackResult,
    AuditSubject,
    Family,
    Progress,
    Scores,
    not_applicable,
    score_facts,
)
from lab.audit.forward import Lines, id_lines, text_ids
from lab.audit.variants import halves, worst_variant
from lab.audit.weights import held
from lab.errors import NumericalError
from lab.model_state import ModelState
from lab.records import Fact

if TYPE_CHECKING:
    from lab.handle import ModelHandle

_ROWS = 32
Marks = dict[int, list[float]]


class Relearn:
    """Fine-tunes all blocks with AdamW and asks for facts that were not in the training text."""

    name = "relearn"
    family: Family = "weights"
    access: Access = "white-box"
    paper = "arXiv 2410.08827"
    cost = "a few training steps per half of the facts, model and learning rate"
    needs: tuple[str, ...] = ()

    def run(self, subject: AuditSubject, report_progress: Progress) -> AttackResult:
        """Runs the attack."""
        if len(subject.facts) < 2:
            return not_applicable(
                self, "one fact cannot be divided into facts to train on and facts to ask for"
            )
        subject = subject.sample(subject.pick(40, 400))
        marks = subject.pick((2, 8), (1, 2, 5, 10, 20, 50))
        rates = subject.pick((3e-4,), (5e-5, 2e-4, 1e-3))
        routes = ["related", *(["unrelated"] if len(subject.retained) > 1 else [])]
        controls = subject.controls
        sides: list[tuple[str, ModelHandle, Sequence[Fact]]] = [("facts", subject.handle, subject.facts)]
        if controls.oracle is not None:
            sides.append(("oracle", controls.oracle, subject.facts))
        if len(controls.never) > 1:
            sides.append(("never", subject.handle, controls.never))
        runs = [(route, rate, side) for route in routes for rate in rates for side in sides]
        table: dict[str, dict[str, list[float]]] = {}
        for done, (route, rate, (side, handle, facts)) in enumerate(runs):
            report_progress(self.name, done, len(runs))
            for mark, scores in _scored(subject, handle, facts, route, rate, marks).items():
                table.setdefault(f"{route}_lr{rate:g}_step{mark}", {})[side] = scores
        report_progress(self.name, len(runs), len(runs))
        found = {name: Scores.of(arm) for name, arm in table.items()}
        curves = {
            f"{route}, lr {rate:g}": [
                (float(mark), _mean(found[f"{route}_lr{rate:g}_step{mark}"].facts)) for mark in marks
            ]
            for route in routes
            for rate in rates
        }
        return worst_variant(
            self,
            subject,
            found,
            tried=f"AdamW on the blocks, {', '.join(map(str, marks))} steps, lr {', '.join(f'{r:g}' for r in rates)}, "
            f"{' and '.join(routes)} facts; each fact asked for by a model that was not trained on it",
            note="controls were trained the same way",
            curves=curves,
        )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _scored(
    subject: AuditSubject,
    handle: ModelHandle,
    facts: Sequence[Fact],
    route: str,
    rate: float,
    marks: Sequence[int],
) -> Marks:
    """Steps to scores of all facts, each after training without it."""
    if route == "unrelated":
        # Nothing that is asked for, no subject that is asked about.
        asked = {fact.subject for fact in facts}
        others = [fact for fact in subject.retained if fact.subject not in asked]
        return _trained(subject, handle, others, facts, rate, marks)
    scores: Marks = {mark: [0.0] * len(facts) for mark in marks}
    for train, test in halves(len(facts), subject.seed):
        found = _trained(subject, handle, [facts[i] for i in train], [facts[i] for i in test], rate, marks)
        for mark, values in found.items():
            for index, value in zip(test, values, strict=True):
                scores[mark][index] = value
    return scores


def _trained(
    subject: AuditSubject,
    handle: ModelHandle,
    train: Sequence[Fact],
    test: Sequence[Fact],
    rate: float,
    marks: Sequence[int],
) -> Marks:
    blocks = [f"{handle.arch.path(Role.BLOCK, layer)}." for layer in range(handle.n_layers)]
    names = [
        name
        for name, parameter in handle.model.named_parameters()
        if name.startswith(tuple(blocks)) and parameter.is_floating_point()
    ]
    texts = text_ids(handle, [(subject.prompt(fact), fact.object) for fact in train])
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(subject.seed)).tolist()
    prompts = [subject.prompt(fact) for fact in test]
    found: Marks = {}
    with held(handle, names) as parameters, ModelState(handle).kept():
        for parameter in handle.model.parameters():
            parameter.requires_grad_(False)
        for parameter in parameters.values():
            parameter.requires_grad_(True)
        optimiser = torch.optim.AdamW(parameters.values(), lr=rate, weight_decay=0.0)
        for step in range(1, max(marks) + 1):
            begin = (step - 1) * _ROWS % len(order)
            chosen = [texts[i] for i in (order * 2)[begin : begin + min(_ROWS, len(order))]]
            _step(handle, id_lines(handle, chosen), optimiser, rate)
            if step in marks:
                found[step] = score_facts(handle, prompts, test)
    return found


def _step(handle: ModelHandle, lines: Lines, optimiser: torch.optim.Optimizer, rate: float) -> None:
    with torch.enable_grad():
        logits = handle.logits(lines.batch, grad=True)
        loss = -lines.logprobs(logits).sum() / lines.mask.sum()
        if not bool(torch.isfinite(loss)):
            raise NumericalError(
                f"relearning at lr {rate:g} ended in NaN or infinity; load the model in float32"
            )
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
