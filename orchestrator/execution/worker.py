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
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TextIO
from urllib.parse import unquote, urlsplit

from orchestrator.config import SecretFilter, redact_text
from orchestrator.failures.classify import Evidence, RankFailed
from orchestrator.records import Fact, FactKind, RunTicket

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
    threads: int = 1
    """CPU threads per worker."""


def train_rank(plan: Plan, *, rank: int, world_size: int, local_rank: int) -> str:
    """The life of one rank. Returns DONE or STOPPED; what the user's function raises is recorded and raised as
    RankFailed.
    """
    import torch

    from orchestrator.tracking.logger import Logger

    torch.set_num_threads(plan.threads)
    _enter(plan.code_paths)
    ticket = plan.ticket
    logger = Logger(
        Path(plan.spool_directory), run=ticket.run, attempt=ticket.attempt, rank=rank, max_bytes=plan.spool_bytes
    )
    try:
        with _log_file(log_path(ticket, rank), plan.secrets):
            return _run_user_function(plan, logger, rank, world_size, local_rank)
    finally:
        copy_to_storage(ticket, log_path(ticket, rank))
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


def _run_user_function(plan: Plan, logger: Any, rank: int, world_size: int, local_rank: int) -> str:
    from orchestrator.checkpoints.policy import CheckpointPolicy
    from orchestrator.config import config_schema, load_function, user_config
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
        )
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
        print(evidence.traceback, file=sys.stderr)
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


@contextlib.contextmanager
def _log_file(path: Path, secrets: tuple[str, ...]) -> Iterator[None]:
    """Sends what this process prints and logs to `path` as well, without secrets."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", buffering=1) as file:
        out, err = sys.stdout, sys.stderr
        sys.stdout, sys.stderr = _Tee(out, file, secrets), _Tee(err, file, secrets)  # type: ignore[assignment]
        # One handler, into what goes to both: those that Ray put there would write each line a second time.
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s %(message)s"))
        handler.addFilter(SecretFilter(secrets))
        root = logging.getLogger()
        handlers, level = root.handlers, root.level
        root.handlers = [handler]
        root.setLevel(min(level, logging.INFO))
        try:
            yield
        finally:
            root.handlers = handlers
            root.setLevel(level)
            sys.stdout, sys.stderr = out, err


class _Tee:
    """A text stream that writes to two. The log file must never break the user's print."""

    def __init__(self, stream: TextIO, file: TextIO, secrets: tuple[str, ...]) -> None:
        self._stream, self._file, self._secrets = stream, file, secrets

    def write(self, text: str) -> int:
        # Ray keeps what goes to the real stream in its session's logs, so a secret must not go there either.
        shown = redact_text(text, self._secrets) if self._secrets else text
        with contextlib.suppress(OSError, ValueError):
            self._file.write(shown)
        self._stream.write(shown)
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            self._file.flush()
        self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
