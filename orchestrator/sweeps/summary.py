"""How a sweep stands, in words and as JSON, from the rows of its trials. Pure."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from orchestrator.sweep_records import JobRow, TrialRow
from orchestrator.sweeps.budget import Work, added
from orchestrator.sweeps.importance import Importance, importance

BARS = "▁▂▃▄▅▆▇█"
SHOWN = 20
"""Trials in the table: those that run, then the best."""
MOST_KEYS = 6
OVER = ("complete", "stopped", "failed", "cancelled")
"""Status of trials that nobody goes on with."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepView:
    """What is shown of a sweep. Made by its core while it runs, and from its rows afterwards."""

    sweep: str
    name: str = ""
    scheduler: str = ""
    objectives: Sequence[tuple[str, str]] = ()
    """(metric, min or max); the first one rules. Empty before the first result where nobody named one."""
    unit: str = ""
    """epoch, report or step; '' before the first result."""
    samples: int = 0
    """Trials in all."""
    milestones: Sequence[float] = ()
    """Of ASHA, lowest first."""
    reduction: int = 0
    ends_at: float = 0.0
    """Of PBT: where every member ends, in units of the resource."""
    seq: int = -1
    """Of the newest decision."""
    trials: Sequence[TrialRow] = ()
    jobs: Sequence[JobRow] = ()
    """Those that have not ended."""
    keys: Sequence[str] = ()
    """What is searched."""
    spent: Mapping[str, float] = field(default_factory=dict)
    currency: str = "USD"
    work: Work | None = None
    """None: nothing is known of what its jobs take."""
    failures: Mapping[str, int] = field(default_factory=dict)
    """Kind -> how many trials failed so."""
    reason: str = ""
    """Why it starts nothing any more."""
    notes: Sequence[str] = ()
    """What else people should know."""

    @property
    def metric(self) -> str:
        return self.objectives[0][0] if self.objectives else ""

    @property
    def direction(self) -> str:
        return self.objectives[0][1] if self.objectives else "min"


@dataclass(frozen=True, slots=True, kw_only=True)
class RungView:
    rung: int
    resource: float
    done: int
    promoted: int
    best: float | None


def best_of(view: SweepView, count: int = 1) -> list[TrialRow]:
    """The best trials by their scores, each at the highest rung where it has one. Of equal ones the lower number."""
    sign = -1.0 if view.direction == "max" else 1.0
    scored = [(sign * trial.score, trial.number, trial) for trial in view.trials if trial.score is not None]
    return [trial for _, _, trial in sorted(scored, key=lambda each: each[:2])[:count]]


def rungs(view: SweepView) -> list[RungView]:
    """How many have ended each rung, how many went on from it, and its best score."""
    choose = max if view.direction == "max" else min
    found = []
    for rung, resource in enumerate(view.milestones):
        scores = [score for t in view.trials for k, _, score, _ in t.scores.get("rungs", ()) if k == rung]
        finite = [score for score in scores if score is not None]
        promoted = sum(trial.rung > rung for trial in view.trials)
        best = choose(finite) if finite else None
        found.append(RungView(rung=rung, resource=resource, done=len(scores), promoted=promoted, best=best))
    return found


def history(view: SweepView) -> list[float]:
    """The best score so far after each trial that ended with one, in the order of their numbers."""
    choose = max if view.direction == "max" else min
    found: list[float] = []
    for trial in sorted(view.trials, key=lambda each: each.number):
        if trial.score is not None:
            found.append(choose(found[-1], trial.score) if found else trial.score)
    return found


def sparkline(values: Sequence[float], width: int = 20) -> str:
    """At most `width` bars, the lowest value lowest. Example: sparkline([1, 2, 3]) == "▁▅█"."""
    if not values:
        return ""
    if len(values) > width:
        values = [values[(place + 1) * len(values) // width - 1] for place in range(width)]
    low, high = min(values), max(values)
    if high == low:
        return BARS[0] * len(values)
    return "".join(BARS[round((value - low) / (high - low) * (len(BARS) - 1))] for value in values)


def importances(view: SweepView) -> Importance:
    """Of the searched keys, at the highest rung with enough scores; without rungs of all scores."""
    tables: dict[int, list[tuple[Mapping[str, Any], float]]] = {}
    for trial in view.trials:
        for rung, _, score, _ in trial.scores.get("rungs", ()):
            if score is not None:
                tables.setdefault(int(rung), []).append((trial.values, score))
    return importance([tables[rung] for rung in sorted(tables, reverse=True)], view.keys)


@dataclass(frozen=True, slots=True, kw_only=True)
class Left:
    """What a sweep still takes, about. Example: str(Left(trials=15, seconds=720, money=0.4, currency="USD"))
    == "about 12 min and 0.40 USD for the 15 trials that are left"."""

    trials: int
    """That have not come to their end."""
    seconds: float | None = None
    """By the clock; None where nobody says how many run at once."""
    gpu_hours: float = 0.0
    cpu_hours: float = 0.0
    money: float = 0.0
    currency: str = ""

    def __str__(self) -> str:
        which = "trial that is" if self.trials == 1 else f"{self.trials} trials that are"
        return f"about {self.cost} for the {which} left"

    @property
    def cost(self) -> str:
        parts = [] if self.seconds is None else [_duration(self.seconds)]
        if self.money:
            parts.append(f"{_amount(self.money)} {self.currency}")
        elif self.gpu_hours:
            parts.append(f"{_amount(self.gpu_hours)} GPU-hours")
        else:
            parts.append(f"{_amount(self.cpu_hours)} CPU-hours")
        return " and ".join(parts)


def left(view: SweepView) -> Left | None:
    """From what ended jobs took for each unit of the resource, or where only the functions know their ends, for each
    trial. None before anything has ended, and where nothing is left."""
    work = view.work
    over = sum(trial.status in OVER for trial in view.trials)
    trials = view.samples - over
    if work is None or work.lane_seconds <= 0 or trials <= 0:
        return None
    whole, had = whole_resource(view), sum(trial.resource for trial in view.trials)
    if whole is not None and had > 0:
        seconds = work.lane_seconds / had * max(whole - had, 0.0)
    elif over and whole is None:
        seconds = work.lane_seconds / over * trials
    else:
        return None
    used = added({}, work.gang.used(seconds), work.prices)
    return Left(
        trials=trials,
        seconds=seconds / min(work.at_once, trials) if work.at_once else None,
        gpu_hours=used["gpu_hours"],
        cpu_hours=used["cpu_hours"],
        money=used["money"],
        currency=work.prices.currency,
    )


def whole_resource(view: SweepView) -> float | None:
    """Epochs, reports or steps of all trials together, at most, where the rules of the sweep say so."""
    if view.milestones and view.reduction:
        total, count, before = 0.0, view.samples, 0.0
        for resource in view.milestones:
            total += count * (resource - before)
            count, before = count // view.reduction, resource
        return total
    return view.ends_at * view.samples if view.ends_at else None


def planned_resource(view: SweepView) -> float | None:
    """The same, else by the lengths of those that are complete. None where only the functions know."""
    whole = whole_resource(view)
    if whole is not None:
        return whole
    lengths = [trial.resource for trial in view.trials if trial.status == "complete" and trial.resource > 0]
    return statistics.fmean(lengths) * view.samples if lengths else None


def lines(view: SweepView, *, width: int = 120, shown: int = SHOWN, lanes: Sequence[str] = ()) -> list[str]:
    """The table as text. `lanes` says what each lane does."""
    found = [_head(view)]
    found += [f" {line}" for line in _rungs(view)]
    best = best_of(view)
    if best:
        spread = f" ± {best[0].spread:.2g} (n = {best[0].n})" if best[0].n > 1 and best[0].spread is not None else ""
        found.append(
            f" history  {sparkline(history(view))}  best {_number(best[0].score)}{spread}  trial {best[0].number}"
        )
    important = importances(view)
    if important.shares:
        shares = "  ".join(f"{key} {share:.0%}" for key, share in important.ranked[:MOST_KEYS])
        found.append(f" importance  {shares}   (n = {important.n})")
    if rest := left(view):
        found.append(f" left  {rest}")
    if lanes:
        found.append(f" lanes  {'   '.join(lanes)}")
    if view.failures:
        found.append(" failed  " + ", ".join(f"{count} {kind}" for kind, count in sorted(view.failures.items())))
    found += [f" {line}" for line in _table(view, shown)]
    found += [f" {note}" for note in (*view.notes, view.reason) if note]
    return [line if len(line) <= width else line[: width - 1] + "…" for line in found]


def ended_line(view: SweepView, trial: TrialRow) -> str:
    """One trial that has come to an end, for who reads a log."""
    values = "  ".join(f"{key}={_number(value)}" for key, value in trial.values.items())
    score = f"{view.metric} {_number(trial.score)}" if trial.score is not None else "no score"
    unit = f" {view.unit}s" if view.unit else ""
    why = f"  {trial.reason}" if trial.reason else ""
    return f"trial {trial.number}  {trial.status}  {trial.resource:g}{unit}  {score}  {values}{why}"


def to_json(view: SweepView) -> dict[str, Any]:
    """All of it, with what is computed from it."""
    important, best, rest = importances(view), best_of(view), left(view)
    return {
        **asdict(view),
        "counts": dict(Counter(trial.status for trial in view.trials)),
        "best": asdict(best[0]) if best else None,
        "rungs": [asdict(rung) for rung in rungs(view)],
        "history": history(view),
        "left": asdict(rest) if rest else None,
        "importance": {"shares": dict(important.shares), "n": important.n, "why": important.why},
    }


def _head(view: SweepView) -> str:
    counts = Counter(trial.status for trial in view.trials)
    over = sum(counts[status] for status in OVER)
    had = sum(trial.resource for trial in view.trials)
    whole = planned_resource(view)
    of = f" of ~{whole:.0f}" if whole else ""
    parts = [
        view.name or view.sweep,
        view.scheduler,
        f"{len(view.jobs)} running" if view.jobs else "",
        f"{over} of {view.samples} trials, {had:g}{of} {view.unit or 'report'}s",
    ]
    gpu, cpu, money = (view.spent.get(name, 0.0) for name in ("gpu_hours", "cpu_hours", "money"))
    parts.append(f"{gpu:.2f} GPU-hours" if gpu else f"{cpu:.2f} CPU-hours")
    if money:
        parts.append(f"{money:.2f} {view.currency}")
    if kwh := view.spent.get("kwh", 0.0):
        parts.append(f"{kwh:.3g} kWh")
    return "  ".join(part for part in parts if part)


def _rungs(view: SweepView) -> list[str]:
    if not view.milestones:
        return []
    rows = [["rung", f"{view.unit or 'report'}s", "done", "promoted", "best"]]
    rows += [
        [str(each.rung), f"{each.resource:g}", str(each.done), str(each.promoted), _number(each.best)]
        for each in rungs(view)
    ]
    return _aligned(rows)


def _table(view: SweepView, shown: int) -> list[str]:
    runs = {job.trial for job in view.jobs}
    order = [trial for trial in view.trials if trial.number in runs]
    order += [trial for trial in best_of(view, shown) if trial.number not in runs]
    rest = [trial for trial in view.trials if trial.number not in runs and trial.score is None]
    order = (order + rest[::-1])[:shown]
    if not order:
        return []
    keys = list(view.keys)[:MOST_KEYS]
    rows = [["trial", "status", f"{view.unit or 'report'}s", view.metric or "score", *keys, "why"]]
    for trial in order:
        status = "held" if trial.is_held else trial.status
        values = [_number(trial.values[key]) if key in trial.values else "–" for key in keys]
        why = _taken_over(trial) if status in ("running", "complete") else trial.reason
        rows.append([str(trial.number), status, f"{trial.resource:g}", _number(trial.score), *values, why])
    left = len(view.trials) - len(order)
    return _aligned(rows) + ([f"… and {left} more"] if left > 0 else [])


def _taken_over(trial: TrialRow) -> str:
    """From which members of a population it has learned, in order."""
    donors = ", ".join(str(donor) for _, donor, _ in trial.scores.get("clones", ()))
    return f"took over from trial {donors}" if donors else ""


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Right-aligned columns but for the last one."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join([cell.rjust(width) for cell, width in zip(row[:-1], widths[:-1], strict=True)] + [row[-1]]).rstrip()
        for row in rows
    ]


def _number(value: Any) -> str:
    if value is None:
        return "–"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _duration(seconds: float) -> str:
    """Roughly: what is said of it is no better."""
    for unit, length, most in (("s", 1.0, 100.0), ("min", 60.0, 100 * 60.0), ("hours", 3600.0, 48 * 3600.0)):
        if seconds < most:
            amount = seconds / length
            return f"{amount:.1f} {unit}" if unit == "hours" and amount < 10 else f"{amount:.0f} {unit}"
    return f"{seconds / 86400:.1f} days"


def _amount(value: float) -> str:
    return f"{value:.2f}" if value >= 0.095 else f"{value:.2g}"
