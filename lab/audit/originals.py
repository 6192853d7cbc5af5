"""The model before the change, as a second handle or as the audited one with its patches set aside, and the change itself."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lab.errors import ConfigError
from lab.patch import Delta, Dense, LowRank, Provenance, WeightPatch, keep

if TYPE_CHECKING:
    from lab.audit.base import AuditSubject
    from lab.handle import ModelHandle


@dataclass(frozen=True, eq=False)
class Original:
    """The model before the change.

    Attributes:
        handle: Where it runs; it is the original only inside ``there()``.
        aside: Whether it is the audited handle itself, whose patches are set aside.
    """

    handle: ModelHandle
    aside: bool

    def there(self) -> AbstractContextManager[Any]:
        """Inside the ``with``, ``handle`` is the original."""
        return self.handle.stack.suspended() if self.aside else nullcontext()

    def bits(self, name: str) -> Tensor:
        """The original's parameter in canonical orientation."""
        weight = self.handle.named_weight(name)
        if not self.aside:
            return weight.canonical()
        data = self.handle.stack.pristine(name, weight.parameter)
        return data.T if weight.transposed else data

    @contextmanager
    def under(self, change: WeightPatch, control: WeightPatch) -> Iterator[None]:
        """Inside the ``with``, ``handle`` is the original under ``control``.

        Args:
            change: What the audited model differs by (``change_of``); taken off where the handle carries it.
            control: What is put on instead.
        """
        swap = change.scaled(-1.0) + control if self.aside else control
        with swap.applied(self.handle):
            yield


def original_of(subject: AuditSubject) -> Original | None:
    """The model before the change: ``base``, else the handle without its patches, else there is none."""
    if subject.base is not None:
        return Original(subject.base, aside=False)
    return Original(subject.handle, aside=True) if subject.handle.applied else None


@torch.no_grad()
def change_of(handle: ModelHandle, original: Original) -> WeightPatch:
    """What turns the original's weights into those of ``handle``, read from the weights and not from any patch file.

    Patches that work beside a weight count as if they were added to it; memories are no change of weights.

    Raises:
        ConfigError: The two models do not have the same parameters.
    """
    beside: dict[str, list[Delta]] = {}
    for entry in handle.applied:
        if entry.mode == "sidecar" and isinstance(entry.patch, WeightPatch):
            for name, delta in entry.patch.deltas.items():
                beside.setdefault(name, []).append(delta)
    theirs = {name: tuple(each.shape) for name, each in original.handle.model.named_parameters()}
    deltas: dict[str, Delta] = {}
    for name, parameter in handle.model.named_parameters():
        if theirs.get(name) != tuple(parameter.shape):
            raise ConfigError(
                f"{handle.name!r} and {original.handle.name!r} differ in the parameter {name!r}: only models of one "
                "architecture and size can be compared"
            )
        mine, before = handle.named_weight(name).canonical(), original.bits(name)
        extra = beside.get(name, [])
        if torch.equal(mine, before.to(mine)) and len(extra) == 1 and isinstance(extra[0], LowRank):
            deltas[name] = extra[0]
        elif extra or not torch.equal(mine, before.to(mine)):
            total = keep(mine) - keep(before)
            for delta in extra:
                total = total + delta.dense()
            deltas[name] = Dense(total)
    return WeightPatch(original.handle.fingerprint, deltas, Provenance("difference of two models"))
