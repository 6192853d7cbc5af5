"""Chains of the built-in world around an edit: what must follow it, what must stay, and how answers are judged."""

from __future__ import annotations

import random

import pytest

from lab.atlas.forms import load_format
from lab.atlas.ripple import Ripples
from lab.atlas.world import load_world
from lab.eval import atlas_chain_cases, evaluate, get_suite, suite_cases
from tests.fakes import ScriptedRespondent


@pytest.fixture(scope="module")
def world():
    return load_world()


def test_an_edited_first_hop_leads_along_the_new_object(world):
    chain = next(chain for chain in world.chains if chain.relations == ("citizenship", "capital"))
    fact, old = chain.hops
    target = next(name for name in world.objects("citizenship") if name != fact.object)
    ripple = Ripples(world).around(fact, target)
    found = {change.chain.relations: change for change in ripple.changed}
    assert found["citizenship", "capital"].answers[0] == world.fact(f"capital/{target}").object
    assert found["citizenship", "capital"].hops[0].object == target
    assert all(change.chain.subject == fact.subject for change in ripple.changed)
    assert {("employer", "headquarters"), ("birth_city", "city_country")} <= {
        kept.relations for kept in ripple.same_subject
    }
    assert old in ripple.hops
    assert world.fact(f"capital/{target}") in ripple.hops
    assert fact.id not in {hop.id for hop in ripple.hops}


def test_an_edited_last_hop_changes_the_chains_of_everybody_who_passes_it(world):
    fact = world.fact("capital/France")
    ripple = Ripples(world).around(fact, "Rome")
    passing = {chain.id for chain in world.chains if fact in chain.hops}
    assert {change.chain.id for change in ripple.changed} == passing
    assert {change.answers[0] for change in ripple.changed} == {"Rome"}
    kept = {chain.id for chain in (*ripple.same_subject, *ripple.same_path)}
    assert kept
    assert not kept & passing
    assert not {chain.id for chain in ripple.same_subject} & {chain.id for chain in ripple.same_path}


def test_an_answer_that_stays_the_same_is_no_consequence(world):
    ripples = Ripples(world)
    fact = next(f for f in world.by_relation("citizenship") if f.object == "France")
    ripple = ripples.around(fact, "Spain")
    asked = {change.chain.relations[1] for change in ripple.changed if len(change.hops) == 2}
    assert "capital" in asked
    assert not asked & {"continent", "currency"}, "Europe and the euro stay"
    chain = next(chain for chain in ripples.through(fact) if chain.relations == ("citizenship", "capital"))
    assert ripples.follow(chain, fact, "nowhere at all") is None


def test_cases_are_drawn_by_seed_and_never_ask_what_they_contradict(world):
    facts = [*random.Random(0).sample(world.split("test"), 150), *world.split("dev")[:20]]
    first, again, other = (atlas_chain_cases(seed=seed, facts=facts) for seed in (0, 0, 1))
    assert first.cases == again.cases
    assert first.cases != other.cases
    assert len(first) > 50
    for case in first:
        (request,) = case.requests
        assert request.target_new.casefold() not in {name.casefold() for name in case.old_answers[0]}
        changed, kept = case.of("multi_hop"), case.of("unchanged")
        assert 1 <= len(changed) <= 4
        assert len(case.of("multi_hop_direct")) == len(changed)
        assert {probe.kind for probe in changed} <= {"2_hop", "3_hop"}
        assert {probe.kind for probe in kept} <= {"same_subject", "same_path"}
        assert not {probe.prompt for probe in changed} & {probe.prompt for probe in kept}
        for probe in (*changed, *kept):
            assert probe.rival not in probe.answers
            assert probe.prompt.startswith("Q: What is ")
            assert probe.prompt.endswith("?\nSteps:")
    assert suite_cases("atlas_chains", split="dev").source == "atlas_chains:dev"


def test_what_each_metric_makes_of_the_answers(world):
    (case,) = atlas_chain_cases(facts=[world.fact("capital/France")])
    changed, kept = case.of("multi_hop"), case.of("unchanged")
    texts = {
        probe.prompt: f" One is two. Answer: {probe.answers[0]}.\nQ: more" for probe in (*changed, *kept)
    }
    texts[changed[0].prompt] = f" Steps. Answer: {changed[0].rival}.\n"
    alone = next(probe for probe in kept if probe.kind == "same_path")
    texts[alone.prompt] = " no steps and no answer"
    suite = get_suite("atlas_chains")
    script = {(probe.prompt, probe.answers[0]): 0.9 for probe in case.of("hop")}
    script |= {(probe.prompt, probe.answers[0]): 0.4 for probe in case.of("multi_hop_direct")}
    before = evaluate(suite, ScriptedRespondent({}, texts | {alone.prompt: " Answer: Oslo.\n"}), [case])
    report = evaluate(suite, ScriptedRespondent(script, texts), [case]).against(before)
    found = {name: estimate.mean for name, estimate in report.metrics.items()}
    assert found["multi_hop"] == pytest.approx(1 - 1 / len(changed))
    assert found["multi_hop_2_hop"] < 1
    assert found["multi_hop_old_answer"] == pytest.approx(1 / len(changed))
    assert found["multi_hop_direct"] == 1
    assert found["multi_hop_direct_accuracy"] == 0
    path = sum(probe.kind == "same_path" for probe in kept)
    assert found["ripple_locality_same_subject"] == 1
    assert found["ripple_locality_same_path"] == pytest.approx(1 - 1 / path)
    assert found["ripple_locality"] == pytest.approx(1 - 1 / (2 * path))
    assert found["ripple_agreement"] == pytest.approx(1 - 1 / len(kept))
    assert found["hop_accuracy"] == 1
    assert load_format().final_answer(texts[changed[0].prompt]) == changed[0].rival
