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

    def edit(self, handle: ModelHandle, requests: Sequence[EditRequest], *, history: Any = None) -> Patch:
        """One patch for all requests together; ``history`` holds the earlier patches of a sequence, where there is one."""
        ...


@runtime_checkable
class ManyEditor(Protocol):
    """An editor that computes independent edits faster together than one by one."""

    def edit_many(self, handle: ModelHandle, requests: Sequence[EditRequest]) -> Sequence[Patch]:
        """One patch per request, each as if it were alone."""
        ...


class Rounds:
    """Patches on top of each other: for requests that name a subject more than once, which no method takes in one call."""

    def __init__(self, patches: Sequence[Patch]) -> None:
        self.patches = tuple(patches)

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
            for patch in self.patches:
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


def parts(patch: Patch) -> tuple[Patch, ...]:
    """The patches that ``patch`` stands for: itself, or those of its rounds."""
    return patch.patches if isinstance(patch, Rounds) else (patch,)


def joined(patches: Sequence[Patch]) -> Patch:
    """Inverse of ``parts``."""
    return patches[0] if len(patches) == 1 else Rounds(patches)


def compute(
    editor: Editor,
    handle: ModelHandle,
    requests: Sequence[EditRequest],
    history: Sequence[Patch] | None = None,
) -> Patch:
    """One patch for all requests, or several in a row where they name a subject more than once.

    Some cases edit one subject twice (the questions of a Sanitation group). Where an editor refuses that in one call, because the
    later edit would overwrite the earlier, each repetition is computed on top of what came before it.

    Args:
        editor: The method.
        handle: The model as it stands.
        requests: What it should say.
        history: Earlier patches of a sequence; outside one the editor is not told of any.
    """
    rounds: list[list[EditRequest]] = []
    for request in requests:
        free = (part for part in rounds if all(other.subject != request.subject for other in part))
        part = next(free, None)
        if part is None:
            part = []
            rounds.append(part)
        part.append(request)

    def edit(part: Sequence[EditRequest], before: Sequence[Patch]) -> Patch:
        if history is None:
            return editor.edit(handle, list(part))
        return editor.edit(handle, list(part), history=(*history, *before))

    try:
        return edit(requests, ())
    except RequestError:
        if len(rounds) <= 1:
            raise
    patches: list[Patch] = []
    stack = _AppliedRounds([])
    try:
        for part in rounds:
            patches.append(edit(part, patches))
            stack.applied.append(patches[-1].apply(handle))
    finally:
        stack.undo()
    return Rounds(patches)
