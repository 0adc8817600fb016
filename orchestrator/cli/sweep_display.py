"""A sweep while its driver runs here: a table that is redrawn on a terminal, else one line for each job that ended."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol, TextIO

from orchestrator.cli import progress, text
from orchestrator.cli.progress import Ending, View
from orchestrator.sweep_records import TrialRow
from orchestrator.sweeps.summary import OVER, SweepView, ended_line, left, lines

if TYPE_CHECKING:
    from orchestrator.records import RunTicket


class SweepDisplay(Protocol):
    """A `progress.Display` that also sees the sweep. `sweep` comes from another thread than the others."""

    def started(self, ticket: RunTicket) -> None: ...
    def phase(self, what: str) -> None: ...
    def update(self, view: View) -> None: ...
    def finished(self, outcome: Ending) -> None: ...
    def close(self) -> None: ...
    def sweep(self, view: SweepView) -> None: ...


def display(stream: TextIO) -> SweepDisplay:
    return LiveSweep(stream) if stream.isatty() else LineSweep(stream)


class LineSweep:
    """For files, pipes and job logs."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._told: dict[int, tuple[object, ...]] | None = None
        self._is_planned: bool | None = None
        """Whether it was said what the sweep takes; of one that goes on the plan says so."""

    def started(self, ticket: RunTicket) -> None:
        self._write(f"sweep {ticket.name} ({ticket.run}), experiment {ticket.experiment}, attempt {ticket.attempt}")

    def phase(self, what: str) -> None:
        if what != "starting workers":
            self._write(what)

    def update(self, view: View) -> None:
        pass  # what the parent run measures is made of what `sweep` shows

    def sweep(self, view: SweepView) -> None:
        known = {trial.number: _ends(trial) for trial in view.trials}
        if self._told is None:  # a sweep that goes on: what had ended before is no news
            self._told = known if any(any(each) for each in known.values()) else {}
        for trial in view.trials:
            ends = known[trial.number]
            if ends != self._told.get(trial.number, (0, "")) and any(ends):
                self._write(ended_line(view, trial))
        self._told = known
        rest = left(view)
        if rest and self._is_planned is False:
            self._write(f"left: {rest}")
        self._is_planned = rest is not None or self._is_planned or False

    def finished(self, outcome: Ending) -> None:
        self._write(ending(outcome))

    def close(self) -> None:
        pass

    def _write(self, line: str) -> None:
        self._stream.write(line + "\n")
        self._stream.flush()


class LiveSweep:
    """Redrawn in place, twice a second at most."""

    def __init__(self, stream: TextIO, *, monotonic: Callable[[], float] = time.monotonic) -> None:
        from rich.console import Console
        from rich.live import Live
        from rich.text import Text

        self._console = Console(file=stream)
        self._live = Live(Text("starting"), console=self._console, refresh_per_second=2, transient=True)
        self._live.start()
        self._is_open = True
        self._monotonic = monotonic
        self._began = monotonic()
        self._name, self._phase = "", ""
        self._view: SweepView | None = None

    def started(self, ticket: RunTicket) -> None:
        self._name = ticket.name
        self._print(f"sweep {ticket.name} ({ticket.run}), experiment {ticket.experiment}, attempt {ticket.attempt}")

    def phase(self, what: str) -> None:
        self._phase = what
        self._draw()

    def update(self, view: View) -> None:
        pass

    def sweep(self, view: SweepView) -> None:
        self._view = view
        self._phase = "" if self._phase == "starting workers" else self._phase
        self._draw()

    def finished(self, outcome: Ending) -> None:
        self.close()
        if self._view is not None:
            for line in self._lines(self._view):
                self._print(line)
        self._print(ending(outcome), "bold green" if str(outcome.status) == "FINISHED" else "bold red")

    def close(self) -> None:
        if self._is_open:
            self._is_open = False
            self._live.stop()

    def _lines(self, view: SweepView) -> list[str]:
        width, height = self._console.size.width, self._console.size.height
        return [
            *lines(view, width=width, shown=max(height - 14, 4)),
            f" {text.duration(self._monotonic() - self._began)}",
        ]

    def _draw(self) -> None:
        from rich.text import Text

        shown = self._lines(self._view) if self._view is not None else []
        self._live.update(Text("\n".join([*shown, *([self._phase] if self._phase else [])]), no_wrap=True))

    def _print(self, line: str, style: str = "") -> None:
        self._console.print(line, style=style, markup=False, highlight=False, soft_wrap=True)


def _ends(trial: TrialRow) -> tuple[object, ...]:
    """Changes with each job that a trial ended."""
    return len(trial.scores.get("rungs", ())), trial.status if trial.status in OVER else ""


def ending(outcome: Ending) -> str:
    return progress.ending(outcome).replace("run ", "sweep ", 1)
