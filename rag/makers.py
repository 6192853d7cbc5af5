"""Methods that change weights, taken by name from whoever offers them; this floor imports none."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from lab.errors import ConfigError, RequestError
from lab.patch import Patch
from lab.records import EditRequest, Fact
from lab.registry import Registry

if TYPE_CHECKING:
    from lab.handle import ModelHandle

REGISTRY_GROUP = "knowlab.registries"

Maker = Callable[[], Patch]


def edit_maker(handle: ModelHandle, method: str, fact: Fact, new: str, *, seed: int = 0) -> Maker:
    """Computes an edit of ``fact`` when it is called.

    Args:
        handle: The model.
        method: An editor's specification (``knowlab list editors``).
        fact: The fact; needs a prompt.
        new: What the model shall say.
        seed: Of the method.

    Raises:
        UnknownNameError: No such editor.
        RequestError: The fact has no prompt.
    """
    _check_prompt(fact)
    editor = _offered("editors", "get_editor")(method, seed=seed)
    return lambda: editor.edit(handle, [EditRequest.from_fact(fact, new)])


def batch_maker(handle: ModelHandle, method: str, requests: Sequence[EditRequest], *, seed: int = 0) -> Maker:
    """Computes one patch for many edits when it is called.

    Raises:
        UnknownNameError: No such editor.
    """
    editor = _offered("editors", "get_editor")(method, seed=seed)
    return lambda: editor.edit(handle, list(requests))


def forget_maker(
    handle: ModelHandle, method: str, fact: Fact, *, retain: Sequence[Fact] = (), seed: int = 0
) -> Maker:
    """Computes a patch that makes the model lose ``fact``: an unlearner by its name, else an editor that teaches the word for unknown.

    Raises:
        UnknownNameError: Neither an unlearner nor an editor.
        RequestError: The fact has no prompt.
    """
    from rag.prompts import prompts_for

    _check_prompt(fact)
    if method in _registry("unlearners"):
        unlearner = _offered("unlearners", "get_unlearner")(method, seed=seed)
        return lambda: unlearner.unlearn(handle, [fact], retain)
    return edit_maker(handle, method, fact, prompts_for(handle).unknown, seed=seed)


def _check_prompt(fact: Fact) -> None:
    if not fact.prompt:
        raise RequestError(f"a change of the weights needs a prompt for {fact.subject!r}, {fact.relation!r}")


def _registry(kind: str) -> Registry[Any]:
    registries: Registry[Registry[Any]] = Registry("registry", {}, group=REGISTRY_GROUP)
    if kind not in registries:
        raise ConfigError(f"no {kind} are installed here; install KnowLab with `pip install -e .`")
    return registries.get(kind)


def _offered(kind: str, function: str) -> Callable[..., Any]:
    """The function that makes methods of a kind, which stands beside their registry."""
    _registry(kind)
    registries: Registry[Registry[Any]] = Registry("registry", {}, group=REGISTRY_GROUP)
    (target,) = [entry.target for entry in registries.items() if entry.name == kind]
    return getattr(importlib.import_module(target.partition(":")[0]), function)
