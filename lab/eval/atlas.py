"""The suite on the built-in world, where everything around an edit is known."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from lab.data.cases import CaseProbe, CaseSet, EditCase
from lab.eval import scorers as s
from lab.eval.probe import Probe
from lab.eval.suite import PromptMeasure, Suite, distracted, scored_group, written
from lab.eval.suites import FLUENCY, SuiteOptions, compared
from lab.records import EditRequest, Fact

if TYPE_CHECKING:
    from lab.atlas.forms import Format
    from lab.atlas.world import World

_NEIGHBOURS = 5
_GROUPS = (
    "rewrite",
    "paraphrase",
    "paraphrase_trained",
    "paraphrase_templates",
    "neighborhood",
    "relation",
    "qa",
)


def atlas(options: SuiteOptions) -> Suite:
    """Edits of facts of the built-in world, scored like CounterFact and SADR, mean per case and then over cases.

    - ``paraphrase``: wordings that training used with other subjects of the relation, never with this one (held-out pairs).
      ``paraphrase_trained`` and ``paraphrase_templates``: wordings trained with this subject, and never trained at all.
    - ``neighborhood``: other subjects of the same relation with the same true object; where there is none, with another one.
    - ``relation``: the other relations of the edited subject. ``distract_neighborhood`` and ``distract_relation``: the same
      prompts after the edited statement. ``qa``: the edited fact as a question.
    - ``score``: harmonic mean of efficacy, paraphrase, neighborhood, relation and distract_neighborhood, as SADR's.
    """

    def probes(case: EditCase) -> tuple[Probe, ...]:
        asked = scored_group(case, *_GROUPS)
        asked += distracted(case, "neighborhood", "distract_neighborhood")
        asked += distracted(case, "relation", "distract_relation")
        if options.fluency:
            prompts = [request.text for request in case.requests]
            asked += written(case, "generation", tokens=options.text_tokens, top_k=5, prompts=prompts)
        return tuple(asked)

    return Suite(
        name="atlas",
        about="Atlas: the built-in world, test facts with counterfactual objects",
        probes=probes,
        measures=(
            *compared("efficacy", "rewrite"),
            *compared("paraphrase", "paraphrase"),
            PromptMeasure("paraphrase_trained", "paraphrase_trained", s.success),
            PromptMeasure("paraphrase_trained_accuracy", "paraphrase_trained", s.accuracy),
            PromptMeasure("paraphrase_templates", "paraphrase_templates", s.success),
            PromptMeasure("paraphrase_templates_accuracy", "paraphrase_templates", s.accuracy),
            *compared("neighborhood", "neighborhood"),
            *compared("relation", "relation"),
            *compared("distract_neighborhood", "distract_neighborhood"),
            PromptMeasure("distract_relation", "distract_relation", s.success),
            PromptMeasure("distract_relation_accuracy", "distract_relation", s.accuracy),
            PromptMeasure("qa", "qa", s.success),
            PromptMeasure("qa_accuracy", "qa", s.accuracy),
            FLUENCY,
        ),
        score_parts=("efficacy", "paraphrase", "neighborhood", "relation", "distract_neighborhood"),
        comparable="atlas: probability comparison, means per case",
        one_per_subject=True,
        cost="about 35 scored prompts and one text of 100 tokens",
    )


def atlas_cases(
    *,
    seed: int = 0,
    split: Literal["dev", "test"] = "test",
    world: World | None = None,
    format: Format | None = None,
    facts: Sequence[Fact] | None = None,
) -> CaseSet:
    """One case per fact of a split; the wrong object and the neighbours of each are drawn by ``seed`` and the fact's id.

    Args:
        seed: Draws targets and neighbours.
        split: ``test`` for figures, ``dev`` for tuning.
        world: The world; world 0 without it.
        format: The prompt format; the packaged one without it.
        facts: Only these, instead of the whole split.
    """
    from lab.atlas.forms import load_format
    from lab.atlas.world import load_world

    world = world or load_world()
    format = format or load_format()
    chosen = world.split(split) if facts is None else facts
    cases = [_case(fact, number, seed, world, format) for number, fact in enumerate(chosen, start=1)]
    return CaseSet("atlas", "atlas", f"atlas:{split}", tuple(cases))


def _case(fact: Fact, number: int, seed: int, world: World, format: Format) -> EditCase:
    draw = random.Random(f"{seed}/{fact.id}")
    target = world.counterfactual(fact, draw)
    plan = format.wordings_for(fact)
    prompt = fact.prompt or plan.trained[0]
    request = EditRequest(fact.id, prompt, fact.subject, target, fact.object)
    old = fact.object

    def stated(group: str, templates: Sequence[str]) -> list[CaseProbe]:
        return [
            CaseProbe(group, text.replace("{}", fact.subject), (target,), old)
            for text in templates
            if text != prompt
        ]

    probes = [CaseProbe("rewrite", request.text, (target,), old)]
    probes += stated("paraphrase", plan.held_out_pairs)
    probes += stated("paraphrase_trained", plan.trained)
    probes += stated("paraphrase_templates", plan.held_out_templates)
    question = format.relations[fact.relation].questions[0].replace("{}", fact.subject)
    probes.append(CaseProbe("qa", format.render("qa", question=question).prompt, (target,), old))
    probes += [
        _about(other, "neighborhood", target, kind) for kind, other in _neighbours(fact, target, world, draw)
    ]
    for other in world.same_subject(fact):
        if target not in other.answers:
            probes.append(_about(other, "relation", target, other.relation))
    meta = {"relation": fact.relation, "kind": fact.group}
    where = f"atlas:{fact.split or 'facts'}"
    return EditCase(fact.id, "atlas", (request,), tuple(probes), (fact.answers,), where, number, meta=meta)


def _about(fact: Fact, group: str, rival: str, kind: str) -> CaseProbe:
    return CaseProbe(group, fact.text, fact.answers, rival, kind)


def _neighbours(fact: Fact, target: str, world: World, draw: random.Random) -> list[tuple[str, Fact]]:
    # A neighbour whose true object is the new target cannot tell leaking from knowing.
    others = [other for other in world.neighbours(fact) if target not in other.answers]
    same = [other for other in others if other.object == fact.object]
    kind, pool = ("same_object", same) if same else ("other_object", others)
    return [(kind, other) for other in draw.sample(pool, min(_NEIGHBOURS, len(pool)))]
