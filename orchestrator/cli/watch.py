"""`orc watch`: a run while it goes on."""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import threading
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from orchestrator.catalog.questions import Catalog
from orchestrator.cli.access import asked_catalog
from orchestrator.cli.main import FAILED, OK
from orchestrator.cli.output import STATUS_STYLES, Output
from orchestrator.cli.parser import UsageError
from orchestrator.cli.watched import WIDTH, Choice, Watched
from orchestrator.errors import ServiceUnavailable
from orchestrator.status import RunStatus

if TYPE_CHECKING:
    from orchestrator.live_records import LiveValue

WAIT = 1.0
"""Seconds that one question for changes may wait."""
LOOK = 2.0
"""Seconds between two looks at the record: has the run ended, was something missed, how far are the mirrors?"""
SOON = 0.1
"""The same once the run seems to have ended."""
AGAIN = 1.0
"""Seconds until whoever does not answer is asked again."""
SEEDING, SEEDING_AT_THE_END = 0.1, 2.0
"""Seconds after each frame, and before the last one, in which stored curves are read for the sparklines."""

GAP = 2
"""Blanks between two columns."""
LEAST_NAME = 12
"""Columns of a name where there are few."""

HIDE_CURSOR, SHOW_CURSOR = "\x1b[?25l", "\x1b[?25h"
ERASE_RIGHT, ERASE_BELOW, CLEAR = "\x1b[K", "\x1b[J", "\x1b[H\x1b[2J"


class View(Protocol):
    interval: float
    """Least seconds between two looks."""
    is_redrawn: bool
    """Shows curves; also when nothing new came, because it tells how long ago that was."""

    def show(self, watched: Watched, new: Sequence[LiveValue], now: float) -> None: ...
    def say(self, watched: Watched, message: str) -> None: ...
    def close(self) -> None: ...


def watch(arguments: argparse.Namespace, output: Output) -> int:
    choice = _choice(arguments)
    watched: Watched | None = None
    view: View | None = None
    try:
        while True:
            try:
                with asked_catalog(arguments) as catalog:
                    if watched is None:
                        watched = Watched(catalog.run(arguments.run), choice)
                        if arguments.once:
                            return _once(catalog, watched, output, redis=not arguments.no_redis)
                        view = _view(output, arguments.interval)
                    assert view is not None
                    follow(catalog, watched, view, redis=not arguments.no_redis)
                break
            except ServiceUnavailable as error:
                if watched is None or view is None:
                    raise
                view.say(watched, f"orc: {error} Trying again.")
                time.sleep(AGAIN)
    finally:
        if view is not None:
            view.close()
    if not output.as_json:
        why = f": {watched.run.reason}" if watched.run.reason else ""
        output.line(f"run {watched.run.name} {watched.run.status}{why}")
        output.stdout.flush()
    return OK if watched.run.status is RunStatus.finished else FAILED


def _choice(arguments: argparse.Namespace) -> Choice:
    rank = arguments.rank
    if rank not in ("", "all") and not rank.isdecimal():
        raise UsageError(f"--rank {rank}: a rank is a number from 0 up, or `all`.")
    return Choice(
        keys=arguments.keys or (), rank=int(rank) if rank.isdecimal() else None, all_ranks=rank == "all"
    )  # fmt: skip


def _view(output: Output, interval: float | None) -> View:
    if output.as_json:
        output.has_result = True
        return Lines(output, 0.0 if interval is None else interval)
    if output.is_rich and os.environ.get("TERM", "").lower() not in ("", "dumb", "unknown"):
        return Screen(output, 0.25 if interval is None else interval)
    return Lines(output, 2.0 if interval is None else interval)


def _once(catalog: Catalog, watched: Watched, output: Output, *, redis: bool) -> int:
    new = watched.merge(catalog.live(watched.run.run, redis=redis))
    watched.mirrors = catalog.sink_lags(watched.run.run)
    if not output.as_json:
        seed(catalog, watched, math.inf)
    now = time.time()

    def render() -> None:
        output.line(watched.title(), style="bold")
        output.line(watched.position(now))
        if watched.rows(0):
            output.table(("metric", "newest", "step", "curve"), watched.rows(), right=(1, 2))
        for line in watched.notes(now):
            output.line(line)

    output.result(watched.document(new, now), render)
    return OK


def follow(catalog: Catalog, watched: Watched, view: View, *, redis: bool) -> None:
    """Shows what changes until the run has ended. Raises ServiceUnavailable."""
    run, cursor = watched.run.run, ""
    waiting: dict[tuple[str, int], LiveValue] = {}
    shown_at = looked_at = float("-inf")
    before: object = None
    while True:
        due = max(0.0, shown_at + view.interval - time.monotonic()) if waiting else WAIT
        wait = min(due, SOON if watched.status.is_terminal else WAIT)
        asked_at = time.monotonic()
        found = catalog.live(run, after=cursor, wait=wait, redis=redis)
        if found.cursor == cursor:  # an API server with too many watchers does not wait
            time.sleep(max(0.0, asked_at + wait - time.monotonic()))
        cursor, watched.trouble = found.cursor, ""
        waiting |= {(value.key, value.rank): value for value in watched.merge(found)}
        now = time.monotonic()
        if now - looked_at >= (SOON if found.state.status.is_terminal else LOOK):
            looked_at = now
            watched.run = catalog.run(run)
            watched.mirrors = catalog.sink_lags(run)
            committed = catalog.live(run, redis=False)
            waiting |= {(value.key, value.rank): value for value in watched.merge(committed)}
        has_ended = watched.run.status.is_terminal
        outline = (watched.status, watched.state and watched.state.attempt, watched.checkpoints)
        is_news = bool(waiting) or outline != before or view.is_redrawn
        if has_ended and view.is_redrawn:
            seed(catalog, watched, SEEDING_AT_THE_END)
        if has_ended or (is_news and now - shown_at >= view.interval):
            view.show(watched, list(waiting.values()), time.time())
            waiting, shown_at, before = {}, now, outline
            if view.is_redrawn and not has_ended:
                seed(catalog, watched, SEEDING)
        if has_ended:
            return


def seed(catalog: Catalog, watched: Watched, seconds: float) -> None:
    """The curves so far, as many as there is time for; at least one."""
    deadline = time.monotonic() + seconds
    for key, rank in watched.unseeded():
        curve = catalog.curve(watched.run.run, key, rank=rank, most=WIDTH)
        watched.seed((key, rank), list(zip(curve.times.tolist(), curve.last.tolist(), strict=True)))
        if time.monotonic() > deadline:
            return


class Lines:
    """One line per change: for files, pipes and programs (`--json`)."""

    is_redrawn = False

    def __init__(self, output: Output, interval: float) -> None:
        self._output, self.interval = output, interval

    def say(self, watched: Watched, message: str) -> None:
        if message != watched.trouble:
            self._output.message(message)
        watched.trouble = message

    def show(self, watched: Watched, new: Sequence[LiveValue], now: float) -> None:
        if self._output.as_json:
            line = json.dumps(watched.document(new, now), allow_nan=False, ensure_ascii=False)
        else:
            changed = {(value.key, value.rank) for value in new}
            shown = [row for row, series in zip(watched.rows(), watched.choice.of(watched.values), strict=True)
                     if series in changed]  # fmt: skip
            metrics = "  ".join(f"{name}={value}" for name, value, _, _ in shown)
            line = "  ".join(filter(None, [str(watched.status), watched.position(now), metrics]))
        self._output.stdout.write(f"{line}\n")
        self._output.stdout.flush()

    def close(self) -> None:
        pass


class Screen:
    """A view that is redrawn in place, on as many lines as the terminal has. A line is written over the one before it,
    not erased first, so nothing flickers.
    """

    is_redrawn = True

    def __init__(self, output: Output, interval: float) -> None:
        self.interval = interval
        self._out = output.stdout
        self._console = output.console()
        self._size = self._console.size
        self._drawn = 0
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, _end)
        self._out.write(HIDE_CURSOR)

    def show(self, watched: Watched, new: Sequence[LiveValue], now: float) -> None:
        size = self._console.size
        if size != self._size:
            # The terminal may have folded what is there, so nobody knows where it began.
            begin, self._size = CLEAR, size
        else:
            begin = f"\x1b[{self._drawn}A" if self._drawn else ""
        # The last column stays free: what erases the rest of a full line erases its last character too.
        lines = [self._styled(line, size.width - 1) for line in frame(watched, now, size.width - 1, size.height - 1)]
        self._drawn = len(lines)
        self._out.write("".join(["\r", begin, *(f"{line}{ERASE_RIGHT}\n" for line in lines), ERASE_BELOW]))
        self._out.flush()

    def say(self, watched: Watched, message: str) -> None:
        watched.trouble = message
        self.show(watched, (), time.time())

    def close(self) -> None:
        self._out.write(f"\r{ERASE_RIGHT}{SHOW_CURSOR}")  # over the ^C of who ended it
        self._out.flush()

    def _styled(self, line: Line, width: int) -> str:
        from rich.text import Text

        with self._console.capture() as shown:
            self._console.print(Text.assemble(*line), no_wrap=True, overflow="ellipsis", width=width, end="")
        return shown.get()


Line = list[tuple[str, str]]
"""Pieces of text, each with its style."""


def frame(watched: Watched, now: float, width: int, height: int) -> list[Line]:
    """At most `height` lines; each is cut to `width` columns later, if it is longer, and loses nothing that counts."""
    from rich.cells import cell_len, set_cell_size

    title = (watched.title(), f"bold {STATUS_STYLES.get(watched.status.value, '')}".strip())
    lines: list[Line] = [[title], [(watched.position(now), "")]]
    notes: list[Line] = [[(line, "dim")] for line in watched.notes(now)]
    rows = watched.rows(0)
    room = max(1, height - len(lines) - len(notes))
    if len(rows) > room:
        room = max(1, room - 1)
        notes.insert(0, [(f"{len(rows) - room} more     --keys 'val/*' chooses", "dim")])
        rows = rows[:room]
    if not rows:
        return [*lines, *notes][:height]
    newest, steps = (max(len(row[column]) for row in rows) for column in (1, 2))
    left = width - newest - steps - 3 * GAP
    names = min(max(cell_len(row[0]) for row in rows), max(left - WIDTH, width // 3, LEAST_NAME))
    for name, value, step, curve in watched.rows(min(WIDTH, left - names), len(rows)):
        shown = name if cell_len(name) <= names else f"{set_cell_size(name, names - 1).rstrip()}…"
        lines.append([
            (set_cell_size(shown, names + GAP), ""), (value.rjust(newest), "cyan"),
            (step.rjust(steps + GAP), "dim"), (" " * GAP + curve, "green"),
        ])  # fmt: skip
    return [*lines, *notes][:height]


def _end(number: int, _: object) -> None:
    raise SystemExit(128 + number)  # through `close`, which gives the terminal back
