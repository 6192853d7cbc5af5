"""Whether a text gives an answer, and whether two answers are the same one."""

from __future__ import annotations

import re
from collections.abc import Iterable

from lab.data.text import normalize_answer

_UNSPACED = re.compile(r"[぀-ヿ㐀-鿿가-힣]")


def spaced(text: str) -> bool:
    """Whether a text is of a script that sets blanks between words."""
    return _UNSPACED.search(text) is None


def says(text: str, answers: Iterable[str]) -> bool:
    """Whether ``text`` holds one of ``answers``, as whole words where the script has words (SQuAD's normalisation)."""
    said = normalize_answer(text)
    return any(_holds(said, normalize_answer(answer)) for answer in answers)


def same(first: str, second: str) -> bool:
    """Whether two answers cannot count as different: equal, or one holds the other."""
    one, two = normalize_answer(first), normalize_answer(second)
    return _holds(one, two) or _holds(two, one)


def same_as_any(answer: str, others: Iterable[str]) -> bool:
    """Whether ``answer`` is the ``same`` as one of ``others``."""
    return any(same(answer, other) for other in others if other)


def _holds(text: str, part: str) -> bool:
    if not part:
        return False
    return f" {part} " in f" {text} " if spaced(part) else part in text


def find_spans(text: str, names: Iterable[str]) -> list[tuple[int, int]]:
    """Where any of ``names`` stands in ``text``: longest first, whole words, none inside another; in order.

    White space in a name matches any white space, and case does not matter.
    """
    found: list[tuple[int, int]] = []
    for name in sorted({name.strip() for name in names if name.strip()}, key=lambda name: (-len(name), name)):
        body = r"\s+".join(re.escape(word) for word in name.split())
        pattern = rf"(?<!\w){body}(?!\w)" if spaced(name) else body
        for match in re.finditer(pattern, text, re.IGNORECASE):
            if all(match.end() <= start or match.start() >= end for start, end in found):
                found.append(match.span())
    return sorted(found)
