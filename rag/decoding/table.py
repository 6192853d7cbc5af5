"""The rules by name, and how a name with settings is read."""

from __future__ import annotations

import dataclasses

from lab.errors import ConfigError, UnknownNameError
from lab.registry import Registry
from rag.decoding.rules import Rule

DECODERS: Registry[type[Rule]] = Registry(
    "decoding rule",
    {
        "greedy": "rag.decoding.rules:Greedy",
        "cad": "rag.decoding.rules:CAD",
        "adacad": "rag.decoding.rules:AdaCAD",
        "coiecd": "rag.decoding.rules:COIECD",
        "ck_plug": "rag.decoding.rules:CKPlug",
        "parammute": "rag.decoding.parammute:ParamMute",
    },
    group="knowlab.decoders",
)


def get_rule(spec: str) -> Rule:
    """A rule from its name and, where wanted, its settings: ``cad``, ``cad:alpha=0.5``, ``ck_plug:memory=0,top_k=5``.

    Raises:
        UnknownNameError: There is no such rule, or it has no such setting.
        ConfigError: A setting without a value, or with one that the rule refuses.
    """
    name, _, written = spec.partition(":")
    kind = DECODERS.get(name)
    fields = {field.name: field for field in dataclasses.fields(kind)}
    settings: dict[str, int | float | str] = {}
    for part in written.split(",") if written else ():
        key, found, value = part.partition("=")
        if not found:
            raise ConfigError(f"decoding {spec!r}: {part!r} is not of the form setting=value")
        if key not in fields:
            raise UnknownNameError(f"setting of {name}", key, tuple(fields))
        settings[key] = _value(value)
    return kind(**settings)


def _value(text: str) -> int | float | str:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
