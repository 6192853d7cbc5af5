"""Procedures of methods whose updates are more than a loss of answers: a moving weight, a shrinking set, a second pass."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from editors.unlearning import losses, state_losses
from editors.unlearning.procedure import Answers, Procedure, Step
from lab.arch import Role
from lab.errors import RequestError
from lab.tokens import encode_ids
from lab.trace import Site

if TYPE_CHECKING:
    from editors.unlearning.trainer import UnlearningTrainer

NORM = Site(Role.FINAL_NORM)


class Dual(Procedure):
    """PDU: the retain weight is a dual variable, ``λ ← max(0, λ + η·(mean L_retain - ε))`` after every pass."""

    def __init__(self) -> None:
        self._weight: float | None = None
        self._seen: list[float] = []
        self._weights: list[float] = []

    def begin_epoch(self, run: UnlearningTrainer, epoch: int) -> None:
        config = run.config
        if self._weight is None:
            self._weight = config.retain_weight
        elif epoch >= config.warmup_epochs and self._seen:
            mean = sum(self._seen) / len(self._seen)
            self._weight = max(0.0, self._weight + config.dual_rate * (mean - config.tolerance))
        self._seen = []
        self._weights.append(self._weight)

    def step(self, run: UnlearningTrainer, picked: Sequence[int], beside: Sequence[int]) -> Step:
        plain = super().step(run, picked, beside)
        self._seen.append(float(plain.terms["retain"].detach()))
        assert self._weight is not None
        return Step(plain.terms, {**plain.weights, "retain": self._weight}, plain.answer, plain.retained)

    def state(self) -> dict[str, Any]:
        return {"weight": self._weight, "seen": self._seen, "weights": self._weights}

    def restore(self, state: Mapping[str, Any]) -> None:
        self._weight, self._seen, self._weights = state["weight"], state["seen"], state["weights"]

    def notes(self) -> dict[str, Any]:
        return {"retain_weights": self._weights}


class Contrast(Procedure):
    """WPN: what the model is about to say is held near refusals and far from answers, both as the untouched model reads them."""

    def prepare(self, run: UnlearningTrainer) -> None:
        self._pooled: dict[str, Tensor] = {}
        size = run.config.batch_size
        for kind in ("answer", "refusal"):
            parts = [
                _pooled(
                    run.answers(
                        kind, range(start, min(start + size, len(run.forget))), grad=False, reads=(NORM,)
                    )
                )
                for start in range(0, len(run.forget), size)
            ]
            self._pooled[kind] = torch.cat(parts)

    def step(self, run: UnlearningTrainer, picked: Sequence[int], beside: Sequence[int]) -> Step:
        config = run.config
        answer = run.answers("answer", picked, reads=(NORM,))
        refusal = run.answers("refusal", picked)
        places = torch.tensor(picked, device=answer.logits.device)
        # Each anchor's own answer comes first, then those of the facts after it in the batch.
        count = min(config.negatives, len(picked))
        beyond = torch.stack([places.roll(-shift) for shift in range(count)], dim=1)
        contrast = state_losses.n_pair(
            _pooled(answer), self._pooled["refusal"][places], self._pooled["answer"][beyond], tau=config.tau
        )
        said = losses.answer_nll(refusal.logits, refusal.labels)
        return self.with_retained(run, {"forget": contrast + config.refusal_weight * said}, answer, beside)


def _pooled(answers: Answers) -> Tensor:
    return state_losses.pooled(answers.at_answer(NORM), answers.lines.row, answers.lines.rows)


class Rounds(Procedure):
    """ICU: ascent on what is still known, with each fact's nearest retained one beside it; after a pass, what is gone is left out."""

    def prepare(self, run: UnlearningTrainer) -> None:
        self._active = set(range(len(run.forget)))
        self._left: list[int] = []
        texts, pool = ([f"{fact.text} {fact.object}" for fact in facts] for facts in (run.forget, run.retain))
        self._nearest = nearest([encode_ids(run.handle.tokenizer, text) for text in texts],
                                [encode_ids(run.handle.tokenizer, text) for text in pool])  # fmt: skip
        run.remember(run.retained, sorted(set(self._nearest)), table=True)

    def begin_epoch(self, run: UnlearningTrainer, epoch: int) -> None:
        if epoch:
            asked = sorted(self._active)
            pairs = [run.sides["answer"].pairs[index] for index in asked]
            longest = max((len(encode_ids(run.handle.tokenizer, text)) for _, text in pairs), default=0)
            said = run.handle.generate([prompt for prompt, _ in pairs], max_new_tokens=longest + 1)
            for index, text, (_, answer) in zip(asked, said, pairs, strict=True):
                if rouge_l(text, answer) < run.config.forgotten_below:
                    self._active.discard(index)
        self._left.append(len(self._active))

    def choose(
        self, run: UnlearningTrainer, picked: Sequence[int], beside: Sequence[int]
    ) -> tuple[Sequence[int], Sequence[int]]:
        kept = [index for index in picked if index in self._active]
        return kept, [self._nearest[index] for index in kept]

    def step(self, run: UnlearningTrainer, picked: Sequence[int], beside: Sequence[int]) -> Step:
        answer, retained = run.answers("answer", picked), run.retained_answers(beside)
        terms = {
            "forget": losses.gradient_ascent(answer.logits, answer.labels),
            "retain": losses.answer_nll(retained.logits, retained.labels),
            # The cross entropy with the untouched model's distributions, less their own entropy, which is constant.
            "distil": losses.retain_kl(retained.logits, retained.labels, retained.table),
        }
        config = run.config
        weights = {
            "forget": config.forget_weight,
            "retain": config.retain_weight,
            "distil": config.distil_weight,
        }
        return Step(terms, weights, answer, retained)

    def state(self) -> dict[str, Any]:
        return {"active": sorted(self._active), "left": self._left}

    def restore(self, state: Mapping[str, Any]) -> None:
        self._active, self._left = set(state["active"]), state["left"]

    def notes(self) -> dict[str, Any]:
        return {"facts_per_pass": self._left}


def nearest(rows: Sequence[Sequence[int]], pool: Sequence[Sequence[int]]) -> list[int]:
    """For each token row the most similar row of a pool, by cosine of tf-idf weights over tokens.

    Raises:
        RequestError: The pool is empty.
    """
    if not pool:
        raise RequestError(
            "the nearest retained facts are wanted, and there are no retained facts; give some"
        )
    everywhere = Counter(token for row in (*rows, *pool) for token in set(row))
    total = len(rows) + len(pool)

    def weighed(row: Sequence[int]) -> dict[int, float]:
        found = {
            token: count * math.log((1 + total) / (1 + everywhere[token]) + 1)
            for token, count in Counter(row).items()
        }
        size = math.sqrt(sum(value * value for value in found.values())) or 1.0
        return {token: value / size for token, value in found.items()}

    others = [weighed(row) for row in pool]
    chosen = []
    for row in rows:
        own = weighed(row)
        scores = [sum(value * other.get(token, 0.0) for token, value in own.items()) for other in others]
        chosen.append(max(range(len(pool)), key=lambda index: (scores[index], -index)))
    return chosen


def rouge_l(text: str, answer: str) -> float:
    """Recall of the answer's words, in order, within a text: longest common subsequence over the answer's length."""
    left, right = text.lower().split(), answer.lower().split()
    if not right:
        return 0.0
    best = [0] * (len(right) + 1)
    for word in left:
        before = 0
        for index, other in enumerate(right, start=1):
            kept = best[index]
            best[index] = before + 1 if word.strip(".,;") == other else max(kept, best[index - 1])
            before = kept
    return best[-1] / len(right)


class Instructed(Procedure):
    """Bidirectional distillation from the instructed model on facts to forget, from the plain one on retained facts."""

    def step(self, run: UnlearningTrainer, picked: Sequence[int], beside: Sequence[int]) -> Step:
        config = run.config
        answer = run.answers("answer", picked)
        if config.teacher == "prefix":
            side = run.sides["instructed"]
            teacher = run.table_of(side, side.places(picked), answer.logits)
        else:
            teacher = state_losses.masked_teacher(
                answer.table, answer.lines.label, self._refusals(run, answer, picked)
            )
        forget = state_losses.bidirectional(
            answer.logits, answer.labels, teacher, answer.table, push=config.push, top=config.top
        )
        return self.with_retained(run, {"forget": forget}, answer, beside)

    def _refusals(self, run: UnlearningTrainer, answer: Answers, picked: Sequence[int]) -> Tensor:
        """Each answer token's counterpart in the fact's refusal, -1 where that is shorter."""
        tokens = [encode_ids(run.handle.tokenizer, f" {run.refusals[index]}") for index in picked]
        lines, counts = [], Counter[int]()
        for row in answer.lines.row.tolist():
            own = tokens[row]
            lines.append(own[counts[row]] if counts[row] < len(own) else -1)
            counts[row] += 1
        return torch.tensor(lines, device=answer.logits.device)


class Undesired(Procedure):
    """LfU: refusals are taught while hidden states are held against a step in the direction that would undo it."""

    def step(self, run: UnlearningTrainer, picked: Sequence[int], beside: Sequence[int]) -> Step:
        config, width = run.config, run.handle.weight(Role.MLP_OUT, 0).shape[0]
        sites = [Site(Role.BLOCK, layer) for layer in range(run.handle.n_layers)]
        parameter = next(run.handle.model.parameters())
        still = {
            site: torch.zeros(width, dtype=parameter.dtype, device=parameter.device, requires_grad=True)
            for site in sites
        }

        def adding(vectors: dict[Site, Tensor]) -> dict[Any, Any]:
            return {site: lambda states, vector=vector: states + vector for site, vector in vectors.items()}

        plain = run.answers("refusal", picked, reads=sites, writes=adding(still))
        taught = losses.answer_nll(plain.logits, plain.labels)
        found = torch.autograd.grad(taught, list(still.values()), retain_graph=True)
        size = torch.stack([each.square().sum() for each in found]).sum().sqrt().clamp_min(1e-12)
        wrong = {site: config.ascent * each / size for site, each in zip(sites, found, strict=True)}
        steered = run.answers("refusal", picked, reads=sites, writes=adding(wrong))
        held = state_losses.consistency(plain.states, steered.states, plain.real)
        return self.with_retained(run, {"forget": taught + config.consistency_weight * held}, None, beside)
