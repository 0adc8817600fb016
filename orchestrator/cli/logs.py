"""`orc logs`: what a run's processes and our services wrote. Needs neither Ray nor the driver, nor the database."""

from __future__ import annotations

import argparse
import heapq
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator import json_logs
from orchestrator.catalog import Catalog, LogFiles
from orchestrator.catalog.logs import DRIVER, STACKS, STRUCTURED, StoredLogs, kind_of
from orchestrator.cli import logfiles, text
from orchestrator.cli.access import asked_catalog, told_url
from orchestrator.cli.output import Output
from orchestrator.cli.parser import UsageError
from orchestrator.errors import ServiceUnavailable, UserError
from orchestrator.stack import Stack

POLL = 0.3
"""Seconds between two looks at the files while following."""
LOOKS_PER_STATUS = 7
"""Looks at the files between two questions whether the run has ended."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Logged:
    """A run whose logs are read, and how to learn that it ended."""

    run: str
    name: str
    attempt: int
    """The current one."""
    files: LogFiles
    has_ended: Callable[[], bool]


def logs(arguments: argparse.Namespace, output: Output) -> int:
    if arguments.follow and arguments.json:
        raise UsageError("--follow prints lines as they come, --json one document at the end: choose one.")
    if arguments.rank not in ("", "all") and not arguments.rank.isdecimal():
        raise UsageError(f"--rank {arguments.rank}: a rank is a number from 0 up, or `all`.")
    if arguments.service:
        return _service(arguments, output)
    with _logged(arguments, output) as run:
        is_coming = arguments.follow and not run.has_ended()
        attempt = max(1, run.attempt) if is_coming else _attempt(run, arguments.attempt)
        kind = STACKS if arguments.stacks else STRUCTURED if arguments.structured else ""
        rank = arguments.rank or ("all" if arguments.stacks else "")
        show = Lines(run.files, attempt, rank, arguments.tail, kind=kind)
        if arguments.follow:
            follow(show, output, run.has_ended, time.sleep)
            return 0
        names = _wanted(show, run)
        if arguments.json:
            output.result(_document(run, show, names), lambda: None)
            return 0
        output.result(None, lambda: _print(output, show.all(names)))
    return 0


class Lines:
    """Chosen log files of one attempt. `all` reads them once, `news` what was added since the last time.

    `kind` is STRUCTURED, STACKS, or "" for text.
    """

    def __init__(self, files: LogFiles, attempt: int, rank: str, tail: int | None = None, *, kind: str = "") -> None:
        self.files, self.attempt, self.rank, self.kind = files, attempt, rank, kind
        self._readers: dict[str, logfiles.Reader] = {}
        self._tail = tail
        for name in self.names():
            self._reader(name)
        self._tail = None  # who appears later is read from its beginning

    def names(self) -> list[str]:
        known = [name for name in self.files.sources(self.attempt) if kind_of(name) == self.kind]
        return selected([name.removesuffix(self.kind) for name in known], self.rank)

    def source(self, name: str) -> str:
        return f"{name}{self.kind}"

    def of(self, name: str) -> Iterator[str]:
        """All lines of one source, as they stand in its file."""
        return self._reader(name).lines(is_final=True)

    def all(self, names: Sequence[str]) -> Iterator[str]:
        if self.kind == STRUCTURED:
            return heapq.merge(*(self.of(name) for name in names), key=json_logs.time_of)
        return (self._labelled(name, line) for name in names for line in self.of(name))

    def news(self, *, is_final: bool) -> list[str]:
        lines = ((name, line) for name in self.names() for line in self._reader(name).lines(is_final=is_final))
        if self.kind == STRUCTURED:
            return sorted((line for _, line in lines), key=json_logs.time_of)
        return [self._labelled(name, line) for name, line in lines]

    def _labelled(self, name: str, line: str) -> str:
        """One rank alone speaks plainly, and stacks say whose they are; several sources say who they are."""
        is_plain = self.kind == STACKS or self.rank not in ("", "all")
        return line if is_plain else f"{name} | {line}"

    def _reader(self, name: str) -> logfiles.Reader:
        if name not in self._readers:
            file = logfiles.RunLog(self.files, self.attempt, self.source(name))
            self._readers[name] = logfiles.reader(file, self._tail)
        return self._readers[name]


def follow(lines: Lines, output: Output, has_ended: Callable[[], bool], sleep: Callable[[float], None]) -> None:
    """Prints what is added to the files, also of ranks that appear later, until the run has ended."""
    while not has_ended():
        for _ in range(LOOKS_PER_STATUS):
            _print(output, lines.news(is_final=False))
            sleep(POLL)
    _print(output, lines.news(is_final=True))  # after the end was seen, so that nothing written before it is missed


def _print(output: Output, lines: Iterator[str] | Sequence[str]) -> None:
    for line in lines:
        output.line(line)
    output.stdout.flush()


def selected(available: list[str], rank: str) -> list[str]:
    """The driver and rank 0 when nothing is asked for; the driver is no rank."""
    if rank == "all":
        return available
    if rank:
        return [name for name in available if name == f"rank-{rank}"]
    return [name for name in available if name in (DRIVER, "rank-0")]


# -- which run


@contextmanager
def _logged(arguments: argparse.Namespace, output: Output) -> Iterator[Logged]:
    """From the catalog; where that does not answer, from the directories alone."""
    with ExitStack() as stack:
        try:
            catalog = stack.enter_context(asked_catalog(arguments))
            found = _from_catalog(catalog, arguments.run, output)
        except ServiceUnavailable as error:
            if told_url(arguments):
                raise
            found = _from_directories(arguments, output, error)
        yield found


def _from_catalog(catalog: Catalog, reference: str, output: Output) -> Logged:
    run = catalog.run(reference)

    def has_ended() -> bool:
        try:
            return catalog.run(run.run).status.is_terminal
        except ServiceUnavailable as error:
            output.message(f"orc: {error}")
            return True

    return Logged(
        run=run.run, name=run.name, attempt=run.attempt, files=catalog.logs(run.run), has_ended=has_ended
    )  # fmt: skip


def _from_directories(arguments: argparse.Namespace, output: Output, why: ServiceUnavailable) -> Logged:
    from orchestrator.backends.storage import Storage
    from orchestrator.directory import finder

    stack = Stack.find(arguments.home)
    if stack is None or not stack.storage_url:
        raise why
    storage = Storage(stack.storage_url)
    output.message(f"orc: the database is not up; reading the directories in {storage.uri()}")
    found = finder.find(storage, arguments.run)

    def has_ended() -> bool:
        return finder.look(storage, (found.run, found.experiment)).is_over

    if arguments.follow and not has_ended():
        output.message("orc: its driver has not said that it ended; ctrl-C stops following")
    return Logged(
        run=found.run, name=found.name, attempt=found.attempt, files=StoredLogs(found.directory), has_ended=has_ended
    )


def _attempt(run: Logged, asked: int | None) -> int:
    found = run.files.attempts()
    if not found:
        why = "its processes have not started, or the directory was removed."
        raise UserError(f"Run {run.name} has no logs in {run.files.uri()}: {why}")
    if asked is not None and asked not in found:
        raise UserError(f"Run {run.name} has no logs of attempt {asked}. There are: {', '.join(map(str, found))}.")
    return asked or found[-1]


def _wanted(lines: Lines, run: Logged) -> list[str]:
    names = lines.names()
    if not names:
        has = ", ".join(lines.files.sources(lines.attempt)) or "none"
        what = {STACKS: "stacks", STRUCTURED: "JSON lines"}.get(lines.kind, "log")
        whose = "any rank" if lines.rank == "all" else f"rank {lines.rank or 0}"
        why = " Stacks are written when a run hangs." if lines.kind == STACKS else ""
        raise UserError(f"Attempt {lines.attempt} of run {run.name} has no {what} of {whose}.{why} There is: {has}.")
    return names


def _document(run: Logged, lines: Lines, names: Sequence[str]) -> dict[str, Any]:
    files = [
        {"source": name, "uri": lines.files.uri(lines.attempt, lines.source(name)), "lines": list(lines.of(name))}
        for name in names
    ]
    return {"run": run.run, "name": run.name, "attempt": lines.attempt, "logs": files}


# -- services


def _service(arguments: argparse.Namespace, output: Output) -> int:
    stack = Stack.load(arguments.home)
    path = _service_log(stack, arguments.service)
    reader = logfiles.reader(logfiles.LocalLog(path), arguments.tail)

    def lines(*, is_final: bool = True) -> Iterator[str]:
        if reader.offset > path.stat().st_size:
            reader.offset = 0  # a new file was begun
        shown = reader.lines(is_final=is_final)
        return shown if arguments.structured else map(json_logs.as_text, shown)

    if arguments.follow:
        while True:
            _print(output, lines(is_final=False))
            time.sleep(POLL)
    if arguments.json:
        output.result({"service": arguments.service, "uri": str(path), "lines": list(lines())}, lambda: None)
    else:
        output.result(None, lambda: _print(output, lines()))
    return 0


def _service_log(stack: Stack, service: str) -> Path:
    """By its name or the beginning of it; structured where a service writes both."""
    directories = (Path(stack.home) / "logs", Path(stack.spool_directory or stack.home) / ".logs")
    found: dict[str, Path] = {}
    for ending in (".log", json_logs.ENDING):
        for directory in directories:
            found |= {path.stem: path for path in directory.glob(f"*{ending}")}
    matching = [name for name in sorted(found) if name == service] or [
        n for n in sorted(found) if n.startswith(service)
    ]
    if len(matching) == 1:
        return found[matching[0]]
    near = text.did_you_mean(text.nearest(service, found))
    has = ", ".join(matching or sorted(found)) or f"none yet in {directories[0]}"
    raise UsageError(f"--service {service}: which one?{near} There are: {has}.")
