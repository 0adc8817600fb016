"""A sweep on a terminal: the same lines again and again, in place."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Sequence

from orchestrator.cli import terminal
from orchestrator.cli.output import Output
from orchestrator.cli.watch import CLEAR, ERASE_BELOW, ERASE_RIGHT, HIDE_CURSOR, SHOW_CURSOR

LEAST_HEIGHT = 6


class SweepScreen:
    """Draws over what was drawn before, never more than the terminal has lines. Each line is written over the one
    before it, not erased first, so nothing flickers. `close` gives the terminal back, whatever happened."""

    def __init__(self, output: Output) -> None:
        self._out = output.stdout
        self._size = self._now()
        self._drawn = 0
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, _end)
        self._out.write(HIDE_CURSOR)

    def show(self, picture: Callable[[int, int], Sequence[str]]) -> None:
        """`picture` makes at most so many lines of so many columns, given as (columns, lines)."""
        size = self._now()
        if size != self._size:
            # The terminal may have folded what is there, so nobody knows where it began.
            begin, self._size = CLEAR, size
        else:
            begin = f"\x1b[{self._drawn}A" if self._drawn else ""
        columns, lines = size
        # The last column stays free: what erases the rest of a full line erases its last character too.
        shown = [cut(line, columns - 1) for line in picture(columns - 1, lines - 1)][: lines - 1]
        self._drawn = len(shown)
        self._out.write("".join(["\r", begin, *(f"{line}{ERASE_RIGHT}\n" for line in shown), ERASE_BELOW]))
        self._out.flush()

    def close(self) -> None:
        self._out.write(f"\r{ERASE_RIGHT}{SHOW_CURSOR}")  # over the ^C of who ended it
        self._out.flush()

    def _now(self) -> tuple[int, int]:
        try:
            lines = os.get_terminal_size(self._out.fileno()).lines
        except (OSError, ValueError):
            lines = 0
        return terminal.width(self._out, os.environ), max(lines or 24, LEAST_HEIGHT)


def cut(line: str, columns: int) -> str:
    """At most so many columns, whatever its characters take."""
    from rich.cells import cell_len, set_cell_size

    return line if cell_len(line) <= columns else f"{set_cell_size(line, columns - 1).rstrip()}…"


def _end(number: int, _: object) -> None:
    raise SystemExit(128 + number)  # through `close`, which gives the terminal back
