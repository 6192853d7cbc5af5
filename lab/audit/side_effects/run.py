"""All side effects of one patch, measured before and after on one model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from lab.attention import attention_drift
from lab.audit.knowledge import candidates
from lab.audit.side_effects import ability, answers, priming, reasoning
from lab.errors import ConfigError, UnknownNameError
from lab.memory import MemoryPatch
from lab.patch import Patch, WeightPatch

if TYPE_CHECKING:
    from lab.atlas.forms import Format
    from lab.handle import ModelHandle
    from lab.records import Fact

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Ground:
    """What side effects are measured on.

    Attributes:
        forgotten: The facts that the patch is about.
        retained: Facts that should be as before.
        unanswerable: Facts that no model was trained on: there is no answer to their questions.
        texts: General text.
        format: The prompt format that the model was trained on; ``None`` for foreign models.
        implied: Facts that follow from what was changed without being part of it; their objects should follow too, or stay away.
        seed: Draws candidates.
    """

    forgotten: tuple[Fact, ...] = ()
    retained: tuple[Fact, ...] = ()
    unanswerable: tuple[Fact, ...] = ()
    texts: tuple[str, ...] = ()
    format: Format | None = None
    implied: tuple[Fact, ...] = ()
    seed: int = 0

    def prompt(self, fact: Fact) -> str:
        """The prompt of a fact, ending without a blank."""
        return fact.text if self.format is None else self.format.render("cloze", cloze=fact.text).prompt

    @property
    def stop(self) -> tuple[str, ...]:
        """What ends a reply."""
        return ("\n",) if self.format is None else self.format.stop


def side_effects(
    handle: ModelHandle,
    patch: Patch,
    ground: Ground,
    measures: Sequence[str] | None = None,
    *,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measures what a patch damages.

    Args:
        handle: The model without the patch; bit-identical afterwards.
        patch: Any patch.
        ground: What to measure on.
        measures: Names of ``MEASURES``; all that the ground allows without it.
        progress: Told how many measures are done.

    Returns:
        Measure to its numbers; one that has nothing to measure on says so under ``"skipped"``.

    Raises:
        UnknownNameError: There is no such measure.
        ConfigError: A measure that was named has nothing to measure on.
    """
    wanted = tuple(measures) if measures is not None else tuple(MEASURES)
    for name in wanted:
        if name not in MEASURES:
            raise UnknownNameError("side effect", name, MEASURES)
    found: dict[str, Any] = {}
    for done, name in enumerate(wanted):
        if progress is not None:
            progress("side effects", done, len(wanted))
        needs, measure = MEASURES[name]
        if missing := [need for need in needs if not getattr(ground, need)]:
            reason = f"{name} needs {' and '.join(missing)}; there is none"
            if measures is not None:
                raise ConfigError(reason)
            found[name] = {"skipped": reason}
            continue
        found[name] = measure(handle, patch, ground)
    if progress is not None:
        progress("side effects", len(wanted), len(wanted))
    return found


def _both(handle: ModelHandle, patch: Patch, look: Callable[[], Any]) -> tuple[Any, Any]:
    with handle.writing():
        before = look()
        with patch.applied(handle):
            return before, look()


def _replies(
    handle: ModelHandle, ground: Ground, facts: Sequence[Fact], *, answerable: bool
) -> list[answers.Reply]:
    phrases = answers.REFUSALS
    if ground.format is not None:
        phrases = (*phrases, ground.format.unknown, ground.format.refusal)
    right = [fact.answers if answerable else () for fact in facts]
    prompts = [ground.prompt(fact) for fact in facts]
    return answers.replies(handle, prompts, right, phrases=phrases, stop=ground.stop)


def _suppression(handle: ModelHandle, patch: Patch, ground: Ground) -> dict[str, Any]:
    before, after = _both(handle, patch, lambda: answers.fact_scores(handle, ground.retained, ground.prompt))
    return answers.suppression(before, after, answers.groups_of(ground.retained, ground.forgotten))


def _refusal(handle: ModelHandle, patch: Patch, ground: Ground) -> dict[str, Any]:
    before, after = _both(handle, patch, lambda: _replies(handle, ground, ground.retained, answerable=True))
    return answers.refusal_change(before, after)


def _ignorance(handle: ModelHandle, patch: Patch, ground: Ground) -> dict[str, Any]:
    pairs = answers.twins_of(ground.unanswerable, ground.retained)
    # Without a twin of their relation, questions are asked alone.
    lone = [fact for fact, _ in pairs] or list(ground.unanswerable)

    def look() -> dict[str, Any]:
        asked = _replies(handle, ground, lone, answerable=False)
        twins = _replies(handle, ground, [twin for _, twin in pairs], answerable=True) if pairs else []
        found = answers.admitted_ignorance(asked, twins)
        if ground.forgotten:
            found["forgotten_refused"] = answers.compare_groups(
                {"forgotten": _replies(handle, ground, ground.forgotten, answerable=True)}
            )["forgotten"]
        return found

    before, after = _both(handle, patch, look)
    return {"questions": len(lone), "twins": len(pairs), "before": before, "after": after}


def _calibration(handle: ModelHandle, patch: Patch, ground: Ground) -> dict[str, Any]:
    questions = candidates(ground.retained, ground.forgotten, count=3, seed=ground.seed, ask=ground.prompt)
    if not questions:
        return {"skipped": "no retained fact has a rival of its relation to choose from"}
    before, after = _both(handle, patch, lambda: ability.choose(handle, questions))
    return {"before": ability.calibration(before), "after": ability.calibration(after)}


def _ability(handle: ModelHandle, patch: Patch, ground: Ground) -> dict[str, Any]:
    questions = candidates(ground.retained, ground.forgotten, count=3, seed=ground.seed, ask=ground.prompt)

    def look() -> tuple[list[tuple[float, int]], list[ability.Choice]]:
        return ability.text_losses(handle, ground.texts), ability.choose(handle, questions)

    before, after = _both(handle, patch, look)
    return ability.ability_change(before[0], after[0], before[1], after[1])


def _drift(handle: ModelHandle, patch: Patch, ground: Ground) -> dict[str, Any]:
    if not isinstance(patch, (WeightPatch, MemoryPatch)):
        return {
            "skipped": f"attention drift is measured for patches of weights and memories, not {type(patch).__name__}"
        }
    found = {}
    for name, facts in (("forgotten", ground.forgotten), ("retained", ground.retained)):
        if facts:
            report = attention_drift(
                handle, patch, [fact.prompt for fact in facts], [fact.subject for fact in facts]
            ).to_json()
            found[name] = {"max_head_drift": report["max_head_drift"], "prompts": report["prompts"]}
    return found


def _priming(handle: ModelHandle, patch: Patch, ground: Ground) -> dict[str, Any]:
    texts = priming.texts_of(ground.forgotten, ground.retained)
    if not texts:
        return {
            "skipped": "no retained fact shares a relation with a changed one, so there is no related beginning"
        }
    return priming.summary(priming.priming(handle, patch, texts))


def _reasoning(handle: ModelHandle, patch: Patch, ground: Ground) -> dict[str, Any]:
    pool = (*ground.retained, *ground.forgotten)
    questions = candidates(ground.implied, pool, seed=ground.seed, ask=ground.prompt)
    if not questions:
        return {"skipped": "no implied fact has a rival of its relation to be ranked among"}
    asked = [
        reasoning.Implication(each.fact.id or each.fact.text, each.prompt, each.fact.object, each.wrong)
        for each in questions
    ]
    return reasoning.reasoning(handle, patch, asked)


Measure = Callable[["ModelHandle", Patch, Ground], dict[str, Any]]

MEASURES: Mapping[str, tuple[tuple[str, ...], Measure]] = MappingProxyType(
    {
        "suppression": (("retained", "forgotten"), _suppression),
        "refusal": (("retained",), _refusal),
        "ignorance": (("unanswerable",), _ignorance),
        "calibration": (("retained",), _calibration),
        "ability": (("texts",), _ability),
        "drift": (("forgotten",), _drift),
        "priming": (("forgotten", "retained"), _priming),
        "reasoning": (("implied",), _reasoning),
    }
)
"""Name to what of the ground it needs, and the measure."""
