"""From what the ranks left behind to one cause. Pure: evidence in, finding out.

When one rank fails, the others fail too, a moment later, in a collective. The finding names the first cause, not the
echoes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from orchestrator.errors import OrchestratorError, ServiceUnavailable
from orchestrator.records import RunStatus


class FailureKind(StrEnum):
    user_bug = "user_bug"
    worker_killed = "worker_killed"
    node_lost = "node_lost"
    out_of_memory = "out_of_memory"
    service = "service"
    unknown = "unknown"


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """What one rank (or the driver, rank -1) left behind."""

    rank: int
    type: str
    """Class name of the exception."""
    message: str
    traceback: str = ""
    """Of the user's code; empty when the process died without a word."""
    host: str = ""
    at: float = 0.0
    """Seconds since 1970, by the rank's clock; 0 when not known."""
    step: int | None = None
    """The run's step when it happened; None when nobody could say."""


class RankFailed(OrchestratorError):
    """A rank's exception on its way to the driver: plain values, because the user's class may not survive the trip."""

    def __init__(self, evidence: Evidence) -> None:
        super().__init__(evidence)
        self.evidence = evidence

    def __str__(self) -> str:
        return f"{self.evidence.type}: {self.evidence.message}\n{self.evidence.traceback}"


class RanksFailed(OrchestratorError):
    """An attempt failed. `evidence` is what its ranks left behind, at least one piece."""

    def __init__(self, evidence: Sequence[Evidence]) -> None:
        super().__init__(evidence)
        self.evidence = tuple(evidence)

    def __str__(self) -> str:
        return first_cause(self.evidence).reason


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """The cause. `status` is how the attempt ended."""

    kind: FailureKind
    status: RunStatus
    what: str
    """One line."""
    evidence: Evidence
    hint: str

    @property
    def reason(self) -> str:
        """One line: what, and where."""
        where = "in the driver" if self.evidence.rank < 0 else f"on rank {self.evidence.rank}"
        host = f" ({self.evidence.host})" if self.evidence.host else ""
        return f"{self.what} {where}{host}"[:1000]

    def error(self) -> dict[str, Any]:
        """The form in which it is stored."""
        evidence = self.evidence
        return {
            "kind": self.kind.value,
            "type": evidence.type,
            "message": evidence.message,
            "rank": evidence.rank,
            "host": evidence.host,
            "step": evidence.step,
            "what": self.what,
            "traceback": evidence.traceback,
            "hint": self.hint,
        }


_ECHO = re.compile(
    r"connection (was )?(closed|reset)|gloo|nccl|process group|timed out waiting|broken pipe|DistBackendError"
    r"|DistNetworkError|another rank|by peer",
    re.IGNORECASE,
)
_OUT_OF_MEMORY = re.compile(
    r"(CUDA|HIP|XPU|MPS\w*) out of memory|OutOfMemoryError|MemoryError|running low on memory|cannot allocate memory",
    re.IGNORECASE,
)
_NODE_LOST = re.compile(r"node (has )?died|node .*(was )?(terminated|lost|dead)\b|NodeDiedError", re.IGNORECASE)
_KILLED = re.compile(
    r"ActorDied|ActorUnavailable|WorkerCrashed|WorkerHealthCheck|worker process has died", re.IGNORECASE
)
_NOT_STARTED = re.compile(r"raised in its creation task", re.IGNORECASE)
"""Ray's word for a process of ours that could not even begin, most often because it cannot import something."""
_HUNG_UP = re.compile(
    r"(gloo|nccl|c10d|DistBackendError|DistNetworkError).*"
    r"((closed|reset) by (remote )?peer|remote process exit|socket (was )?closed|peer closed)",
    re.IGNORECASE | re.DOTALL,
)
"""What a collective says when the process at the other end is gone. A rank that raises an exception keeps its
connections until its attempt is over, so nobody hears this from it.
"""

MENDED_BY_RESTART = frozenset({FailureKind.worker_killed, FailureKind.node_lost, FailureKind.service})


def first_cause(evidence: Sequence[Evidence]) -> Finding:
    """The finding for an attempt that failed. `evidence` is not empty."""
    cause = min(evidence, key=lambda e: (is_echo(e), e.at, e.rank))
    kind = _kind(cause)
    status = RunStatus.crashed if kind in (FailureKind.worker_killed, FailureKind.node_lost) else RunStatus.failed
    return Finding(kind=kind, status=status, what=_what(kind, cause), evidence=cause, hint=_hint(kind, cause))


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """What follows an attempt that ended, and in words why."""

    is_restart: bool
    words: str


def after(status: RunStatus, error: Mapping[str, Any], restarts: int, most: int) -> Decision:
    """Whether another attempt may help and is allowed: the same bug would only fail again. `most` < 0: no limit."""
    if status not in (RunStatus.failed, RunStatus.crashed):
        return Decision(is_restart=False, words="")
    if error.get("kind") not in MENDED_BY_RESTART:
        return Decision(is_restart=False, words="not restarted: the same would only happen again")
    if most == 0:
        words = "not restarted: failures.max_restarts is 0; `orc resume` goes on from the newest checkpoint"
        return Decision(is_restart=False, words=words)
    if 0 <= most <= restarts:
        return Decision(
            is_restart=False, words=f"not restarted: all {most} restarts (failures.max_restarts) are used up"
        )
    count = f"{restarts + 1} of {most}" if most > 0 else f"{restarts + 1}, no limit"
    return Decision(is_restart=True, words=f"restarted from the newest checkpoint (restart {count})")


def _kind(cause: Evidence) -> FailureKind:
    text = f"{cause.type}: {cause.message}"
    if _OUT_OF_MEMORY.search(text):
        return FailureKind.out_of_memory
    if _HUNG_UP.search(text):
        return FailureKind.worker_killed  # an echo is the cause only where the rank that died left nothing behind
    if cause.type == ServiceUnavailable.__name__:
        return FailureKind.service  # also with a traceback: only our own code raises it
    if cause.traceback:
        return FailureKind.user_bug
    if _NODE_LOST.search(text):
        return FailureKind.node_lost
    if _NOT_STARTED.search(text):
        return FailureKind.unknown
    # Looked at after the memory patterns: Ray's text about a dead process guesses at the kernel's OOM killer, too.
    return FailureKind.worker_killed if _KILLED.search(text) else FailureKind.unknown


def _what(kind: FailureKind, cause: Evidence) -> str:
    if kind is FailureKind.worker_killed:
        if is_echo(cause):
            return "another rank's process died without a word; this is how it was noticed"
        return "the worker process died without a word"
    if kind is FailureKind.node_lost:
        return "the node was lost"
    if _NOT_STARTED.search(cause.message):
        return f"a process could not start: {cause.message.strip().splitlines()[-1].strip()}"
    first_line = next((line for line in cause.message.splitlines() if line.strip()), "")
    return f"{cause.type}: {first_line}" if first_line else cause.type


def _hint(kind: FailureKind, cause: Evidence) -> str:
    if kind is FailureKind.out_of_memory:
        return "Use a smaller batch, or more memory per worker."
    if kind is FailureKind.worker_killed:
        return "Killed by the kernel for memory (`dmesg` on that host tells), by a person, or crashed in native code."
    if kind is FailureKind.node_lost:
        return "The host went away; the run can go on elsewhere from its newest checkpoint."
    return _last_user_line(cause.traceback)


def is_echo(evidence: Evidence) -> bool:
    return bool(_ECHO.search(f"{evidence.type}: {evidence.message}"))


def _last_user_line(traceback: str) -> str:
    """Where in the user's own files the exception came from."""
    frames = re.findall(r'File "([^"]+)", line (\d+), in (\S+)', traceback)
    own = [frame for frame in frames if "site-packages" not in frame[0] and "/orchestrator/" not in frame[0]]
    if not own:
        return ""
    file, line, function = own[-1]
    return f"Raised in {function} at {file}:{line}."
