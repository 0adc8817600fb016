"""What runs in every rank, wherever that is: identity, logger, logs, the `run` object, then the user's function."""

from __future__ import annotations

import contextlib
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
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

from orchestrator.config import redact_text, redact_url
from orchestrator.execution.run_logs import rank_log, structured
from orchestrator.execution.stacks import answers_with_stacks
from orchestrator.failures.classify import Evidence, RankFailed
from orchestrator.records import Fact, FactKind, RunTicket, WhenFull

if TYPE_CHECKING:
    from orchestrator.checkpoints.job import SaveJob
    from orchestrator.checkpoints.policy import CheckpointPolicy
    from orchestrator.checkpoints.staging import Stager
    from orchestrator.tracking.logger import Logger
    from orchestrator.training.judging import Judge
    from orchestrator.training.pointers import Pointers

DONE, STOPPED, PAUSED, ENDED = "done", "stopped", "paused", "ended"
"""How a rank came back: its function returned; it was asked to stop; its judge paused it at its milestone, with a
durable checkpoint; its judge ended it early."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Returned:
    """What a rank, and a place for all of them, says to the driver. Survives JSON and pickle."""

    how: str
    """DONE, STOPPED, PAUSED or ENDED."""
    tally: Mapping[str, Any] = field(default_factory=dict)
    """`training.judging.Tally.to_json()` of rank 0; empty on other ranks and where nothing was judged."""


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
    slab_directory: str = ""
    """Where, on each host, checkpoints are handed to their writers; "": ranks write by themselves."""
    may_start_writer: bool = False
    """A rank starts a writer where none answers. Never on Ray, which kills what its workers start."""
    judge: Mapping[str, Any] = field(default_factory=dict)
    """What ends or pauses the training besides its function, see `training.judging.judge`."""
    collective_timeout: float = 1800.0
    """Seconds that ranks wait for each other. A lane's ranks have Ray Train's own 30 minutes."""
    splits: int = 1
    """Into how many micro-batches a batch is divided, see `training.run.Run`."""
    shares: int = 1
    """Of how many workers each one has the share of a global batch, see there."""
    without: tuple[str, ...] = ()
    """Ids of the cluster's nodes on which no rank may be."""
    watch: Mapping[str, Any] = field(default_factory=dict)
    """What its guards watch for, see `training.watching.Watch`; empty: nothing."""
    rollback: Mapping[str, Any] = field(default_factory=dict)
    """What is done otherwise since the training went wrong, see `training.run.Run`."""
    pause: float = 0.0
    """Seconds that the ranks wait before they begin."""
    clone: Mapping[str, Any] = field(default_factory=dict)
    """The checkpoint of another run that this attempt starts from: {"directory" of that run, "name", "sha256", "trial",
    "job", "since": the job's first attempt, "instead_of": which one could not be had, in words}; a later attempt of the
    same job goes on from its own checkpoints. Empty: the run's own newest one."""
    sweep: str = ""
    """The sweep that this run is a trial of."""
    waits_for_record: bool = True
    """Whether a rank waits for its spool to be shipped before it returns. A lane does not: the agent ships."""


def train_rank(
    plan: Plan,
    *,
    rank: int,
    world_size: int,
    local_rank: int,
    node: str = "",
    pointers: Pointers | None = None,
    judge: Judge | None = None,
) -> Returned:
    """The life of one rank, on the cluster's node of that id. What the user's function raises is recorded and raised as
    RankFailed. `pointers` hear of checkpoints. `judge` takes the place of the plan's, on every rank.
    """
    import torch

    from orchestrator.tracking.logger import Logger

    answers_with_stacks()
    time.sleep(plan.pause)
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
            return _run_user_function(plan, logger, rank, world_size, local_rank, node, pointers, judge)
    finally:
        copy_to_storage(ticket, log_path(ticket, rank), structured(log_path(ticket, rank)))
        # The agent ships the rest in any case; waiting means that what follows the run sees all of it.
        if plan.waits_for_record:
            logger.flush(plan.flush_timeout)
        logger.close()


def _enter(code_paths: tuple[str, ...]) -> None:
    """The driver's working directory and import paths, as far as this host has them."""
    if code_paths and os.path.isdir(code_paths[0]):
        os.chdir(code_paths[0])
    for path in reversed(code_paths):
        if path not in sys.path and os.path.isdir(path):
            sys.path.insert(0, path)


def _run_user_function(
    plan: Plan,
    logger: Any,
    rank: int,
    world_size: int,
    local_rank: int,
    node: str,
    pointers: Pointers | None,
    judge: Judge | None,
) -> Returned:
    from orchestrator.checkpoints.policy import CheckpointPolicy
    from orchestrator.config import config_schema, load_function, user_config
    from orchestrator.provenance.ranks import of_rank
    from orchestrator.training import judging
    from orchestrator.training.run import Run, RunEnded, RunPaused, RunStopped
    from orchestrator.training.watching import Watch

    run: Run | None = None
    try:
        function = load_function(plan.train)
        policy = CheckpointPolicy(**plan.checkpoints)
        if plan.clone and rank == 0:  # the others find it together with this one, when they restore
            _clone(plan, logger)
        run = Run(
            plan.ticket,
            logger,
            rank=rank,
            world_size=world_size,
            local_rank=local_rank,
            seed=plan.seed,
            checkpoints=policy,
            stager=stager_of_rank(
                plan.ticket, rank, policy, logger, directory=plan.slab_directory, may_start=plan.may_start_writer
            ),
            spool_directory=plan.spool_directory,
            config_hash=plan.config_hash,
            perf=plan.perf,
            pointers=pointers,
            judge=judge or judging.judge(plan.judge, best_metric=(policy.best_metric, str(policy.best_direction))),
            splits=plan.splits,
            shares=plan.shares,
            watch=Watch.of(plan.watch),
            rollback=plan.rollback,
            is_new=plan.ticket.attempt == 1 and not plan.clone,
        )
        where = of_rank(rank, device=str(run.device), node=node)
        logger.fact(Fact(kind=FactKind.provenance, at=time.time(), data=where))
        with contextlib.suppress(RunEnded):
            function(run, user_config(dict(plan.user), config_schema(function)))
        run.finish()
    except RunPaused:
        return Returned(how=PAUSED, tally=run.tally() if run is not None else {})
    except RunStopped:
        return Returned(how=STOPPED, tally=run.tally() if run is not None else {})
    except BaseException as error:
        evidence = Evidence(
            rank=rank,
            type=type(error).__name__,
            message=redact_text(str(error), plan.secrets),
            traceback=redact_text(traceback.format_exc(), plan.secrets),
            host=socket.gethostname(),
            at=time.time(),
            step=run.step if run is not None else None,
            kind=str(getattr(error, "failure_kind", "")),
            details=getattr(error, "failure_details", {}),
            node=node,
        )
        data = {
            "kind": "exception",
            "level": "error",
            "message": f"rank {rank}: {evidence.type}: {evidence.message}"[:2000],
            "details": asdict(evidence),
        }
        logger.fact(Fact(kind=FactKind.event, at=evidence.at, data=data))
        logging.getLogger(__name__).error("rank %d: %s: %s", rank, evidence.type, evidence.message, exc_info=True)
        if run is not None and isinstance(error, Exception):
            run.rescue(error)
        raise RankFailed(evidence) from None
    finally:
        if run is not None:
            run.close()
    # A function may have caught what it was paused or ended by.
    how = {judging.Action.pause: PAUSED, judging.Action.end: ENDED}.get(run.verdict.action, DONE)
    return Returned(how=how, tally=run.tally())


def _clone(plan: Plan, logger: Logger) -> None:
    """Rank 0 takes over the checkpoint that the plan names, unless an earlier attempt has. Raises CheckpointError,
    OSError."""
    from orchestrator.backends.storage import Storage
    from orchestrator.checkpoints import catalog
    from orchestrator.checkpoints.clone import DonorGone, clone, taken_before

    told, ticket, job = plan.clone, plan.ticket, str(plan.clone.get("job", ""))
    source, target = (Storage(each).join("checkpoints") for each in (told["directory"], ticket.directory))
    name, sha256 = told["name"], told.get("sha256", "")
    since = int(told.get("since", 0))
    if job and sha256 and taken_before(target, name, run=ticket.run, sha256=sha256, job=job, since=since) is not None:
        return
    try:
        with catalog.in_use(source, name, now=time.time()):
            manifest = clone(
                source, name, target, run=ticket.run, attempt=ticket.attempt, now=time.time(), sha256=sha256, job=job
            )
    except FileNotFoundError as error:
        raise DonorGone(source.uri(name)) from error
    trial = f" of trial {told['trial']}" if "trial" in told else ""
    message = f"goes on from {source.uri(name)}{trial} with settings of its own"
    details = {"checkpoint": manifest.id, "from": source.uri(name), "trial": told.get("trial")}
    if instead := told.get("instead_of"):
        message += f"; {instead}"
        details["instead_of"] = instead
    data = {"kind": "cloned", "level": "info", "message": message, "step": manifest.step, "details": details}
    logger.fact(Fact(kind=FactKind.event, at=time.time(), data=data))


def stager_of_rank(
    ticket: RunTicket, rank: int, policy: CheckpointPolicy, logger: Logger, *, directory: str, may_start: bool
) -> Stager | None:
    """What takes a rank's checkpoints from its hands; None where it shall write them by itself. `directory` is the slab
    root of this host. Where shared memory cannot be had, the rank writes by itself, and an event says why. Waits a
    while for what an earlier attempt had sealed on this host."""
    from orchestrator.backends.storage import Storage
    from orchestrator.checkpoints.local.client import SlabClient
    from orchestrator.checkpoints.local.ending import await_sealed
    from orchestrator.checkpoints.policy import Mode
    from orchestrator.checkpoints.slab import Owner
    from orchestrator.checkpoints.slab_stager import SlabStager
    from orchestrator.checkpoints.staging import DirectStager

    if policy.mode is Mode.direct or not directory:
        return None

    def tell(kind: str, why: str) -> None:
        by_itself = kind in ("checkpoint-direct", "checkpoint-writer-missing")
        message = f"rank {rank} writes its checkpoints by itself: {why}" if by_itself else f"rank {rank}: {why}"
        logging.getLogger(__name__).warning("%s", message, extra={"run": ticket.run})
        data = {"kind": kind, "level": "warning", "message": message}
        logger.fact(Fact(kind=FactKind.event, at=time.time(), data=data))

    def is_ours(job: SaveJob) -> bool:
        return job.run == ticket.run and job.attempt < ticket.attempt

    if ticket.attempt > 1 and not await_sealed(Path(directory), is_ours, may_start=may_start):
        tell("checkpoint-unwritten", "what the attempt before had sealed is not written yet, and is not waited for")
    return SlabStager(
        SlabClient(directory, may_start=may_start),
        owner=Owner(run=ticket.run, attempt=ticket.attempt, rank=rank, pid=os.getpid()),
        fallback=DirectStager(Storage(ticket.directory).join("checkpoints"), window_bytes=policy.window_mb << 20),
        tell=tell,
        mode=policy.mode,
    )


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
    except Exception as error:
        # The run's own work must not fail for a copy of its log.
        names, where = ", ".join(path.name for path in paths), redact_url(ticket.directory)
        log = logging.getLogger(__name__)
        log.warning("%s of %s could not be copied to %s: %s", names, local, where, redact_url(str(error)))
        log.debug("where it failed", exc_info=True)
