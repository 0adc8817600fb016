"""The Ray head of one data directory: token authentication, everything on loopback."""

from __future__ import annotations

import importlib.util
import os
import secrets
import shutil
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from cluster import environment, ports, processes, web
from orchestrator.errors import ServiceUnavailable
from orchestrator.stack import Stack

PREFERRED_PORT = 6379
PREFERRED_DASHBOARD_PORT = 8265
START_TIMEOUT = 120

MAX_TEMP_BYTES = 38
"""Ray puts /session_2026-01-01_00-00-00_000000_1234567/sockets/plasma_store (68 bytes) behind it; a socket has 107."""

CORE = frozenset({"gcs_server", "raylet"})
"""Processes of a head without which nothing runs."""

SESSIONS_KEPT = 5
"""Each start leaves a directory of logs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """A head that answers."""

    version: str
    session: str
    latency_ms: float


def is_installed() -> bool:
    return importlib.util.find_spec("ray") is not None


def token(path: str | Path) -> str:
    """The token's text, empty if there is none. Without a path, the cluster is somebody else's: what Ray's own clients
    would take from the environment.
    """
    if not path:
        if os.environ.get("RAY_AUTH_TOKEN"):
            return os.environ["RAY_AUTH_TOKEN"].strip()
        path = os.environ.get("RAY_AUTH_TOKEN_PATH") or Path("~/.ray/auth_token").expanduser()
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""


def ensure_token(home: Path) -> Path:
    """The token file, from its first byte on for its owner only; kept over restarts, so that clients stay valid."""
    path = home / "ray_token"
    if not token(path):
        fresh = path.with_name(f".ray_token.{secrets.token_hex(4)}.tmp")
        descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w") as out:
            out.write(secrets.token_hex(32))
        fresh.rename(path)
    if stat.S_IMODE(path.stat().st_mode) != 0o600:
        path.chmod(0o600)
    return path


def temp_directory(home: Path) -> Path:
    """Where Ray keeps sessions and sockets: `<home>/ray/t`, or below a private short directory that `<home>/ray` names.

    Ray opens its directory to all users of the host (mode 0777), so the one above it must be closed.
    """
    own = home / "ray"
    own.mkdir(mode=0o700, exist_ok=True)
    if _is_short(own / "t"):
        own.chmod(0o700)
        return own / "t"
    pointer = own / "location"
    known = Path(pointer.read_text().strip()) if pointer.exists() else None
    if known and _is_private(known):
        return known / "t"
    # Nobody can be there before us under a name that cannot be guessed.
    roots = [root for root in (tempfile.gettempdir(), "/tmp") if _is_short(Path(root) / "orc-ray-12345678" / "t")]
    fresh = Path(tempfile.mkdtemp(prefix="orc-ray-", dir=roots[0]))
    pointer.write_text(str(fresh))
    return fresh / "t"


def _is_short(directory: Path) -> bool:
    return len(os.fsencode(directory)) <= MAX_TEMP_BYTES


def _is_private(directory: Path) -> bool:
    try:
        found = directory.lstat()
    except OSError:
        return False  # somebody cleaned up the temporary directory
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid() and stat.S_IMODE(found.st_mode) == 0o700


NO_DASHBOARD = "the dashboard does not answer"


def probe(dashboard: str, token_path: str, timeout: float = 5) -> Head:
    """Asks the dashboard who it is and whether the cluster behind it lives. Raises ServiceUnavailable."""
    key = token(token_path)
    answer = web.get(f"{dashboard}/api/version", token=key, timeout=timeout)
    if answer.status in (401, 403):
        raise ServiceUnavailable(
            "ray", dashboard, "it refuses our token.",
            "Set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH for that cluster, or restart ours: orc down && orc up",
        )  # fmt: skip
    if not answer.ok:
        why = answer.body if answer.status == 0 else f"HTTP {answer.status}"
        raise ServiceUnavailable("ray", dashboard, f"{NO_DASHBOARD}: {why}.", "Run `orc up`.")
    health = web.get(f"{dashboard}/api/gcs_healthz", token=key, timeout=timeout)
    if not health.ok:
        why = f"its control store is not healthy: {health.body[:200]}."
        raise ServiceUnavailable("ray", dashboard, why, "Run `orc up`.")
    said = answer.json()
    return Head(version=said.get("ray_version", ""), session=said.get("session_name", ""), latency_ms=answer.latency_ms)


def services(dashboard: str, token_path: str) -> dict[str, str]:
    """Our named actors and their state. Example: {"tracker": "ALIVE"}. Empty if the cluster cannot be asked."""
    answer = web.get(f"{dashboard}/api/v0/actors?limit=10000&detail=false", token=token(token_path), timeout=10)
    body = answer.json()
    rows = (((body.get("data") or {}).get("result") or {}).get("result") or []) if isinstance(body, dict) else []
    named = [row for row in rows if row.get("ray_namespace") == "orc" and row.get("name")]
    ours = [row for row in named if "/" not in row["name"]]  # those with one belong to runs
    states: dict[str, str] = {}
    for row in ours:  # a name can be used again after a death; then the living one counts
        if states.get(row["name"]) != "ALIVE":
            states[row["name"]] = row.get("state", "")
    return states


def parts(home: Path) -> list[psutil.Process]:
    """Every process of this head: its own ones, workers and drivers."""
    words = [f"{temp_directory(home)}/session_"] if (home / "ray").is_dir() else []
    return processes.marked(environment.mark(home, "ray"), words=words)


def core(home: Path) -> dict[str, psutil.Process]:
    """Those of `CORE` that live, by name. A raylet of another node may be on this host, too: it is told from the head's
    by the mark, which only what we start has."""
    marked = {_name(process): process for process in processes.marked(environment.mark(home, "ray"))}
    return {name: process for name, process in marked.items() if name in CORE}


def is_complete(home: Path) -> bool:
    """Whether all of `CORE` is there."""
    return core(home).keys() == CORE


def start(
    stack: Stack, *, port: int, dashboard_port: int, num_cpus: int, gcs: str, taken: set[int]
) -> psutil.Process:  # fmt: skip
    """Starts the head and gives back its first process (the control store). `stack` says token and home, `gcs` where
    the control store keeps its tables (`orchestrator.stack.GCS`); those of the head before it are dropped.

    Raises ServiceUnavailable, with the end of its log, if it does not come up.
    """
    home = Path(stack.home)
    log = home / "logs" / "ray.log"
    directory = temp_directory(home)
    _prune(directory)
    tables = _tables(home)
    shutil.rmtree(tables, ignore_errors=True)  # what they tell of died with that head
    command = [
        sys.executable, "-P", "-m", "ray.scripts.scripts", "start", "--head",
        "--node-ip-address", ports.LOOPBACK, "--port", str(port),
        "--dashboard-host", ports.LOOPBACK, "--dashboard-port", str(dashboard_port),
        # The remaining ports have fixed defaults; the second head on a host would find them taken.
        "--ray-client-server-port", str(ports.anywhere(taken)),
        "--dashboard-agent-listen-port", str(ports.anywhere(taken)),
        "--min-worker-port", "0", "--max-worker-port", "0",
        "--temp-dir", str(directory), "--disable-usage-stats",
    ]  # fmt: skip
    if num_cpus:
        command += ["--num-cpus", str(num_cpus)]
    metric_ports = (ports.anywhere(taken), ports.anywhere(taken))
    variables = environment.of_ray_head(stack, metric_ports, tables if gcs == "rocksdb" else None)
    mark = log.stat().st_size if log.exists() else 0
    starter = processes.start_detached(command, variables, log, home)
    try:
        code = starter.wait(timeout=START_TIMEOUT)
    except psutil.TimeoutExpired:
        code = -1
    found = core(home)
    if code != 0 or found.keys() != CORE:
        processes.stop(parts(home), grace=3)
        why = f"no head within {START_TIMEOUT} s" if code == -1 else "it does not start"
        said = f"{why}. Its last words:\n{processes.tail(log, mark)}\n"
        raise ServiceUnavailable("ray", f"{ports.LOOPBACK}:{port}", said, f"All of it: {log}")
    _wait_for_dashboard(stack, found.values())
    return found["gcs_server"]


def restart_control_store(stack: Stack, arguments: Sequence[str]) -> psutil.Process | None:
    """Starts the control store of a head that lost it, under what runs there, and gives back its process. `arguments`
    are its command line. None if there is no such head, or it does not come back.

    Ray itself never starts it again. Raylet, actors and drivers wait for it, at its old address, for ten minutes.
    """
    home = Path(stack.home)
    found = core(home)
    if found.keys() != {"raylet"}:
        return None
    raylet = found["raylet"]
    try:
        variables = raylet.environ()  # both were started with the same one
    except psutil.Error:
        return None
    process = processes.start_detached(arguments, variables, home / "logs" / "ray.log", home)
    try:
        _wait_for_dashboard(stack, [raylet, process])
    except ServiceUnavailable:
        processes.stop([process], grace=0)
        return None
    return process


def _tables(home: Path) -> Path:
    """Where a control store with `rocksdb` keeps them."""
    return home / "ray" / "gcs"


def _wait_for_dashboard(stack: Stack, needed: Iterable[psutil.Process]) -> None:
    """`ray start` returns a little before the dashboard takes jobs."""
    deadline = time.monotonic() + 60
    while True:
        try:
            probe(stack.ray_dashboard, stack.ray_token_path)
            return
        except ServiceUnavailable:
            if time.monotonic() > deadline or not all(map(processes.is_alive, needed)):
                raise
        time.sleep(0.2)


def stop(home: Path, *, at_once: bool = False) -> bool:
    """Stops this head and all that runs on it, and nothing else on the host. False if there was nothing.

    `at_once` is for what is left of a head that lost a part: a driver that is asked to end takes it for somebody's wish
    that its run should, and would say so.
    """
    found = parts(home)
    if not found:
        return False
    if at_once:
        processes.kill(found)
    # The raylet first and alone: it takes its workers along in order, and without it the others have nothing to do.
    processes.stop([process for process in found if _name(process) == "raylet"], grace=5)
    # The autoscaler's monitor answers SIGTERM by waiting for the control store. It has no state.
    processes.stop([process for process in found if _is_monitor(process)], grace=0)
    processes.stop({p.pid: p for p in [*found, *parts(home)]}.values(), grace=5)
    return True


def dashboard_of(address: str) -> str:
    """The dashboard's URL of somebody else's cluster. Takes some seconds; authenticates as the environment says."""
    code = "import sys; from ray.dashboard.utils import ray_address_to_api_server_url as f; print(f(sys.argv[1]))"
    try:
        asked = subprocess.run(
            [sys.executable, "-P", "-c", code, address], capture_output=True, text=True, timeout=90, check=False
        )
    except subprocess.TimeoutExpired:
        why = "it does not tell its dashboard within 90 s."
        raise ServiceUnavailable("ray", address, why, "Is ray.address right?") from None
    said = asked.stdout.strip().splitlines()
    if asked.returncode != 0 or not said or not said[-1].startswith("http"):
        words = asked.stderr.strip().splitlines()
        raise ServiceUnavailable(
            "ray", address, (words[-1] if words else "no answer") + ".",
            "Is ray.address right, the same Ray version there, and RAY_AUTH_MODE and RAY_AUTH_TOKEN_PATH set?",
        )  # fmt: skip
    return said[-1]


def _prune(directory: Path) -> None:
    """Removes the oldest sessions' logs; the head does not run now."""
    sessions = sorted(path for path in directory.glob("session_2*") if path.is_dir() and not path.is_symlink())
    for old in sessions[: -SESSIONS_KEPT + 1]:
        shutil.rmtree(old, ignore_errors=True)


def _is_monitor(process: psutil.Process) -> bool:
    try:
        return any("/autoscaler/" in word and word.endswith("monitor.py") for word in process.cmdline())
    except psutil.Error:
        return False


def _name(process: psutil.Process) -> str:
    try:
        return process.name()
    except psutil.Error:
        return ""
