"""Matching subjects and answers in text that was written by many hands."""

from __future__ import annotations

import re
import string
import unicodedata
from collections.abc import Iterator

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(a|an|the)\b")


def locate_subject(text: str, subject: str) -> tuple[int, int] | None:
    """Finds the last place where ``subject`` stands in ``text``.

    White space matches any white space (no-break spaces and line breaks occur in the public files). Exact spelling is tried
    first, then any case, then the name without what follows a comma or stands in brackets; whole words before parts of words.

    Returns:
        Start and end character, or ``None``.
    """
    for name in _variants(subject):
        body = r"\s+".join(re.escape(word) for word in name.split())
        for flags in (0, re.IGNORECASE):
            for pattern in (rf"(?<!\w){body}(?!\w)", body):
                found = list(re.finditer(pattern, text, flags))
                if found:
                    return found[-1].span()
    return None


def _variants(subject: str) -> Iterator[str]:
    seen: set[str] = set()
    bare = re.sub(r"\s*\([^)]*\)", "", subject)
    for name in (subject, bare, bare.split(",")[0], re.sub(r"^the\s+", "", bare, flags=re.IGNORECASE)):
        # One letter is no name: it would match anywhere.
        if name.strip() and name not in seen and (name == subject or len(name.strip()) > 2):
            seen.add(name)
            yield name


def template_of(text: str, subject: str) -> tuple[str, str] | None:
    """Turns a filled prompt into a template.

    Returns:
        The prompt with ``{}`` in place of the subject's last occurrence, and the subject as the prompt spells it; ``None``
        when it does not occur or the prompt holds braces of its own.
    """
    place = locate_subject(text, subject)
    if place is None or "{}" in text:
        return None
    return text[: place[0]] + "{}" + text[place[1] :], text[place[0] : place[1]]


def normalize_answer(text: str) -> str:
    """Folds case, accents' encoding, punctuation, articles and white space (the SQuAD rule), for exact match."""
    folded = unicodedata.normalize("NFKC", text).casefold().translate(_PUNCTUATION)
    kept = " ".join(_ARTICLES.sub(" ", folded).split())
    # An answer made of signs only (a flag, "***") would fold to nothing and then equal every other such answer.
    return kept or " ".join(text.split())


def distinct(answers: Iterator[str] | tuple[str, ...] | list[str]) -> tuple[str, ...]:
    """Stripped, non-empty answers without repeats, in order."""
    return tuple(dict.fromkeys(answer.strip() for answer in answers if answer.strip()))
