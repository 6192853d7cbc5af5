"""Presets: which layers and search parameters a method uses on which model, from ``presets.toml`` or a file like it."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from lab.errors import ConfigError, UnknownNameError
from lab.handle import ModelHandle

CONFIG_FIELD = "knowlab_preset"
"""A model may name its preset in its own config under this key."""
_SHAPE = ("hidden_size", "n_layers", "vocab_size")
_PLAIN = ("name", "source", "model_type", *_SHAPE)
FILE_SUFFIX = ".toml"
"""A preset's name that ends so is a file with one row."""


@dataclass(frozen=True)
class Preset:
    """The values of one method on one model.

    Attributes:
        name: Row of the table.
        source: Where its values come from.
        chosen: Why this row: ``"named"``, ``"config"`` (the model's own config names it), ``"file"``,
            ``"shape"``, or ``"fallback"`` (no row fits; layers are scaled by depth).
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
        name: A row by name, or a file with one row in the table's form (its name ends in ``.toml``); otherwise the row that
            the model's config names, the one of its type and shape, or the fallback of its type.

    Raises:
        UnknownNameError: No row of that name.
        ConfigError: The row says nothing about the method, or its layers do not exist in the model; a file cannot be read,
            or was made for a model of another shape.
    """
    table = read_table()
    # Only the caller may name a file: what a downloaded config says must not open files.
    if name is not None and name.endswith(FILE_SUFFIX):
        row = read_row(name)
        _check_shape(handle, row, name)
        return _preset(row, section, table, "file", _layers_as_written(handle))
    rows = {str(row["name"]): row for row in table["preset"]}
    own = getattr(handle.config, CONFIG_FIELD, None)
    wanted = name or own
    if wanted is not None:
        if wanted not in rows:
            raise UnknownNameError("preset", str(wanted), rows)
        return _preset(
            rows[wanted], section, table, "named" if name else "config", _layers_as_written(handle)
        )
    shape = shape_of(handle)
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


def read_row(file: str | Path) -> dict[str, Any]:
    """The row of a file in the form of ``presets.toml``.

    Raises:
        ConfigError: The file cannot be read, is no TOML, or does not hold exactly one well-formed ``[[preset]]``.
    """
    try:
        found = tomllib.loads(Path(file).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"the preset file {file} cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise ConfigError(f"the preset file {file} is no TOML: {error}") from error
    rows = found.get("preset")
    if not isinstance(rows, list) or len(rows) != 1 or not isinstance(rows[0], dict):
        raise ConfigError(f"the preset file {file} must hold one [[preset]]")
    (row,) = rows
    for key in ("name", "source"):
        if not isinstance(row.get(key), str):
            raise ConfigError(f"the preset in {file} needs a text {key!r}")
    for section, values in row.items():
        if section in _PLAIN:
            continue
        if not isinstance(values, dict):
            raise ConfigError(f"{section!r} in {file} must be a section, such as [preset.{section}]")
        layers = values.get("layers", [])
        if not isinstance(layers, list) or not all(type(layer) is int and layer >= 0 for layer in layers):
            raise ConfigError(
                f"layers under {section!r} in {file} must be a list of layer numbers, not {layers!r}"
            )
    return row


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


def shape_of(handle: ModelHandle) -> dict[str, int]:
    """What a row of a table must agree with: ``hidden_size``, ``n_layers``, ``vocab_size``."""
    return {
        "hidden_size": handle.hidden_size,
        "n_layers": handle.n_layers,
        "vocab_size": handle.config.vocab_size,
    }


def _check_shape(handle: ModelHandle, row: Mapping[str, Any], file: str) -> None:
    shape = shape_of(handle)
    for key in _SHAPE:
        if key in row and row[key] != shape[key]:
            raise ConfigError(
                f"the preset in {file} is for models with {key} {row[key]}, {handle.name!r} has {shape[key]}; tune this "
                f"model, or take {key} out of the file"
            )


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
