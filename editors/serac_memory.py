"""What SERAC keeps: edits as texts, a classifier that says which prompts they are about, and an adapter that reads them.

A prompt that the classifier finds within the scope of an edit is asked with the edit above it, and the rows of the batch that
carry an edit run with the adapter on: base and adapter together are the counterfactual model. All other rows are the base's own.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor

from lab.embeddings import Embedder
from lab.patch import LowRank

if TYPE_CHECKING:
    from lab.handle import ModelHandle
    from lab.routing import Pass, Routing
    from lab.stack import Rewrite

HEADER = "New fact: "


def header(statement: str) -> str:
    """The line that stands above a prompt."""
    return f"{HEADER}{statement.rstrip('.')}."


def above(statement: str, prompt: str) -> str:
    """A prompt with an edit above it, as the counterfactual model reads it."""
    return f"{header(statement)}\n{prompt}"


@dataclass(frozen=True, eq=False)
class Scope:
    """Similarity of a prompt to an edit's prompt: ``exp(−s · |M (e(q) − e(k))|²)`` over frozen embeddings e.

    Attributes:
        map: M, ``[width, width]``.
        log_scale: ``log s``, a scalar.
    """

    map: Tensor
    log_scale: Tensor

    @classmethod
    def start(cls, width: int) -> Scope:
        """Before training: distances as they are, with the border at a squared distance of one half (a cosine of 3/4)."""
        return cls(torch.eye(width), torch.tensor(math.log(2 * math.log(2))))

    def log_similarity(self, queries: Tensor, keys: Tensor) -> Tensor:
        """``[query, key]``, at most 0.

        Args:
            queries: ``[query, width]``.
            keys: ``[key, width]``.
        """
        gaps = (queries[:, None] - keys[None]) @ self.map.T
        return -self.log_scale.exp() * gaps.square().sum(dim=-1)


@dataclass(frozen=True)
class Entry:
    """One edit.

    Attributes:
        id: Of its request.
        prompt: The filled prompt; what others are compared with.
        statement: Prompt and target.
    """

    id: str
    prompt: str
    statement: str


@dataclass(frozen=True, eq=False)
class SeracMemory:
    """See the module, and ``lab.memory.Memory`` for the protocol.

    Attributes:
        entries: The edits, oldest first.
        keys: ``[entry, width]``, embeddings of their prompts.
        scope: The classifier.
        adapter: Parameter name to the low-rank term that makes the base the counterfactual model.
        threshold: Similarity from which a prompt is in scope.
        network: Names the trained network; only memories of one network can be joined.
        embedder: Name of the sentence model.
        encoder: The sentence model at work; made from the name where none is given.
    """

    kind: ClassVar[str] = "serac"
    changes: ClassVar[Literal["model", "prompts"]] = "model"

    entries: tuple[Entry, ...]
    keys: Tensor
    scope: Scope
    adapter: Mapping[str, LowRank]
    threshold: float
    network: str
    embedder: str
    encoder: Embedder | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if self.encoder is None:
            object.__setattr__(self, "encoder", Embedder(self.embedder))
        if len(self.entries) != len(self.keys):
            raise ValueError(f"{len(self.entries)} edits and {len(self.keys)} keys")

    @property
    def group(self) -> str:
        """The trained network."""
        return self.network

    def join(self, other: SeracMemory) -> SeracMemory:
        """Both lists of edits, one after the other."""
        return SeracMemory(
            (*self.entries, *other.entries),
            torch.cat([self.keys, other.keys]),
            self.scope,
            self.adapter,
            self.threshold,
            self.network,
            self.embedder,
            self.encoder,
        )

    def in_force(self) -> list[int]:
        """Which entries answer: of several about one prompt, the latest."""
        latest = {entry.prompt: number for number, entry in enumerate(self.entries)}
        return sorted(latest.values())

    def route(self, prompts: Sequence[str]) -> list[int | None]:
        """For each prompt the entry whose scope it is in, or ``None``."""
        chosen = self.in_force()
        if not prompts or not chosen:
            return [None] * len(prompts)
        assert self.encoder is not None  # made in __post_init__
        queries = torch.from_numpy(self.encoder.encode(list(prompts)))
        similarity = self.scope.log_similarity(queries, self.keys[chosen])
        best, place = similarity.max(dim=1)
        border = math.log(self.threshold)
        return [
            chosen[index] if value >= border else None
            for value, index in zip(best.tolist(), place.tolist(), strict=True)
        ]

    def rewrite(self, prompts: Sequence[str]) -> list[str]:
        """Prompts in scope with their edit above them, the others as they are."""
        return [
            prompt if entry is None else above(self.entries[entry].statement, prompt)
            for prompt, entry in zip(prompts, self.route(prompts), strict=True)
        ]

    @contextmanager
    def active(self, handle: ModelHandle, routing: Routing) -> Iterator[Rewrite | None]:
        """Routes prompts, and runs rows that carry an edit with the adapter, inside the ``with``."""
        headers = tuple(
            " ".join(header(self.entries[number].statement).split()) for number in self.in_force()
        )
        owner = object()

        def carrying(now: Pass) -> Tensor:
            """``[batch]`` bool, rows whose prompt holds an edit in force; decided once per decoding."""
            if owner not in now.latched and now.prompt_last is not None:
                rows = torch.zeros(now.mask.shape[0], dtype=torch.bool, device=now.mask.device)
                if now.input_ids is not None:
                    for row, ids in enumerate(now.input_ids):
                        text = " ".join(handle.decode(ids[now.prompt[row]]).split())
                        rows[row] = any(each in text for each in headers)
                now.latched[owner] = rows
            return now.decision(owner)

        with ExitStack() as hooked:
            for name, delta in self.adapter.items():
                module = handle.model.get_submodule(name.removesuffix(".weight"))
                hook = _adapting(delta, handle, routing, carrying)
                hooked.callback(module.register_forward_hook(hook).remove)
            yield self.rewrite

    def tensors(self) -> dict[str, Tensor]:
        """Keys, classifier and adapter."""
        parts = {
            f"adapter/{name}/{part}": tensor
            for name, delta in self.adapter.items()
            for part, tensor in delta.tensors().items()
        }
        return {
            "keys": self.keys,
            "scope/map": self.scope.map,
            "scope/log_scale": self.scope.log_scale,
            **parts,
        }

    def settings(self) -> dict[str, Any]:
        """Everything else."""
        return {
            "edits": [
                {"id": each.id, "prompt": each.prompt, "statement": each.statement} for each in self.entries
            ],
            "adapter": sorted(self.adapter),
            "threshold": self.threshold,
            "network": self.network,
            "embedder": self.embedder,
        }

    @classmethod
    def restore(cls, tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> SeracMemory:
        """See ``lab.memory.Memory``."""
        return cls(
            tuple(
                Entry(str(each["id"]), str(each["prompt"]), str(each["statement"]))
                for each in settings["edits"]
            ),
            tensors["keys"],
            Scope(tensors["scope/map"], tensors["scope/log_scale"]),
            adapter_of(tensors, settings["adapter"]),
            float(settings["threshold"]),
            str(settings["network"]),
            str(settings["embedder"]),
        )


def adapter_of(tensors: Mapping[str, Tensor], names: Sequence[str]) -> dict[str, LowRank]:
    """The adapter's terms out of saved tensors."""
    return {
        name: LowRank(tensors[f"adapter/{name}/left"], tensors[f"adapter/{name}/right"]) for name in names
    }


def _adapting(delta: LowRank, handle: ModelHandle, routing: Routing, carrying: Any) -> Any:
    term = delta.as_term(handle.device)

    def hook(_module: Any, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        now = routing.now()
        rows = carrying(now)
        if not bool(rows.any()):
            return None
        shaped = now.shaped(output)
        added = now.shaped(term(args[0])).to(shaped.dtype)
        return torch.where(rows[:, None, None], shaped + added, shaped).reshape(output.shape)

    return hook
