"""The ground floor: models, patches, probes, suites and the built-in world. It knows no method.

The names below are imported when they are first used, so that ``import lab`` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lab.handle import ModelHandle
    from lab.memory import MemoryPatch
    from lab.patch import WeightPatch
    from lab.records import EditRequest, Fact, ForgetRequest, Passage, Question

__all__ = [
    "EditRequest",
    "Fact",
    "ForgetRequest",
    "MemoryPatch",
    "ModelHandle",
    "Passage",
    "Question",
    "WeightPatch",
]

_HOMES = {"MemoryPatch": "lab.memory", "ModelHandle": "lab.handle", "WeightPatch": "lab.patch"}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'lab' has no attribute {name!r}")
    return getattr(import_module(_HOMES.get(name, "lab.records")), name)
