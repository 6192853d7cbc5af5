"""An editor under a clock: what its edits take, and the first few patches for a look afterwards."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from editors.base import Editor, ManyEditor

if TYPE_CHECKING:
    from lab.handle import ModelHandle
    from lab.records import EditRequest


@dataclass
class Clock:
    """Adds up what an editor takes.

    Attributes:
        keep: How many patches to keep for a look afterwards.
        seconds: Wall time inside the editor.
        edits: Requests that it carried out.
        kept: The first patches and their requests.
    """

    keep: int = 0
    seconds: float = 0.0
    edits: int = 0
    kept: list[tuple[tuple[EditRequest, ...], Any]] = field(default_factory=list)

    def measure(
        self, groups: Sequence[Sequence[EditRequest]], work: Callable[[], Sequence[Any]]
    ) -> Sequence[Any]:
        """Runs ``work``, which makes one patch per group of requests."""
        begin = time.perf_counter()
        try:
            patches = work()
        finally:
            self.seconds += time.perf_counter() - begin
        self.edits += sum(map(len, groups))
        pairs = [(tuple(group), patch) for group, patch in zip(groups, patches, strict=True)]
        self.kept += pairs[: max(0, self.keep - len(self.kept))]
        return patches


@dataclass(frozen=True)
class TimedEditor:
    """An editor under a clock."""

    editor: Any
    clock: Clock

    def edit(self, handle: ModelHandle, requests: Sequence[EditRequest], *, history: Any = None) -> Any:
        """See ``Editor.edit``."""
        (patch,) = self.clock.measure(
            [requests], lambda: [self.editor.edit(handle, requests, history=history)]
        )
        return patch


@dataclass(frozen=True)
class TimedManyEditor:
    """An editor of many independent requests under a clock."""

    editor: Any
    clock: Clock

    def edit(self, handle: ModelHandle, requests: Sequence[EditRequest], *, history: Any = None) -> Any:
        """See ``Editor.edit``."""
        return TimedEditor(self.editor, self.clock).edit(handle, requests, history=history)

    def edit_many(self, handle: ModelHandle, requests: Sequence[EditRequest]) -> Sequence[Any]:
        """See ``ManyEditor.edit_many``."""
        return self.clock.measure(
            [[request] for request in requests], lambda: self.editor.edit_many(handle, requests)
        )


def timed(editor: Editor, clock: Clock) -> Any:
    """The editor under the clock; one that edits many at once still does."""
    return (TimedManyEditor if isinstance(editor, ManyEditor) else TimedEditor)(editor, clock)
