"""The weights as a ledger sees them: a list of patch folders in force, and a lock."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from lab.errors import BaseMismatchError

if TYPE_CHECKING:
    from lab.handle import ModelHandle
    from lab.stack import Applied


class Weights(Protocol):
    """What a ledger needs of a model."""

    @property
    def base(self) -> str:
        """Fingerprint of the model without any patch; empty where there is no model."""
        ...

    def writing(self) -> AbstractContextManager[None]:
        """Nobody reads the model inside the ``with``."""
        ...

    def held(self) -> tuple[Path, ...]:
        """The folders that ``hold`` put in force, in order."""
        ...

    def hold(self, folders: Sequence[Path]) -> None:
        """Puts exactly these patches in force, in this order; on an error everything is as before.

        Raises:
            PatchError: A folder cannot be read or belongs to another model.
        """
        ...


class HandleWeights:
    """The weights of a handle. Patches that others applied to it stay as they are.

    Args:
        handle: The model.
    """

    def __init__(self, handle: ModelHandle) -> None:
        self.handle = handle
        self._held: list[tuple[Path, Applied]] = []

    @property
    def base(self) -> str:
        """See ``Weights``."""
        return self.handle.fingerprint

    def writing(self) -> AbstractContextManager[None]:
        """See ``Weights``."""
        return self.handle.writing()

    def held(self) -> tuple[Path, ...]:
        """See ``Weights``."""
        return tuple(folder for folder, _ in self._held)

    def hold(self, folders: Sequence[Path]) -> None:
        """See ``Weights``."""
        from lab.patch_io import read_patch

        wanted, before = list(folders), self.held()
        if wanted == list(before):
            return
        fresh = {folder: read_patch(folder, self.handle) for folder in wanted if folder not in before}
        for folder, patch in fresh.items():
            base = getattr(patch, "base", self.base)
            if base != self.base:
                raise BaseMismatchError(
                    f"{folder} was made for base {base[:12]}, {self.handle.name!r} is {self.base[:12]}; "
                    "open this ledger with the model it was written for"
                )
        with self.handle.writing():
            try:
                self._replay(wanted, fresh)
            except BaseException:
                self._replay(list(before), {})
                raise

    def _replay(self, wanted: Sequence[Path], fresh: Mapping[Path, object]) -> None:
        # Sums of many patches depend on their order in the last bit, and a restart applies them in the order of the ledger.
        from lab.patch_io import read_patch

        kept = 0
        staying = [(folder, entry) for folder, entry in self._held if folder in wanted]
        while kept < len(staying) and staying[kept][0] == wanted[kept]:
            kept += 1
        for pair in [pair for pair in self._held if pair not in staying[:kept]]:
            pair[1].undo()
            self._held.remove(pair)
        for folder in wanted[kept:]:
            patch = fresh.get(folder) or read_patch(folder, self.handle)
            self._held.append((folder, self._apply(patch)))

    def _apply(self, patch: object) -> Applied:
        import torch

        from lab.patch import WeightPatch

        if isinstance(patch, WeightPatch):
            narrow = self.handle.dtype in (torch.float16, torch.bfloat16)
            # A parent may have been rolled back since; the ledger says so, and the patch stays in force.
            return patch.apply(self.handle, "sidecar" if narrow else "merge", allow_missing_parents=True)
        return patch.apply(self.handle, allow_missing_parents=True)  # type: ignore[attr-defined]


class NoWeights:
    """No model: a ledger over documents alone."""

    base = ""

    def __init__(self) -> None:
        self._held: tuple[Path, ...] = ()

    def writing(self) -> AbstractContextManager[None]:
        """See ``Weights``."""
        return nullcontext()

    def held(self) -> tuple[Path, ...]:
        """See ``Weights``."""
        return self._held

    def hold(self, folders: Sequence[Path]) -> None:
        """See ``Weights``; keeps the list."""
        self._held = tuple(folders)
