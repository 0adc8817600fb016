"""When something is an alert. Pure: points, events and the time in, what began or ended out.

A rule looks at one metric (or several, by a pattern) or at one kind of event. Each series (a key on a rank) has a small
state of its own. An alert *fires* when its test held for long enough and the last firing is long enough ago, and is
*resolved* when the test for its end held as long.
"""

from __future__ import annotations

import math
import operator
import re
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from orchestrator.config.names import did_you_mean
from orchestrator.errors import ConfigError

Point = tuple[int, float, float]
"""Step, seconds since 1970, value."""

COOLDOWN = 600.0
MOST_WINDOW = 10_000
"""Values that one test may look back over."""
FEWEST = 5
"""Values before which nothing is unusual: of fewer a standard deviation says little."""
LEVELS = ("info", "warning", "error")
CLOSE = 1e-12
"""Of a window's largest value: a standard deviation below this is rounding, not spread."""

_COMPARE: Mapping[str, Callable[[float, float], bool]] = {
    ">": operator.gt, ">=": operator.ge, "<": operator.lt, "<=": operator.le, "==": operator.eq, "!=": operator.ne,
}  # fmt: skip
_NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"
_OP = r"(?P<op>>=|<=|==|!=|>|<)"
_THRESHOLD = re.compile(rf"{_OP}\s*(?P<value>{_NUMBER})")
_CHANGE = re.compile(rf"change\s*{_OP}\s*(?P<value>{_NUMBER})\s*(?P<percent>%?)(?:\s+over\s+(?P<over>\d+))?")
_Z = re.compile(rf"z\s*{_OP}\s*(?P<value>{_NUMBER})(?:\s+over\s+(?P<over>\d+))?")
_SILENCE = re.compile(r"no progress(?:\s+for)?\s+(?P<time>\S+)")
_COUNT = re.compile(r"(?P<count>\d+)\s+in\s+(?P<time>\S+)")
_TIME = re.compile(rf"(?P<value>{_NUMBER})\s*(?P<unit>s|m|h|d)?")
_UNITS = {None: 1.0, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_FORMS = "Write > 5 (also >=, <, <=, ==, !=), change > 20% over 10, z > 3 over 50, nan, or no progress for 10m."


# -- what a rule tests -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Threshold:
    """The value itself. A NaN says nothing to it."""

    op: str
    value: float

    def holds(self, value: float, window: Sequence[float]) -> bool | None:
        return None if math.isnan(value) else _COMPARE[self.op](value, self.value)

    def __str__(self) -> str:
        return f"{self.op} {self.value:g}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Changed:
    """By how much it differs from the value `over` points before; in percent of that one, if `is_percent`."""

    op: str
    value: float
    over: int
    is_percent: bool

    def holds(self, value: float, window: Sequence[float]) -> bool | None:
        if len(window) < self.over or not math.isfinite(value):
            return None
        before = window[-self.over]
        change = value - before
        if self.is_percent:
            change = 100 * change / abs(before) if before else math.copysign(math.inf, change) if change else 0.0
        return None if math.isnan(change) else _COMPARE[self.op](change, self.value)

    def __str__(self) -> str:
        return f"change {self.op} {self.value:g}{'%' if self.is_percent else ''} over {self.over}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Unusual:
    """How many standard deviations it is away from the mean of the `over` finite values before it, either way for `>`
    and `>=` with a positive number. Values equal to all before are not unusual; one that differs from a constant is."""

    op: str
    value: float
    over: int

    def holds(self, value: float, window: Sequence[float]) -> bool | None:
        values = list(window)[-self.over :]
        if len(values) < min(FEWEST, self.over) or not math.isfinite(value):
            return None
        mean = math.fsum(values) / len(values)
        spread = math.sqrt(math.fsum((each - mean) ** 2 for each in values) / len(values))
        away = value - mean
        if spread <= CLOSE * max(abs(mean), abs(value)):
            score = math.copysign(math.inf, away) if abs(away) > CLOSE * max(abs(mean), abs(value)) else 0.0
        else:
            score = away / spread
        if self.value > 0 and self.op in (">", ">="):
            score = abs(score)
        return _COMPARE[self.op](score, self.value)

    def __str__(self) -> str:
        return f"z {self.op} {self.value:g} over {self.over}"


@dataclass(frozen=True, slots=True, kw_only=True)
class NotFinite:
    """NaN or infinite."""

    def holds(self, value: float, window: Sequence[float]) -> bool | None:
        return not math.isfinite(value)

    def __str__(self) -> str:
        return "nan"


@dataclass(frozen=True, slots=True, kw_only=True)
class Silence:
    """No point at a later step for so many seconds."""

    seconds: float

    def __str__(self) -> str:
        return f"no progress for {self.seconds:g} s"


@dataclass(frozen=True, slots=True, kw_only=True)
class Count:
    """So many events within so many seconds."""

    count: int
    seconds: float

    def __str__(self) -> str:
        return f"{self.count} in {self.seconds:g} s"


Value = Threshold | Changed | Unusual | NotFinite
Test = Value | Silence | Count


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """Example: parse("hot", {"metric": "system/gpu_*/temperature_celsius", "when": "> 90", "for": "1m"})."""

    name: str
    test: Test
    metric: str = ""
    """A key, or a pattern as in a shell."""
    event: str = ""
    """A kind of events, or a pattern. One of `metric` and `event` is given."""
    until: str = ""
    """The kind of events that ends what `event` began. Empty: it is over at once."""
    clear: Value | None = None
    """What ends it; None: the test does not hold."""
    points: int = 1
    """So many in a row must say so."""
    seconds: float = 0.0
    """They must say so for so long, by their own times."""
    cooldown: float = COOLDOWN
    """Seconds from one firing to the next, at least."""
    level: str = "warning"
    notify: tuple[str, ...] | None = None
    """Names of notifiers; None: those of all rules."""
    message: str = ""

    @property
    def back(self) -> int:
        """Values before the newest one that the tests look at."""
        return max((each.over for each in (self.test, self.clear) if isinstance(each, Changed | Unusual)), default=0)

    def sees(self, key: str) -> bool:
        return bool(self.metric) and (key == self.metric or fnmatchcase(key, self.metric))


# -- from a configuration ----------------------------------------------------------------------------------------------

_KEYS = ("metric", "event", "until", "when", "clear", "for", "cooldown", "level", "notify", "message")

DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "memory": {"metric": "system/memory_percent", "when": ">= 90", "clear": "< 85", "for": 2, "level": "warning"},
    "cpu": {"metric": "system/cpu_percent", "when": ">= 95", "clear": "< 85", "for": "5m", "level": "info"},
    "gpu_memory": {"metric": "system/gpu_*/memory_percent", "when": ">= 95", "clear": "< 90", "for": 2},
    "disk": {"metric": "system/disk_percent", "when": ">= 95", "clear": "< 93"},
    "idle_gpu": {
        "metric": "system/gpu_*/utilization_percent", "when": "< 5", "clear": ">= 10", "for": "15m", "cooldown": 3600,
        "level": "info",
    },
    "degraded": {"event": "degraded", "until": "recovered"},
}  # fmt: skip
"""Rules of every run, by name. One of the same name in the configuration takes the place of one of these; `false`
switches it off. They tell the run's events and the log, nobody else; `degraded`, the administrators, too."""


def parse_rules(given: Mapping[str, Any], *, key: str = "alerts.rules", defaults: bool = True) -> tuple[Rule, ...]:
    """All rules of a run, by name. Raises ConfigError."""
    rules: dict[str, Rule] = {}
    for name, raw in DEFAULTS.items() if defaults else ():
        rules[name] = parse(name, {**raw, "notify": ["log"]}, key=key)
    for name, raw in given.items():
        if raw is False or raw is None:
            rules.pop(name, None)
        else:
            rules[str(name)] = parse(str(name), raw, key=key)
    return tuple(rules.values())


def parse(name: str, raw: Any, *, key: str = "alerts.rules") -> Rule:
    """A rule as it is written in a configuration. Raises ConfigError, which names the dotted key."""
    at = f"{key}.{name}"
    if not isinstance(raw, Mapping):
        raise ConfigError(at, raw, "is no rule.", "Write {metric: loss, when: '> 5'}, or false to switch one off.")
    for word in raw:
        if word not in _KEYS:
            near = did_you_mean(str(word), _KEYS, cutoff=0.5) or f"Known keys here: {', '.join(_KEYS)}."
            raise ConfigError(f"{at}.{word}", raw[word], "there is no such key.", near)
    metric, event = _text(raw, "metric", at), _text(raw, "event", at)
    if bool(metric) == bool(event):
        raise ConfigError(at, None, "needs one of `metric` and `event`.", "Example: {metric: loss, when: '> 5'}")
    points, seconds = _patience(raw.get("for", 1), f"{at}.for")
    level = _text(raw, "level", at) or "warning"
    if level not in LEVELS:
        raise ConfigError(f"{at}.level", level, f"must be one of {', '.join(LEVELS)}.")
    notify = raw.get("notify")
    if notify is not None and (isinstance(notify, Mapping) or not isinstance(notify, str | Sequence)):
        raise ConfigError(f"{at}.notify", None, "is no name of a notifier, and no list of them.", "Example: [log]")
    until, clear = _text(raw, "until", at), raw.get("clear")
    if event and clear is not None:
        raise ConfigError(f"{at}.clear", clear, "is for metrics.", "What an event began ends with `until: KIND`.")
    if metric and until:
        raise ConfigError(f"{at}.until", until, "is for events.", "A metric's alert ends with `clear: '< 4'`.")
    test = _event_test(raw.get("when"), f"{at}.when") if event else _metric_test(raw.get("when"), f"{at}.when")
    return Rule(
        name=name, metric=metric, event=event, until=until, test=test,
        clear=_clearing(clear, test, f"{at}.clear"),
        points=points, seconds=seconds,
        cooldown=duration(raw.get("cooldown", COOLDOWN), f"{at}.cooldown"),
        level=level,
        notify=None if notify is None else (notify,) if isinstance(notify, str) else tuple(map(str, notify)),
        message=_text(raw, "message", at),
    )  # fmt: skip


def duration(given: Any, key: str) -> float:
    """Seconds. Example: duration("10m", "alerts.rules.a.cooldown") == 600. Raises ConfigError."""
    found = None if isinstance(given, bool) else _TIME.fullmatch(str(given).strip())
    seconds = float(found["value"]) * _UNITS[found["unit"]] if found else -1.0
    if not 0 <= seconds < math.inf:
        raise ConfigError(key, given, "is no length of time.", "Write seconds, or 90s, 10m, 2h.")
    return seconds


def _text(raw: Mapping[str, Any], name: str, at: str) -> str:
    value = raw.get(name)
    if value is not None and not isinstance(value, str):
        raise ConfigError(f"{at}.{name}", value, "must be text.")
    return (value or "").strip()


def _patience(given: Any, key: str) -> tuple[int, float]:
    """`for: 3` are points, `for: 10m` is time."""
    if isinstance(given, int) and not isinstance(given, bool):
        if given < 1:
            raise ConfigError(key, given, "must be at least 1 point.", "A length of time has a unit: 90s, 10m.")
        return given, 0.0
    return 1, duration(given, key)


def _metric_test(given: Any, key: str) -> Value | Silence:
    text = str(given).strip().lower() if isinstance(given, str) else ""
    if text in ("nan", "not finite"):
        return NotFinite()
    if found := _THRESHOLD.fullmatch(text):
        return Threshold(op=found["op"], value=float(found["value"]))
    if found := _CHANGE.fullmatch(text):
        over = _window(found["over"] or "1", key)
        return Changed(op=found["op"], value=float(found["value"]), over=over, is_percent=bool(found["percent"]))
    if found := _Z.fullmatch(text):
        return Unusual(op=found["op"], value=float(found["value"]), over=_window(found["over"] or "50", key, least=2))
    if found := _SILENCE.fullmatch(text):
        seconds = duration(found["time"], key)
        if not seconds:
            raise ConfigError(key, given, "would always hold.", "Example: no progress for 10m")
        return Silence(seconds=seconds)
    raise ConfigError(key, given, "is no test." if given is not None else "says nothing to test.", _FORMS)


def _clearing(given: Any, test: Test, key: str) -> Value | None:
    if given is None:
        return None
    found = _metric_test(given, key)
    if isinstance(found, Silence) or isinstance(test, Silence):
        raise ConfigError(key, given, "makes no sense here: `no progress` ends when there is progress.")
    return found


def _event_test(given: Any, key: str) -> Count:
    if given is None:
        return Count(count=1, seconds=0.0)
    found = _COUNT.fullmatch(str(given).strip().lower())
    if not found or int(found["count"]) < 1:
        raise ConfigError(key, given, "is no test of events.", "Write 3 in 10m; without it each event counts.")
    if int(found["count"]) > MOST_WINDOW:
        raise ConfigError(key, given, f"counts further than {MOST_WINDOW}.")
    return Count(count=int(found["count"]), seconds=duration(found["time"], key))


def _window(given: str, key: str, least: int = 1) -> int:
    if not least <= int(given) <= MOST_WINDOW:
        raise ConfigError(key, int(given), f"looks back over {least} to {MOST_WINDOW} values.")
    return int(given)


# -- judging -----------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class State:
    """What is remembered of one series for one rule. A restart keeps the first three."""

    is_firing: bool = False
    number: int = 0
    """How often it fired."""
    fired_at: float = -math.inf
    hits: int = 0
    """Points in a row that spoke for a change."""
    hit_since: float = 0.0
    """By the first of these points' own time."""
    window: deque[float] = field(default_factory=deque)
    seen: Point | None = None
    """The newest point."""
    step: int = -(1 << 63)
    """The highest."""
    progress_at: float = math.nan
    """When that was first seen."""
    events: deque[float] = field(default_factory=deque)


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """An alert fired, or was resolved."""

    is_firing: bool
    number: int
    """Of the firing."""
    at: float
    step: int | None
    value: float | None
    message: str


def observe(rule: Rule, state: State, key: str, points: Iterable[Point], now: float) -> list[Turn]:
    """Points of one series, in the order in which they were logged. `now`: seconds since 1970, never going back."""
    if isinstance(rule.test, Silence):
        return _progress(rule, state, key, points, now)
    assert not isinstance(rule.test, Count)
    turns: list[Turn] = []
    back = rule.back
    for point in points:
        step, at, value = point
        test = rule.test if not state.is_firing else rule.clear
        if test is None:
            holds = rule.test.holds(value, state.window)
            holds = None if holds is None else not holds
        else:
            holds = test.holds(value, state.window)
        state.seen = point
        if back and math.isfinite(value):
            state.window.append(value)
            if len(state.window) > back:
                state.window.popleft()
        if holds is None:
            continue
        if not holds:
            state.hits = 0
            continue
        if not state.hits:
            state.hit_since = at
        state.hits += 1
        if state.hits < rule.points or at - state.hit_since < rule.seconds:
            continue
        if not state.is_firing and now - state.fired_at < rule.cooldown:
            continue
        turns.append(_turn(state, now, step, value, _said(rule, key, value, not state.is_firing)))
    return turns


def tick(rule: Rule, state: State, key: str, now: float) -> Turn | None:
    """What begins because time goes by."""
    if not isinstance(rule.test, Silence) or state.is_firing or math.isnan(state.progress_at):
        return None
    silent = now - state.progress_at
    if silent < rule.test.seconds or now - state.fired_at < rule.cooldown:
        return None
    step, _, value = state.seen or (0, 0.0, math.nan)
    words = rule.message or f"{key}: no progress for {silent:.0f} s, it stands at step {step}"
    return _turn(state, now, step, value, words)


def happened(rule: Rule, state: State, kind: str, message: str, now: float) -> Turn | None:
    """An event of that kind, which `event` or `until` of the rule means."""
    assert isinstance(rule.test, Count)
    if state.is_firing:
        if not (rule.until and fnmatchcase(kind, rule.until)):
            return None
        state.events.clear()
        return _turn(state, now, None, None, f"{kind}: {message}" if message else kind)
    if not fnmatchcase(kind, rule.event):
        return None
    state.events.append(now)
    while len(state.events) > rule.test.count or (rule.test.seconds and now - state.events[0] > rule.test.seconds):
        state.events.popleft()
    if len(state.events) < rule.test.count or now - state.fired_at < rule.cooldown:
        return None
    often = f" ({rule.test})" if rule.test.count > 1 else ""
    turn = _turn(state, now, None, None, rule.message or f"{kind}: {message}{often}".removesuffix(": "))
    if not rule.until:
        state.is_firing = False  # nothing ends it
        state.events.clear()
    return turn


def ended(state: State, now: float) -> Turn | None:
    """The run is over, and with it what fires."""
    if not state.is_firing:
        return None
    return _turn(state, now, state.seen[0] if state.seen else None, None, "the run is over")


def _progress(rule: Rule, state: State, key: str, points: Iterable[Point], now: float) -> list[Turn]:
    turns = []
    for point in points:
        state.seen = point
        if point[0] <= state.step and not math.isnan(state.progress_at):
            continue
        state.step, state.progress_at = point[0], now
        if state.is_firing:
            turns.append(_turn(state, now, point[0], point[2], f"{key} goes on at step {point[0]}"))
    return turns


def _turn(state: State, now: float, step: int | None, value: float | None, message: str) -> Turn:
    state.is_firing = not state.is_firing
    state.hits = 0
    if state.is_firing:
        state.number += 1
        state.fired_at = now
    return Turn(is_firing=state.is_firing, number=state.number, at=now, step=step, value=value, message=message)


def _said(rule: Rule, key: str, value: float, fires: bool) -> str:
    if not fires:
        return f"{key} is {value:.6g} again"
    if rule.message:
        return rule.message
    long = f" for {rule.seconds:g} s" if rule.seconds else f" in {rule.points} points" if rule.points > 1 else ""
    return f"{key} is {value:.6g} ({rule.test}{long})"
