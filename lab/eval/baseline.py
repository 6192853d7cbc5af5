"""What models say as they are, kept so that it is asked once however many editors are tried on them."""

from __future__ import annotations

from collections.abc import Sequence

from lab.eval.probe import Observation, Probe, Rating, Respondent
from lab.handle import ModelHandle

_Text = tuple[str, str, int, bool, int | None, int, str]


class BaselineCache:
    """Answers of models as they are.

    A rating is kept by the handle's state, the prompt and the target, whichever case or suite asks; a text by what decides
    it. Whole distributions are too large to keep and are asked again.
    """

    def __init__(self) -> None:
        self._ratings: dict[tuple[str, str, str], Rating] = {}
        self._texts: dict[_Text, Observation] = {}

    def observe(
        self, handle: ModelHandle, respondent: Respondent, probes: Sequence[Probe]
    ) -> list[Observation]:
        """Answers all probes, in order; asks only for what is not kept."""
        state = handle.state
        large = [probe for probe in probes if probe.distribution]
        texts: dict[_Text, Probe] = {}
        targets: dict[str, dict[str, None]] = {}
        for probe in probes:
            if probe.task == "generate":
                if (key := _text_key(state, probe)) not in self._texts:
                    texts.setdefault(key, probe)
            elif not probe.distribution:
                for target in probe.targets:
                    if (state, probe.prompt, target) not in self._ratings:
                        targets.setdefault(probe.prompt, {})[target] = None
        questions = [Probe("", "", prompt, answers=tuple(named)) for prompt, named in targets.items()]
        wanted = [*questions, *texts.values(), *large]
        seen = iter(respondent.observe(wanted) if wanted else ())
        for question in questions:
            for target, rating in zip(question.targets, next(seen).ratings, strict=True):
                self._ratings[state, question.prompt, target] = rating
        for key in texts:
            self._texts[key] = next(seen)
        whole = iter(list(seen))
        return [next(whole) if probe.distribution else self._kept(state, probe) for probe in probes]

    def _kept(self, state: str, probe: Probe) -> Observation:
        if probe.task == "generate":
            text = self._texts[_text_key(state, probe)]
            return Observation(probe.id, text=text.text, text_tokens=text.text_tokens)
        ratings = (self._ratings[state, probe.prompt, target] for target in probe.targets)
        return Observation(probe.id, ratings=tuple(ratings))


def _text_key(state: str, probe: Probe) -> _Text:
    # Sampled texts differ from probe to probe; greedy ones follow from the prompt.
    name = "" if probe.top_k is None else probe.id
    return (state, probe.prompt, probe.tokens, probe.whole, probe.top_k, probe.seed, name)
