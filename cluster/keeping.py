"""What `orc keep` does about a stack and its runs. Pure: what was found comes in, actions go out.

A dead part of the stack is answered by `orc up`, with longer and longer pauses while that does not help. A run that
somebody wants kept and nobody ended is begun again, as long as its attempts live longer than its resubmissions come.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum

from orchestrator.status import RunStatus
from orchestrator.store.views import Interrupted
from orchestrator.tracking.breaker import CircuitBreaker

SURE = 60.0
"""Seconds for which a part whose process lives must have been silent: a busy machine answers late, and a Ray head that
is started anew ends all that runs on it."""
PROMISED = 180.0
"""Seconds after which the restart that a driver decided on should have begun: then the driver is gone, too."""
STEADY = 600.0
"""An attempt that lived so many seconds was worth its resubmission: they are counted anew."""
PAUSE, LONGEST_PAUSE = 60.0, 3600.0
"""Seconds between two resubmissions of a run, doubled each time."""
COPIES = frozenset({"mlflow", "redis", "api"})
"""Parts that show what is recorded: runs go on without them."""
AT_ONCE = 8
"""Runs that are begun again before the stack is looked at again."""


class Begun(StrEnum):
    """What became of a resubmission."""

    waiting = "waiting"
    """Its job or process lives."""
    over = "over"
    stopped = "stopped"
    """By somebody: then the run is not begun again."""
    unknown = "unknown"
    """Nobody knows it (any more)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """A part of the stack, as far as keeping needs it."""

    name: str
    is_down: bool
    is_gone: bool = False
    """Its process does not live."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tried:
    """The last resubmission of a run."""

    attempt: int
    """The run's newest when it was made."""
    times: int
    """How many there were, since the run last lived for long."""
    at: float
    """Seconds since 1970."""
    job: str = ""
    """Its id at Ray's job server; empty for a process of this host."""
    pid: int = 0
    started: float = 0.0
    """When that process was born."""

    def to_json(self) -> dict[str, object]:
        return {name: getattr(self, name) for name in ("attempt", "times", "at", "job", "pid", "started")}


@dataclass(frozen=True, slots=True, kw_only=True)
class Wishes:
    """What the user asked for."""

    is_all: bool = False
    """Every interrupted run, not only those with `run.keep`."""
    is_local: bool = False
    """Runs without Ray, too, as processes of this host."""
    most: int = 5
    """Resubmissions of a run whose attempts die young."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Up:
    """`orc up`, because these parts are down."""

    parts: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Resubmit:
    """The run's next attempt."""

    run: Interrupted
    times: int

    @property
    def job(self) -> str:
        """An id that depends on nothing but run, attempt and count: Ray takes it once. Example:
        orc-20261121-081530-a1b2c3d4-2, and with .2 behind it when that job ended and there was no attempt."""
        return f"orc-{self.run.run}-{self.run.attempt + 1}" + (f".{self.times}" if self.times > 1 else "")


@dataclass(frozen=True, slots=True, kw_only=True)
class GiveUp:
    """The run is left alone from now on."""

    run: Interrupted
    why: str


Action = Up | Resubmit | GiveUp


@dataclass
class Keeper:
    """Remembers for how long what is down, and what was tried."""

    wishes: Wishes = field(default_factory=Wishes)
    tried: dict[str, Tried] = field(default_factory=dict)
    """By run; survives this process."""
    _breaker: CircuitBreaker = field(
        default_factory=lambda: CircuitBreaker(threshold=1, first_pause=10.0, longest_pause=300.0)
    )
    _down_since: dict[str, float] = field(default_factory=dict)
    _given_up: set[tuple[str, int]] = field(default_factory=set)

    def step(
        self,
        now: float,
        parts: Sequence[Found],
        runs: Sequence[Interrupted],
        begun: Mapping[str, Begun] | None = None,
        gone: Collection[str] = (),
    ) -> list[Action]:
        """`now` is in seconds since 1970; `begun` says of runs in `tried` what became of the resubmission, `gone` has
        the runs whose driver is known to be dead."""
        down = self._surely_down(now, parts)
        if down and self._breaker.allows(now):
            self._breaker.failed(now)  # a look that finds all up takes it back
            return [Up(parts=down)]
        if not self.is_unsure:
            self._breaker.succeeded()
        if not can_train(parts):
            return []
        interrupted = [run for run in runs if is_interrupted(run, now, is_gone=run.run in gone)]
        actions = [action for run in interrupted if (action := self._about(run, now, begun or {})) is not None]
        resubmitted = [action for action in actions if isinstance(action, Resubmit)][:AT_ONCE]
        return [*(action for action in actions if not isinstance(action, Resubmit)), *resubmitted]

    def was_tried(self, action: Resubmit, now: float, *, job: str = "", pid: int = 0, started: float = 0.0) -> None:
        """The resubmission was made, whether or not it was of use."""
        self.tried[action.run.run] = Tried(
            attempt=action.run.attempt, times=action.times, at=now, job=job, pid=pid, started=started
        )

    def forget(self, now: float, after: float) -> None:
        """What was tried more than `after` seconds ago."""
        self.tried = {run: tried for run, tried in self.tried.items() if now - tried.at <= after}

    @property
    def is_unsure(self) -> bool:
        """Something was down at the last look."""
        return bool(self._down_since)

    def _surely_down(self, now: float, parts: Sequence[Found]) -> tuple[str, ...]:
        down = [part for part in parts if part.is_down]
        self._down_since = {part.name: self._down_since.get(part.name, now) for part in down}
        sure = [part for part in down if part.is_gone or now - self._down_since[part.name] >= SURE]
        return tuple(part.name for part in down) if sure else ()

    def _about(self, run: Interrupted, now: float, begun: Mapping[str, Begun]) -> Action | None:
        is_wanted = run.is_kept or self.wishes.is_all
        if not is_wanted or (not run.job and not self.wishes.is_local):
            return None
        tried = self.tried.get(run.run)
        if tried is not None and tried.attempt < run.attempt and run.ended - run.started >= STEADY:
            tried = None
        if tried is None:
            return Resubmit(run=run, times=1)
        state = begun.get(run.run, Begun.unknown)
        if tried.attempt == run.attempt and state is Begun.waiting:
            return None
        if tried.attempt == run.attempt and state is Begun.stopped:
            return self._gave_up(run, f"its job {tried.job} was stopped")
        if tried.times >= self.wishes.most:
            why = f"it was begun again {tried.times} times, and no attempt lived {STEADY / 60:.0f} minutes"
            return self._gave_up(run, why)
        if now < tried.at + min(PAUSE * 2.0 ** min(tried.times - 1, 30), LONGEST_PAUSE):
            return None
        return Resubmit(run=run, times=tried.times + 1)

    def _gave_up(self, run: Interrupted, why: str) -> GiveUp | None:
        """Told once."""
        if (run.run, run.attempt) in self._given_up:
            return None
        self._given_up.add((run.run, run.attempt))
        return GiveUp(run=run, why=why)


def can_train(parts: Sequence[Found]) -> bool:
    """Whether all is up that an attempt needs."""
    return not any(part.is_down and part.name not in COPIES for part in parts)


def is_interrupted(run: Interrupted, now: float, *, is_gone: bool = False) -> bool:
    """Whether the run's last attempt ended without a person, or its driver, having decided that it should. `is_gone`:
    its driver is known to be dead."""
    if run.is_asked_to_stop or run.action == "stop":
        return False
    if run.action:
        return is_gone or now - run.ended >= run.after + PROMISED
    return run.status is RunStatus.crashed and not run.has_error


def tried_from(raw: Mapping[str, Mapping[str, object]]) -> dict[str, Tried]:
    """What `Tried.to_json` gave, by run; what is not understood is left out."""
    found = {}
    for run, values in raw.items():
        try:
            found[run] = replace(Tried(attempt=0, times=0, at=0.0), **values)  # type: ignore[arg-type]
        except TypeError:
            continue
    return found
