"""The connection of this process to the stack's cluster: who is there, how large it is, whether it fits the job."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import sys
from collections.abc import Mapping
from typing import Any

from orchestrator.config import ClusterCapacity, Enabled, NodeCapacity, Settings, redact_url
from orchestrator.errors import ConfigError, ServiceUnavailable
from orchestrator.execution.placement import Node, nodes
from orchestrator.stack import Stack


def connect(stack: Stack, metadata: Mapping[str, str] | None = None) -> Any:
    """The stack's tracker, over a connection to its Ray that this process then has. Raises ServiceUnavailable.

    `metadata` is shown with the Ray job.
    """
    if not stack.ray_address:
        raise ServiceUnavailable(
            "ray", stack.home, "this stack has no Ray.", "Start it with `orc up ray.enabled=true`."
        )
    os.environ.update(stack.client_environment())
    # Read when ray is imported. A thread that outlives this connection must not start a Ray of its own.
    os.environ.setdefault("RAY_ENABLE_AUTO_CONNECT", "0")
    import ray
    from ray.job_config import JobConfig

    from orchestrator.execution import handles

    if not ray.is_initialized():
        if not _listens(stack.ray_address):
            raise ServiceUnavailable("ray", stack.ray_address, "nothing listens there.", "Start it with `orc up`.")
        try:
            ray.init(
                address=stack.ray_address,
                namespace=handles.NAMESPACE,
                job_config=JobConfig(metadata=dict(metadata or {})),
                log_to_driver=False,
                logging_level=logging.ERROR,
            )
        except (ConnectionError, RuntimeError) as error:
            hint = "Start it with `orc up`; `orc doctor` tells more."
            raise ServiceUnavailable("ray", stack.ray_address, f"{error}.", hint) from error
    # Ray and Train tell their own progress; ours is shown instead. Their warnings stay.
    logging.getLogger("ray").setLevel(logging.ERROR)
    return handles.tracker(stack.ray_address)


def is_connected() -> bool:
    """This process has a Ray connection already, which is its own business to end."""
    ray = sys.modules.get("ray")
    return ray is not None and ray.is_initialized()


def disconnect() -> None:
    import ray

    ray.shutdown()


def submission_id() -> str:
    """The id under which `ray job submit` runs this driver; '' outside a job."""
    with contextlib.suppress(ValueError, KeyError):
        return json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}"))["metadata"]["job_submission_id"]
    return ""


def job_id() -> str:
    """What Ray calls this connection; every driver has one."""
    import ray

    return ray.get_runtime_context().get_job_id()


def own_node() -> Node:
    """The node to which this process is connected."""
    import ray

    mine = ray.get_runtime_context().get_node_id()
    return next(node for node in nodes() if node.id == mine)


def check_stack(settings: Settings, stack: Stack) -> None:
    """Refuses a job that asks for other servers than the stack has. Raises ConfigError naming the key and the way."""
    for key, wanted, has in (
        ("database.url", settings.database.url, stack.database_url),
        ("mlflow.tracking_uri", settings.mlflow.tracking_uri, stack.mlflow_uri),
        ("ray.address", settings.ray.address, stack.ray_address),
    ):
        if wanted and wanted not in (has, "embedded"):
            why = f"this stack uses {redact_url(has) or 'none'}."
            raise ConfigError(
                key, redact_url(wanted), why, f"Change the stack: `orc up {key}=…`, or leave the key out."
            )
    if settings.mlflow.enabled is Enabled.true and not stack.mlflow_uri:
        raise ConfigError(
            "mlflow.enabled", "true", "this stack has no MLflow.", "Start it: `orc up mlflow.enabled=true`."
        )
    if settings.tensorboard.enabled is Enabled.true and not stack.tensorboard_directory:
        raise ConfigError(
            "tensorboard.enabled", "true", "this stack writes no event files.",
            "Let it: `orc up tensorboard.enabled=true`.",
        )  # fmt: skip


def _listens(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host, int(port)), timeout=5):
            return True
    except OSError:
        return False


def capacity() -> ClusterCapacity:
    """All that the living nodes can ever give."""
    living = [node.resources for node in nodes() if node.is_alive]
    return ClusterCapacity(
        nodes=tuple(
            NodeCapacity(cpus=has.get("CPU", 0), gpus=has.get("GPU", 0), memory_gb=has.get("memory", 0) / 1e9)
            for has in living
        )
    )
