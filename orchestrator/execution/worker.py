"""What runs in every rank, wherever that is: identity, logger, logs, the `run` object, then the user's function."""

from __future__ import annotations

import logging
import os
import shutil
import socket
import sys
import time
import traceback
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from orchestrator.config import redact_text
from orchestrator.execution.run_logs import rank_log, structured
from orchestrator.failures.classify import Evidence, RankFailed
from orchestrator.records import Fact, FactKind, RunTicket, WhenFull

DONE, STOPPED = "done", "stopped"
"""What a worker returns to the driver: it went to its end, or it stopped because it was asked to."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Everything a worker needs to know; travels from the driver to each of them."""

    ticket: RunTicket
    train: str
    """`module:function`"""
    user: Mapping[str, Any] = field(repr=False)
    """The user's part of the config."""
    spool_directory: str
    spool_bytes: int
    flush_timeout: float
    seed: int
    checkpoints: Mapping[str, Any]
    """The checkpoint settings, by name."""
    config_hash: str
    code_paths: tuple[str, ...] = field(default=())
    """The driver's working directory and further directories of the user's code, where they exist on the worker's host.
    """
    secrets: tuple[str, ...] = field(default=(), repr=False)
    """What must not appear in logs and events."""
    when_full: WhenFull = WhenFull.block
    threads: int = 1
    """CPU threads per worker."""
    perf: bool = True
    """Record how fast the training goes."""
    debug: tuple[str, ...] = ()
    """Components that log in detail; see json_logs.py."""


def train_rank(plan: Plan, *, rank: int, world_size: int, local_rank: int, node: str = "") -> str:
    """The life of one rank, on the cluster's node of that id. Returns DONE or STOPPED; what the user's function raises
    is recorded and raised as RankFailed.
    """
    import torch

    from orchestrator.tracking.logger import Logger

    torch.set_num_threads(plan.threads)
    _enter(plan.code_paths)
    ticket = plan.ticket
    logger = Logger(
        Path(plan.spool_directory),
        run=ticket.run,
        attempt=ticket.attempt,
        rank=rank,
        max_bytes=plan.spool_bytes,
        when_full=plan.when_full,
    )
    try:
        with rank_log(log_path(ticket, rank), ticket, rank, secrets=plan.secrets, components=plan.debug):
            return _run_user_function(plan, logger, rank, world_size, local_rank, node)
    finally:
        copy_to_storage(ticket, log_path(ticket, rank), structured(log_path(ticket, rank)))
        # The agent ships the rest in any case; waiting means that what follows the run sees all of it.
        logger.flush(plan.flush_timeout)
        logger.close()


def _enter(code_paths: tuple[str, ...]) -> None:
    """The driver's working directory and import paths, as far as this host has them."""
    if code_paths and os.path.isdir(code_paths[0]):
        os.chdir(code_paths[0])
    for path in reversed(code_paths):
        if path not in sys.path and os.path.isdir(path):
            sys.path.insert(0, path)


def _run_user_function(plan: Plan, logger: Any, rank: int, world_size: int, local_rank: int, node: str) -> str:
    from orchestrator.checkpoints.policy import CheckpointPolicy
    from orchestrator.config import config_schema, load_function, user_config
    from orchestrator.provenance.ranks import of_rank
    from orchestrator.training.run import Run, RunStopped

    run: Run | None = None
    try:
        function = load_function(plan.train)
        run = Run(
            plan.ticket,
            logger,
            rank=rank,
            world_size=world_size,
            local_rank=local_rank,
            seed=plan.seed,
            checkpoints=CheckpointPolicy(**plan.checkpoints),
            config_hash=plan.config_hash,
            perf=plan.perf,
        )
        where = of_rank(rank, device=str(run.device), node=node)
        logger.fact(Fact(kind=FactKind.provenance, at=time.time(), data=where))
        function(run, user_config(dict(plan.user), config_schema(function)))
        run.finish()
    except RunStopped:
        return STOPPED
    except BaseException as error:
        evidence = Evidence(
            rank=rank,
            type=type(error).__name__,
            message=redact_text(str(error), plan.secrets),
            traceback=redact_text(traceback.format_exc(), plan.secrets),
            host=socket.gethostname(),
            at=time.time(),
            step=run.step if run is not None else None,
        )
        data = {
            "kind": "exception",
            "level": "error",
            "message": f"rank {rank}: {evidence.type}: {evidence.message}"[:2000],
            "details": asdict(evidence),
        }
        logger.fact(Fact(kind=FactKind.event, at=evidence.at, data=data))
        logging.getLogger(__name__).error("rank %d: %s: %s", rank, evidence.type, evidence.message, exc_info=True)
        raise RankFailed(evidence) from None
    return DONE


def log_path(ticket: RunTicket, rank: int) -> Path:
    """Where the output of a rank goes: `<run directory>/logs/attempt-1/rank-0.log`; -1 is the driver."""
    name = "driver.log" if rank < 0 else f"rank-{rank}.log"
    return Path(local_directory(ticket)) / "logs" / f"attempt-{ticket.attempt}" / name


def local_directory(ticket: RunTicket) -> str:
    """The run's directory on this host's disk; for remote storage a stand-in under the temporary directory."""
    if "://" not in ticket.directory:
        return ticket.directory
    if ticket.directory.startswith("file://"):
        return unquote(urlsplit(ticket.directory).path)
    return os.path.join(os.environ.get("TMPDIR", "/tmp"), f"orc-{os.getuid()}", ticket.run)


def copy_to_storage(ticket: RunTicket, *paths: Path) -> None:
    """Copies files of the local directory into the run's, where that is elsewhere (`s3://` …). Never raises."""
    from orchestrator.backends.storage import Storage

    local = local_directory(ticket)
    try:
        storage = Storage(ticket.directory)
        if storage.is_local:
            return
        for path in paths:
            with path.open("rb") as source, storage.open_output(str(path.relative_to(local))) as output:
                shutil.copyfileobj(source, output)
    except Exception:
        # The run's own work must not fail for a copy of its log.
        logging.getLogger(__name__).exception("%s could not be copied to %s", local, ticket.directory)
