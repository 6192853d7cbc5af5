"""What methods without a training loop of their own share: settings from overrides, and a patch with its provenance."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from editors.base import check_names
from editors.unlearning.base import UnlearnOptions
from lab.handle import ModelHandle
from lab.patch import Delta, Provenance, WeightPatch, library_versions
from lab.records import Fact

ConfigT = TypeVar("ConfigT")


def settled(options: UnlearnOptions, config: type[ConfigT]) -> ConfigT:
    """The config of a method from its overrides.

    Raises:
        ConfigError: A setting does not exist or makes no sense.
    """
    check_names(options.name, options.overrides, names_of(config))
    # Lists come from command lines; configs are compared and hashed.
    return config(
        **{
            name: tuple(value) if isinstance(value, list) else value
            for name, value in options.overrides.items()
        }
    )


def names_of(config: type[Any]) -> frozenset[str]:
    """Names of a config's settings."""
    return frozenset(each.name for each in dataclasses.fields(config))


def told(config: Any) -> dict[str, Any]:
    """A config's plain settings; what is no JSON value (a cache) says nothing about the numbers and is left out."""
    found = {}
    for each in dataclasses.fields(config):
        value = getattr(config, each.name)
        if isinstance(value, tuple):
            value = list(value)
        if isinstance(value, (str, int, float, list, dict, type(None))):
            found[each.name] = value
    return found


def origin(
    options: UnlearnOptions, config: Mapping[str, Any], forget: Sequence[Fact], extra: Mapping[str, Any]
) -> Provenance:
    """Where a patch comes from."""
    requests = tuple(fact.to_json() for fact in forget)
    return Provenance(options.name, dict(config), requests, options.seed, library_versions(), dict(extra))


def weight_patch(handle: ModelHandle, deltas: Mapping[str, Delta], provenance: Provenance) -> WeightPatch:
    """A patch on top of everything that is applied."""
    parents = tuple(entry.patch.id for entry in handle.applied)
    return WeightPatch(handle.fingerprint, deltas, provenance, parents)
