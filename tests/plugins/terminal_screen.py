"""A terminal that a test reads: a program runs on a pseudo terminal, what it writes is drawn as a terminal would."""

from __future__ import annotations

import codecs
import contextlib
import fcntl
import os
import pty
import re
import select
import signal
import struct
import sys
import termios
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

_ESCAPE = re.compile(r"\x1b\[(?P<given>[?\d;]*)(?P<what>[A-Za-z])")


class TerminalScreen:
    """Lines of characters and a cursor. Knows the few control sequences that our screens and rich use; any other one
    fails the test. Lines that leave at the top are in `gone`."""

    def __init__(self, columns: int, lines: int) -> None:
        self.columns, self.lines = columns, lines
        self.rows: list[list[str]] = [[]]
        self.gone: list[str] = []
        self.row = self.column = 0
        self.is_cursor_shown = True
        self.folded = 0
        """Lines that were longer than the terminal is wide."""
        self._rest = ""

    def write(self, text: str) -> None:
        text, self._rest = self._rest + text, ""
        place = 0
        while place < len(text):
            character = text[place]
            if character == "\x1b":
                found = _ESCAPE.match(text, place)
                if found is None:
                    assert len(text) - place < 20, f"not understood: {text[place : place + 20]!r}"
                    self._rest = text[place:]
                    return
                self._obey(found["what"], found["given"])
                place = found.end()
                continue
            place += 1
            if character == "\r":
                self.column = 0
            elif character == "\n":
                self._down()
            elif character.isprintable():
                self._put(character)

    def shown(self) -> list[str]:
        """What is to be seen now, without blanks at the ends and empty lines below."""
        found = ["".join(row).rstrip() for row in self.rows]
        while found and not found[-1]:
            found.pop()
        return found

    def _put(self, character: str) -> None:
        if self.column == self.columns:
            self.folded += 1
            self.column = 0
            self._down()
        row = self.rows[self.row]
        row.extend(" " * (self.column + 1 - len(row)))
        row[self.column] = character
        self.column += 1

    def _down(self) -> None:
        self.row += 1
        if self.row == len(self.rows):
            self.rows.append([])
        if len(self.rows) > self.lines:
            self.gone.append("".join(self.rows.pop(0)).rstrip())
            self.row -= 1

    def _obey(self, what: str, given: str) -> None:
        if given in ("?25", "?2026"):
            self.is_cursor_shown = self.is_cursor_shown if given != "?25" else what == "h"
            return
        count = int(given or "1") if (given or "1").isdecimal() else 1
        if what in ("A", "F"):
            self.row = max(self.row - count, 0)
            self.column = 0 if what == "F" else self.column
        elif what == "K":
            row = self.rows[self.row]
            if given == "2":
                row.clear()
            else:
                del row[self.column :]
        elif what == "J":
            if given == "2":
                self.rows, self.row, self.column = [[]], 0, 0
                return
            del self.rows[self.row][self.column :]
            del self.rows[self.row + 1 :]
        elif what == "H":
            self.row = self.column = 0
        elif what not in ("m",):
            raise AssertionError(f"the terminal does not know \\x1b[{given}{what}")


class OnTerminal:
    """A program on a pseudo terminal of its own. `end` or the context manager's exit leave nothing behind."""

    def __init__(
        self, *words: str, columns: int, lines: int = 40, cwd: Path, environment: Mapping[str, str] | None = None
    ) -> None:
        self.screen = TerminalScreen(columns, lines)
        self.seen = ""
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        size = struct.pack("HHHH", lines, columns, 0, 0)
        variables = {**os.environ, "TERM": "xterm-256color", **(environment or {})}
        for name in ("COLUMNS", "LINES", "NO_COLOR"):
            variables.pop(name, None)
        begun, begin = os.pipe()
        self._child, self._terminal = pty.fork()
        if self._child == 0:
            os.close(begin)
            os.read(begun, 1)  # until the terminal has its size
            os.chdir(cwd)
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # ignored where the tests run in the background of a shell
            os.execve(sys.executable, [sys.executable, *words], variables)
        os.close(begun)
        fcntl.ioctl(self._terminal, termios.TIOCSWINSZ, size)
        self._before = termios.tcgetattr(self._terminal)
        os.close(begin)

    def __enter__(self) -> OnTerminal:
        return self

    def __exit__(self, *_: Any) -> None:
        if self._child:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._child, signal.SIGKILL)
            os.waitpid(self._child, 0)
            self._child = 0
        os.close(self._terminal)

    def until(self, is_so: Callable[[TerminalScreen], bool], seconds: float, what: str) -> None:
        """Draws what comes until it is so; fails with the picture when it does not become so."""
        deadline = time.monotonic() + seconds
        while not is_so(self.screen):
            is_open = self._read(0.5)
            picture = "\n".join(self.screen.shown())
            assert is_open, f"it ended, and never {what}\n{picture}"
            assert time.monotonic() < deadline, f"never: {what}\n{picture}"

    def press_ctrl_c(self) -> None:
        os.write(self._terminal, b"\x03")

    def ended(self, seconds: float) -> int:
        """Its exit code. The terminal is as it was, with the cursor."""
        deadline = time.monotonic() + seconds
        while self._read(0.5):
            assert time.monotonic() < deadline, "it does not end\n" + "\n".join(self.screen.shown())
        code = os.waitstatus_to_exitcode(os.waitpid(self._child, 0)[1])
        self._child = 0
        assert termios.tcgetattr(self._terminal) == self._before
        assert self.screen.is_cursor_shown
        return code

    def _read(self, seconds: float) -> bool:
        """False when the other end is closed."""
        if not select.select([self._terminal], [], [], seconds)[0]:
            return True
        try:
            data = os.read(self._terminal, 65536)
        except OSError:
            return False
        text = self._decoder.decode(data)
        self.seen += text
        self.screen.write(text)
        return bool(data)
