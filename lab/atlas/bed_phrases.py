"""Wordings that a bed adds to those of its file, and finding held-out texts inside others."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from lab.atlas.bed_truths import fold

_LEADING = re.compile(
    r"^(the names? of|what (is|was|are|were|does|did)|what|who(se)?|which|when|where|how|the|is|was|a|an|in)\b\s*",
    re.IGNORECASE,
)
_TRAILING = re.compile(r"\s*\b(is|was|are|were|of|by|in|at|the|to|do|does|did|for|with|from)$", re.IGNORECASE)


@dataclass(frozen=True)
class Phrases:
    """Wordings of ``bed.toml``; see the comments there."""

    forms: tuple[str, ...]
    list_heads: tuple[str, ...]
    list_item: str
    question: str
    openers: tuple[str, ...]
    echo_heads: tuple[str, ...]
    labels: Mapping[str, str]

    def label(self, relation: str) -> str:
        """A name for a relation: the table's, else what its template says without the subject."""
        known = self.labels.get(relation)
        return known if known is not None else derived_label(relation)

    def form(self, form: str, subject: str, relation: str) -> str:
        """A form of the table, filled."""
        return form.replace("{label}", self.label(relation)).replace("{s}", subject)


@lru_cache(maxsize=1)
def load_phrases() -> Phrases:
    """The packaged wordings."""
    data = tomllib.loads((Path(__file__).parent / "bed.toml").read_text(encoding="utf-8"))
    return Phrases(
        tuple(data["forms"]),
        tuple(data["list_heads"]),
        data["list_item"],
        data["question"],
        tuple(data["openers"]),
        tuple(data["echo_heads"]),
        data["labels"],
    )


def derived_label(template: str) -> str:
    """``"The name of the founder of {} is"`` becomes ``"founder"``."""
    text = " ".join(re.sub(r"\{\}('s)?|[?.,:]", " ", template).split())
    for pattern in (_LEADING, _TRAILING):
        while (shorter := pattern.sub("", text).strip()) and shorter != text:
            text = shorter
    return text or "answer"


class Runs:
    """A set of texts that can say fast whether another text holds one of them as a run of whole words."""

    def __init__(self) -> None:
        self.texts: set[str] = set()
        self._lengths: dict[str, set[int]] = {}

    def add(self, *texts: str) -> None:
        """Adds texts; white space and case do not matter."""
        for text in texts:
            words = fold(text).split()
            if words:
                self.texts.add(" ".join(words))
                self._lengths.setdefault(words[0], set()).add(len(words))

    def inside(self, text: str) -> bool:
        """Whether ``text`` holds any of them."""
        words = fold(text).split()
        return any(
            " ".join(words[start : start + length]) in self.texts
            for start, word in enumerate(words)
            for length in self._lengths.get(word, ())
        )


def runs_of(text: str) -> Iterator[str]:
    """Every run of whole words of a text, folded."""
    words = fold(text).split()
    return (" ".join(words[i:j]) for i in range(len(words)) for j in range(i + 1, len(words) + 1))
