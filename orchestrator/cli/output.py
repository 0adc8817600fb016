"""Where results and messages go.

A result goes to stdout: one JSON document with `--json`, else text, with colours and boxes only on a terminal.
Everything else (messages, errors) goes to stderr, so that `orc … --json | jq` and `orc … > file` always work.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TextIO

from orchestrator.cli import terminal, text

if TYPE_CHECKING:
    from rich.console import Console

STATUS_STYLES = {
    "FINISHED": "green",
    "RUNNING": "cyan",
    "FAILED": "red",
    "CRASHED": "red",
    "CANCELLED": "yellow",
    "PAUSED": "yellow",
    "QUEUED": "blue",
    "CREATED": "blue",
    "up": "green",
    "down": "red",
}


MOST_INDENTED = 100
"""Items of a list; more would be scrolled past anyway."""


class Output:
    """The one way a verb speaks. A verb calls `result` once; its `render` prints the same document as text."""

    def __init__(self, *, as_json: bool = False, stdout: TextIO | None = None, stderr: TextIO | None = None) -> None:
        self.as_json = as_json
        self.stdout = stdout or sys.stdout
        self.stderr = stderr or sys.stderr
        self.has_result = False

    @property
    def is_rich(self) -> bool:
        """Whether a person looks at stdout through a terminal."""
        return not self.as_json and self.stdout.isatty()

    def result(self, document: Any, render: Callable[[], None]) -> None:
        """Print `document` as JSON, or else what `render` prints."""
        self.has_result = True
        if self.as_json:
            self.stdout.writelines(_json_pieces(text.jsonable(document)))
            self.stdout.write("\n")
        else:
            render()
        self.stdout.flush()

    def line(self, content: str = "", style: str = "") -> None:
        """One line of a result."""
        if not (self.is_rich and style):
            self.stdout.write(content + "\n")
        elif (shown := terminal.styled(content, style, os.environ)) is not None:
            self.stdout.write(shown + "\n")
        else:
            self.console().print(content, style=style, markup=False, highlight=False, soft_wrap=True)

    def fields(self, pairs: Iterable[tuple[str, str]], indent: str = "") -> None:
        """Names and values, one a line, values aligned; pairs with an empty value are left out."""
        shown = [(name, value) for name, value in pairs if value]
        width = max((len(name) for name, _ in shown), default=0)
        for name, value in shown:
            self.line(f"{indent}{name.ljust(width)}  {value}")

    def table(
        self,
        header: Sequence[str],
        rows: Sequence[Sequence[str]],
        *,
        right: Iterable[int] = (),
        title: str = "",
        optional: Iterable[str] = (),
    ) -> None:
        """A table; columns in `right` are flush right, one called `status` is coloured on a terminal.

        Where a terminal is too narrow, columns named in `optional` are left out, in that order.
        """
        if title:
            self.line(title, style="bold")
        if not self.is_rich:
            indent = "  " if title else ""
            for line in text.aligned(header, rows, right=right):
                self.line(indent + line)
            return
        width = terminal.width(self.stdout, os.environ)
        shown = _fitting(header, rows, optional, width)
        flush_right = set(right)
        cells = [
            [
                (row[column], STATUS_STYLES.get(row[column], "") if header[column] == "status" else "")
                for column in shown
            ]
            for row in rows
        ]
        names, at_right = [header[column] for column in shown], {shown.index(c) for c in flush_right & set(shown)}
        lines = terminal.table(names, cells, at_right, width, os.environ, is_indented=bool(title))
        if lines is not None:
            self.stdout.writelines(f"{line}\n" for line in lines)
            return
        from rich import box
        from rich.table import Table
        from rich.text import Text

        table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=bool(title))
        for column in shown:
            table.add_column(header[column], justify="right" if column in flush_right else "left", overflow="fold")
        for row_of_cells in cells:
            table.add_row(*(Text(content, style=style) for content, style in row_of_cells))
        self.console().print(table)

    def message(self, content: str) -> None:
        """Something worth knowing that is no part of the result."""
        self.stderr.write(content + "\n")
        self.stderr.flush()

    def console(self) -> Console:
        from rich.console import Console

        return Console(file=self.stdout)


def _json_pieces(document: Any) -> Iterator[str]:
    """The document indented; a long list has one line for each item, which is much faster to write and to read."""
    if not isinstance(document, list) or len(document) <= MOST_INDENTED:
        yield json.dumps(document, indent=2, allow_nan=False, ensure_ascii=False)
        return
    one_line = json.JSONEncoder(allow_nan=False, ensure_ascii=False)
    for place, item in enumerate(document):
        yield (",\n  " if place else "[\n  ") + one_line.encode(item)
    yield "\n]"


def _fitting(header: Sequence[str], rows: Sequence[Sequence[str]], optional: Iterable[str], width: int) -> list[int]:
    """The columns to show within `width` characters."""
    widths = [max(len(cell) for cell in (name, *(row[at] for row in rows))) + 3 for at, name in enumerate(header)]
    shown = list(range(len(header)))
    for name in optional:
        if sum(widths[column] for column in shown) > width:
            shown.remove(header.index(name))
    return shown
