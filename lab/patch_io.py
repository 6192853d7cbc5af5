"""One reader for everything that ``--patch`` takes: weight patches, PEFT adapters, and formats of other floors.

A folder with ``patch.json`` says what it is in the field ``format``. Formats other than a weight patch are found by that
name in the entry-point group ``knowlab.patches``: a function of folder and handle that returns a patch.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from lab.errors import PatchFormatError
from lab.patch import Patch, WeightPatch
from lab.patch_files import CARD_FILE, FORMAT
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
        return _by_format(place, handle)
    if (place / "adapter_config.json").is_file():
        from lab.peft_export import import_peft

        return import_peft(place, handle)
    raise PatchFormatError(
        f"{place} holds neither {CARD_FILE} (a patch) nor adapter_config.json (a PEFT adapter)"
    )


def _by_format(place: Path, handle: ModelHandle) -> Patch:
    try:
        card = json.loads((place / CARD_FILE).read_text(encoding="utf-8"))
    except ValueError as error:
        raise PatchFormatError(f"{place / CARD_FILE} is not JSON: {error}") from error
    named = card.get("format") if isinstance(card, dict) else None
    readers: Registry[Reader] = Registry("patch format", {}, group=PATCH_GROUP)
    if isinstance(named, str) and named != FORMAT and named in readers:
        return readers.get(named)(place, handle)
    return WeightPatch.load(place)
