"""What a sweep will do, before it starts, and what one of its jobs is told: values in, values out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from orchestrator.config import ClusterCapacity, Job, NodeCapacity, Settings
from orchestrator.config.capacity import gangs
from orchestrator.config.settings import Lanes, ResourcesConfig
from orchestrator.errors import ConfigError
from orchestrator.execution.worker import Plan
from orchestrator.records import RunSpec, RunTicket
from orchestrator.store.names import trial_run_id
from orchestrator.sweeps.jobs import Assigned
from orchestrator.sweeps.rules import rules_for
from orchestrator.sweeps.space import Space
from orchestrator.sweeps.warm import Warm


@dataclass(frozen=True, slots=True, kw_only=True)
class Outlook:
    """What is known of a sweep before it begins."""

    experiment: str
    searcher: str
    scheduler: str
    trials: int
    grid: int
    """Combinations of the grid; 1 where there is none."""
    points: int
    """Configurations that are tried first, with those of earlier runs."""
    seeds: int
    dimensions: Sequence[tuple[str, str]]
    """(key, its domain in words)"""
    constraints: Sequence[str]
    workers: int
    per_worker: str
    at_once: int
    """Trials at the same time; 0: no cluster says what it has."""
    why: str
    """Why so many."""
    lanes: str
    """auto, off, or local where each job has processes of its own."""
    milestones: Sequence[float] = ()
    """Of ASHA, in units of `unit`."""
    most: Sequence[int] = ()
    """Trials that reach each milestone, at most."""
    reduction: int = 0
    unit: str = ""
    objectives: Sequence[tuple[str, str]] = ()
    """(metric, min or max). Empty: the first report decides."""
    budget: Mapping[str, float] = field(default_factory=dict)
    warm: Warm = field(default_factory=Warm)
    """What of earlier runs it begins with."""
    survives: Mapping[str, str] = field(default_factory=dict)
    """Scheduler and searcher: what of them is left after a restart, in words."""

    @property
    def resource(self) -> float | None:
        """Units of the resource in all, at most; None where nobody can say."""
        if not self.milestones:
            return None
        begins = (0.0, *self.milestones[:-1])
        steps = [at - begin for begin, at in zip(begins, self.milestones, strict=True)]
        return self.seeds * sum(step * count for step, count in zip(steps, self.most, strict=True))

    @property
    def whole_resource(self) -> float | None:
        """The same if every trial went to its end."""
        return self.seeds * self.trials * self.milestones[-1] if self.milestones else None


def outlook(
    job: Job,
    space: Space,
    capacity: ClusterCapacity | None,
    *,
    trials: int,
    place: str,
    survives: Mapping[str, str] | None = None,
    warm: Warm | None = None,
) -> Outlook:
    """What the base job and the space come to on such a cluster (None: unknown). Raises ConfigError for what cannot
    be, such as rungs without an end."""
    settings, sweep = job.settings, job.settings.sweep
    refuse_elastic(settings)
    rules = rules_for(sweep, samples=trials, seed=settings.run.seed, params=job.params)
    rungs = rules.asha.milestones if rules.asha else ()
    size, why = at_once(settings, capacity, trials)
    return Outlook(
        experiment=settings.run.experiment,
        searcher=sweep.searcher,
        scheduler=sweep.scheduler,
        trials=trials,
        grid=max(len(space.grid()), 1),
        points=len(sweep.points),
        seeds=sweep.seeds,
        dimensions=[(each.key, each.words) for each in space.dimensions],
        constraints=list(space.constraints),
        workers=settings.resources.workers,
        per_worker=_per_worker(settings.resources),
        at_once=size,
        why=why,
        lanes="local" if place == "local" else sweep.lanes.value,
        milestones=rungs,
        most=[max(trials // sweep.asha.reduction**rung, 0) for rung in range(len(rungs))],
        reduction=sweep.asha.reduction if rungs else 0,
        unit=sweep.resource.value,
        objectives=[(metric, direction.value) for metric, direction in sweep.objectives],
        budget={name: amount for name, amount in asdict(sweep.budget).items() if amount and name != "warn"},
        warm=warm or Warm(),
        survives=survives or {},
    )


def refuse_elastic(settings: Settings) -> None:
    """Raises ConfigError: a trial is compared with others, and its lane has a size of its own."""
    if least := settings.resources.min_workers:
        why = "is for single runs: the trials of a sweep are compared, so that all have the same number of workers."
        raise ConfigError("resources.min_workers", least, why, "Leave it out: resources.min_workers=0.")


def at_once(settings: Settings, capacity: ClusterCapacity | None, trials: int) -> tuple[int, str]:
    """How many trials run at the same time, and why."""
    wanted = settings.sweep.concurrency
    if capacity is None:
        return wanted, "the cluster was not asked"
    room = gangs(settings, capacity)
    why = f"{_shape(capacity)} hold {room} {'groups' if room != 1 else 'group'} of {settings.resources.workers}"
    if wanted and wanted < room:
        return min(wanted, max(trials, 1)), f"sweep.concurrency; {why}"
    if wanted > room:
        why = f"sweep.concurrency={wanted} is more than there is room for: {why}"
    return max(min(room, trials), 1), why


def unmeasured(settings: Settings, capacity: ClusterCapacity | None, monitoring: float) -> str:
    """Why nobody measures what trials use, in words; '' where their GPUs tell it. `capacity` None: not known;
    `monitoring` is the stack's, 0 where nothing is sampled."""
    if capacity is not None and not any(node.gpus for node in capacity.nodes):
        return "this cluster measures no energy: no node has a GPU that could tell it"
    if not settings.resources.gpus_per_worker:
        return "this sweep measures no energy: its workers use no GPU (resources.gpus_per_worker=0)"
    if not monitoring:
        return "this cluster measures no energy: its machines are not sampled (monitoring.enabled=false)"
    return ""


def refuse_energy(kwh: float, why: str) -> None:
    """Raises ConfigError where there is such a budget, and a reason why nothing is measured."""
    if kwh and why:
        hint = "Use sweep.budget.gpu_hours or sweep.budget.hours."
        raise ConfigError("sweep.budget.kwh", kwh, f"would limit nothing: {why}.", hint)


def capacity_of(resources: Mapping[str, Any]) -> ClusterCapacity:
    """What a Place says of itself, as it was."""
    names = ("cpus", "gpus", "memory_gb")
    return ClusterCapacity(
        nodes=tuple(NodeCapacity(**{name: node[name] for name in names}) for node in resources["nodes"])
    )


def trial_spec(base: RunSpec, sweep: RunTicket, job: Job, trial: int, repeat: int) -> RunSpec:
    """The run of one repeat of a trial; `base` is the parent's, `job` has the trial's values."""
    seeds = job.settings.sweep.seeds
    return replace(
        base,
        run="",
        new_run=trial_run_id(sweep.run, f"{trial}.{repeat}"),
        after_attempt=0,
        resume=False,
        name=f"{sweep.name}-{trial}" + (f".{repeat}" if repeat or seeds > 1 else ""),
        params=job.params,
        config=job.resolved,
        config_hash=job.hash,
        workers=job.settings.resources.workers,
        seed=job.settings.run.seed + repeat,
        parent=sweep.run,
        sweep=sweep.run,
        # Its rules are watched in every trial; of an end only the sweep's own is told.
        alerts={**base.alerts, "job": []} if base.alerts else {},
    )


def trial_plan(base: Plan, job: Job, assigned: Assigned, *, sweep: str) -> Plan:
    """What the ranks of one job are told; `base` is the plan of the parent's attempt."""
    settings = job.settings
    return replace(
        base,
        ticket=assigned.ticket,
        train=job.train,
        user=job.user,
        seed=assigned.seed,
        checkpoints=asdict(settings.checkpoints),
        config_hash=job.hash,
        secrets=job.secrets,
        threads=max(int(settings.resources.cpus_per_worker), 1),
        judge=assigned.judge,
        splits=int(assigned.changes.get("splits", 1)),
        pause=assigned.after,
        clone=_found(assigned),
        sweep=sweep,
    )


def sibling(directory: str, run: str) -> str:
    """The directory of another run of the same sweep: they lie beside each other. What a URL has after `?` stays."""
    place, mark, options = directory.partition("?") if "://" in directory else (directory, "", "")
    return f"{place.rstrip('/').rpartition('/')[0]}/{run}{mark}{options}"


def _found(assigned: Assigned) -> Mapping[str, Any]:
    """The checkpoint that a job starts from, with where it is."""
    clone = assigned.clone
    return {**clone, "directory": sibling(assigned.ticket.directory, clone["run"])} if clone else {}


def is_on_lanes(settings: Settings) -> bool:
    return settings.sweep.lanes is Lanes.auto


def _per_worker(wanted: ResourcesConfig) -> str:
    parts = [_count(wanted.cpus_per_worker, "CPU")]
    if wanted.gpus_per_worker:
        parts.append(_count(wanted.gpus_per_worker, "GPU"))
    if wanted.memory_gb_per_worker:
        parts.append(f"{wanted.memory_gb_per_worker:g} GB")
    return ", ".join(parts)


def _shape(capacity: ClusterCapacity) -> str:
    cpus, gpus = sum(node.cpus for node in capacity.nodes), sum(node.gpus for node in capacity.nodes)
    return _count(cpus, "CPU") + (f" and {_count(gpus, 'GPU')}" if gpus else "")


def _count(number: float, noun: str) -> str:
    return f"{number:g} {noun}{'' if number == 1 else 's'}"
