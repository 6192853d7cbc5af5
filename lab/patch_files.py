"""Saving and loading weight patches: ``patch.safetensors`` for the factors, ``patch.json`` for everything else."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from lab.errors import PatchError, PatchFormatError
from lab.files import write_folder
from lab.patch import Carry, Delta, Dense, LowRank, Provenance, WeightPatch

FORMAT = "knowlab-patch"
FORMAT_VERSION = 2
"""Of patches that carry something for later edits; the others are written as version 1, which older readers know."""
WEIGHTS_FILE = "patch.safetensors"
CARD_FILE = "patch.json"


def save_patch(patch: WeightPatch, folder: str | Path, *, overwrite: bool = False) -> Path:
    """See ``WeightPatch.save``."""
    tensors = {
        f"{name}/{part}": value
        for name, delta in patch.deltas.items()
        for part, value in delta.tensors().items()
    }
    for place, each in enumerate(patch.carry):
        tensors |= {f"carry/{place}/{name}": value for name, value in each.tensors.items()}

    def fill(fresh: Path) -> None:
        save_file(tensors, fresh / WEIGHTS_FILE)
        card = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION if patch.carry else 1,
            "id": patch.id,
            "base": patch.base,
            "parents": list(patch.parents),
            "rank": patch.rank,
            "norms": patch.norms(),
            "deltas": {
                name: {"kind": _kind(delta), "shape": list(delta.shape)}
                for name, delta in patch.deltas.items()
            },
            **({"carry": [_carry_card(each) for each in patch.carry]} if patch.carry else {}),
            "provenance": patch.provenance.to_json(),
            "sha256": hashlib.sha256((fresh / WEIGHTS_FILE).read_bytes()).hexdigest(),
        }
        (fresh / CARD_FILE).write_text(
            json.dumps(card, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
        )

    return write_folder(folder, fill, overwrite=overwrite)


def load_patch(folder: str | Path) -> WeightPatch:
    """See ``WeightPatch.load``."""
    place = Path(folder)
    card = read_card(place)
    weights = place / WEIGHTS_FILE
    if not weights.is_file():
        raise PatchFormatError(f"{place} holds no {WEIGHTS_FILE}")
    if hashlib.sha256(weights.read_bytes()).hexdigest() != card.get("sha256"):
        raise PatchFormatError(f"{weights} does not match the checksum in {CARD_FILE}; the patch is damaged")
    try:
        tensors = load_file(weights)
        deltas = {name: _delta(name, entry["kind"], tensors) for name, entry in card["deltas"].items()}
        provenance = card["provenance"]
        patch = WeightPatch(
            base=card["base"],
            deltas=deltas,
            provenance=Provenance(**{**provenance, "requests": tuple(provenance.get("requests", ()))}),
            parents=tuple(card["parents"]),
            carry=tuple(
                Carry(entry["kind"], {name: tensors[f"carry/{place}/{name}"] for name in entry["tensors"]})
                for place, entry in enumerate(card.get("carry", ()))
            ),
        )
    except (KeyError, TypeError, AttributeError, SafetensorError, PatchError) as error:
        raise PatchFormatError(f"{place} is not a readable patch: {error}") from error
    if patch.id != card.get("id"):
        raise PatchFormatError(
            f"{place}: base, parents, deltas or what is carried were changed after saving (the id does not match)"
        )
    return patch


def read_card(folder: str | Path) -> dict[str, Any]:
    """The JSON card of a saved patch.

    Raises:
        PatchFormatError: There is none, it is no JSON, of another kind, or of a newer version.
    """
    file = Path(folder) / CARD_FILE
    if not file.is_file():
        raise PatchFormatError(f"{folder} holds no {CARD_FILE}; it is not a patch folder")
    try:
        card = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise PatchFormatError(f"{file} is not JSON: {error}") from error
    if not isinstance(card, dict) or card.get("format") != FORMAT:
        raise PatchFormatError(f"{file} does not describe a weight patch")
    if card.get("format_version") not in range(1, FORMAT_VERSION + 1):
        raise PatchFormatError(
            f"{file} has format version {card.get('format_version')}, this KnowLab reads up to {FORMAT_VERSION}"
        )
    return card


def _carry_card(carry: Carry) -> dict[str, Any]:
    return {
        "kind": carry.kind,
        "tensors": {name: list(tensor.shape) for name, tensor in carry.tensors.items()},
    }


def _kind(delta: Delta) -> str:
    return "low_rank" if isinstance(delta, LowRank) else "dense"


def _delta(name: str, kind: str, tensors: dict[str, Tensor]) -> Delta:
    if kind == "low_rank":
        return LowRank(tensors[f"{name}/left"], tensors[f"{name}/right"])
    if kind == "dense":
        return Dense(tensors[f"{name}/delta"])
    raise PatchFormatError(f"unknown kind of delta {kind!r} for {name!r}")
