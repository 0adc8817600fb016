"""Says how far something is, once it takes longer than two seconds."""

from __future__ import annotations

import threading
import time

from orchestrator.cli import text
from orchestrator.cli.output import Output

PATIENCE = 2.0
"""Seconds of silence."""
ON_TERMINAL, IN_FILE = 0.3, 10.0
"""Seconds between two words: a line that is redrawn, or lines that stay."""


class Patience:
    """Use it as a context. `say` may be called as often as one likes, from any thread: it only remembers."""

    def __init__(self, output: Output, what: str) -> None:
        self._output, self._what = output, what
        self._begun = time.monotonic()
        self._is_over = threading.Event()
        self._is_terminal = output.stderr.isatty()
        self._thread = threading.Thread(target=self._tell, name="patience", daemon=True)

    def say(self, what: str) -> None:
        """What is being done now."""
        self._what = what

    def bytes(self, what: str, done_bytes: int, total_bytes: int) -> None:
        self._what = f"{text.size(done_bytes)} of {text.size(total_bytes)}  {what}"

    def __enter__(self) -> Patience:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._thread.join()

    def _tell(self) -> None:
        wait, is_shown = PATIENCE, False
        while not self._is_over.wait(wait):
            passed = text.duration(time.monotonic() - self._begun)
            line = f"{text.one_line(text.printable(self._what), 68)}  {passed}"
            self._output.stderr.write(f"\r\033[K{line}" if self._is_terminal else f"{line}\n")
            self._output.stderr.flush()
            wait, is_shown = ON_TERMINAL if self._is_terminal else IN_FILE, True
        if is_shown and self._is_terminal:
            self._output.stderr.write("\r\033[K")
            self._output.stderr.flush()
