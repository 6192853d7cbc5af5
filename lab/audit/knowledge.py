"""Hidden knowledge: what hidden states rank right although the model's own probabilities do not (Inside-Out, arXiv 2503.15299).

For a question with right and wrong candidate answers, ``K`` is the share of pairs that a score ranks right. The external score is
the model's probability of the answer; the internal one is a linear probe on the products of the hidden state before the answer
with the answer's output embedding, trained on other questions. A fact with a high internal and a low external ``K`` is suppressed,
not forgotten.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from lab.arch import Role
from lab.audit.detection import linear_scores, ranking
from lab.errors import ConfigError
from lab.eval.stats import Estimate, summarise
from lab.scoring import score_token_targets
from lab.tokens import join_target, pad_rows
from lab.trace import Site, trace

if TYPE_CHECKING:
    from lab.handle import ModelHandle
    from lab.records import Fact

Ask = Callable[["Fact"], str]
Studied = tuple[tuple[str, ...], Tensor]
Quadrant = Literal["retained", "suppressed", "lucky", "forgotten"]


def plain_prompt(fact: Fact) -> str:
    """A fact's own prompt."""
    return fact.text


@dataclass(frozen=True)
class Candidates:
    """A question and what might answer it.

    Attributes:
        fact: The question.
        wrong: Other objects of the same relation.
        prompt: How it is asked.
    """

    fact: Fact
    wrong: tuple[str, ...]
    prompt: str

    @property
    def answers(self) -> tuple[str, ...]:
        """The right answer first, then the wrong ones."""
        return (self.fact.object, *self.wrong)


@dataclass(frozen=True)
class Known:
    """``K`` of one question, by what the model says and by what a probe reads.

    Attributes:
        id: The fact's.
        external: By log-probability per token.
        internal: By the probe.
    """

    id: str
    external: float
    internal: float

    @property
    def quadrant(self) -> Quadrant:
        """Retained, suppressed (inside only), lucky (outside only), or forgotten."""
        if self.internal > 0.5:
            return "retained" if self.external > 0.5 else "suppressed"
        return "lucky" if self.external > 0.5 else "forgotten"


@dataclass(frozen=True)
class HiddenKnowledge:
    """Hidden knowledge over questions.

    Attributes:
        known: One for each question.
        layer: The block that the probe reads; for each fold, the one that ranked its training questions best.
    """

    known: tuple[Known, ...]
    layer: tuple[int, ...]

    def gap(self) -> Estimate:
        """Mean of internal minus external ``K``."""
        return summarise([each.internal - each.external for each in self.known], bounds=(-1.0, 1.0))

    def share(self, quadrant: Quadrant) -> Estimate:
        """Share of questions in a quadrant."""
        return summarise([float(each.quadrant == quadrant) for each in self.known])

    def to_json(self) -> dict[str, Any]:
        """Both ``K``, the gap (also relative to the external ``K``), full knowledge, and the quadrants."""
        external = summarise([each.external for each in self.known])
        internal = summarise([each.internal for each in self.known])
        outside = external.mean or 0.0
        return {
            "external": external.to_json(),
            "internal": internal.to_json(),
            "gap": self.gap().to_json(),
            "relative_gap": (internal.mean or 0.0) / outside - 1 if outside > 0 else None,
            "full": {
                side: summarise([float(getattr(each, side) == 1.0) for each in self.known]).to_json()
                for side in ("external", "internal")
            },
            "quadrants": {
                name: self.share(name).to_json() for name in ("retained", "suppressed", "lucky", "forgotten")
            },
            "layers": list(self.layer),
        }


def candidates(
    facts: Sequence[Fact],
    pool: Sequence[Fact] = (),
    *,
    count: int = 15,
    seed: int = 0,
    ask: Ask = plain_prompt,
) -> list[Candidates]:
    """Right and wrong answers of each fact; a fact whose relation has no other object is left out.

    Args:
        facts: The questions.
        pool: More facts whose objects may serve as wrong answers.
        count: Wrong answers per question at most.
        seed: Draws them.
        ask: Makes the prompt of a fact; its own one without it.
    """
    objects: dict[str, set[str]] = {}
    for fact in (*facts, *pool):
        objects.setdefault(fact.relation, set()).add(fact.object)
    found = []
    for fact in facts:
        others = sorted(objects[fact.relation] - set(fact.answers))
        random.Random(f"candidates:{seed}:{fact.id or fact.text}").shuffle(others)
        if others:
            found.append(Candidates(fact, tuple(others[:count]), ask(fact)))
    return found


def share_ranked(right: float, wrong: Sequence[float] | np.ndarray) -> float:
    """``K`` of one question with one right answer: the share of wrong ones that score lower (ties half)."""
    return ranking([right], wrong)


@torch.no_grad()
def answer_states(
    handle: ModelHandle,
    questions: Sequence[Candidates],
    layers: Sequence[int],
    *,
    batch_size: int = 64,
) -> tuple[list[list[float]], list[Tensor]]:
    """How the model rates every candidate answer, and how its hidden states before the answer meet it.

    What a question holds about an answer is an interaction of the two, which no linear probe on one state can read: on the
    built-in world the state behind the answer ranks at chance. The features are therefore the products of the state at the
    prompt's last token, brought to unit root mean square, with the mean output embedding of the answer's tokens. A probe that weighs
    all of them alike is the logit lens.

    Args:
        handle: The model, with whatever is applied to it.
        questions: What is asked.
        layers: Blocks to read.
        batch_size: Rows per forward pass.

    Returns:
        Per question, the log-probability per token of each candidate; and features ``[candidate, layer, d]``.
    """
    rows = [
        join_target(handle.tokenizer, handle.rewrite([question.prompt])[0], answer)
        for question in questions
        for answer in question.answers
    ]
    sites = [Site(Role.BLOCK, layer) for layer in layers]
    output: Any = handle.model.get_output_embeddings()
    table = output.weight.detach()
    with handle.writing():
        scores = [score.mean_logprob for score in score_token_targets(handle, rows, batch_size=batch_size)]
        parts = []
        for start in range(0, len(rows), batch_size):
            chunk = rows[start : start + batch_size]
            batch = pad_rows(
                [head + tail for head, tail in chunk],
                handle.pad_id,
                device=handle.device,
                prompts=[len(head) for head, _ in chunk],
            )
            index = torch.arange(len(chunk), device=handle.device)
            with trace(handle, sites, stop=sites[-1]) as recording:
                recording.run(batch)
                assert batch.prompt_last is not None  # pad_rows was told where prompts end
                before = torch.stack([recording[site][index, batch.prompt_last] for site in sites], 1).float()
            size = before.square().mean(-1, keepdim=True).sqrt().clamp_min(1e-12)
            tails = [torch.tensor(tail, device=table.device) for _, tail in chunk]
            answers = torch.stack([table[tail].float().mean(0) for tail in tails]).to(before)
            parts.append((before / size * answers[:, None]).cpu())
    states = torch.cat(parts)
    sizes = [len(question.answers) for question in questions]
    ends = np.cumsum(sizes)
    return (
        [scores[end - size : end] for size, end in zip(sizes, ends, strict=True)],
        [states[end - size : end] for size, end in zip(sizes, ends, strict=True)],
    )


def hidden_knowledge(
    handle: ModelHandle,
    facts: Sequence[Fact],
    training: Sequence[Fact] = (),
    *,
    pool: Sequence[Fact] = (),
    count: int = 15,
    layers: Sequence[int] | None = None,
    folds: int = 5,
    seed: int = 0,
    ask: Ask = plain_prompt,
) -> HiddenKnowledge:
    """Compares what the model says with what a probe reads from it.

    The probe sees right and wrong answers of other questions: of ``training`` where given (kept facts, which an auditor may
    know), else of the other folds of ``facts``, divided by subject. Its layer is the one that ranks its training questions
    best when these are halved.

    Args:
        handle: The model, with whatever is applied to it.
        facts: The questions.
        training: Facts that the probe learns from.
        pool: More facts whose objects may serve as wrong answers.
        count: Wrong answers per question.
        layers: Blocks that the probe may read; all without it.
        folds: Parts into which subjects are divided where there is no ``training``.
        seed: Draws candidates and folds.
        ask: Makes the prompt of a fact; its own one without it.

    Raises:
        ConfigError: No question has a wrong answer, or there are too few subjects to train on.
    """
    chosen = tuple(range(handle.n_layers)) if layers is None else tuple(layers)
    asked = candidates(facts, [*pool, *training], count=count, seed=seed, ask=ask)
    if not asked:
        raise ConfigError(
            "no fact has a wrong answer to compare with: no other object of its relation is known"
        )
    subjects = {fact.subject for fact in facts}
    learned = candidates(
        [fact for fact in training if fact.subject not in subjects],
        count=count,
        seed=seed,
        ask=ask,
    )
    scores, states = answer_states(handle, asked, chosen)
    if learned:
        _, read = answer_states(handle, learned, chosen)
        parts = [(list(zip(map(_names, learned), read, strict=True)), list(range(len(asked))))]
    else:
        parts = [
            (
                [(_names(asked[index]), states[index]) for index in range(len(asked)) if index not in held],
                held,
            )
            for held in _folds([question.fact.subject for question in asked], folds, seed)
        ]
    internal: dict[int, float] = {}
    used = []
    for lessons, held in parts:
        if len(lessons) < 2:
            raise ConfigError(
                "a probe needs at least two training questions about other subjects; give more facts"
            )
        place = best_layer(lessons, seed)
        used.append(chosen[place])
        values = _probe(lessons, [states[index] for index in held], place)
        internal |= {
            index: share_ranked(float(row[0]), row[1:]) for index, row in zip(held, values, strict=True)
        }
    known = tuple(
        Known(question.fact.id or question.fact.text, share_ranked(row[0], row[1:]), internal[index])
        for index, (question, row) in enumerate(zip(asked, scores, strict=True))
    )
    return HiddenKnowledge(known, tuple(used))


def _folds(subjects: Sequence[str], folds: int, seed: int) -> list[list[int]]:
    names = sorted(set(subjects))
    random.Random(seed).shuffle(names)
    if len(names) < 2:
        raise ConfigError(
            "a probe needs questions about at least two subjects; give more facts or training facts"
        )
    parts = min(folds, len(names))
    return [
        [index for index, subject in enumerate(subjects) if subject in set(names[part::parts])]
        for part in range(parts)
    ]


def _names(question: Candidates) -> tuple[str, ...]:
    return tuple(f"{question.fact.relation}\t{answer}" for answer in question.answers)


def best_layer(lessons: Sequence[Studied], seed: int) -> int:
    """Which of the layers' probes ranks best on the half of the questions that it did not see; the first of equals.

    Args:
        lessons: Per question, the candidates' names and their states ``[candidate, layer, d]``, the right answer first.
        seed: Halves the questions.
    """
    order = list(range(len(lessons)))
    random.Random(seed).shuffle(order)
    seen, unseen = order[::2], order[1::2]
    found = []
    for place in range(lessons[0][1].shape[1]):
        values = _probe([lessons[index] for index in seen], [lessons[index][1] for index in unseen], place)
        found.append(sum(share_ranked(float(row[0]), row[1:]) for row in values))
    return int(np.argmax(found))


def row_weights(names: Sequence[Sequence[str]]) -> np.ndarray:
    """Weights under which every answer counts as much as a right one as it does as a wrong one.

    Without them a probe learns which answers were right in training. The answer of the question at hand was not, so it would
    rank below chance. Answers with one label only weigh nothing, unless all are such: then all rows weigh alike.

    Args:
        names: Per question, the candidates, the right answer first.

    Returns:
        ``[row]``, candidates of all questions in order.
    """
    right, wrong = Counter(row[0] for row in names), Counter(name for row in names for name in row[1:])
    weights = [
        (1 / right[name] if place == 0 else 1 / wrong[name]) if right[name] and wrong[name] else 0.0
        for row in names
        for place, name in enumerate(row)
    ]
    table = np.array(weights)
    return table / table.mean() if table.any() else np.ones(len(table))


def _probe(lessons: Sequence[Studied], asked: Sequence[Tensor], place: int) -> list[np.ndarray]:
    """Scores of every candidate of ``asked`` by a probe trained on ``lessons``."""
    train = torch.cat([states[:, place] for _, states in lessons]).double().numpy()
    label = np.concatenate([np.eye(1, len(names), dtype=int)[0] for names, _ in lessons])
    test = torch.cat([each[:, place] for each in asked]).double().numpy()
    weights = row_weights([names for names, _ in lessons])
    flat = linear_scores(train, label, test, weights=weights)
    return np.split(flat, np.cumsum([len(each) for each in asked])[:-1])
