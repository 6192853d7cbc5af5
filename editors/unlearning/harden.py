"""Hardening: what an audit brought out of a model is trained against once more.

Forms and suffixes that leak become further texts of the forgotten facts. Directions in the residual stream that bring facts back
are written into the model while it trains, beside a perturbation that is searched anew at the same block, so that forgetting holds
along them too. Other leaks (weights, probes, several samples) have no text or state to train on; they are named, not fed.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from editors.tuning import target_lines
from editors.unlearning.gradient import GradientUnlearner
from editors.unlearning.perturbed import ball_search
from editors.unlearning.procedure import Answers, Procedure, Step
from editors.unlearning.sides import Kind
from editors.values import Progress
from lab.arch import Role
from lab.audit.base import LEAKING, AuditSubject
from lab.audit.forms import form_pairs
from lab.errors import ConfigError
from lab.records import Fact
from lab.scoring import score_targets
from lab.trace import Site, Write

if TYPE_CHECKING:
    from editors.unlearning.trainer import UnlearningTrainer
    from lab.audit.base import AttackResult
    from lab.audit.report import AuditReport
    from lab.handle import ModelHandle
    from lab.patch import WeightPatch

STILL_SAID = 0.05
"""Texts whose answer is less likely than this leak no more; training on them would only end the run early."""


@dataclass(frozen=True)
class Direction:
    """A vector that brings facts back when it is added to a block's output at the prompt's last token.

    Attributes:
        layer: The block.
        vector: ``[d]``.
    """

    layer: int
    vector: tuple[float, ...]


@dataclass(frozen=True)
class Leaks:
    """What an audit found to be surely above the controls.

    Attributes:
        forms: Names of forms (attack ``forms``).
        suffixes: Texts that make the answers come out behind any prompt (attack ``suffix``).
        directions: See ``Direction`` (attack ``latent``).
        others: Attacks that leak and that no training of this kind can be fed.
    """

    forms: tuple[str, ...] = ()
    suffixes: tuple[str, ...] = ()
    directions: tuple[Direction, ...] = ()
    others: tuple[str, ...] = ()


def leaks_of(report: AuditReport, *, model: str | None = None, facts: str | None = None) -> Leaks:
    """What leaked in an audit: attacks, and variants of attacks, whose lift has its lower end above zero.

    Args:
        report: The audit.
        model, facts: What will be trained, as on the command line; an audit of something else is refused.

    Raises:
        ConfigError: The audit is of another model or of other facts, or found nothing that can be fed back.
    """
    for name, wanted, told in (
        ("model", model, report.settings.get("model")),
        ("facts", facts, report.settings.get("facts from")),
    ):
        if wanted is not None and told is not None and wanted != told:
            raise ConfigError(f"the audit is of the {name} {told!r}, but {wanted!r} is to be hardened")
    found = {result.name: result for result in report.results if result.applicable}
    forms = tuple(_leaking(found.get("forms")))
    kept = {f"{source}/facts" for source in _leaking(found.get("suffix"))}
    suffixes: list[str] = []
    directions: tuple[Direction, ...] = ()
    if "suffix" in found:
        for key, texts in found["suffix"].details.get("suffixes", {}).items():
            suffixes += [text for text in texts if key in kept and text.strip()]
    if "latent" in found and found["latent"].lift.low > 0:
        rows = found["latent"].details.get("directions", ())
        directions = tuple(Direction(int(row["layer"]), tuple(map(float, row["vector"]))) for row in rows)
    others = tuple(
        name
        for name, result in found.items()
        if name not in ("forms", "suffix", "latent") and result.family in LEAKING and result.lift.low > 0
    )
    if not (forms or suffixes or directions):
        more = f"; it leaks by {', '.join(others)}, which have no text or state to train on" if others else ""
        raise ConfigError(f"the audit found no form, suffix or direction to feed back into training{more}")
    return Leaks(forms, tuple(dict.fromkeys(suffixes)), directions, others)


def _leaking(result: AttackResult | None) -> list[str]:
    if result is None:
        return []
    variants: Mapping[str, Any] = result.details.get("variants", {})
    return [name for name, row in variants.items() if row["lift"]["low"] > 0]


@torch.no_grad()
def leaking_texts(
    handle: ModelHandle, subject: AuditSubject, leaks: Leaks, *, least: float = STILL_SAID
) -> tuple[list[Fact], int]:
    """The facts in the forms and behind the suffixes that leaked, as facts with other prompts.

    One wording is drawn for each fact and form, and one suffix for each fact. A wording that names neither subject nor answer,
    or holds braces, cannot be a fact's prompt and is left out.

    Args:
        handle: The model; texts whose answer it does not give any more are left out.
        subject: Facts, format, retained facts and seed.
        leaks: What leaked.
        least: Probability per token from which a text counts as still leaking.

    Returns:
        The texts, and how many were asked.
    """
    facts = subject.facts
    texts: list[Fact] = []
    for form in leaks.forms:
        wordings: dict[int, list[tuple[str, str]]] = {}
        for pair, owner in zip(*form_pairs(subject, form), strict=True):
            wordings.setdefault(owner, []).append(pair)
        for owner, pairs in wordings.items():
            chooser = random.Random(f"harden:{subject.seed}:{form}:{owner}")
            texts += _as_fact(facts[owner], *chooser.choice(pairs), form)
    if leaks.suffixes:
        for owner, fact in enumerate(facts):
            suffix = random.Random(f"harden:{subject.seed}:suffix:{owner}").choice(leaks.suffixes)
            texts += _as_fact(fact, subject.prompt(fact) + suffix.rstrip(), fact.object, "suffix")
    scores = score_targets(handle, [(text.text, text.object) for text in texts]) if texts else []
    return [text for text, score in zip(texts, scores, strict=True) if score.probability >= least], len(texts)


def _as_fact(fact: Fact, prompt: str, answer: str, source: str) -> list[Fact]:
    name = next((name for name in (fact.subject, *fact.answers) if name in prompt), None)
    if name is None or "{" in prompt or "}" in prompt:
        return []
    template = prompt.replace(name, "{}", 1)
    return [
        Fact(name, fact.relation, answer, template, id=f"{fact.id or fact.text}#{source}", group=fact.group)
    ]


class Hardened(Procedure):
    """The plain way, with the forget loss also under found directions and under a perturbation searched at their block."""

    def __init__(self, directions: Sequence[Direction]) -> None:
        self._directions = tuple(directions)
        self._turn = 0

    def step(self, run: UnlearningTrainer, picked: Sequence[int], beside: Sequence[int]) -> Step:
        direction = self._directions[self._turn % len(self._directions)]
        self._turn += 1
        site = Site(Role.BLOCK, direction.layer)
        kinds, forget = run.objective.reads, run.objective.forget
        assert forget is not None  # hardened() gives this procedure to such methods only
        plain: dict[Kind, Answers] = {kind: run.answers(kind, picked) for kind in kinds}
        along: dict[Kind, Answers] = {
            kind: run.answers(kind, picked, writes={site: self._written(run, kind, picked, direction)})
            for kind in kinds
        }
        searched: dict[Kind, Answers] = {**plain}
        if "answer" in kinds:
            searched["answer"] = run.answers("answer", picked, writes=ball_search(run, picked, site))
        terms = torch.stack([forget(batch, run.config) for batch in (plain, along, searched)])
        # What still leaks decides when training ends, not what is long forgotten.
        return self.with_retained(run, {"forget": terms.mean()}, along.get("answer"), beside)

    def _written(
        self, run: UnlearningTrainer, kind: Kind, picked: Sequence[int], direction: Direction
    ) -> Write:
        side = run.sides[kind]
        last = target_lines(
            run.handle, [side.pairs[place] for place in side.places(picked)]
        ).batch.prompt_last
        assert last is not None  # target_lines says where prompts end

        def write(states: Tensor) -> Tensor:
            rows = torch.arange(states.shape[0], device=states.device)
            vector = torch.tensor(direction.vector, dtype=states.dtype, device=states.device)
            changed = states.clone()
            changed[rows, last] = changed[rows, last] + vector
            return changed

        return write


def hardened(
    unlearner: Any,
    handle: ModelHandle,
    forget: Sequence[Fact],
    leaks: Leaks,
    retain: Sequence[Fact] = (),
    *,
    world: bool = False,
    seed: int = 0,
    progress: Progress | None = None,
) -> WeightPatch:
    """Runs a method that trains once more, on what leaked. The model is bit-identical afterwards.

    Facts that the model no longer says in their own prompts are left out beside texts that leak, but not where directions are
    fed: a fact is forgotten without one and still comes back with it.

    Args:
        unlearner: A method that trains (``GradientUnlearner``); one whose updates work on hidden states already is given texts only.
        handle: The model, with the audited patches applied.
        forget: The facts to forget.
        leaks: What leaked.
        retain: What should stay.
        world: Whether the facts are the built-in world's, which is asked in its own format.
        seed: Draws wordings and suffixes.
        progress: As in ``Unlearner.unlearn``.

    Returns:
        The patch; ``provenance.extra["hardened"]`` says what was fed back and what not.

    Raises:
        ConfigError: The method does not train, nothing leaks any more, or a direction does not fit the model.
    """
    if not isinstance(unlearner, GradientUnlearner):
        raise ConfigError(
            "only methods that train can be hardened (npo, graddiff, ...); choose another --method"
        )
    form = None
    if world:
        from lab.atlas.forms import load_format

        form = load_format()
    subject = AuditSubject(handle, tuple(forget), seed=seed, retained=tuple(retain), format=form)
    texts, asked = leaking_texts(handle, subject, leaks)
    directions = leaks.directions
    for direction in directions:
        if direction.layer >= handle.n_layers or len(direction.vector) != handle.hidden_size:
            raise ConfigError(
                f"the audit's direction has {len(direction.vector)} numbers for block {direction.layer}; {handle.name!r} has "
                f"{handle.n_layers} blocks of width {handle.hidden_size}: it is of another model"
            )
    not_fed = list(leaks.others)
    if "subtoken" in leaks.forms:
        not_fed.append("forms: subtoken")
    plain = list(forget)
    if directions and unlearner.objective.procedure is not Procedure:
        not_fed.append("latent")
        directions = ()
    if directions:
        objective = replace(unlearner.objective, procedure=lambda: Hardened(directions))
        unlearner = replace(unlearner, objective=objective)
    else:
        scores = score_targets(handle, [(fact.text, fact.object) for fact in forget])
        plain = [fact for fact, score in zip(forget, scores, strict=True) if score.probability >= STILL_SAID]
    if not (plain or texts):
        raise ConfigError(
            "nothing that the audit found leaks from this model any more; there is nothing to train"
        )
    patch = unlearner.unlearn(handle, [*plain, *texts], retain, progress=progress)
    told = {
        "forms": [form for form in leaks.forms if form != "subtoken"],
        "suffixes": list(leaks.suffixes),
        "directions": len(directions),
        "layers": sorted({direction.layer for direction in directions}),
        "facts": len(plain),
        "texts": len(texts),
        "texts_asked": asked,
        "not_fed": not_fed,
    }
    requests = tuple(fact.to_json() for fact in forget)
    note = replace(patch.provenance, requests=requests, extra={**patch.provenance.extra, "hardened": told})
    return replace(patch, provenance=note)
