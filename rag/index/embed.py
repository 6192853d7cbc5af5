"""What an index embeds texts with, and how it knows the same embeddings again."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from lab.embeddings import DEFAULT_MODEL, Embedder
from lab.errors import ConfigError

# Vectors of one text by one model differ between machines in the last digits only.
_SAME = 0.999
_PROBE = "Marie Curie was born in Warsaw in 1867; the capital of France is Paris."


class TextEmbeddings(Protocol):
    """Texts to vectors, with the methods of LangChain's ``Embeddings``, any of which fits; arrays are taken as they are."""

    def embed_documents(self, texts: list[str]) -> Sequence[Sequence[float]] | np.ndarray:
        """A vector per text."""
        ...

    def embed_query(self, text: str) -> Sequence[float]:
        """The vector of a query."""
        ...


class SentenceEmbeddings:
    """A sentence model as ``TextEmbeddings``; it is loaded at the first use.

    Args:
        model: ``minilm`` (offline), a folder, or a sentence-transformers id.
        device: Where to run.
    """

    def __init__(self, model: str | Path = DEFAULT_MODEL, *, device: str = "cpu") -> None:
        self.name = str(model)
        self._embedder = Embedder(model, device=device)

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        """See ``TextEmbeddings``; of length 1."""
        return self._embedder.encode(texts).tolist()

    def embed_query(self, text: str) -> list[float]:
        """See ``TextEmbeddings``; of length 1."""
        return self.embed_documents([text])[0]


class CheckedEmbeddings:
    """Embeddings of one index: everything they return is a finite vector of the width that the index holds.

    Args:
        embeddings: The name of a sentence model, an object, or ``None`` for the model that ``card`` names.
        card: What ``card()`` returned when the index was made; empty for a new one.

    Raises:
        ConfigError: The index was made with other embeddings, or with an object and none was given.
    """

    def __init__(self, embeddings: TextEmbeddings | str | Path | None, card: dict[str, str]) -> None:
        stored = card.get("embedding", "")
        named = isinstance(embeddings, (str, Path)) or embeddings is None
        if embeddings is None and stored.startswith("object "):
            raise ConfigError(
                f"the index was made with embeddings of its own ({stored}); give the same object"
            )
        self._source = (
            SentenceEmbeddings(embeddings or stored or DEFAULT_MODEL)
            if isinstance(embeddings, (str, Path)) or embeddings is None
            else embeddings
        )
        self.name = (
            self._source.name
            if isinstance(self._source, SentenceEmbeddings)
            else f"object {type(self._source).__module__}.{type(self._source).__qualname__}"
        )
        self._stored, self._probe = stored, json.loads(card["probe"]) if "probe" in card else None
        self._checked = False
        # A model of the same name is only asked when it is needed: loading it takes seconds.
        if self._probe is not None and not (named and self.name == stored):
            self._check()

    def card(self) -> dict[str, str]:
        """What a new index stores to know these embeddings again."""
        self._probe = self._vectors(self._source.embed_documents([_PROBE]), 1)[0].tolist()
        self._checked = True
        return {"embedding": self.name, "probe": json.dumps([round(value, 6) for value in self._probe])}

    def documents(self, texts: Sequence[str]) -> np.ndarray:
        """Vectors of texts, ``[text, width]``."""
        self._check()
        return self._vectors(self._source.embed_documents(list(texts)), len(texts))

    def query(self, text: str) -> np.ndarray:
        """The vector of a query, ``[width]``."""
        self._check()
        return self._vectors([self._source.embed_query(text)], 1)[0]

    def _check(self) -> None:
        if self._checked or self._probe is None:
            return
        own = self._vectors(self._source.embed_documents([_PROBE]), 1, width=None)[0]
        stored = np.asarray(self._probe)
        likeness = 0.0
        if own.shape == stored.shape:
            likeness = float(own @ stored / (np.linalg.norm(own) * np.linalg.norm(stored) or 1.0))
        if likeness < _SAME:
            raise ConfigError(
                f"the index was made with the embeddings {self._stored!r} ({len(stored)} numbers a text), and {self.name!r} "
                f"({len(own)} numbers) makes other vectors; use the former, or make a new index"
            )
        self._checked = True

    def _vectors(
        self, rows: Sequence[Sequence[float]] | np.ndarray, count: int, width: int | None = -1
    ) -> np.ndarray:
        found = np.asarray(rows, dtype=np.float32)
        expected = len(self._probe) if width == -1 and self._probe is not None else None
        good = found.ndim == 2 and len(found) == count and found.shape[1] > 0
        if not good or (expected is not None and found.shape[1] != expected) or not np.isfinite(found).all():
            raise ConfigError(
                f"the embeddings {self.name!r} gave {found.shape} for {count} texts, or numbers that are not finite"
            )
        if math.isclose(float(np.abs(found).sum()), 0.0):
            raise ConfigError(f"the embeddings {self.name!r} gave vectors of zeros only")
        return found
