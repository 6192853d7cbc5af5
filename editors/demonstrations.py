"""How facts and demonstrations are worded before a prompt, and which demonstrations an edit gets.

Demonstrations come from editing cases: each shows a new fact and either its own prompt (copy), a paraphrase (update), or a
prompt that the fact does not touch, with its own answer (retain). Those nearest to the edit by sentence embedding are taken
(Zheng et al. 2023, section 4.2).
"""

from __future__ import annotations

import random
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from lab.data.cases import EditCase
from lab.embeddings import Embedder
from lab.errors import ConfigError
from lab.handle import ModelHandle
from lab.records import EditRequest

if TYPE_CHECKING:
    from lab.atlas.forms import Format

LAYOUTS = ("auto", "plain", "documents")
KINDS = ("copy", "update", "retain")
BUILT_IN = "atlas"
"""Demonstrations from the built-in world's dev split, which no test fact is in."""
FORMAT_FILE = "format.toml"
"""A model folder that holds this file says in it how its model wants to be asked."""


@dataclass(frozen=True)
class PlainLayout:
    """Lines of text, as the paper's authors wrote them; see ``in_context.toml``.

    Attributes:
        templates: Of a fact and of a demonstration.
        demonstrations: How many there are by default.
        kinds: Their shares by kind.
        name: As in settings.
    """

    templates: Mapping[str, str]
    demonstrations: int
    kinds: Mapping[str, int]
    name: str = "plain"

    def fact(self, statement: str) -> str:
        """States a fact; the prompt follows at once."""
        return self.templates["fact"].format_map({"fact": statement})

    def demonstration(self, statement: str, prompt: str, answer: str) -> str:
        """States a fact, a prompt and its answer; the next demonstration follows at once."""
        fields = {"fact": statement, "prompt": prompt.rstrip(), "answer": answer.strip()}
        return self.templates["demonstration"].format_map(fields)


@dataclass(frozen=True)
class DocumentsLayout:
    """A document above the prompt, in the model's own format.

    Attributes:
        format: The prompt format.
        form: Its form with documents and a free prompt.
        demonstrations: How many there are by default.
        kinds: Their shares by kind.
        name: As in settings.
    """

    format: Format
    form: str
    demonstrations: int
    kinds: Mapping[str, int]
    name: str = "documents"

    def fact(self, statement: str) -> str:
        """States a fact; the prompt follows at once."""
        return self.format.render(self.form, documents=[f"{statement}."], cloze="").prompt

    def demonstration(self, statement: str, prompt: str, answer: str) -> str:
        """States a fact, a prompt and its answer; the next demonstration follows at once."""
        fields = {"documents": [f"{statement}."], "cloze": prompt.rstrip(), "answer": answer.strip()}
        return self.format.render(self.form, **fields).text


Layout = PlainLayout | DocumentsLayout


def layout_for(handle: ModelHandle, name: str = "auto") -> Layout:
    """The layout of a model.

    Args:
        handle: The model.
        name: ``plain``, ``documents``, or ``auto``: documents where the model's folder says how it wants to be asked.

    Raises:
        ConfigError: An unknown name.
    """
    if name not in LAYOUTS:
        raise ConfigError(f"unknown layout {name!r}; use one of {', '.join(LAYOUTS)}")
    table = tomllib.loads(files("editors").joinpath("in_context.toml").read_text(encoding="utf-8"))
    own = handle.folder is not None and (handle.folder / FORMAT_FILE).is_file()
    if name == "plain" or (name == "auto" and not own):
        row = table["plain"]
        return PlainLayout(row, int(row["demonstrations"]), row["kinds"])
    from lab.atlas.forms import load_format

    row = table["documents"]
    return DocumentsLayout(
        load_format(handle.folder if own else None), row["form"], int(row["demonstrations"]), row["kinds"]
    )


def statement_of(request: EditRequest) -> str:
    """A new fact as a sentence without full stop."""
    return f"{request.text.rstrip()} {request.target_new.strip()}"


@dataclass(frozen=True)
class Pool:
    """Cases to demonstrate with.

    Attributes:
        cases: With one request each.
        vectors: ``[case, width]``, unit vectors of their facts.
    """

    cases: tuple[EditCase, ...]
    vectors: NDArray[np.float32]


@dataclass
class PoolCache:
    """Pools by source, size, seed and sentence model; an object that an editor keeps."""

    _known: dict[tuple[Any, ...], Pool] = field(default_factory=dict, repr=False)

    def get(self, source: str, size: int, seed: int, embedder: Embedder) -> Pool:
        """The pool of a source, read and embedded once.

        Args:
            source: ``"atlas"``, or a benchmark file of any form that ``lab.data`` reads.
            size: Cases at most, drawn by ``seed``.
            seed: Draws them.
            embedder: Embeds their facts.

        Raises:
            DataError: The file cannot be read.
            ConfigError: No case has one request.
        """
        key = (source, size, seed, embedder.name)
        if key not in self._known:
            cases = [case for case in _cases(source, seed) if len(case.requests) == 1]
            random.Random(seed).shuffle(cases)
            chosen = tuple(cases[:size])
            if not chosen:
                raise ConfigError(f"{source!r} holds no case with one request to demonstrate with")
            vectors = embedder.encode([retrieval_text(case.requests[0], answered=True) for case in chosen])
            self._known[key] = Pool(chosen, vectors)
        return self._known[key]


def retrieval_text(request: EditRequest, *, answered: bool) -> str:
    """What is embedded: the plain words of the paper, with the answer for demonstrations and without for the edit."""
    end = f" {request.target_new.strip()}" if answered else ""
    return f"New Fact: {statement_of(request)}\nPrompt: {request.text.rstrip()}{end}"


@dataclass(frozen=True)
class Demonstration:
    """One demonstration: the case behind it, its kind, and its text."""

    case: str
    kind: str
    text: str


def demonstrate(
    request: EditRequest, pool: Pool, vector: NDArray[np.float32], layout: Layout, count: int, seed: int
) -> list[Demonstration]:
    """The demonstrations of one edit, the nearest last.

    Args:
        request: The edit; cases about its subject are left out.
        pool: What there is.
        vector: ``[width]``, unit vector of the edit.
        layout: How to word them.
        count: How many.
        seed: Draws which case shows which kind, and which of its prompts.
    """
    draw = random.Random(f"{seed}/{request.id}")
    subject = " ".join(request.subject.split()).casefold()
    order = [int(index) for index in np.argsort(-(pool.vectors @ vector), kind="stable")]
    near = [pool.cases[index] for index in order if subject not in pool.cases[index].subjects][:count]
    kinds = _kinds(len(near), layout.kinds)
    draw.shuffle(kinds)
    found = [_shown(case, kind, layout, draw) for case, kind in zip(near, kinds, strict=True)]
    return found[::-1]


def _kinds(count: int, shares: Mapping[str, int]) -> list[str]:
    total = sum(shares[kind] for kind in KINDS)
    copies = round(count * shares["copy"] / total)
    updates = round(count * shares["update"] / total)
    return ["copy"] * copies + ["update"] * updates + ["retain"] * (count - copies - updates)


def _shown(case: EditCase, kind: str, layout: Layout, draw: random.Random) -> Demonstration:
    (request,) = case.requests
    statement = statement_of(request)
    prompts = {
        "update": [(probe.prompt, request.target_new) for probe in case.of("paraphrase")],
        "retain": [
            (probe.prompt, probe.answers[0])
            for group in ("neighborhood", "locality")
            for probe in case.of(group)
            if probe.answers
        ],
    }.get(kind, [])
    if not prompts:
        # A case without the wanted kind of prompt can still show its own.
        kind, prompts = "copy", [(request.text, request.target_new)]
    prompt, answer = draw.choice(prompts)
    return Demonstration(case.id, kind, layout.demonstration(statement, prompt, answer))


def _cases(source: str, seed: int) -> Sequence[EditCase]:
    if source == BUILT_IN:
        from lab.eval import atlas_cases

        return atlas_cases(seed=seed, split="dev").cases
    from lab.data import load_cases

    return load_cases(source, skip_malformed=True).cases
