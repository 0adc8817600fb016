"""Errors that a user meets. Each says what, where, probably why, and what to do; none needs a traceback to be
understood.

`UserError`s end a command with exit code 2 and one message. Everything else is a defect of ours and shows its
traceback.
"""

from __future__ import annotations


class OrchestratorError(Exception):
    """Base of all our errors."""


class UserError(OrchestratorError):
    """Something the user can mend: a wrong key, a missing file, a server that is not there."""


class ConfigError(UserError):
    """A configuration that cannot run. `key` is the dotted key, `value` what was given, `hint` what to do."""

    def __init__(self, key: str, value: object, why: str, hint: str = "") -> None:
        super().__init__(key, value, why, hint)
        self.key, self.value, self.why, self.hint = key, value, why, hint

    def __str__(self) -> str:
        given = "" if self.value is None else f" = {self.value!r}"
        return f"{self.key}{given}: {self.why}" + (f" {self.hint}" if self.hint else "")


class ServiceUnavailable(UserError):
    """A server we need does not answer. `service` is postgresql, mlflow, ray, tracker …"""

    def __init__(self, service: str, address: str, why: str, hint: str) -> None:
        super().__init__(service, address, why, hint)
        self.service, self.address, self.why, self.hint = service, address, why, hint

    def __str__(self) -> str:
        return f"{self.service} at {self.address} is not reachable: {self.why} {self.hint}"


class SchemaMismatch(UserError):
    """The database's schema is older or newer than this code."""

    def __init__(self, found: str, expected: str, newer: bool) -> None:
        super().__init__(found, expected, newer)
        self.found, self.expected, self.newer = found, expected, newer

    def __str__(self) -> str:
        if self.newer:
            return (
                f"The database has schema {self.found}, which this version does not know (it has {self.expected}). "
                "It was written by a newer version: upgrade this installation."
            )
        if not self.found:
            return (
                f"The database has no tables yet, or not those that this version needs ({self.expected}). "
                "Run `orc db upgrade`; where that was done, restart what still runs the older version."
            )
        return f"The database has schema {self.found}, this version needs {self.expected}. Run `orc db upgrade`."


class NotFound(UserError):
    """No such run, experiment, checkpoint … `nearest` are names that resemble what was asked for."""

    def __init__(self, what: str, name: str, nearest: tuple[str, ...] = ()) -> None:
        super().__init__(what, name, nearest)
        self.what, self.name, self.nearest = what, name, nearest

    def __str__(self) -> str:
        near = f" Did you mean {', '.join(self.nearest)}?" if self.nearest else ""
        return f"There is no {self.what} {self.name!r}.{near} `orc ls` shows what there is."


class AmbiguousName(UserError):
    """More than one run (experiment …) answers to a name. `candidates` are ids of some of them, newest first."""

    def __init__(self, what: str, name: str, candidates: tuple[str, ...]) -> None:
        super().__init__(what, name, candidates)
        self.what, self.name, self.candidates = what, name, candidates

    def __str__(self) -> str:
        return f"{self.name!r} means more than one {self.what}: {', '.join(self.candidates)}. Give the full id."


class RunIsActive(UserError):
    """A run that is still going on cannot get another attempt."""

    def __init__(self, run: str, status: str) -> None:
        super().__init__(run, status)
        self.run, self.status = run, status

    def __str__(self) -> str:
        return (
            f"Run {self.run} is {self.status}: it can be resumed when it has ended. `orc cancel {self.run}` ends it; "
            "if its driver is gone, it is called CRASHED within half a minute."
        )


class RunExists(UserError):
    """An id that was chosen for a new run belongs to one that is over, or to one with another config."""

    def __init__(self, run: str, status: str) -> None:
        super().__init__(run, status)
        self.run, self.status = run, status

    def __str__(self) -> str:
        what = "has FINISHED already" if self.status == "FINISHED" else f"exists ({self.status}) with another config"
        return f"Run {self.run} {what}. Leave --run-id out to get a new run; `orc show {self.run}` tells of that one."


class SweepTaken(UserError):
    """Another driver has a sweep: whoever had it before may not decide anything any more. `driver` is that one's."""

    def __init__(self, sweep: str, driver: str) -> None:
        super().__init__(sweep, driver)
        self.sweep, self.driver = sweep, driver

    def __str__(self) -> str:
        return (
            f"Sweep {self.sweep} is driven by {self.driver or 'nobody'} now and goes on there; this driver ends, its "
            f"trials are not lost. `orc sweep show {self.sweep}` tells how it stands."
        )


class IllegalTransition(UserError):
    """A run cannot go from one status to the other."""

    def __init__(self, run: str, old: str, new: str) -> None:
        super().__init__(run, old, new)
        self.run, self.old, self.new = run, old, new

    def __str__(self) -> str:
        return f"Run {self.run} is {self.old} and cannot become {self.new}."


class BadMetric(UserError, ValueError):
    """A metric key or value that cannot be recorded; names the key."""

    def __init__(self, key: str, why: str) -> None:
        super().__init__(key, why)
        self.key, self.why = key, why

    def __str__(self) -> str:
        return f"metric {self.key!r}: {self.why}"


class RunFailed(OrchestratorError):
    """User code says that the run has failed, and of what: raised by `run.fail`. `failure_kind` is one of
    `failures.rules.FailureKind`, or a name of the user's."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(kind, message)
        self.failure_kind, self.message = kind, message

    def __str__(self) -> str:
        return self.message


class CheckpointError(OrchestratorError):
    """Base of errors about stored checkpoints."""


class CheckpointCorrupt(CheckpointError):
    """A stored checkpoint does not match its manifest."""

    def __init__(self, uri: str, file: str, expected: str, found: str) -> None:
        super().__init__(uri, file, expected, found)
        self.uri, self.file, self.expected, self.found = uri, file, expected, found

    def __str__(self) -> str:
        return (
            f"{self.file} in {self.uri} has hash {self.found}, manifest says {self.expected}. "
            "The previous valid checkpoint will be used."
        )
