"""Attacks that look inside: probes, value vectors and transplanted activations.

What is measured lies in modules of its own; here each measure becomes an attack: a score per fact, and the controls beside it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

from lab.audit.base import (
    Access,
    AttackResult,
    AuditSubject,
    Family,
    Interval,
    Progress,
    Scores,
    measured,
    not_applicable,
    result_of,
)
from lab.audit.concept_vectors import compare_vectors, concept_tokens, find_vectors, read_vectors
from lab.audit.depth import DepthCurve, patching_depth, unlearning_depth
from lab.audit.fingerprints import NO_ORIGINAL
from lab.audit.knowledge import HiddenKnowledge, hidden_knowledge
from lab.audit.originals import Original, original_of
from lab.audit.variants import worst_variant
from lab.errors import ConfigError

if TYPE_CHECKING:
    from lab.handle import ModelHandle
    from lab.records import Fact

# Standard deviations by which a value vector must favour a concept's tokens to count as holding it.
HOLDS = 3.0


class HiddenKnowledgeAttack:
    """Reads from hidden states what the model does not say: ``K`` of a linear probe beside ``K`` of the logits.

    A fact's score is the probe's ``K``, so that 0.5 is chance; the controls give their own. There are two probes. One learns
    on ``kept`` facts, as an outsider could. The other learns on ``audited`` facts about other subjects: a model that was trained
    away from its answers ranks them below all others, which the first probe takes for ignorance and the second reads.
    """

    name = "hidden_knowledge"
    family: Family = "inside"
    access: Access = "white-box"
    paper = "arXiv 2503.15299 (Inside-Out)"
    cost = "four forward passes per candidate answer, two logistic regressions per layer"
    needs: tuple[str, ...] = ()
    alone = True

    def run(self, subject: AuditSubject, report_progress: Progress) -> AttackResult:
        """See ``Attack``."""
        count = subject.pick(7, 63)
        relations = {fact.relation for fact in subject.facts}
        # What a probe learns carries over best within a relation.
        near = sorted(subject.retained, key=lambda fact: fact.relation not in relations)
        training = near[: subject.pick(80, 500)]
        pool = (*subject.facts, *subject.controls.never, *subject.retained)
        lessons = {"kept": training, "audited": ()} if training else {"audited": ()}
        runs: dict[str, list[HiddenKnowledge]] = {}

        def score(name: str, handle: ModelHandle, facts: Sequence[Fact]) -> list[float]:
            report_progress(self.name, sum(map(len, runs.values())), 3 * len(lessons))
            found = hidden_knowledge(
                handle, facts, lessons[name], pool=pool, count=count, seed=subject.seed, ask=subject.prompt
            )
            runs.setdefault(name, []).append(found)
            known = {each.id: each.internal for each in found.known}
            # A fact without a rival has nothing to rank: chance.
            return [known.get(fact.id or fact.text, 0.5) for fact in facts]

        variants: dict[str, Scores] = {}
        refused = ""
        for name in lessons:
            try:
                variants[name] = measured(subject, partial(score, name))
            except ConfigError as error:
                refused = str(error)
        if not variants:
            return not_applicable(self, refused)
        report_progress(self.name, 3 * len(lessons), 3 * len(lessons))
        details: dict[str, Any] = {}
        for name, scores in variants.items():
            sides = ["facts", *(["oracle"] if scores.oracle else []), *(["never"] if scores.never else [])]
            details[name] = {side: found.to_json() for side, found in zip(sides, runs[name], strict=True)}
        return worst_variant(
            self,
            subject,
            variants,
            tried=f"{count} wrong answers per question at most, probes on every layer, learned on "
            + " and on ".join(f"{name} facts" for name in variants),
            note="0.5 is chance",
            details={"probes": details},
        )


class ConceptTrace:
    """Looks whether the value vectors that wrote a fact's object in the original are still there.

    A fact's score is the mean cosine of its vectors before and after; 0 where the original has none for it. Never-trained facts
    are no control: their objects are words that the model knows.
    """

    name = "concept_trace"
    family: Family = "inside"
    access: Access = "white-box"
    paper = "arXiv 2406.11614 (ConceptVectors)"
    cost = "one product of unembedding and down projection per layer"
    needs: tuple[str, ...] = ("base", "oracle")
    alone = True

    def run(self, subject: AuditSubject, report_progress: Progress) -> AttackResult:
        """See ``Attack``."""
        original = original_of(subject)
        if original is None:
            return not_applicable(self, NO_ORIGINAL)
        oracle = subject.controls.oracle
        if oracle is None:
            return not_applicable(
                self, "needs an oracle: vectors of untouched layers stay as they were in any model"
            )
        report_progress(self.name, 0, 2)
        concepts = [concept_tokens(original.handle, fact) for fact in subject.facts]
        with original.there():
            vectors = find_vectors(original.handle, concepts, count=subject.pick(5, 20), threshold=HOLDS)
            before = [read_vectors(original.handle, each) for each in vectors]
        report_progress(self.name, 1, 2)

        def changes(handle: ModelHandle) -> list[list[Any]]:
            return [
                compare_vectors(handle, each, concept, old, read_vectors(handle, each))
                for each, concept, old in zip(vectors, concepts, before, strict=True)
            ]

        def intact(found: list[list[Any]]) -> tuple[float, ...]:
            return tuple(
                min(1.0, max(0.0, math.fsum(change.cosine for change in each) / len(each))) if each else 0.0
                for each in found
            )

        mine = changes(subject.handle)
        scores = Scores(intact(mine), intact(changes(oracle)))
        report_progress(self.name, 2, 2)
        covered = sum(bool(each) for each in vectors)
        return result_of(
            self,
            subject,
            scores,
            tried=f"{covered} of {len(vectors)} facts have a value vector at {HOLDS:g} standard deviations",
            details={
                "coverage": covered / len(vectors),
                "vectors": [
                    {"id": fact.id, "changes": [change.to_json() for change in each]}
                    for fact, each in zip(subject.facts, mine, strict=True)
                ],
            },
        )


class PatchingDepth:
    """Puts the original's activations into the changed model, layer by layer, and watches the answer come back.

    A fact's score is the share of the lost log-probability that comes back, mean over all layers but the last, times the
    probability that the original gives the answer; where nothing was lost, the probability itself. With an oracle, UDS is
    reported too (the audited model's activations in the original).
    """

    name = "patching_depth"
    family: Family = "inside"
    access: Access = "white-box"
    paper = "arXiv 2605.24614 (UDS)"
    cost = "one forward pass per layer and model"
    needs: tuple[str, ...] = ("base",)
    alone = True

    def run(self, subject: AuditSubject, report_progress: Progress) -> AttackResult:
        """See ``Attack``."""
        original = original_of(subject)
        if original is None:
            return not_applicable(self, NO_ORIGINAL)
        curves: list[DepthCurve] = []

        def score(handle: ModelHandle, facts: Sequence[Fact]) -> list[float]:
            report_progress(self.name, len(curves), 4)
            curve = self._into(subject, original, handle, facts)
            curves.append(curve)
            return returned(curve)

        scores = measured(subject, score)
        mine = curves[0]
        details: dict[str, Any] = {"audited": mine.to_json()}
        oracle = subject.controls.oracle
        if oracle is not None:
            report_progress(self.name, 3, 4)
            details["oracle"] = curves[1].to_json()
            depth = unlearning_depth(
                self._from(subject, original, subject.handle), self._from(subject, original, oracle)
            )
            kept = depth[~depth.isnan()].tolist()
            details["uds"] = {
                "facts": len(kept),
                "per_fact": [None if math.isnan(value) else value for value in depth.tolist()],
            }
            if kept:
                details["uds"] |= Interval.of(kept).to_json()
        report_progress(self.name, 4, 4)
        line = mine.to_json()["restored"]
        return result_of(
            self,
            subject,
            scores,
            tried=f"block outputs of every prompt token, {subject.handle.n_layers} layers",
            details=details,
            curves={"restored": tuple(enumerate(line))} if line else {},
        )

    def _into(
        self, subject: AuditSubject, original: Original, handle: ModelHandle, facts: Sequence[Fact]
    ) -> DepthCurve:
        return patching_depth(facts, handle, nullcontext, original.handle, original.there, ask=subject.prompt)

    def _from(self, subject: AuditSubject, original: Original, giver: ModelHandle) -> DepthCurve:
        return patching_depth(
            subject.facts,
            original.handle,
            original.there,
            giver,
            nullcontext,
            positions="subject",
            ask=subject.prompt,
        )


def returned(curve: DepthCurve) -> list[float]:
    """A fact's score of ``PatchingDepth`` from its curve; a model of one layer has no depth and scores 0 where it lost."""
    restored = curve.restored()[:, :-1]
    found = []
    for row, donor, receiver in zip(restored, curve.donor.exp(), curve.receiver.exp(), strict=True):
        if row.numel() and not bool(row.isnan().any()):
            found.append(float(row.mean() * donor))
        else:
            found.append(float(receiver) if row.numel() else 0.0)
    return [min(1.0, max(0.0, value)) for value in found]
