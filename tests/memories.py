"""Two plain kinds of memory, so that patches of memories are tested without a method."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, ClassVar, Literal

import pytest
import torch
from torch import Tensor

from lab.arch import Role
from lab.handle import ModelHandle


@dataclass(frozen=True, eq=False)
class Nudge:
    """Adds vectors to one MLP output from the last prompt token on, in rows where that token's activation says so.

    Attributes:
        layer: Block.
        vectors: ``[entry, d]``.
        limits: Per entry: it answers a row whose last prompt token has a first coordinate above its limit.
    """

    layer: int
    vectors: Tensor
    limits: tuple[float, ...]
    kind: ClassVar[str] = "nudge"
    changes: ClassVar[Literal["model", "prompts"]] = "model"

    @property
    def group(self) -> int:
        return self.layer

    def join(self, other: Nudge) -> Nudge:
        return Nudge(self.layer, torch.cat([self.vectors, other.vectors]), self.limits + other.limits)

    @contextmanager
    def active(self, handle: ModelHandle, routing: Any):
        limits = torch.tensor(self.limits)

        def hook(_module, _args, output):
            now = routing.now()
            value = now.shaped(output)
            if now.prompt_last is not None:
                rows = torch.arange(len(now.prompt_last))
                now.latched[self] = value[rows, now.prompt_last, 0][:, None] > limits
            added = now.latched[self].to(value.dtype) @ self.vectors.to(value.dtype)
            start = torch.zeros(len(added), dtype=torch.long) if now.prompt_last is None else now.prompt_last
            where = torch.arange(value.shape[1]) >= start[:, None]
            return (value + where[..., None] * added[:, None]).reshape(output.shape)

        hooked = handle.module(Role.MLP_OUT, self.layer).register_forward_hook(hook)
        try:
            yield None
        finally:
            hooked.remove()

    def tensors(self) -> dict[str, Tensor]:
        return {"vectors": self.vectors}

    def settings(self) -> dict[str, Any]:
        return {"layer": self.layer, "limits": list(self.limits)}

    @classmethod
    def restore(cls, tensors, settings) -> Nudge:
        return cls(settings["layer"], tensors["vectors"], tuple(settings["limits"]))


@dataclass(frozen=True)
class Before:
    """Puts texts before every prompt."""

    texts: tuple[str, ...]
    kind: ClassVar[str] = "before"
    changes: ClassVar[Literal["model", "prompts"]] = "prompts"
    group: None = None

    def join(self, other: Before) -> Before:
        return Before(self.texts + other.texts)

    @contextmanager
    def active(self, handle: ModelHandle, routing: Any):
        yield lambda prompts: ["".join(self.texts) + prompt for prompt in prompts]

    def tensors(self) -> dict[str, Tensor]:
        return {}

    def settings(self) -> dict[str, Any]:
        return {"texts": list(self.texts)}

    @classmethod
    def restore(cls, tensors, settings) -> Before:
        return cls(tuple(settings["texts"]))


def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes both kinds known, as another distribution would by its entry points."""
    points = [
        SimpleNamespace(name="nudge", value="tests.memories:Nudge"),
        SimpleNamespace(name="before", value="tests.memories:Before"),
    ]
    monkeypatch.setattr(
        "lab.registry.entry_points", lambda group: points if group == "knowlab.memories" else []
    )
