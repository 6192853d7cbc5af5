"""IKE and ICE: the new fact stands before the prompt, and no weight changes.

IKE puts demonstrations before it (Zheng et al., EMNLP 2023, arXiv 2305.12740); ICE is the same without them. While the patch
is applied, ``handle.rewrite`` puts the text before every prompt that is generated from or scored.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from editors.base import Editor, EditorOptions, Method
from editors.demonstrations import (
    BUILT_IN,
    Demonstration,
    Layout,
    PoolCache,
    demonstrate,
    layout_for,
    retrieval_text,
    statement_of,
)
from editors.memory import memory_patch, settle_memory
from editors.rows import check_requests
from editors.values import Progress
from lab.embeddings import DEFAULT_MODEL, Embedder
from lab.errors import ConfigError
from lab.handle import ModelHandle
from lab.memory import MemoryPatch
from lab.patch import WeightPatch
from lab.records import EditRequest
from lab.routing import Routing
from lab.stack import Rewrite
from lab.tokens import encode_ids


@dataclass(frozen=True)
class InContextConfig:
    """Settings of both methods.

    Attributes:
        layout: ``plain``, ``documents``, or ``auto`` (documents where the model's folder brings a prompt format).
        threshold: Cosine between a prompt and the nearest edited one below which the prompt stays as it is; without it the
            nearest fact is always put before the prompt (the papers evaluate one fact at a time).
        embedder: Sentence model: ``minilm``, a folder or a hub id.
        reserve: Tokens of the model's context that are kept for what follows the prompt.
    """

    layout: str = "auto"
    threshold: float | None = None
    embedder: str = DEFAULT_MODEL
    reserve: int = 100


@dataclass(frozen=True)
class IkeConfig(InContextConfig):
    """Settings of IKE.

    Attributes:
        k: Demonstrations per edit; the layout's number without it.
        demonstrations: Where they come from: ``atlas`` (the built-in world's dev split), or a benchmark file.
        pool: How many cases of that source are searched.
        own_copy: The edit itself is the last demonstration (the authors' code).
    """

    k: int | None = None
    demonstrations: str = BUILT_IN
    pool: int = 500
    own_copy: bool = True

    def __post_init__(self) -> None:
        if self.k is not None and self.k < 0:
            raise ConfigError(f"k must not be negative, it is {self.k}")
        if self.pool < 1:
            raise ConfigError(f"pool must be at least 1, it is {self.pool}")


@dataclass(frozen=True)
class InContextFact:
    """One new fact.

    Attributes:
        id: Its request.
        prompt: The edited prompt, filled; what other prompts are compared with.
        before: Its statement, as it stands before a prompt.
        demonstrations: What stands before that, the nearest last.
    """

    id: str
    prompt: str
    before: str
    demonstrations: tuple[str, ...] = ()


@dataclass(frozen=True)
class InContextMemory:
    """Facts to be put before prompts; see ``lab.memory.Memory``.

    Attributes:
        facts: In the order of the edits.
        threshold, embedder, reserve: See ``InContextConfig``.
    """

    kind: ClassVar[str] = "in_context"
    changes: ClassVar[Literal["model", "prompts"]] = "prompts"

    facts: tuple[InContextFact, ...]
    threshold: float | None = None
    embedder: str = DEFAULT_MODEL
    reserve: int = 100

    @property
    def group(self) -> tuple[float | None, str, int]:
        """The settings that all facts share."""
        return (self.threshold, self.embedder, self.reserve)

    def join(self, other: InContextMemory) -> InContextMemory:
        """The facts of both; a later one takes the place of an earlier one with the same prompt."""
        later = {fact.prompt for fact in other.facts}
        kept = tuple(fact for fact in self.facts if fact.prompt not in later)
        return InContextMemory(kept + other.facts, *self.group)

    @contextmanager
    def active(self, handle: ModelHandle, routing: Routing) -> Iterator[Rewrite | None]:
        """Puts facts before prompts inside the ``with``."""
        yield _Rewriter(self, handle)

    def tensors(self) -> dict[str, Tensor]:
        """None."""
        return {}

    def settings(self) -> dict[str, Any]:
        """Everything."""
        return asdict(self)

    @classmethod
    def restore(cls, tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> InContextMemory:
        """See ``lab.memory.Memory``."""
        facts = tuple(
            InContextFact(**{**fact, "demonstrations": tuple(fact["demonstrations"])})
            for fact in settings["facts"]
        )
        return cls(facts, settings["threshold"], str(settings["embedder"]), int(settings["reserve"]))


class _Rewriter:
    """Chooses a fact for each prompt and puts it before it, with as many demonstrations as the model's context holds."""

    def __init__(self, memory: InContextMemory, handle: ModelHandle) -> None:
        self._memory, self._tokenizer = memory, handle.tokenizer
        longest = getattr(handle.config, "max_position_embeddings", None)
        self._longest = longest if isinstance(longest, int) else None
        self._embedder = Embedder(memory.embedder)
        self._vectors: NDArray[np.float32] | None = None

    def __call__(self, prompts: Sequence[str]) -> list[str]:
        facts = self._memory.facts
        return [
            prompt if at is None else self._before(facts[at], prompt)
            for prompt, at in zip(prompts, self._choose(prompts), strict=True)
        ]

    def _choose(self, prompts: Sequence[str]) -> list[int | None]:
        facts, limit = self._memory.facts, self._memory.threshold
        if len(facts) == 1 and limit is None:
            return [0] * len(prompts)
        if self._vectors is None:
            self._vectors = self._embedder.encode([fact.prompt for fact in facts])
        likeness = self._embedder.encode(list(prompts)) @ self._vectors.T
        nearest = likeness.argmax(axis=1)
        return [
            None if limit is not None and row[at] < limit else int(at)
            for row, at in zip(likeness, nearest, strict=True)
        ]

    def _before(self, fact: InContextFact, prompt: str) -> str:
        if self._longest is None:
            return "".join(fact.demonstrations) + fact.before + prompt
        room = self._longest - self._memory.reserve - self._tokens(fact.before + prompt)
        if room < 0:
            logging.getLogger(__name__).warning(
                "the fact %r does not fit before a prompt into %d tokens; the prompt is asked without it",
                fact.id,
                self._longest,
            )
            return prompt
        kept: list[str] = []
        for text in reversed(fact.demonstrations):
            room -= self._tokens(text)
            if room < 0:
                break
            kept.append(text)
        return "".join(reversed(kept)) + fact.before + prompt

    def _tokens(self, text: str) -> int:
        return len(encode_ids(self._tokenizer, text))


@dataclass(frozen=True)
class InContextEditor:
    """IKE and ICE; see the module. Make one with ``get_editor``."""

    options: EditorOptions
    config: type[InContextConfig]
    pools: PoolCache = field(default_factory=PoolCache, repr=False)

    def edit(
        self,
        handle: ModelHandle,
        requests: Sequence[EditRequest],
        *,
        history: Sequence[WeightPatch] | None = None,
        progress: Progress | None = None,
    ) -> MemoryPatch:
        """One patch that holds all facts. See ``Editor.edit``."""
        check_requests(requests, one_per_subject=False)
        config, _ = settle_memory(handle, self.options, self.config)
        layout = layout_for(handle, config.layout)
        shown = self._demonstrations(config, requests, layout)
        facts = []
        for number, request in enumerate(requests, start=1):
            texts = [demonstration.text for demonstration in shown[request.id]]
            before = layout.fact(statement_of(request))
            facts.append(InContextFact(request.id, request.text, before, tuple(texts)))
            if progress is not None:
                progress("facts", number, len(requests))
        memory = InContextMemory(tuple(facts), config.threshold, config.embedder, config.reserve)
        extra = {
            "layout": layout.name,
            "demonstrations": {
                name: [{"case": each.case, "kind": each.kind} for each in used]
                for name, used in shown.items()
            },
        }
        return memory_patch(handle, self.options, config, None, requests, memory, extra)

    def _demonstrations(
        self, config: InContextConfig, requests: Sequence[EditRequest], layout: Layout
    ) -> dict[str, list[Demonstration]]:
        shown: dict[str, list[Demonstration]] = {request.id: [] for request in requests}
        if not isinstance(config, IkeConfig):
            return shown
        count = layout.demonstrations if config.k is None else config.k
        if count:
            embedder = Embedder(config.embedder)
            pool = self.pools.get(config.demonstrations, config.pool, self.options.seed, embedder)
            vectors = embedder.encode([retrieval_text(request, answered=False) for request in requests])
            for request, vector in zip(requests, vectors, strict=True):
                shown[request.id] = demonstrate(request, pool, vector, layout, count, self.options.seed)
        if config.own_copy:
            for request in requests:
                text = layout.demonstration(statement_of(request), request.text, request.target_new)
                shown[request.id].append(Demonstration(request.id, "copy", text))
        return shown


def _ike(options: EditorOptions) -> Editor:
    return InContextEditor(options, IkeConfig)


def _ice(options: EditorOptions) -> Editor:
    return InContextEditor(options, InContextConfig)


IKE = Method(
    "ike",
    "The new fact and demonstrations before the prompt; no weight changes",
    "Zheng et al. 2023, arXiv 2305.12740",
    "an embedding per demonstration case once, then one per fact; longer prompts afterwards",
    False,
    _ike,
)
ICE = Method(
    "ice",
    "The new fact before the prompt, without demonstrations",
    "Zheng et al. 2023, arXiv 2305.12740, as evaluated by EasyEdit",
    "nothing; longer prompts afterwards",
    False,
    _ice,
)
