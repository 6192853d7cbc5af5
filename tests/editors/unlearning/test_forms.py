"""The forms in which forgotten facts are asked for."""

from __future__ import annotations

from editors.unlearning.forms import CHOICES, WORLD_FORMS, world_forms
from lab.atlas.world import load_world


def test_every_fact_is_asked_with_several_draws_of_options() -> None:
    facts = load_world().forget_split("people01")
    forms = world_forms(facts, seed=3)
    assert set(forms) == {*WORLD_FORMS, "true_false"}
    choices = forms["choice"]
    assert len(choices) == CHOICES * len(facts)
    by_fact = [choices[place :: len(facts)] for place in range(len(facts))]
    # Other options or another order, and the right answer not always at one place.
    assert all(len({prompt for prompt, _ in draws}) > 1 for draws in by_fact)
    assert len({answer for _, answer in choices}) > 1
    assert world_forms(facts, seed=3) == forms
    assert world_forms(facts, seed=4)["choice"] != choices


def test_no_draw_of_one_seed_is_that_of_another() -> None:
    facts = load_world().forget_split("people01")
    prompts = [{prompt for prompt, _ in world_forms(facts, seed=seed)["choice"]} for seed in range(3)]
    assert all(len(a & b) < len(facts) / 2 for a, b in ((prompts[0], prompts[1]), (prompts[1], prompts[2])))
