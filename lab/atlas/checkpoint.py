"""Checkpoints and finished models: safetensors and JSON, written beside the old ones and moved into place."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lab.atlas.recipe import Recipe
from lab.errors import DataError
from lab.files import replacing, write_folder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_PARAMS, _STATE = "param/", "state/"


def save_checkpoint(
    folder: Path, params: Mapping[str, Tensor], state: Mapping[str, Tensor], progress: Mapping[str, Any]
) -> None:
    """Writes ``checkpoint.safetensors`` in one atomic step; progress is part of the same file.

    Args:
        folder: Work folder of the run.
        params: fp32 parameters.
        state: Optimizer state.
        progress: JSON values: step, position in the data, time used and so on.
    """
    from safetensors.torch import save_file

    tensors = {_PARAMS + name: value.contiguous() for name, value in params.items()}
    tensors |= {_STATE + name: value.contiguous() for name, value in state.items()}
    with replacing(folder / "checkpoint.safetensors") as temporary:
        save_file(tensors, temporary, {"progress": json.dumps(dict(progress))})


def load_checkpoint(folder: Path) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Any]] | None:
    """Reads what ``save_checkpoint`` wrote; None when there is none.

    Raises:
        DataError: The file is not a checkpoint.
    """
    from safetensors import safe_open

    path = folder / "checkpoint.safetensors"
    if not path.exists():
        return None
    params, state = {}, {}
    with safe_open(path, "pt") as file:
        text = (file.metadata() or {}).get("progress")
        if text is None:
            raise DataError(
                "no progress in this checkpoint; move the file away to train from the start", path
            )
        for name in file.keys():  # noqa: SIM118
            if name.startswith(_PARAMS):
                params[name.removeprefix(_PARAMS)] = file.get_tensor(name)
            else:
                state[name.removeprefix(_STATE)] = file.get_tensor(name)
    return params, state, json.loads(text)


def export_model(
    params: Mapping[str, Tensor],
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerFast,
    out: Path,
    dtype: torch.dtype = torch.float16,
    extras: Mapping[str, str] | None = None,
) -> None:
    """Writes a folder that ``transformers`` loads, in one atomic step.

    Args:
        params: fp32 parameters by Hugging Face name.
        recipe: Its shape gives the configuration.
        tokenizer: Goes beside the weights.
        out: The folder; an old one is replaced.
        dtype: Type of the written weights.
        extras: Further text files by name.

    Raises:
        OSError: The disk is full or not writable; the old folder is then untouched.
    """
    from safetensors.torch import save_file

    def fill(fresh: Path) -> None:
        config = recipe.shape.config()
        config.architectures = ["LlamaForCausalLM" if recipe.shape.family == "llama" else "GPT2LMHeadModel"]
        config.dtype = dtype
        config.save_pretrained(fresh)
        tokenizer.save_pretrained(fresh)
        tensors = {name: value.detach().to(dtype).contiguous() for name, value in params.items()}
        save_file(tensors, fresh / "model.safetensors", {"format": "pt"})
        for name, text in (extras or {}).items():
            (fresh / name).write_text(text, encoding="utf-8")
        # safetensors files are private to their owner; a model is for everybody.
        for path in fresh.iterdir():
            path.chmod(0o644)

    write_folder(out, fill, overwrite=True)
