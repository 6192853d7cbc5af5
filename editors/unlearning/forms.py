"""The forms in which forgotten facts are asked for: a method that was shown one must lose the others too."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from lab.records import Fact
from lab.scoring import score_targets

if TYPE_CHECKING:
    from lab.handle import ModelHandle

Pairs = tuple[tuple[str, str], ...]
WORLD_FORMS = (
    "main_prompt",
    "held_out_pairs",
    "held_out_templates",
    "qa",
    "choice",
    "spelled",
    "attribute_list",
)
OWN_PROMPT = "prompt"
# Which options a fact is asked with, and in what order, is chance; over so many draws per fact little of it is left.
CHOICES = 4


def world_forms(facts: Sequence[Fact], *, seed: int = 0) -> dict[str, Pairs]:
    """Prompts and answers of the built-in world's facts, per form.

    ``main_prompt`` is what methods train on; the others are its rewordings (cloze), a question, a choice of four, letter by letter,
    a list of attributes, and ``true_false``, where the model recalls the object before it judges a false claim. ORT (arXiv
    2506.07795) asks for cloze, question, choice, true or false, and sub-token spelling.

    Args:
        facts: Trained or untrained facts of the world.
        seed: Draws options and claims.
    """
    from lab.atlas.forms import load_format
    from lab.atlas.probes import Probes
    from lab.atlas.world import load_world

    world, format = load_world(), load_format()
    probes, objects = Probes(world, format, seed), {fact.id: fact.object for fact in facts}
    draws = {"choice": [Probes(world, format, CHOICES * seed + draw) for draw in range(CHOICES)]}
    found: dict[str, Pairs] = {
        form: tuple(
            (probe.prompt, probe.answer)
            for maker in draws.get(form, [probes])
            for probe in maker.make(form, facts)
        )
        for form in WORLD_FORMS
    }
    false = format.strings["false"]
    # The claim is false, so the object is not in the prompt.
    found["true_false"] = tuple(
        (probe.prompt, objects[probe.fact_id])
        for probe in probes.make("true_false", facts)
        if probe.answer == false
    )
    return {form: pairs for form, pairs in found.items() if pairs}


def own_forms(facts: Sequence[Fact]) -> dict[str, Pairs]:
    """The one form of facts from a file: their own prompts."""
    return {OWN_PROMPT: tuple((fact.text, fact.object) for fact in facts)}


def form_probabilities(handle: ModelHandle, forms: Mapping[str, Pairs]) -> dict[str, float]:
    """Per form, the mean length-normalised probability of the answers."""
    rows = [pair for pairs in forms.values() for pair in pairs]
    scores = iter(score_targets(handle, rows))
    return {form: sum(next(scores).probability for _ in pairs) / len(pairs) for form, pairs in forms.items()}


def worst_form(found: Mapping[str, float], reference: Mapping[str, float]) -> tuple[str, float]:
    """The form in which a model knows the most beyond the reference, and by how much.

    Forms differ in what a model without the facts gets by guessing, so each is compared with the reference in the same form.
    """
    form = max(found, key=lambda name: found[name] - reference[name])
    return form, found[form] - reference[form]
