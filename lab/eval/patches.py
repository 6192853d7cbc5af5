"""What an evaluation wants of editors and patches, and lists of requests that take more than one call."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol, runtime_checkable

from lab.errors import RequestError
from lab.handle import ModelHandle
from lab.records import EditRequest


class Applied(Protocol):
    """A change that is in force."""

    def undo(self) -> Any:
        """Takes it back."""
        ...


class Patch(Protocol):
    """What an editor returns: weights or memory."""

    def applied(self, handle: ModelHandle) -> AbstractContextManager[Any]:
        """In force inside the ``with``."""
        ...

    def apply(self, handle: ModelHandle) -> Applied:
        """In force until undone."""
        ...


class Editor(Protocol):
    """Computes a patch and leaves the model as it was."""

    def edit(self, handle: ModelHandle, requests: Sequence[EditRequest]) -> Patch:
        """One patch for all requests together."""
        ...


@runtime_checkable
class ManyEditor(Protocol):
    """An editor that computes independent edits faster together than one by one."""

    def edit_many(self, handle: ModelHandle, requests: Sequence[EditRequest]) -> Sequence[Patch]:
        """One patch per request, each as if it were alone."""
        ...


class _Rounds:
    """Patches on top of each other: for requests that name a subject more than once, which no method takes in one call."""

    def __init__(self, patches: Sequence[Patch]) -> None:
        self._patches = patches

    @contextmanager
    def applied(self, handle: ModelHandle) -> Iterator[None]:
        """All of them in force inside the ``with``."""
        applied = self.apply(handle)
        try:
            yield
        finally:
            applied.undo()

    def apply(self, handle: ModelHandle) -> _AppliedRounds:
        """All of them in force until undone."""
        stack = _AppliedRounds([])
        try:
            for patch in self._patches:
                stack.applied.append(patch.apply(handle))
        except BaseException:
            stack.undo()
            raise
        return stack


class _AppliedRounds:
    def __init__(self, applied: list[Applied]) -> None:
        self.applied = applied

    def undo(self) -> None:
        while self.applied:
            self.applied.pop().undo()


def compute(editor: Editor, handle: ModelHandle, requests: Sequence[EditRequest]) -> Patch:
    """One patch for all requests, or several in a row where they name a subject more than once.

    Some cases edit one subject twice (the questions of a Sanitation group). Where an editor refuses that in one call, because the
    later edit would overwrite the earlier, each repetition is computed on top of what came before it.
    """
    rounds: list[list[EditRequest]] = []
    for request in requests:
        free = (part for part in rounds if all(other.subject != request.subject for other in part))
        part = next(free, None)
        if part is None:
            part = []
            rounds.append(part)
        part.append(request)
    try:
        return editor.edit(handle, list(requests))
    except RequestError:
        if len(rounds) <= 1:
            raise
    patches: list[Patch] = []
    stack = _AppliedRounds([])
    try:
        for part in rounds:
            patches.append(editor.edit(handle, part))
            stack.applied.append(patches[-1].apply(handle))
    finally:
        stack.undo()
    return _Rounds(patches)
