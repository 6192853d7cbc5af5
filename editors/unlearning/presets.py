"""Settings of unlearning methods for models on which they were tuned, from ``presets.toml`` beside this file.

Published rates are for models of billions of parameters. A model that the table knows takes its row's settings in place of a
method's defaults; what the caller sets goes before both. A row's ``family`` tables hold for all methods of a family, each taking
the settings that it has; a method's own table goes before its family's, or, with ``like``, before another method's (an empty name:
before nothing).
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from importlib.resources import files
from typing import Any

from editors.presets import CONFIG_FIELD, shape_of
from editors.unlearning.base import UNLEARNERS, get_unlearner
from lab.errors import ConfigError
from lab.handle import ModelHandle

_SHAPE = ("hidden_size", "n_layers", "vocab_size")


def read_unlearning_table() -> tuple[dict[str, Any], ...]:
    """The rows of ``presets.toml``, as they stand there."""
    text = files("editors.unlearning").joinpath("presets.toml").read_text(encoding="utf-8")
    return tuple(tomllib.loads(text)["preset"])


def tuned_settings(handle: ModelHandle, method: str) -> dict[str, Any]:
    """Settings of a method that were tuned for a model; none where there are no such.

    A row fits where the model's config names it, or else where type and shape are the row's.

    Args:
        handle: The model.
        method: Name of an unlearner.

    Example:
        >>> get_unlearner("npo", **{**tuned_settings(handle, "npo"), "epochs": 3})
    """
    named, shape = getattr(handle.config, CONFIG_FIELD, None), shape_of(handle)
    for row in read_unlearning_table():
        fits = (
            row["name"] == named
            if named is not None
            else handle.config.model_type in row["model_type"]
            and all(row[key] == shape[key] for key in _SHAPE)
        )
        if fits:
            return _own(row, method, handle.n_layers)
    return {}


def _own(row: Mapping[str, Any], method: str, depth: int) -> dict[str, Any]:
    found = settings_in(row, method)
    if max(found.get("layers", ()), default=0) >= depth:
        raise ConfigError(
            f"the settings of {method!r} for {row['name']!r} train layers {found['layers']}, and the model has only {depth}; "
            "set layers"
        )
    return found


def settings_in(row: Mapping[str, Any], method: str) -> dict[str, Any]:
    """What a row of the table sets for a method: its own table over its family's, or over the one that it is ``like``."""
    own = dict(row.get(method, {}))
    if (other := own.pop("like", None)) is not None:
        shared = settings_in(row, other) if other else {}
    else:
        shared = row.get("family", {}).get(UNLEARNERS.get(method).family, {})
        if shared:
            known = getattr(get_unlearner(method), "settings", frozenset())
            shared = {name: value for name, value in shared.items() if name in known}
    # TOML has no null: an empty text switches a limit off.
    return {
        name: None if value == "" else value for name, value in {**shared, **own}.items() if name != "source"
    }
