"""What a change leaves in a model: the spectral fingerprint of edits, and traces that tell a changed model from its original."""

from __future__ import annotations

from collections.abc import Sequence
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
    not_applicable,
    result_of,
)
from lab.audit.detection import (
    VIEWS,
    View,
    above_control,
    detect,
    features,
    finetune_like,
    noise_like,
)
from lab.audit.originals import Original, change_of, original_of
from lab.audit.spectra import Directions, decompose, match_keys, outlier_layers, subject_keys, written_tokens
from lab.patch import LowRank

if TYPE_CHECKING:
    from lab.handle import ModelHandle
    from lab.records import Fact

NO_ORIGINAL = "there is no model before the change to compare with: give the base, or audit patches on a base"
# A modified z-score beyond this is an outlier (Iglewicz and Hoaglin 1993).
OUTLIER = 3.5


class Spectral:
    """Recognises closed-form edits by the singular values of the weights, and reads off whom they are about.

    A fact's score is how strongly the change of a down projection answers to its subject's key, times how concentrated the change
    is. Without a model before the change, the weight that stands out from the other layers' stands in for the change.
    """

    name = "spectral"
    family: Family = "statistics"
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
            about_never=tuple(fact.subject for fact in others),
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
    """Tells the changed model from the original by its logits, activations and (``full``) replies, benign changes beside it.

    Any change can be told from activations; the lift is over the benign change that is told most easily. A fact's score is the
    share of right verdicts on its prompt, so that 0.5 is chance.
    """

    name = "trace"
    family: Family = "statistics"
    access: Access = "grey-box"
    paper = "arXiv 2506.14003 (unlearning traces)"
    cost = "four forward passes per prompt and view, a short fine-tune, linear discriminants with 5-fold cross-validation"
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
        views: tuple[View, ...] = subject.pick(VIEWS, (*VIEWS, "text"))
        # Classifiers need many prompts; relevant ones and others, as in the paper.
        asked = [*subject.facts, *subject.controls.never, *subject.retained][: subject.pick(600, 6000)]
        if len(asked) < 10:
            return not_applicable(
                self, f"a classifier needs at least 10 prompts, there are {len(asked)}; give retained facts"
            )
        prompts = [subject.prompt(fact) for fact in asked]

        def look(handle: ModelHandle) -> dict[View, torch.Tensor]:
            return features(handle, prompts, views)

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

        def compare(other: dict[View, torch.Tensor]) -> dict[View, Any]:
            return {view: detect(before[view], other[view], seed=subject.seed) for view in views}

        found = compare(after)
        benign = {name: compare(other) for name, other in seen.items()}
        view = max(views, key=lambda each: found[each].accuracy.mean or 0.0)
        hardest = max(benign, key=lambda name: benign[name][view].accuracy.mean or 0.0)
        size = len(subject.facts)
        scores = Scores(found[view].verdicts[:size], benign[hardest][view].verdicts[:size])
        made = result_of(
            self,
            subject,
            scores,
            tried=f"{len(prompts)} prompts, {', '.join(views)}, controls of equal norm: {', '.join(controls)}",
            note=f"told from the original with an accuracy of {found[view].accuracy.mean or 0:.3f} by {view}; benign: "
            + ", ".join(f"{name} {parts[view].accuracy.mean or 0:.3f}" for name, parts in benign.items())
            + "; 0.5 is chance; the control is a benign change of equal norm, not the oracle",
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


def strangers(subject: AuditSubject) -> tuple[Fact, ...]:
    """Facts about subjects that are not audited: never-trained ones, else retained ones.

    Foreign facts have the same subjects with exchanged objects as their control, which a measure of subjects cannot use.
    """
    audited = {fact.subject for fact in subject.facts}
    never = tuple(fact for fact in subject.controls.never if fact.subject not in audited)
    return never or tuple(fact for fact in subject.retained if fact.subject not in audited)


def _with_control(result: AttackResult, name: str, values: Sequence[float]) -> AttackResult:
    """The result with its first control under its real name."""
    controls = {key: value for key, value in result.controls.items() if key != "oracle"}
    return replace(result, controls={name: Interval.of(list(values)), **controls})
