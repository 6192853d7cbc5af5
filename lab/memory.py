"""``MemoryPatch``: changes that add a memory beside the model, or a text before its prompts, instead of a weight delta.

What a memory does is its kind's own business (``editors.grace``, ``editors.wise``, ``editors.in_context``); this module gives
every kind the life of a patch: apply, undo in any order together with weight patches, save, load. Kinds are found by name in
the entry-point group ``knowlab.memories``.
"""

from __future__ import annotations

import json
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

from torch import Tensor

from lab.errors import BaseMismatchError, PatchError
from lab.patch import Provenance, hash_of, library_versions
from lab.registry import Registry
from lab.routing import Routing
from lab.stack import Applied, Rewrite

if TYPE_CHECKING:
    from lab.handle import ModelHandle

MEMORY_GROUP = "knowlab.memories"


class Memory(Protocol):
    """What a memory patch holds: a value that never changes.

    While several patches are applied, memories of one ``kind`` and ``group`` are joined, oldest first, and answer as one; so
    a memory decides between all it holds, and undoing a patch is joining the others.
    """

    kind: ClassVar[str]
    """Name in the entry-point group ``knowlab.memories``."""
    changes: ClassVar[Literal["model", "prompts"]]
    """Whether it acts inside the forward pass or before it."""

    @property
    def group(self) -> Hashable:
        """Memories that can be joined have equal groups (a codebook: its layer)."""
        ...

    def join(self, other: Any) -> Memory:
        """Both memories as one; ``other`` is the later."""
        ...

    def active(self, handle: ModelHandle, routing: Routing) -> AbstractContextManager[Rewrite | None]:
        """In force inside the ``with``.

        Args:
            handle: The model; left as it was afterwards, also on exceptions.
            routing: Says where the prompts of the running pass end, and keeps what was decided there.

        Returns:
            A context that yields a function of prompts, or ``None`` where prompts stay as they are.
        """
        ...

    def tensors(self) -> Mapping[str, Tensor]:
        """Everything numeric, on the CPU; saved as safetensors."""
        ...

    def settings(self) -> Mapping[str, Any]:
        """Everything else, as plain JSON values."""
        ...

    @classmethod
    def restore(cls, tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> Memory:
        """The memory that ``tensors()`` and ``settings()`` describe; ``KeyError`` or ``ValueError`` where they do not."""
        ...


def memory_kinds() -> Registry[type[Memory]]:
    """All kinds of memory by name."""
    return Registry("kind of memory", {}, group=MEMORY_GROUP)


@dataclass(frozen=True, eq=False)
class MemoryPatch:
    """A memory for one base model; the same verbs as ``WeightPatch``.

    Attributes:
        base: Fingerprint of the model it was computed for.
        memory: What it remembers.
        provenance: How it was made.
        parents: Ids of the patches that were applied when it was computed, in order.
    """

    base: str
    memory: Memory
    provenance: Provenance
    parents: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name, tensor in self.memory.tensors().items():
            if not bool(tensor.isfinite().all()):
                raise PatchError(f"{name!r} of the {self.memory.kind!r} memory holds NaN or infinity")

    @property
    def id(self) -> str:
        """Hash of base, parents and memory; equal patches have equal ids."""
        cached = self.__dict__.get("_id")
        if cached is None:
            settings = json.dumps(dict(self.memory.settings()), sort_keys=True)
            header = [self.base, list(self.parents), self.memory.kind, settings]
            cached = hash_of(header, sorted(self.memory.tensors().items()))
            object.__setattr__(self, "_id", cached)
        return str(cached)

    def apply(self, handle: ModelHandle, *, allow_missing_parents: bool = False) -> Applied:
        """Applies the patch until ``Applied.undo``.

        Args:
            handle: The model; its fingerprint must be ``base``.
            allow_missing_parents: Apply although patches it was computed on top of are not applied.

        Raises:
            BaseMismatchError: Another base model.
            MissingParentsError: Parents are not applied.
        """
        return handle.stack.remember(self, allow_missing_parents)

    @contextmanager
    def applied(self, handle: ModelHandle, *, allow_missing_parents: bool = False) -> Iterator[Applied]:
        """Applies the patch for the length of a ``with``; see ``apply``."""
        entry = self.apply(handle, allow_missing_parents=allow_missing_parents)
        try:
            yield entry
        finally:
            if any(other is entry for other in handle.applied):
                entry.undo()

    def __add__(self, other: MemoryPatch) -> MemoryPatch:
        """Both patches as one; ``other`` is the later.

        Raises:
            BaseMismatchError: The patches name different bases.
            PatchError: The memories are of different kinds or groups.
        """
        if self.base != other.base:
            raise BaseMismatchError(f"cannot add patches of bases {self.base[:12]} and {other.base[:12]}")
        mine, theirs = ((each.memory.kind, each.memory.group) for each in (self, other))
        if mine != theirs:
            raise PatchError(f"cannot join the memories {mine} and {theirs}; apply the patches one by one")
        parents = [
            *self.parents,
            *(parent for parent in other.parents if parent not in self.parents and parent != self.id),
        ]
        provenance = Provenance(
            "compose",
            requests=(*self.provenance.requests, *other.provenance.requests),
            seed=self.provenance.seed,
            versions=library_versions(),
            extra={"parts": [{"id": part.id, **part.provenance.to_json()} for part in (self, other)]},
        )
        return MemoryPatch(self.base, self.memory.join(other.memory), provenance, tuple(parents))

    def save(self, folder: str | Path, *, overwrite: bool = False) -> Path:
        """Writes ``patch.safetensors`` and ``patch.json``; a failed write leaves what was there.

        Raises:
            OutputExistsError: The folder holds something already and ``overwrite`` is off.
        """
        from lab.patch_files import save_memory

        return save_memory(self, folder, overwrite=overwrite)

    @classmethod
    def load(cls, folder: str | Path) -> MemoryPatch:
        """Reads a saved patch.

        Raises:
            PatchFormatError: The folder is incomplete, corrupted, not a memory patch, or of a kind nobody registered.
        """
        from lab.patch_files import load_memory

        return load_memory(folder)


def memories_of(handle: ModelHandle, kind: str, group: Hashable) -> Sequence[Memory]:
    """The memory of a kind and group that is in force: none, or one that joins all."""
    return [memory for memory in handle.stack.memories if (memory.kind, memory.group) == (kind, group)]
