"""Stand-ins for a model: answers from a script, so that suites, scorers and reports are tested without one."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from lab.eval.probe import Observation, Probe, Rating


def rating(
    probability: float = 0.5,
    *,
    correct: Sequence[bool] = (True,),
    predicted: Sequence[int] = (1,),
    distribution: np.ndarray | None = None,
) -> Rating:
    """A rating whose length-normalised probability is ``probability`` at every token."""
    return Rating((math.log(probability),) * len(correct), tuple(correct), tuple(predicted), distribution)


def observed(*ratings: Rating, id: str = "", text: str = "", tokens: Sequence[int] = ()) -> Observation:
    """An observation with these ratings, or with a text."""
    return Observation(id, ratings, text, tuple(tokens))


class ScriptedRespondent:
    """Answers from a table or a function, and remembers what it was asked.

    Args:
        script: From prompt and target to a probability (or a ``Rating``); a function of both, or a table by ``(prompt, target)``
            where what is missing has probability 0.1 and is not the greedy answer.
        texts: From prompt to continuation; what is missing continues with nothing.
    """

    def __init__(
        self,
        script: Mapping[tuple[str, str], float | Rating] | Callable[[str, str], float | Rating] | None = None,
        texts: Mapping[str, str] | None = None,
    ) -> None:
        self._script = script or {}
        self._texts = texts or {}
        self.asked: list[Probe] = []

    def _rate(self, prompt: str, target: str) -> Rating:
        found = (
            self._script(prompt, target)
            if callable(self._script)
            else self._script.get((prompt, target), 0.1)
        )
        if isinstance(found, Rating):
            return found
        # The greedy token of the fake is its target exactly where that has more than half of the mass.
        sure = found > 0.5
        return rating(found, correct=(sure,), predicted=(hash(target) if sure else -1,))

    def observe(self, probes: Sequence[Probe]) -> list[Observation]:
        """Answers all probes, in order."""
        self.asked += probes
        found = []
        for probe in probes:
            if probe.task == "generate":
                text = self._texts.get(probe.prompt, "")
                found.append(Observation(probe.id, text=text, text_tokens=tuple(map(len, text.split()))))
            else:
                ratings = tuple(self._rate(probe.prompt, target) for target in probe.targets)
                found.append(Observation(probe.id, ratings=ratings))
        return found


class WordEmbedder:
    """Stands in for ``lab.embeddings.Embedder``: texts that share words are near, and nothing is loaded."""

    width = 64

    def __init__(self, name: str = "words", **_options: object) -> None:
        self.name = str(name)

    def encode(self, texts: Sequence[str], **_options: object) -> np.ndarray:
        """``[text, width]`` fp32, unit vectors."""
        found = np.zeros((len(texts), self.width), dtype=np.float32)
        for row, text in enumerate(texts):
            for word in text.casefold().replace(".", " ").split():
                found[row, zlib.crc32(word.encode()) % self.width] += 1.0
        return found / np.maximum(np.linalg.norm(found, axis=1, keepdims=True), 1e-9)
