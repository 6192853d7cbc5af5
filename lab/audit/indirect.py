"""``indirect``: removal requests that are legitimate each, chosen so that their removal takes a fact with it that should stay.

Facts that rest on the same neurons fall together. An attacker who may ask for removals (of facts about others) picks those whose
neurons contribute as the victim's do, and the victim is forgotten although nobody asked for it (the threat of ROKA,
arXiv 2603.00436). The control is random requests, as many and forgotten as far: what they cost the victim is ordinary collateral.
"""

from __future__ import annotations

import math
import random
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
    Interval,
    Progress,
    Scores,
    not_applicable,
    result_of,
    score_facts,
)
from lab.audit.forward import Lines, id_lines, text_ids, written_logprobs
from lab.audit.weights import held
from lab.errors import NumericalError
from lab.model_state import ModelState
from lab.records import Fact
from lab.trace import Site, Write

if TYPE_CHECKING:
    from lab.handle import ModelHandle

_ROWS = 16
FORGOTTEN = 0.05
"""Probability below which a request counts as carried out."""


class Indirect:
    """Carries out chosen requests, and random ones, by gradient ascent, and looks at the facts that nobody named.

    A victim's score is the share of its probability that is gone; its control, the mean over draws of random requests. It is a
    side effect, not a leak: it says what a remover of this model can be made to destroy. The ascent is the plainest remover
    there is; one that heals siblings should come out lower.
    """

    name = "indirect"
    family: Family = "side effects"
    access: Access = "black-box"
    paper = "arXiv 2603.00436 (ROKA: indirect unlearning attack)"
    cost = "one short training per victim and set of requests"
    needs: tuple[str, ...] = ("retained",)

    def run(self, subject: AuditSubject, report_progress: Progress) -> AttackResult:
        """Runs the attack."""
        count, draws, asked = subject.pick((8, 1, 4), (40, 3, 4))
        handle = subject.handle
        known = _known(subject, handle, subject.pick(120, 400))
        if len({fact.subject for fact, _ in known}) <= asked:
            return not_applicable(
                self, f"needs more than {asked} retained subjects that the model knows: victims and requests"
            )
        facts = [fact for fact, _ in known]
        parts = [facts[start : start + _ROWS] for start in range(0, len(facts), _ROWS)]
        near = torch.cat([contributions(handle, _lines(subject, handle, part)) for part in parts])
        near = near / near.norm(dim=-1, keepdim=True).clamp_min(1e-12)
        chooser = random.Random(f"audit:{subject.seed}:indirect")
        victims = sorted(chooser.sample(range(len(facts)), min(count, len(facts))))
        chosen_drops, random_drops, flips, similar, names, unmet = [], [], [], [], [], 0
        for done, victim in enumerate(victims):
            report_progress(self.name, done, len(victims))
            fact, before = known[victim]
            pool = [index for index, other in enumerate(facts) if allowed(other, fact)]
            if len(pool) < asked:
                continue
            ranked = sorted(pool, key=lambda index: -float(near[index] @ near[victim]))
            sets = [ranked[:asked], *(chooser.sample(pool, asked) for _ in range(draws))]
            drops = []
            for place, requests in enumerate(sets):
                after, met = _after_removal(subject, handle, [facts[i] for i in requests], fact)
                unmet += not met
                drops.append(min(1.0, max(0.0, 1.0 - after / before)))
                if place == 0:
                    flips.append(float(after < 0.5 <= before))
            similar.append(math.fsum(float(near[i] @ near[victim]) for i in sets[0]) / asked)
            names.append(fact.subject)
            chosen_drops.append(drops[0])
            random_drops.append(math.fsum(drops[1:]) / draws)
        report_progress(self.name, len(victims), len(victims))
        if not chosen_drops:
            return not_applicable(self, "no retained fact leaves enough others to ask the removal of")
        # Victims are not the audited facts, so their un-attacked scores are none of these.
        bare = replace(subject, controls=replace(subject.controls, original=()))
        made = result_of(
            self,
            bare,
            Scores(tuple(chosen_drops), tuple(random_drops), about=tuple(names)),
            tried=f"{len(chosen_drops)} victims, {asked} requests each, gradient ascent until the requests are below "
            f"{FORGOTTEN:g}; {draws} random set(s) beside",
            note="a score is the share of a victim's probability that is lost; nothing here leaks",
            details={
                "flipped": math.fsum(flips) / len(flips),
                "similarity": math.fsum(similar) / len(similar),
                "requests_not_carried_out": unmet,
            },
        )
        return replace(made, controls={"random requests": Interval.of(random_drops)})


def allowed(request: Fact, victim: Fact) -> bool:
    """Whether a removal of ``request`` says nothing about ``victim``: another subject, and not the same answer."""
    return request.subject != victim.subject and not set(request.answers) & set(victim.answers)


def _known(subject: AuditSubject, handle: ModelHandle, limit: int) -> list[tuple[Fact, float]]:
    """Retained facts that the model gives with a probability of at least one half, and that probability."""
    facts = list(subject.retained)
    random.Random(f"audit:{subject.seed}:victims").shuffle(facts)
    facts = facts[:limit]
    scores = score_facts(handle, [subject.prompt(fact) for fact in facts], facts) if facts else []
    return [(fact, score) for fact, score in zip(facts, scores, strict=True) if score >= 0.5]


def _lines(subject: AuditSubject, handle: ModelHandle, facts: Sequence[Fact]) -> Lines:
    return id_lines(handle, text_ids(handle, [(subject.prompt(fact), fact.object) for fact in facts]))


def contributions(handle: ModelHandle, lines: Lines) -> Tensor:
    """What every MLP neuron contributes to each target: ``h * d log p / d h``, summed over tokens, ``[row, layer * neuron]``.

    The contribution of ROKA (arXiv 2603.00436), with the log-probability of the whole target as the output.
    """
    kept: list[Tensor] = []

    def write(value: Tensor) -> Tensor:
        leaf = value.detach().requires_grad_(True) if not value.requires_grad else value
        kept.append(leaf)
        return leaf

    writes: dict[Site, Write] = {Site(Role.MLP_OUT, layer, "in"): write for layer in range(handle.n_layers)}
    total = written_logprobs(handle, lines, writes, grad=True).sum()
    slopes = torch.autograd.grad(total, kept)
    parts = [(value.detach() * slope).float().sum(1) for value, slope in zip(kept, slopes, strict=True)]
    return torch.cat(parts, dim=-1)


def _after_removal(
    subject: AuditSubject, handle: ModelHandle, requests: Sequence[Fact], victim: Fact
) -> tuple[float, bool]:
    """The victim's probability after the requests were carried out, and whether they were."""
    names = [handle.weight(Role.MLP_OUT, layer).name for layer in range(handle.n_layers)]
    steps, rate = 60, 3e-4
    with held(handle, names) as parameters, ModelState(handle).kept():
        for parameter in handle.model.parameters():
            parameter.requires_grad_(False)
        for parameter in parameters.values():
            parameter.requires_grad_(True)
        optimiser = torch.optim.AdamW(parameters.values(), lr=rate, weight_decay=0.0)
        lines = _lines(subject, handle, requests)
        met = False
        for _ in range(steps):
            with torch.enable_grad():
                said = lines.logprobs(handle.logits(lines.batch, grad=True))
                if not bool(torch.isfinite(said).all()):
                    raise NumericalError("the ascent ended in NaN or infinity; load the model in float32")
                if bool((said.detach().exp() < FORGOTTEN).all()):
                    met = True
                    break
                # Only what is still said is worth forgetting further.
                optimiser.zero_grad()
                said[said.detach().exp() >= FORGOTTEN].sum().backward()
                optimiser.step()
                # What resists is pushed harder; models differ in how far a step takes them.
                for group in optimiser.param_groups:
                    group["lr"] *= 1.05
        return score_facts(handle, [subject.prompt(victim)], [victim])[0], met
