"""What is applied to a model: one pristine copy of each touched tensor, and the patches that are replayed over it.

Undo never subtracts: the pristine bits come back and the patches that remain are added again, so any order is exact.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from lab.errors import BaseMismatchError, ConfigError, MissingParentsError, NumericalError, PatchError
from lab.routing import Routing

if TYPE_CHECKING:
    from lab.handle import ModelHandle
    from lab.memory import Memory, MemoryPatch
    from lab.patch import Delta, WeightPatch

Mode = Literal["merge", "sidecar", "memory"]
Rewrite = Callable[[Sequence[str]], list[str]]


@dataclass(frozen=True)
class UndoReport:
    """What an undo left behind.

    Attributes:
        stale: Ids of patches still applied that were computed on top of the one that went.
    """

    stale: tuple[str, ...] = ()


@dataclass(eq=False)
class Applied:
    """A patch as it is applied to one handle.

    Attributes:
        patch: The patch.
        mode: ``"merge"`` (added to the weight), ``"sidecar"`` (added beside it in the forward pass), or ``"memory"``.
    """

    patch: WeightPatch | MemoryPatch
    mode: Mode
    _stack: PatchStack = field(repr=False)
    _deltas: Mapping[str, Delta] = field(default_factory=dict, repr=False)
    _memory: Memory | None = field(default=None, repr=False)
    _hooks: list[Any] = field(default_factory=list, repr=False)

    def undo(self) -> UndoReport:
        """Takes this patch off; the others stay, whatever the order.

        Raises:
            PatchError: It is not applied any more.
        """
        return self._stack.undo(self)


class PatchStack:
    """The patches applied to one handle, oldest first.

    Memories of one kind answer as one, so each change to the stack attaches what remains of them anew, after all sidecars.

    Attributes:
        routing: Tells memories where the prompts of a forward pass end.
    """

    def __init__(self, handle: ModelHandle) -> None:
        self._handle = handle
        self.routing = Routing()
        self._memories: tuple[Memory, ...] = ()
        self._rewrites: tuple[Rewrite, ...] = ()
        self._aside: tuple[str, Hashable] | None = None
        self._attached = ExitStack()
        self._entries: list[Applied] = []
        self._pristine: dict[str, Tensor] = {}
        self._written: dict[str, str] = {}
        self._names: dict[str, tuple[nn.Parameter, str]] = {}

    @property
    def entries(self) -> tuple[Applied, ...]:
        """What is applied, oldest first."""
        return tuple(self._entries)

    @property
    def state(self) -> str:
        """Hash of base and patches in order; the bare fingerprint when nothing is applied."""
        if not self._entries:
            return self._handle.fingerprint
        parts = [self._handle.fingerprint, *(f"{entry.patch.id}:{entry.mode}" for entry in self._entries)]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    def pristine(self, name: str, parameter: Tensor) -> Tensor:
        """The unpatched bits of a parameter."""
        return self._pristine.get(name, parameter.detach())

    @property
    def memories(self) -> tuple[Memory, ...]:
        """The memories in force, joined by kind and group."""
        return self._memories

    @property
    def memory_inside(self) -> bool:
        """Whether a memory in force acts inside the forward pass, on what it sees of a whole row there."""
        return any(memory.changes == "model" for memory in self._memories)

    def rewrite(self, prompts: Sequence[str]) -> list[str]:
        """See ``ModelHandle.rewrite``."""
        found = list(prompts)
        for change in self._rewrites:
            found = change(found)
        return found

    def refuse_memories(self, what: str) -> None:
        """Raises ``PatchError`` where an applied memory acts inside the forward pass, which ``what`` takes apart."""
        for memory in self._memories:
            if memory.changes == "model":
                raise PatchError(
                    f"{what} runs parts of the model and cannot do so under a {memory.kind!r} memory; undo the memory "
                    "patch, compute, and apply it again"
                )

    @contextmanager
    def aside(self, kind: str, group: Hashable) -> Iterator[None]:
        """Everything applied but the memories of one kind and group, for the length of a ``with``.

        What is added to a memory is computed where the memory itself does not answer. Holds the write lock.
        """
        with self._handle.writing():
            try:
                self._aside = (kind, group)
                self._attach_memories()
                yield
            finally:
                self._aside = None
                self._attach_memories()

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """The pristine model for the length of a ``with``; then everything applied is back, bit for bit.

        Holds the write lock throughout. Nothing may be applied or undone inside.
        """
        with self._handle.writing():
            entries = self._entries
            touched = [
                (self._handle.named_weight(name).parameter, bits) for name, bits in self._pristine.items()
            ]
            patched = [parameter.detach().clone() for parameter, _ in touched]
            try:
                self._entries = []
                for entry in entries:
                    for hook in entry._hooks:
                        hook.remove()
                    entry._hooks.clear()
                self._attach_memories()
                with torch.no_grad():
                    for parameter, bits in touched:
                        parameter.copy_(bits)
                yield
            finally:
                self._entries = entries
                with torch.no_grad():
                    for (parameter, _), bits in zip(touched, patched, strict=True):
                        parameter.copy_(bits)
                for entry in entries:
                    self._hook(entry)
                self._attach_memories()

    def apply(self, patch: WeightPatch, mode: Mode | None, allow_missing_parents: bool) -> Applied:
        """Applies a patch; on any error the model is as before.

        Raises:
            BaseMismatchError: The patch was made for another base.
            MissingParentsError: Its parents are not applied.
            PatchError: A delta does not fit its weight, or is to be merged into a quantised one.
            ConfigError: An unknown mode or parameter.
        """
        if mode not in ("merge", "sidecar", None):
            raise ConfigError(f"unknown mode {mode!r}; use 'merge' or 'sidecar'")
        with self._handle.writing():
            self.check(patch, allow_missing_parents=allow_missing_parents)
            chosen = self.best_mode(patch) if mode is None else mode
            if chosen == "merge":
                self._refuse_quantized(patch)
            return self._enter(Applied(patch, chosen, self, patch.deltas))

    def best_mode(self, patch: WeightPatch) -> Mode:
        """How a patch goes on this model without loss: beside weights that are quantised or in half precision, else into them.

        A patch of something that is no projection has to go into the weights.
        """
        weights = [self._handle.named_weight(name) for name in patch.deltas]
        if any(weight.quantized for weight in weights):
            return "sidecar"
        embedding = self._handle.model.get_input_embeddings().weight
        aside = all(
            weight.held is not embedding and delta.dim == 2 and name.endswith(".weight")
            for weight, (name, delta) in zip(weights, patch.deltas.items(), strict=True)
        )
        narrow = self._handle.dtype in (torch.float16, torch.bfloat16)
        return "sidecar" if narrow and aside else "merge"

    def _refuse_quantized(self, patch: WeightPatch) -> None:
        for name in patch.deltas:
            if self._handle.named_weight(name).quantized:
                raise PatchError(
                    f"the weight {name!r} of {self._handle.name!r} is quantised, so that merging would round the change away; "
                    "apply the patch with mode='sidecar', or load the model without quantisation"
                )

    def check(self, patch: WeightPatch, *, allow_missing_parents: bool = False) -> None:
        """Raises what ``apply`` would raise of a patch that does not belong on this model as it stands."""
        self._check_belongs(patch, allow_missing_parents)
        self._check_shapes(patch)

    def remember(self, patch: MemoryPatch, allow_missing_parents: bool) -> Applied:
        """Applies a memory patch; on any error the model is as before.

        Raises:
            BaseMismatchError: The patch was made for another base.
            MissingParentsError: Its parents are not applied.
        """
        with self._handle.writing():
            self._check_belongs(patch, allow_missing_parents)
            return self._enter(Applied(patch, "memory", self, _memory=patch.memory))

    def _check_belongs(self, patch: WeightPatch | MemoryPatch, allow_missing_parents: bool) -> None:
        handle = self._handle
        if patch.base != handle.fingerprint:
            raise BaseMismatchError(
                f"the patch was made for base {patch.base[:12]}, {handle.name!r} is {handle.fingerprint[:12]}; "
                "apply it to the model it was computed on"
            )
        present = {entry.patch.id for entry in self._entries}
        missing = [parent for parent in patch.parents if parent not in present]
        if missing and not allow_missing_parents:
            raise MissingParentsError(
                f"the patch was computed on top of {', '.join(parent[:12] for parent in missing)}, not applied now; "
                "apply the parents first, or pass allow_missing_parents=True"
            )

    def _enter(self, entry: Applied) -> Applied:
        self._entries.append(entry)
        try:
            self._rebuild(entry)
            self._hook(entry)
            self._attach_memories()
        except BaseException:
            self._remove(entry)
            raise
        return entry

    def _hook(self, entry: Applied) -> None:
        if entry.mode == "sidecar":
            entry._hooks.extend(
                _add_sidecar(self._handle, name, delta) for name, delta in entry._deltas.items()
            )

    def _attach_memories(self) -> None:
        """Puts the memories of all entries in force, in place of those that were."""
        self._attached.close()
        self._memories, self._rewrites = (), ()
        joined: dict[Any, Memory] = {}
        for entry in self._entries:
            if (memory := entry._memory) is not None:
                key = (memory.kind, memory.group)
                joined[key] = joined[key].join(memory) if key in joined else memory
        found = tuple(memory for key, memory in joined.items() if key != self._aside)
        with ExitStack() as attached:
            if any(memory.changes == "model" for memory in found):
                attached.enter_context(self.routing.watching(self._handle.model))
            rewrites = [attached.enter_context(memory.active(self._handle, self.routing)) for memory in found]
            self._attached = attached.pop_all()
        self._memories = found
        self._rewrites = tuple(change for change in rewrites if change is not None)

    def undo(self, entry: Applied) -> UndoReport:
        """Takes one entry off and replays the rest; see ``Applied.undo``."""
        with self._handle.writing():
            if not any(other is entry for other in self._entries):
                raise PatchError(
                    f"patch {entry.patch.id[:12]} is not applied to {self._handle.name!r} (any more)"
                )
            self._remove(entry)
            present = {other.patch.id for other in self._entries}
            if entry.patch.id in present:
                return UndoReport()
            return UndoReport(
                tuple(other.patch.id for other in self._entries if entry.patch.id in other.patch.parents)
            )

    def clear(self) -> None:
        """Takes everything off at once, in time that grows with what is touched and not with its square.

        Raises:
            PatchError: A patched weight was changed behind the handle's back; nothing is taken off then.
        """
        with self._handle.writing():
            touched = {name: self._handle.named_weight(name).parameter for name in self._pristine}
            for name, parameter in touched.items():
                self._check_untouched(name, name, parameter)
            entries, self._entries = self._entries, []
            for entry in entries:
                for hook in entry._hooks:
                    hook.remove()
                entry._hooks.clear()
            with torch.no_grad():
                for name, parameter in touched.items():
                    parameter.copy_(self._pristine[name])
            self._pristine.clear()
            self._written.clear()
            self._attach_memories()

    def _remove(self, entry: Applied) -> None:
        self._entries = [other for other in self._entries if other is not entry]
        for hook in entry._hooks:
            hook.remove()
        entry._hooks.clear()
        self._rebuild(entry)
        self._attach_memories()

    def _check_shapes(self, patch: WeightPatch) -> None:
        for name, delta in patch.deltas.items():
            weight = self._handle.named_weight(name)
            plain = not weight.quantized and weight.parameter.dim() != 2
            expected = tuple(weight.parameter.shape) if plain else weight.shape
            if tuple(delta.shape) != expected:
                raise PatchError(
                    f"the delta of {name!r} has shape {tuple(delta.shape)}, the weight has {expected}"
                )

    def _rebuild(self, changed: Applied) -> None:
        """Writes pristine bits plus the merged deltas, in order, into every tensor that the changed entry touches."""
        if changed.mode == "sidecar":
            # It acts beside the weights, which hold what they held.
            return
        # Looked up once: a long sequence holds thousands of deltas of a few weights.
        names = {other for entry in self._entries if entry.mode == "merge" for other in entry._deltas}
        for name in changed._deltas:
            weight = self._handle.named_weight(name)
            if weight.quantized:
                # Nothing is ever merged into it.
                continue
            key = self._canonical_name(weight.parameter, name)
            alike = {other for other in names if self._handle.named_weight(other).held is weight.held}
            merged = [
                delta
                for entry in self._entries
                if entry.mode == "merge"
                for other, delta in entry._deltas.items()
                if other in alike
            ]
            if not merged and key not in self._pristine:
                continue
            self._check_untouched(key, name, weight.parameter)
            pristine = self._pristine.get(key)
            if pristine is None:
                pristine = self._pristine[key] = weight.parameter.detach().clone()
            if not merged:
                with torch.no_grad():
                    weight.parameter.copy_(pristine)
                del self._pristine[key]
                self._written.pop(key, None)
                continue
            wide = torch.promote_types(pristine.dtype, torch.float32)
            total = pristine
            if (
                wide == pristine.dtype
                and key in self._written
                and self._entries[-1] is changed
                and merged[-1] is changed._deltas[name]
                and sum(any(delta is own for own in changed._deltas.values()) for delta in merged) == 1
            ):
                # On top of everything, in a weight that holds every sum unrounded: the bits are those of a replay.
                total, merged = weight.parameter.detach(), merged[-1:]
            for place, delta in enumerate(merged):
                change = delta.stored(weight.transposed).to(device=total.device, dtype=wide)
                # The first sum makes a tensor of its own; nothing is written before all is known to be finite.
                total = total + change if place == 0 else total.add_(change)
            # Checked after rounding: a finite fp32 sum can overflow in fp16.
            rounded = total.to(pristine.dtype)
            if not _all_finite(rounded):
                raise NumericalError(f"the patched weight {name!r} would hold NaN or infinity")
            with torch.no_grad():
                weight.parameter.copy_(rounded)
            self._written[key] = _digest(weight.parameter)

    def _canonical_name(self, parameter: nn.Parameter, name: str) -> str:
        # Tied weights answer to two names; named_parameters lists the first. It walks the whole model, so it is asked once.
        known = self._names.get(name)
        if known is None or known[0] is not parameter:
            parameters = self._handle.model.named_parameters()
            first = next((known for known, other in parameters if other is parameter), name)
            known = self._names[name] = (parameter, first)
        return known[1]

    def _check_untouched(self, key: str, name: str, parameter: nn.Parameter) -> None:
        """Refuses to write over bits that somebody else wrote: they would be lost without a word."""
        if key in self._written and self._written[key] != _digest(parameter):
            raise PatchError(
                f"the weight {name!r} of {self._handle.name!r} was changed behind the handle's back; reload the model"
            )


def _all_finite(tensor: Tensor) -> bool:
    # No finite sum holds NaN or infinity; a sum that overflows asks again.
    return bool(torch.isfinite(tensor.sum())) or bool(torch.isfinite(tensor).all())


def _digest(tensor: Tensor) -> str:
    """Of a tensor's bits: twenty times cheaper than hashing them all, for it is taken twice with every patch.

    The bits are put into a square of 64-bit words, whose sums of rows and of columns (modulo 2^64) are hashed. No single change
    escapes, nor an exchange of rows or columns; it guards against accidents and not against forgery.
    """
    data = tensor.detach().contiguous().cpu().reshape(-1).view(torch.uint8).numpy()
    words = len(data) // 8
    side = max(1, math.isqrt(words))
    square = data[: words // side * side * 8].view(np.int64).reshape(-1, side)
    rest = data[square.size * 8 :]
    parts = (square.sum(axis=0), square.sum(axis=1), rest)
    return hashlib.blake2b(b"".join(part.tobytes() for part in parts), digest_size=16).hexdigest()


def _add_sidecar(handle: ModelHandle, name: str, delta: Delta) -> Any:
    """Adds ``delta`` to a projection's output in the forward pass; returns the hook."""
    path, _, leaf = name.rpartition(".")
    module = handle.model.get_submodule(path)
    if leaf != "weight" or isinstance(module, nn.Embedding) or delta.dim != 2:
        raise PatchError(f"{name!r} is not the weight of a projection; only mode='merge' can patch it")
    term = delta.as_term(handle.device)

    def hook(_module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        return output + term(args[0]).to(output.dtype)

    return module.register_forward_hook(hook)
