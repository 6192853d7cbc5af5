"""One reader for everything that ``--patch`` takes: weight and memory patches, PEFT adapters, and foreign formats.

A folder with ``patch.json`` says what it is in the field ``format``. Formats other than the two of our own are found by that
name in the entry-point group ``knowlab.patches``: a function of folder and handle that returns a patch.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from lab.errors import PatchFormatError
from lab.memory import MemoryPatch
from lab.patch import Patch, WeightPatch
from lab.patch_files import CARD_FILE, FORMAT, MEMORY_FORMAT, read_card
from lab.registry import Registry

if TYPE_CHECKING:
    from lab.handle import ModelHandle

PATCH_GROUP = "knowlab.patches"

Reader = Callable[[Path, "ModelHandle"], Patch]


def read_patch(folder: str | Path, handle: ModelHandle) -> Patch:
    """Reads a patch of any kind.

    Args:
        folder: A saved patch, or a saved PEFT LoRA adapter.
        handle: The model it is for; an adapter names its modules and no fingerprint.

    Raises:
        PatchFormatError: The folder is absent, damaged, or of no kind that is known.
    """
    place = Path(folder)
    if not place.is_dir():
        raise PatchFormatError(
            f"there is no folder {str(place)!r}; a patch is the folder that saving one made"
        )
    if (place / CARD_FILE).is_file():
        named = read_card(place).get("format")
        readers: Registry[Reader] = Registry("patch format", {}, group=PATCH_GROUP)
        if isinstance(named, str) and named not in (FORMAT, MEMORY_FORMAT) and named in readers:
            return readers.get(named)(place, handle)
        return load_saved(place)
    if (place / "adapter_config.json").is_file():
        from lab.peft_export import import_peft

        return import_peft(place, handle)
    raise PatchFormatError(
        f"{place} holds neither {CARD_FILE} (a patch) nor adapter_config.json (a PEFT adapter)"
    )


def load_saved(folder: str | Path) -> WeightPatch | MemoryPatch:
    """Reads a patch that KnowLab saved; no model is needed.

    Raises:
        PatchFormatError: The folder is incomplete, damaged, or of another format.
    """
    if read_card(folder).get("format") == MEMORY_FORMAT:
        return MemoryPatch.load(folder)
    return WeightPatch.load(folder)
