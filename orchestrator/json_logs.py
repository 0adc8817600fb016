"""Structured logs: one JSON object a line, of ranks and drivers in the run's directory, of services in the data
directory; and which component speaks in more detail.

A line has `time` (seconds since 1970), `level`, `logger`, `message`, `host`, `pid`, of a run also `run`, `attempt` and
`rank` (-1: the driver), where it is known `step`, what was printed also `stream`, an exception also `traceback`.
Secrets are taken out before a line is made (see config/redaction.py).
"""

from __future__ import annotations

import difflib
import json
import logging
import os
import socket
import time
import traceback
from collections.abc import Iterable, Mapping, Sequence
from logging.handlers import RotatingFileHandler
from pathlib import Path
from types import MappingProxyType
from typing import Any

from orchestrator.errors import ConfigError

ENDING = ".jsonl"

RUN_COMPONENTS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {"driver": ("orchestrator",), "worker": ("orchestrator",)}
)
"""What a run's `tracking.debug` may name, and the loggers of each in its own process."""

SERVICE_COMPONENTS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "tracker": ("orchestrator",),
        # These two share a process.
        "mirror": ("orchestrator.tracking", "orchestrator.backends.mlflow"),
        "directory": ("orchestrator.directory",),
        "node": ("orchestrator",),
        "checkpoints": ("orchestrator",),
        "api": ("orchestrator",),
    }
)
"""The same for `orc up tracking.debug=…`."""

ROTATE_BYTES, KEPT = 8 << 20, 3
"""A service's log is begun anew after so many bytes; so many older ones are kept."""

TEXT_FORMAT = "%(asctime)s %(levelname)s %(name)s %(message)s"

_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


def check_components(key: str, named: Iterable[str], known: Iterable[str]) -> None:
    """Raises ConfigError for a name that is no component, naming the nearest."""
    known = list(known)
    for name in named:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
            hint = f"Did you mean {near[0]}? " if near else ""
            raise ConfigError(key, name, "is no component.", f"{hint}There are {', '.join(known)}.")


def debug(components: Iterable[str], *named: str) -> None:
    """Lets those of this process's components that are `named` speak in detail."""
    for component in set(components) & set(named):
        for logger in RUN_COMPONENTS.get(component, ()) or SERVICE_COMPONENTS.get(component, ()):
            logging.getLogger(logger).setLevel(logging.DEBUG)


class Lines:
    """Makes the lines of one process (and those forked from it). `identity` is in each of them."""

    def __init__(self, identity: Mapping[str, Any]) -> None:
        self._identity = {**identity, "host": socket.gethostname()}

    def line(self, *, at: float, level: str, logger: str, message: str, more: Mapping[str, Any]) -> str:
        fields = {"time": round(at, 6), "level": level, "logger": logger, "message": message}
        return _text({**fields, **self._identity, "pid": os.getpid(), **more})

    def printed(self, text: str, stream: str) -> str:
        return self.line(at=time.time(), level="INFO", logger="", message=text, more={"stream": stream})


class JsonFormatter(logging.Formatter):
    """A log record as one line; what was passed as `extra` stands beside the rest."""

    def __init__(self, identity: Mapping[str, Any]) -> None:
        super().__init__()
        self._lines = Lines(identity)

    def format(self, record: logging.LogRecord) -> str:
        # Ray puts a time of its own into each record.
        more = {k: value for k, value in vars(record).items() if k not in _STANDARD and not k.startswith("_")}
        trace = record.exc_text or (
            "".join(traceback.format_exception(*record.exc_info)).rstrip() if record.exc_info else ""
        )
        if trace:
            more["traceback"] = trace
        return self._lines.line(
            at=record.created, level=record.levelname, logger=record.name, message=record.getMessage(), more=more
        )


def _text(fields: Mapping[str, Any]) -> str:
    return json.dumps(fields, ensure_ascii=False, default=str)


def keep_service_log(
    service: str, directories: Sequence[Path], *, secrets: Iterable[str] = (), components: Iterable[str] = ()
) -> Path | None:
    """Lets this process log to stderr, as text, and to `<service>.jsonl` in the first directory that takes it.

    That file outlives what keeps stderr (Ray's session). None: no directory took it; there is a warning then.
    """
    from orchestrator.config.redaction import SecretFilter

    logging.basicConfig(level=logging.INFO, format=TEXT_FORMAT)
    root = logging.getLogger()
    hide = SecretFilter(tuple(secrets))
    for handler in root.handlers:
        handler.addFilter(hide)
    debug(components, *components)
    problem: OSError | None = None
    for directory in directories:
        path = directory / f"{service}{ENDING}"
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            handler = RotatingFileHandler(
                path, maxBytes=ROTATE_BYTES, backupCount=KEPT, encoding="utf-8", errors="backslashreplace"
            )
        except OSError as error:
            problem = error
            continue
        handler.setFormatter(JsonFormatter({"service": service}))
        handler.addFilter(hide)
        root.addHandler(handler)
        logging.getLogger(__name__).info("%s begins, process %d", service, os.getpid())
        return path
    logging.getLogger(__name__).warning("%s has no log of its own: %s", service, problem)
    return None


def as_text(line: str) -> str:
    """A structured line as a person reads it; what is none stays as it is."""
    try:
        entry = json.loads(line)
        at, message = float(entry["time"]), str(entry["message"])
    except (ValueError, TypeError, KeyError):
        return line
    moment = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(at)) + f",{int(at % 1 * 1000):03d}"
    shown = " ".join(filter(None, [moment, entry.get("level"), entry.get("logger"), message]))
    return "\n".join(filter(None, [shown, entry.get("traceback", "")]))


def time_of(line: str) -> float:
    """When a structured line was written; 0 for what is none."""
    try:
        return float(json.loads(line)["time"])
    except (ValueError, TypeError, KeyError):
        return 0.0
