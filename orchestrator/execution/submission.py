"""Jobs on a cluster's job server, over HTTP alone: a laptop with an address and a token can submit.

Built for connections that break. A job has an id before it is sent, so that sending it twice makes one job; what it
prints is followed across lost connections, each line once.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import queue
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from orchestrator.config import ClusterCapacity, NodeCapacity
from orchestrator.errors import ServiceUnavailable, UserError
from orchestrator.stack import Stack

logger = logging.getLogger(__name__)

ANSWER = 30.0
"""Seconds that the job server may take for an answer."""
UPLOAD = 900.0
PATIENCE = 120.0
"""Seconds without any answer after which following a job is given up. The job does not notice."""
LOOK = 2.0
"""Seconds without output after which the job's status is asked for."""
SILENCE = 60.0
"""Seconds without output after which the connection is made anew: a dead one looks like a silent job."""
PENDING = 4.0
"""Seconds after which is told why a job has not started."""
RETRIES = (0.5, 1.0, 2.0, 4.0)
"""Pauses between attempts to send a job."""

INTERRUPTED = 130


class AccessDenied(UserError):
    """The job server wants a token, or another one."""

    def __init__(self, address: str, why: str) -> None:
        super().__init__(address, why)
        self.address, self.why = address, why

    def __str__(self) -> str:
        return (
            f"The job server at {self.address} {self.why}. Set RAY_AUTH_TOKEN_PATH to a file with the cluster's token,"
            " or RAY_AUTH_TOKEN to the token itself; for a stack of this host `--home DIR` is enough."
        )


class SubmissionFailed(UserError):
    """The job server answered and did not take the job, or does not know it."""

    def __init__(self, job: str, address: str, why: str) -> None:
        super().__init__(job, address, why)
        self.job, self.address, self.why = job, address, why

    def __str__(self) -> str:
        return f"job {self.job} at {self.address}: {self.why}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Submission:
    """A job as it is sent."""

    id: str
    entrypoint: str
    metadata: Mapping[str, str]
    environment: Mapping[str, str] = field(default_factory=dict, repr=False)
    """Visible to everybody who may list jobs."""
    archive: Path | None = None
    """The zip that becomes the job's working directory; Ray keeps one copy of equal ones."""


@dataclass(frozen=True, slots=True, kw_only=True)
class JobState:
    """What the job server says of a job."""

    id: str
    status: str
    """PENDING, RUNNING, SUCCEEDED, FAILED or STOPPED."""
    message: str = ""
    exit_code: int | None = None
    """Of the job's command; None while it runs, and when it was stopped or never began."""
    metadata: Mapping[str, str] = field(default_factory=dict)

    @property
    def is_over(self) -> bool:
        return self.status in ("SUCCEEDED", "FAILED", "STOPPED")


def exit_code(state: JobState) -> int:
    """0 when the job succeeded, 130 when it was stopped, else the exit code of its command, or 1 if it has none.

    A command that a signal ended has 128 + the signal's number, as in a shell.
    """
    if state.status == "SUCCEEDED":
        return 0
    if state.status == "STOPPED":
        return INTERRUPTED
    code = state.exit_code or 1
    return code if code > 0 else 128 - code


def is_job_id(text: str) -> bool:
    """Whether it can be a job's id: it becomes a file's name and a part of URLs."""
    return re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", text) is not None


def job_server(given: str, environment: Mapping[str, str], stack: Stack | None) -> tuple[str, dict[str, str]]:
    """The job server's address, and the variables that this process needs before it imports ray.

    The address is what is given, else RAY_API_SERVER_ADDRESS, else the stack's. The stack's token goes to the stack's
    own server and nowhere else; others get the environment's. Raises UserError when there is no address.
    """
    address = given or environment.get("RAY_API_SERVER_ADDRESS", "") or (stack.ray_dashboard if stack else "")
    if not address:
        raise UserError(
            "No cluster to submit to. Start one here with `orc up`, or say where one is: --address http://HEAD:8265"
            " (or RAY_API_SERVER_ADDRESS), with its token in RAY_AUTH_TOKEN_PATH or RAY_AUTH_TOKEN."
        )
    address = (address if "://" in address else f"http://{address}").rstrip("/")
    if not address.startswith(("http://", "https://")):
        raise UserError(f"{address} is no address of a job server. Write http://HEAD:8265.")
    if stack and address == stack.ray_dashboard.rstrip("/"):
        return address, stack.client_environment()
    variables = {"RAY_API_SERVER_ADDRESS": address, "RAY_USAGE_STATS_ENABLED": "0"}
    path = environment.get("RAY_AUTH_TOKEN_PATH")
    if path and not environment.get("RAY_AUTH_TOKEN") and not os.access(path, os.R_OK):
        raise UserError(f"RAY_AUTH_TOKEN_PATH is {path}, which cannot be read. It should hold the cluster's token.")
    if path or environment.get("RAY_AUTH_TOKEN"):
        variables["RAY_AUTH_MODE"] = "token"  # clients over http never switch it on by themselves
    return address, variables


class JobServer:
    """The job server of one cluster. Every call ends within `ANSWER` seconds (sending a job: `UPLOAD`).

    The variables of `job_server` must be in the environment. Raises ServiceUnavailable, AccessDenied.
    """

    def __init__(self, address: str) -> None:
        self.address = address
        self._client: Any = self._ask(_client, address)

    def job(self, job: str) -> JobState | None:
        """None: there is no such job."""
        try:
            found = self._ask(self._client.get_job_info, job)
        except RuntimeError as error:
            if "status code 404" in str(error):
                return None
            raise ServiceUnavailable("the job server", self.address, _short(error), "It may be starting.") from error
        return _state(job, found)

    def submit(self, submission: Submission, told: Callable[[str], None]) -> JobState:
        """Sends the job, again if an answer is lost: however often, there is one job. Raises SubmissionFailed."""
        runtime_env: dict[str, Any] = {"env_vars": dict(submission.environment)} if submission.environment else {}
        if submission.archive:
            runtime_env["working_dir"] = str(submission.archive)
        for pause in (*RETRIES, None):
            try:
                self._ask(
                    self._client.submit_job, entrypoint=submission.entrypoint, runtime_env=runtime_env,
                    metadata=dict(submission.metadata), submission_id=submission.id, within=UPLOAD,
                )  # fmt: skip
                return JobState(id=submission.id, status="PENDING", metadata=submission.metadata)
            except ServiceUnavailable as error:
                found = self._found_after(submission.id)
                if found is not None:
                    return found  # only the answer was lost
                if pause is None:
                    raise
                told(f"the job server did not answer ({error.why.rstrip('.')}); sending job {submission.id} again")
                time.sleep(pause)
            except (RuntimeError, ValueError) as error:
                found = self.job(submission.id)
                if found is not None:
                    return found
                raise SubmissionFailed(submission.id, self.address, f"was not taken: {_short(error)}") from error
        raise AssertionError("unreachable")

    def _found_after(self, job: str) -> JobState | None:
        try:
            return self.job(job)
        except ServiceUnavailable:
            return None

    def capacity(self) -> ClusterCapacity | None:
        """All that the living nodes can ever give; None when it cannot be told from here."""
        try:
            nodes = self._ask(_nodes, self.address)
        except (UserError, RuntimeError):
            logger.debug("the cluster's nodes are unknown", exc_info=True)
            return None
        return ClusterCapacity(nodes=tuple(nodes)) if nodes else None

    def log(self, job: str) -> str:
        """All that the job printed so far."""
        try:
            return self._ask(self._client.get_job_logs, job)
        except RuntimeError as error:
            raise ServiceUnavailable("the job's log", self.address, _short(error), "Its node may be gone.") from error

    def tail(self, job: str, every: float) -> Iterator[str]:
        """What the job printed, from its beginning, as it comes; "" after `every` seconds without anything new.

        Ends with the job or with the connection.
        """
        chunks: queue.Queue[str | None] = queue.Queue()
        loop = asyncio.new_event_loop()

        async def read() -> None:
            async for chunk in self._client.tail_job_logs(job):
                chunks.put(chunk)

        def work() -> None:
            try:
                loop.run_until_complete(reading)
            except (Exception, asyncio.CancelledError):
                logger.debug("the connection to the log of %s ended", job, exc_info=True)
            finally:
                chunks.put(None)

        reading = loop.create_task(read())
        threading.Thread(target=work, name="log", daemon=True).start()
        try:
            while True:
                try:
                    chunk = chunks.get(timeout=every)
                except queue.Empty:
                    yield ""
                    continue
                if chunk is None:
                    return
                if chunk:
                    yield chunk
        finally:
            loop.call_soon_threadsafe(reading.cancel)

    def _ask(self, call: Callable[..., Any], *args: Any, within: float = ANSWER, **options: Any) -> Any:
        """The call's answer. Ray's client has no timeouts, so it runs in a thread that is left behind when late."""
        answers: queue.Queue[tuple[Any, BaseException | None]] = queue.Queue()

        def work() -> None:
            try:
                answers.put((call(*args, **options), None))
            except BaseException as error:
                answers.put((None, error))

        threading.Thread(target=work, name="job server", daemon=True).start()
        hint = "Is it running, and can this host reach it? `orc status` tells of a stack of this host."
        try:
            answer, error = answers.get(timeout=within)
        except queue.Empty:
            why = f"no answer within {within:.0f} s."
            raise ServiceUnavailable("the job server", self.address, why, hint) from None
        if error is None:
            return answer
        if type(error).__name__ == "AuthenticationError":
            raise AccessDenied(self.address, _denial(str(error))) from error
        if isinstance(error, OSError):  # requests' errors and ConnectionError
            raise ServiceUnavailable("the job server", self.address, _short(error), hint) from error
        raise error


class Follower:
    """What a job prints, once, until it is over; then `state` tells how it ended.

    Lost connections are made again, told of once. Raises ServiceUnavailable after `PATIENCE` seconds without an answer,
    SubmissionFailed when the server no longer knows the job.
    """

    def __init__(
        self, server: JobServer, state: JobState, told: Callable[[str], None],
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        self._server, self.state, self._told, self._monotonic = server, state, told, monotonic
        self._shown = 0
        """Characters of the log that were given out."""
        self._lost_since: float | None = None
        self._pending_since = monotonic()
        self._reason = ""

    def __iter__(self) -> Iterator[str]:
        while True:
            yield from self._tailed()
            if self._looked() and self.state.is_over:
                yield from self._rest()
                return
            time.sleep(1.0)

    def _tailed(self) -> Iterator[str]:
        """One connection's worth."""
        position, heard = 0, self._monotonic()
        with contextlib.closing(self._server.tail(self.state.id, every=LOOK)) as chunks:  # type: ignore[type-var]
            for chunk in chunks:
                if chunk:
                    new = chunk[max(0, self._shown - position) :]
                    position += len(chunk)
                    heard = self._monotonic()
                    if new:
                        self._shown += len(new)
                        yield new
                elif (self._looked() and self.state.is_over) or self._monotonic() - heard > SILENCE:
                    return

    def _rest(self) -> Iterator[str]:
        """What was printed last, in case that the connection ended before it came."""
        try:
            log = self._server.log(self.state.id)
        except ServiceUnavailable as error:
            self._told(str(error))
            return
        if len(log) > self._shown:
            yield log[self._shown :]

    def _looked(self) -> bool:
        """Asks for the job's status. False: no answer."""
        now = self._monotonic()
        try:
            state = self._server.job(self.state.id)
        except ServiceUnavailable as error:
            if self._lost_since is None:
                self._lost_since = now
                self._told(f"the connection is lost, the job goes on; trying again ({error.why.rstrip('.')})")
            if now - self._lost_since > PATIENCE:
                raise
            return False
        if state is None:
            why = "the server does not know it any more: the cluster's head was started anew."
            raise SubmissionFailed(self.state.id, self._server.address, why)
        if self._lost_since is not None:
            self._lost_since = None
            self._told("connected again")
        self.state = state
        if state.status == "PENDING" and now - self._pending_since > PENDING and state.message != self._reason:
            self._reason = state.message
            self._told(f"pending: {state.message}")
        return True


def _client(address: str) -> Any:
    from ray.job_submission import JobSubmissionClient

    for name in ("ray.dashboard.modules.dashboard_sdk", "ray.dashboard.modules.job.sdk"):
        logging.getLogger(name).setLevel(logging.WARNING)  # they tell their own progress
    return JobSubmissionClient(address)


def _nodes(address: str) -> list[NodeCapacity]:
    from ray.util.state import list_nodes

    found = list_nodes(address=address, limit=10_000, timeout=int(ANSWER), raise_on_missing_output=False)
    resources = [node.resources_total or {} for node in found if node.state == "ALIVE"]
    return [
        NodeCapacity(cpus=has.get("CPU", 0), gpus=has.get("GPU", 0), memory_gb=has.get("memory", 0) / 1e9)
        for has in resources
    ]


def _state(job: str, found: Any) -> JobState:
    return JobState(
        id=job,
        status=str(getattr(found.status, "value", found.status)),
        message=found.message or "",
        exit_code=found.driver_exit_code,
        metadata=dict(found.metadata or {}),
    )


def _denial(text: str) -> str:
    return "refuses this token" if text.startswith("Authentication failed") else "wants a token, and none was given"


def _short(error: BaseException) -> str:
    """The last line that says something: the server answers with its own traceback."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip() and line.strip() != "."]
    text = lines[-1] if lines else type(error).__name__
    return f"{text[:300].rstrip('.')}."
