"""Where the shipped models lie."""

from __future__ import annotations

import os
from pathlib import Path

from lab.errors import UnknownNameError

MODEL_NAMES = ("atlas", "atlas-gpt2", "atlas-oracle", "atlas-oracle-b")
# What the others were trained on top of; it knows no fact that is ever asked, so it is no model to choose by name.
CORE_NAME = "atlas-core"
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


def core_path(name: str) -> Path | None:
    """The folder of a core that further models can be trained from, or None when it is not part of this installation."""
    folder = weights_root() / name
    return folder if name == CORE_NAME and (folder / "model.safetensors").is_file() else None


def shipped() -> tuple[str, ...]:
    """Names of the models whose weights are there."""
    return tuple(name for name in MODEL_NAMES if weights_path(name) is not None)
