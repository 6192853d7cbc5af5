"""Attacks that look inside: probes, value vectors, transplanted activations, and the traces that a change leaves in a model.

What is measured lies in modules of its own; here each measure becomes an attack: a score per fact, and the controls beside it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from lab.arch import Role
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
from lab.audit.detection import VIEWS, above_control, detect, features, finetune_like, noise_like
from lab.audit.knowledge import HiddenKnowledge, hidden_knowledge
from lab.audit.originals import Original, change_of, original_of
from lab.audit.spectra import Directions, decompose, match_keys, outlier_layers, subject_keys, written_tokens
from lab.errors import ConfigError
from lab.patch import LowRank

if TYPE_CHECKING:
    from lab.handle import ModelHandle
    from lab.records import Fact

NO_ORIGINAL = "there is no model before the change to compare with: give the base, or audit patches on a base"
# A modified z-score beyond this is an outlier (Iglewicz and Hoaglin 1993).
OUTLIER = 3.5
# Standard deviations by which a value vector must favour a concept's tokens to count as holding it.
HOLDS = 3.0


class Spectral:
    """Recognises closed-form edits by the singular values of the weights, and reads off whom they are about.

    A fact's score is how strongly the change of a down projection answers to its subject's key, times how concentrated the change
    is. Without a model before the change, the weight that stands out from the other layers' stands in for the change.
    """

    name = "spectral"
    family: Family = "inside"
    access: Access = "white-box"
    paper = "Roy and Vetterli 2007; Marchenko and Pastur 1967; Meng et al. 2022 (what an edit is)"
    cost = "one singular value decomposition per changed matrix, one forward pass"
    needs: tuple[str, ...] = ()

    def run(self, subject: AuditSubject, report_progress: Progress) -> AttackResult:
        """See ``Attack``."""
        original = original_of(subject)
        report_progress(self.name, 0, 2)
        found, details = self._look(subject.handle, original)
        report_progress(self.name, 1, 2)

        def score(handle: ModelHandle, facts: Sequence[Fact]) -> list[float]:
            parts = found if handle is subject.handle else self._look(handle, original)[0]
            return self._scores(subject, original, parts, handle, facts)

        oracle, others = subject.controls.oracle, strangers(subject)
        scores = Scores(
            tuple(score(subject.handle, subject.facts)),
            tuple(score(oracle, subject.facts)) if oracle is not None else (),
            tuple(score(subject.handle, others)) if others else (),
        )
        for layer, (weight, parts) in found.items():
            raised, lowered = written_tokens(subject.handle, parts.left[:, 0])
            details["read"].append(
                {
                    "layer": layer,
                    "weight": weight,
                    "raised": [subject.handle.tokenizer.decode([token]) for token in raised],
                    "lowered": [subject.handle.tokenizer.decode([token]) for token in lowered],
                }
            )
        report_progress(self.name, 2, 2)
        how = "weights before and after" if original is not None else "layers against each other, no base"
        return result_of(self, subject, scores, tried=how, details=details)

    def _look(
        self, handle: ModelHandle, original: Original | None
    ) -> tuple[dict[int, tuple[float, Directions]], dict[str, Any]]:
        """Down projections worth reading, each with its weight in the score, and what to report."""
        details: dict[str, Any] = {"matrices": {}, "layers": {}, "read": []}
        down = {layer: handle.weight(Role.MLP_OUT, layer) for layer in range(handle.n_layers)}
        if handle.n_layers >= 3:
            details["layers"] = outlier_layers({layer: weight.canonical() for layer, weight in down.items()})
        found: dict[int, tuple[float, Directions]] = {}
        if original is None:
            for layer, score in details["layers"].items():
                if score > OUTLIER:
                    found[layer] = (1.0, decompose(down[layer].canonical(), keep=1))
            return found, details
        places = {weight.name: layer for layer, weight in down.items()}
        for name, delta in change_of(handle, original).deltas.items():
            if delta.dim != 2:
                continue
            parts = decompose(delta if isinstance(delta, LowRank) else delta.dense())
            details["matrices"][name] = parts.spectrum.to_json()
            if name in places:
                found[places[name]] = (parts.spectrum.concentration, parts)
        details["concentration"] = max(
            (spectrum["concentration"] for spectrum in details["matrices"].values()), default=0.0
        )
        return found, details

    def _scores(
        self,
        subject: AuditSubject,
        original: Original | None,
        found: dict[int, tuple[float, Directions]],
        handle: ModelHandle,
        facts: Sequence[Fact],
    ) -> list[float]:
        best = torch.zeros(len(facts), dtype=torch.float64)
        for layer, (weight, parts) in found.items():
            # An attacker takes the keys from the model before the change where there is one.
            if original is None:
                keys = subject_keys(handle, facts, layer)
            else:
                with original.there():
                    keys = subject_keys(original.handle, facts, layer)
            best = torch.maximum(best, weight * match_keys(parts.right, parts.spectrum.energy, keys))
        return best.clamp(0, 1).tolist()


class Trace:
    """Tells the changed model from the original by its logits and activations, with benign changes of equal norm beside it.

    Any change can be told from activations; the lift is over the benign change that is told most easily. A fact's score is the
    share of right verdicts on its prompt, so that 0.5 is chance.
    """

    name = "trace"
    family: Family = "statistics"
    access: Access = "grey-box"
    paper = "arXiv 2506.14003 (unlearning traces)"
    cost = "four forward passes per prompt, a short fine-tune, eight logistic regressions with 5-fold cross-validation"
    needs: tuple[str, ...] = ("base",)

    def run(self, subject: AuditSubject, report_progress: Progress) -> AttackResult:
        """See ``Attack``."""
        original = original_of(subject)
        if original is None:
            return not_applicable(self, NO_ORIGINAL)
        change = change_of(subject.handle, original)
        if not any(delta.norm() for delta in change.deltas.values()):
            return not_applicable(
                self, "no weight differs from the original: there is no trace in the weights to find"
            )
        asked = [*subject.facts, *subject.retained[: subject.pick(64, 512)]]
        if len(asked) < 10:
            return not_applicable(
                self, f"a classifier needs at least 10 prompts, there are {len(asked)}; give retained facts"
            )
        prompts = [subject.prompt(fact) for fact in asked]

        def look(handle: ModelHandle) -> dict[str, torch.Tensor]:
            return {view: features(handle, prompts, view) for view in VIEWS}

        report_progress(self.name, 0, 4)
        after = look(subject.handle)
        with original.there():
            before = look(original.handle)
        report_progress(self.name, 1, 4)
        controls = {"noise": noise_like(change, seed=subject.seed)}
        if subject.retained:
            texts = [subject.sentence(fact) for fact in subject.retained]
            with original.there():
                controls["fine-tune"] = finetune_like(original.handle, change, texts, seed=subject.seed)
        report_progress(self.name, 2, 4)
        seen = {}
        for name, control in controls.items():
            with original.under(change, control):
                seen[name] = look(original.handle)
        report_progress(self.name, 3, 4)

        def compare(other: dict[str, torch.Tensor]) -> dict[str, Any]:
            return {view: detect(before[view], other[view], seed=subject.seed) for view in VIEWS}

        found = compare(after)
        benign = {name: compare(other) for name, other in seen.items()}
        view = max(VIEWS, key=lambda each: found[each].accuracy.mean or 0.0)
        hardest = max(benign, key=lambda name: benign[name][view].accuracy.mean or 0.0)
        size = len(subject.facts)
        scores = Scores(found[view].verdicts[:size], benign[hardest][view].verdicts[:size])
        made = result_of(
            self,
            subject,
            scores,
            tried=f"{len(prompts)} prompts, logits and activations, controls of equal norm: {', '.join(controls)}",
            note="0.5 is chance; the control is a benign change of equal norm, not the oracle",
            details={
                "view": view,
                "control": hardest,
                "found": {each: detection.to_json() for each, detection in found.items()},
                "benign": {
                    name: {each: detection.to_json() for each, detection in parts.items()}
                    for name, parts in benign.items()
                },
                "auc_above_control": above_control(found, list(benign.values())),
            },
        )
        report_progress(self.name, 4, 4)
        return _with_control(made, "benign", scores.oracle)


class HiddenKnowledgeAttack:
    """Reads from hidden states what the model does not say: ``K`` of a linear probe beside ``K`` of the logits.

    A fact's score is the probe's ``K``, so that 0.5 is chance; the controls give their own.
    """

    name = "hidden_knowledge"
    family: Family = "inside"
    access: Access = "white-box"
    paper = "arXiv 2503.15299 (Inside-Out)"
    cost = "two forward passes per candidate answer, one logistic regression per layer"
    needs: tuple[str, ...] = ()

    def run(self, subject: AuditSubject, report_progress: Progress) -> AttackResult:
        """See ``Attack``."""
        count = subject.pick(7, 63)
        relations = {fact.relation for fact in subject.facts}
        # What a probe learns carries over best within a relation.
        near = sorted(subject.retained, key=lambda fact: fact.relation not in relations)
        training = near[: subject.pick(80, 500)]
        pool = (*subject.facts, *subject.controls.never, *subject.retained)
        runs: list[HiddenKnowledge] = []

        def score(handle: ModelHandle, facts: Sequence[Fact]) -> list[float]:
            report_progress(self.name, len(runs), 3)
            found = hidden_knowledge(
                handle, facts, training, pool=pool, count=count, seed=subject.seed, ask=subject.prompt
            )
            runs.append(found)
            known = {each.id: each.internal for each in found.known}
            # A fact without a rival has nothing to rank: chance.
            return [known.get(fact.id or fact.text, 0.5) for fact in facts]

        try:
            scores = measured(subject, score)
        except ConfigError as error:
            return not_applicable(self, str(error))
        report_progress(self.name, 3, 3)
        names = ["audited", *(["oracle"] if scores.oracle else []), *(["never"] if scores.never else [])]
        return result_of(
            self,
            subject,
            scores,
            tried=f"{count} wrong answers per question at most, probes on every layer",
            note="0.5 is chance",
            details={name: found.to_json() for name, found in zip(names, runs, strict=True)},
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

    def run(self, subject: AuditSubject, report_progress: Progress) -> AttackResult:
        """See ``Attack``."""
        original = original_of(subject)
        if original is None:
            return not_applicable(self, NO_ORIGINAL)
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
        oracle = subject.controls.oracle
        scores = Scores(intact(mine), () if oracle is None else intact(changes(oracle)))
        report_progress(self.name, 2, 2)
        covered = sum(bool(each) for each in vectors)
        return result_of(
            self,
            subject,
            scores,
            tried=f"{covered} of {len(vectors)} facts have a value vector at {HOLDS:g} standard deviations",
            note=""
            if oracle is not None
            else "no oracle: the lift is the bare score, and untouched layers score 1",
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


def strangers(subject: AuditSubject) -> tuple[Fact, ...]:
    """Facts about subjects that are not audited: never-trained ones, else retained ones.

    Foreign facts have the same subjects with exchanged objects as their control, which a measure of subjects cannot use.
    """
    audited = {fact.subject for fact in subject.facts}
    never = tuple(fact for fact in subject.controls.never if fact.subject not in audited)
    return never or tuple(fact for fact in subject.retained if fact.subject not in audited)


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


def _with_control(result: AttackResult, name: str, values: Sequence[float]) -> AttackResult:
    """The result with its first control under its real name."""
    controls = {key: value for key, value in result.controls.items() if key != "oracle"}
    return replace(result, controls={name: Interval.of(list(values)), **controls})
