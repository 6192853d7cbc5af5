"""Multi-hop answers and ripple effects on the built-in world, whose chains are known in full.

An edit of "the home country of Ada Vane" must change the answer to "the capital of the home country of Ada Vane", and must
leave the headquarters of her employer, and other people's capitals, as they are. MQuAKE (Zhong et al., 2023) asks the first;
the second is the ripple that Cohen et al. (2024, arXiv 2307.12976) describe.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Hashable, Sequence
from typing import TYPE_CHECKING, Literal, TypeVar

from lab.data.cases import CaseProbe, CaseSet, EditCase
from lab.eval import scorers as s
from lab.eval.probe import Observation, Probe
from lab.eval.suite import PromptMeasure, Suite, scored_group, written
from lab.eval.suites import FLUENCY, SuiteOptions, compared, flat_by_kind
from lab.records import EditRequest, Fact

if TYPE_CHECKING:
    from lab.atlas.forms import Format
    from lab.atlas.ripple import Ripple, Ripples
    from lab.atlas.world import Chain, World

Item = TypeVar("Item")

# Questions of each kind at most; a capital is on the chains of hundreds of people.
_ASKED = 4
# Three statements and the answer, in tokens of a small vocabulary.
_TOKENS = 72


def atlas_chains(options: SuiteOptions) -> Suite:
    """Two- and three-hop questions around an edit; means per case, then over cases.

    - ``multi_hop``: the answer must follow the edit, and the continuation of the step-by-step form ends in the new answer;
      ``multi_hop_2_hop`` and ``multi_hop_3_hop`` apart. ``multi_hop_old_answer``: it still ends in the old one.
      ``multi_hop_direct``: asked without steps, the new answer is more probable than the old (``_accuracy``: argmax).
    - ``ripple_locality``: the answer must not follow the edit, and the step-by-step form ends in the true answer; mean over
      ``same_subject`` (the chain starts at the same subject) and ``same_path`` (the same relations, another subject).
      ``ripple_agreement``: it ends in what the model said before, right or wrong. ``ripple_direct``: the true answer is more
      probable than the one that the edit brings.
    - ``hop_accuracy``: the other facts on the changed chains, before and after, are still the greedy answer.
    """

    def probes(case: EditCase) -> tuple[Probe, ...]:
        asked = scored_group(case, "rewrite", "multi_hop_direct", "unchanged_direct", "hop")
        for group in ("multi_hop", "unchanged"):
            for number, probe in enumerate(case.of(group)):
                asked.append(
                    Probe(
                        f"{group}/{number}",
                        group,
                        probe.prompt,
                        "generate",
                        answers=probe.answers,
                        rival=probe.rival,
                        kind=probe.kind,
                        tokens=_TOKENS,
                    )
                )
        if options.fluency:
            prompts = [request.text for request in case.requests]
            asked += written(case, "generation", tokens=options.text_tokens, top_k=5, prompts=prompts)
        return tuple(asked)

    return Suite(
        name="atlas_chains",
        about="Atlas: what must follow an edit over two and three hops, and what must not",
        probes=probes,
        measures=(
            *compared("efficacy", "rewrite"),
            flat_by_kind("multi_hop", "multi_hop", says_new),
            PromptMeasure("multi_hop_old_answer", "multi_hop", says_old),
            PromptMeasure("multi_hop_direct", "multi_hop_direct", s.success),
            PromptMeasure("multi_hop_direct_accuracy", "multi_hop_direct", s.any_accuracy),
            PromptMeasure("ripple_locality", "unchanged", says_new, by_kind=True),
            PromptMeasure("ripple_agreement", "unchanged", says_the_same),
            PromptMeasure("ripple_direct", "unchanged_direct", s.success),
            PromptMeasure("ripple_direct_accuracy", "unchanged_direct", s.any_accuracy),
            PromptMeasure("hop_accuracy", "hop", s.any_accuracy),
            FLUENCY,
        ),
        comparable="atlas_chains: step-by-step continuation, means per case",
        one_per_subject=True,
        paper="asked as in Zhong et al. 2023, arXiv 2305.14795; ripples: Cohen et al. 2024, arXiv 2307.12976",
        cost="about 12 short answers and 20 scored prompts",
    )


def says_new(probe: Probe, seen: Observation, before: Observation | None = None) -> float | None:
    """1 where the continuation ends in the probe's answer or an alias, notes and steps before it aside."""
    return float(s.starts_with_answer(_final(seen), probe.answers)) if probe.answers else None


def says_old(probe: Probe, seen: Observation, before: Observation | None = None) -> float | None:
    """1 where the continuation ends in the probe's rival."""
    return float(s.starts_with_answer(_final(seen), (probe.rival,))) if probe.rival else None


def says_the_same(probe: Probe, seen: Observation, before: Observation | None = None) -> float | None:
    """1 where the continuation ends as the model's did before; unscored without a ``before``."""
    return None if before is None else float(s.exact_match(_final(seen), (_final(before),)))


def _final(seen: Observation) -> str:
    from lab.atlas.forms import load_format

    return load_format().final_answer(seen.text)


def atlas_chain_cases(
    *,
    seed: int = 0,
    split: Literal["dev", "test"] = "test",
    world: World | None = None,
    format: Format | None = None,
    facts: Sequence[Fact] | None = None,
) -> CaseSet:
    """One case per fact of a split that some chain passes, with a wrong object that changes the answer of at least one.

    Args:
        seed: Draws targets and questions.
        split: ``test`` for figures, ``dev`` for tuning; of the edited fact and of the chains' subjects.
        world: The world; world 0 without it.
        format: The prompt format; the packaged one without it.
        facts: Only these, instead of the whole split.
    """
    from lab.atlas.forms import load_format
    from lab.atlas.ripple import Ripples
    from lab.atlas.world import load_world

    world = world or load_world()
    format = format or load_format()
    ripples = Ripples(world, split)
    cases = []
    for fact in world.split(split) if facts is None else facts:
        if ripples.through(fact):
            draw = random.Random(f"{seed}/chains/{fact.id}")
            found = _target(fact, ripples, draw)
            if found is not None:
                cases.append(_case(fact, *found, len(cases) + 1, format, draw))
    return CaseSet("atlas_chains", "atlas_chains", f"atlas_chains:{split}", tuple(cases))


def _target(fact: Fact, ripples: Ripples, draw: random.Random) -> tuple[str, Ripple] | None:
    """The first of the relation's other objects, in seeded order, that changes a chain."""
    right = {answer.casefold() for answer in fact.answers}
    pool = [name for name in ripples.world.objects(fact.relation) if name.casefold() not in right]
    draw.shuffle(pool)
    for target in pool:
        ripple = ripples.around(fact, target)
        if ripple.changed:
            return target, ripple
    return None


def _case(
    fact: Fact, target: str, ripple: Ripple, number: int, format: Format, draw: random.Random
) -> EditCase:
    request = EditRequest(fact.id, fact.prompt, fact.subject, target, fact.object)
    probes = [CaseProbe("rewrite", request.text, (target,), fact.object)]
    changed = _spread(ripple.changed, lambda found: found.chain.relations, draw)
    for found in changed:
        kind = f"{len(found.hops)}_hop"
        probes += _questions(found.chain, format, "multi_hop", found.answers, found.chain.answer, kind)
    new = changed[0].answers
    chosen = {found.chain.answer for found in changed}
    # What had the changed answer before tells leaking from knowing best, so it is asked first.
    alike = sorted(ripple.same_path, key=lambda chain: (chain.answer not in chosen, draw.random()))[:_ASKED]
    for kind, chains in (
        ("same_subject", _spread(ripple.same_subject, lambda chain: chain.relations, draw)),
        ("same_path", alike),
    ):
        for chain in chains:
            rival = next((answer for answer in (new[0], target) if answer not in chain.answers), "")
            probes += _questions(chain, format, "unchanged", chain.answers, rival, kind)
    for hop in _spread(ripple.hops, lambda hop: hop.relation, draw):
        probes.append(CaseProbe("hop", hop.text, hop.answers, kind=hop.relation))
    where = f"atlas:{fact.split or 'facts'}"
    meta = {"relation": fact.relation, "kind": fact.group}
    return EditCase(
        fact.id, "atlas_chains", (request,), tuple(probes), (fact.answers,), where, number, meta=meta
    )


def _questions(
    chain: Chain, format: Format, group: str, answers: tuple[str, ...], rival: str, kind: str
) -> list[CaseProbe]:
    """The question of a chain in the step-by-step form and asked at once."""
    from lab.atlas.material import chain_noun

    question = f"What is {chain_noun(format, chain)}?"
    form = "two_hop_steps" if len(chain.hops) == 2 else "three_hop_steps"
    steps = format.render(form, question=question).prompt
    direct = format.render("two_hop_direct", question=question).prompt
    return [
        CaseProbe(group, steps, answers, rival, kind),
        CaseProbe(f"{group}_direct", direct, answers, rival, kind),
    ]


def _spread(items: Sequence[Item], key: Callable[[Item], Hashable], draw: random.Random) -> list[Item]:
    """Some items in random order, as many different keys among them as there are."""
    groups: dict[Hashable, list[Item]] = {}
    for item in draw.sample(list(items), len(items)):
        groups.setdefault(key(item), []).append(item)
    turns = [item for turn in range(_ASKED) for group in groups.values() for item in group[turn : turn + 1]]
    return turns[:_ASKED]
