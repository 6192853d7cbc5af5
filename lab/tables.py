"""Tables for terminals of any width."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions
from rich.table import Table
from rich.text import Text

# Characters that a column asks for at most before it is folded, and what its borders take.
_FOLDED, _FRAME = 24, 3
# Leading columns at most that are taken for names of rows.
_NAMES = 3


class WideTable:
    """A table that is cut into several, one below the other, where its columns do not fit the terminal side by side.

    Every part begins with the columns that name the rows: the first, and the next ones as far as rows are told apart by them. A
    long text in a cell is folded and does not make a table wide.

    Args:
        title: Above the first part.
        columns: Their names.
        rows: A text per column; shown as it is, without markup.
        right: Per column, whether it is set to the right; none by default.
        caption: Below the last part.
    """

    def __init__(
        self,
        title: str,
        columns: Sequence[str],
        rows: Sequence[Sequence[str]],
        *,
        right: Sequence[bool] = (),
        caption: str = "",
    ) -> None:
        self.title, self.columns, self.caption = title, tuple(columns), caption
        self.rows = [tuple(row) for row in rows]
        self._right = tuple(right) or (False,) * len(self.columns)

    def parts(self, width: int) -> list[tuple[int, ...]]:
        """Indices of the columns of every part at so many characters a line."""
        wanted = [
            max(min(cell_len(text), _FOLDED) for text in (name, *(row[index] for row in self.rows))) + _FRAME
            for index, name in enumerate(self.columns)
        ]
        names = list(range(self._names()))
        found: list[tuple[int, ...]] = []
        room = width - 1 - sum(wanted[index] for index in names)
        chosen, left = list(names), room
        for index in range(len(names), len(wanted)):
            if len(chosen) > len(names) and wanted[index] > left:
                found.append(tuple(chosen))
                chosen, left = list(names), room
            chosen.append(index)
            left -= wanted[index]
        return [*found, tuple(chosen)] if self.columns else []

    def _names(self) -> int:
        """How many leading columns name a row."""
        for count in range(1, min(_NAMES, len(self.columns)) + 1):
            if len({row[:count] for row in self.rows}) == len(self.rows):
                return count
        return min(1, len(self.columns))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Table]:
        """The parts; as ``rich`` wants it."""
        parts = self.parts(options.max_width)
        for number, chosen in enumerate(parts, start=1):
            made = Table(
                title=Text(self.title, style="bold") if number == 1 else None,
                title_justify="left",
                caption=Text(self.caption) if number == len(parts) and self.caption else None,
                header_style="bold",
            )
            for index in chosen:
                justify = "right" if self._right[index] else "left"
                made.add_column(Text(self.columns[index]), justify=justify, overflow="fold")
            for row in self.rows:
                made.add_row(*(Text(row[index]) for index in chosen))
            yield made
