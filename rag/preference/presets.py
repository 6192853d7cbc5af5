"""Settings of preference training that were tuned for one model, from ``presets.toml`` beside this file."""

from __future__ import annotations

import tomllib
from dataclasses import fields
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from lab.errors import ConfigError

if TYPE_CHECKING:
    from lab.handle import ModelHandle
    from rag.preference.train import TrainConfig


# Ways of training that are held against ``knowpo``, and trained as it is.
CONTROLS = ("sft", "sft_first")


def tuned_settings(handle: ModelHandle, method: str) -> dict[str, Any]:
    """What the first row that fits a model's type and shape says of a method; nothing where none does."""
    text = files("rag.preference").joinpath("presets.toml").read_text(encoding="utf-8")
    shape = {
        "hidden_size": handle.hidden_size,
        "n_layers": handle.n_layers,
        "vocab_size": handle.config.vocab_size,
    }
    for row in tomllib.loads(text)["preset"]:
        fits = all(row[key] == shape[key] for key in shape if key in row)
        if fits and handle.config.model_type in row["model_type"]:
            return {**row.get("all", {}), **row.get(method, {})}
    return {}


def train_config(handle: ModelHandle, method: str, **given: Any) -> TrainConfig:
    """The settings of one method on one model: defaults, what was tuned for the model, what the caller gives.

    Args:
        handle: The model.
        method: A name of ``METHODS``, or of ``CONTROLS``.
        **given: Settings; ``None`` stands for nothing given. Without ``alpha`` a ``rank`` brings twice itself.

    Raises:
        ConfigError: There is no such setting.
    """
    from rag.preference.train import TrainConfig

    known = {field.name for field in fields(TrainConfig)}
    chosen = {name: value for name, value in given.items() if value is not None}
    if unknown := sorted(set(chosen) - known):
        raise ConfigError(f"training has no setting {unknown[0]!r}; it has {', '.join(sorted(known))}")
    if "rank" in chosen:
        chosen.setdefault("alpha", 2 * chosen["rank"])
    merged = {**tuned_settings(handle, "knowpo" if method in CONTROLS else method), **chosen}
    settings: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in merged.items()
    }
    return TrainConfig(**settings)
