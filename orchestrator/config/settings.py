"""Every key of ours, with its default, meaning and bounds. Values only: nothing here reads a file or an environment."""

from __future__ import annotations

import dataclasses
import math
import re
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from orchestrator.config.typed import bounded
from orchestrator.errors import ConfigError
from orchestrator.json_logs import RUN_COMPONENTS, check_components
from orchestrator.records import WhenFull


class Enabled(StrEnum):
    """Whether an integration is used."""

    auto = "auto"
    """Used where it is there; where it is missing, one warning."""
    true = "true"
    """Missing is an error."""
    false = "false"


class Placement(StrEnum):
    """How workers are spread over nodes; Ray's placement strategies."""

    pack = "pack"
    """On as few nodes as possible."""
    spread = "spread"
    """On as many nodes as possible."""
    strict_pack = "strict_pack"
    """All on one node."""
    strict_spread = "strict_spread"
    """Each on a node of its own."""


class Batch(StrEnum):
    """What stays the same when an elastic run has fewer workers."""

    worker = "worker"
    """The batch of a worker: that of all workers together becomes smaller."""
    whole = "global"
    """That of all workers together, where the number of workers divides `resources.workers`: each worker takes more
    micro-batches for a step. Only for train functions that use `run.accumulate`."""


_BEST = re.compile(r"[^:]+(:(min|max)(:[1-9]\d*)?)?")


class Direction(StrEnum):
    """Which end of a metric is the better one."""

    min = "min"
    max = "max"


class Score(StrEnum):
    """Which value of an objective counts, of all that a trial reports."""

    best = "best"
    last = "last"


class Resource(StrEnum):
    """In what the length of a trial is counted."""

    auto = "auto"
    """Epochs where the train function uses `run.epochs`, else reports; settled by the first result."""
    epoch = "epoch"
    report = "report"
    step = "step"


class Lanes(StrEnum):
    """Whether a group of workers takes one trial after another."""

    auto = "auto"
    off = "off"
    """New workers for every trial."""


class CheckpointMode(StrEnum):
    """How a checkpoint leaves the training's hands."""

    eager = "eager"
    """Copied into shared memory; another process writes it. Where there is no such memory: as `direct`."""
    overlap = "overlap"
    """The same, and the copy goes on while the next step computes, up to `optimizer.step`."""
    direct = "direct"
    """Written before training goes on."""


class Guarded(StrEnum):
    """What follows when a training goes wrong."""

    off = "off"
    """It is not watched for."""
    warn = "warn"
    """An event says so."""
    fail = "fail"
    """The attempt fails, without saving what went wrong; what it had saved since is not gone on from."""
    rollback = "rollback"
    """So it does, and another one goes on from the newest good checkpoint, without the batches in which it went wrong
    or with a lower learning rate: `failures.max_rollbacks` times."""


class Resume(StrEnum):
    """What the same command does when it is given again."""

    new = "new"
    """A new run."""
    auto = "auto"
    """The next attempt of the newest run with the same experiment and config, if that one did not finish."""


@dataclass(kw_only=True)
class RunConfig:
    """What the run is called and belongs to."""

    experiment: str = "default"
    """The experiment that groups this run with others."""
    name: str = ""
    """Empty: one is made up."""
    description: str = ""
    tags: dict[str, str] = field(default_factory=dict)
    notes: str = ""
    project: str = "default"
    user: str = ""
    """Who is acting. Empty: the account that submits."""
    seed: int = bounded(0, minimum=0, maximum=2**32 - 1)
    """Root seed; every rank's seeds are derived from it."""
    resume: Resume = Resume.new
    keep: bool = False
    """`orc keep` begins it again when nobody wanted it to end: its driver, its host or Ray's head was lost."""


@dataclass(kw_only=True)
class LimitsConfig:
    """What one run may use. Near a limit there is one warning; at it the run saves, stops and is not restarted. 0: no
    limit. Not for sweeps, which have `sweep.budget` and `sweep.trial_minutes`."""

    hours: float = bounded(0.0, minimum=0)
    """By the clock, all its attempts together."""
    memory_gb: float = bounded(0.0, minimum=0)
    """10^9 bytes of memory of one rank's process, for 30 seconds."""
    gpu_memory_gb: float = bounded(0.0, minimum=0)
    """10^9 bytes of memory in use on one of its GPUs, for 30 seconds."""
    cpu_percent: float = bounded(0.0, minimum=0)
    """Of one rank's process, for 30 seconds; 100 is one CPU."""


@dataclass(kw_only=True)
class ResourcesConfig:
    """What one run asks of the cluster."""

    workers: int = bounded(2, minimum=1)
    """Training processes, one DDP rank each. `{min: 1, max: 4}` is another way to write this and `min_workers`."""
    min_workers: int = bounded(0, minimum=0)
    """An elastic run: it begins with at least so many workers where there is no room for all, goes on with those that
    are left when nodes are lost, and grows back, see `elastic`. 0: always with all. Not for sweeps."""
    cpus_per_worker: float = bounded(1.0, above=0)
    """Logical CPUs, as Ray counts them; may be a fraction."""
    gpus_per_worker: float = bounded(0.0, minimum=0)
    """A fraction of one, or whole GPUs."""
    memory_gb_per_worker: float = bounded(0.0, minimum=0)
    """10^9 bytes that Ray sets aside for each worker; 0: none."""
    placement: Placement = Placement.pack
    limits: LimitsConfig = field(default_factory=LimitsConfig)

    def __post_init__(self) -> None:
        if self.min_workers > self.workers:
            why = f"is more than resources.workers, which is {self.workers}."
            hint = f"The nearest is resources.min_workers={self.workers}."
            raise ConfigError("resources.min_workers", self.min_workers, why, hint)
        if self.gpus_per_worker > 1 and not float(self.gpus_per_worker).is_integer():
            near = max(1, round(self.gpus_per_worker))
            why = "must be whole when it is more than one: Ray gives no worker one and a half GPUs."
            raise ConfigError(
                "resources.gpus_per_worker",
                self.gpus_per_worker,
                why,
                f"The nearest is resources.gpus_per_worker={near}.",
            )


@dataclass(kw_only=True)
class ElasticConfig:
    """How a run with `resources.min_workers` grows back."""

    look: float = bounded(30.0, minimum=1, maximum=3600)
    """Seconds between two looks whether there is room for more workers. Two in a row must find it."""
    every: float = bounded(600.0, minimum=0)
    """Seconds that an attempt trains before it is ended for more workers. In the last tenth of its epochs it is not."""
    batch: Batch = Batch.worker


@dataclass(kw_only=True)
class StorageConfig:
    """Where run directories (checkpoints, artifacts, copies of the record) live."""

    url: str = field(default="", repr=False)
    """A local path or a URL (file, s3, gs, abfs, hdfs). Empty: `runs/` in the data directory."""


@dataclass(kw_only=True)
class TrackingConfig:
    """How metrics and signs of life travel."""

    heartbeat: float = bounded(2.0, above=0, maximum=60)
    """Seconds between two signs of life of a run."""
    lease: float = bounded(15.0, above=0)
    """Seconds of silence after which a run counts as crashed; at least three heartbeats."""
    flush_timeout: float = bounded(30.0, minimum=0)
    """Seconds that the end of a run waits until everything logged is accepted."""
    spool_mb: int = bounded(1024, minimum=1)
    """2^20 bytes that the spool of one process may hold until they are committed."""
    when_full: WhenFull = WhenFull.block
    """What `log` does when they are used up, or the disk is full."""
    perf: bool = True
    """Record step time, wait for data, throughput and peak memory as `perf/…`."""
    debug: list[str] = field(default_factory=list)
    """Which of `driver` and `worker` log in detail. Services: `orc up tracking.debug=tracker`."""

    def __post_init__(self) -> None:
        check_components("tracking.debug", self.debug, RUN_COMPONENTS)
        if self.lease < 3 * self.heartbeat:
            why = f"must be at least three heartbeats ({self.heartbeat:g} s each), or a single late one ends the run."
            raise ConfigError(
                "tracking.lease", self.lease, why, f"The nearest is tracking.lease={3 * self.heartbeat:g}."
            )


@dataclass(kw_only=True)
class CheckpointsConfig:
    """When the training state is saved and what is kept. The triggers are independent: whichever comes first saves."""

    every_steps: int = bounded(0, minimum=0)
    """0: not by steps."""
    every_epochs: int = bounded(1, minimum=0)
    """0: not by epochs."""
    every_minutes: float = bounded(15.0, minimum=0)
    """0: not by time."""
    on_stop: bool = True
    """Save before the run ends because it was asked to."""
    on_exception: bool = True
    """Save when the train function raises, if the state is whole then."""
    at_end: bool = True
    """Save when the train function returns, if there were steps since the last checkpoint."""
    full_every_epochs: int = bounded(0, minimum=0)
    """Of sharded (FSDP) state, save whole tensors every so many epochs; 0: never."""
    keep_last: int = bounded(3, minimum=0)
    """The newest that are kept; 0: all."""
    keep_best: int = bounded(1, minimum=0)
    """The best by `best_metric` that are kept besides."""
    best_metric: str = ""
    """Key of a reported metric. Empty: none is called best."""
    best_direction: Direction = Direction.max
    also_best: list[str] = field(default_factory=list)
    """Further metrics whose best are kept, as metric:direction:count. Example: [val/loss:min:1]."""
    keep_every_steps: int = bounded(0, minimum=0)
    """Keep the first at or after each multiple of so many steps; 0: none for that."""
    keep_hours: float = bounded(0.0, minimum=0)
    """Keep what is younger than so many hours."""
    quota_gb: float = bounded(0.0, minimum=0)
    """What all checkpoints of the experiment may take together, in 10^9 bytes; 0: no limit."""
    label: str = "v{epoch}.{step}"
    """What a checkpoint is called besides its name. Knows {epoch}, {step} and {attempt}."""
    max_gb: float = bounded(0.0, minimum=0)
    """Refuse to save more than so many 10^9 bytes; 0: no limit."""
    wait: float = bounded(600.0, minimum=0)
    """Seconds that a save which must not be skipped waits for room, and then until it is durable."""
    mode: CheckpointMode = CheckpointMode.eager
    window_mb: int = bounded(64, minimum=1)
    """Memory, in MiB, through which a rank that writes by itself streams what lies on a GPU."""

    def __post_init__(self) -> None:
        try:
            self.label.format(epoch=0, step=0, attempt=1)
        except (KeyError, IndexError, ValueError, AttributeError) as error:
            why = f"is no such template ({error!r})."
            raise ConfigError("checkpoints.label", self.label, why, "Use {epoch}, {step} and {attempt}.") from error
        for text in self.also_best:
            if not _BEST.fullmatch(text):
                why = "is not a metric, then min or max, then how many."
                raise ConfigError("checkpoints.also_best", text, why, "Example: val/loss:min:1")


@dataclass(kw_only=True)
class DatabaseConfig:
    """The PostgreSQL server that keeps the record."""

    url: str = field(default="", repr=False)
    """`postgresql://USER@HOST/DB`, PostgreSQL 15 or later. Empty: the embedded server that `orc up` starts."""


@dataclass(kw_only=True)
class MlflowConfig:
    """The MLflow mirror."""

    enabled: Enabled = Enabled.auto
    tracking_uri: str = field(default="", repr=False)
    """An existing MLflow server or store. Empty: the server that `orc up` starts."""
    port: int = bounded(0, minimum=0, maximum=65535)
    """Port of the server that `orc up` starts; 0: a free one."""
    experiment_prefix: str = ""
    """Put before the experiment's name in MLflow."""
    other_ranks: bool = False
    """Also show the other ranks' curves there, as `KEY/rank_K`."""


@dataclass(kw_only=True)
class TensorboardConfig:
    """Event files for TensorBoard."""

    enabled: Enabled = Enabled.auto
    """`auto`: where the stack writes them (`orc up tensorboard.enabled=true`). `false`: not of this run."""


@dataclass(kw_only=True)
class RayConfig:
    """The Ray cluster that runs the work."""

    enabled: Enabled = Enabled.auto
    address: str = ""
    """`HOST:PORT` of an existing cluster. Empty: the head that `orc up` starts."""
    port: int = bounded(0, minimum=0, maximum=65535)
    """Port of the head that `orc up` starts; 0: a free one."""
    dashboard_port: int = bounded(0, minimum=0, maximum=65535)
    """Port of its dashboard and job server; 0: a free one."""
    num_cpus: int = bounded(0, minimum=0)
    """Logical CPUs of the head that `orc up` starts; 0: as many as the machine has."""
    fallback: bool = False
    """Where the stack's Ray does not answer when a run begins, its ranks are processes of this host (`auto` only)."""


@dataclass(kw_only=True)
class RedisConfig:
    """Live values for `orc watch`; nothing is lost without it."""

    enabled: Enabled = Enabled.auto
    url: str = field(default="", repr=False)
    """`redis://`, `rediss://` or `unix://`. Empty: the server that `orc up` starts."""


@dataclass(kw_only=True)
class HangConfig:
    """When a run that stands still is ended, with the stacks of all its ranks, as a failure of the kind `hang`. Points
    that it logs, batches of prepared loaders and `run.alive` are progress; saving and loading have limits of their
    own."""

    least: float = bounded(120.0, minimum=0)
    """After so many seconds without progress at the earliest; 0: never."""
    times: float = bounded(20.0, minimum=1)
    """After so many times the longest that it stood still before."""
    start: float = bounded(1800.0, minimum=0)
    """Seconds in which it must begin to log; 0: for ever."""


@dataclass(kw_only=True)
class FailuresConfig:
    """What happens when training dies."""

    max_restarts: int = bounded(0, minimum=-1)
    """Further attempts after failures that a restart may mend; -1: without limit."""
    max_preemptions: int = bounded(-1, minimum=-1)
    """Further attempts after preemptions and lost nodes, which do not count as restarts; -1: without limit."""
    max_halvings: int = bounded(5, minimum=-1)
    """Further attempts after memory ran out, each with micro-batches of half the size and the same global batch. Only
    for train functions that use `run.accumulate`; -1: down to one sample."""
    max_rollbacks: int = bounded(3, minimum=-1)
    """Further attempts after the training went wrong, for `nan=rollback` and `divergence=rollback`; -1: no limit."""
    skip: bool = True
    """Such an attempt leaves out the batches in which it went wrong. Where these are not known, or more than half a
    pass, the learning rate is lowered at once."""
    lr_factor: float = bounded(0.5, above=0, maximum=1)
    """By what learning rates are multiplied from the second rollback on; 1: never. See `run.lr_factor`."""
    max_repeats: int = bounded(2, minimum=0)
    """The same failure at the same step so often ends the run, whatever is left of its restarts; 0: never."""
    max_fruitless: int = bounded(10, minimum=0)
    """So many failures in a row of attempts that came no further than those before end the run; 0: never."""
    limits: dict[str, int] = field(default_factory=dict)
    """Further attempts after one kind of failure, instead of the above. Example: {storage: 5, data_error: 1}."""
    backoff: float = bounded(1.0, minimum=0, maximum=3600)
    """Seconds before a restart, half of it random; twice as long after each attempt that came no further."""
    backoff_max: float = bounded(60.0, minimum=0, maximum=86400)
    """The longest such pause."""
    collective_timeout: float = bounded(1800.0, above=0)
    """Seconds that ranks wait for each other; three times as long in the attempt after it was too short."""
    hang: HangConfig = field(default_factory=HangConfig)
    nan: Guarded = Guarded.warn
    """When a reported loss, or the gradients, are NaN or infinite."""
    divergence: Guarded = Guarded.warn
    """When the mean of the last 5 reported losses is more than twice that of the 5 before, or the gradients explode."""
    memory_growth: bool = True
    """Say so when the memory in use grows steadily from report to report."""
    losses: list[str] = field(default_factory=list)
    """Keys of reported metrics that are losses. Empty: those with `loss` or `perplexity` in their names."""
    gradients_every: int = bounded(50, minimum=0)
    """Optimizer steps between two looks at the norm of the gradients, which are 0.2 s apart at least unless this is 1;
    0: none."""
    patterns: list[Any] = field(default_factory=list)
    """What your own messages and log lines mean, before our rules: `match` is a regular expression, `kind` what kind of
    failure that is (a name of your own, too), `action` (stop or restart) what is done whatever the kind, `avoid_node:
    true` that no further attempt shall be on that node. Also for trials of sweeps.
    Example: [{match: "filer-\\d+ is away", kind: storage, hint: "Ask the filer's owner."}]."""
    function: str = ""
    """`module:function`, called in the driver with a failed attempt and what is to follow, both as dicts; the action
    that it returns is done instead. Not for trials of sweeps."""
    avoid_after: int = bounded(2, minimum=0)
    """After so many failures that are about a machine on one node, no further attempt is placed there; 0: never for
    that."""
    grace: float = bounded(20.0, minimum=0, maximum=3600)
    """Seconds that the ranks have to reach their next `report` after a request to stop."""

    def __post_init__(self) -> None:
        for kind, limit in self.limits.items():
            if limit < -1:
                raise ConfigError(f"failures.limits.{kind}", limit, "must be at least -1.", "-1 means without limit.")


@dataclass(kw_only=True)
class StopConfig:
    """When a run ends early by itself. Off unless one of `patience`, `plateau`, `target`, `divergence` is set."""

    metric: str = ""
    """What is watched. Empty: the first objective of the sweep, else the metric that tells most of those reported."""
    direction: Direction = Direction.min
    """Which way `metric` gets better. With an empty `metric`: as its objective says."""
    patience: int = bounded(0, minimum=0)
    """Ends the run after so many reports in a row without a better value; 0: not for that."""
    min_delta: float = bounded(0.0, minimum=0)
    """A value counts as better if it is so by more than this."""
    plateau: int = bounded(0, minimum=0)
    """Ends the run where the last so many values hardly differ; 0: not for that."""
    plateau_std: float = bounded(0.0, minimum=0)
    """Standard deviation of them up to which they hardly differ."""
    target: float | None = None
    """Ends the run at the first value that is as good as this."""
    divergence: bool = False
    """Ends the run at a value that is NaN or infinite."""
    grace: int = bounded(0, minimum=0)
    """The first so many reports end nothing."""


@dataclass(kw_only=True)
class AshaConfig:
    """`sweep.scheduler=asha`: all trials get `min`, the best of them `reduction` times as much, and so on."""

    min: int = bounded(1, minimum=1)
    """What every trial gets, in units of `sweep.resource`."""
    max: int = bounded(0, minimum=0)
    """What the best get. 0: as much as the train function takes, by its own `epochs` or the like."""
    reduction: int = bounded(3, minimum=2)
    """One in so many goes on."""

    def __post_init__(self) -> None:
        if 0 < self.max < self.min:
            why = f"must be at least sweep.asha.min ({self.min})."
            raise ConfigError("sweep.asha.max", self.max, why, f"The nearest is sweep.asha.max={self.min}.")


@dataclass(kw_only=True)
class MedianConfig:
    """`sweep.scheduler=median`: a trial ends where its best value is worse than the median of the others' means."""

    grace: int = bounded(1, minimum=0)
    """Nothing ends below this, in units of `sweep.resource`."""
    trials: int = bounded(3, minimum=1)
    """So many must have ended before anything is compared."""
    every: int = bounded(1, minimum=1)
    """Compared at every so many units."""


@dataclass(kw_only=True)
class PbtConfig:
    """`sweep.scheduler=pbt`: after each interval the worst go on from checkpoints of the best, with changed values."""

    population: int = bounded(0, minimum=0)
    """Members; 0: as many as `sweep.samples`."""
    interval: int = bounded(1, minimum=1)
    """Between two comparisons, in units of `sweep.resource`."""
    max: int = bounded(0, minimum=0)
    """Where a member ends. 0: where the train function does, by its own `epochs` or the like."""
    quantile: float = bounded(0.25, above=0, maximum=0.5)
    """The share that is replaced, and the share that it is replaced from."""
    resample: float = bounded(0.25, minimum=0, maximum=1)
    """How likely a value is drawn anew rather than changed a little."""
    factors: list[float] = field(default_factory=lambda: [0.8, 1.2])
    """By one of these a number is multiplied."""
    sync: bool = True
    """All members are compared at once, whatever the number of lanes; `false`: each when it gets there."""
    mutate: list[str] = field(default_factory=list)
    """Keys that change. Empty: all that are drawn."""

    def __post_init__(self) -> None:
        for factor in self.factors:
            if not factor > 0 or math.isinf(factor):
                raise ConfigError("sweep.pbt.factors", self.factors, "must be greater than 0.")
        if not self.factors:
            raise ConfigError("sweep.pbt.factors", self.factors, "there is none.", "The default is [0.8,1.2].")


@dataclass(kw_only=True)
class BudgetConfig:
    """What a sweep may use. When one of it is used up no trial starts any more, and those that run save and stop."""

    hours: float = bounded(0.0, minimum=0)
    """By the clock, all attempts of the sweep together; 0: no limit, here and below."""
    gpu_hours: float = bounded(0.0, minimum=0)
    cpu_hours: float = bounded(0.0, minimum=0)
    money: float = bounded(0.0, minimum=0)
    """By `sweep.prices`."""
    kwh: float = bounded(0.0, minimum=0)
    """Of the GPUs of its trials, as their machines' samplers measure it; refused where none does."""
    warn: float = bounded(0.8, minimum=0, maximum=1)
    """At this share of a limit there is one warning."""


@dataclass(kw_only=True)
class PricesConfig:
    """What the machines cost."""

    gpu_hour: float = bounded(0.0, minimum=0)
    cpu_hour: float = bounded(0.0, minimum=0)
    currency: str = "USD"
    """Only shown."""


_OBJECTIVE = re.compile(r"(?P<metric>[^:\s][^:]*)(:(?P<direction>min|max))?")
_LESS_IS_BETTER = re.compile(r"loss|error|perplexity", re.IGNORECASE)


def natural_direction(metric: str) -> Direction:
    """Which way a metric gets better by its name: losses, errors and perplexities are small, anything else is large."""
    return Direction.min if _LESS_IS_BETTER.search(metric) else Direction.max


@dataclass(kw_only=True)
class SweepConfig:
    """Which configurations `orc sweep` tries, how it chooses among them and when it ends."""

    space: dict[str, Any] = field(default_factory=dict)
    """What is searched, as key: domain. Example: {optim.lr: "loguniform(1e-4,1e-1)"}. What the command line searches
    is added, see sweeps/README.md."""
    constraints: list[str] = field(default_factory=list)
    """What must hold between keys. Example: ["optim.lr * batch_size <= 1"]."""
    objective: list[str] = field(default_factory=list)
    """Metrics as metric:direction, the first of which rules schedulers. Example: [val/accuracy:max]. Empty:
    `checkpoints.best_metric`, else the metric that tells most of those in the first report."""
    score: Score = Score.best
    """`asha` and `pbt` always use the value at the milestone."""
    samples: int = bounded(0, minimum=0)
    """How many are drawn, for each combination of the grid where there is one. 0: the grid once."""
    searcher: str = "random"
    """random, grid, optuna, or tune:NAME for one of Ray Tune's."""
    searcher_args: dict[str, Any] = field(default_factory=dict)
    """For `optuna` and `tune:NAME`: what the sampler or search is made with."""
    scheduler: str = "fifo"
    """fifo, asha, median or pbt, or tune:NAME for one of Ray Tune's: hyperband, pb2, …, or module:Class."""
    scheduler_args: dict[str, Any] = field(default_factory=dict)
    """For `tune:NAME`: what the scheduler is made with. `every`: units of the resource between two results that it
    hears, where nobody can know which of them it waits for."""
    asha: AshaConfig = field(default_factory=AshaConfig)
    median: MedianConfig = field(default_factory=MedianConfig)
    pbt: PbtConfig = field(default_factory=PbtConfig)
    resource: Resource = Resource.auto
    lanes: Lanes = Lanes.auto
    concurrency: int = bounded(0, minimum=0)
    """Trials at once; 0: as many as there is room for."""
    lane_growth_mb: float = bounded(512.0, above=0)
    """2^20 bytes by which the memory of a lane's worker may have grown before its workers are replaced."""
    lane_jobs: int = bounded(0, minimum=0)
    """Its workers are replaced after so many jobs; 0: never for that."""
    lane_idle: float = bounded(30.0, minimum=0)
    """Seconds after which a lane that has nothing to do gives its resources back."""
    seeds: int = bounded(1, minimum=1)
    """Runs per configuration, with seeds run.seed, run.seed + 1, …; their mean counts."""
    max_failed: int = bounded(0, minimum=0)
    """The sweep ends when so many trials have failed; 0: never for that."""
    restarts: int = bounded(3, minimum=0)
    """Further attempts of a trial that died of what another attempt may mend, in a row without getting further."""
    trial_minutes: float = bounded(0.0, minimum=0)
    """A trial that takes longer fails; 0: no limit."""
    hang: float = bounded(600.0, minimum=0)
    """Seconds without a sign of progress after which a trial counts as hanging; 0: never."""
    points: list[dict[str, Any]] = field(default_factory=list)
    """Configurations that are tried first, in full or in part; what they leave out is drawn."""
    warm_start: list[str] = field(default_factory=list)
    """Runs or sweeps whose results the searcher starts with."""
    budget: BudgetConfig = field(default_factory=BudgetConfig)
    prices: PricesConfig = field(default_factory=PricesConfig)

    def __post_init__(self) -> None:
        for text in self.objective:
            if not _OBJECTIVE.fullmatch(text):
                raise ConfigError("sweep.objective", text, "is no metric with min or max.", "Example: val/accuracy:max")
        metrics = [metric for metric, _ in self.objectives]
        for metric in metrics:
            if metrics.count(metric) > 1:
                raise ConfigError("sweep.objective", metric, "is named twice.")
        if self.budget.money and not (self.prices.gpu_hour or self.prices.cpu_hour):
            why = "cannot be kept to: nothing is known to cost anything."
            hint = "Give a price: sweep.prices.gpu_hour or sweep.prices.cpu_hour."
            raise ConfigError("sweep.budget.money", self.budget.money, why, hint)

    @property
    def objectives(self) -> list[tuple[str, Direction]]:
        """`objective` taken apart; where no direction is given it is the metric's natural one."""
        found = [_OBJECTIVE.fullmatch(text) for text in self.objective]
        pairs = [(match["metric"], match["direction"]) for match in found if match]
        return [(metric, Direction(way) if way else natural_direction(metric)) for metric, way in pairs]


@dataclass(kw_only=True)
class SubmitConfig:
    """What `orc submit` sends to a cluster."""

    exclude: list[str] = field(default_factory=list)
    """Files and directories that stay here, as in a .gitignore, besides those that .gitignore names."""
    env: list[str] = field(default_factory=list)
    """Names of environment variables that the job gets from here. Everybody who may list jobs can read them."""
    max_mb: float = bounded(50.0, above=0)
    """10^6 bytes; a project with more is not sent."""


@dataclass(kw_only=True)
class ProvenanceConfig:
    """What is kept of the source beside the record. Packages, git, hosts and versions are always recorded."""

    source: bool = True
    """Keep an archive of the source files in the run's directory; what .gitignore names is left out."""
    max_mb: float = bounded(50.0, above=0)
    """10^6 bytes that all archived files may have together, uncompressed."""
    max_file_mb: float = bounded(5.0, above=0)
    """10^6 bytes that one archived file may have."""
    exclude: list[str] = field(default_factory=list)
    """What else is left out, as in a .gitignore."""


@dataclass(kw_only=True)
class SlackConfig:
    """An incoming webhook of Slack, or of what speaks like it."""

    webhook: str = field(default="", repr=False)
    """Its URL. Empty: what ORC_SLACK_WEBHOOK holds."""
    channel: str = ""
    """Only older webhooks may choose one."""


@dataclass(kw_only=True)
class WebhookConfig:
    """Any server that takes JSON."""

    url: str = field(default="", repr=False)
    """Empty: what ORC_WEBHOOK_URL holds."""
    token: str = field(default="", repr=False)
    """Sent as `Authorization: Bearer`. Empty: what ORC_WEBHOOK_TOKEN holds, if anything."""


@dataclass(kw_only=True)
class PagerdutyConfig:
    """A service of PagerDuty, through its Events API v2."""

    routing_key: str = field(default="", repr=False)
    """The integration's key. Empty: what ORC_PAGERDUTY_ROUTING_KEY holds."""
    url: str = field(default="https://events.pagerduty.com/v2/enqueue", repr=False)


class Encryption(StrEnum):
    """How a mail server is spoken to."""

    auto = "auto"
    """Encrypted where the server offers it; a password is never sent in clear."""
    starttls = "starttls"
    """Encrypted after the greeting, or not at all."""
    tls = "tls"
    """Encrypted from the beginning, usually on port 465."""
    none = "none"


@dataclass(kw_only=True)
class EmailConfig:
    """A mail server (SMTP) and who gets mail through it."""

    host: str = ""
    port: int = bounded(587, minimum=1, maximum=65535)
    encryption: Encryption = Encryption.auto
    user: str = ""
    """Empty: without a login."""
    password: str = field(default="", repr=False)
    """Empty: what ORC_SMTP_PASSWORD holds."""
    sender: str = ""
    """Empty: `orc@` and the name of the tracker's host."""
    to: list[str] = field(default_factory=list)


@dataclass(kw_only=True)
class AlertsConfig:
    """What is watched while a run goes on, and who is told of it. Each alert is an event of the run as well."""

    enabled: bool = True
    defaults: bool = True
    """Also the rules that every run has: memory, disk, CPU and GPU."""
    rules: dict[str, Any] = field(default_factory=dict)
    """name -> {metric or event, when, clear, for, cooldown, level, notify, message}, or false for one of the defaults;
    see orchestrator/alerts/README.md. Example: {high: {metric: train/loss, when: "> 5", for: 3}}."""
    notify: list[Any] = field(default_factory=lambda: ["log"])
    """Who is told of alerts whose rule does not say it: log, slack, webhook, pagerduty, email."""
    administrators: list[Any] = field(default_factory=lambda: ["log"])
    """Who is told that a service of the stack is away, and that it is back (the default rule `degraded`)."""
    slack: SlackConfig = field(default_factory=SlackConfig)
    webhook: WebhookConfig = field(default_factory=WebhookConfig)
    pagerduty: PagerdutyConfig = field(default_factory=PagerdutyConfig)
    email: EmailConfig = field(default_factory=EmailConfig)


@dataclass(kw_only=True)
class Settings:
    """All keys of ours. Everything else in a configuration belongs to the user's train function."""

    train: str = ""
    """`module:function` of the train function."""
    run: RunConfig = field(default_factory=RunConfig)
    resources: ResourcesConfig = field(default_factory=ResourcesConfig)
    elastic: ElasticConfig = field(default_factory=ElasticConfig)
    storage: StorageConfig = field(default_factory=StorageConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    checkpoints: CheckpointsConfig = field(default_factory=CheckpointsConfig)
    database: DatabaseConfig = field(default_factory=DatabaseConfig)
    mlflow: MlflowConfig = field(default_factory=MlflowConfig)
    tensorboard: TensorboardConfig = field(default_factory=TensorboardConfig)
    ray: RayConfig = field(default_factory=RayConfig)
    redis: RedisConfig = field(default_factory=RedisConfig)
    failures: FailuresConfig = field(default_factory=FailuresConfig)
    provenance: ProvenanceConfig = field(default_factory=ProvenanceConfig)
    submit: SubmitConfig = field(default_factory=SubmitConfig)
    stopping: StopConfig = field(default_factory=StopConfig)
    sweep: SweepConfig = field(default_factory=SweepConfig)
    alerts: AlertsConfig = field(default_factory=AlertsConfig)
    notify: list[Any] = field(default_factory=list)
    """Who is told when the run or sweep ends: names of notifiers, or {NAME: ADDRESS}, or {NAME: {on: failure, …}}.
    Example: [slack, {webhook: "${oc.env:TEAM_WEBHOOK}"}, {email: {to: [me@example.org], on: failure}}]."""
    preset: dict[str, bool] = field(default_factory=dict)
    """Names of the presets that were applied. Only a record: choose them with `preset=NAME` or `preset=[A,B]`."""
    environment: str = "local"
    """Name of the environment that was chosen with `environment=NAME`."""


OURS = tuple(field.name for field in dataclasses.fields(Settings))
"""The top-level keys that a user's part cannot have."""

RESERVED = ("experiment", "hydra", "defaults")
"""Top-level names that are no keys: they choose an experiment file or belong to Hydra."""

NOT_WORK = (
    *("run.name", "run.description", "run.tags", "run.notes", "run.user", "run.resume", "run.keep"),
    *("tracking.debug", "tracking.perf"),
    *("resources.min_workers", "elastic.look", "elastic.every", "resources.limits", "failures.hang"),
    *("checkpoints.also_best", "checkpoints.keep_every_steps", "checkpoints.keep_hours", "checkpoints.label"),
    *("checkpoints.max_gb", "checkpoints.wait", "checkpoints.mode", "checkpoints.window_mb", "checkpoints.quota_gb"),
    *("checkpoints.on_exception", "checkpoints.full_every_epochs"),
    *("storage", "database", "mlflow", "tensorboard", "ray", "redis", "provenance", "submit", "sweep"),
    *(
        "failures.max_preemptions",
        "failures.max_halvings",
        "failures.max_rollbacks",
        "failures.max_repeats",
        "failures.max_fruitless",
        "failures.limits",
    ),
    *("failures.backoff", "failures.backoff_max", "failures.patterns", "failures.nan", "failures.divergence"),
    *("failures.skip", "failures.lr_factor"),
    *("failures.function", "failures.avoid_after"),
    *("failures.memory_growth", "failures.losses", "failures.gradients_every", "failures.collective_timeout"),
    *("alerts", "notify", "preset", "environment"),
)
"""Keys (or groups) that say how a run is called or where it is kept, not what it computes: outside the hash. A trial of
a sweep is the same work as a run by itself."""

NO_WORK_BY_DEFAULT = {
    **{f"stopping.{each.name}": each.default for each in dataclasses.fields(StopConfig)},
    "elastic.batch": Batch.worker.value,
}
"""Keys that came later, with the value that changes nothing: with it they are outside the hash, too."""

NOT_INHERITED = (
    *("run.name", "run.notes", "run.user", "run.resume"),
    *("storage", "database", "mlflow.tracking_uri", "mlflow.port", "redis", "environment", "sweep"),
    *("ray.address", "ray.port", "ray.dashboard_port", "ray.num_cpus", "ray.fallback"),
)
"""What a run based on a stored configuration takes from its own surroundings instead."""
