"""The log files of a run's processes: what is printed and logged, as text and as JSON lines beside it.

Cheap for training: a line is written when it is whole, no thread, no lock, no network. Secrets are taken out before
anything is written anywhere.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TextIO

from orchestrator.config import SecretFilter, redact_text
from orchestrator.failures.classify import Evidence
from orchestrator.json_logs import ENDING, TEXT_FORMAT, JsonFormatter, Lines, debug
from orchestrator.records import RunTicket

LONGEST_PART = 8192
"""Characters of an unfinished line that are kept for the JSON lines, from its last carriage return on: a progress bar
never ends its line."""
LOG_LINES = 200
"""Last lines of a log that go with a failure."""
_TAIL_BYTES = 1 << 16


def structured(path: Path) -> Path:
    """Of the text log `rank-0.log`: `rank-0.jsonl`, beside it."""
    return path.with_suffix(ENDING)


@contextlib.contextmanager
def rank_log(
    path: Path, ticket: RunTicket, rank: int, *, secrets: Sequence[str] = (), components: Iterable[str] = ()
) -> Iterator[None]:
    """Sends what this process prints and logs to `path` and the JSON lines beside it as well, without secrets."""
    secrets = tuple(secrets)
    identity = {"run": ticket.run, "attempt": ticket.attempt, "rank": rank}
    path.parent.mkdir(parents=True, exist_ok=True)
    with _appended(path) as file, _appended(structured(path)) as json_file:
        out, err = sys.stdout, sys.stderr
        json_stream, lines = _Unbreakable(json_file), Lines(identity)
        printed = [_Printed(json_stream, lines, name) for name in ("stdout", "stderr")]
        sys.stdout = _Tee(out, file, secrets, printed[0])  # type: ignore[assignment]
        sys.stderr = _Tee(err, file, secrets, printed[1])  # type: ignore[assignment]
        # One handler into what goes to both, the stream and the text: those that Ray put there would write each line a
        # second time. What is logged is not printed, so that it stands once among the JSON lines.
        as_text = logging.StreamHandler(_Tee(err, file, secrets))  # type: ignore[type-var]
        as_text.setFormatter(logging.Formatter(TEXT_FORMAT))
        as_json = logging.StreamHandler(json_stream)  # type: ignore[type-var]
        as_json.setFormatter(JsonFormatter(identity))
        for handler in (as_text, as_json):
            handler.addFilter(SecretFilter(secrets))
        root, ours = logging.getLogger(), logging.getLogger("orchestrator")
        handlers, level, our_level = root.handlers, root.level, ours.level
        root.handlers = [as_text, as_json]
        root.setLevel(min(level, logging.INFO))
        debug(components, "worker")
        try:
            yield
        finally:
            for stream in printed:
                stream.end()
            root.handlers = handlers
            root.setLevel(level)
            ours.setLevel(our_level)
            sys.stdout, sys.stderr = out, err


def with_log(evidence: Evidence, path: Path) -> Evidence:
    """With the last lines of the rank's log, where it can be read from here."""
    try:
        with path.open("rb") as file:
            file.seek(max(path.stat().st_size - _TAIL_BYTES, 0))
            lines = file.read().decode(errors="replace").splitlines()
    except OSError:
        return evidence
    more = [line for line in evidence.log.splitlines() if line not in lines]  # what native code wrote
    return replace(evidence, log="\n".join([*lines[-LOG_LINES:], *more[-LOG_LINES:]]))


@contextlib.contextmanager
def driver_log(
    path: Path, ticket: RunTicket, *, secrets: Sequence[str] = (), components: Iterable[str] = ()
) -> Iterator[None]:
    """What the driver logs goes to `path` and the JSON lines beside it as well."""
    path.parent.mkdir(parents=True, exist_ok=True)
    as_text = logging.FileHandler(path, encoding="utf-8", errors="backslashreplace")
    as_text.setFormatter(logging.Formatter(TEXT_FORMAT))
    as_json = logging.FileHandler(structured(path), encoding="utf-8", errors="backslashreplace")
    as_json.setFormatter(JsonFormatter({"run": ticket.run, "attempt": ticket.attempt, "rank": -1}))
    ours = logging.getLogger("orchestrator")
    level = ours.level
    for handler in (as_text, as_json):
        handler.addFilter(SecretFilter(tuple(secrets)))
        ours.addHandler(handler)
    ours.setLevel(logging.INFO)
    debug(components, "driver")
    try:
        yield
    finally:
        for handler in (as_text, as_json):
            ours.removeHandler(handler)
            handler.close()
        ours.setLevel(level)


def _appended(path: Path) -> TextIO:
    """Takes every text, in every locale; what UTF-8 has no bytes for is escaped, as JSON wants it, too."""
    return path.open("a", buffering=1, encoding="utf-8", errors="backslashreplace")


class _Tee:
    """A text stream that writes to two. The log files must never break the user's print."""

    def __init__(self, stream: TextIO, file: TextIO, secrets: tuple[str, ...], printed: _Printed | None = None) -> None:
        self._stream, self._file, self._secrets, self._printed = stream, file, secrets, printed

    def write(self, text: str) -> int:
        # Ray keeps what goes to the real stream in its session's logs, so a secret must not go there either.
        shown = redact_text(text, self._secrets) if self._secrets else text
        with contextlib.suppress(OSError, ValueError):
            self._file.write(shown)
        if self._printed is not None:
            self._printed.take(shown)
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


class _Printed:
    """What is printed on one stream, line by line. Each thread has an unfinished line of its own: no lock, which a
    forked process might find taken for ever.
    """

    def __init__(self, file: _Unbreakable, lines: Lines, stream: str) -> None:
        self._file, self._lines, self._stream = file, lines, stream
        self._part = threading.local()

    def take(self, text: str) -> None:
        *whole, part = (self._unfinished() + text).split("\n")
        if len(part) > LONGEST_PART:
            before, _, part = part.rpartition("\r")
            if not before:
                whole, part = [*whole, part], ""
        self._part.text, self._part.pid = part, os.getpid()
        self._write(whole)

    def end(self) -> None:
        """Nothing more will come from this thread."""
        self._write([self._unfinished()])
        self._part.text = ""

    def _unfinished(self) -> str:
        # What the parent of a forked process had not finished is the parent's.
        return self._part.text if getattr(self._part, "pid", 0) == os.getpid() else ""

    def _write(self, whole: Sequence[str]) -> None:
        shown = (line.rstrip("\r").rpartition("\r")[2] for line in whole)
        if text := "".join(f"{self._lines.printed(line, self._stream)}\n" for line in shown if line):
            self._file.write(text)


class _Unbreakable:
    """A file whose full disk nobody who prints or logs shall notice."""

    def __init__(self, file: TextIO) -> None:
        self._file = file

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError, ValueError):
            self._file.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            self._file.flush()
