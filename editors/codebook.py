"""GRACE's memory: a log of edits at one projection, and the codebook that replaying it gives.

A key is what the projection reads at a prompt's last token, a value replaces its output. A prompt whose last token lies within
a key's radius gets that key's value; all others pass unchanged. Radii are not stored: they follow from replaying the logs of
all patches that are applied, so that taking one off leaves what the others alone would give.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from editors.memory import Projection, projection_role
from lab.handle import ModelHandle
from lab.patch import keep
from lab.routing import Pass, Routing
from lab.stack import Rewrite

Replacement = Literal["last", "prompt", "all"]

SPLIT_MARGIN = 1e-5
"""What the older of two keys keeps away from the middle between them."""
SAME_KEY = 1e-4
"""Keys closer than this share of their length are one prompt, read twice."""


@dataclass(frozen=True, eq=False)
class Codebook:
    """Keys in force, after all edits of a log.

    Attributes:
        keys: ``[key, in]``.
        radii: One per key.
        labels: Per key, the target's tokens.
        source: Per key, the log entry whose value it gives.
    """

    keys: Tensor
    radii: tuple[float, ...] = ()
    labels: tuple[tuple[int, ...], ...] = ()
    source: tuple[int, ...] = ()

    def with_edit(
        self, key: Tensor, label: tuple[int, ...], epsilon: float, entry: int
    ) -> tuple[Codebook, int]:
        """The codebook after one more edit, and which key the edit's value belongs to.

        Args:
            key: ``[in]``.
            label: Tokens of the target.
            epsilon: Radius of a new key.
            entry: The edit's place in the log.
        """
        radii, labels, source = list(self.radii), list(self.labels), list(self.source)
        near, distance = -1, math.inf
        if radii:
            distances = torch.linalg.vector_norm(self.keys - key, dim=1)
            near = int(distances.argmin())
            distance = float(distances[near])
        joins = bool(radii) and distance <= epsilon + radii[near]
        if joins and (labels[near] == label or distance <= SAME_KEY * float(torch.linalg.vector_norm(key))):
            radii[near], labels[near], source[near] = max(radii[near], distance), label, entry
            return Codebook(self.keys, tuple(radii), tuple(labels), tuple(source)), near
        if joins:
            radii[near] = distance / 2 - SPLIT_MARGIN
        radii.append(distance / 2 if joins else epsilon)
        keys = torch.cat([self.keys, key[None]])
        return Codebook(keys, tuple(radii), (*labels, label), (*source, entry)), len(source)

    def nearest(self, queries: Tensor) -> Tensor:
        """Which key answers each query: ``[query]`` of int64, -1 where none does.

        Args:
            queries: ``[query, in]``.
        """
        queries = queries.to(self.keys.dtype)
        distances = torch.cdist(queries, self.keys, compute_mode="donot_use_mm_for_euclid_dist")
        smallest, index = distances.min(dim=1)
        reach = torch.tensor(self.radii, dtype=self.keys.dtype, device=self.keys.device)[index]
        return torch.where(smallest <= reach, index, -1)


@dataclass(frozen=True, eq=False)
class GraceMemory:
    """A log of edits at one projection; see ``lab.memory.Memory``.

    Attributes:
        layer: Block.
        projection: ``mlp_out`` or ``mlp_in``.
        replacement: Which tokens get a value.
        keys: ``[edit, in]``, in the order of the edits.
        values: ``[edit, out]``.
        ids: Per edit, its request.
        labels: Per edit, the target's tokens.
        epsilons: Per edit, the radius it starts with.
    """

    kind: ClassVar[str] = "grace"
    changes: ClassVar[Literal["model", "prompts"]] = "model"

    layer: int
    projection: Projection
    replacement: Replacement
    keys: Tensor
    values: Tensor
    ids: tuple[str, ...]
    labels: tuple[tuple[int, ...], ...]
    epsilons: tuple[float, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "keys", keep(self.keys))
        object.__setattr__(self, "values", keep(self.values))
        counts = {len(part) for part in (self.keys, self.values, self.ids, self.labels, self.epsilons)}
        if len(counts) != 1:
            raise ValueError(f"keys, values, ids, labels and radii differ in number: {sorted(counts)}")

    @property
    def group(self) -> tuple[int, Projection, Replacement]:
        """Layer, projection and replacement."""
        return (self.layer, self.projection, self.replacement)

    def join(self, other: GraceMemory) -> GraceMemory:
        """Both logs, one after the other."""
        return GraceMemory(
            *self.group,
            torch.cat([self.keys, other.keys]),
            torch.cat([self.values, other.values]),
            self.ids + other.ids,
            self.labels + other.labels,
            self.epsilons + other.epsilons,
        )

    def codebook(self) -> Codebook:
        """Keys and radii after all edits."""
        book = Codebook(self.keys[:0])
        for entry, (key, label, epsilon) in enumerate(
            zip(self.keys, self.labels, self.epsilons, strict=True)
        ):
            book, _ = book.with_edit(key, label, epsilon, entry)
        return book

    @contextmanager
    def active(self, handle: ModelHandle, routing: Routing) -> Iterator[Rewrite | None]:
        """Answers through the codebook inside the ``with``."""
        module = handle.module(projection_role(self.projection), self.layer)
        place = handle.device
        book = self.codebook()
        values = self.values[list(book.source)].to(place)
        book = Codebook(book.keys.to(place), book.radii, book.labels, book.source)
        owner = object()

        def hook(_module: Any, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            now = routing.now()
            if now.prompt_last is not None:
                lines = torch.arange(len(now.prompt_last), device=now.prompt_last.device)
                now.latched[owner] = book.nearest(now.shaped(args[0])[lines, now.prompt_last].detach())
            chosen = now.decision(owner)
            where = replaced(now, self.replacement) & (chosen >= 0)[:, None]
            shaped = now.shaped(output)
            value = values[chosen.clamp_min(0)][:, None].to(shaped.dtype)
            return torch.where(where[..., None], value, shaped).reshape(output.shape)

        hooked = module.register_forward_hook(hook)
        try:
            yield None
        finally:
            hooked.remove()

    def tensors(self) -> dict[str, Tensor]:
        """Keys and values."""
        return {"keys": self.keys, "values": self.values}

    def settings(self) -> dict[str, Any]:
        """Place and log."""
        log = zip(self.ids, self.labels, self.epsilons, strict=True)
        return {
            "layer": self.layer,
            "projection": self.projection,
            "replacement": self.replacement,
            "edits": [{"id": name, "label": list(label), "epsilon": eps} for name, label, eps in log],
        }

    @classmethod
    def restore(cls, tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> GraceMemory:
        """See ``lab.memory.Memory``."""
        edits = settings["edits"]
        return cls(
            int(settings["layer"]),
            settings["projection"],
            settings["replacement"],
            tensors["keys"],
            tensors["values"],
            tuple(str(edit["id"]) for edit in edits),
            tuple(tuple(int(token) for token in edit["label"]) for edit in edits),
            tuple(float(edit["epsilon"]) for edit in edits),
        )


def replaced(now: Pass, replacement: Replacement) -> Tensor:
    """``[batch, pos]`` bool, the tokens that get a value."""
    if replacement == "all":
        return now.mask
    return now.prompt if replacement == "prompt" else now.at_prompt_last
