"""Presets: which layers and search parameters a method uses on which model, read from ``presets.toml``."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from lab.errors import ConfigError, UnknownNameError
from lab.handle import ModelHandle

CONFIG_FIELD = "knowlab_preset"
"""A model may name its preset in its own config under this key."""
_SHAPE = ("hidden_size", "n_layers", "vocab_size")


@dataclass(frozen=True)
class Preset:
    """The values of one method on one model.

    Attributes:
        name: Row of the table.
        source: Where its values come from.
        chosen: Why this row: ``"named"``, ``"config"`` (the model's own config names it), ``"shape"``, or
            ``"fallback"`` (no row fits; layers are scaled by depth).
        values: The method's own section.
        penalty: SADR's weight and steps for the method, with their source.
    """

    name: str
    source: str
    chosen: str
    values: Mapping[str, Any]
    penalty: Mapping[str, Any]

    def to_json(self) -> dict[str, str]:
        """What a patch's provenance says about it."""
        return {"name": self.name, "source": self.source, "chosen": self.chosen}


def find_preset(handle: ModelHandle, section: str, name: str | None = None) -> Preset:
    """Chooses the row for a model.

    Args:
        handle: The model.
        section: The method's section (``"rome"``, ``"memit"``); a row adds to, or overrules, what ``[common.<section>]`` says.
        name: A row by name; otherwise the row that the model's config names, the one of its type and shape, or the
            fallback of its type.

    Raises:
        UnknownNameError: No row of that name.
        ConfigError: The row says nothing about the method, or its layers do not exist in the model.
    """
    table = read_table()
    rows = {str(row["name"]): row for row in table["preset"]}
    own = getattr(handle.config, CONFIG_FIELD, None)
    wanted = name or own
    if wanted is not None:
        if wanted not in rows:
            raise UnknownNameError("preset", str(wanted), rows)
        return _preset(
            rows[wanted], section, table, "named" if name else "config", _layers_as_written(handle)
        )
    shape = {
        "hidden_size": handle.hidden_size,
        "n_layers": handle.n_layers,
        "vocab_size": handle.config.vocab_size,
    }
    for row in rows.values():
        fits = all(row[key] == shape[key] for key in _SHAPE if key in row)
        if fits and handle.config.model_type in row.get("model_type", ()) and "n_layers" in row:
            return _preset(row, section, table, "shape", _layers_as_written(handle))
    for fallback in table["fallback"]:
        if handle.config.model_type in fallback["model_type"] or "*" in fallback["model_type"]:
            row = rows[fallback["preset"]]
            return _preset(row, section, table, "fallback", _layers_by_depth(handle, int(row["n_layers"])))
    raise ConfigError(f"no preset fits model type {handle.config.model_type!r}; name one with preset=")


def read_table() -> dict[str, Any]:
    """The table as it stands in ``presets.toml``."""
    return tomllib.loads(files("editors").joinpath("presets.toml").read_text(encoding="utf-8"))


def preset_names() -> tuple[str, ...]:
    """All rows by name."""
    return tuple(str(row["name"]) for row in read_table()["preset"])


def _preset(
    row: Mapping[str, Any], section: str, table: Mapping[str, Any], chosen: str, place: Any
) -> Preset:
    shared = table["common"].get(section, {})
    if section not in row and not shared:
        raise ConfigError(f"preset {row['name']!r} has no values for {section!r}")
    values = {**shared, **row.get(section, {})}
    # A section may have a source of its own.
    source = str(values.pop("source", row["source"]))
    for key, layers in values.items():
        if key == "layers" or key.endswith("_layers"):
            values[key] = place(tuple(layers), row["name"])
    common = table["sadr"]
    own = row.get("sadr", {}).get(section)
    penalty = {
        "source": row["source"] if own else common["source"],
        **(own or common.get(section, {})),
    }
    return Preset(str(row["name"]), source, chosen, values, penalty)


def _layers_as_written(handle: ModelHandle) -> Any:
    def place(layers: tuple[int, ...], name: str) -> tuple[int, ...]:
        if max(layers, default=0) >= handle.n_layers:
            raise ConfigError(
                f"preset {name!r} edits layers {list(layers)}, but {handle.name!r} has only {handle.n_layers}; "
                "give layers=... or leave the preset out"
            )
        return layers

    return place


def _layers_by_depth(handle: ModelHandle, depth: int) -> Any:
    # The last block has nothing above it that could turn a recalled value into an answer.
    highest = max(handle.n_layers - 2, 0)

    def place(layers: tuple[int, ...], name: str) -> tuple[int, ...]:
        scaled = (min(round(layer * handle.n_layers / depth), highest) for layer in layers)
        return tuple(sorted(set(scaled)))

    return place
