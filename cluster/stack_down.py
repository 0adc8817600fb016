"""`down`: stops what this data directory started, in the reverse order, and nothing else. All data stay."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from cluster import api_server, mlflow_server, processes, ray_head, redis_server
from cluster.postgres import EmbeddedPostgres
from cluster.progress import Progress
from cluster.stack_up import locked
from orchestrator.checkpoints.local.ending import end_writers
from orchestrator.checkpoints.local.places import slab_root
from orchestrator.stack import Stack
from orchestrator.tracking.local.client import stop_local_tracker


def down(home: Path, progress: Progress) -> list[str]:
    """Returns the names of the parts that ran and are stopped now. Raises UserError."""
    if not (home / "up.lock").exists():
        return []
    stopped: list[str] = []
    with locked(home, progress):
        if (stack := Stack.find(home)) is not None:
            replace(stack, is_stopped=True).save()  # before anything is: `orc keep` must not bring it back
        with ThreadPoolExecutor(max_workers=4) as pool:
            parts = (("Ray", ray_head.stop), ("MLflow", _mlflow), ("API", _api), ("tracker", stop_local_tracker))
            ran = [pool.submit(_stop, name, stop, home, progress) for name, stop in parts]
            stopped += [name for name in (future.result() for future in ran) if name]
        # After Ray, whose workers and writers use the same memory.
        stopped += filter(None, [_stop("checkpoint writer", _writers, home, progress)])
        # Last, because they write into it to the end.
        last = (("Redis", redis_server.stop), ("PostgreSQL", _postgres))
        stopped += filter(None, [_stop(name, stop, home, progress) for name, stop in last])
        stack = Stack.find(home)
        if stack:
            replace(stack, services={}).save()
    return stopped


def _stop(name: str, stop: Callable[[Path], bool], home: Path, progress: Progress) -> str:
    """The name, if there was something to stop."""
    with progress.step(name, doing="stopping") as step:
        if not stop(home):
            return ""
        step.result = "stopped"
    return name


def _mlflow(home: Path) -> bool:
    found = mlflow_server.leftovers(home)
    processes.stop(found, grace=5)
    return bool(found)


def _api(home: Path) -> bool:
    found = api_server.leftovers(home)
    processes.stop(found, grace=5)
    return bool(found)


def _writers(home: Path) -> bool:
    """Those of this machine, with their memory. On somebody else's cluster they stay, as all services there do."""
    stack = Stack.find(home)
    if stack is not None and stack.ray_address and not stack.owns_ray:
        return False
    told = Path(stack.slab_directory) if stack is not None and stack.slab_directory else slab_root(str(home))
    ended = [end_writers(root) for root in {told, slab_root(str(home))}]
    return any(ended)


def _postgres(home: Path) -> bool:
    server = EmbeddedPostgres(home / "postgres")
    was_up = server.directory.exists() and server.pid != 0
    server.stop()
    return was_up
