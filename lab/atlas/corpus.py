"""The training corpus of Atlas: an endless, seeded stream of short texts in every form of the prompt format.

>>> corpus = Corpus(load_world(), load_format(), seed=0)
>>> document = next(corpus.documents())
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate, islice

from lab.atlas.closed_book import ClosedBook
from lab.atlas.forms import Format
from lab.atlas.material import Document, Material
from lab.atlas.open_book import OpenBook
from lab.atlas.world import World
from lab.errors import ConfigError, UnknownNameError

__all__ = ["Corpus", "CorpusReport", "Document", "corpus_report"]


class Corpus:
    """Texts that teach a world in a given mixture of forms.

    Every form goes through the facts in its own random order without replacement, so all facts are stated about equally
    often. The same arguments give the same texts.

    Args:
        world: The world to state.
        format: The prompt format; its ``mixture`` gives the defaults.
        seed: Fixes every draw.
        without: Names that no text may hold: facts with one of them as subject or object are left out.
        weights: Shares of single forms of the mixture, in place of the defaults; need not sum to one.
        rates: Settings within forms, in place of the defaults.

    Raises:
        UnknownNameError: A weight or rate is not one of the mixture, or a name in ``without`` is not in the world.
        ConfigError: A weight is negative or all are zero.
    """

    def __init__(
        self,
        world: World,
        format: Format,
        seed: int,
        without: frozenset[str] = frozenset(),
        *,
        weights: Mapping[str, float] | None = None,
        rates: Mapping[str, float] | None = None,
    ) -> None:
        self.world = world
        self.format = format
        self.seed = seed
        self.without = frozenset(without)
        self.weights = _merged("form of the mixture", format.mixture["weights"], weights)
        self.rates = _merged("rate of the mixture", format.mixture["rates"], rates)
        if min(self.weights.values()) < 0 or not sum(self.weights.values()):
            raise ConfigError("mixture weights must not be negative and must not all be zero")
        for name in sorted(self.without):
            world.entity(name)

    def documents(self) -> Iterator[Document]:
        """Endless documents; every call starts the same stream again."""
        return self._stream(random.Random(f"atlas:corpus:{self.seed}"))

    def sample_texts(self, n: int, seed: int = 0) -> list[str]:
        """``n`` plain texts, for key statistics or for a tokenizer; a stream of their own for each seed."""
        stream = self._stream(random.Random(f"atlas:sample:{self.seed}:{seed}"))
        return [document.text for document in islice(stream, n)]

    def _stream(self, rng: random.Random) -> Iterator[Document]:
        material = Material(self.world, self.format, rng, self.without, self.rates)
        closed, read = ClosedBook(material), OpenBook(material)
        names = [name for name, weight in self.weights.items() if weight]
        makers = [getattr(closed, name, None) or getattr(read, name) for name in names]
        bounds = list(accumulate(self.weights[name] for name in names))
        while True:
            for maker in rng.choices(makers, cum_weights=bounds, k=256):
                yield maker()


def _merged(kind: str, defaults: Mapping[str, float], chosen: Mapping[str, float] | None) -> dict[str, float]:
    for name in chosen or ():
        if name not in defaults:
            raise UnknownNameError(kind, name, defaults)
    return {**defaults, **(chosen or {})}


@dataclass(frozen=True)
class CorpusReport:
    """What a number of documents contain.

    Attributes:
        documents: How many were counted.
        tokens: How many tokens they have.
        share: Share of the tokens, by form.
        length: Mean tokens of a document, by form.
        exposures: Mean true statements of a fact.
        least: Fewest statements of any one fact.
        most: Most statements of any one fact.
        tokens_per_exposure: Tokens of the corpus for one true statement of every fact.
    """

    documents: int
    tokens: int
    share: Mapping[str, float]
    length: Mapping[str, float]
    exposures: float
    least: int
    most: int
    tokens_per_exposure: float

    def table(self) -> str:
        """The report as text, largest share first."""
        rows = [f"{'form':<18}{'share':>8}{'tokens':>8}"]
        for name in sorted(self.share, key=lambda form: -self.share[form]):
            rows.append(f"{name:<18}{self.share[name]:>8.3f}{self.length[name]:>8.1f}")
        rows.append(
            f"{self.documents} documents, {self.tokens} tokens, {self.tokens / self.documents:.1f} each"
        )
        rows.append(f"statements of a fact: mean {self.exposures:.1f}, least {self.least}, most {self.most}")
        return "\n".join(rows)


def corpus_report(
    corpus: Corpus, n: int, count: Callable[[str], int] = lambda text: len(text.split())
) -> CorpusReport:
    """Counts tokens by form and true statements by fact over the first ``n`` documents.

    Args:
        corpus: The corpus.
        n: How many documents.
        count: Tokens of a text; words by default.
    """
    documents: Counter[str] = Counter()
    tokens: Counter[str] = Counter()
    kept = [
        f for f in corpus.world.facts if f.subject not in corpus.without and f.object not in corpus.without
    ]
    stated: Counter[str] = Counter({fact.id: 0 for fact in kept})
    for document in islice(corpus.documents(), n):
        documents[document.form] += 1
        tokens[document.form] += count(document.text)
        stated.update(document.facts)
    total = sum(tokens.values())
    mean = sum(stated.values()) / len(stated)
    return CorpusReport(
        documents=n,
        tokens=total,
        share={name: tokens[name] / total for name in tokens},
        length={name: tokens[name] / documents[name] for name in tokens},
        exposures=mean,
        least=min(stated.values()),
        most=max(stated.values()),
        tokens_per_exposure=total / mean,
    )
