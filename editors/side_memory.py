"""WISE's memory: changes of one projection that stand beside it, and the rule that sends a prompt to one of them.

A side memory is the projection with a delta on its weight. A prompt goes to the side memory that moves the projection's
activation most, where it moves it more than that memory's threshold, and through the projection as it is otherwise. The choice
is made over the prompt's tokens and holds for what follows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from editors.memory import Projection, projection_role
from lab.errors import ConfigError
from lab.handle import ModelHandle
from lab.patch import keep
from lab.routing import Routing
from lab.stack import Rewrite

Activation = Callable[[Tensor], Tensor]


def activation_name(handle: ModelHandle) -> str:
    """The name of the MLP's activation function, as the model's config gives it.

    Raises:
        ConfigError: The config names none.
    """
    settings = handle.config.to_dict()
    # Families spell the same setting in three ways.
    for key in ("hidden_activation", "hidden_act", "activation_function"):
        if isinstance(settings.get(key), str):
            return settings[key]
    raise ConfigError(f"the config of {handle.name!r} names no activation function")


def activation_of(name: str) -> Activation:
    """The function of that name."""
    from transformers.activations import ACT2FN

    return ACT2FN[name]


def shifted(inputs: Tensor, output: Tensor, delta: Tensor) -> Tensor:
    """A projection's output with a delta on its weight, computed in fp32 or wider and not rounded.

    Args:
        inputs: ``[batch, pos, in]``.
        output: ``[batch, pos, out]``, the projection's own, with its bias.
        delta: ``[out, in]``.
    """
    wide = torch.promote_types(torch.promote_types(output.dtype, delta.dtype), torch.float32)
    return output.to(wide) + inputs.to(wide) @ delta.to(wide).T


def activation_distance(activation: Activation, output: Tensor, side: Tensor, tokens: Tensor) -> Tensor:
    """How far a side memory moves the activations of each row: ``[batch]``, the mean over its tokens.

    Args:
        activation: f.
        output: ``[batch, pos, out]``.
        side: The same of the side memory.
        tokens: ``[batch, pos]`` bool, the tokens that count; at least one per row.
    """
    moved = torch.linalg.vector_norm(activation(side) - activation(output.to(side.dtype)), dim=-1)
    return torch.where(tokens, moved, 0.0).sum(dim=1) / tokens.sum(dim=1)


def ties(deltas: Tensor, density: float) -> Tensor:
    """Merges deltas (TIES, Yadav et al. 2023, arXiv 2306.01708): trim, elect a sign, average what agrees with it.

    Args:
        deltas: ``[memory, out, in]``.
        density: Share of each delta's entries that is kept, those of largest magnitude.

    Returns:
        ``[out, in]``.
    """
    flat = deltas.flatten(start_dim=1)
    count = max(1, int(density * flat.shape[1]))
    kept = torch.zeros_like(flat).scatter(1, flat.abs().topk(count, dim=1).indices, 1.0) * flat
    elected = torch.where(kept.sum(dim=0) >= 0, 1.0, -1.0).to(kept.dtype)
    agrees = (kept.sign() == elected).to(kept.dtype)
    merged = (kept * agrees).sum(dim=0) / agrees.sum(dim=0).clamp_min(1)
    return merged.reshape(deltas.shape[1:])


@dataclass(frozen=True, eq=False)
class WiseMemory:
    """Side memories of one projection; see ``lab.memory.Memory``.

    Attributes:
        layer: Block.
        projection: ``mlp_out`` or ``mlp_in``.
        activation: Name of f.
        deltas: ``[memory, out, in]`` in canonical orientation.
        thresholds: Per memory, the distance from which on it answers.
        ids: Per memory, the requests in it.
    """

    kind: ClassVar[str] = "wise"
    changes: ClassVar[Literal["model", "prompts"]] = "model"

    layer: int
    projection: Projection
    activation: str
    deltas: Tensor
    thresholds: tuple[float, ...]
    ids: tuple[tuple[str, ...], ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "deltas", keep(self.deltas))
        if not len(self.deltas) == len(self.thresholds) == len(self.ids):
            raise ValueError("deltas, thresholds and ids differ in number")

    @property
    def group(self) -> tuple[int, Projection, str]:
        """Layer, projection and activation."""
        return (self.layer, self.projection, self.activation)

    def join(self, other: WiseMemory) -> WiseMemory:
        """The side memories of both, beside each other."""
        deltas = torch.cat([self.deltas, other.deltas])
        thresholds = self.thresholds + other.thresholds
        return WiseMemory(*self.group, deltas, thresholds, self.ids + other.ids)

    @contextmanager
    def active(self, handle: ModelHandle, routing: Routing) -> Iterator[Rewrite | None]:
        """Sends prompts to the side memories inside the ``with``."""
        module = handle.module(projection_role(self.projection), self.layer)
        deltas = self.deltas.to(handle.device)
        owner = object()

        def hook(_module: Any, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            now = routing.now()
            inputs, own = now.shaped(args[0]), now.shaped(output)
            if now.prompt_last is not None:
                now.latched[owner] = self.route(inputs, own, now.prompt, deltas)
            chosen = now.decision(owner)
            found = own
            for memory in chosen[chosen >= 0].unique().tolist():
                rows = (chosen == memory).nonzero()[:, 0]
                side = shifted(inputs[rows], own[rows], deltas[memory])
                found = found.index_copy(0, rows, side.to(own.dtype))
            return found.reshape(output.shape)

        hooked = module.register_forward_hook(hook)
        try:
            yield None
        finally:
            hooked.remove()

    def route(self, inputs: Tensor, output: Tensor, prompt: Tensor, deltas: Tensor) -> Tensor:
        """Which side memory answers each row: ``[batch]`` of int64, -1 where none does.

        Args:
            inputs: ``[batch, pos, in]``.
            output: ``[batch, pos, out]``.
            prompt: ``[batch, pos]`` bool.
            deltas: ``self.deltas`` where the model runs.
        """
        function = activation_of(self.activation)
        with torch.no_grad():
            distances = torch.stack(
                [
                    activation_distance(function, output, shifted(inputs, output, delta), prompt)
                    for delta in deltas
                ]
            )
            limits = torch.tensor(self.thresholds, dtype=distances.dtype, device=distances.device)
            reached = distances.masked_fill(distances < limits[:, None], -torch.inf)
            best, memory = reached.max(dim=0)
            return torch.where(best > -torch.inf, memory, -1)

    def tensors(self) -> dict[str, Tensor]:
        """The deltas."""
        return {"deltas": self.deltas}

    def settings(self) -> dict[str, Any]:
        """Place, thresholds and requests."""
        memories = zip(self.thresholds, self.ids, strict=True)
        return {
            "layer": self.layer,
            "projection": self.projection,
            "activation": self.activation,
            "memories": [{"threshold": limit, "ids": list(names)} for limit, names in memories],
        }

    @classmethod
    def restore(cls, tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> WiseMemory:
        """See ``lab.memory.Memory``."""
        memories: Sequence[Mapping[str, Any]] = settings["memories"]
        return cls(
            int(settings["layer"]),
            settings["projection"],
            str(settings["activation"]),
            tensors["deltas"],
            tuple(float(each["threshold"]) for each in memories),
            tuple(tuple(str(name) for name in each["ids"]) for each in memories),
        )
