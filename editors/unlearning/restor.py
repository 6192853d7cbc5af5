"""RESTOR on models that can be trained here: does unlearning false facts bring the true ones back, or only remove the false?

Rezaei et al. 2024, arXiv 2411.00204: a clean model is corrupted by training on false statements, unlearns them, and is asked for
what the clean model knew. The corruption here is an editor's patch, and the questions are the facts' own prompts, without examples
in front; both differ from the paper, which continues pretraining on documents and asks with five examples.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from lab.errors import PatchError, RequestError
from lab.eval.stats import summarise
from lab.eval.unlearning_metrics import recovery
from lab.records import EditRequest, Fact
from lab.scoring import score_targets

if TYPE_CHECKING:
    from editors.values import Progress
    from lab.handle import ModelHandle

RECOVERED = 0.5
"""From this part of the lost accuracy on, a method counts as one that brings facts back."""


@dataclass(frozen=True)
class Corruption:
    """One fact and what it is corrupted to.

    Attributes:
        fact: The true fact.
        false: The object that training states.
        other: A third object of the relation, in neither statement: what neither memory favours.
    """

    fact: Fact
    false: str
    other: str

    @property
    def false_fact(self) -> Fact:
        """The false statement as a fact to forget."""
        return replace(self.fact, object=self.false, aliases=(), id=f"{self.fact.id or self.fact.text}/false")


def corruptions(facts: Sequence[Fact], pool: Sequence[Fact], *, seed: int = 0) -> tuple[Corruption, ...]:
    """Draws for each fact two wrong objects of its relation.

    Args:
        facts: To be corrupted.
        pool: Where objects come from.
        seed: Draws them.

    Raises:
        RequestError: A relation has fewer than three objects.
    """
    rng = random.Random(f"restor:{seed}")
    objects: dict[str, dict[str, None]] = {}
    for fact in (*pool, *facts):
        objects.setdefault(fact.relation, {})[fact.object] = None
    found = []
    for fact in facts:
        right = {answer.casefold() for answer in fact.answers}
        wrong = [other for other in objects[fact.relation] if other.casefold() not in right]
        if len(wrong) < 2:
            raise RequestError(f"the relation {fact.relation!r} of {fact.text!r} has no two other objects")
        found.append(Corruption(fact, *rng.sample(wrong, 2)))
    return tuple(found)


def asked(handle: ModelHandle, cases: Sequence[Corruption]) -> dict[str, Any]:
    """What a model says of the facts.

    Returns:
        ``accuracy`` (of the true objects) and ``false_accuracy``, with intervals; ``logprob``: mean token log-probability of the
        ``true``, the ``false`` and the ``other`` objects; ``preferred``: share of facts whose true object is the likeliest of the
        three.
    """
    rows = [(case.fact.text, said) for case in cases for said in (case.fact.object, case.false, case.other)]
    scores = score_targets(handle, rows)
    true, false, other = scores[0::3], scores[1::3], scores[2::3]
    best = [
        float(a.mean_logprob > max(b.mean_logprob, c.mean_logprob))
        for a, b, c in zip(true, false, other, strict=True)
    ]
    return {
        "accuracy": summarise([float(score.all_correct) for score in true]).to_json(),
        "false_accuracy": summarise([float(score.all_correct) for score in false]).to_json(),
        "logprob": {
            name: math.fsum(score.mean_logprob for score in side) / len(side)
            for name, side in (("true", true), ("false", false), ("other", other))
        },
        "preferred": summarise(best).to_json(),
    }


def run_restor(
    handle: ModelHandle,
    method: str,
    cases: Sequence[Corruption],
    retain: Sequence[Fact] = (),
    *,
    corruptor: str = "ft_m",
    corruptor_settings: Mapping[str, Any] | None = None,
    settings: Mapping[str, Any] | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Corrupts, unlearns the corruption, and asks each time; the model is left as it was.

    Args:
        handle: The clean model.
        method: Name of an unlearner.
        cases: What to corrupt.
        retain: Facts for the method's retain term; none of them among the cases.
        corruptor: Name of the editor that states the false facts.
        corruptor_settings, settings: Single settings of the two.
        seed: Of both.
        progress: Told of the unlearning.

    Returns:
        ``clean``, ``corrupted``, ``unlearned`` (each as in ``asked``), ``recovery`` (of the accuracy; ``None`` where corruption took
        nothing), ``recovery_preferred`` (of ``preferred``), ``forgotten`` (part of the false accuracy that is gone), ``verdict``
        (``recovers``, ``forgets`` or ``keeps``), and ``undone``: the clean figures again after both patches are off.

    Raises:
        RequestError: The editor or the method cannot work on these facts.
        PatchError: The model is not what it was, bit for bit.
    """
    from editors.base import get_editor
    from editors.unlearning.base import get_unlearner

    if not cases:
        raise RequestError("RESTOR needs at least one fact to corrupt")
    bits = handle.weights_digest()
    clean = asked(handle, cases)
    requests = [EditRequest.from_fact(case.fact, case.false) for case in cases]
    corrupt = get_editor(corruptor, seed=seed, **(corruptor_settings or {})).edit(handle, requests)
    with corrupt.applied(handle):
        corrupted = asked(handle, cases)
        unlearner = get_unlearner(method, seed=seed, **(settings or {}))
        patch = unlearner.unlearn(handle, [case.false_fact for case in cases], retain, progress=progress)
        with patch.applied(handle):
            unlearned = asked(handle, cases)
    if handle.weights_digest() != bits:
        raise PatchError("taking the patches off did not restore the weights bit for bit; reload the model")
    found = {
        "recovery": recovery(*(side["accuracy"]["mean"] for side in (unlearned, corrupted, clean))),
        "recovery_preferred": recovery(
            *(side["preferred"]["mean"] for side in (unlearned, corrupted, clean))
        ),
        "forgotten": recovery(unlearned["false_accuracy"]["mean"], corrupted["false_accuracy"]["mean"], 0.0),
    }
    return {
        "method": method,
        "seed": seed,
        "facts": len(cases),
        "clean": clean,
        "corrupted": corrupted,
        "unlearned": unlearned,
        **found,
        "verdict": verdict(found["recovery"], found["forgotten"]),
        "undone": asked(handle, cases),
    }


def verdict(recovered: float | None, forgotten: float | None) -> str:
    """``recovers`` the true facts, only ``forgets`` the false ones, or ``keeps`` them."""
    if recovered is not None and recovered >= RECOVERED:
        return "recovers"
    return "forgets" if forgotten is not None and forgotten >= RECOVERED else "keeps"
