"""`orc logs`: what a run's processes printed, from the run's directory. Needs neither Ray nor the driver."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

from orchestrator.backends.storage import Storage
from orchestrator.catalog import open_catalog
from orchestrator.cli import logfiles
from orchestrator.cli.output import Output
from orchestrator.cli.parser import UsageError
from orchestrator.errors import UserError

POLL = 0.3
"""Seconds between two looks at the files while following."""
LOOKS_PER_STATUS = 7
"""Looks at the files between two questions to the database whether the run has ended."""


def logs(arguments: argparse.Namespace, output: Output) -> int:
    if arguments.follow and arguments.json:
        raise UsageError("--follow prints lines as they come, --json one document at the end: choose one.")
    if arguments.rank not in ("", "all") and not arguments.rank.isdecimal():
        raise UsageError(f"--rank {arguments.rank}: a rank is a number from 0 up, or `all`.")
    with open_catalog(arguments.home) as catalog:
        run = catalog.run(arguments.run)
        directory = Storage(run.directory)
        is_coming = arguments.follow and not run.status.is_terminal
        attempt = max(1, run.attempt) if is_coming else _attempt(directory, arguments.attempt, run.name)
        if arguments.follow:
            follower = Follower(directory, attempt, arguments.rank, arguments.tail, output)
            follower.run(lambda: catalog.run(run.run).status.is_terminal, time.sleep)
            return 0
    names = _wanted(directory, attempt, arguments.rank, run.name)
    contents = [(name, _lines(directory, logfiles.path(attempt, name), arguments.tail)) for name in names]

    def render() -> None:
        for name, lines in contents:
            for line in lines:
                output.line(_labelled(name, line, arguments.rank))

    files = [
        {"source": name, "uri": directory.uri(logfiles.path(attempt, name)), "lines": lines} for name, lines in contents
    ]
    output.result({"run": run.run, "name": run.name, "attempt": attempt, "logs": files}, render)
    return 0


class Follower:
    """Prints what is added to the files, also of ranks that appear later, until the run has ended."""

    def __init__(self, directory: Storage, attempt: int, rank: str, tail: int | None, output: Output) -> None:
        self._directory, self._attempt, self._rank, self._output = directory, attempt, rank, output
        self._readers: dict[str, logfiles.Reader] = {}
        for name in selected(logfiles.sources(directory, attempt), rank):
            path = logfiles.path(attempt, name)
            offset = 0 if tail is None else logfiles.tail_offset(directory, path, tail)
            self._readers[name] = logfiles.Reader(directory, path, offset)

    def run(self, has_ended: Callable[[], bool], sleep: Callable[[float], None]) -> None:
        while not has_ended():
            for _ in range(LOOKS_PER_STATUS):
                self.step()
                sleep(POLL)
        self.step(is_final=True)  # after the end was seen, so that nothing written before it is missed

    def step(self, *, is_final: bool = False) -> None:
        for name in selected(logfiles.sources(self._directory, self._attempt), self._rank):
            path = logfiles.path(self._attempt, name)
            reader = self._readers.setdefault(name, logfiles.Reader(self._directory, path))
            for line in reader.lines(is_final=is_final):
                self._output.line(_labelled(name, line, self._rank))
        self._output.stdout.flush()


def selected(available: list[str], rank: str) -> list[str]:
    """The driver and rank 0 when nothing is asked for; the driver is no rank."""
    if rank == "all":
        return available
    if rank:
        return [name for name in available if name == f"rank-{rank}"]
    return [name for name in available if name in (logfiles.DRIVER, "rank-0")]


def _attempt(directory: Storage, asked: int | None, run: str) -> int:
    found = logfiles.attempts(directory)
    if not found:
        why = "its processes have not started, or the directory was removed."
        raise UserError(f"Run {run} has no logs in {directory.uri('logs')}: {why}")
    if asked is not None and asked not in found:
        raise UserError(f"Run {run} has no logs of attempt {asked}. There are: {', '.join(map(str, found))}.")
    return asked or found[-1]


def _wanted(directory: Storage, attempt: int, rank: str, run: str) -> list[str]:
    available = logfiles.sources(directory, attempt)
    names = selected(available, rank)
    if not names:
        has = ", ".join(available) or "none"
        raise UserError(f"Attempt {attempt} of run {run} has no log of rank {rank or 0}. There is: {has}.")
    return names


def _lines(directory: Storage, path: str, tail: int | None) -> list[str]:
    offset = 0 if tail is None else logfiles.tail_offset(directory, path, tail)
    return list(logfiles.Reader(directory, path, offset).lines(is_final=True))


def _labelled(name: str, line: str, rank: str) -> str:
    """One rank alone speaks plainly; several sources say who they are."""
    return line if rank and rank != "all" else f"{name} | {line}"
