"""Forgetting with what the editing half has: an editor whose target is a refusal or nothing, and a text before the prompt."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from editors.base import EDITORS, get_editor
from editors.demonstrations import LAYOUTS, layout_for
from editors.in_context import InContextFact, InContextMemory
from editors.unlearning.base import UnlearnMethod, UnlearnOptions
from editors.unlearning.gradient import check_facts
from editors.unlearning.plain import names_of, origin, settled, told
from editors.unlearning.settings import REFUSALS
from editors.values import Progress
from lab.embeddings import DEFAULT_MODEL
from lab.errors import ConfigError
from lab.handle import ModelHandle
from lab.memory import MemoryPatch
from lab.patch import WeightPatch
from lab.records import EditRequest, Fact

OWN = frozenset({"editor", "target", "refusals", "stats", "corpus", "preset", "prefixes"})


@dataclass(frozen=True)
class EditUnlearner:
    """Any editor, asked to say a refusal (or nothing) where the answer stood.

    Attributes:
        options: How to run.
        editor: Its specification.
        target: ``refusal``: one of ``refusals`` for each fact; ``null``: the tokenizer's end-of-text token; else the text itself.
        refusals: See ``target``; the same as those of methods that train on refusals.
        editing: Further arguments of ``get_editor``.
        settings: Names of the settings that are known beforehand; the editor has its own beside them.
    """

    options: UnlearnOptions
    editor: str = "memit"
    target: str = "refusal"
    refusals: tuple[str, ...] = REFUSALS
    editing: Mapping[str, Any] | None = None
    settings: frozenset[str] = OWN

    def unlearn(
        self,
        handle: ModelHandle,
        forget: Sequence[Fact],
        retain: Sequence[Fact] = (),
        *,
        progress: Progress | None = None,
    ) -> WeightPatch | MemoryPatch:
        """The editor's patch; retained facts are not read. See ``Unlearner.unlearn``."""
        check_facts(self.options.name, forget, retain)
        chooser = random.Random(f"erase:{self.options.seed}")
        requests = [EditRequest.from_fact(fact, self._text(handle, chooser)) for fact in forget]
        editor = get_editor(self.editor, seed=self.options.seed, **(self.editing or {}))
        patch = editor.edit(handle, requests, progress=progress)
        config = {**patch.provenance.config, "editor": self.editor, "target": self.target}
        extra = {**patch.provenance.extra, "targets": {each.id: each.target_new for each in requests}}
        return replace(patch, provenance=origin(self.options, config, forget, extra))

    def _text(self, handle: ModelHandle, chooser: random.Random) -> str:
        if self.target == "refusal":
            return chooser.choice(self.refusals)
        if self.target != "null":
            return self.target
        end = handle.tokenizer.eos_token
        if not isinstance(end, str):
            raise ConfigError(f"{handle.name!r} has no end-of-text token; give target= a text")
        return end


def _erase(options: UnlearnOptions) -> EditUnlearner:
    chosen = dict(options.overrides)
    spec, target = chosen.pop("editor", "memit"), chosen.pop("target", "refusal")
    refusals = tuple(chosen.pop("refusals", REFUSALS))
    EDITORS.get(spec.split("+")[0])
    if not refusals or not target.strip():
        raise ConfigError("refusals must name at least one text, and target must not be blank")
    return EditUnlearner(options, spec, target, refusals, chosen)


@dataclass(frozen=True)
class RefusalConfig:
    """Settings.

    Attributes:
        scope: ``each``: a prompt gets the text of the nearest fact; ``all``: every prompt gets one text that names all subjects.
        text: Says what is not known; ``{subject}`` is filled.
        layout: As in ``ike``.
        threshold: ``each``: cosine below which a prompt stays as it is.
        embedder: ``each``: the sentence model.
        reserve: Tokens of the model's context that are kept for what follows the prompt.
    """

    scope: str = "each"
    text: str = "What is asked about {subject} is not known"
    layout: str = "auto"
    threshold: float | None = 0.6
    embedder: str = DEFAULT_MODEL
    reserve: int = 100

    def __post_init__(self) -> None:
        if self.scope not in ("each", "all"):
            raise ConfigError(f"unknown scope {self.scope!r}; use 'each' or 'all'")
        if "{subject}" not in self.text:
            raise ConfigError(f"text must hold {{subject}}: {self.text!r}")
        if self.layout not in LAYOUTS:
            raise ConfigError(f"unknown layout {self.layout!r}; use one of {', '.join(LAYOUTS)}")


@dataclass(frozen=True)
class RefusalPrefix:
    """In-context unlearning (Pawelczyk et al. 2023, arXiv 2310.07579; RWKU's variant names the subject). Nothing is forgotten."""

    options: UnlearnOptions
    config: RefusalConfig
    settings: frozenset[str]

    def unlearn(
        self,
        handle: ModelHandle,
        forget: Sequence[Fact],
        retain: Sequence[Fact] = (),
        *,
        progress: Progress | None = None,
    ) -> MemoryPatch:
        """A memory that puts the text before prompts; retained facts are not read. See ``Unlearner.unlearn``."""
        config = self.config
        check_facts(self.options.name, forget, retain)
        layout = layout_for(handle, config.layout)

        def says(subject: str) -> str:
            return layout.fact(config.text.replace("{subject}", subject))

        if config.scope == "all":
            subjects = ", ".join(dict.fromkeys(fact.subject for fact in forget))
            facts = [InContextFact("all", "", says(subjects))]
            threshold = None
        else:
            facts = [InContextFact(fact.id or fact.text, fact.text, says(fact.subject)) for fact in forget]
            threshold = config.threshold
        memory = InContextMemory(tuple(facts), threshold, config.embedder, config.reserve)
        if progress is not None:
            progress("facts", len(facts), len(facts))
        provenance = origin(self.options, told(config), forget, {"layout": layout.name})
        parents = tuple(entry.patch.id for entry in handle.applied)
        return MemoryPatch(handle.fingerprint, memory, provenance, parents)


def _prefix(options: UnlearnOptions) -> RefusalPrefix:
    return RefusalPrefix(options, settled(options, RefusalConfig), names_of(RefusalConfig))


ERASE_EDIT = UnlearnMethod(
    "erase_edit",
    "Any editor with a refusal, or nothing, as its target",
    "Hong et al. 2024, arXiv 2406.11614 (MEMIT with empty response); the editor's own paper",
    "that of the editor",
    "closed form",
    "verified",
    _erase,
)
IN_CONTEXT = UnlearnMethod(
    "in_context",
    "A text before the prompt that says what is not known; no weight changes",
    "Pawelczyk et al. 2023, arXiv 2310.07579; Jin et al. 2024, arXiv 2406.10890",
    "nothing; an embedding per prompt afterwards",
    "in-context",
    "reconstructed",
    _prefix,
)
