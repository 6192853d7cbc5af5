"""Lessons for tests of editors that must be trained: capitals of a few countries."""

from __future__ import annotations

from editors.lessons import Lesson
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
