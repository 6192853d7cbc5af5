"""Where a prompt ends: what memory patches decide on, and that they decide once.

A memory (a codebook, a side memory) decides at the end of a prompt whether it answers, row by row. The tokens that follow are
answered under the same decision: in a full pass because the batch says where its prompts end, in cached decoding because the
decision is kept with the cache.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from lab.errors import PatchError

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True, eq=False)
class Pass:
    """One forward pass of a model, as its memories see it.

    Attributes:
        input_ids: ``[batch, pos]``, the tokens fed in this pass; ``None`` where embeddings are fed.
        mask: ``[batch, pos]`` bool, real tokens.
        prompt_last: ``[batch]``, column of the last prompt token; ``None`` in a pass that continues from a cache.
        latched: What memories decided when the prompts were fed, by memory; one dictionary for a whole decoding.
    """

    input_ids: Tensor | None
    mask: Tensor
    prompt_last: Tensor | None
    latched: dict[Any, Any] = field(default_factory=dict)

    @property
    def prompt(self) -> Tensor:
        """``[batch, pos]`` bool, the prompts' tokens; false throughout in a pass that continues from a cache."""
        if self.prompt_last is None:
            return torch.zeros_like(self.mask)
        columns = torch.arange(self.mask.shape[1], device=self.mask.device)
        return self.mask & (columns <= self.prompt_last[:, None])

    @property
    def at_prompt_last(self) -> Tensor:
        """``[batch, pos]`` bool, the last prompt token of each row; false throughout in a pass that continues."""
        if self.prompt_last is None:
            return torch.zeros_like(self.mask)
        columns = torch.arange(self.mask.shape[1], device=self.mask.device)
        return columns == self.prompt_last[:, None]

    def decision(self, memory: Any) -> Any:
        """What ``memory`` latched when the prompts were fed.

        Raises:
            PatchError: Nothing: patches were applied or undone since then.
        """
        if memory not in self.latched:
            raise PatchError(
                "patches were applied or undone in the middle of a decoding; feed the prompts again"
            )
        return self.latched[memory]

    def shaped(self, value: Tensor) -> Tensor:
        """An activation as ``[batch, pos, d]``, also where a family flattens batch and positions (OPT's MLP)."""
        return value.reshape(*self.mask.shape, value.shape[-1])


class Routing:
    """Tells memories which pass is running; one per handle. Each thread sees its own passes."""

    def __init__(self) -> None:
        self._local = threading.local()
        self._kept: WeakKeyDictionary[Any, Pass] = WeakKeyDictionary()

    @contextmanager
    def prompts(self, last: Tensor | None) -> Iterator[None]:
        """Says where the prompts of the passes inside the ``with`` end.

        Args:
            last: ``[batch]`` column of each row's last prompt token; ``None``: its last real token.
        """
        before = self._expected()
        self._local.expected = last
        try:
            yield
        finally:
            self._local.expected = before

    def now(self) -> Pass:
        """The pass that is running in this thread.

        Raises:
            PatchError: None is; a memory's hook was reached without the model's own forward.
        """
        running: Pass | None = self._local.__dict__.get("running")
        if running is None:
            raise PatchError(
                "a memory patch was reached outside the model's forward pass; run the whole model, or undo the patch"
            )
        return running

    @contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        """Follows the passes of ``model`` for the length of a ``with``."""

        def enter(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._local.running = self._entered(args, kwargs)

        def leave(_module: nn.Module, _args: Any, _kwargs: Any, output: Any) -> None:
            cache = output.get("past_key_values") if isinstance(output, Mapping) else None
            if cache is not None:
                self._kept[cache] = self.now()
            self._local.running = None

        hooks = []
        try:
            hooks.append(model.register_forward_pre_hook(enter, with_kwargs=True))
            hooks.append(model.register_forward_hook(leave, with_kwargs=True))
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _expected(self) -> Tensor | None:
        return self._local.__dict__.get("expected")

    def _entered(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Pass:
        ids = kwargs.get("input_ids", args[0] if args else None)
        fed = ids if ids is not None else kwargs["inputs_embeds"]
        rows, width = fed.shape[:2]
        mask = kwargs.get("attention_mask")
        if mask is None:
            mask = torch.ones(rows, width, device=fed.device)
        if mask.dim() != 2:
            raise PatchError("a memory patch needs a plain attention mask [batch, pos]")
        mask = mask[:, -width:].bool()
        cache = kwargs.get("past_key_values")
        if cache is None or cache.get_seq_length() == 0:
            last = self._expected()
            if last is None:
                last = (mask * torch.arange(width, device=mask.device)).argmax(dim=1)
            return Pass(ids, mask, last)
        first = self._kept.get(cache)
        if first is None or first.mask.shape[0] != rows:
            raise PatchError(
                "a memory patch is applied, and this pass continues from a cache whose prompts it has not seen; "
                "feed the prompts first, or undo the memory patch for this computation"
            )
        return Pass(ids, mask, None, first.latched)
