"""Colours and tables on a terminal without rich, as rich draws them. Importing rich takes longer than `orc ls` may.

Pure: None means that only rich can do it (cells to fold, characters two columns wide).
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from typing import TextIO

CODES = {"bold": "1", "red": "31", "green": "32", "yellow": "33", "blue": "34", "cyan": "36"}
COLOURS = CODES.keys() - {"bold"}

BETWEEN = 3
"""Blanks between two columns."""


def styled(content: str, style: str, variables: Mapping[str, str]) -> str | None:
    """The content in one of the styles of `CODES`; `variables` is the environment: NO_COLOR and TERM are respected."""
    if style not in CODES or not _is_simple(content):
        return None
    is_off = variables.get("TERM", "").lower() in ("dumb", "unknown") or (
        style in COLOURS and bool(variables.get("NO_COLOR"))
    )
    return content if is_off or not content else f"\x1b[{CODES[style]}m{content}\x1b[0m"


def table(
    header: Sequence[str],
    rows: Sequence[Sequence[tuple[str, str]]],
    right: Collection[int],
    width: int,
    variables: Mapping[str, str],
    *,
    is_indented: bool = False,
) -> list[str] | None:
    """Lines of a table whose cells are (content, style); columns in `right` are flush right."""
    widths = [max(len(cell) for cell in (name, *(row[at][0] for row in rows))) for at, name in enumerate(header)]
    edge = " " if is_indented else ""
    whole = sum(widths) + BETWEEN * (len(widths) - 1) + 2 * len(edge)
    if whole > width or not all(_is_simple(cell) for row in rows for cell, _ in row):
        return None

    def line(cells: Sequence[tuple[str, str]]) -> str:
        padded = []
        for at, (content, style) in enumerate(cells):
            blanks = " " * (widths[at] - len(content))
            shown = styled(content, style, variables) if style else content
            padded.append(f"{blanks}{shown}" if at in right else f"{shown}{blanks}")
        return edge + (" " * BETWEEN).join(padded).rstrip()

    return [line([(name, "bold") for name in header]), "─" * whole, *map(line, rows)]


def width(stream: TextIO, variables: Mapping[str, str]) -> int:
    """Columns of the terminal."""
    if variables.get("COLUMNS", "").isdecimal():
        return int(variables["COLUMNS"])
    try:
        return os.get_terminal_size(stream.fileno()).columns or 80
    except (OSError, ValueError):
        return 80


def _is_simple(content: str) -> bool:
    """Each character takes one column, and none of them moves the cursor."""
    return content.isascii() and content.isprintable()
