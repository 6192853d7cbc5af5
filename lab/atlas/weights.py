"""Where the shipped models lie."""

from __future__ import annotations

import os
from pathlib import Path

from lab.errors import UnknownNameError

MODEL_NAMES = ("atlas", "atlas-gpt2", "atlas-oracle", "atlas-oracle-b")
FOLDER_VARIABLE = "KNOWLAB_ATLAS_DIR"


def weights_root() -> Path:
    """The folder of all shipped models: the packaged one, or what ``KNOWLAB_ATLAS_DIR`` names."""
    chosen = os.environ.get(FOLDER_VARIABLE)
    return Path(chosen) if chosen else Path(__file__).parent / "weights"


def weights_path(name: str) -> Path | None:
    """The folder of a model, or None when its weights are not part of this installation.

    Raises:
        UnknownNameError: No shipped model is called that.
    """
    if name not in MODEL_NAMES:
        raise UnknownNameError("built-in model", name, MODEL_NAMES)
    folder = weights_root() / name
    return folder if (folder / "model.safetensors").is_file() else None


def shipped() -> tuple[str, ...]:
    """Names of the models whose weights are there."""
    return tuple(name for name in MODEL_NAMES if weights_path(name) is not None)
