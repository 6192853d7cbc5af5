"""Editors turn requests into patches: knowledge editing, and unlearning in ``editors.unlearning``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from editors.base import EDITORS, Editor, EditorOptions, Method, edit_many, get_editor

__all__ = ["EDITORS", "Editor", "EditorOptions", "Method", "edit_many", "get_editor"]


def __getattr__(name: str) -> Any:
    # Torch is imported when an editor is asked for, not when a command line lists its options.
    if name in __all__:
        from editors import base

        return getattr(base, name)
    raise AttributeError(f"module 'editors' has no attribute {name!r}")
