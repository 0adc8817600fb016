"""The stack of one data directory: what is asked of it (`StackSettings`) and what it is (`Stack`, the file stack.json).

`cluster/` writes the file when it starts or stops something; everybody else only reads where things are.
"""

from __future__ import annotations

import difflib
import json
import math
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from orchestrator.errors import ConfigError, ServiceUnavailable

PROTOCOL = 1
HOME_VARIABLE = "ORC_HOME"
EMBEDDED = "embedded"
"""Value of a URL setting that means: start one of our own, whatever was used before."""

GCS = ("memory", "rocksdb")
"""Values of ray.gcs."""

REDIS_SCHEMES = ("redis://", "rediss://", "unix://")
SCHEMES = ("postgresql+psycopg://", "postgresql://", "postgres://")


def default_home() -> Path:
    """ORC_HOME, else ~/.orc."""
    return Path(os.environ.get(HOME_VARIABLE) or "~/.orc").expanduser().absolute()


# -- what is asked for


@dataclass(kw_only=True)
class DatabaseSettings:
    url: str = ""
    """postgresql://…, an existing server; `embedded`, one of our own; empty, as the last time, at first embedded."""


@dataclass(kw_only=True)
class MlflowSettings:
    enabled: str = "auto"
    """auto: if it is installed. true: missing is an error. false: no mirror."""
    tracking_uri: str = ""
    """http(s)://… or sqlite:///…, used instead of a server of our own; empty and `embedded` as with the database."""
    port: int = 0
    """0: 5000 or the next free one."""


@dataclass(kw_only=True)
class TensorboardSettings:
    enabled: str = ""
    """true: event files of every run that does not decline; false: none; auto: if the library is installed. Empty: as
    the last time, at first false."""
    directory: str = ""
    """A local path; empty: as the last time, at first `tensorboard` in the data directory."""


@dataclass(kw_only=True)
class ApiSettings:
    """The server that lets others look, see orchestrator/api."""

    enabled: str = "auto"
    host: str = ""
    """The address to listen on; empty: as the last time, at first 127.0.0.1."""
    port: int = 0
    """0: 8600 or the next free one."""


@dataclass(kw_only=True)
class RaySettings:
    enabled: str = "auto"
    address: str = ""
    """host:port of an existing cluster's head; empty and `embedded` as with the database."""
    port: int = 0
    """0: 6379 or the next free one."""
    dashboard_port: int = 0
    """0: 8265 or the next free one."""
    num_cpus: int = 0
    """How many CPUs Ray may hand out; 0: what the machine (or container) has."""
    gcs: str = ""
    """Where the control store of a head of our own keeps its tables: rocksdb (on disk, so that it can be started again
    under what runs) or memory. Empty: as the last time, at first rocksdb."""


@dataclass(kw_only=True)
class RedisSettings:
    """Live values for watchers. Nothing is lost without it."""

    enabled: str = "auto"
    """auto: if there is a redis-server, or a url. true: missing is an error. false: watchers ask the database."""
    url: str = ""
    """redis://, rediss:// or unix://, an existing server; empty and `embedded` as with the database."""


@dataclass(kw_only=True)
class StorageSettings:
    url: str = ""
    """Where run directories live, a path or URL; empty: as the last time, at first `runs` in the data directory."""


@dataclass(kw_only=True)
class TrackingSettings:
    spool_dir: str = ""
    """Where each node keeps what was logged and is not in PostgreSQL yet: a local disk. Empty: as the last time, at
    first `spools` in the data directory."""
    debug: str = ""
    """Services that log in detail, with commas between them: tracker, mirror, directory, node, checkpoints,
    api. Empty: none."""


@dataclass(kw_only=True)
class CheckpointsStackSettings:
    """How checkpoints get from trainers to the storage."""

    slab_dir: str = ""
    """Where each node keeps what was saved and is not in the storage yet: memory, a tmpfs. Empty: as the last time, at
    first a directory of its own in /dev/shm."""
    writers: int = 1
    """Processes per node that write. 0: none, each trainer writes by itself while training waits."""
    memory_gb: float = 0.0
    """What all of that memory may be together on one node, in 10^9 bytes; 0: what the node has."""


@dataclass(kw_only=True)
class MonitoringSettings:
    """What the machines do while runs are on them: `system/…` of every run."""

    enabled: str = "auto"
    """auto and true: recorded."""
    interval: float = 10.0
    """Seconds between two samples."""


@dataclass(kw_only=True)
class StackSettings:
    """Everything that `up` can be told."""

    database: DatabaseSettings = field(default_factory=DatabaseSettings)
    mlflow: MlflowSettings = field(default_factory=MlflowSettings)
    tensorboard: TensorboardSettings = field(default_factory=TensorboardSettings)
    api: ApiSettings = field(default_factory=ApiSettings)
    ray: RaySettings = field(default_factory=RaySettings)
    redis: RedisSettings = field(default_factory=RedisSettings)
    storage: StorageSettings = field(default_factory=StorageSettings)
    tracking: TrackingSettings = field(default_factory=TrackingSettings)
    monitoring: MonitoringSettings = field(default_factory=MonitoringSettings)
    checkpoints: CheckpointsStackSettings = field(default_factory=CheckpointsStackSettings)

    @classmethod
    def parse(cls, overrides: Iterable[str]) -> StackSettings:
        """From `key=value` words. Example: StackSettings.parse(["ray.num_cpus=4", "mlflow.enabled=false"])."""
        given: dict[str, str] = {}
        for word in overrides:
            key, equals, value = word.partition("=")
            if not equals:
                raise ConfigError(word, None, "is not of the form key=value.", f"Keys: {', '.join(_keys())}.")
            given[key] = _interpolated(key, value)
        return cls.from_mapping(given)

    def told(self) -> dict[str, Any]:
        """What differs from the defaults: `from_mapping` makes the same of it."""
        default = StackSettings()
        return {key: value for key in _keys() if (value := _value(self, key)) != _value(default, key)}

    @classmethod
    def from_mapping(cls, given: Mapping[str, Any]) -> StackSettings:
        """From dotted keys; refuses unknown keys and values that cannot be meant."""
        settings = cls()
        for key, value in given.items():
            if key not in _keys():
                near = difflib.get_close_matches(key, _keys(), n=1, cutoff=0.5)
                hint = f"Did you mean {near[0]}?" if near else f"There are {', '.join(_keys())}."
                raise ConfigError(key, value, "is no setting of the stack.", hint)
            group, name = key.split(".")
            section = getattr(settings, group)
            setattr(section, name, _checked(key, value, type(getattr(section, name))))
        return settings


def _value(settings: StackSettings, key: str) -> Any:
    group, name = key.split(".")
    return getattr(getattr(settings, group), name)


def _keys() -> list[str]:
    return [f"{group}.{name}" for group, section in vars(StackSettings()).items() for name in vars(section)]


def _interpolated(key: str, value: str) -> str:
    """`${oc.env:NAME}` and `${oc.env:NAME,default}`, so that a password need not be typed into a command line."""

    def variable(match: re.Match[str]) -> str:
        name, comma, default = match[1].partition(",")
        found = os.environ.get(name, default if comma else None)
        if found is None:
            raise ConfigError(key, value, f"the environment variable {name} is not set.")
        return found

    return re.sub(r"\$\{oc\.env:([^}]+)\}", variable, value)


def _checked(key: str, value: Any, kind: type) -> Any:
    text = str(value).strip()
    if key == "checkpoints.writers" and not (text.isdigit() and int(text) <= 16):
        raise ConfigError(key, value, "is no number of writers from 0 to 16.")
    if kind is int:
        if text.lower() in ("auto", "", "none", "null"):
            return 0
        if not text.isdigit():
            raise ConfigError(key, value, "is no whole number.", "Leave it out, or write auto, to have one chosen.")
        if key.endswith("port") and int(text) > 65535:
            raise ConfigError(key, value, "is no port.", "Ports go from 1 to 65535; auto chooses a free one.")
        return int(text)
    if kind is float:
        try:
            number = float(text)
        except ValueError:
            number = math.nan
        if key.endswith("_gb"):
            if not 0 <= number < math.inf:
                raise ConfigError(key, value, "is no number of gigabytes.", "0 means as much as there is.")
            return number
        if not 0.1 <= number <= 3600:
            raise ConfigError(key, value, "is no number of seconds from 0.1 to 3600.")
        return number
    if key.endswith(".enabled"):
        if text.lower() not in ("auto", "true", "false"):
            raise ConfigError(key, value, "is neither auto, true nor false.")
        return text.lower()
    if text.lower() in ("none", "null"):
        return ""
    if text == EMBEDDED:
        return text
    if key == "ray.gcs" and text not in ("", *GCS):
        raise ConfigError(key, value, f"is none of {', '.join(GCS)}.")
    if key == "tracking.debug":
        from orchestrator.json_logs import SERVICE_COMPONENTS, check_components  # `orc ls` reads a stack without it

        names = [name.strip() for name in text.strip("[]").split(",") if name.strip()]
        check_components(key, names, SERVICE_COMPONENTS)
        return ",".join(names)
    if key == "database.url" and text:
        scheme = next((s for s in SCHEMES if text.startswith(s)), None)
        if scheme is None:
            shown = text.split("://")[0] + "://…" if "://" in text else text
            raise ConfigError(
                key, shown, "is no PostgreSQL URL.", "Write postgresql://user:password@host:5432/database, or embedded."
            )
        return SCHEMES[0] + text[len(scheme) :]
    if key == "redis.url" and text and not text.startswith(REDIS_SCHEMES):
        shown = text.split("://")[0] + "://…" if "://" in text else text
        hint = "Write redis://user:password@host:port, rediss:// for TLS, unix:///path, or embedded."
        raise ConfigError(key, shown, "is no Redis URL.", hint)
    if key == "mlflow.tracking_uri" and text and not re.match(r"(https?|sqlite|databricks|uc)(:|$)", text):
        hint = "Write http://host:5000, sqlite:////path/mlflow.db, or embedded."
        raise ConfigError(key, value, "is no tracking URI.", hint)
    if key == "tensorboard.directory" and text and not os.path.isabs(text):
        raise ConfigError(key, value, "is no absolute path of this host.")
    if key == "checkpoints.slab_dir" and text and not os.path.isabs(text):
        raise ConfigError(key, value, "is no absolute path.", "Give a directory in memory, such as /dev/shm/orc.")
    if key == "api.host" and re.search(r"[^\w.:-]", text):
        raise ConfigError(key, value, "is no address.", "Write 127.0.0.1, 0.0.0.0 or one address of this host.")
    if key == "ray.address" and text and not re.fullmatch(r"[^/\s]+:\d+", text):
        hint = "Give the address of the cluster's head, such as 10.0.0.1:6379, or embedded."
        raise ConfigError(key, value, "is no host:port.", hint)
    return text


# -- what there is


@dataclass(frozen=True, kw_only=True)
class Stack:
    """Where the parts of one data directory are. Frozen; read it again to see what changed."""

    home: str
    database_url: str = field(default="", repr=False)  # may hold a password
    mlflow_uri: str = field(default="", repr=False)
    """Empty: no MLflow."""
    mlflow_artifacts: str = ""
    tensorboard_directory: str = ""
    """Where event files are written. Empty: none are."""
    api_url: str = ""
    """Empty: no API server."""
    api_token_path: str = ""
    ray_address: str = ""
    """Empty: no Ray."""
    ray_dashboard: str = ""
    ray_token_path: str = ""
    """Empty: not our cluster, authentication is the environment's business."""
    redis_url: str = field(default="", repr=False)
    """Empty: no Redis. Of one that we started it names the file with the password."""
    storage_url: str = ""
    spool_directory: str = ""
    slab_directory: str = ""
    """Where each node's trainers hand checkpoints to its writers."""
    checkpoint_writers: int = 1
    """Per node of Ray."""
    checkpoint_memory_gb: float = 0.0
    """0: what the node has."""
    processes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """What was started here: name (postgres, redis, mlflow, api, ray) -> pid, started (psutil's create_time), port …"""
    debug: str = ""
    """Services that log in detail, with commas between them."""
    monitoring: float = 10.0
    """Seconds between two samples of each machine; 0: none are taken."""
    services: Mapping[str, Any] = field(default_factory=dict)
    """The actors that were started on Ray, and with which settings."""
    external: Mapping[str, str] = field(default_factory=dict, repr=False)
    """Settings that point to somebody else's servers, so that the next `up` knows them: dotted key -> value."""
    asked: Mapping[str, Any] = field(default_factory=dict, repr=False)
    """What the last `up` was told, dotted key -> value: `orc keep` tells it the same."""
    is_stopped: bool = False
    """By `down`: nobody but `up` starts it again."""
    protocol: int = PROTOCOL

    @classmethod
    def find(cls, home: Path | str | None = None) -> Stack | None:
        """The stack of that data directory, None if nothing was ever started there."""
        home = Path(home).expanduser().absolute() if home else default_home()
        file = home / "stack.json"
        try:
            raw = json.loads(file.read_text())
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise ServiceUnavailable(
                "stack",
                str(home),
                f"{error.strerror}: {file}.",
                "Use a directory of your own: `--home DIR` or ORC_HOME.",
            ) from error
        except ValueError as error:
            raise ServiceUnavailable(
                "stack", str(home), f"{file} is damaged ({error}).", f"Remove it and run `orc up`: rm {file}"
            ) from error
        if raw.get("protocol") != PROTOCOL:
            raise ServiceUnavailable(
                "stack", str(home), f"{file} has protocol {raw.get('protocol')}, this version speaks {PROTOCOL}.",
                "Use the version that started it.",
            )  # fmt: skip
        known = {f.name for f in fields(cls)}
        return cls(**{**{name: value for name, value in raw.items() if name in known}, "home": str(home)})

    @classmethod
    def load(cls, home: Path | str | None = None) -> Stack:
        """Like `find`, but nothing there is an error."""
        stack = cls.find(home)
        if stack is None:
            where = Path(home).absolute() if home else default_home()
            raise ServiceUnavailable("stack", str(where), "nothing was started there yet.", "Run `orc up`.")
        return stack

    def save(self) -> None:
        """Replaces the file as a whole; only its owner can read it."""
        file = Path(self.home) / "stack.json"
        fresh = file.with_name(f".stack.json.{os.urandom(4).hex()}.tmp")
        descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w") as out:
            json.dump(asdict(self), out, indent=2)
            out.write("\n")
            out.flush()
            os.fsync(descriptor)
        fresh.rename(file)

    def sinks(self) -> dict[str, dict[str, str]]:
        """Where runs are copied to, besides their directories: name -> what the sink is opened with."""
        found: dict[str, dict[str, str]] = {}
        if self.mlflow_uri:
            found["mlflow"] = {"tracking_uri": self.mlflow_uri, "dashboard": self.ray_dashboard}
        if self.tensorboard_directory:
            found["tensorboard"] = {"directory": self.tensorboard_directory}
        return found

    @property
    def owns_ray(self) -> bool:
        """Whether the Ray head is one that we started (with a token of ours, on loopback)."""
        return bool(self.ray_token_path)

    def client_environment(self) -> dict[str, str]:
        """What a process needs in its environment, before it imports ray or mlflow, to reach this stack.

        Update os.environ (or a subprocess' env) with it. Values that must not be set are empty strings, which Ray and
        MLflow read as not set.
        """
        environment = {
            HOME_VARIABLE: self.home,
            # Our submissions, clusters and servers are none of an upstream's business.
            "RAY_USAGE_STATS_ENABLED": "0",
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "DO_NOT_TRACK": "true",
            # Ray Train looks at its workers every 2 s by default, and each report waits for that look.
            "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
            # A full cluster is waited for, with a word about what is missing; by default Train gives up after minutes.
            "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "86400",
            # What a rank prints goes to its log once; Ray Train would log each print a second time.
            "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
            # The driver looks for nodes that are taken away, see execution/draining.py; Ray Train would start an actor
            # for each run, and wait for ranks that know nothing of it.
            "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
            # Of a group of which a rank is gone the others need not take leave in order; by default they have 30 s.
            "TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S": "5",
            # Workers stay where they are until ours takes them to the user's directory.
            "RAY_CHDIR_TO_TRIAL_DIR": "0",
            **_without_proxy(),
        }
        if self.ray_address:
            environment["RAY_ADDRESS"] = self.ray_address  # ray.init()
        if self.ray_dashboard:
            environment["RAY_API_SERVER_ADDRESS"] = self.ray_dashboard  # ray job submit
        if self.owns_ray:
            environment |= {
                # Job clients over http never switch authentication on by themselves.
                "RAY_AUTH_MODE": "token",
                "RAY_AUTH_TOKEN_PATH": self.ray_token_path,
                "RAY_AUTH_TOKEN": "",  # would win over the path
                # Ray's way of saying: one node, bind and connect to 127.0.0.1. By default it rewrites 127.0.0.1 to the
                # host's address and listens everywhere. Head and clients must agree.
                "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
                # The control store of such a head is started again under what runs. Raylets, workers and drivers that
                # do not find it end themselves after 60 s by default.
                "RAY_gcs_rpc_server_reconnect_timeout_s": "600",
            }
        if self.mlflow_uri:
            environment["MLFLOW_TRACKING_URI"] = self.mlflow_uri
        return environment


def _without_proxy() -> dict[str, str]:
    """A proxy for the internet must not be asked for our own servers on loopback."""
    if not any(name.lower() in ("http_proxy", "https_proxy", "all_proxy") and os.environ[name] for name in os.environ):
        return {}
    exceptions = [part for part in (os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or "").split(",") if part]
    wanted = ",".join(dict.fromkeys([*exceptions, "127.0.0.1", "localhost"]))
    return {"no_proxy": wanted, "NO_PROXY": wanted}
