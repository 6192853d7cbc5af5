"""Checkpoints of methods that train: an interrupted run goes on behind its last whole pass and gives the patch it would have given.

A checkpoint is a folder with ``state.safetensors``: the trained weights, the optimiser, and what the procedure carries from pass
to pass. Tensors lie in the file as they are; the lists, names and numbers around them are JSON in its head. Everything else (the
plan, what the untouched model says) is made anew, from the same seed and the same model.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from lab.errors import ConfigError
from lab.files import replacing

FILE = "state.safetensors"
_KIND = "$"


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
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(self.file, "pt") as file:
                head = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            plain = json.loads(head["state"])
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise ConfigError(f"the checkpoint {self.file} cannot be read ({error}); delete it") from None
        if head.get("digest") != self.digest:
            raise ConfigError(
                f"the checkpoint {self.file} belongs to a run with another model, method, settings or facts; "
                "give another folder, or delete it"
            )
        return _joined(plain, tensors)

    def write(self, state: Mapping[str, Any]) -> None:
        """Replaces what is there, whole or not at all."""
        from safetensors.torch import save_file

        self.file.parent.mkdir(parents=True, exist_ok=True)
        tensors: dict[str, Tensor] = {}
        head = {"digest": self.digest, "state": json.dumps(_parted(dict(state), tensors))}
        with replacing(self.file) as beside:
            save_file(tensors, beside, head)


def clear(folder: str | Path) -> None:
    """Deletes a folder's checkpoint, and the folder where nothing else is in there."""
    place = Path(folder)
    (place / FILE).unlink(missing_ok=True)
    if place.is_dir() and not any(place.iterdir()):
        place.rmdir()


def copied(parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies of parameters on the CPU."""
    return {name: parameter.detach().cpu().clone() for name, parameter in parameters.items()}


def _parted(value: Any, tensors: dict[str, Tensor]) -> Any:
    """``value`` with its tensors moved into ``tensors``, as JSON can hold it; keys of any plain type and tuples keep theirs."""
    if isinstance(value, Tensor):
        name = str(len(tensors))
        tensors[name] = value.detach().cpu().contiguous().clone()
        return {_KIND: "tensor", "name": name}
    if isinstance(value, Mapping):
        return {_KIND: "map", "items": [[key, _parted(each, tensors)] for key, each in value.items()]}
    if isinstance(value, list | tuple):
        kind = "list" if isinstance(value, list) else "tuple"
        return {_KIND: kind, "items": [_parted(each, tensors) for each in value]}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"a checkpoint holds tensors and plain values, not {type(value).__name__}")


def _joined(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Inverse of ``_parted``."""
    if not isinstance(value, dict):
        return value
    kind = value[_KIND]
    if kind == "tensor":
        return tensors[value["name"]]
    if kind == "map":
        return {key: _joined(each, tensors) for key, each in value["items"]}
    items = [_joined(each, tensors) for each in value["items"]]
    return items if kind == "list" else tuple(items)
