"""What `orc watch` knows of a run and how it shows it. Pure: answers of the catalog and the time in, text out."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from orchestrator.catalog.headline import AUTOMATIC, by_weight, is_automatic
from orchestrator.cli import text
from orchestrator.cli.sparkline import mean, sparkline
from orchestrator.live_records import LiveCheckpoint, LiveRun, LiveState, LiveValue

if TYPE_CHECKING:
    from orchestrator.status import RunStatus
    from orchestrator.store.views import RunDetail, SinkLag

HISTORY = 600
"""Values of a series that are kept for its sparkline; when there are more, every second one goes."""
WIDTH = 40
"""Characters of a sparkline."""
SEEDED = 50
"""Series whose stored curves are asked for."""
DIRECTORY = "directory"
"""The sink that is no mirror: run directories."""
EPOCH = "epoch"
"""The key under which a train function logs where it is."""

Series = tuple[str, int]
"""Key and rank."""
Mark = tuple[float, float]
"""Time and value."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """What somebody wants to see."""

    keys: Sequence[str] = ()
    """Patterns as in a shell; empty: all but those that are recorded without being asked."""
    rank: int | None = None
    all_ranks: bool = False

    def has_key(self, key: str) -> bool:
        return any(fnmatchcase(key, pattern) for pattern in self.keys) if self.keys else not is_automatic(key)

    def of(self, series: Iterable[Series]) -> list[Series]:
        """Those to be shown, what tells most first; of each key the lowest rank, unless other ranks were asked for."""
        shown = [each for each in series if self.has_key(each[0]) and self.rank in (None, each[1])]
        if not self.all_ranks:
            shown = list({key: (key, rank) for key, rank in sorted(shown, reverse=True)}.values())
        place = {key: at for at, key in enumerate(by_weight({key for key, _ in shown}))}
        return sorted(shown, key=lambda each: (place[each[0]], each[1]))


@dataclass(slots=True)
class Watched:
    """One run while it is watched."""

    run: RunDetail
    choice: Choice
    state: LiveState | None = None
    values: dict[Series, LiveValue] = field(default_factory=dict)
    histories: dict[Series, list[Mark]] = field(default_factory=dict)
    checkpoints: tuple[LiveCheckpoint, ...] = ()
    mirrors: Sequence[SinkLag] = ()
    source: str = ""
    trouble: str = ""
    """Why nothing new comes."""
    _seeded: set[Series] = field(default_factory=set)
    _steps: deque[tuple[float, int]] = field(default_factory=lambda: deque(maxlen=HISTORY))
    _epochs: deque[tuple[float, float]] = field(default_factory=lambda: deque(maxlen=HISTORY))

    @property
    def status(self) -> RunStatus:
        return self.run.status if self.run.status.is_terminal or self.state is None else self.state.status

    def merge(self, found: LiveRun) -> list[LiveValue]:
        """Takes an answer in. Gives the values that are new, the newest of each series that is to be shown."""
        is_other_attempt = self.state is not None and found.state.attempt != self.state.attempt
        if is_other_attempt and found.state.attempt < self.state.attempt:  # type: ignore[union-attr]
            return []
        if is_other_attempt:
            self._steps.clear()
            self._epochs.clear()
        # What is committed is behind what is live: it only adds what was missed.
        is_behind = found.source != "redis" and self.source == "redis" and not is_other_attempt
        if not is_behind or self.state is None or found.state.time > self.state.time:
            self.state, self.source = found.state, found.source
        new = {}
        for value in found.values:
            series = (value.key, value.rank)
            known = self.values.get(series)
            if known is not None and (_same(value, known) or (is_behind and value.time <= known.time)):
                continue
            self.values[series] = new[series] = value
            history = self.histories.setdefault(series, [])
            history.append((value.time, value.value))
            if len(history) > HISTORY:
                del history[1:-1:2]
            if value.key == EPOCH and (not self._epochs or self._epochs[-1][1] != value.value):
                self._epochs.append((value.time, value.value))
        if not self._steps or self._steps[-1][1] != self.state.step:
            self._steps.append((self.state.time, self.state.step))
        if found.checkpoints and not is_behind:
            self.checkpoints = found.checkpoints
        shown = set(self.choice.of(self.values))
        return [value for series, value in new.items() if series in shown]

    def unseeded(self) -> list[Series]:
        """Those to be shown of which nobody asked yet what was logged before."""
        return [series for series in self.choice.of(self.values)[:SEEDED] if series not in self._seeded]

    def seed(self, series: Series, before: Sequence[Mark]) -> None:
        """What was logged before anybody watched, oldest first."""
        self._seeded.add(series)
        seen = self.histories.get(series, [])
        began = seen[0][0] if seen else math.inf
        self.histories[series] = [*(mark for mark in before if mark[0] < began), *seen]

    # -- numbers

    @property
    def epoch(self) -> int | None:
        values = [self.values[each].value for each in sorted(self.values, key=lambda s: s[1]) if each[0] == EPOCH]
        return int(values[0]) if values and math.isfinite(values[0]) else None

    def steps_per_second(self) -> float:
        if self.state is not None and self.state.steps_per_second > 0:
            return self.state.steps_per_second
        return _slope(self._steps)

    def eta(self, now: float) -> float | None:
        """Seconds until the last step or epoch that the config tells of; None when nothing tells."""
        state = self.state
        if state is None or self.status.is_terminal:
            return None
        rate, done = self.steps_per_second(), state.step
        if state.steps and rate > 0:
            left, last = (state.steps - done) / rate, self._steps[-1][0]
        elif state.epochs and (pace := _slope(self._epochs)) > 0:
            # An epoch is counted from 0 and logged at its end, mostly.
            left, last = (state.epochs - 1 - self._epochs[-1][1]) / pace, self._epochs[-1][0]
        else:
            return None
        return max(0.0, left - max(0.0, now - last))

    # -- how it looks

    def document(self, new: Sequence[LiveValue], now: float) -> dict[str, Any]:
        """One line of `--json`."""
        state = self.state
        lowest = dict(sorted(self.values, reverse=True))
        return text.jsonable({
            "run": self.run.run, "name": self.run.name, "status": self.status, "time": now,
            "reason": self.run.reason if self.status.is_terminal else "",
            "attempt": state.attempt if state else self.run.attempt,
            "step": state.step if state else 0, "steps": (state.steps or None) if state else None,
            "epoch": self.epoch, "epochs": (state.epochs or None) if state else None,
            "points": state.points if state else 0,
            "points_per_second": state.points_per_second if state else 0.0,
            "steps_per_second": self.steps_per_second(), "eta": self.eta(now), "source": self.source,
            "metrics": {
                label(value.key, value.rank, lowest[value.key]): {
                    "step": value.step, "value": value.value, "time": value.time, "rank": value.rank,
                }
                for value in new
            },
            "checkpoints": [checkpoint.id for checkpoint in self.checkpoints],
            "mirrors": {
                lag.sink: {"points": lag.points, "seconds": lag.seconds, "state": lag.state, "error": lag.error}
                for lag in self.mirrors
            },
        })  # fmt: skip

    def title(self) -> str:
        attempt = self.state.attempt if self.state else self.run.attempt
        return f"{text.printable(self.run.name)} ({self.run.run})  {self.status}, attempt {attempt}"

    def position(self, now: float) -> str:
        """Where it is, how fast, and how long it will take."""
        state = self.state
        if state is None or not (state.step or self.values):
            return "no metrics" if self.status.is_terminal else "waiting for the first metrics"
        eta, rate = self.eta(now), self.steps_per_second()
        parts = [
            "" if self.epoch is None else f"epoch {self.epoch}" + (f"/{state.epochs}" if state.epochs else ""),
            f"step {state.step}" + (f"/{state.steps}" if state.steps else ""),
            f"{text.number(rate)} steps/s" if rate else "",
            f"{text.number(state.points_per_second)} points/s" if state.points_per_second else "",
            "" if eta is None else f"ETA {text.duration(eta)}",
            "" if self.status.is_terminal else f"{text.age(now - state.time)}",
        ]
        return "  ".join(part for part in parts if part)

    def rows(self, width: int = WIDTH, most: int | None = None) -> list[tuple[str, str, str, str]]:
        """Label, newest value, its step, sparkline of at most `width` characters; of the `most` first."""
        lowest = dict(sorted(self.values, reverse=True))
        return [
            (
                text.printable(label(key, rank, lowest[key])),
                text.number(self.values[key, rank].value),
                str(self.values[key, rank].step),
                sparkline(evenly(self.histories.get((key, rank), ()), width), width) if width > 0 else "",
            )
            for key, rank in self.choice.of(self.values)[:most]
        ]

    def notes(self, now: float) -> list[str]:
        """Trouble, checkpoints, mirrors, and where all this comes from."""
        lines = [text.one_line(self.trouble, 200)] if self.trouble else []
        if self.values and (self.choice.keys or self.choice.rank is not None) and not self.choice.of(self.values):
            ranks = sorted({rank for _, rank in self.values})
            there = f"{len({key for key, _ in self.values})} metrics of rank {', '.join(map(str, ranks[:8]))}"
            lines.append(f"nothing fits --keys and --rank; there are {there}")
        if self.checkpoints:
            shown = [
                f"{c.id} ({text.size(c.size_bytes)}, {text.age(now - c.time)}{', best' if c.is_best else ''})"
                for c in self.checkpoints[:3]
            ]
            lines.append(f"checkpoints  {'  '.join(shown)}")
        hidden = {key for key, _ in self.values if is_automatic(key)}
        if hidden and not self.choice.keys and self.choice.rank is None:
            patterns = " ".join(f"'{word}/*'" for word in AUTOMATIC)
            lines.append(f"{len(hidden)} more     --keys {patterns}")
        # Run directories get points every few minutes and at the end; that they are behind until then is no news.
        told = [lag for lag in self.mirrors if lag.sink != DIRECTORY or lag.error]
        if told:
            lines.append(f"mirrors      {'  '.join(mirror(lag) for lag in told)}")
        if self.source == "database" and not self.status.is_terminal:
            lines.append("from the database, every half second, and not from Redis")
        return [text.printable(line) for line in lines]


def label(key: str, rank: int, lowest: int) -> str:
    return key if rank == lowest else f"{key}/rank_{rank}"


def mirror(lag: SinkLag) -> str:
    if lag.error:
        return f"{lag.sink}: {text.one_line(lag.error, 60)}"
    if not lag.runs:
        return f"{lag.sink}: up to date"
    return f"{lag.sink}: {text.duration(lag.seconds)} and {lag.points} points behind"


def evenly(marks: Sequence[Mark], width: int) -> list[float]:
    """`width` values at even distances in time, each the mean of what came since the one before it; the values
    themselves where there are no more of them.

    Example: evenly([(0.0, 1.0), (8.0, 3.0), (9.0, 5.0)], 2) == [1.0, 4.0].
    """
    if len(marks) <= width or marks[-1][0] <= marks[0][0]:
        return [value for _, value in marks]
    began, ended = marks[0][0], marks[-1][0]
    parts: list[list[float]] = [[] for _ in range(width)]
    for time, value in marks:
        parts[min(width - 1, max(0, int((time - began) / (ended - began) * width)))].append(value)
    found: list[float] = []
    for part in parts:
        found.append(mean(part) if part else found[-1])  # the first part has the first mark
    return found


def _same(value: LiveValue, known: LiveValue) -> bool:
    return value == known or (
        math.isnan(value.value) and math.isnan(known.value) and (value.step, value.time) == (known.step, known.time)
    )


def _slope(marks: Sequence[tuple[float, float]]) -> float:
    """Progress per second between the first and the last mark; 0 when that is not known."""
    if len(marks) < 2:
        return 0.0
    (began, first), (ended, last) = marks[0], marks[-1]
    return (last - first) / (ended - began) if ended > began and last > first else 0.0
