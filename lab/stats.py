"""Key statistics: the second moment ``C = E[k kᵀ]`` of what the down projections read, over general text.

One pass over the text serves every wanted layer and ends behind the last of them. Products are fp32 per batch (the
model's own precision where that is wider), totals fp64. The results are cached on disk and answer for themselves: a
read-out says how far ``kᵀ C⁻¹ k`` still moved on keys that the moment has not seen.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lab.arch import Role
from lab.errors import DataError
from lab.files import replacing
from lab.moments import KeyStats, Progress, collect_key_stats, default_tokens
from lab.solve import (
    Factor,
    PastGram,
    Projector,
    emmet_factors,
    factorize,
    null_space_factors,
    woodbury_factors,
    woodbury_update,
)
from lab.sources import TextSource, text_source

if TYPE_CHECKING:
    from lab.handle import ModelHandle

__all__ = [
    "Corpus",
    "Factor",
    "KeyStats",
    "PastGram",
    "Projector",
    "StatsCache",
    "TextSource",
    "collect_key_stats",
    "default_cache_dir",
    "default_tokens",
    "emmet_factors",
    "factorize",
    "null_space_factors",
    "text_source",
    "woodbury_factors",
    "woodbury_update",
]

_FORMAT = "knowlab-key-stats-2"


@dataclass(frozen=True)
class Corpus:
    """What key statistics are collected over.

    Attributes:
        spec: As in ``text_source``.
        max_tokens: Token budget; ``default_tokens`` of the key width when absent.
        max_length: Documents are cut here.
        batch_tokens: Padded tokens in one forward pass; no part of the identity.
    """

    spec: str = "auto"
    max_tokens: int | None = None
    max_length: int = 1024
    batch_tokens: int = 8192


def default_cache_dir() -> Path:
    """``$KNOWLAB_CACHE``, or ``knowlab`` in the user's cache folder of this platform."""
    if chosen := os.environ.get("KNOWLAB_CACHE"):
        return Path(chosen).expanduser()
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local") / "knowlab" / "Cache"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "knowlab"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "knowlab"


class StatsCache:
    """Key statistics on disk, one file per model, text, budget and layer.

    A file that is damaged, or that answers to another key than its name says, is reported and collected anew; files are
    written whole or not at all.

    Args:
        folder: Where the files live; ``default_cache_dir() / "stats"`` when absent.
    """

    def __init__(self, folder: Path | str | None = None) -> None:
        self.folder = default_cache_dir() / "stats" if folder is None else Path(folder)
        self._loaded: dict[str, KeyStats] = {}

    def get(
        self,
        handle: ModelHandle,
        layers: Sequence[int],
        corpus: Corpus | str = "auto",
        *,
        progress: Progress | None = None,
    ) -> dict[int, KeyStats]:
        """Loads the statistics of ``layers``; those that are missing are collected together, in one pass.

        Args:
            handle: The model; its pristine weights are what counts.
            layers: Wanted blocks.
            corpus: The text and the budget; a bare string is ``Corpus(spec)``.
            progress: As in ``collect_key_stats``.
        """
        wanted = Corpus(corpus) if isinstance(corpus, str) else corpus
        source = text_source(wanted.spec, handle)
        if source.warning:
            warnings.warn(source.warning, stacklevel=2)
        width = max(handle.weight(Role.MLP_OUT, layer).shape[1] for layer in layers)
        budget = wanted.max_tokens or default_tokens(width)
        keys = {
            layer: self.key(handle, layer, source, budget, wanted.max_length) for layer in sorted(set(layers))
        }
        found = {layer: stats for layer, key in keys.items() if (stats := self._find(key, layer)) is not None}
        if missing := [layer for layer in keys if layer not in found]:
            fresh = collect_key_stats(
                handle,
                missing,
                source.texts(),
                max_tokens=budget,
                max_length=wanted.max_length,
                batch_tokens=wanted.batch_tokens,
                source=source.id,
                warning=source.warning,
                progress=progress,
            )
            for layer, stats in fresh.items():
                save_stats(self._path(keys[layer]), keys[layer], stats)
            found |= fresh
        self._loaded |= {keys[layer]: stats for layer, stats in found.items()}
        return {layer: found[layer] for layer in keys}

    @staticmethod
    def key(handle: ModelHandle, layer: int, source: TextSource, max_tokens: int, max_length: int) -> str:
        """sha256 of everything the numbers depend on."""
        parts = [
            _FORMAT,
            handle.fingerprint,
            str(handle.dtype),
            source.id,
            source.warning,
            layer,
            max_tokens,
            max_length,
        ]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}.safetensors"

    def _find(self, key: str, layer: int) -> KeyStats | None:
        if key in self._loaded:
            return self._loaded[key]
        path = self._path(key)
        if not path.is_file():
            return None
        try:
            stats = load_stats(path, key)
            if stats.layer != layer:
                raise DataError(f"holds layer {stats.layer} instead of {layer}", path)
        except DataError as error:
            warnings.warn(f"{error}; the key statistics are collected again", stacklevel=3)
            return None
        return stats


def save_stats(path: Path, key: str, stats: KeyStats) -> None:
    """Writes one layer's statistics; a reader sees the old file, the new one, or none."""
    meta = {
        "format": _FORMAT,
        "key": key,
        "layer": stats.layer,
        "source": stats.source,
        "convergence": stats.convergence,
        "warning": stats.warning,
        "digest": _moment_digest(stats.moment),
    }
    tensors = {"moment": stats.moment.contiguous(), "count": torch.tensor(stats.count, dtype=torch.int64)}
    with replacing(path) as temporary:
        save_file(tensors, temporary, metadata={"knowlab": json.dumps(meta)})


def load_stats(path: Path, key: str) -> KeyStats:
    """Reads one layer's statistics and checks that they are whole and the wanted ones.

    Raises:
        DataError: The file is damaged, foreign, or answers to another key; says which.
    """
    try:
        with safe_open(str(path), framework="pt") as file:
            meta = json.loads((file.metadata() or {}).get("knowlab", "null"))
            if not isinstance(meta, dict) or meta.get("format") != _FORMAT:
                raise DataError("not a key statistics file of this version", path)
            moment, count = file.get_tensor("moment"), int(file.get_tensor("count"))
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"not a readable key statistics file: {error}", path) from error
    if meta.get("key") != key:
        raise DataError("these key statistics belong to another model, text or budget", path)
    if moment.dtype != torch.float64 or _moment_digest(moment) != meta.get("digest"):
        raise DataError("the key statistics are damaged: their checksum does not fit", path)
    convergence = tuple((int(tokens), float(change)) for tokens, change in meta["convergence"])
    return KeyStats(int(meta["layer"]), count, moment, meta["source"], convergence, meta["warning"])


def _moment_digest(moment: Tensor) -> str:
    return hashlib.blake2b(moment.contiguous().numpy().data, digest_size=16).hexdigest()
