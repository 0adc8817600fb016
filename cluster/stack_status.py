"""`status`: each part of a stack, up or why not; how far each copy of the record is behind; and which checkpoints are
still on their way to the storage.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cluster import api_server, ports, ray_head, web
from orchestrator.backends import postgres
from orchestrator.backends import redis as redis_backend
from orchestrator.checkpoints.local import places
from orchestrator.checkpoints.local.requests import ask
from orchestrator.config import redact_url
from orchestrator.errors import SchemaMismatch, ServiceUnavailable, UserError
from orchestrator.stack import Stack
from orchestrator.store import migrate, open_store
from orchestrator.store.views import SinkLag
from orchestrator.tracking.circuits import CircuitState, directory_of, told


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One part as it was found. Example: Part(name="postgres", status="up", version="18.1", latency_ms=0.4)."""

    name: str
    status: str
    """up, down, off (not wanted), or unknown (who could tell is down)."""
    version: str = ""
    address: str = ""
    latency_ms: float | None = None
    why: str = ""


SILENT = 180.0
"""Seconds after which a sink that said nothing is not running; it says at least every minute that it is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sink:
    """How far a copy of the record (MLflow, TensorBoard, the runs' directories) is behind; see `store/lags.py`."""

    name: str
    status: str
    """up; failing (it is left alone for a while and catches up later); stopped (nobody copies, and there is something
    to copy); idle (nobody copies, and there is nothing); not started (it never ran)."""
    points: int = 0
    seconds: float = 0.0
    runs: int = 0
    why: str = ""


def sinks(stack: Stack, now: float) -> list[Sink]:
    """Asked of the database alone, so it can be told of processes that are dead, too. Empty when that is down."""
    if not stack.database_url:
        return []
    store = open_store(stack.database_url)
    try:
        lags = {lag.sink: lag for lag in store.sink_lags()}
    except UserError:  # `parts` tells why
        return []
    finally:
        store.close()
    names = [*stack.sinks(), "directory"]
    return [sink(lags[name], now) if name in lags else Sink(name=name, status="not started") for name in names]


def sink(lag: SinkLag, now: float) -> Sink:
    status = "up" if lag.state in ("closed", "") else "failing"
    if now - lag.updated > SILENT:
        status = "stopped" if lag.runs else "idle"
    return Sink(
        name=lag.sink, status=status, points=lag.points, seconds=lag.seconds, runs=lag.runs, why=redact_url(lag.error)
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Writers:
    """What the checkpoint writers of this machine have before them; see `checkpoints/service.py`."""

    status: str
    """up; down (nobody answers, though there should be one); idle (nobody answers, and nobody need be there)."""
    root: str
    """Where trainers hand checkpoints over."""
    pending: int = 0
    """Parts of checkpoints, one per rank, that are in memory and not in the storage yet."""
    pending_bytes: int = 0
    oldest: float = 0.0
    """Seconds since the oldest of them was handed over."""
    memory_bytes: int = 0
    """Taken by what is kept for trainers."""
    why: str = ""
    """The last error."""


def writers(stack: Stack) -> Writers:
    """Asked of the one that serves this machine, over its socket."""
    root = Path(stack.slab_directory) if stack.slab_directory else places.slab_root(stack.home)
    try:
        health = ask(places.request_socket(root), "health", {}, 3.0)
    except OSError as error:
        is_wanted = bool(stack.ray_address and stack.slab_directory and stack.checkpoint_writers)
        why = f"{error.strerror or error}: run `orc up`." if is_wanted else ""
        return Writers(status="down" if is_wanted else "idle", root=str(root), why=why)
    return Writers(
        status="up", root=str(root), pending=health["pending"], pending_bytes=health["pending_bytes"],
        oldest=health["oldest"], memory_bytes=health["slab_bytes"], why=redact_url(health["last_error"]),
    )  # fmt: skip


def circuits(stack: Stack) -> list[CircuitState]:
    """What the stack's living processes on this machine say of the services they need; see tracking/circuits.py."""
    return told(directory_of(stack.home))


def circuit(name: str, states: Sequence[CircuitState], now: float) -> str:
    """In words, as the worst of those who speak of it sees it: `closed`, `open 2 min (tracker)`; '' where nobody does.
    `name` is a part's or a sink's. Pure."""
    spoken = [state for state in states if state.name == name.removeprefix("orc-")]
    away = [state for state in spoken if state.is_away]
    if not away:
        return "closed" if spoken else ""
    word = "open" if any(state.state == "open" for state in away) else "half-open"
    since = shown_seconds(now - min(state.began for state in away))
    return f"{word} {since} ({', '.join(sorted({state.by for state in away}))})"


def elsewhere(states: Sequence[CircuitState], shown: Collection[str], now: float) -> list[tuple[str, str, str]]:
    """(service, circuit, error) of what is away and has no line of its own. Pure."""
    away = {state.name: state.error for state in states if state.is_away}
    lines = {name.removeprefix("orc-") for name in shown}
    return [(name, circuit(name, states, now), error) for name, error in away.items() if name not in lines]


def shown_seconds(seconds: float) -> str:
    """Example: shown_seconds(150) == "2 min"."""
    for unit, length in (("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds // length:.0f} {unit}"
    return f"{max(seconds, 0):.0f} s"


def parts(stack: Stack) -> list[Part]:
    """All parts, asked at the same time."""
    asked: list[Callable[[Stack], list[Part]]] = [database, redis, mlflow, api, ray]
    with ThreadPoolExecutor(max_workers=len(asked)) as pool:
        return [part for answer in pool.map(lambda ask: ask(stack), asked) for part in answer]


def document(stack: Stack, found: list[Part], copies: list[Sink], writing: Writers) -> dict[str, Any]:
    """What `status --json` prints."""
    return {
        "home": stack.home,
        "up": is_up(found),
        "storage": redact_url(stack.storage_url),
        "parts": [asdict(part) for part in found],
        "sinks": [asdict(one) for one in copies],
        "checkpoint_writers": asdict(writing),
        "circuits": [asdict(state) for state in circuits(stack)],
    }


def is_up(found: list[Part]) -> bool:
    return bool(found) and all(part.status != "down" for part in found)


def database(stack: Stack) -> list[Part]:
    if not stack.database_url:
        return [Part(name="postgres", status="down", why="It was never started.")]
    where = postgres.address(stack.database_url)
    try:
        server = postgres.probe(stack.database_url)
    except ServiceUnavailable as error:
        return [
            Part(name="postgres", status="down", address=where, why=error.why),
            Part(name="schema", status="down", address=where, why="The database is down."),
        ]
    return [
        Part(
            name="postgres", status="up", version=server.version, address=where, latency_ms=round(server.latency_ms, 2)
        ),
        schema(stack.database_url),
    ]


def schema(url: str) -> Part:
    """Our tables, and whether this code understands them."""
    where = postgres.address(url)
    asked = time.perf_counter()
    try:
        found = migrate.status(url)
    except ServiceUnavailable as error:
        return Part(name="schema", status="down", address=where, why=error.why)
    if not found.is_current:
        return Part(name="schema", status="down", version=found.found, address=where, why=schema_mismatch(found))
    latency_ms = round((time.perf_counter() - asked) * 1000, 2)
    return Part(name="schema", status="up", version=found.found, address=where, latency_ms=latency_ms)


def schema_mismatch(found: migrate.SchemaStatus) -> str:
    return str(SchemaMismatch(found.found, found.head, newer=found.is_newer))


def mlflow(stack: Stack) -> list[Part]:
    uri = stack.mlflow_uri
    shown = redact_url(uri)
    if not uri:
        return [Part(name="mlflow", status="off", why="Switched off, or not installed.")]
    if uri.startswith("sqlite:"):
        return [_sqlite(uri, shown)]
    if not uri.startswith("http"):
        return [Part(name="mlflow", status="up", address=shown, why="Not asked: no server of this kind can be.")]
    health = web.get(f"{uri.rstrip('/')}/health")
    if not health.ok:
        why = health.body if health.status == 0 else f"HTTP {health.status}"
        return [Part(name="mlflow", status="down", address=shown, why=f"No answer: {why}.")]
    version = web.get(f"{uri.rstrip('/')}/version")
    return [
        Part(
            name="mlflow",
            status="up",
            version=version.body.strip() if version.ok else "",
            address=shown,
            latency_ms=round(health.latency_ms, 2),
        )  # fmt: skip
    ]


def _sqlite(uri: str, shown: str) -> Part:
    file = Path(uri.removeprefix("sqlite:///"))
    if not file.exists():
        return Part(
            name="mlflow",
            status="down",
            address=shown,
            why="There is no such file yet; MLflow makes it when first used.",
        )
    asked = time.perf_counter()
    try:
        connection = sqlite3.connect(f"{file.absolute().as_uri()}?mode=ro", uri=True, timeout=2)
        try:
            row = connection.execute("select version_num from alembic_version").fetchone()
        finally:
            connection.close()
    except sqlite3.Error as error:
        return Part(name="mlflow", status="down", address=shown, why=f"{error}.")
    latency_ms = round((time.perf_counter() - asked) * 1000, 2)
    return Part(
        name="mlflow", status="up", version=f"schema {row[0]}" if row else "", address=shown, latency_ms=latency_ms
    )


def redis(stack: Stack) -> list[Part]:
    if not stack.redis_url:
        return [Part(name="redis", status="off", why="Switched off, or not installed: watchers ask the database.")]
    where = redis_backend.address(stack.redis_url)
    try:
        version, latency_ms = redis_backend.probe(stack.redis_url)
    except ServiceUnavailable as error:
        why = f"{error.why} Watchers ask the database meanwhile. Run `orc up`."
        return [Part(name="redis", status="down", address=where, why=why)]
    return [Part(name="redis", status="up", version=version, address=where, latency_ms=round(latency_ms, 2))]


def api(stack: Stack) -> list[Part]:
    url = stack.api_url
    if not url:
        return [Part(name="api", status="off", why="Switched off.")]
    told = api_server.ask(url, stack.api_token_path)
    if not told.ok:
        why = {0: f"No answer: {told.body}.", 401: f"It refuses the token in {stack.api_token_path}. Run `orc up`."}
        said = why.get(told.status, f"HTTP {told.status}.")
        return [Part(name="api", status="down", address=url, why=said)]
    version = str(told.json().get("version", ""))
    return [Part(name="api", status="up", version=version, address=url, latency_ms=round(told.latency_ms, 2))]


def ray(stack: Stack) -> list[Part]:
    if not stack.ray_address:
        return [Part(name="ray", status="off", why="Switched off, or not installed.")]
    names = stack.services.get("names", ())
    try:
        head = ray_head.probe(stack.ray_dashboard, stack.ray_token_path)
    except ServiceUnavailable as error:
        host, _, port = stack.ray_address.rpartition(":")
        if error.why.startswith(ray_head.NO_DASHBOARD) and ports.answers(int(port), host):
            # Trainings need no dashboard.
            return [
                Part(name="ray", status="up", address=stack.ray_address, why="Its dashboard does not answer."),
                Part(name="dashboard", status="down", address=stack.ray_dashboard, why=error.why),
                *[Part(name=name, status="unknown", why="Only the dashboard tells.") for name in names],
            ]
        return [
            Part(name="ray", status="down", address=stack.ray_address, why=error.why),
            *[Part(name=name, status="down", why="Ray is down.") for name in names],
        ]
    host, _, port = stack.ray_address.rpartition(":")
    if not ports.answers(int(port), host):
        return [Part(name="ray", status="down", address=stack.ray_address, why="Its control store does not listen.")]
    latency_ms = round(head.latency_ms, 2)
    found = [
        Part(name="ray", status="up", version=head.version, address=stack.ray_address, latency_ms=latency_ms),
        Part(name="dashboard", status="up", version=head.version, address=stack.ray_dashboard, latency_ms=latency_ms),
    ]
    return found + _services(stack)


def _services(stack: Stack) -> list[Part]:
    names = stack.services.get("names", ())
    if not names:
        return [Part(name="services", status="down", why="They were not started on this cluster. Run `orc up`.")]
    states = ray_head.services(stack.ray_dashboard, stack.ray_token_path)
    return [
        Part(name=name, status="up", address=stack.ray_address)
        if states.get(name) == "ALIVE"
        else Part(name=name, status="down", address=stack.ray_address, why=f"{states.get(name, 'GONE')}. Run `orc up`.")
        for name in names
    ]
