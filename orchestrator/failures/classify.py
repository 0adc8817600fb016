"""From what the ranks left behind to one cause. Pure: evidence in, finding out.

When one rank fails, the others fail too, a moment later, in a collective. The finding names the first cause, not the
echoes. What each wording means stands in rules.py.
"""

from __future__ import annotations

import re
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from orchestrator.errors import OrchestratorError, RunFailed
from orchestrator.failures.rules import (
    EXITED,
    GENERIC_ECHO,
    MENDED_BY_RESTART,
    RULES,
    SIGNALS,
    Blame,
    FailureKind,
    Pattern,
    Rule,
    signal_of,
)
from orchestrator.records import RunStatus

__all__ = [
    "MENDED_BY_RESTART",
    "Evidence",
    "FailureKind",
    "Finding",
    "Pattern",
    "RankFailed",
    "RanksFailed",
    "first_cause",
    "is_echo",
]


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
    exit_code: int | None = None
    """Of a process that ended without a word; negative: the signal, as `subprocess` has it. 137 and 143 mean signals,
    too: shells, Slurm and Kubernetes add 128."""
    log: str = ""
    """Its last lines."""
    kind: str = ""
    """Of FailureKind or a name of the user's, where who raised it knew; "" otherwise."""
    node: str = ""
    """The cluster's id of the rank's node; "" where nobody knows, or where there is no cluster."""
    details: Mapping[str, Any] = field(default_factory=dict)
    """What who raised it knew besides, as JSON; part of the stored error."""


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

    kind: str
    """Of FailureKind, or a name of the user's."""
    status: RunStatus
    what: str
    """One line."""
    evidence: Evidence
    """What tells of it; of the rank that failed, or of one that waited for that in vain."""
    hint: str
    is_restart_useful: bool
    rank: int
    """The one that failed first, as far as anybody can tell; -1: the driver."""
    wish: str = ""
    """What a pattern of the user's wants done, see `rules.Pattern`."""
    avoids_node: bool = False
    """Whether such a pattern blames the node."""

    @property
    def reason(self) -> str:
        """One line: what, and where."""
        where = "in the driver" if self.rank < 0 else f"on rank {self.rank}"
        host = f" ({self.host})" if self.host else ""
        return f"{self.what} {where}{host}"[:1000]

    @property
    def host(self) -> str:
        return self.evidence.host if self.rank == self.evidence.rank else ""

    @property
    def node(self) -> str:
        return self.evidence.node if self.rank == self.evidence.rank else ""

    def error(self) -> dict[str, Any]:
        """The form in which it is stored."""
        evidence = self.evidence
        more = {"node": self.node, "wish": self.wish, "avoids_node": self.avoids_node}
        return {
            **evidence.details,
            "kind": str(self.kind),
            "type": evidence.type,
            "message": evidence.message,
            "rank": self.rank,
            "host": self.host,
            "step": evidence.step,
            "what": self.what,
            "traceback": evidence.traceback,
            "hint": self.hint,
            "is_restart_useful": self.is_restart_useful,
            **{name: value for name, value in more.items() if value},
        }


def first_cause(evidence: Sequence[Evidence], *, patterns: Sequence[Pattern] = (), world_size: int = 0) -> Finding:
    """The finding for an attempt that failed. `evidence` is not empty. `world_size` is the number of ranks where known:
    a rank for which others waited in vain and that said nothing is the one that failed.
    """
    whole = [_with_own_words(each) for each in evidence]
    found = [(each, _verdict(each, patterns)) for each in whole]
    cause, verdict = min(found, key=lambda pair: (pair[1].blame, pair[0].at, pair[0].rank))
    rank = cause.rank if verdict.rank is None else verdict.rank
    if verdict.blame is Blame.waited and verdict.rank is None:
        silent = set(range(world_size)) - {each.rank for each in whole}
        rank = min(silent) if silent else rank
    what = _what(verdict, cause)
    if rank != cause.rank:
        what = f"rank {cause.rank} waited for it in vain; {what}"
    return Finding(
        kind=verdict.kind, status=_status(verdict.kind), what=what, evidence=cause, hint=verdict.hint,
        is_restart_useful=verdict.is_restart_useful, rank=rank, wish=verdict.wish, avoids_node=verdict.avoids_node,
    )  # fmt: skip


def is_echo(evidence: Evidence) -> bool:
    """Whether this rank rather saw another one fail, or waited for one, than failed itself."""
    return _verdict(_with_own_words(evidence), ()).blame is not Blame.cause


@dataclass(frozen=True, slots=True, kw_only=True)
class _Verdict:
    """What one rank's evidence means by itself."""

    kind: str
    hint: str = ""
    blame: Blame = Blame.cause
    is_restart_useful: bool = False
    rank: int | None = None
    """The rank that the words accuse, if any."""
    wish: str = ""
    avoids_node: bool = False


_HERE = re.compile(
    r"/orchestrator/(actors|alerts|api|backends|catalog|checkpoints|cli|config|directory|execution|failures|monitoring"
    r"|provenance|store|sweeps|tracking|training)/"
)
_DELIBERATE = re.compile(r"^orchestrator\.[\w.]+(:|$)", re.MULTILINE)
"""One of our own exceptions: raised to tell the user something."""
_FRAME = re.compile(r'^ *File "([^"]+)", line (\d+), in (\S+)\n?(?: {4,}(.*))?', re.MULTILINE)
_LINE_OF_EXCEPTION = re.compile(r"^([A-Za-z_][\w.]*(?:Error|Exception|Interrupt|Exit|Warning|[A-Z]\w*))(?:: (.*))?$")
_FAULT = re.compile(r'^ *File "([^"]+)", line (\d+) in (\S+)', re.MULTILINE)
"""A line of faulthandler's, the innermost frame first."""
_FOREIGN = re.compile(rf"site-packages|/lib/python3\.\d+/|^<|{_HERE.pattern}")
_MOST = 4000
"""Characters at either end of a message that are looked at."""
_LAST_LINES = 20
"""Of a log, in which a rule looks for why the process died: what it had printed long before, it had survived."""
_NOT_STARTED = re.compile(r"raised in its creation task", re.IGNORECASE)
"""Ray's word for a process of ours that could not even begin, most often because it cannot import something."""
_CHAINED = re.compile(
    r"\n+(?:The above exception was the direct cause of|During handling of the above exception,)[^\n]*\n+"
)
_UNCAUGHT = "Traceback (most recent call last):"
_CRASHED = (FailureKind.worker_killed, FailureKind.node_lost, FailureKind.preemption)


def _status(kind: str) -> RunStatus:
    if kind == FailureKind.cancelled:
        return RunStatus.cancelled
    return RunStatus.crashed if kind in _CRASHED else RunStatus.failed


def _with_own_words(evidence: Evidence) -> Evidence:
    """An exception that nobody caught, which the process printed before it exited, is as good as one that was told."""
    if evidence.traceback or evidence.exit_code is None or evidence.exit_code <= 0 or _UNCAUGHT not in evidence.log:
        return evidence
    lines = evidence.log.strip().splitlines()
    last = _LINE_OF_EXCEPTION.match(lines[-1])
    if last is None:
        return evidence
    traceback = _UNCAUGHT + evidence.log.rpartition(_UNCAUGHT)[2]
    return replace(evidence, type=last[1].rpartition(".")[2], message=last[2] or "", traceback=traceback)


def _verdict(evidence: Evidence, patterns: Sequence[Pattern]) -> _Verdict:
    """In this order: what who raised it knew; the users' patterns; the rules. Whatever the kind, a pattern may say what
    is to be done."""
    said = _bounded(f"{evidence.type}: {evidence.message}")
    pattern = _matching(patterns, said, evidence.log)
    if evidence.kind:
        mends = evidence.kind in MENDED_BY_RESTART
        verdict = _Verdict(kind=evidence.kind, hint=_last_user_line(evidence.traceback), is_restart_useful=mends)
    elif pattern and pattern.kind:
        mends = pattern.kind in MENDED_BY_RESTART
        verdict = _Verdict(kind=pattern.kind, hint=pattern.hint, is_restart_useful=mends)
    else:
        verdict = _by_rules(evidence, said)
    if pattern is None:
        return verdict
    # What the user knows of beforehand is the cause, not what others saw of it.
    hint = pattern.hint or verdict.hint
    return replace(verdict, blame=Blame.cause, hint=hint, wish=pattern.action, avoids_node=pattern.avoid_node)


def _matching(patterns: Sequence[Pattern], said: str, log: str) -> Pattern | None:
    """The first that knows the message or one of the last log lines."""
    lines = log.splitlines() if patterns else []
    for pattern in patterns:
        if pattern.match.search(said) or any(pattern.match.search(line) for line in lines):
            return pattern
    return None


def _by_rules(evidence: Evidence, said: str) -> _Verdict:
    """In this order: what was said; what caused it; the last log lines of the dead; the exit code, or what others say
    of the dead; whose code raised it."""
    told = [rule for rule in RULES if not rule.of_dead]
    for text in (said, *_causes(evidence.traceback)):
        if found := _first(told, _bounded(text), evidence):
            return found
    if evidence.traceback:
        return _of_code(evidence, said)
    last = "\n".join(evidence.log.splitlines()[-_LAST_LINES:])
    if found := _first([rule for rule in RULES if rule.in_log], last, evidence):
        return found
    if evidence.exit_code is not None:
        return _of_exit(evidence.exit_code, evidence.log)
    obituary = _first([rule for rule in RULES if rule.of_dead], said, evidence)
    return obituary or _Verdict(kind=FailureKind.unknown, blame=_blame(said))


def _bounded(text: str) -> str:
    """Its beginning and end: an exception may quote a whole file, and patterns take longer than linear time."""
    return text if len(text) <= 2 * _MOST else f"{text[:_MOST]}\n{text[-_MOST:]}"


def _first(rules: Sequence[Rule], text: str, evidence: Evidence) -> _Verdict | None:
    for rule in rules:
        if match := rule.match.search(text):
            return _of_rule(rule, match, evidence)
    return None


def _of_rule(rule: Rule, match: re.Match[str], evidence: Evidence) -> _Verdict:
    mends = rule.is_restart_useful
    return _Verdict(
        kind=rule.kind,
        hint=" ".join(filter(None, [rule.hint, _last_user_line(evidence.traceback)])),
        blame=rule.blame,
        is_restart_useful=rule.kind in MENDED_BY_RESTART if mends is None else mends,
        rank=int(match[rule.rank]) if rule.rank else None,
    )


def _blame(said: str) -> Blame:
    return Blame.echo if GENERIC_ECHO.search(said) else Blame.cause


def _of_exit(exit_code: int, log: str) -> _Verdict:
    """Of a process of which only the exit code is left."""
    number = signal_of(exit_code)
    if not number:
        return _Verdict(kind=FailureKind.worker_killed, hint=EXITED, is_restart_useful=exit_code != 0)
    kind, hint = SIGNALS.get(number, (FailureKind.worker_killed, ""))
    hint = " ".join(filter(None, [hint, _last_user_line(log)]))
    return _Verdict(kind=kind, hint=hint, is_restart_useful=kind in MENDED_BY_RESTART)


def _of_code(evidence: Evidence, said: str) -> _Verdict:
    """Of an exception whose wording no rule knows: a bug of who raised it."""
    blame = _blame(said)
    if _is_ours(evidence.traceback):
        hint = "A defect of the orchestrator, not of your code: please report it with this traceback."
        return _Verdict(kind=FailureKind.our_bug, hint=hint, blame=blame)
    return _Verdict(kind=FailureKind.user_bug, hint=_last_user_line(evidence.traceback), blame=blame)


def _causes(traceback: str) -> list[str]:
    """The exceptions behind the last one, nearest first, as `Type: message`."""
    found = []
    for part in reversed(_CHAINED.split(traceback)[:-1]):
        lines = part.splitlines()
        frames = [number for number, line in enumerate(lines) if line.startswith("  ")]
        if frames and (first := "\n".join(lines[frames[-1] + 1 :]).strip()):
            kind, colon, message = first.partition(":")
            found.append(f"{kind.rpartition('.')[2]}{colon}{message}")
    return found


def _is_ours(traceback: str) -> bool:
    """The very last frame is ours, and neither raises on purpose nor just calls the user's function."""
    frames = _FRAME.findall(traceback)
    if not frames or not _HERE.search(frames[-1][0]) or _DELIBERATE.search(traceback):
        return False
    source = frames[-1][3]
    return not source.startswith("raise ") and "function(run," not in source


def _what(verdict: _Verdict, cause: Evidence) -> str:
    number = signal_of(cause.exit_code or 0)
    if verdict.kind == FailureKind.worker_killed and verdict.blame is Blame.echo:
        return "another rank's process died without a word; this is how it was noticed"
    if not cause.traceback and number:
        return f"the worker process died of {_signal_name(number)}"
    if verdict.kind == FailureKind.worker_killed and not cause.traceback and cause.exit_code is None:
        return "the worker process died without a word"
    if verdict.kind == FailureKind.node_lost and not cause.traceback:
        return "the node was lost"
    if _NOT_STARTED.search(cause.message):
        return f"a process could not start: {cause.message.strip().splitlines()[-1].strip()}"
    first_line = next((line for line in cause.message.splitlines() if line.strip()), "")
    if cause.kind and cause.type == RunFailed.__name__:
        return first_line
    return f"{cause.type}: {first_line}" if first_line else cause.type


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _last_user_line(text: str) -> str:
    """Where in the user's own files it came from: of a traceback, or of what faulthandler leaves of a dead process."""
    told = [(file, line, function) for file, line, function, _ in _FRAME.findall(text)]
    own = [frame for frame in [*told[::-1], *_FAULT.findall(text)] if not _FOREIGN.search(frame[0])]
    if not own:
        return ""
    file, line, function = own[0]
    return f"Raised in {function} at {file}:{line}." if told else f"In {function} at {file}:{line}."
