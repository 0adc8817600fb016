"""How a run in progress looks: a live display on a terminal, plain lines otherwise.

The driver calls `started`, `phase`, `update` and `finished`; all of them return at once.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Protocol, TextIO

from orchestrator.catalog.headline import by_weight, is_automatic
from orchestrator.cli import text

if TYPE_CHECKING:
    from orchestrator.records import RunTicket


class View(Protocol):
    """What is known of a run at one moment; `execution.driver.LiveView` is one."""

    @property
    def run(self) -> str: ...
    @property
    def epoch(self) -> int | None: ...
    @property
    def step(self) -> int: ...
    @property
    def metrics(self) -> Mapping[str, float]: ...
    @property
    def rate(self) -> float: ...
    @property
    def elapsed(self) -> float: ...


class Ending(Protocol):
    """How a run ended; `execution.driver.Outcome` is one."""

    @property
    def name(self) -> str: ...
    @property
    def status(self) -> Any: ...
    @property
    def reason(self) -> str: ...


class Display(Protocol):
    def started(self, ticket: RunTicket) -> None: ...
    def phase(self, what: str) -> None: ...
    def update(self, view: View) -> None: ...
    def finished(self, outcome: Ending) -> None: ...
    def close(self) -> None:
        """Leave the terminal as it was, whatever happened. May be called twice."""
        ...


MAX_METRICS = 6
"""More do not fit a line; the newest values of all are in `orc metrics`."""


def display(stream: TextIO) -> Display:
    """The live one where a person looks through a terminal."""
    return LiveDisplay(stream) if stream.isatty() else LineDisplay(stream)


def headline(ticket: RunTicket) -> str:
    return f"run {ticket.name} ({ticket.run}), experiment {ticket.experiment}, attempt {ticket.attempt}"


def position(view: View) -> str:
    epoch = "" if view.epoch is None else f"epoch {view.epoch}  "
    return f"{epoch}step {view.step}"


def chosen_metrics(metrics: Mapping[str, float], most: int = MAX_METRICS) -> list[tuple[str, float]]:
    """Those that tell most, when not all fit: what is validated or tested before what is trained, the rest by name."""
    return [(key, metrics[key]) for key in by_weight(metrics)[:most] if not is_automatic(key)]


class LineDisplay:
    """One line when something changes, at most every `interval` seconds: for files, pipes and job logs."""

    def __init__(
        self, stream: TextIO, *, interval: float = 2.0, monotonic: Callable[[], float] = time.monotonic
    ) -> None:
        self._stream, self._interval, self._monotonic = stream, interval, monotonic
        self._next = -math.inf
        self._last = ""

    def started(self, ticket: RunTicket) -> None:
        self._write(headline(ticket))

    def phase(self, what: str) -> None:
        self._write(what)

    def update(self, view: View) -> None:
        now = self._monotonic()
        if now < self._next:
            return
        shown = "  ".join(
            [position(view), *(f"{key}={text.number(value)}" for key, value in chosen_metrics(view.metrics))]
        )
        if shown == self._last:
            return
        self._last, self._next = shown, now + self._interval
        self._write(f"{text.duration(view.elapsed):>6}  {shown}")

    def finished(self, outcome: Ending) -> None:
        self._write(ending(outcome))

    def close(self) -> None:
        pass

    def _write(self, line: str) -> None:
        self._stream.write(line + "\n")
        self._stream.flush()


class LiveDisplay:
    """A spinner with the phase while workers start, then step, epoch, newest metrics and time; redrawn in place."""

    def __init__(self, stream: TextIO) -> None:
        from rich.console import Console
        from rich.live import Live
        from rich.spinner import Spinner

        self._console = Console(file=stream)
        self._spinner = Spinner("dots", text="starting")
        self._live = Live(self._spinner, console=self._console, refresh_per_second=8, transient=True)
        self._live.start()
        self._is_open = True

    def started(self, ticket: RunTicket) -> None:
        self._print(headline(ticket), "bold")

    def phase(self, what: str) -> None:
        from rich.text import Text

        self._spinner.update(text=Text(what))
        self._live.update(self._spinner)

    def update(self, view: View) -> None:
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        speed = f"  {view.rate:,.0f} points/s" if view.rate else ""
        self._spinner.update(text=Text(f"{position(view)}  {text.duration(view.elapsed)}{speed}"))
        metrics = Table.grid(padding=(0, 2))
        for key, value in chosen_metrics(view.metrics):
            metrics.add_row("", Text(key), Text(text.number(value), style="cyan"))
        self._live.update(Group(self._spinner, metrics))

    def finished(self, outcome: Ending) -> None:
        self.close()
        self._print(ending(outcome), "bold green" if str(outcome.status) == "FINISHED" else "bold red")

    def close(self) -> None:
        if self._is_open:
            self._is_open = False
            self._live.stop()

    def _print(self, line: str, style: str) -> None:
        self._console.print(line, style=style, markup=False, highlight=False, soft_wrap=True)


def ending(outcome: Ending) -> str:
    why = f": {outcome.reason}" if outcome.reason else ""
    return f"run {outcome.name} {outcome.status}{why}"
