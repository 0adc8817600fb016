"""Which services a process can do without for a while are away, since when and why: told once per outage, however often
they are tried.

A `Link` is one user's breaker of a service; a `Circuit` is the service as one process sees it, with all its links: the
first one that opens begins an *outage*, which is over when all work again and nothing has failed for `SETTLE` seconds.
So a service that comes and goes is one outage, with one warning, not one for each time. `Circuits` are those of a
process. What they know lies in a small file besides, for those who cannot ask the process: `orc status`, and the
tracker, which tells the drivers of running runs.
"""

from __future__ import annotations

import json
import logging
import os
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from orchestrator.clock import Clock, SystemClock
from orchestrator.config.redaction import redact_url
from orchestrator.tracking.breaker import BreakerState, CircuitBreaker

logger = logging.getLogger(__name__)

SETTLE = 5.0
"""Seconds without a failure after which an outage is over."""
LOOK = 1.0
"""Seconds between two looks at what other processes say."""
SAVE = 1.0
"""Seconds, at least, between two writings of the file while an outage lasts."""
MOST_TEXT = 500
"""Characters of an error that are told."""
_CLOSED, _OPEN, _HALF_OPEN = BreakerState.closed.value, BreakerState.open.value, BreakerState.half_open.value


@dataclass(frozen=True, slots=True, kw_only=True)
class CircuitState:
    """A service as a process sees it. Example: CircuitState(name="redis", by="tracker", state="open", began=1.8e9)."""

    name: str
    by: str = ""
    """Which process says so."""
    state: str = _CLOSED
    """closed (it works), open (it is left alone), half-open (it is tried, or works and is watched for a while)."""
    began: float = 0.0
    """When the last outage began, in seconds since 1970; 0: there was none. Names it: two have different times."""
    ended: float = 0.0
    """When that was over; 0: it is not, or there was none."""
    failures: int = 0
    """In that outage."""
    error: str = ""
    """The last one of it, without passwords."""

    @property
    def is_away(self) -> bool:
        return self.state != _CLOSED


class Link:
    """A breaker that tells a circuit. Used like a `CircuitBreaker`, by one thread; `breaker` is it, without telling."""

    def __init__(self, circuit: Circuit, breaker: CircuitBreaker, lost: str, back: str) -> None:
        self._circuit, self.breaker = circuit, breaker
        self.lost, self.back = lost, back

    def state(self, now: float) -> BreakerState:
        return self.breaker.state(now)

    def allows(self, now: float) -> bool:
        return self.breaker.allows(now)

    def retry_in(self, now: float) -> float:
        return self.breaker.retry_in(now)

    def failed(self, error: object, now: float) -> bool:
        """True when this begins an outage."""
        self.breaker.failed(now)
        return self._circuit.failed(self, error, now)

    def succeeded(self, now: float) -> bool:
        """True when this ends an outage."""
        self.breaker.succeeded()
        return self._circuit.succeeded(now)


class Circuit:
    """One service. Logs a warning when an outage begins, and a line when it is over. Its methods may be called from any
    thread. `now` is monotonic."""

    def __init__(
        self,
        name: str,
        *,
        settle: float = SETTLE,
        clock: Clock | None = None,
        changed: Callable[[bool], None] = lambda is_news: None,
    ) -> None:
        """`changed` hears that something is different: True when an outage begins or ends, or at the first try."""
        self.name = name
        self._settle, self._clock, self._changed = settle, clock or SystemClock(), changed
        self._lock = threading.Lock()
        self._links: list[Link] = []
        self._is_tried = self._is_out = False
        self._back = ""
        self._failed_at = 0.0
        self._began = self._ended = 0.0
        self._failures = 0
        self._error = ""

    def link(self, *, lost: str, back: str, breaker: CircuitBreaker | None = None) -> Link:
        """For one user. `lost` and `back` are what is logged where it is the first to notice."""
        link = Link(self, breaker or CircuitBreaker(), lost, back)
        with self._lock:
            self._links.append(link)
        return link

    def failed(self, link: Link, error: object, now: float) -> bool:
        with self._lock:
            self._is_tried, self._failed_at = True, now
            begins = not self._is_out and link.state(now) is not BreakerState.closed
            if begins:
                self._is_out, self._back = True, link.back
                self._began, self._ended, self._failures = self._clock.now(), 0.0, 0
            is_out = self._is_out
            if is_out:
                self._failures += 1
                self._error = shown(error)
        if begins:
            logger.warning("%s: %s", link.lost, shown(error))
        if is_out:
            self._changed(begins)
        return begins

    def succeeded(self, now: float) -> bool:
        with self._lock:
            is_first, self._is_tried = not self._is_tried, True
        ends = self._is_over(now)
        if is_first or self._is_out:
            self._changed(is_first)
        return ends

    def _is_over(self, now: float) -> bool:
        """True once per outage, when it is over."""
        with self._lock:
            is_well = all(link.state(now) is BreakerState.closed for link in self._links)
            if not self._is_out or not is_well or now - self._failed_at < self._settle:
                return False
            self._is_out, self._ended = False, self._clock.now()
        logger.info("%s", self._back)
        self._changed(True)
        return True

    def described(self, now: float, by: str = "") -> CircuitState | None:
        """None where it was not tried yet: nobody knows."""
        self._is_over(now)
        with self._lock:
            if not self._is_tried:
                return None
            is_open = self._is_out and any(link.state(now) is BreakerState.open for link in self._links)
            return CircuitState(
                name=self.name, by=by, state=_OPEN if is_open else _HALF_OPEN if self._is_out else _CLOSED,
                began=self._began, ended=self._ended, failures=self._failures, error=self._error,
            )  # fmt: skip


class Circuits:
    """Those of one process, by name. `by` says which process, and how its file in `directory` is called, if there is
    to be one."""

    def __init__(
        self, by: str = "", directory: Path | None = None, *, settle: float = SETTLE, clock: Clock | None = None
    ) -> None:
        self.by = by
        self._directory = directory
        self._settle, self._clock = settle, clock or SystemClock()
        self._circuits: dict[str, Circuit] = {}
        self._lock = threading.Lock()
        self._others: tuple[float, list[CircuitState]] = (float("-inf"), [])
        self._saved: list[dict[str, Any]] = []
        self._saved_at = float("-inf")
        if directory is not None:  # of the process before this one
            with suppress(OSError):
                _file(directory, by).unlink(missing_ok=True)

    def link(self, name: str, *, lost: str, back: str, breaker: CircuitBreaker | None = None) -> Link:
        """A user's breaker of the service of that name; see `Circuit.link`."""
        with self._lock:
            circuit = self._circuits.get(name)
            if circuit is None:
                circuit = Circuit(name, settle=self._settle, clock=self._clock, changed=self._save)
                self._circuits[name] = circuit
        return circuit.link(lost=lost, back=back, breaker=breaker)

    def states(self) -> list[CircuitState]:
        """Of all that were tried."""
        now = self._clock.monotonic()
        with self._lock:
            circuits = list(self._circuits.values())
        return [found for circuit in circuits if (found := circuit.described(now, self.by)) is not None]

    def of_all(self) -> list[CircuitState]:
        """Also what the other processes that write into the directory said a moment ago."""
        now, (looked, others) = self._clock.monotonic(), self._others
        if self._directory is not None and now - looked >= LOOK:
            others = told(self._directory, without=self.by)
            self._others = now, others
        return [*self.states(), *others]

    def describe(self) -> list[dict[str, Any]]:
        """`states` as plain values."""
        return [asdict(state) for state in self.states()]

    def _save(self, is_news: bool) -> None:
        """Writes the file: at once what is new, else now and then. A disk that does not take it costs the file only."""
        if self._directory is None:
            return
        now = self._clock.monotonic()
        with self._lock:
            if not is_news and now - self._saved_at < SAVE:
                return
            self._saved_at = now
        states = self.describe()
        with self._lock:
            if states == self._saved:
                return
            self._saved = states
            text = json.dumps({"by": self.by, "pid": os.getpid(), "born": _born(os.getpid()), "circuits": states})
            file = _file(self._directory, self.by)
            fresh = file.with_suffix(".new")
            try:
                self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
                fresh.write_text(text)
                fresh.replace(file)
            except OSError as error:
                logger.debug("%s could not be written: %s", file, error)


def shown(error: object) -> str:
    """An error as one line without passwords."""
    text = " ".join(redact_url(str(error)).split()) or type(error).__name__
    return text if len(text) <= MOST_TEXT else text[: MOST_TEXT - 1] + "…"


# -- what others see -------------------------------------------------------------------------------------------------


def directory_of(home: str | os.PathLike[str]) -> Path:
    """Where the processes of a data directory write their files."""
    return Path(home) / "health"


def told(directory: Path, *, without: str = "") -> list[CircuitState]:
    """What the living processes have written there, but for one. Never raises."""
    found = []
    try:
        files = sorted(directory.glob("*.json"))
    except OSError:
        return []
    for file in files:
        try:
            raw = json.loads(file.read_text())
            if raw["by"] != without and _born(int(raw["pid"])) == raw["born"]:
                found += [state_from(each) for each in raw["circuits"]]
        except (OSError, ValueError, KeyError, TypeError):
            continue  # being removed, or no file of ours
    return found


def state_from(raw: Mapping[str, Any]) -> CircuitState:
    """Of plain values; keys that are not known are left out. Raises TypeError."""
    known = {field.name for field in fields(CircuitState)}
    return CircuitState(**{name: value for name, value in raw.items() if name in known})


def _file(directory: Path, by: str) -> Path:
    return directory / f"{by.replace('/', '_')}.json"


def _born(pid: int) -> str:
    """When a process began, in the kernel's ticks; '' where there is none: another one of the same number differs."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""


@dataclass(frozen=True, slots=True, kw_only=True)
class News:
    """What a run is told. Example: News(is_away=True, name="postgres", error="no answer")."""

    is_away: bool
    """False: it is back."""
    name: str
    error: str = ""
    seconds: float = 0.0
    """How long it was away; of one that is back."""
    failures: int = 0

    @property
    def kind(self) -> str:
        """Of the event."""
        return "degraded" if self.is_away else "recovered"

    @property
    def level(self) -> str:
        return "warning" if self.is_away else "info"

    @property
    def message(self) -> str:
        if self.is_away:
            return f"{self.name} does not work, the run goes on without it: {self.error}"
        return f"{self.name} works again after {self.seconds:.0f} s"

    def details(self) -> dict[str, Any]:
        """Of the event."""
        if self.is_away:
            return {"service": self.name, "error": self.error}
        return {"service": self.name, "seconds": round(self.seconds, 1), "failures": self.failures}


class Outages:
    """What a run has been told of the services it uses. Pure: states in, what is new out, once per outage.

    A service is away while anybody who speaks of it says so. Of whom nothing is heard, the last word holds.
    """

    def __init__(self, since: float = 0.0) -> None:
        """Outages that were over before `since` (seconds since 1970) are none of the run's."""
        self._since = since
        self._last: dict[tuple[str, str], CircuitState] = {}
        self._away: dict[str, float] = {}
        """Of which the run was told that they are away, and since when they are."""

    @property
    def away(self) -> Sequence[str]:
        return sorted(self._away)

    def news(self, states: Iterable[CircuitState]) -> list[News]:
        found: list[News] = []
        states = list(states)
        for state in states:
            before = self._last.get((state.by, state.name))
            self._last[state.by, state.name] = state
            is_new = state.ended > self._since and (before is None or state.began > before.began)
            if state.name not in self._away and (state.is_away or is_new):
                self._away[state.name] = state.began
                found.append(News(is_away=True, name=state.name, error=state.error, failures=state.failures))
        for name in dict.fromkeys(state.name for state in states):
            spoken = [state for (_, of), state in self._last.items() if of == name]
            if name in self._away and not any(state.is_away for state in spoken):
                began = self._away.pop(name)
                seconds = max(max(state.ended for state in spoken) - began, 0.0)
                failures = max(state.failures for state in spoken)
                found.append(News(is_away=False, name=name, seconds=seconds, failures=failures))
        return found
