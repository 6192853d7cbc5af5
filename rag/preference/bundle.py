"""A trained adapter with everything it stands on: the base's fingerprint, the edits it was trained over, the adapter.

The folder is the adapter's own patch folder, so that ``--patch`` takes it; beside it lie ``bundle.json`` and ``edits/``.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lab.errors import BaseMismatchError, ConfigError, PatchFormatError
from lab.files import write_folder
from lab.patch import WeightPatch
from lab.patch_io import load_saved

if TYPE_CHECKING:
    from lab.handle import ModelHandle

BUNDLE_FILE = "bundle.json"
FORMAT = "knowlab-bundle"


def save_bundle(
    folder: str | Path,
    handle: ModelHandle,
    adapter: WeightPatch,
    *,
    more: Callable[[Path], None] | None = None,
    overwrite: bool = False,
) -> Path:
    """Writes adapter and edits in one step.

    Args:
        folder: New or empty folder.
        handle: The model with the edits that the adapter was trained over.
        adapter: What was trained.
        more: Writes further files into the folder.
        overwrite: Whether the folder may hold something.

    Raises:
        ConfigError: The edits applied now are not those that the adapter was trained over.
        OutputExistsError: The folder holds something.
    """
    edits = [entry.patch for entry in handle.applied]
    if tuple(edit.id for edit in edits) != adapter.parents:
        raise ConfigError(
            f"the adapter was trained over {len(adapter.parents)} edits, but {len(edits)} are applied that are not just these; "
            "apply the same edits in the same order"
        )

    def fill(fresh: Path) -> None:
        adapter.save(fresh / "adapter")
        for file in (fresh / "adapter").iterdir():
            shutil.move(str(file), fresh / file.name)
        (fresh / "adapter").rmdir()
        for number, edit in enumerate(edits):
            edit.save(fresh / "edits" / f"{number:02d}")
        card = {
            "format": FORMAT,
            "version": 1,
            "base": adapter.base,
            "edits": [edit.id for edit in edits],
            "adapter": adapter.id,
        }
        (fresh / BUNDLE_FILE).write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")
        if more is not None:
            more(fresh)

    return write_folder(folder, fill, overwrite=overwrite)


def load_bundle(folder: str | Path, handle: ModelHandle) -> tuple[Any, ...]:
    """Applies the edits and the adapter of a bundle to its base; on any error the model is as before.

    Returns:
        What was applied, oldest first; undo it in any order.

    Raises:
        PatchFormatError: The folder is no bundle, or a part is not the one that was saved.
        BaseMismatchError: The model is not the bundle's base.
        ConfigError: Other patches are applied to the model.
    """
    place = Path(folder)
    try:
        card = json.loads((place / BUNDLE_FILE).read_text(encoding="utf-8"))
        if card["format"] != FORMAT or card["version"] != 1:
            raise PatchFormatError(
                f"{place}: a bundle of form {card['format']!r} {card['version']} is not known"
            )
        base, edits, adapter = card["base"], list(card["edits"]), card["adapter"]
    except (OSError, KeyError, TypeError, ValueError) as error:
        if isinstance(error, PatchFormatError):
            raise
        raise PatchFormatError(f"{place} is no bundle of edits and adapter: {error}") from None
    if handle.fingerprint != base:
        raise BaseMismatchError(
            f"the bundle {place} was trained on the base {base[:12]}, this model is {handle.fingerprint[:12]}; load its base"
        )
    if handle.applied:
        raise ConfigError("a bundle brings its own edits; undo the patches that are applied first")
    patches = [load_saved(place / "edits" / f"{number:02d}") for number in range(len(edits))]
    patches.append(load_saved(place))
    for patch, id in zip(patches, [*edits, adapter], strict=True):
        if patch.id != id:
            raise PatchFormatError(f"{place}: the patch {patch.id[:12]} lies where {id[:12]} should be")
    applied: list[Any] = []
    try:
        for patch in patches:
            applied.append(patch.apply(handle))
    except BaseException:
        for entry in reversed(applied):
            entry.undo()
        raise
    return tuple(applied)
