"""Every environment variable that we set, or take away, on what we start.

What a client of the stack needs is `Stack.client_environment` in orchestrator/stack.py; the head has that too, so that
drivers and workers, which inherit the head's environment, are clients like any other.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path

from orchestrator.stack import Stack

PART_VARIABLE = "ORC_PART"
"""`<home>:<part>` in the environment of all that we start: how it is found again after a SIGKILL at a bad moment."""

RAY_HEAD = {
    # A stopped job gets this long to log its last points before SIGKILL; Ray's 3 s is less than one flush.
    "RAY_JOB_STOP_WAIT_TIME_S": "30",
    # A node whose raylet was killed is noticed after five looks: 5 s instead of 15. One that is only slow has the same
    # ten seconds for each answer as ever.
    "RAY_health_check_period_ms": "1000",
    # Ray's notices about itself in each job's output.
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_TRAIN_V2_ENABLED": "1",
    # By default Ray's workers, so ranks too, give way to everything else on the machine (15): on a busy one each step
    # then waits for PostgreSQL, MLflow and Ray itself. Ours that may wait give way instead (orchestrator/priority.py).
    "RAY_worker_niceness": "0",
}

NOT_FOR_RAY = (
    "RAY_ADDRESS",  # the head is the address; with it set, Ray's own processes connect to another cluster
    "RAY_API_SERVER_ADDRESS",
    "RAY_REDIS_ADDRESS",  # would move the head's state into somebody's Redis
    "RAY_TMPDIR",  # we say where, by --temp-dir
    "RAY_AUTH_TOKEN",  # wins over our token file
    "RAY_NAMESPACE",
    "RAY_JOB_CONFIG_JSON_ENV_VAR",  # left by a job from which `up` is called
    "RAY_RAYLET_PID",
    "RAY_START_HOOK",
    "RAY_gcs_storage",  # `ray.gcs` says it
    "RAY_gcs_storage_path",
)

MLFLOW_SERVER = {
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # its task queue takes 11 more processes and 2 GB
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
    "GIT_PYTHON_REFRESH": "quiet",  # there may be no git
    "PYTHONUNBUFFERED": "1",  # its log is read while it runs
}


def mark(home: Path | str, part: str) -> str:
    return f"{home}:{part}"


def of_ray_head(stack: Stack, metric_ports: tuple[int, int], tables: Path | None) -> dict[str, str]:
    """For `ray start --head`. `metric_ports` are two free ports instead of fixed ones, which another head may have;
    `tables` is where the control store keeps its own, None: in memory."""
    environment = {**_without(os.environ, NOT_FOR_RAY), **stack.client_environment(), **RAY_HEAD}
    for name in NOT_FOR_RAY:
        environment.pop(name, None)
    if tables is not None:
        environment |= {"RAY_gcs_storage": "rocksdb", "RAY_gcs_storage_path": str(tables)}
    return environment | {
        # `ray job submit -- python …` finds this installation, whether or not its environment is activated.
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]),
        "AUTOSCALER_METRIC_PORT": str(metric_ports[0]),
        "DASHBOARD_METRIC_PORT": str(metric_ports[1]),
        PART_VARIABLE: mark(stack.home, "ray"),
    }


def of_mlflow_server(home: Path | str, store: str) -> dict[str, str]:
    """For `mlflow server`. The store's URL is not in the command line, where everybody could read its password."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("MLFLOW_", "RAY_"))}
    return kept | MLFLOW_SERVER | {"MLFLOW_BACKEND_STORE_URI": store, PART_VARIABLE: mark(home, "mlflow")}


def of_api_server(home: Path | str) -> dict[str, str]:
    """For `python -m orchestrator.api`, which reads stack.json for the rest."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("MLFLOW_", "RAY_", "ORC_"))}
    return kept | {"PYTHONUNBUFFERED": "1", PART_VARIABLE: mark(home, "api")}


def of_redis_server(home: Path | str) -> dict[str, str]:
    """For `redis-server`, which needs nothing of ours."""
    return {"PATH": os.defpath, "LC_ALL": "C", PART_VARIABLE: mark(home, "redis")}


def of_client(stack: Stack) -> dict[str, str]:
    """For a subprocess that uses the stack."""
    return _without(os.environ, [PART_VARIABLE]) | stack.client_environment()


def _without(environment: Mapping[str, str], names: tuple[str, ...] | list[str]) -> dict[str, str]:
    return {name: value for name, value in environment.items() if name not in names}
