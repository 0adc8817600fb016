"""`orc fsck`: is everything that was logged there, and does it fit together?"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

from orchestrator.account import user_name
from orchestrator.catalog import open_store
from orchestrator.cli.output import Output
from orchestrator.stack import Stack
from orchestrator.store.integrity import Counts, Problem
from orchestrator.tracking import fsck
from orchestrator.tracking.local.places import places

MOST_SHOWN = 50
"""Problems; all of them are in the answer with --json."""
PATIENCE = 2.0
"""Seconds after which it says how far it is."""


def check(arguments: argparse.Namespace, output: Output) -> int:
    """Exit code 1 when something is wrong and was not mended."""
    stack = Stack.load(arguments.home)
    local = places(stack)
    where = [fsck.Place(spools=local.spools, log=local.log)]
    if stack.spool_directory:
        where.append(fsck.Place(spools=Path(stack.spool_directory), log=Path(stack.home) / "wal"))
    said = _Progress(output)
    with open_store(arguments.home) as store:
        run = None
        if arguments.run:
            from orchestrator.catalog.database import DatabaseCatalog

            run = DatabaseCatalog(store).run(arguments.run).run
        if arguments.repair:
            report = fsck.repair(
                store, where, database_url=stack.database_url, user=user_name(), run=run, progress=said
            )
        else:
            report = fsck.check(store, where, run=run, progress=said)
    document = {
        "is_sound": report.is_sound,
        "counts": report.counts,
        "files": report.files,
        "problems": [_document(problem) for problem in report.problems],
    }
    output.result(document, lambda: _tell(report, output))
    return 0 if report.is_sound else 1


def _document(problem: Problem) -> dict[str, object]:
    return {
        "trouble": problem.trouble, "run": problem.run, "where": problem.where, "what": problem.what,
        "repair": problem.repair, "is_repaired": problem.is_repaired,
    }  # fmt: skip


def _tell(report: fsck.Report, output: Output) -> None:
    for problem in report.problems[:MOST_SHOWN]:
        output.line(f"{problem}", style="green" if problem.is_repaired else "red")
        output.line(f"    {_fate(problem)}")
    if len(report.problems) > MOST_SHOWN:
        output.line(f"… and {len(report.problems) - MOST_SHOWN} more; `--json` has all of them")
    counts, files = report.counts, report.files
    looked = (
        f"{counts.points:,} points in {counts.rows:,} rows, {counts.producers:,} producers, {counts.runs:,} runs"
        f"{f', {counts.lost:,} points known to be lost' if counts.lost else ''}; on this host {files.living} producers "
        f"that log, {files.left} spools of dead ones ({files.waiting:,} entries wait), {files.frames:,} batches in logs"
    )
    output.line(f"{_verdict(report.problems)}: {looked}")


def _fate(problem: Problem) -> str:
    if problem.is_repaired:
        return f"mended: {problem.repair}"
    return f"`orc fsck --repair`: {problem.repair}" if problem.repair else "this cannot be mended"


def _verdict(problems: Sequence[Problem]) -> str:
    left = sum(not problem.is_repaired for problem in problems)
    if left:
        return f"{left} problem{'s' if left > 1 else ''}"
    return f"all mended ({len(problems)})" if problems else "everything is there and fits together"


class _Progress:
    """A line on stderr now and then, once it takes longer."""

    def __init__(self, output: Output) -> None:
        self._output = output
        self._begun = time.monotonic()

    def __call__(self, counts: Counts, runs: int) -> None:
        if time.monotonic() - self._begun >= PATIENCE:
            self._output.message(f"{counts.runs:,} of {runs:,} runs, {counts.points:,} points looked at")
