"""``WeightPatch``: every change to a model's weights as a value that can be applied, undone, composed, scaled and saved."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from lab.errors import BaseMismatchError, PatchError
from lab.stack import Applied, Mode

if TYPE_CHECKING:
    from lab.handle import ModelHandle
    from lab.peft_export import PeftExport


def keep(tensor: Tensor) -> Tensor:
    """A tensor as patches hold it: detached, on the CPU, in fp32 (fp64 where it was fp64)."""
    # fp64 stays for fp64 bases; everything narrower is kept in fp32, because bf16 factors lose most of a small edit.
    dtype = torch.float64 if tensor.dtype == torch.float64 else torch.float32
    return tensor.detach().to(device="cpu", dtype=dtype).contiguous()


@dataclass(frozen=True, eq=False)
class LowRank:
    """``left @ right`` in canonical orientation, kept in fp32 on the CPU.

    Attributes:
        left: ``[out, r]``.
        right: ``[r, in]``.
    """

    left: Tensor
    right: Tensor

    def __post_init__(self) -> None:
        if self.left.dim() != 2 or self.right.dim() != 2 or self.left.shape[1] != self.right.shape[0]:
            raise PatchError(
                f"left {tuple(self.left.shape)} and right {tuple(self.right.shape)} do not chain"
            )
        object.__setattr__(self, "left", keep(self.left))
        object.__setattr__(self, "right", keep(self.right))

    @property
    def shape(self) -> tuple[int, ...]:
        """``(out, in)``."""
        return (self.left.shape[0], self.right.shape[1])

    @property
    def dim(self) -> int:
        """Always 2."""
        return 2

    @property
    def rank(self) -> int:
        """Number of columns of ``left``: an upper bound on the rank."""
        return self.left.shape[1]

    def dense(self) -> Tensor:
        """The product ``[out, in]``."""
        return self.left @ self.right

    def stored(self, transposed: bool) -> Tensor:
        """``dense()`` as its weight is stored: ``[in, out]`` where that is transposed (GPT-2's ``Conv1D``)."""
        if transposed and self.rank == 1:
            # Products of two numbers are the same in either order, and memory is written six times faster along than across.
            return self.right.T @ self.left.T
        return self.dense().T if transposed else self.dense()

    def norm(self) -> float:
        """Frobenius norm, without forming the product."""
        gram = (self.left.double().T @ self.left.double()) * (self.right.double() @ self.right.double().T)
        return float(gram.sum().clamp_min(0).sqrt())

    def scaled(self, factor: float) -> LowRank:
        """The delta times ``factor``."""
        return LowRank(self.left * factor, self.right)

    def as_term(self, device: torch.device) -> Callable[[Tensor], Tensor]:
        """A function of the projection's input ``[..., in]`` that gives ``[..., out]``, computed in fp32 or wider."""
        left, right = self.left.to(device), self.right.to(device)

        def term(x: Tensor) -> Tensor:
            wide = torch.promote_types(x.dtype, torch.float32)
            return (x.to(wide) @ right.T.to(wide)) @ left.T.to(wide)

        return term

    def tensors(self) -> dict[str, Tensor]:
        """Named parts, for saving and hashing."""
        return {"left": self.left, "right": self.right}


@dataclass(frozen=True, eq=False)
class Dense:
    """A full delta in canonical orientation (``[out, in]``; as stored for tensors that are no matrix), fp32 on the CPU."""

    delta: Tensor

    def __post_init__(self) -> None:
        object.__setattr__(self, "delta", keep(self.delta))

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the delta."""
        return tuple(self.delta.shape)

    @property
    def dim(self) -> int:
        """Number of axes."""
        return self.delta.dim()

    @property
    def rank(self) -> int:
        """Largest rank the shape allows."""
        return min(self.delta.shape)

    def dense(self) -> Tensor:
        """The delta itself."""
        return self.delta

    def stored(self, transposed: bool) -> Tensor:
        """The delta as its weight is stored: ``[in, out]`` where that is transposed."""
        return self.delta.T if transposed else self.delta

    def norm(self) -> float:
        """Frobenius norm."""
        return float(torch.linalg.vector_norm(self.delta.double()))

    def scaled(self, factor: float) -> Dense:
        """The delta times ``factor``."""
        return Dense(self.delta * factor)

    def as_term(self, device: torch.device) -> Callable[[Tensor], Tensor]:
        """See ``LowRank.as_term``."""
        delta = self.delta.to(device)

        def term(x: Tensor) -> Tensor:
            wide = torch.promote_types(x.dtype, torch.float32)
            return x.to(wide) @ delta.T.to(wide)

        return term

    def tensors(self) -> dict[str, Tensor]:
        """Named parts, for saving and hashing."""
        return {"delta": self.delta}


Delta = LowRank | Dense


@dataclass(frozen=True)
class Provenance:
    """Where a patch comes from; plain JSON values only, nothing that differs between equal runs.

    Attributes:
        method: Editor specification (``"rome+sadr"``).
        config: Every setting of the method.
        requests: What was asked for.
        seed: Seed of prefixes and draws.
        versions: Libraries that were used.
        extra: What the method wants to say (loss traces, prefixes, guards).
    """

    method: str
    config: Mapping[str, Any] = field(default_factory=dict)
    requests: tuple[Mapping[str, Any], ...] = ()
    seed: int = 0
    versions: Mapping[str, str] = field(default_factory=dict)
    extra: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Returns plain values."""
        return {
            "method": self.method,
            "config": dict(self.config),
            "requests": [dict(request) for request in self.requests],
            "seed": self.seed,
            "versions": dict(self.versions),
            "extra": dict(self.extra),
        }


def hash_of(header: Sequence[Any], parts: Sequence[tuple[str, Tensor]]) -> str:
    """The id of a patch: a hash of plain values and of named tensors on the CPU, in order."""
    digest = hashlib.sha256(json.dumps(list(header)).encode())
    for name, tensor in parts:
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()


@dataclass(frozen=True, eq=False)
class Carry:
    """What an edit hands on to later edits of the same sequence; no part of the change itself.

    It travels with the patch, so that whoever keeps the patches keeps the whole state of a sequence.

    Attributes:
        kind: The method that reads it (``"alphaedit"``).
        tensors: By name; fp32 or fp64, on the CPU.

    Raises:
        PatchError: A tensor holds NaN or infinity.
    """

    kind: str
    tensors: Mapping[str, Tensor]

    def __post_init__(self) -> None:
        kept = {name: keep(tensor) for name, tensor in self.tensors.items()}
        for name, tensor in kept.items():
            if not bool(torch.isfinite(tensor).all()):
                raise PatchError(
                    f"{name!r}, which {self.kind!r} hands on to later edits, holds NaN or infinity"
                )
        object.__setattr__(self, "tensors", kept)


def library_versions() -> dict[str, str]:
    """Versions that a patch's numbers depend on."""
    return {package: _version(package) for package in ("knowlab", "torch", "transformers")}


@functools.cache
def _version(package: str) -> str:
    # A package's metadata is searched for on the disk, every time.
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"


@dataclass(frozen=True, eq=False)
class WeightPatch:
    """A change to one base model.

    Attributes:
        base: Fingerprint of the model it was computed for.
        deltas: Parameter name to delta.
        provenance: How it was made.
        parents: Ids of the patches that were applied when it was computed, in order.
        carry: What later edits need to know about this one; changes no weight.
    """

    base: str
    deltas: Mapping[str, Delta]
    provenance: Provenance
    parents: tuple[str, ...] = ()
    carry: tuple[Carry, ...] = ()

    def __post_init__(self) -> None:
        for name, delta in self.deltas.items():
            if not all(bool(torch.isfinite(part).all()) for part in delta.tensors().values()):
                raise PatchError(f"the delta of {name!r} holds NaN or infinity")
        object.__setattr__(self, "deltas", dict(self.deltas))

    @property
    def id(self) -> str:
        """Hash of base, parents, deltas and what is carried on; equal patches have equal ids."""
        cached = self.__dict__.get("_id")
        if cached is None:
            parts = [
                (f"{name}/{part}", tensor)
                for name, delta in sorted(self.deltas.items())
                for part, tensor in delta.tensors().items()
            ]
            parts += [
                (f"carry/{place}/{each.kind}/{name}", tensor)
                for place, each in enumerate(self.carry)
                for name, tensor in sorted(each.tensors.items())
            ]
            cached = hash_of([self.base, list(self.parents)], parts)
            object.__setattr__(self, "_id", cached)
        return str(cached)

    @property
    def rank(self) -> int:
        """Largest rank over the deltas."""
        return max((delta.rank for delta in self.deltas.values()), default=0)

    def norms(self) -> dict[str, float]:
        """Frobenius norm per parameter."""
        return {name: delta.norm() for name, delta in self.deltas.items()}

    def apply(
        self, handle: ModelHandle, mode: Mode | None = None, *, allow_missing_parents: bool = False
    ) -> Applied:
        """Applies the patch until ``Applied.undo``.

        Args:
            handle: The model; its fingerprint must be ``base``.
            mode: ``"merge"`` adds to the weights (fp32, rounded once); ``"sidecar"`` adds beside them in the forward
                pass, exact on half-precision and quantised bases. Without a word: beside such weights, into all others.
            allow_missing_parents: Apply although patches it was computed on top of are not applied.

        Raises:
            BaseMismatchError: Another base model.
            MissingParentsError: Parents are not applied.
            PatchError: A delta does not fit, or is to be merged into a quantised weight.
        """
        return handle.stack.apply(self, mode, allow_missing_parents)

    @contextmanager
    def applied(
        self, handle: ModelHandle, mode: Mode | None = None, *, allow_missing_parents: bool = False
    ) -> Iterator[Applied]:
        """Applies the patch for the length of a ``with``; see ``apply``."""
        entry = self.apply(handle, mode, allow_missing_parents=allow_missing_parents)
        try:
            yield entry
        finally:
            if any(other is entry for other in handle.applied):
                entry.undo()

    def scaled(self, factor: float) -> WeightPatch:
        """The patch times ``factor``: 0 is nothing, 1 is itself, -1 its opposite."""
        note = replace(
            self.provenance, extra={**self.provenance.extra, "scaled": factor, "scaled_from": self.id}
        )
        return replace(
            self, deltas={name: delta.scaled(factor) for name, delta in self.deltas.items()}, provenance=note
        )

    def __add__(self, other: WeightPatch) -> WeightPatch:
        """Both patches as one; low-rank factors are stacked, a dense part makes the sum dense, and all that either carries is kept.

        Raises:
            BaseMismatchError: The patches name different bases.
        """
        if self.base != other.base:
            raise BaseMismatchError(f"cannot add patches of bases {self.base[:12]} and {other.base[:12]}")
        deltas = dict(self.deltas)
        for name, delta in other.deltas.items():
            deltas[name] = _sum(deltas[name], delta) if name in deltas else delta
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
        return WeightPatch(self.base, deltas, provenance, tuple(parents), self.carry + other.carry)

    def save(self, folder: str | Path, *, overwrite: bool = False) -> Path:
        """Writes ``patch.safetensors`` and ``patch.json``; a failed write leaves what was there.

        Raises:
            OutputExistsError: The folder holds something already and ``overwrite`` is off.
        """
        from lab.patch_files import save_patch

        return save_patch(self, folder, overwrite=overwrite)

    @classmethod
    def load(cls, folder: str | Path) -> WeightPatch:
        """Reads a saved patch.

        Raises:
            PatchFormatError: The folder is incomplete, corrupted, or not a patch.
        """
        from lab.patch_files import load_patch

        return load_patch(folder)

    def to_peft(self, folder: str | Path, handle: ModelHandle, *, rank: int | None = None) -> PeftExport:
        """Writes a LoRA adapter that peft loads with equal logits; what is carried for later edits has no place in it.

        Args:
            folder: New or empty folder.
            handle: The base; tells which projections are stored transposed.
            rank: Truncates every delta to this rank; needed for dense ones.

        Raises:
            PatchError: A dense delta without ``rank``, or a delta that is no projection.
        """
        from lab.peft_export import export_peft

        return export_peft(self, folder, handle, rank=rank)


class Patch(Protocol):
    """What weight patches and memory patches have in common."""

    @property
    def id(self) -> str: ...

    def apply(self, handle: ModelHandle) -> Any: ...

    def applied(self, handle: ModelHandle) -> Any: ...

    def save(self, folder: str | Path) -> Path: ...


def _sum(first: Delta, second: Delta) -> Delta:
    if first.shape != second.shape:
        raise PatchError(f"cannot add deltas of shapes {first.shape} and {second.shape}")
    if isinstance(first, LowRank) and isinstance(second, LowRank):
        return LowRank(
            torch.cat([first.left, second.left], dim=1), torch.cat([first.right, second.right], dim=0)
        )
    return Dense(first.dense() + second.dense())
