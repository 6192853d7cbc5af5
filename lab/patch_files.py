"""Saving and loading patches: ``patch.safetensors`` for the tensors, ``patch.json`` for everything else."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from lab.errors import PatchError, PatchFormatError, UnknownNameError
from lab.files import write_folder
from lab.patch import Carry, Delta, Dense, LowRank, Provenance, WeightPatch

if TYPE_CHECKING:
    from lab.memory import MemoryPatch

FORMAT = "knowlab-patch"
MEMORY_FORMAT = "knowlab-memory"
FORMAT_VERSION = 2
"""Of weight patches that carry something for later edits; all others are written as version 1, which older readers know."""
WEIGHTS_FILE = "patch.safetensors"
CARD_FILE = "patch.json"
_TITLES = {FORMAT: "weight patch", MEMORY_FORMAT: "memory patch"}
_UNREADABLE = (KeyError, TypeError, ValueError, AttributeError, SafetensorError, PatchError)


def save_patch(patch: WeightPatch, folder: str | Path, *, overwrite: bool = False) -> Path:
    """See ``WeightPatch.save``."""
    tensors = {
        f"{name}/{part}": value
        for name, delta in patch.deltas.items()
        for part, value in delta.tensors().items()
    }
    for place, each in enumerate(patch.carry):
        tensors |= {f"carry/{place}/{name}": value for name, value in each.tensors.items()}
    content = {
        "rank": patch.rank,
        "norms": patch.norms(),
        "deltas": {
            name: {"kind": _kind(delta), "shape": list(delta.shape)} for name, delta in patch.deltas.items()
        },
        **({"carry": [_carry_card(each) for each in patch.carry]} if patch.carry else {}),
    }
    return _save(FORMAT, patch, content, tensors, folder, overwrite)


def load_patch(folder: str | Path) -> WeightPatch:
    """See ``WeightPatch.load``."""
    place = Path(folder)
    card, tensors = _read(place, FORMAT)
    try:
        deltas = {name: _delta(name, entry["kind"], tensors) for name, entry in card["deltas"].items()}
        carry = tuple(
            Carry(entry["kind"], {name: tensors[f"carry/{number}/{name}"] for name in entry["tensors"]})
            for number, entry in enumerate(card.get("carry", ()))
        )
        patch = WeightPatch(card["base"], deltas, _provenance(card), tuple(card["parents"]), carry)
    except _UNREADABLE as error:
        raise PatchFormatError(f"{place} is not a readable patch: {error}") from error
    _check_id(place, patch, card)
    return patch


def save_memory(patch: MemoryPatch, folder: str | Path, *, overwrite: bool = False) -> Path:
    """See ``MemoryPatch.save``."""
    content = {"kind": patch.memory.kind, "settings": dict(patch.memory.settings())}
    return _save(MEMORY_FORMAT, patch, content, dict(patch.memory.tensors()), folder, overwrite)


def load_memory(folder: str | Path) -> MemoryPatch:
    """See ``MemoryPatch.load``."""
    from lab.memory import MemoryPatch, memory_kinds

    place = Path(folder)
    card, tensors = _read(place, MEMORY_FORMAT)
    try:
        kind = memory_kinds().get(card["kind"])
    except (KeyError, UnknownNameError) as error:
        raise PatchFormatError(
            f"{place} holds a memory that nothing installed here can read: {error}"
        ) from error
    try:
        memory = kind.restore(tensors, card["settings"])
        patch = MemoryPatch(card["base"], memory, _provenance(card), tuple(card["parents"]))
    except _UNREADABLE as error:
        raise PatchFormatError(f"{place} is not a readable patch: {error}") from error
    _check_id(place, patch, card)
    return patch


def read_card(folder: str | Path) -> dict[str, Any]:
    """The JSON card of a folder.

    Raises:
        PatchFormatError: There is none, or it is no JSON object.
    """
    file = Path(folder) / CARD_FILE
    if not file.is_file():
        raise PatchFormatError(f"{folder} holds no {CARD_FILE}; it is not a patch folder")
    try:
        card = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise PatchFormatError(f"{file} is not JSON: {error}") from error
    if not isinstance(card, dict):
        raise PatchFormatError(f"{file} does not describe a patch")
    return card


def _save(
    format: str,
    patch: WeightPatch | MemoryPatch,
    content: Mapping[str, Any],
    tensors: dict[str, Tensor],
    folder: str | Path,
    overwrite: bool,
) -> Path:
    def fill(fresh: Path) -> None:
        save_file(tensors, fresh / WEIGHTS_FILE)
        card = {
            "format": format,
            "format_version": FORMAT_VERSION if "carry" in content else 1,
            "id": patch.id,
            "base": patch.base,
            "parents": list(patch.parents),
            **content,
            "provenance": patch.provenance.to_json(),
            "sha256": hashlib.sha256((fresh / WEIGHTS_FILE).read_bytes()).hexdigest(),
        }
        (fresh / CARD_FILE).write_text(
            json.dumps(card, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
        )

    return write_folder(folder, fill, overwrite=overwrite)


def _read(place: Path, format: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Card and tensors of a folder that must be of ``format`` and whole."""
    card = read_card(place)
    file, weights = place / CARD_FILE, place / WEIGHTS_FILE
    if card.get("format") != format:
        raise PatchFormatError(f"{file} does not describe a {_TITLES[format]}")
    if card.get("format_version") not in range(1, FORMAT_VERSION + 1):
        raise PatchFormatError(
            f"{file} has format version {card.get('format_version')}, this KnowLab reads up to {FORMAT_VERSION}"
        )
    if not weights.is_file():
        raise PatchFormatError(f"{place} holds no {WEIGHTS_FILE}")
    if hashlib.sha256(weights.read_bytes()).hexdigest() != card.get("sha256"):
        raise PatchFormatError(f"{weights} does not match the checksum in {CARD_FILE}; the patch is damaged")
    try:
        return card, load_file(weights)
    except SafetensorError as error:
        raise PatchFormatError(f"{place} is not a readable patch: {error}") from error


def _provenance(card: Mapping[str, Any]) -> Provenance:
    provenance = card["provenance"]
    return Provenance(**{**provenance, "requests": tuple(provenance.get("requests", ()))})


def _check_id(place: Path, patch: WeightPatch | MemoryPatch, card: Mapping[str, Any]) -> None:
    if patch.id != card.get("id"):
        raise PatchFormatError(
            f"{place}: base, parents or content were changed after saving (the id does not match)"
        )


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
