"""Opens the model of a command line: load, then apply every ``--patch`` in order."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lab.errors import ConfigError

if TYPE_CHECKING:
    from lab.handle import ModelHandle


def open_model(
    name: str,
    patches: Sequence[Path] | None = None,
    *,
    device: str = "cpu",
    dtype: str = "float32",
    quantize: str | None = None,
) -> ModelHandle:
    """Loads a model and applies patches to it for the rest of the process.

    A half-precision or quantised base takes its patches beside the weights (``WeightPatch.apply``), because adding a small
    change to them would round most of it away.

    Raises:
        ConfigError: The model, device or dtype does not exist here.
        PatchError: A patch cannot be read or belongs to another model.
    """
    import torch

    from lab.handle import ModelHandle
    from lab.patch_io import read_patch

    try:
        place = torch.device(device)
    except RuntimeError as error:
        raise ConfigError(f"unknown device {device!r}; use cpu, cuda or cuda:N") from error
    if place.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device {device!r} is not available here: torch sees no CUDA device")
    quiet_libraries()
    handle = ModelHandle.load(name, dtype=dtype, device=place, quantize=quantize)
    for folder in patches or ():
        read_patch(folder, handle).apply(handle)
    return handle


def quiet_libraries() -> None:
    """Keeps loading bars and advice of transformers out of a command's output."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
