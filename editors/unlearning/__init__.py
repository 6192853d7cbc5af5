"""Unlearning: methods that make a model lose facts, as patches; see ``get_unlearner``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from editors.unlearning.base import UNLEARNERS, Unlearner, UnlearnMethod, UnlearnOptions, get_unlearner

__all__ = ["UNLEARNERS", "UnlearnMethod", "UnlearnOptions", "Unlearner", "get_unlearner"]


def __getattr__(name: str) -> Any:
    # Torch is imported when an unlearner is asked for, not when a command line lists its options.
    if name in __all__:
        from editors.unlearning import base

        return getattr(base, name)
    raise AttributeError(f"module 'editors.unlearning' has no attribute {name!r}")
