"""How a sweep stands, in words and as JSON, from the rows of its trials. Pure."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from orchestrator.sweep_records import JobRow, TrialRow
from orchestrator.sweeps.importance import Importance, importance

BARS = "▁▂▃▄▅▆▇█"
SHOWN = 20
"""Trials in the table: those that run, then the best."""
MOST_KEYS = 6
LEAST_ENDED = 3
"""Before so many jobs have ended, how long it takes is not said."""


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
    seq: int = -1
    """Of the newest decision."""
    trials: Sequence[TrialRow] = ()
    jobs: Sequence[JobRow] = ()
    """Those that have not ended."""
    keys: Sequence[str] = ()
    """What is searched."""
    spent: Mapping[str, float] = field(default_factory=dict)
    currency: str = "USD"
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


def seconds_left(view: SweepView, lanes: int, ended: Sequence[tuple[float, float]]) -> float | None:
    """About how long it still takes: what is left of the resource at the pace of the last 20 jobs, which are (resource,
    lane seconds), oldest first. None where that cannot be said."""
    paces = [seconds / resource for resource, seconds in ended[-20:] if resource > 0 and seconds > 0]
    whole = planned_resource(view)
    if len(paces) < LEAST_ENDED or whole is None:
        return None
    had = sum(trial.resource for trial in view.trials)
    return max(whole - had, 0.0) * statistics.median(paces) / max(lanes, 1)


def planned_resource(view: SweepView) -> float | None:
    """Epochs, reports or steps of all trials together, at most. None where only the functions know."""
    if view.milestones and view.reduction:
        total, count, before = 0.0, view.samples, 0.0
        for resource in view.milestones:
            total += count * (resource - before)
            count, before = count // view.reduction, resource
        return total
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
    important, best = importances(view), best_of(view)
    return {
        **asdict(view),
        "counts": dict(Counter(trial.status for trial in view.trials)),
        "best": asdict(best[0]) if best else None,
        "rungs": [asdict(rung) for rung in rungs(view)],
        "history": history(view),
        "importance": {"shares": dict(important.shares), "n": important.n, "why": important.why},
    }


def _head(view: SweepView) -> str:
    counts = Counter(trial.status for trial in view.trials)
    over = sum(counts[status] for status in ("complete", "stopped", "failed", "cancelled"))
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
        why = "" if status in ("running", "complete") else trial.reason
        rows.append([str(trial.number), status, f"{trial.resource:g}", _number(trial.score), *values, why])
    left = len(view.trials) - len(order)
    return _aligned(rows) + ([f"… and {left} more"] if left > 0 else [])


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
