"""`orc rm`: removes runs for good, after saying what that is."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from orchestrator.account import user_name
from orchestrator.catalog import open_store
from orchestrator.catalog.database import DatabaseCatalog
from orchestrator.cli import text
from orchestrator.cli.output import Output
from orchestrator.cli.parser import UsageError
from orchestrator.directory import removal
from orchestrator.errors import NotFound, UserError
from orchestrator.records import RunStatus
from orchestrator.store.store import Store


@dataclass(frozen=True, slots=True, kw_only=True)
class Doomed:
    """A run that shall go, and what goes with it."""

    run: str
    name: str
    status: str
    """REMOVED: its record is gone already, its files are left."""
    directory: str
    points: int
    files: int
    size_bytes: int
    mlflow: str
    """Where its copy in MLflow stays; empty when there is none."""

    @property
    def is_active(self) -> bool:
        return self.status != REMOVED and not RunStatus(self.status).is_terminal


REMOVED = "REMOVED"


def rm(arguments: argparse.Namespace, output: Output) -> int:
    with open_store(arguments.home) as store:
        runs = _with_trials(store, arguments.runs) if arguments.trials else arguments.runs
        doomed = [_doomed(store, run, with_files=not arguments.keep_files) for run in dict.fromkeys(runs)]
        doomed = list({one.run: one for one in doomed}.values())
        _refuse_active(doomed, force=arguments.force)
        document: dict[str, Any] = {"dry_run": arguments.dry_run, "runs": doomed}
        if arguments.dry_run:
            output.result(document, lambda: _tell(output, doomed, "would be removed"))
            return 0
        if not (arguments.yes or _agreed(doomed, output)):
            output.message("orc: nothing was removed")
            return 1
        left = [one for one in doomed if not _removed(store, one, arguments, output)]
    output.result(document, lambda: _tell(output, [one for one in doomed if one not in left], "removed"))
    if left:
        again = " ".join(one.run for one in left)
        raise UserError(f"Files are left of what was removed. When their storage works: orc rm {again}")
    return 0


def _with_trials(store: Store, references: Sequence[str]) -> list[str]:
    """The runs of a sweep's trials stand before it: it goes when they are gone."""
    found: list[str] = []
    for reference in references:
        try:
            run = DatabaseCatalog(store).run(reference).run
        except NotFound:
            run = reference  # half removed, perhaps
        found += [*store.trial_runs(run), run]
    return found


def _doomed(store: Store, reference: str, *, with_files: bool) -> Doomed:
    try:
        run = DatabaseCatalog(store).run(reference)
    except NotFound:
        half = store.half_removed(reference)
        if half is None:
            raise
        found = _contents(half.run, half.directory, with_files)
        return Doomed(
            run=half.run, name=half.name, status=REMOVED, directory=half.directory, points=0, files=found.files,
            size_bytes=found.size_bytes, mlflow="",
        )  # fmt: skip
    found = _contents(run.run, run.directory, with_files)
    link = run.links.get("mlflow") or {}
    return Doomed(
        run=run.run, name=run.name, status=run.status.value, directory=run.directory,
        points=sum(row.count for row in store.summaries(run.run)), files=found.files, size_bytes=found.size_bytes,
        mlflow=str(link.get("url") or link.get("run_id") or "") if isinstance(link, dict) else str(link),
    )  # fmt: skip


def _contents(run: str, directory: str, with_files: bool) -> removal.Contents:
    return removal.contents(run, directory) if with_files else removal.Contents(files=0, size_bytes=0)


def _refuse_active(doomed: Sequence[Doomed], *, force: bool) -> None:
    active = [one for one in doomed if one.is_active]
    if active and not force:
        one = active[0]
        raise UserError(
            f"Run {one.name} ({one.run}) is {one.status}. `orc cancel {one.run}` ends it; --force removes it all the "
            "same, and what it still logs is dropped."
        )


def _agreed(doomed: Sequence[Doomed], output: Output) -> bool:
    if output.as_json or not (sys.stdin.isatty() and output.stderr.isatty()):
        raise UsageError("there is no terminal to ask on: say --yes to remove, --dry-run to see what would go.")
    for line in _lines(doomed):
        output.message(line)
    output.stderr.write(f"Remove {'this run' if len(doomed) == 1 else f'these {len(doomed)} runs'} for good? [y/N] ")
    output.stderr.flush()
    return sys.stdin.readline().strip().lower() in ("y", "yes")


def _removed(store: Store, one: Doomed, arguments: argparse.Namespace, output: Output) -> bool:
    """False when the record is gone and files are left."""
    if one.status != REMOVED:
        store.remove_run(one.run, user=user_name(), now=time.time(), force=arguments.force)
    if not arguments.keep_files:
        try:
            removal.remove(one.run, one.directory)
        except OSError as error:
            output.message(f"orc: {one.directory} could not be removed: {error}")
            return False
    store.finish_removal(one.run)
    return True


def _tell(output: Output, doomed: Sequence[Doomed], what: str) -> None:
    for line in _lines(doomed):
        output.line(f"{what}: {line}")


def _lines(doomed: Sequence[Doomed]) -> list[str]:
    lines = []
    for one in doomed:
        parts = [f"{one.points:,} points", f"{one.files} files", text.size(one.size_bytes)]
        lines.append(f"{one.name} ({one.run}, {one.status}): {', '.join(parts)}")
        if one.mlflow:
            lines.append(f"  its copy in MLflow stays: {one.mlflow}")
    return lines
