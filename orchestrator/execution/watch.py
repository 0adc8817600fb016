"""Whether a training gets on, keeps to its limits, and whether one of its ranks is slower than the others. Pure: the
time and the newest values come in, alarms go out.

Progress is any point of a rank's own: steps, reports, `run.alive`, batches of an evaluation. What a machine's sampler
records is none. How long a training may stand still is learnt from how long it did before.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any

from orchestrator.failures.rules import FailureKind

OFF = 0.0
HOURS = "resources.limits.hours"
GAP = 5.0
"""Seconds between two looks that were looked at; what is more passed while nobody watched, and counts for nothing."""
HALF_LIFE = 3600.0
"""Seconds in which the longest interval that was seen counts half: a long phase returns, a slow start does not."""
STALLED = 0.5
"""At this share of the time that a training may stand still there is one warning."""
WARNED, FORGOTTEN = 0.90, 0.85
"""At this share of a limit there is one warning; below that one it may come again."""
SUSTAINED = 30.0
"""Seconds that a value must be over its limit, in two samples at least."""
SLOWER = 0.5
"""By this share of the others' step time a rank takes longer, or waits longer for its data, to count as slow."""
LEAST_SLOWER = 0.001
"""And by so many seconds."""
WINDOWS = 5
"""Values in a row that say so."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HangRules:
    """The settings of `failures.hang`, in seconds."""

    least: float = 120.0
    times: float = 20.0
    start: float = 1800.0

    @classmethod
    def of(cls, section: Mapping[str, Any]) -> HangRules:
        return cls(**{name: float(section[name]) for name in cls.__dataclass_fields__ if name in section})


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """The settings of `resources.limits`; 0: no limit. Of memory and CPU each rank has its own."""

    hours: float = OFF
    memory_gb: float = OFF
    gpu_memory_gb: float = OFF
    cpu_percent: float = OFF

    @classmethod
    def of(cls, section: Mapping[str, Any]) -> Limits:
        return cls(**{name: float(section[name]) for name in cls.__dataclass_fields__ if name in section})

    @property
    def needs_samples(self) -> bool:
        """Whether a machine's sampler must tell how much is used."""
        return bool(self.memory_gb or self.gpu_memory_gb or self.cpu_percent)


class AlarmKind(StrEnum):
    stall = "stall"
    """It stands still for longer than usual."""
    hang = "hang"
    """For so long that it will not go on."""
    near_limit = "near-limit"
    over_limit = "over-limit"
    slow_rank = "slow-rank"


@dataclass(frozen=True, slots=True, kw_only=True)
class Alarm:
    """What was found."""

    kind: AlarmKind
    what: str
    rank: int = -1
    """-1: of no single one."""
    details: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class RankNow:
    """The newest of one rank, see `tracking.live.LiveValues.of`."""

    rank: int
    step: int = 0
    time: float = 0.0
    """Of its newest own point, by its own clock."""
    values: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    """key -> (time, value), of keys that the watch looks at."""


def ranks_of(live: Mapping[str, Any]) -> list[RankNow] | None:
    """From the tracker's answer; None where it knows nothing of the run."""
    if "ranks" not in live:
        return None
    return [
        RankNow(
            rank=int(each["rank"]), step=int(each["step"]), time=float(each["time"]),
            values={key: (float(at), float(value)) for key, (at, value) in each["values"].items()},
        )
        for each in live["ranks"]
    ]  # fmt: skip


def limit_error(alarm: Alarm) -> dict[str, Any]:
    """How it is stored of an attempt that it was stopped for a limit."""
    is_time = alarm.details.get("key") == HOURS
    return {
        "kind": (FailureKind.time_limit if is_time else FailureKind.limit).value,
        "type": "LimitReached", "message": alarm.what, "what": alarm.what, "rank": alarm.rank,
        "hint": f"{alarm.details.get('key')} is {alarm.details.get('limit'):g}.", "is_restart_useful": False,
    }  # fmt: skip


class Watch:
    """Of one attempt; asked about once a second, from its beginning. Each alarm comes once until its cause is gone.

    `spent`: seconds that earlier attempts took. One thread at a time.
    """

    def __init__(self, hang: HangRules, limits: Limits | None = None, *, now: float, spent: float = 0.0) -> None:
        self._hang, self._spent, self._began = hang, spent, now
        self._looked = self._moved = now
        self._position: tuple[Any, ...] | None = None
        self._stale: dict[tuple[int, str], float] = {}
        """What the attempt before left: (rank, key) -> time of its value."""
        self.steps = 0
        """How often it was seen to get on."""
        self._longest, self._longest_at = 0.0, now
        self._told: set[AlarmKind] = set()
        """Of this standstill."""
        self._time_told: set[AlarmKind] = set()
        limits = limits or Limits()
        self._hours = limits.hours
        self._gauges = _gauges(limits)
        self._slow = _SlowRanks()

    def step(self, now: float, ranks: Sequence[RankNow] | None, *, is_quiet: bool = False) -> list[Alarm]:
        """`ranks` are None while nobody tells. `is_quiet`: it stands still for a reason: it waits for its place, or was
        asked to stop."""
        unseen = max(now - self._looked - GAP, 0.0)
        self._looked = now
        self._moved += unseen
        found = list(self._time(now))
        if ranks is None or is_quiet:
            self._moved = now
            return found
        position = tuple((each.rank, each.step, each.time) for each in ranks if each.time)
        if self._position is None:
            self._stale = {(each.rank, key): at for each in ranks for key, (at, _) in each.values.items()}
        elif position != self._position:
            self._progress(now)
        self._position = position
        ranks = [replace(each, values=self._fresh(each)) for each in ranks]
        found += self._standstill(now)
        for gauge in self._gauges:
            found += gauge.step(now, ranks)
        return [*found, *self._slow.step(ranks)]

    @property
    def limit(self) -> float:
        """Seconds that it may stand still now; 0: for ever."""
        if not self._hang.least:
            return OFF
        if self.steps < 2:
            return self._hang.start
        return max(self._hang.least, self._hang.times * self._remembered(self._looked))

    @property
    def is_hanging(self) -> bool:
        """It was said, and nothing has moved since."""
        return AlarmKind.hang in self._told

    def put_off(self, now: float, seconds: float) -> None:
        """There is a reason to wait: it hangs if it has not moved in so many seconds from now."""
        self._moved = now + seconds - self.limit
        self._told.discard(AlarmKind.hang)

    @property
    def hours(self) -> float:
        """That the run took, all attempts together."""
        return (self._spent + self._looked - self._began) / 3600

    def _fresh(self, rank: RankNow) -> dict[str, tuple[float, float]]:
        return {key: told for key, told in rank.values.items() if self._stale.get((rank.rank, key)) != told[0]}

    def _progress(self, now: float) -> None:
        if self.steps:
            interval, before = now - self._moved, self._remembered(now)
            if interval >= before:
                self._longest, self._longest_at = interval, now
        self.steps += 1
        self._moved = now
        self._told.clear()

    def _remembered(self, now: float) -> float:
        return self._longest * 0.5 ** ((now - self._longest_at) / HALF_LIFE)

    def _standstill(self, now: float) -> Iterator[Alarm]:
        limit, still = self.limit, now - self._moved
        if not limit:
            return
        what = "no progress" if self.steps else "no first step"
        details = {"seconds": round(still, 1), "limit": round(limit, 1), "longest": round(self._longest, 3)}
        if still > limit and AlarmKind.hang not in self._told:
            self._told |= {AlarmKind.hang, AlarmKind.stall}
            usual = f"; until now {self._longest:.3g} s was the longest" if self.steps > 1 else ""
            words = f"{what} for {still:.0f} s, longer than {limit:.0f} s{usual}"
            yield Alarm(kind=AlarmKind.hang, what=words, details=details)
        elif still > STALLED * limit and AlarmKind.stall not in self._told:
            self._told.add(AlarmKind.stall)
            words = f"{what} for {still:.0f} s; after {limit:.0f} s it counts as hanging"
            yield Alarm(kind=AlarmKind.stall, what=words, details=details)

    def _time(self, now: float) -> Iterator[Alarm]:
        """Warns and ends at once: time does not go back."""
        if not self._hours:
            return
        share, key = self.hours / self._hours, HOURS
        details = {"key": key, "limit": self._hours, "value": round(self.hours, 4)}
        words = f"{self.hours:.3g} of {self._hours:g} hours are used ({key})"
        if share >= 1 and AlarmKind.over_limit not in self._time_told:
            self._time_told |= {AlarmKind.over_limit, AlarmKind.near_limit}
            yield Alarm(kind=AlarmKind.over_limit, what=words, details=details)
        elif share >= WARNED and AlarmKind.near_limit not in self._time_told:
            self._time_told.add(AlarmKind.near_limit)
            yield Alarm(kind=AlarmKind.near_limit, what=words, details=details)


@dataclass(slots=True, kw_only=True)
class _Gauge:
    """One limit on values that ranks tell."""

    key: str
    limit: float
    unit: str
    scale: float
    """What a value is divided by to have the limit's unit."""
    begins: str
    ends: str
    is_warned: bool = False
    is_told: bool = False
    over: tuple[float, float] | None = None
    """(now, time of the sample) when it was first over, without a break since."""

    def step(self, now: float, ranks: Sequence[RankNow]) -> Iterator[Alarm]:
        most = max(self._values(ranks), default=None)
        if most is None:
            return
        value, at, rank = most
        self.over = (self.over or (now, at)) if value >= self.limit else None
        is_over = self.over is not None and now - self.over[0] >= SUSTAINED and at > self.over[1]
        details = {"key": self.key, "limit": self.limit, "value": round(value, 3)}
        words = f"rank {rank}: {value:.3g} of {self.limit:g} {self.unit} ({self.key})"
        if is_over and not self.is_told:
            self.is_told = self.is_warned = True
            yield Alarm(kind=AlarmKind.over_limit, what=words, rank=rank, details=details)
        elif value >= WARNED * self.limit and not self.is_warned:
            self.is_warned = True
            yield Alarm(kind=AlarmKind.near_limit, what=words, rank=rank, details=details)
        elif value < FORGOTTEN * self.limit:
            self.is_warned = self.is_told  # what was over its limit is ended: nothing more to warn of

    def _values(self, ranks: Sequence[RankNow]) -> Iterator[tuple[float, float, int]]:
        for each in ranks:
            for key, (at, value) in each.values.items():
                if key.startswith(self.begins) and key.endswith(self.ends):
                    yield value / self.scale, at, each.rank


def _gauges(limits: Limits) -> list[_Gauge]:
    known = {
        "memory_gb": _Gauge(
            key="resources.limits.memory_gb", limit=limits.memory_gb, unit="GB of memory", scale=1e9,
            begins="system/process/", ends="rss_bytes",
        ),
        "gpu_memory_gb": _Gauge(
            key="resources.limits.gpu_memory_gb", limit=limits.gpu_memory_gb, unit="GB of a GPU's memory", scale=1e9,
            begins="system/gpu_", ends="/memory_used_bytes",
        ),
        "cpu_percent": _Gauge(
            key="resources.limits.cpu_percent", limit=limits.cpu_percent, unit="% of a CPU", scale=1,
            begins="system/process/", ends="cpu_percent",
        ),
    }  # fmt: skip
    return [gauge for name, gauge in known.items() if getattr(limits, name)]


@dataclass(slots=True)
class _SlowRanks:
    """Ranks that take longer than the others for a step, or for their data. Ranks that wait for each other in every
    step take equally long: then only the wait for data tells who it is."""

    counts: dict[tuple[int, str], int] = field(default_factory=dict)
    seen: dict[tuple[int, str], float] = field(default_factory=dict)
    told: set[tuple[int, str]] = field(default_factory=set)

    def step(self, ranks: Sequence[RankNow]) -> Iterator[Alarm]:
        times = {each.rank: each.values["perf/step_time"] for each in ranks if "perf/step_time" in each.values}
        waits = {each.rank: each.values["perf/data_wait"] for each in ranks if "perf/data_wait" in each.values}
        if len(times) < 2:
            return
        usual = statistics.median(value for _, value in times.values())
        for key, words, known in (
            ("perf/step_time", "takes {value:.3g} s for a step, the others {others:.3g} s", times),
            ("perf/data_wait", "waits {value:.3g} s for each step's data, the others {others:.3g} s", waits),
        ):
            for rank, (at, value) in known.items():
                series = (rank, key)
                if self.seen.get(series) == at:
                    continue
                self.seen[series] = at
                rest = [other for one, (_, other) in known.items() if one != rank]
                others = statistics.median(rest) if rest else value
                base = others if key == "perf/step_time" else usual
                is_slow = value - others > max(SLOWER * base, LEAST_SLOWER)
                self.counts[series] = self.counts.get(series, 0) + 1 if is_slow else 0
                if self.counts[series] >= WINDOWS and series not in self.told:
                    self.told.add(series)
                    told = f"rank {rank} {words.format(value=value, others=others)}"
                    details = {"key": key, "value": value, "others": others}
                    yield Alarm(kind=AlarmKind.slow_rank, what=told, rank=rank, details=details)
