"""Which requests a value search runs together.

A batch shares the pass over what lies before the change: contexts that many requests have in common are read once. Its parts
are searched one after the other, each small enough that what a step makes stays near the processor.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from editors.rows import EditRow
from lab.records import EditRequest

# Tokens that one step runs. A device wants many; a CPU is fastest with few, as long as its matrix products are not thin.
_CPU_TOKENS = 256
_DEVICE_TOKENS = 16_384


@dataclass(frozen=True)
class Problem:
    """One request as rows.

    Attributes:
        request: The request.
        rows: Its rows; the essence row, if any, comes last.
        contexts: How many of them carry the target.
    """

    request: EditRequest
    rows: tuple[EditRow, ...]
    contexts: int

    @property
    def suffix(self) -> int:
        """Tokens from the change on, of the longest row."""
        return max(row.wanted[-1] + 1 - row.change for row in self.rows)


def batches_of(problems: Sequence[Problem], max_rows: int) -> Iterator[list[int]]:
    """Indices of the problems of each batch; those of similar length go together, so that little is padding.

    Args:
        problems: All of them.
        max_rows: Rows of a batch; one problem may have more.
    """
    batch: list[int] = []
    rows = 0
    for index in sorted(range(len(problems)), key=lambda index: problems[index].suffix):
        size = len(problems[index].rows)
        if batch and rows + size > max_rows:
            yield batch
            batch, rows = [], 0
        batch.append(index)
        rows += size
    if batch:
        yield batch


def parts_of(problems: Sequence[Problem], device: torch.device) -> Iterator[range]:
    """Consecutive problems of a batch that are searched together: about as many tokens as the device likes."""
    limit = _CPU_TOKENS if device.type == "cpu" else _DEVICE_TOKENS
    begin = rows = width = 0
    for index, problem in enumerate(problems):
        rows, width = rows + len(problem.rows), max(width, problem.suffix)
        if index > begin and rows * width > limit:
            yield range(begin, index)
            begin, rows, width = index, len(problem.rows), problem.suffix
    yield range(begin, len(problems))


def rows_of(problems: Sequence[Problem], index: int) -> range:
    """Where the rows of one problem lie among those of all."""
    begin = sum(len(problem.rows) for problem in problems[:index])
    return range(begin, begin + len(problems[index].rows))
