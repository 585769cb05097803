"""Tables as plain text, and for rich."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Table:
    """A table that prints as text, and in colours where rich prints it.

    Attributes:
        title: line above it.
        columns: heads of the columns; all but the first are aligned to the right.
        rows: cells, as many in each row as columns; a cell may have several lines.
        notes: lines below it.
        styles: rich's style of single cells, by (row, column).
    """

    title: str
    columns: Sequence[str]
    rows: list[Sequence[str]]
    notes: Sequence[str] = ()
    styles: dict[tuple[int, int], str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines: list[Sequence[str]] = [self.columns]
        for row in self.rows:
            cells = [cell.split("\n") for cell in row]
            height = max(map(len, cells))
            lines += zip(*(cell + [""] * (height - len(cell)) for cell in cells), strict=True)
        widths = [max(len(line[i]) for line in lines) for i in range(len(self.columns))]
        text = []
        for line in lines:
            cells = [line[0].ljust(widths[0]), *(x.rjust(n) for x, n in zip(line[1:], widths[1:], strict=True))]
            text.append("  ".join(cells).rstrip())
        text.insert(1, "-" * max(map(len, text)))
        return "\n".join([self.title, *text, *self.notes])

    def __rich__(self) -> Any:
        """The table as an object of rich."""
        from rich import box
        from rich.console import Group
        from rich.table import Table as RichTable
        from rich.text import Text

        table = RichTable(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
        for number, column in enumerate(self.columns):
            table.add_column(column, justify="right" if number else "left", no_wrap=not number)
        for i, row in enumerate(self.rows):
            table.add_row(*(Text(cell, style=self.styles.get((i, j), "")) for j, cell in enumerate(row)))
        return Group(Text(self.title, style="bold"), table, *(Text(note) for note in self.notes), "")

    def print(self) -> None:
        """Print it on standard output, by rich where that is installed."""
        try:
            from rich.console import Console
        except ImportError:
            print(self)
        else:
            console = Console()
            # a file has no width
            console.print(self, **({} if console.is_terminal else {"width": 200}))


class PrintsTable:
    """Base of results that print as a table: `print(result)` in plain text, `result.print()` in colours with rich."""

    def table(self) -> Table:
        """The result as a table."""
        raise NotImplementedError

    def __str__(self) -> str:
        return str(self.table())

    def __rich__(self) -> Any:
        """The table as an object of rich."""
        return self.table().__rich__()

    def print(self) -> None:
        """Print the table on standard output, in colours where rich is installed."""
        self.table().print()
