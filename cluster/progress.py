"""What somebody who waits gets to see: one line per part that is done, and a sign of life for what takes longer."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

PATIENCE = 2.0
"""Seconds without a word."""


class Step:
    """One thing that is being done; set `result` to say how it ended."""

    def __init__(self, name: str, doing: str) -> None:
        self.name, self.doing = name, doing
        self.result = ""
        self.started = time.monotonic()


class Progress:
    """Steps may run in several threads. In a terminal a spinner names what is waited for, elsewhere plain lines do."""

    def __init__(self, stream: TextIO | None = None, *, quiet: bool = False) -> None:
        self._stream = stream or sys.stdout
        self._quiet = quiet
        self._lock = threading.Lock()
        self._active: dict[str, Step] = {}
        self._spinner = None
        if self._stream.isatty() and not quiet:
            from rich.console import Console  # only here: a tenth of a second that a script need not wait for

            self._console = Console(file=self._stream, highlight=False)
            self._spinner = self._console.status("")

    @contextmanager
    def step(self, name: str, doing: str = "starting") -> Iterator[Step]:
        """Shows that `name` is at work; an exception passes through, the caller tells it."""
        step = Step(name, doing)
        ended = threading.Event()
        with self._lock:
            self._active[name] = step
            self._spin()
        watcher = threading.Thread(target=self._watch, args=(step, ended), daemon=True)
        watcher.start()
        try:
            yield step
        except BaseException:
            self._end(step, ended)
            raise
        self._end(step, ended)
        if step.result:
            self.say(f"{name:<12} {step.result}  ({time.monotonic() - step.started:.1f} s)")

    def say(self, line: str) -> None:
        if self._quiet:
            return
        with self._lock:
            if self._spinner:
                self._console.print(line, markup=False)
            else:
                print(line, file=self._stream, flush=True)

    def _watch(self, step: Step, ended: threading.Event) -> None:
        wait = PATIENCE
        while not ended.wait(wait) and not self._spinner:
            self.say(f"{step.name:<12} {step.doing}, {time.monotonic() - step.started:.0f} s so far")
            wait = min(wait * 2.5, 30)

    def _end(self, step: Step, ended: threading.Event) -> None:
        ended.set()
        with self._lock:
            self._active.pop(step.name, None)
            self._spin()

    def _spin(self) -> None:
        if not self._spinner:
            return
        if self._active:
            self._spinner.update(", ".join(f"{step.doing} {step.name}" for step in self._active.values()) + " …")
            self._spinner.start()
        else:
            self._spinner.stop()
