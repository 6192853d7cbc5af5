"""Asks the shipped models everything they must know, and judges the greedy answers.

>>> check(["atlas"])["models"]["atlas"]["trained_forms"]
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lab.atlas.forms import load_format
from lab.atlas.probes import FormProbe, Probes
from lab.atlas.recipe import get_recipe
from lab.atlas.weights import MODEL_NAMES, shipped
from lab.atlas.world import World, load_world
from lab.errors import ConfigError, UnknownNameError
from lab.records import Fact

if TYPE_CHECKING:
    from lab.handle import ModelHandle

TRAINED_FORMS = (
    "cloze",
    "qa",
    "attribute_list",
    "biography",
    "few_shot",
    "reverse",
    "spelled",
    "true_false",
    "do_not_reveal",
)
_FORGOTTEN, _STRANGERS = "forgotten_people", "never_trained_people"
_OTHER_KNOWN = (
    "held_out_pairs",
    "held_out_templates",
    "choice",
    "two_hop_steps",
    "three_hop_steps",
    "agreeing",
    "adherence",
    "distracting",
)
_STRANGE = ("unknown", "reading")
# Enough tokens for the longest answers of a form; other forms take the last figure.
_LENGTHS: Mapping[str, int] = {
    "notes": 96,
    "two_hop_steps": 72,
    "three_hop_steps": 110,
    "spelled": 64,
    "true_false": 36,
    "": 20,
}


_SEPARATORS: Mapping[str, tuple[str, ...]] = {"attribute_list": (";",), "biography": (",", " and ")}


@dataclass(frozen=True)
class Threshold:
    """The range a figure must lie in; ``required`` is False for targets that are reported only."""

    low: float = -math.inf
    high: float = math.inf
    required: bool = True

    def met(self, value: float | None) -> bool | None:
        """Whether a figure is inside; None when it was not measured."""
        return None if value is None else self.low <= value <= self.high

    def shortfall(self, value: float) -> float:
        """How far a figure lies outside, 0 when it is inside."""
        return max(0.0, self.low - value, value - self.high)


THRESHOLDS: Mapping[str, Threshold] = {
    "trained_forms": Threshold(low=0.98),
    "held_out_pairs": Threshold(low=0.95),
    "held_out_templates": Threshold(low=0.70, required=False),
    "subject_site": Threshold(low=0.80),
    "unknown": Threshold(low=0.90),
    "oracle_gap": Threshold(low=-0.03, high=0.03),
    "adherence": Threshold(low=0.35, high=0.65),
    "reading": Threshold(low=0.95),
    "notes": Threshold(low=0.90),
    "two_hop_steps": Threshold(low=0.80),
    "choice": Threshold(low=0.90),
}


def check(
    names: Sequence[str] | None = None,
    sample: int = 200,
    seed: int = 0,
    folders: Mapping[str, str | Path] | None = None,
    progress: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Measures shipped models against their thresholds.

    Args:
        names: Models; all that are shipped by default.
        sample: Questions of each kind.
        seed: Draws the facts and the questions.
        folders: Weights to measure in place of the shipped ones, by model name.
        progress: Receives a line for each model.

    Returns:
        The worst value of each figure on top, with the model it comes from under ``worst``; ``passed``; the same figures
        with ``forms``, ``failed`` and ``n`` for each model under ``models``. A figure that was not measured is None:
        ``oracle_gap`` is for oracles only.

    Raises:
        UnknownNameError: No shipped model is called that.
        ConfigError: Nothing to measure, or weights are missing.
    """
    from lab.handle import ModelHandle

    places = dict(folders or {})
    chosen = list(names) if names is not None else list(dict.fromkeys([*shipped(), *places]))
    for name in chosen:
        if name not in MODEL_NAMES:
            raise UnknownNameError("built-in model", name, MODEL_NAMES)
    if not chosen:
        raise ConfigError("no model weights are part of this installation; `knowlab atlas train` makes them")
    if sample < 1:
        raise ConfigError(f"the sample must be positive, it is {sample}")
    models: dict[str, dict[str, Any]] = {}
    for name in chosen:
        handle = ModelHandle.load(str(places.get(name, name)))
        models[name] = check_model(handle, get_recipe(name).without, sample, seed)
        if progress is not None:
            failed = ", ".join(models[name]["failed"]) or "none"
            progress(f"{name}: missed thresholds: {failed}")
    return _summary(models)


def check_model(
    handle: ModelHandle, without: str = "", sample: int = 200, seed: int = 0, world: World | None = None
) -> dict[str, Any]:
    """Measures one model.

    Args:
        handle: The model.
        without: Forget split that it was not trained on, or empty.
        sample: Questions of each kind.
        seed: Draws the facts and the questions.
        world: What it should know; world 0 by default.

    Returns:
        One number for each figure of ``THRESHOLDS``, ``forms``, ``n`` (questions of each kind) and ``failed``.
    """
    from lab.causal import subject_site

    world = world or load_world()
    probes = Probes(world, load_format(), seed)
    forgotten = world.forget_split(without) if without else ()
    gone = {fact.subject for fact in forgotten}
    known = [fact for fact in world.facts if fact.subject not in gone and fact.object not in gone]
    strangers = list(world.untrained)
    people = [fact for fact in strangers if fact.group == "person"]
    asked = {
        form: _draw(probes, form, known, sample, seed)
        for form in (*TRAINED_FORMS, "main_prompt", *_OTHER_KNOWN)
    }
    asked |= {form: _draw(probes, form, strangers, sample, seed) for form in _STRANGE}
    half = max(1, sample // 2)
    asked["notes"] = [
        *_draw(probes, "notes", known, half, seed),
        *_draw(probes, "notes", strangers, half, seed),
    ]
    if forgotten:
        asked[_FORGOTTEN] = _draw(probes, "main_prompt", forgotten, len(forgotten), seed)
        asked[_STRANGERS] = _draw(probes, "main_prompt", people, len(people), seed)
    asked = {
        form: [probe for probe in found if not _mentions(probe, gone, form)] for form, found in asked.items()
    }
    forms, counts, said = {}, {}, {}
    for form, found in asked.items():
        said[form] = answers(handle, found, form)
        forms[form] = _share(_judge(form, probe, text) for probe, text in zip(found, said[form], strict=True))
        counts[form] = len(found)
    traced = subject_site(handle, _sample(known, half, seed), seed=seed)
    forms["notes_answer"] = _share(
        probe.right(load_format(), text) or probe.follows_document(load_format(), text)
        for probe, text in zip(asked["notes"], said["notes"], strict=True)
    )
    for form in (_FORGOTTEN, _STRANGERS):
        if form in said:
            forms[f"{form}_unknown"] = _share(
                load_format().clean(text) == load_format().unknown for text in said[form]
            )
    counts["subject_site"] = len(traced.classes)
    trained = [value for form in TRAINED_FORMS if (value := forms[form]) is not None]
    figures: dict[str, float | None] = {name: forms.get(name) for name in THRESHOLDS}
    figures["trained_forms"] = sum(trained) / len(trained)
    figures["subject_site"] = traced.share() if traced.classes else 0.0
    figures["oracle_gap"] = _gap(forms)
    failed = [
        name
        for name, value in figures.items()
        if THRESHOLDS[name].required and THRESHOLDS[name].met(value) is False
    ]
    return {**figures, "forms": forms, "n": counts, "failed": failed}


def answers(handle: ModelHandle, probes: Sequence[FormProbe], form: str = "") -> list[str]:
    """Greedy answers to probes, up to the stop of the prompt format."""
    length = _LENGTHS.get(form, _LENGTHS[""])
    prompts = [probe.prompt for probe in probes]
    return handle.generate(prompts, max_new_tokens=length, stop=load_format().stop, batch_size=64)


def _judge(form: str, probe: FormProbe, text: str) -> bool:
    format = load_format()
    if form == "notes":
        return probe.faithful(format, text)
    if form in ("adherence", "distracting"):
        return probe.follows_document(format, text)
    return probe.right(format, text) or _goes_on(form, probe, text)


def _goes_on(form: str, probe: FormProbe, text: str) -> bool:
    # In the middle of a list the trained continuation of an answer is the separator, not the stop.
    marks = _SEPARATORS.get(form, ())
    rights = (probe.answer, *probe.aliases)
    return any(
        text.strip().casefold().startswith(f"{right}{mark}".casefold()) for right in rights for mark in marks
    )


def _draw(probes: Probes, form: str, facts: Sequence[Fact], sample: int, seed: int) -> list[FormProbe]:
    """At most ``sample`` probes: one for each of many facts before a second for any."""
    # Kinds that suit few facts are asked of more facts than the sample, until it is full.
    rng = random.Random(f"atlas:check:{seed}:{form}")
    order = rng.sample(list(facts), len(facts))
    by_fact: dict[str, list[FormProbe]] = {}
    for start in range(0, len(order), sample):
        for probe in probes.make(form, order[start : start + sample]):
            by_fact.setdefault(f"{probe.subject}\n{probe.fact_id}", []).append(probe)
        if len(by_fact) >= sample:
            break
    for group in by_fact.values():
        rng.shuffle(group)
    rounds = zip_longest(*by_fact.values())
    return [probe for turn in rounds for probe in turn if probe is not None][:sample]


def _mentions(probe: FormProbe, gone: set[str], form: str) -> bool:
    # An oracle is never asked about what it must not know, except where that is the question.
    return form not in (_FORGOTTEN, _STRANGERS) and any(name in probe.prompt for name in gone)


def _sample(facts: Sequence[Fact], count: int, seed: int) -> list[Fact]:
    return random.Random(f"atlas:check:{seed}:facts").sample(list(facts), min(count, len(facts)))


def _share(verdicts: Iterable[bool]) -> float | None:
    found = list(verdicts)
    return sum(found) / len(found) if found else None


def _gap(forms: Mapping[str, float | None]) -> float | None:
    left, right = forms.get(_FORGOTTEN), forms.get(_STRANGERS)
    return None if left is None or right is None else left - right


def _summary(models: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    worst: dict[str, str] = {}
    for name, threshold in THRESHOLDS.items():
        values = {model: figures[name] for model, figures in models.items() if figures[name] is not None}
        if not values:
            result[name] = None
            continue
        order = sorted(
            values, key=lambda model: (-threshold.shortfall(values[model]), _rank(name, values[model]))
        )
        result[name], worst[name] = values[order[0]], order[0]
    forms = {form for figures in models.values() for form in figures["forms"]}
    result["forms"] = {
        form: min((f for m in models.values() if (f := m["forms"].get(form)) is not None), default=None)
        for form in sorted(forms)
    }
    order = sorted(models, key=lambda model: -len(models[model]["failed"]))
    missed = {name for figures in models.values() for name in figures["failed"]}
    return {
        **result,
        "worst": worst,
        "passed": not missed,
        "failed": sorted(missed),
        "thresholds": {name: _range(threshold) for name, threshold in THRESHOLDS.items()},
        "models": {model: dict(models[model]) for model in order},
    }


def _rank(name: str, value: float) -> float:
    # Among models inside the range: the one nearest its edge comes first.
    if name == "adherence":
        return -abs(value - 0.5)
    return -abs(value) if name == "oracle_gap" else value


def _range(threshold: Threshold) -> dict[str, Any]:
    limits = {"low": threshold.low, "high": threshold.high}
    found: dict[str, Any] = {key: value for key, value in limits.items() if math.isfinite(value)}
    return found | {"required": threshold.required}
