"""`start_run`: a run in a plain script, under torchrun or in a notebook, without a Ray cluster.

No thread here: the local tracker sees that this process lives by the lock on its spool, and calls the attempt CRASHED
when it does not. SIGTERM and SIGUSR1 are heard where the script does not hear them itself, see farewell.py.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import hashlib
import json
import logging
import os
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from orchestrator.account import user_name
from orchestrator.catalog import open_catalog
from orchestrator.checkpoints.policy import CheckpointPolicy
from orchestrator.config import ProvenanceConfig, Settings, config_hash, flatten, redact, redact_text
from orchestrator.config.settings import StopConfig
from orchestrator.config.typed import build, dump
from orchestrator.errors import OrchestratorError, RunIsActive, ServiceUnavailable, UserError
from orchestrator.execution.farewell import Farewell
from orchestrator.execution.local import slab_directory
from orchestrator.execution.worker import copy_to_storage, local_directory, stager_of_rank
from orchestrator.failures.classify import Evidence, first_cause
from orchestrator.provenance.record import record
from orchestrator.records import Fact, FactKind, RunSpec, RunStatus, RunTicket
from orchestrator.stack import Stack, default_home
from orchestrator.tracking.local.client import LocalTracker
from orchestrator.tracking.local.places import private_directory
from orchestrator.tracking.local.stack_start import has_database, running_stack
from orchestrator.tracking.logger import Logger
from orchestrator.training.judging import judge
from orchestrator.training.run import Run, RunEnded, RunStopped

logger = logging.getLogger(__name__)

FLUSH = 15.0
LEASE = 30.0
"""Seconds after which a run whose process is gone is surely called CRASHED."""
JOIN = 300.0
"""Seconds that the other ranks wait for rank 0 to open the run; PostgreSQL may have to be started first."""

_open: dict[int, str] = {}
"""Process -> name of the run that it records: a forked child inherits this, and records none."""
_opened = 0
"""How many runs this process has opened: the ranks of one launch count alike."""


class RunIsOpen(UserError):
    """This process records a run already."""

    def __init__(self, name: str, hint: str) -> None:
        super().__init__(name, hint)
        self.name, self.hint = name, hint

    def __str__(self) -> str:
        return f"start_run: this process records {self.name} already. {self.hint}"


@contextlib.contextmanager
def start_run(
    *,
    experiment: str = "default",
    name: str = "",
    params: Any = None,
    config: Mapping[str, Any] | None = None,
    tags: Mapping[str, str] | None = None,
    description: str = "",
    project: str = "default",
    resume: bool | str = False,
    seed: int | None = None,
    checkpoints: Mapping[str, Any] | None = None,
    stopping: Mapping[str, Any] | None = None,
    storage: str = "",
    home: str | os.PathLike[str] | None = None,
) -> Iterator[Run]:
    """Records what happens in the `with` block as a run: `with start_run(experiment="digits") as run: run.log(…)`.

    `params`: a mapping, a dataclass or an argparse.Namespace; `config`: the whole configuration, if it is more than
    that. `resume=True` goes on with the newest run of the same experiment, params and config that did not finish, as
    its next attempt; a name or id goes on with that run; `run.state(…)` then restores the newest checkpoint. `seed`
    seeds Python, numpy and torch; without it they are left alone. `checkpoints`: see CheckpointPolicy.
    `stopping` ends the run early, as that section of a configuration does: {"metric": "val/loss", "patience": 3}. A
    loop over `run.epochs` ends then, and what comes after it is done; elsewhere `run.report` leaves the block.

    The end of the block finishes the run; an exception makes it FAILED (ctrl-C: CANCELLED) and goes on its way. Under
    torchrun every rank enters the block: rank 0 opens the run, all of them log. One run at a time per process. Starts
    PostgreSQL where it does not run. Raises ServiceUnavailable, RunIsOpen, NotFound, RunIsActive, ConfigError.
    """
    _refuse_inside()
    where = World.of_this_process()
    ends = build(Settings, {"stopping": dict(stopping)}).stopping if stopping else None
    spec = _spec(experiment, name, params, config, tags, description, project, storage, ends)
    policy = CheckpointPolicy(**(checkpoints or {}))
    opened = _join(where, spec, resume, Path(home) if home else default_home())
    recording = _Recording(where, opened)
    claim(opened.ticket.name)
    try:
        yield recording.begin(spec, seed, policy, ends)
        recording.finish()
    except RunEnded:
        recording.finish()
    except BaseException as error:
        recording.fail(error)
        raise
    finally:
        _open.pop(os.getpid(), None)


def claim(name: str) -> None:
    """This process records the run of that name from now on."""
    _open[os.getpid()] = name


@dataclass(frozen=True, kw_only=True)
class World:
    """Which of how many ranks this process is."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @classmethod
    def of_this_process(cls) -> World:
        """As torch.distributed says, else as torchrun says in the environment."""
        local_rank = int(os.environ.get("LOCAL_RANK", 0))
        if _has_group():
            import torch.distributed as dist

            return cls(rank=dist.get_rank(), size=dist.get_world_size(), local_rank=local_rank)
        size = int(os.environ.get("WORLD_SIZE", 1))
        rank = int(os.environ.get("RANK", 0)) if size > 1 else 0
        return cls(rank=rank, size=size, local_rank=local_rank)


@dataclass(frozen=True, kw_only=True)
class Opened:
    """What rank 0 tells the others."""

    ticket: RunTicket
    stack: Stack
    spools: str


class _Recording:
    """One rank's part of an open run. A child that was forked in the block and leaves it ends nothing."""

    def __init__(self, where: World, opened: Opened) -> None:
        self._where, self._opened, self._process = where, opened, os.getpid()
        ticket = opened.ticket
        self._logger = Logger(Path(opened.spools), run=ticket.run, attempt=ticket.attempt, rank=where.rank)
        self._run: Run | None = None
        self._is_over = False
        self._farewell = Farewell(self._ask_to_stop)

    def begin(
        self, spec: RunSpec, seed: int | None, checkpoints: CheckpointPolicy, stopping: StopConfig | None = None
    ) -> Run:
        where = self._where
        best = checkpoints.best_metric, str(checkpoints.best_direction)
        self._run = Run(
            self._opened.ticket,
            self._logger,
            rank=where.rank,
            world_size=where.size,
            local_rank=where.local_rank,
            seed=seed or 0,
            seeds_generators=seed is not None,
            checkpoints=checkpoints,
            stager=stager_of_rank(
                self._opened.ticket,
                where.rank,
                checkpoints,
                self._logger,
                directory=slab_directory(self._opened.stack),
                may_start=True,
            ),
            spool_directory=self._opened.spools,
            config_hash=spec.config_hash,
            device=_device_in_use(),
            perf=True,
            judge=judge({"stopping": asdict(stopping)}, best_metric=best) if stopping else None,
        )
        if where.rank == 0:
            self._describe(spec, seed or 0)
        self._farewell.listen()
        return self._run

    def _ask_to_stop(self) -> bool:
        """False: the run has no state, so that nothing would be saved."""
        self._logger.request_stop()
        return self._run is not None and self._run.has_state

    def _describe(self, spec: RunSpec, seed: int) -> None:
        ticket, stack = self._opened.ticket, self._opened.stack
        directory = Path(local_directory(ticket))
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "config.json").write_text(json.dumps(spec.config, indent=2))
        recorded = record(
            directory,
            attempt=ticket.attempt,
            config=spec.config,
            config_hash=spec.config_hash,
            # A notebook has no source file; around it may lie anything.
            settings=ProvenanceConfig(source=hasattr(sys.modules["__main__"], "__file__")),
            code_paths=[os.getcwd()],
            environ=os.environ,
            seed=seed,
            outside=[stack.home],
        )
        copy_to_storage(ticket, directory / "config.json", *recorded.files)
        self._fact(FactKind.provenance, recorded.values)
        for warning in recorded.warnings if ticket.attempt == 1 else ():
            self._fact(FactKind.event, {"kind": "source-incomplete", "level": "warning", "message": warning})

    def finish(self) -> None:
        if os.getpid() != self._process:
            return
        if self._run is not None and (self._where.size == 1 or _has_group()):
            self._run.finish()
        if self._run is not None:
            self._run.close()
        verdict = self._run.verdict if self._run is not None else None
        self._end(RunStatus.finished, verdict.reason if verdict else "", None)

    def fail(self, error: BaseException) -> None:
        """What goes wrong here is logged: the user's own exception is on its way."""
        if os.getpid() != self._process or self._is_over:
            return
        try:
            ending = _ending(error, self._where.rank, self._run.step if self._run is not None else 0)
            if isinstance(error, RunStopped) and self._farewell.heard:
                ending = RunStatus.cancelled, f"stopped by {self._farewell.heard}", None
            if self._run is not None:
                if isinstance(error, Exception):
                    self._run.rescue(error)
                self._run.close()
            self._end(*ending)
        except Exception:
            logger.exception("the end of run %s could not be recorded", self._opened.ticket.name)

    def _end(self, status: RunStatus, reason: str, error: Evidence | None) -> None:
        """Says how it ended and waits until that is stored. Any rank may tell of a failure, rank 0 of the rest."""
        self._is_over = True
        self._farewell.close()
        try:
            if error is not None:
                data = {"kind": "exception", "level": "error", "message": reason, "details": asdict(error)}
                self._fact(FactKind.event, data)
            if self._where.rank == 0 or status is RunStatus.failed:
                finding = first_cause([error]).error() if error else None
                self._fact(FactKind.status, {"status": status.value, "reason": reason, "error": finding})
            self._settle()
        finally:
            self._logger.close()  # its lock says that the run goes on

    def _settle(self) -> None:
        try:
            LocalTracker(self._opened.stack).ensure()  # it may have been killed meanwhile: the next one ships the rest
        except (OSError, OrchestratorError) as error:
            logger.warning("the local tracker does not start (%s); what was logged waits for the next one", error)
        if not self._logger.wait_committed(FLUSH):
            logger.warning("the record of run %s is not in PostgreSQL yet; it will be later", self._opened.ticket.name)

    def _fact(self, kind: FactKind, data: Mapping[str, Any]) -> None:
        self._logger.fact(Fact(kind=kind, at=time.time(), data=data))


def _ending(error: BaseException, rank: int, step: int) -> tuple[RunStatus, str, Evidence | None]:
    """What the exception that leaves the block says of the run. Pure but for the time and the host."""
    if isinstance(error, RunStopped):
        return RunStatus.cancelled, "cancelled", None
    if isinstance(error, KeyboardInterrupt):
        return RunStatus.cancelled, "stopped by SIGINT", None
    if isinstance(error, SystemExit) and error.code in (None, 0):
        return RunStatus.finished, "", None
    evidence = Evidence(
        rank=rank, type=type(error).__name__, message=redact_text(str(error)), host=socket.gethostname(),
        traceback=redact_text("".join(traceback.format_exception(error))), at=time.time(), step=step,
        kind=str(getattr(error, "failure_kind", "")),
    )  # fmt: skip
    return RunStatus.failed, first_cause([evidence]).reason, evidence


# -- opening ----------------------------------------------------------------------------------------------------------


def _spec(
    experiment: str, name: str, params: Any, config: Mapping[str, Any] | None, tags: Mapping[str, str] | None,
    description: str, project: str, storage: str, stopping: StopConfig | None = None,
) -> RunSpec:  # fmt: skip
    given = _plain(params)
    whole = _plain(config) or given
    script = os.path.basename(getattr(sys.modules["__main__"], "__file__", None) or "notebook")
    return RunSpec(
        experiment=experiment,
        project=project,
        user=user_name(),
        name=name,
        description=description,
        tags={str(key): str(value) for key, value in (tags or {}).items()},
        params=flatten(redact(given or whole)),
        config=redact(whole),
        config_hash=config_hash(
            {"script": script, "user": {**whole, **given}, **({"stopping": dump(stopping)} if stopping else {})}
        ),
        storage_url=os.path.abspath(storage) if storage and "://" not in storage else storage,
    )


def _plain(values: Any) -> dict[str, Any]:
    """A mapping, dataclass or Namespace as plain values; what JSON lacks as its text."""
    if values is None:
        return {}
    if not dataclasses.is_dataclass(values) and not isinstance(values, Mapping):
        values = vars(values)
    return dict(_json(values))


def _json(value: Any) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {each.name: _json(getattr(value, each.name)) for each in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _json(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_json(inner) for inner in value]
    if isinstance(value, np.generic):
        return _json(value.item())
    return str(value)


def _join(where: World, spec: RunSpec, resume: bool | str, home: Path) -> Opened:
    """The run, the same on all ranks. What rank 0 could not do is raised on all of them."""
    global _opened
    _opened += 1
    if where.size == 1:
        return _open_here(spec, resume, home, 1)
    if where.rank == 0:
        try:
            opened = _open_here(spec, resume, home, where.size)
        except Exception as error:
            _tell(json.dumps({"error": f"{error}"}))
            raise
        told = {"ticket": asdict(opened.ticket), "home": opened.stack.home, "host": _host()}
        _tell(json.dumps({**told, "database": _digest(opened.stack.database_url)}))
        return opened
    told = json.loads(_hear(where))
    if "error" in told:
        raise UserError(f"start_run: rank 0 could not open the run: {told['error']}")
    stack = Stack.load(told["home"]) if told["host"] == _host() else _same_stack(home, told)
    tracker = LocalTracker(stack)
    return Opened(ticket=RunTicket(**told["ticket"]), stack=stack, spools=tracker.describe()["spool_directory"])


def _same_stack(home: Path, told: Mapping[str, Any]) -> Stack:
    """On another host than rank 0's: nothing is started, the points must come into the same database."""
    stack = Stack.find(home)
    if stack is None or _digest(stack.database_url) != told["database"] or not has_database(stack):
        why = f"rank 0 on {told['host']} records into a database that the stack in {home} on {_host()} does not have."
        hint = "Give all hosts one: `orc up ray.enabled=false database.url=…` on each."
        raise UserError(f"start_run: {why} {hint}")
    return stack


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _open_here(spec: RunSpec, resume: bool | str, home: Path, workers: int) -> Opened:
    stack = running_stack(home)
    tracker = LocalTracker(stack)
    run = ""
    if isinstance(resume, str) and resume:
        with open_catalog(home) as catalog:
            run = catalog.run(resume).run
    spec = dataclasses.replace(
        spec, run=run, resume=resume is True, workers=workers, storage_url=spec.storage_url or stack.storage_url
    )
    try:
        tracker.ensure()
        ticket = _opened_when_over(tracker, spec)
        spools = tracker.describe()["spool_directory"]
    except (ConnectionError, TimeoutError) as error:
        raise ServiceUnavailable("the local tracker", stack.home, f"{error}.", "`orc status` tells more.") from error
    return Opened(ticket=ticket, stack=stack, spools=spools)


def _opened_when_over(tracker: LocalTracker, spec: RunSpec) -> RunTicket:
    """A run to go on with may have been killed a moment ago (torchrun starts its ranks again): its lease will end."""
    deadline, is_said = time.monotonic() + LEASE, False
    while True:
        try:
            return tracker.open_run(spec)
        except RunIsActive as error:
            if not (spec.resume or spec.run) or time.monotonic() > deadline:
                raise
            if not is_said:
                logger.warning("run %s is RUNNING; waiting up to %.0f s for its end", error.args[0], LEASE)
            is_said = True
            time.sleep(0.2)


def _refuse_inside() -> None:
    if os.getpid() in _open:
        raise RunIsOpen(f"run {_open[os.getpid()]}", "Use that one, or leave its `with` block first.")
    train = sys.modules.get("ray.train")
    if train is None:
        return
    with contextlib.suppress(RuntimeError, AttributeError):
        train.get_context().get_world_rank()
        hint = "In a function of `orc run` use the `run` it is given; for a TorchTrainer of your own, TrainCallback."
        raise RunIsOpen("what Ray Train runs", hint)


# -- how rank 0 tells the others ---------------------------------------------------------------------------------------


def _has_group() -> bool:
    """torch.distributed is initialised in this process."""
    dist = sys.modules.get("torch.distributed")
    return dist is not None and dist.is_available() and dist.is_initialized()


def _tell(text: str) -> None:
    if _has_group():
        _store().set(_topic(), text)
        return
    path = _meeting_place()
    private_directory(path.parent)
    fresh = path.with_suffix(".tmp")
    fresh.write_text(text)
    fresh.rename(path)


def _hear(where: World) -> str:
    try:
        if _has_group():
            store = _store()
            store.wait([_topic()], datetime.timedelta(seconds=JOIN))
            return store.get(_topic()).decode()
        path, deadline = _meeting_place(), time.monotonic() + JOIN
        while time.monotonic() < deadline:
            with contextlib.suppress(FileNotFoundError):
                return path.read_text()
            time.sleep(0.02)
    except RuntimeError as error:
        logger.warning("rank %d lost rank 0: %s", where.rank, error)
    hint = "Does rank 0 call start_run, too? Ranks on several hosts must call init_process_group before it."
    raise UserError(f"start_run: rank {where.rank} heard nothing of rank 0 within {JOIN:.0f} s. {hint}")


def _store() -> Any:
    """The group's key-value store. Nothing collective: a script in which rank 0 alone records must not hang."""
    from torch.distributed.distributed_c10d import _get_default_store

    return _get_default_store()


def _topic() -> str:
    return f"orchestrator/start_run/{_opened}"


def _meeting_place() -> Path:
    """A file that the ranks of one launch on this host know without talking: they have one parent, which lives."""
    parent = psutil.Process(os.getppid())
    names = ("TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT", "MASTER_ADDR", "MASTER_PORT")
    words = [str(parent.pid), str(parent.create_time()), str(_opened), *(os.environ.get(name, "") for name in names)]
    key = hashlib.sha256(" ".join(words).encode()).hexdigest()[:24]
    return Path(tempfile.gettempdir()) / f"orc-ranks-{os.geteuid()}" / f"{key}.json"


def _device_in_use() -> str | None:
    """The accelerator that the script has chosen, if it uses one already."""
    import torch

    return f"cuda:{torch.cuda.current_device()}" if torch.cuda.is_initialized() else None


def _host() -> str:
    return socket.gethostname()
