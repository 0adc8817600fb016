"""What a sweep will do, in words, before it does it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from orchestrator.cli import text
from orchestrator.cli.output import Output
from orchestrator.sweeps.summary import Left

if TYPE_CHECKING:
    from orchestrator.execution.sweep_plan import Outlook

INDENT = "  "
UNKNOWN = "unknown until a trial has run"


@dataclass(frozen=True, slots=True, kw_only=True)
class SoFar:
    """What there is already of a sweep that goes on."""

    words: str
    left: Left | None = None


def document(plan: Outlook, so_far: SoFar | None = None) -> dict[str, Any]:
    return {
        "experiment": plan.experiment,
        "searcher": plan.searcher,
        "scheduler": plan.scheduler,
        "trials": plan.trials,
        "points": plan.points,
        "warm_points": plan.warm.points,
        "warm_results": plan.warm.told,
        "seeds": plan.seeds,
        "space": dict(plan.dimensions),
        "constraints": list(plan.constraints),
        "workers": plan.workers,
        "at_once": plan.at_once,
        "why": plan.why,
        "lanes": plan.lanes,
        "milestones": list(plan.milestones),
        "most": list(plan.most),
        "resource": plan.resource,
        "objectives": [list(each) for each in plan.objectives],
        "budget": dict(plan.budget),
        "survives": dict(plan.survives),
        "left": asdict(so_far.left) if so_far and so_far.left else None,
    }


def render(plan: Outlook, output: Output) -> None:
    for line in lines(plan):
        output.line(line)


def lines(plan: Outlook, so_far: SoFar | None = None) -> list[str]:
    """The first says what; the others have a name each, with the values under each other."""
    fields = [
        *((key, words) for key, words in plan.dimensions),
        *(("constraint", each) for each in plan.constraints),
        ("workers", _workers(plan)),
        ("rungs", _rungs(plan)),
        ("objective", _objective(plan.objectives)),
        ("budget", ", ".join(f"{amount:g} {_word(name)}" for name, amount in plan.budget.items()) or "none"),
        ("warm", _warm(plan)),
        ("so far", so_far.words if so_far else ""),
        ("left" if so_far and so_far.left else "time", str(so_far.left) if so_far and so_far.left else UNKNOWN),
        ("restart", "keeps of " + "; of ".join(f"{name} {what}" for name, what in plan.survives.items())),
    ]
    shown = [(name, value) for name, value in fields if value]
    width = max(len(name) for name, _ in shown)
    return [f"sweep {plan.experiment}  ({plan.searcher}, {plan.scheduler})  {_trials(plan)}"] + [
        f"{INDENT}{name.ljust(width)}  {value}" for name, value in shown
    ]


def _trials(plan: Outlook) -> str:
    parts = [f"{plan.trials} {'trial' if plan.trials == 1 else 'trials'}"]
    drawn = plan.trials - plan.points
    if plan.grid > 1 and drawn > 0 and drawn % plan.grid == 0:
        parts.append(f"{drawn // plan.grid} × {plan.grid} of the grid")
    if given := plan.points - plan.warm.points:
        parts.append(f"{given} of them given")
    if plan.warm.points:
        parts.append(f"{plan.warm.points} of them from earlier runs")
    if plan.seeds > 1:
        parts.append(f"each with {plan.seeds} seeds")
    return ", ".join(parts)


def _warm(plan: Outlook) -> str:
    """What comes of `sweep.warm_start`; '' where there is none."""
    warm, parts = plan.warm, []
    if warm.told:
        parts.append(f"{plan.searcher} begins with {warm.told} earlier results")
    if warm.points:
        parts.append(f"the best {warm.points} of {len(warm.known)} earlier results are tried again")
    if warm.left_out:
        parts.append("left out: " + ", ".join(f"{count} ({why})" for why, count in warm.left_out.items()))
    return ";  ".join(parts)


def _workers(plan: Outlook) -> str:
    at_once = f"{plan.at_once} at once" if plan.at_once else "as many at once as there is room for"
    lanes = "processes of this host" if plan.lanes == "local" else f"lanes: {plan.lanes}"
    return f"{plan.workers} each ({plan.per_worker});  {at_once}: {plan.why};  {lanes}"


def _rungs(plan: Outlook) -> str:
    if not plan.milestones or plan.resource is None or plan.whole_resource is None:
        return ""
    ends = ", ".join(text.number(at) for at in plan.milestones)
    most = ", ".join(map(str, plan.most))
    unit = "units" if plan.unit in ("", "auto") else f"{plan.unit}s"
    return (
        f"{ends} {unit} (reduction {plan.reduction}): about {most} trials"
        f" = {plan.resource:g} of {plan.whole_resource:g} {unit}"
    )


def _objective(objectives: Sequence[tuple[str, str]]) -> str:
    if not objectives:
        return "the metric that tells most in the first report"
    return ", ".join(f"{metric}, {'higher' if way == 'max' else 'lower'} is better" for metric, way in objectives)


def _word(name: str) -> str:
    return {"gpu_hours": "GPU-hours", "cpu_hours": "CPU-hours", "kwh": "kWh", "money": "in money"}.get(name, name)
