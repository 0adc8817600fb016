"""Watches what passes through the tracker and sees that somebody is told.

Part of the tracker's process. `take`, `opened` and `ended` are called in its way and return at once: they look whether
any rule names what came, and put it into a bounded queue. A thread of its own (`run`) judges it a few times a second
and writes what fired or ended into the database, in one transaction with the run's event and with the notifications;
another one (`run_outbox`) sends those. Neither the log nor the committer ever waits for any of this.

After a crash: rules and addresses of runs that go on, how their alerts stand and what is to be sent are read again;
what is accepted and not committed is judged again, what was told has a key and is told once. What the process had
committed and not judged (less than a second's worth) is not judged any more, but the ends of runs are.
"""

from __future__ import annotations

import json
import logging
import math
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from orchestrator.alert_records import AlertRow, Notice, Posting, TurnRow, Watched
from orchestrator.alerts.addresses import Addresses
from orchestrator.alerts.outbox import FIRST_PAUSE, PATIENCE, TRIES, Box, Outbox, Send
from orchestrator.alerts.plan import COMPLETION, FAILURE, LOG, Channel
from orchestrator.alerts.rules import Point, Rule, Silence, State, Turn, ended, happened, observe, parse_rules, tick
from orchestrator.backends import send_notice
from orchestrator.clock import Clock
from orchestrator.errors import UserError
from orchestrator.records import LOST, Batch, FactKind, RunSpec, RunStatus, RunTicket, Stream

logger = logging.getLogger(__name__)

PACE = 0.25
"""Seconds between two looks at what came."""
TICK = 1.0
"""The same while some rule waits for what does not come."""
IDLE = 60.0
MOST_POINTS, MOST_BATCHES = 1 << 20, 20_000
"""That may wait to be judged; what comes beyond is not judged, and counted."""
MOST_SERIES = 1000
"""Of one run, each for one rule."""
MOST_RUNS = 10_000
MOST_PENDING = 10_000
"""Turns that wait for the database."""
RESTARTED = 180.0
"""Seconds within which a driver that said it would restart an attempt does. Its failure is told only if it does not."""

Series = tuple[str, int, str]
"""Rule, rank, key."""


class Store(Box, Protocol):
    def watched_runs(self, place: str) -> list[Watched]: ...
    def names_of(self, runs: Collection[str]) -> dict[str, tuple[str, str]]: ...
    def whereabouts(self, runs: Any) -> dict[str, tuple[RunStatus, str]]: ...
    def alerts(self, runs: Collection[str] | None = None, *, only_firing: bool = True) -> tuple[AlertRow, ...]: ...
    def put_turn(self, turn: TurnRow, place: str) -> None: ...
    def put_end(self, run: str, attempt: int, postings: Sequence[Posting], place: str, *, now: float) -> None: ...
    def close(self) -> None: ...


class RuleSet:
    """The rules of one run, and for each list of keys which of them any rule names."""

    def __init__(self, rules: Sequence[Rule]) -> None:
        self.rules = {rule.name: rule for rule in rules}
        self.of_events = tuple(rule for rule in rules if rule.event)
        self.silences = tuple(rule for rule in rules if isinstance(rule.test, Silence))
        self._of_metrics = tuple(rule for rule in rules if rule.metric)
        self._named: dict[str, tuple[Rule, ...]] = {}
        self._wanted: dict[tuple[str, ...], Mapping[int, tuple[Rule, ...]]] = {}

    def wanted(self, keys: tuple[str, ...]) -> Mapping[int, tuple[Rule, ...]]:
        """Index of a key -> the rules that name it. Called for every batch: remembered."""
        found = self._wanted.get(keys)
        if found is None:
            if len(self._wanted) > 1000 or len(self._named) > 50_000:
                self._wanted, self._named = {}, {}
            found = {index: rules for index, key in enumerate(keys) if (rules := self._naming(key))}
            self._wanted[keys] = found
        return found

    def _naming(self, key: str) -> tuple[Rule, ...]:
        found = self._named.get(key)
        if found is None:
            found = self._named[key] = tuple(rule for rule in self._of_metrics if rule.sees(key))
        return found


@dataclass(slots=True)
class _Run:
    """A run that goes on, as far as it is known here."""

    attempt: int
    rules: RuleSet
    alerts: Mapping[str, Any]
    name: str = ""
    experiment: str = ""
    is_loaded: bool = False
    """How its alerts stand is known."""
    states: dict[Series, State] = field(default_factory=dict)
    shown: dict[Series, AlertRow] = field(default_factory=dict)
    """Of what fires: its row."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _End:
    run: str
    attempt: int
    status: RunStatus
    reason: str
    error: Mapping[str, Any]
    restarts: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class _Told:
    """What is to be written about the end of an attempt."""

    run: str
    attempt: int
    postings: Sequence[Posting]
    at: float


_DEFAULT: Mapping[str, Any] = {"channels": {LOG: {"kind": LOG}}, "all": [LOG], "job": []}


class AlertService:
    """`prepared`, `opened`, `take` and `ended` may be called from any thread; `step` by one, `outbox.step` by one."""

    def __init__(
        self,
        store: Store,
        addresses: Path,
        clock: Clock,
        *,
        send: Send = send_notice,
        tries: int = TRIES,
        first_pause: float = FIRST_PAUSE,
        patience: float = PATIENCE,
    ) -> None:
        self._store, self._clock = store, clock
        self._zero = clock.now() - clock.monotonic()
        self._addresses = _opened(addresses)
        self.outbox = Outbox(
            store, self._addresses, clock, send=send, tries=tries, first_pause=first_pause, patience=patience,
            changed=lambda: self._posted.set(),
        )  # fmt: skip
        self._lock = threading.Lock()
        self._queue: deque[Batch | _End] = deque()
        self._queued_points = 0
        self._default = RuleSet(parse_rules({}))
        self._rule_sets: OrderedDict[str, RuleSet] = OrderedDict()
        self._runs: OrderedDict[str, _Run] = OrderedDict()
        self._over: OrderedDict[tuple[str, int], None] = OrderedDict()
        self._pending: deque[TurnRow | _Told] = deque()
        self._is_restored = False
        self._tick_at = -math.inf
        self._arrived, self._posted, self._stopped = threading.Event(), threading.Event(), threading.Event()
        self._skipped = self._fired = 0

    # -- in the tracker's way: nothing here waits

    def prepared(self, spec: RunSpec) -> RunSpec:
        """The spec without addresses: they are in the file now. To be called before the run is opened."""
        if not spec.alerts:
            return spec
        try:
            self._addresses.keep()
        except OSError as error:
            logger.error("after a restart of the tracker nobody will be told: %s", error)
        channels: dict[str, Mapping[str, Any]] = {}
        for name, raw in spec.alerts.get("channels", {}).items():
            if raw.get("kind") == LOG or "id" in raw:
                channels[name] = {key: raw[key] for key in ("kind", "id") if key in raw}
                continue
            try:
                channel = Channel(kind=str(raw["kind"]), options=dict(raw["options"]))
                channels[name] = {"kind": channel.kind, "id": self._addresses.put(channel)}
            except (OSError, KeyError, TypeError) as error:
                logger.error("nobody will be told by %s: its address cannot be kept (%s)", name, error)
        return replace(spec, alerts={**spec.alerts, "channels": channels, "place": self._addresses.place})

    def opened(self, ticket: RunTicket, spec: RunSpec) -> None:
        """An attempt begins. `spec` is what `prepared` gave."""
        known = _Run(
            attempt=ticket.attempt, rules=self._rules(spec.alerts), alerts=spec.alerts or _DEFAULT, name=ticket.name,
            experiment=ticket.experiment, is_loaded=ticket.attempt == 1,
        )  # fmt: skip
        self._expect(known)
        with self._lock:
            self._runs[ticket.run] = known
            self._runs.move_to_end(ticket.run)
            self._bound()
        if known.rules.silences:
            self._arrived.set()

    def take(self, batch: Batch) -> None:
        """A batch that was accepted. What no rule names costs one look into a dictionary."""
        if self._is_restored:
            known = self._runs.get(batch.run)
            rules = known.rules if known is not None else self._default
            if batch.stream is Stream.points:
                if not rules.wanted(batch.keys):
                    return
            elif b'"status"' not in batch.payload and not (rules.of_events and b'"event"' in batch.payload):
                return
        is_kept = batch.stream is Stream.facts and b'"status"' in batch.payload  # an end, perhaps
        count = batch.count if batch.stream is Stream.points else 0
        with self._lock:
            if not is_kept and (len(self._queue) >= MOST_BATCHES or self._queued_points + count > MOST_POINTS):
                self._skipped += count
                return
            self._queued_points += count
            self._queue.append(batch)
        self._arrived.set()

    def ended(self, run: str, attempt: int, status: RunStatus, reason: str = "", error: Any = None) -> None:
        """An attempt ended, and its driver did not say so."""
        told = error if isinstance(error, Mapping) else {}
        self._put_end(_End(run=run, attempt=attempt, status=status, reason=reason, error=told, restarts=False))

    def _put_end(self, end: _End) -> None:
        with self._lock:
            self._queue.append(end)
        self._arrived.set()

    # -- loops

    def run(self) -> None:
        while not self._stopped.is_set():
            self._arrived.wait(self._patience())
            self._arrived.clear()
            self._safely(self.step)
            self._stopped.wait(PACE)

    def run_outbox(self) -> None:
        while not self._stopped.is_set():
            waiting = self.outbox.waiting(self._clock.now())
            self._posted.wait(min(IDLE if waiting is None else waiting, TICK if self.outbox.is_busy else IDLE))
            self._posted.clear()
            if not self._stopped.is_set():
                self._safely(self.outbox.step)

    def stop(self) -> None:
        self._stopped.set()
        self._arrived.set()
        self._posted.set()

    def close(self) -> None:
        """After `stop`, once the loops have ended."""
        self._store.close()

    def _safely(self, step: Callable[[], None]) -> None:
        try:
            step()
        except UserError as error:
            logger.debug("alerts wait for the database: %s", error)
            self._stopped.wait(1.0)
        except Exception:
            logger.exception("alerts failed; trying again")
            self._stopped.wait(1.0)

    def _patience(self) -> float:
        if self._pending or not self._is_restored:
            return TICK
        with self._lock:
            return TICK if any(known.rules.silences for known in self._runs.values()) else IDLE

    def left(self) -> int:
        """How much is to be judged, written or sent, as far as it is known; 0: nothing."""
        return len(self._queue) + len(self._pending) + (self.outbox.is_busy or self.outbox.is_expecting)

    def health(self) -> dict[str, Any]:
        """Since this process began; `waiting`: batches to be judged, and turns to be written."""
        return {
            "fired": self._fired, "notified": self.outbox.sent, "not_notified": self.outbox.failed,
            "waiting": len(self._queue) + len(self._pending), "skipped_points": self._skipped,
        }  # fmt: skip

    # -- judging

    def step(self) -> None:
        """Judges what came and writes what fired or ended. Raises ServiceUnavailable; nothing is lost by that."""
        self._restore()
        self._write()  # what could not be written before
        with self._lock:
            waiting, self._queue, self._queued_points = self._queue, deque(), 0
        try:
            self._load({item.run for item in waiting} | self._silent())
        except UserError:
            with self._lock:
                self._queue.extendleft(reversed(waiting))
                self._queued_points += sum(_count(item) for item in waiting)
            raise
        now = self._now()
        for item in waiting:
            if isinstance(item, _End):
                self._end(item, now)
            elif item.stream is Stream.points:
                self._judge(item, now)
            else:
                self._judge_facts(item, now)
        self._tick(now)
        self._write()

    def _now(self) -> float:
        """Seconds since 1970 that never go back or jump while this process lives."""
        return self._zero + self._clock.monotonic()

    def _restore(self) -> None:
        """What the process before us watched. Runs that ended meanwhile are told now, if they were not."""
        if self._is_restored:
            return
        ends = []
        for watched in self._store.watched_runs(self._addresses.place):
            status = RunStatus(watched.status)
            known = _Run(
                attempt=watched.attempt, rules=self._rules(watched.alerts), alerts=watched.alerts, name=watched.name,
                experiment=watched.experiment,
            )  # fmt: skip
            with self._lock:
                if watched.run in self._runs:
                    continue  # opened again since
                self._runs[watched.run] = known
            self._expect(known)
            if status.is_terminal:
                ends.append(
                    _End(
                        run=watched.run, attempt=watched.attempt, status=status, reason=watched.reason,
                        error=watched.error or {}, restarts=False,
                    )
                )  # fmt: skip
        with self._lock:
            self._queue.extend(ends)
            self._is_restored = True

    def _load(self, runs: Collection[str]) -> None:
        """How the alerts of these runs stand, of those that were opened by others or earlier."""
        with self._lock:
            unknown = {
                run for run in runs if (known := self._runs.get(run)) is None or not known.is_loaded
            }  # fmt: skip
        if not unknown:
            return
        stands = self._store.alerts(sorted(unknown), only_firing=False)
        statuses = self._store.whereabouts(unknown)
        names = self._store.names_of(unknown)
        for run in unknown:
            known = self._runs.get(run)
            if known is None:
                if run not in statuses or statuses[run][0].is_terminal:
                    continue  # removed, or over: what comes late is no alert
                name, experiment = names.get(run, ("", ""))
                known = _Run(attempt=0, rules=self._default, alerts=_DEFAULT, name=name, experiment=experiment)
                with self._lock:
                    self._runs[run] = known
                    self._bound()
            known.is_loaded = True
        for row in stands:
            known = self._runs.get(row.run)
            if known is None:
                continue
            series = (row.rule, row.rank, row.key)
            state = known.states.setdefault(series, State())
            state.is_firing, state.number, state.fired_at = row.is_firing, row.number, row.fired_at
            if row.is_firing:
                known.shown[series] = row

    def _silent(self) -> set[str]:
        """Runs of which nothing came yet, and which are to make progress."""
        with self._lock:
            return {run for run, known in self._runs.items() if known.rules.silences and not known.is_loaded}

    def _judge(self, batch: Batch, now: float) -> None:
        known = self._current(batch)
        if known is None:
            return
        wanted = known.rules.wanted(batch.keys)
        if not wanted:
            return
        points = batch.points()
        keys = points["key"]
        for index, rules in wanted.items():
            rows = points[(keys == index) & ((points["flags"] & LOST) == 0)]
            if not len(rows):
                continue
            found: list[Point] = list(
                zip(
                    rows["step"].tolist(), rows["time"].tolist(), rows["value"].astype(np.float64).tolist(), strict=True
                )
            )
            key = batch.keys[index]
            for rule in rules:
                series = (rule.name, batch.rank, key)
                state = self._state(known, series)
                if batch.rank and isinstance(rule.test, Silence):
                    self._found(known, rule.name, key)
                if state is not None:
                    for turn in observe(rule, state, key, found, now):
                        self._turned(batch.run, known, rule, series, turn)

    def _judge_facts(self, batch: Batch, now: float) -> None:
        try:
            facts = batch.facts()
        except (ValueError, LookupError, TypeError, AttributeError):
            return  # the database's to refuse
        for fact in facts:
            data = fact.data
            if not isinstance(data, Mapping):
                continue
            if fact.kind is FactKind.event:
                self._happened(batch, str(data.get("kind", "")), str(data.get("message", "")), now)
            elif fact.kind is FactKind.status:
                self._said(batch, data, now)

    def _said(self, batch: Batch, data: Mapping[str, Any], now: float) -> None:
        try:
            status = RunStatus(data["status"])
        except (ValueError, KeyError, TypeError):
            return
        if status.is_terminal:
            error = data.get("error")
            self._end(
                _End(
                    run=batch.run, attempt=batch.attempt, status=status, reason=str(data.get("reason") or ""),
                    error=error if isinstance(error, Mapping) else {}, restarts=data.get("restarts") is True,
                ),
                now,
            )  # fmt: skip

    def _happened(self, batch: Batch, kind: str, message: str, now: float) -> None:
        known = self._current(batch)
        if known is None or not kind:
            return
        for rule in known.rules.of_events:
            series = (rule.name, -1, rule.event)
            state = self._state(known, series)
            turn = happened(rule, state, kind, message, now) if state is not None else None
            if turn is not None:
                self._turned(batch.run, known, rule, series, turn)

    def _tick(self, now: float) -> None:
        if now < self._tick_at + TICK:
            return
        self._tick_at = now
        with self._lock:
            waited_for = [(run, known) for run, known in self._runs.items() if known.rules.silences and known.is_loaded]
        for run, known in waited_for:
            for series, state in list(known.states.items()):
                rule = known.rules.rules.get(series[0])
                turn = tick(rule, state, series[2], now) if rule is not None else None
                if rule is not None and turn is not None:
                    self._turned(run, known, rule, series, turn)

    def _end(self, end: _End, now: float) -> None:
        """Resolves what fires and tells of the end."""
        with self._lock:
            known = self._runs.get(end.run)
            if (end.run, end.attempt) in self._over or known is None or end.attempt < known.attempt:
                return
            del self._runs[end.run]
            self._over[end.run, end.attempt] = None
            while len(self._over) > MOST_RUNS:
                self._over.popitem(last=False)
        for series, state in known.states.items():
            rule = known.rules.rules.get(series[0])
            turn = ended(state, now) if rule is not None else None
            if rule is not None and turn is not None:
                self._turned(end.run, known, rule, series, turn)
        if "place" not in known.alerts:
            return
        kind = COMPLETION if end.status in (RunStatus.finished, RunStatus.cancelled) else FAILURE
        after = now + RESTARTED if end.restarts else 0.0
        notice = _notice_of_end(end, known, kind, now)
        names = [each["channel"] for each in known.alerts.get("job", ()) if kind in each["on"]]
        postings = [replace(each, after=after) for each in self._postings(known, names, notice)]
        if not end.restarts and any(known.alerts["channels"].get(name, {}).get("kind") == LOG for name in names):
            logger.warning("%s", notice.title, extra={"run": end.run, "attempt": end.attempt})
        self._pending.append(_Told(run=end.run, attempt=end.attempt, postings=postings, at=now))

    def _turned(self, run: str, known: _Run, rule: Rule, series: Series, turn: Turn) -> None:
        name, rank, key = series
        is_instant = turn.is_firing and bool(rule.event) and not rule.until
        before = known.shown.get(series)
        alert = AlertRow(
            run=run, rule=name, rank=rank, key=key, attempt=known.attempt,
            is_firing=turn.is_firing and not is_instant, number=turn.number, level=rule.level, message=turn.message,
            value=None if turn.value is None else turn.value, step=turn.step,
            fired_at=turn.at if turn.is_firing or before is None else before.fired_at,
            resolved_at=None if turn.is_firing and not is_instant else turn.at,
        )  # fmt: skip
        if alert.is_firing:
            known.shown[series] = alert
        else:
            known.shown.pop(series, None)
        self._fired += turn.is_firing
        names = known.alerts.get("all", ()) if rule.notify is None else rule.notify
        notice = _notice_of_turn(alert, known, turn.is_firing, turn.at)
        if any(known.alerts["channels"].get(each, {}).get("kind") == LOG for each in names):
            logger.log(
                logging.WARNING if turn.is_firing and rule.level != "info" else logging.INFO, "%s: %s", notice.title,
                notice.message, extra={"run": run, "attempt": known.attempt, "rule": name},
            )  # fmt: skip
        if len(self._pending) >= MOST_PENDING:
            self._skipped += 1
            return
        details = {"is_instant": True} if is_instant else {}
        self._pending.append(
            TurnRow(alert=alert, at=turn.at, details=details, postings=self._postings(known, names, notice))
        )

    def _postings(self, known: _Run, names: Sequence[str], notice: Notice) -> list[Posting]:
        channels: Iterator[Mapping[str, Any]] = (
            known.alerts["channels"].get(name, {}) for name in dict.fromkeys(names)
        )
        return [
            Posting(channel=channel["id"], notifier=channel["kind"], notice=notice)
            for channel in channels
            if channel.get("id")
        ]

    def _write(self) -> None:
        while self._pending:
            first = self._pending[0]
            if isinstance(first, TurnRow):
                self._store.put_turn(first, self._addresses.place)
            else:
                self._store.put_end(first.run, first.attempt, first.postings, self._addresses.place, now=first.at)
            self._pending.popleft()
            if first.postings:
                self.outbox.look()
                self._posted.set()

    # -- what is known

    def _current(self, batch: Batch) -> _Run | None:
        """None for what comes late: of an attempt or a run that is over."""
        known = self._runs.get(batch.run)
        if known is None or batch.attempt < known.attempt or (batch.run, batch.attempt) in self._over:
            return None
        if not known.attempt:
            known.attempt = batch.attempt
        return known

    def _state(self, known: _Run, series: Series) -> State | None:
        state = known.states.get(series)
        if state is None:
            if len(known.states) >= MOST_SERIES:
                return None
            state = known.states[series] = State()
        return state

    def _expect(self, known: _Run) -> None:
        """What is to make progress and has not begun is waited for from now on."""
        for rule in known.rules.silences:
            if not any(each in rule.metric for each in "*?["):
                state = known.states.setdefault((rule.name, 0, rule.metric), State())
                state.progress_at = self._now()

    def _found(self, known: _Run, rule: str, key: str) -> None:
        """The metric is another rank's: rank 0, where it was expected, will not have it."""
        expected = known.states.get((rule, 0, key))
        if expected is not None and expected.seen is None and not expected.is_firing:
            del known.states[rule, 0, key]

    def _rules(self, alerts: Mapping[str, Any]) -> RuleSet:
        """The same object for the same rules: a sweep has thousands of runs with them."""
        if not alerts:
            return self._default
        text = json.dumps([alerts.get("rules", {}), alerts.get("defaults", True)], sort_keys=True, default=str)
        with self._lock:
            found = self._rule_sets.get(text)
            if found is not None:
                return found
        try:
            found = RuleSet(parse_rules(alerts.get("rules", {}), defaults=bool(alerts.get("defaults", True))))
        except UserError as error:
            logger.error("the rules of a run cannot be read, so it has only the default ones: %s", error)
            return self._default
        with self._lock:
            self._rule_sets[text] = found
            while len(self._rule_sets) > 100:
                self._rule_sets.popitem(last=False)
        return found

    def _bound(self) -> None:
        while len(self._runs) > MOST_RUNS:
            self._runs.popitem(last=False)


def _opened(file: Path) -> Addresses:
    """A file that cannot be read is set aside: alerts must not keep the tracker from starting."""
    try:
        return Addresses(file)
    except (OSError, ValueError) as error:
        logger.error("addresses of notifiers cannot be read, so earlier runs' notices are not sent: %s", error)
        aside = file.with_name(f"{file.name}.damaged")
        try:
            file.rename(aside)
        except OSError:
            return Addresses(aside.with_name(f"{file.name}.new"))
        return Addresses(file)


def _count(item: Batch | _End) -> int:
    return item.count if isinstance(item, Batch) and item.stream is Stream.points else 0


def _notice_of_turn(alert: AlertRow, known: _Run, fires: bool, at: float) -> Notice:
    subject = f"{alert.run}/{alert.rule}/{alert.rank}/{alert.key}/{alert.number}"
    kind = "fired" if fires else "resolved"
    value = alert.value if alert.value is None or math.isfinite(alert.value) else str(alert.value)
    return Notice(
        key=f"{subject}/{kind}", subject=subject, kind=kind, level=alert.level if fires else "info", at=at,
        title=f"{alert.rule} {'fired' if fires else 'is over'} in {known.name or alert.run}", message=alert.message,
        run=alert.run, run_name=known.name, experiment=known.experiment, attempt=alert.attempt,
        details={
            "rule": alert.rule, "metric" if alert.rank >= 0 else "event": alert.key, "value": value,
            "step": alert.step, **({"rank": alert.rank} if alert.rank >= 0 else {}),
        },
    )  # fmt: skip


def _notice_of_end(end: _End, known: _Run, kind: str, at: float) -> Notice:
    error = end.error
    return Notice(
        key=f"{end.run}/{end.attempt}/end", subject=f"{end.run}/end", kind=kind,
        level="error" if kind == FAILURE else "info", at=at,
        title=f"run {known.name or end.run} {end.status.value}", message=end.reason, run=end.run, run_name=known.name,
        experiment=known.experiment, attempt=end.attempt,
        details={
            "status": end.status.value,
            **{name: error[name] for name in ("kind", "type", "rank", "step", "done") if error.get(name) is not None},
        },
    )  # fmt: skip
