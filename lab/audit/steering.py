"""``steering``: the difference between a prompt and its anonymised versions, added back (AnonAct, arXiv 2411.02631)."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

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
)
from lab.audit.forward import id_lines, text_ids, written_logprobs
from lab.audit.latent import added, at_prompt_last
from lab.audit.variants import worst_variant
from lab.records import Fact
from lab.trace import Site

if TYPE_CHECKING:
    from lab.handle import ModelHandle

_GENERIC = ("someone", "this one", "that name", "a certain one")


class Steering:
    """Adds ``a`` times what the name contributes to the stream where the first token of the answer is made.

    The paper samples completions and ranks their first words; here the probability of the answer is read off, which is what
    its frequency estimates. On narrow facts the paper itself finds no gain.
    """

    name = "steering"
    family: Family = "latent"
    access: Access = "white-box"
    paper = "arXiv 2411.02631"
    cost = "a forward pass per anonymised prompt, and one per strength"
    needs: tuple[str, ...] = ()

    def run(self, subject: AuditSubject, report_progress: Progress) -> AttackResult:
        """Runs the attack."""
        subject = subject.sample(subject.pick(24, 200))
        layer = max(0, subject.handle.n_layers - 2)
        names = _names(subject, subject.pick(5, 10))
        strengths = subject.pick((2.0,), (0.5, 1.0, 2.0, 4.0))
        cells = [(kind, strength) for kind in ("local", "global") for strength in strengths]
        found: dict[str, Scores] = {}
        curves: dict[str, list[tuple[float, float]]] = {}
        for done, (kind, strength) in enumerate(cells):
            report_progress(self.name, done, len(cells))

            def score(
                handle: ModelHandle, facts: Sequence[Fact], kind: str = kind, strength: float = strength
            ) -> list[float]:
                direction = _directions(subject, handle, facts, names, layer)
                if kind == "global":
                    direction = direction.mean(dim=0, keepdim=True).expand_as(direction)
                rows = text_ids(handle, [(subject.prompt(fact), fact.object) for fact in facts])
                lines = id_lines(handle, rows)
                writes = {Site(Role.BLOCK, layer): added(lines, strength * direction)}
                return written_logprobs(handle, lines, writes).exp().clamp_max(1.0).tolist()

            scores = measured(subject, score)
            found[f"{kind}_{strength:g}"] = scores
            curves.setdefault(kind, []).append((strength, sum(scores.facts) / len(scores.facts)))
        report_progress(self.name, len(cells), len(cells))
        return worst_variant(
            self,
            subject,
            found,
            tried=f"layer {layer}, {len(names)} anonymised names, strengths {', '.join(f'{s:g}' for s in strengths)}",
            note="no gain on narrow facts is what the paper reports as well",
            curves=curves,
        )


def _names(subject: AuditSubject, count: int) -> list[str]:
    """What stands in for the subject: other names, and words that name nobody."""
    asked = {fact.subject for fact in (*subject.facts, *subject.controls.never)}
    groups = {fact.group for fact in subject.facts}
    others = sorted({f.subject for f in subject.retained if f.group in groups and f.subject not in asked})
    chooser = random.Random(f"audit:{subject.seed}:names")
    drawn = chooser.sample(others, min(len(others), max(0, count - 2)))
    return [*drawn, *_GENERIC[: max(2, count - len(drawn))]][:count]


def _directions(
    subject: AuditSubject, handle: ModelHandle, facts: Sequence[Fact], names: Sequence[str], layer: int
) -> Tensor:
    """``A(Q) - mean_n A(Q*_n)`` at the last prompt token, ``[fact, d]``."""

    def read(asked: Sequence[Fact]) -> Tensor:
        rows = text_ids(handle, [(subject.prompt(fact), fact.object) for fact in asked])
        return at_prompt_last(handle, id_lines(handle, rows), layer)

    blank = read([replace(fact, subject=name) for fact in facts for name in names])
    return read(facts) - blank.view(len(facts), len(names), -1).mean(dim=1)
