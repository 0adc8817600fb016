"""Every key of ours, with its default, meaning and bounds. Values only: nothing here reads a file or an environment."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass, field
from enum import StrEnum

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


_BEST = re.compile(r"[^:]+(:(min|max)(:[1-9]\d*)?)?")


class Direction(StrEnum):
    """Which end of a metric is the better one."""

    min = "min"
    max = "max"


class CheckpointMode(StrEnum):
    """How a checkpoint leaves the training's hands."""

    eager = "eager"
    """Copied into shared memory; another process writes it. Where there is no such memory: as `direct`."""
    overlap = "overlap"
    """The same, and the copy goes on while the next step computes, up to `optimizer.step`."""
    direct = "direct"
    """Written before training goes on."""


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


@dataclass(kw_only=True)
class ResourcesConfig:
    """What one run asks of the cluster."""

    workers: int = bounded(2, minimum=1)
    """Training processes, one DDP rank each."""
    cpus_per_worker: float = bounded(1.0, above=0)
    """Logical CPUs, as Ray counts them; may be a fraction."""
    gpus_per_worker: float = bounded(0.0, minimum=0)
    """A fraction of one, or whole GPUs."""
    memory_gb_per_worker: float = bounded(0.0, minimum=0)
    """10^9 bytes that Ray sets aside for each worker; 0: none."""
    placement: Placement = Placement.pack

    def __post_init__(self) -> None:
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


@dataclass(kw_only=True)
class RedisConfig:
    """Live values for `orc watch`; nothing is lost without it."""

    enabled: Enabled = Enabled.auto
    url: str = field(default="", repr=False)
    """`redis://`, `rediss://` or `unix://`. Empty: the server that `orc up` starts."""


@dataclass(kw_only=True)
class FailuresConfig:
    """What happens when training dies."""

    max_restarts: int = bounded(0, minimum=-1)
    """Further attempts after a failure; -1: without limit."""
    grace: float = bounded(20.0, minimum=0, maximum=3600)
    """Seconds that the ranks have to reach their next `report` after a request to stop."""


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
class Settings:
    """All keys of ours. Everything else in a configuration belongs to the user's train function."""

    train: str = ""
    """`module:function` of the train function."""
    run: RunConfig = field(default_factory=RunConfig)
    resources: ResourcesConfig = field(default_factory=ResourcesConfig)
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
    preset: dict[str, bool] = field(default_factory=dict)
    """Names of the presets that were applied. Only a record: choose them with `preset=NAME` or `preset=[A,B]`."""
    environment: str = "local"
    """Name of the environment that was chosen with `environment=NAME`."""


OURS = tuple(field.name for field in dataclasses.fields(Settings))
"""The top-level keys that a user's part cannot have."""

RESERVED = ("experiment", "hydra", "defaults")
"""Top-level names that are no keys: they choose an experiment file or belong to Hydra."""

NOT_WORK = (
    *("run.name", "run.description", "run.tags", "run.notes", "run.user", "run.resume"),
    *("tracking.debug", "tracking.perf"),
    *("checkpoints.also_best", "checkpoints.keep_every_steps", "checkpoints.keep_hours", "checkpoints.label"),
    *("checkpoints.max_gb", "checkpoints.wait", "checkpoints.mode", "checkpoints.window_mb", "checkpoints.quota_gb"),
    *("checkpoints.on_exception", "checkpoints.full_every_epochs"),
    *("storage", "database", "mlflow", "tensorboard", "ray", "redis", "provenance", "submit", "preset", "environment"),
)
"""Keys (or groups) that say how a run is called or where it is kept, not what it computes: outside the hash."""

NOT_INHERITED = (
    *("run.name", "run.notes", "run.user", "run.resume"),
    *("storage", "database", "mlflow.tracking_uri", "mlflow.port", "redis", "environment"),
    *("ray.address", "ray.port", "ray.dashboard_port", "ray.num_cpus"),
)
"""What a run based on a stored configuration takes from its own surroundings instead."""
