"""Checkpoints of methods that train: an interrupted run goes on behind its last whole pass and gives the patch it would have given.

A checkpoint is a folder with ``state.pt``: the trained weights, the optimiser, and what the procedure carries from pass to pass.
Everything else (the plan, what the untouched model says) is made anew, from the same seed and the same model.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lab.errors import ConfigError

FILE = "state.pt"


class Checkpoint:
    """One folder's checkpoint.

    Args:
        folder: Where it lies; made with the first write.
        identity: Plain values that two runs must share for one to go on from the other.
    """

    def __init__(self, folder: str | Path, identity: Mapping[str, Any]) -> None:
        self.file = Path(folder) / FILE
        text = json.dumps(identity, sort_keys=True, default=str)
        self.digest = hashlib.sha256(text.encode()).hexdigest()

    def read(self) -> dict[str, Any] | None:
        """What was written last; ``None`` without a checkpoint.

        Raises:
            ConfigError: It belongs to another run, or cannot be read.
        """
        if not self.file.is_file():
            return None
        try:
            found = torch.load(self.file, map_location="cpu", weights_only=True)
        except Exception as error:  # torch raises many kinds for a damaged file
            raise ConfigError(f"the checkpoint {self.file} cannot be read ({error}); delete it") from None
        if not isinstance(found, dict) or found.get("digest") != self.digest:
            raise ConfigError(
                f"the checkpoint {self.file} belongs to a run with another model, method, settings or facts; "
                "give another folder, or delete it"
            )
        return found

    def write(self, state: Mapping[str, Any]) -> None:
        """Replaces what is there, whole or not at all."""
        self.file.parent.mkdir(parents=True, exist_ok=True)
        beside = self.file.with_suffix(".tmp")
        with beside.open("wb") as stream:
            torch.save({**state, "digest": self.digest}, stream)
            stream.flush()
            os.fsync(stream.fileno())
        beside.replace(self.file)


def clear(folder: str | Path) -> None:
    """Deletes a folder's checkpoint, and the folder where nothing else is in there."""
    place = Path(folder)
    (place / FILE).unlink(missing_ok=True)
    if place.is_dir() and not any(place.iterdir()):
        place.rmdir()


def copied(parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies of parameters on the CPU."""
    return {name: parameter.detach().cpu().clone() for name, parameter in parameters.items()}
