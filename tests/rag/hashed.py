"""Embeddings without a model: words hashed into a short vector."""

from __future__ import annotations

import hashlib

import numpy as np

from rag.index.words import words


class HashedWords:
    """Counts words in ``width`` buckets; texts that share words are near each other."""

    def __init__(self, width: int = 64) -> None:
        self.width = width
        self.texts = 0

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        self.texts += len(texts)
        return [self.embed_query(text) for text in texts]

    def embed_query(self, text: str) -> list[float]:
        vector = np.full(self.width, 1e-3)
        for word in words(text):
            vector[int(hashlib.md5(word.encode()).hexdigest(), 16) % self.width] += 1
        return (vector / np.linalg.norm(vector)).tolist()
