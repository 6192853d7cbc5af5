"""Many patches in one forward pass: every row of a batch carries a low-rank patch of its own, and no weight is written.

A projection under a patch gives ``W x + B (A x)``. Rows share ``W x``; the second term is one batched product with the factors
of each row's own patch, which costs next to nothing. So a hundred independent edits are measured in as many passes as one
patch would need with a hundred times the rows, without a weight being added to and restored in between.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lab.arch import Role
from lab.errors import ConfigError, PatchError
from lab.patch import LowRank, WeightPatch

if TYPE_CHECKING:
    from lab.handle import ModelHandle

NOBODY = -1
"""Owner of a row that runs on the model as it is."""


def rowwise_obstacle(handle: ModelHandle, patches: Sequence[Any]) -> str:
    """Why these patches cannot share a pass row by row, or an empty text.

    They can where each is a low-rank patch of projections and all name the same parameters: ROME, MEMIT and their kin with
    one request each, LoRA adapters of one shape. Embeddings, and heads that are tied to them, have no row of their own.
    """
    names: set[str] | None = None
    for patch in patches:
        if not isinstance(patch, WeightPatch):
            return f"{type(patch).__name__} is no weight patch"
        if names is not None and set(patch.deltas) != names:
            return "the patches change different parameters"
        names = set(patch.deltas)
        for name, delta in patch.deltas.items():
            if not isinstance(delta, LowRank):
                return f"the delta of {name!r} is not low-rank"
    for name in names or ():
        path, _, leaf = name.rpartition(".")
        shared = handle.named_weight(name).held is handle.module(Role.EMBED).get_parameter("weight")
        if leaf != "weight" or shared or isinstance(handle.model.get_submodule(path), nn.Embedding):
            return f"{name!r} is not the weight of a projection of its own"
    return ""


class RowPatches:
    """Patches of one model, ready to be carried by single rows.

    Args:
        handle: The model, with whatever is applied to it.
        patches: Low-rank patches of the same projections; each must fit the model as it stands.

    Raises:
        PatchError: The patches cannot share a pass (``rowwise_obstacle`` says why), or one does not fit the model.

    Example:
        >>> rows = RowPatches(handle, [first, second])
        >>> with rows.carried([0, 0, 1, NOBODY]):
        ...     logits = handle.logits(batch_of_four)
    """

    def __init__(self, handle: ModelHandle, patches: Sequence[WeightPatch]) -> None:
        reason = rowwise_obstacle(handle, patches)
        if reason or not patches:
            raise PatchError(f"these patches cannot run row by row: {reason or 'there is none'}")
        for patch in patches:
            handle.stack.check(patch)
        self._handle = handle
        self._count = len(patches)
        self._factors = {
            name: _stacked([patch.deltas[name] for patch in patches], handle.device)
            for name in patches[0].deltas
        }

    def __len__(self) -> int:
        return self._count

    @contextmanager
    def carried(self, owners: Sequence[int]) -> Iterator[None]:
        """Inside the ``with``, row ``i`` of every batch runs under patch ``owners[i]``.

        Holds the write lock: until the end the model answers for these rows only.

        Args:
            owners: For each row, the index of its patch, or ``NOBODY``.

        Raises:
            ConfigError: There is no such patch; from inside a forward pass, the batch has another number of rows.
        """
        if any(not NOBODY <= owner < self._count for owner in owners):
            raise ConfigError(f"row owners must lie between {NOBODY} and {self._count - 1}")
        # The last slot holds zeros, which is what the index -1 picks.
        index = torch.tensor(list(owners), dtype=torch.long, device=self._handle.device) % (self._count + 1)
        with self._handle.writing(), ExitStack() as cleanup:
            for name, (left, right) in self._factors.items():
                module = self._handle.model.get_submodule(name.rpartition(".")[0])
                term = _hook(right[index].transpose(1, 2), left[index].transpose(1, 2))
                cleanup.callback(module.register_forward_hook(term).remove)
            yield


def _stacked(deltas: Sequence[Any], device: torch.device) -> tuple[Tensor, Tensor]:
    """Left ``[patch + 1, out, r]`` and right ``[patch + 1, r, in]``, padded with zeros to one rank; the last slot is zero."""
    rank, (out, into) = max(delta.rank for delta in deltas), deltas[0].shape
    dtype = deltas[0].left.dtype
    left = torch.zeros(len(deltas) + 1, out, rank, dtype=dtype)
    right = torch.zeros(len(deltas) + 1, rank, into, dtype=dtype)
    for number, delta in enumerate(deltas):
        left[number, :, : delta.rank] = delta.left
        right[number, : delta.rank] = delta.right
    return left.to(device), right.to(device)


def _hook(right: Tensor, left: Tensor) -> Any:
    """A hook that adds each row's term; ``right [row, in, r]``, ``left [row, r, out]``."""

    def hook(_module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        x, rows = args[0], right.shape[0]
        if x.shape[0] != rows and (x.dim() > 2 or x.shape[0] % rows):
            raise ConfigError(f"{rows} row owners were given for a batch of {x.shape[0]} rows")
        wide = torch.promote_types(x.dtype, torch.float32)
        # OPT feeds its MLP [batch*pos, d].
        shaped = x.to(wide).reshape(rows, -1, x.shape[-1])
        term = torch.bmm(torch.bmm(shaped, right.to(wide)), left.to(wide))
        return output + term.reshape(output.shape).to(output.dtype)

    return hook
