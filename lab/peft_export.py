"""A weight patch as a standard LoRA adapter, readable by peft and by servers that load such adapters; and back."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lab.errors import PatchError, PatchFormatError
from lab.files import write_folder
from lab.patch import Delta, LowRank, Provenance, WeightPatch, library_versions

if TYPE_CHECKING:
    from lab.handle import ModelHandle

_PREFIX = "base_model.model."


@dataclass(frozen=True)
class PeftExport:
    """What was written.

    Attributes:
        path: Folder with ``adapter_config.json`` and ``adapter_model.safetensors``.
        relative_error: Parameter name to Frobenius error of the truncation over the delta's norm; 0 where exact.
    """

    path: Path
    relative_error: dict[str, float]


def export_peft(
    patch: WeightPatch, folder: str | Path, handle: ModelHandle, *, rank: int | None = None
) -> PeftExport:
    """See ``WeightPatch.to_peft``."""
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    errors: dict[str, float] = {}
    transposed = set()
    for name, delta in patch.deltas.items():
        module, _, leaf = name.rpartition(".")
        weight = handle.named_weight(name)
        if leaf != "weight" or delta.dim != 2 or isinstance(handle.model.get_submodule(module), nn.Embedding):
            raise PatchError(f"{name!r} is not the weight of a projection; a LoRA adapter cannot hold it")
        low, errors[name] = _factor(name, delta, rank)
        transposed.add(weight.transposed)
        ranks[module] = low.rank
        tensors[f"{_PREFIX}{module}.lora_A.weight"] = low.right.float().contiguous()
        tensors[f"{_PREFIX}{module}.lora_B.weight"] = low.left.float().contiguous()
    if not ranks:
        raise PatchError("the patch holds no deltas; there is nothing to export")
    if len(transposed) > 1:
        raise PatchError(
            "the patch mixes transposed and plain projections, which one LoRA adapter cannot describe"
        )
    default = max(ranks.values())
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": handle.name,
        "inference_mode": True,
        "bias": "none",
        "fan_in_fan_out": transposed == {True},
        "lora_dropout": 0.0,
        # alpha == r makes the scaling 1, so that the adapter is the delta.
        "r": default,
        "lora_alpha": default,
        "rank_pattern": {module: value for module, value in ranks.items() if value != default},
        "alpha_pattern": {module: value for module, value in ranks.items() if value != default},
        "target_modules": sorted(ranks),
    }

    def fill(fresh: Path) -> None:
        save_file(tensors, fresh / "adapter_model.safetensors", metadata={"format": "pt"})
        (fresh / "adapter_config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
        card = {
            "patch": patch.id,
            "base": patch.base,
            "parents": list(patch.parents),
            "relative_error": errors,
        }
        (fresh / "knowlab.json").write_text(json.dumps(card, indent=1) + "\n", encoding="utf-8")

    return PeftExport(write_folder(folder, fill), errors)


def import_peft(folder: str | Path, handle: ModelHandle) -> WeightPatch:
    """A saved LoRA adapter as a weight patch for ``handle``.

    Raises:
        PatchFormatError: Not a plain LoRA adapter, or one for other modules.
    """
    place = Path(folder)
    try:
        config = json.loads((place / "adapter_config.json").read_text(encoding="utf-8"))
        tensors = load_file(place / "adapter_model.safetensors")
    except (OSError, json.JSONDecodeError) as error:
        raise PatchFormatError(f"{place} is not a PEFT adapter: {error}") from error
    odd = [
        key
        for key in ("use_dora", "use_bdlora", "modules_to_save", "trainable_token_indices")
        if config.get(key)
    ]
    if config.get("peft_type") != "LORA" or odd or config.get("bias", "none") != "none":
        raise PatchFormatError(
            f"{place}: only plain LoRA adapters become weight patches, not {odd or config.get('peft_type')}"
        )
    deltas: dict[str, Delta] = {}
    for key, right in tensors.items():
        if not key.endswith(".lora_A.weight"):
            if not key.endswith(".lora_B.weight"):
                raise PatchFormatError(f"{place} holds {key!r}, which is not part of a plain LoRA adapter")
            continue
        module = key.removeprefix(_PREFIX).removesuffix(".lora_A.weight")
        left = tensors.get(key.replace(".lora_A.", ".lora_B."))
        if left is None:
            raise PatchFormatError(f"{place} holds {key!r} without its lora_B")
        rank = int(config.get("rank_pattern", {}).get(module, config["r"]))
        alpha = float(config.get("alpha_pattern", {}).get(module, config["lora_alpha"]))
        scale = alpha / (rank**0.5 if config.get("use_rslora") else rank)
        name = f"{module}.weight"
        delta = LowRank(left.float() * scale, right.float())
        if delta.shape != handle.named_weight(name).shape:
            raise PatchFormatError(
                f"{place}: {module!r} has shape {delta.shape}, the model has {handle.named_weight(name).shape}"
            )
        deltas[name] = delta
    if not deltas:
        raise PatchFormatError(f"{place} holds no LoRA factors")
    parents: tuple[str, ...] = ()
    base = handle.fingerprint
    if (place / "knowlab.json").is_file():
        card = json.loads((place / "knowlab.json").read_text(encoding="utf-8"))
        base, parents = str(card.get("base", base)), tuple(card.get("parents", ()))
    return WeightPatch(base, deltas, Provenance("peft", versions=library_versions()), parents)


def _factor(name: str, delta: Delta, rank: int | None) -> tuple[LowRank, float]:
    if isinstance(delta, LowRank) and (rank is None or rank >= delta.rank):
        return delta, 0.0
    if rank is None:
        raise PatchError(
            f"the delta of {name!r} is dense; give rank= to export its best approximation of that rank"
        )
    if rank < 1:
        raise PatchError(f"rank must be at least 1, not {rank}")
    dense = delta.dense().double()
    u, s, vh = torch.linalg.svd(dense, full_matrices=False)
    total = float(s.square().sum().sqrt())
    lost = float(s[rank:].square().sum().sqrt())
    return LowRank((u[:, :rank] * s[:rank]).float(), vh[:rank].float()), lost / total if total else 0.0
