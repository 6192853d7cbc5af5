"""Context templates: short texts in the model's own words that an edit is averaged over.

They come from the model itself, sampled with a seed, and are stored in every patch. Nothing is kept between calls unless
the caller passes a ``PrefixCache``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lab.errors import ConfigError
from lab.handle import ModelHandle

PLAIN = "{}"
STARTS = ("The", "Therefore", "Because", "I", "You")
"""First words of generated prefixes (EasyEdit's choice; the ROME authors start from the end-of-text token)."""


@dataclass(frozen=True)
class Prefixes:
    """Context templates in groups, each with one ``{}``; the first group is the plain prompt alone.

    Attributes:
        groups: Templates by group.
    """

    groups: tuple[tuple[str, ...], ...]

    def __post_init__(self) -> None:
        if not self.groups or self.groups[0] != (PLAIN,) or not all(self.groups):
            raise ConfigError(
                "prefixes come in non-empty groups, and the first group is the plain template '{}' alone"
            )
        if wrong := [text for text in self.flat if text.count(PLAIN) != 1]:
            raise ConfigError(f"a prefix holds exactly one {{}} where the prompt goes, not {wrong[0]!r}")

    @classmethod
    def of(cls, texts: Sequence[str]) -> Prefixes:
        """A fixed list; the plain template is put first where it is missing."""
        rest = tuple(text for text in texts if text != PLAIN)
        return cls(((PLAIN,), rest) if rest else ((PLAIN,),))

    @property
    def flat(self) -> tuple[str, ...]:
        """All templates, the plain one first."""
        return tuple(text for group in self.groups for text in group)

    def weights(self, rule: str) -> Tensor:
        """Weight of each template in a mean key, ``[template]`` fp64, summing to 1.

        Args:
            rule: ``"mean"``: all alike (ROME). ``"groups"``: mean inside a group, then over groups (MEMIT: the plain
                prompt one half, each of five generated ones a tenth).
        """
        if rule == "mean":
            return torch.full((len(self.flat),), 1 / len(self.flat), dtype=torch.float64)
        if rule == "groups":
            shares = [1 / (len(self.groups) * len(group)) for group in self.groups for _ in group]
            return torch.tensor(shares, dtype=torch.float64)
        raise ConfigError(f"unknown rule {rule!r} for the mean key; use 'mean' or 'groups'")


@dataclass
class PrefixCache:
    """Prefixes by model, seed and lengths; an object that the caller owns and passes on."""

    _known: dict[tuple[object, ...], Prefixes] = field(default_factory=dict, repr=False)

    def get(self, handle: ModelHandle, lengths: Sequence[tuple[int, int]], seed: int) -> Prefixes:
        """The prefixes of ``generate_prefixes``, made once."""
        key = (handle.fingerprint, tuple(lengths), seed)
        if key not in self._known:
            self._known[key] = generate_prefixes(handle, lengths, seed)
        return self._known[key]


def generate_prefixes(handle: ModelHandle, lengths: Sequence[tuple[int, int]], seed: int) -> Prefixes:
    """Samples prefixes from the model.

    Args:
        handle: The model.
        lengths: ``(tokens, number)`` per kind: tokens to generate, and how many such prefixes.
        seed: Seeds the sampling (top-k with k = 5); the global generator is left alone.

    Returns:
        The plain template and the generated ones as the second group.
    """
    texts: list[str] = []
    for index, (tokens, number) in enumerate(lengths):
        starts = [STARTS[place % len(STARTS)] for place in range(number)]
        if not starts:
            continue
        continuations = handle.generate(
            starts,
            max_new_tokens=tokens,
            temperature=1.0,
            top_k=5,
            seed=seed * 1009 + index,
            batch_size=len(starts),
        )
        texts.extend(_template(start + more) for start, more in zip(starts, continuations, strict=True))
    return Prefixes(((PLAIN,), tuple(texts)) if texts else ((PLAIN,),))


def _template(text: str) -> str:
    words = " ".join(text.replace("{", " ").replace("}", " ").split())
    return f"{words}. {PLAIN}"
