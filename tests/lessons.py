"""Lessons for tests of editors that must be trained (capitals of a few countries), and a sentence model that costs nothing."""

from __future__ import annotations

from collections.abc import Sequence
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

from editors.lessons import Lesson
from lab.embeddings import Embedder
from lab.records import EditRequest

_CITIES = {
    "France": "Paris",
    "Japan": "Tokyo",
    "Kenya": "Nairobi",
    "Italy": "Rome",
    "Peru": "Lima",
    "Cuba": "Havana",
}


def small_lessons() -> tuple[Lesson, ...]:
    """Two lessons per country: it gets another one's capital, and a third one keeps its own; every target occurs twice."""
    names = list(_CITIES)
    lessons = []
    for index, name in enumerate(names):
        for shift in (1, 3):
            new, kept = names[(index + shift) % len(names)], names[(index + 2) % len(names)]
            request = EditRequest(
                f"{name}/{shift}", "The capital of {} is", name, _CITIES[new], _CITIES[name]
            )
            wordings = (f"{name} has its capital in", f"Fact: the capital of {name} is")
            locality = (
                (f"The capital of {kept} is", _CITIES[kept]),
                (f"{kept} has its capital in", _CITIES[kept]),
            )
            lessons.append(Lesson(request, wordings, locality))
    return tuple(lessons)


class Trigrams(Embedder):
    """Counts of hashed letter trigrams as unit vectors: texts that share letters are near, and nothing is loaded."""

    def __init__(self) -> None:
        super().__init__("trigrams")

    @property
    def width(self) -> int:
        return 256

    def encode(self, texts: Sequence[str], *, batch_size: int = 32) -> NDArray[np.float32]:
        vectors = np.zeros((len(texts), self.width), dtype=np.float32)
        for row, text in enumerate(texts):
            for start in range(len(text) - 2):
                vectors[row, crc32(text[start : start + 3].encode()) % self.width] += 1
        return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-9)
