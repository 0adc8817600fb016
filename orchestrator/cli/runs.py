"""The verbs that look at runs, and the one that stops them: ls, show, experiments, cancel."""

from __future__ import annotations

import argparse
import time

from orchestrator.account import user_name
from orchestrator.catalog import open_store
from orchestrator.cli import describe, text
from orchestrator.cli.access import asked_catalog, ray_dashboard
from orchestrator.cli.origin import whole_provenance
from orchestrator.cli.output import Output
from orchestrator.cli.parser import UsageError
from orchestrator.errors import ServiceUnavailable, UserError
from orchestrator.stack import Stack
from orchestrator.status import RunStatus

NO_LIMIT = 1_000_000
MOST_WITH_METRIC = 200
"""Runs in one list for which the main metric is looked up: that reads the summaries of all their metrics."""


def ls(arguments: argparse.Namespace, output: Output) -> int:
    status, tags = _status(arguments.status), _tags(arguments.tag)
    with asked_catalog(arguments) as catalog:
        rows = catalog.runs(
            experiment=arguments.experiment,
            status=status,
            tags=tags,
            search=arguments.search,
            limit=NO_LIMIT if arguments.all else arguments.limit,
            trials=arguments.trials,
        )
        metrics = catalog.main_metrics(*(row.run for row in rows[:MOST_WITH_METRIC]))
    now = time.time()

    def render() -> None:
        if not rows:
            output.line("no runs")
            return
        cells = [describe.run_cells(row, metrics.get(row.run), now) for row in rows]
        output.table(
            describe.RUN_COLUMNS, cells, right=describe.RUN_COLUMNS_RIGHT, optional=describe.RUN_COLUMNS_OPTIONAL
        )

    output.result([describe.run_document(row, metrics.get(row.run), now) for row in rows], render)
    return 0


def show(arguments: argparse.Namespace, output: Output) -> int:
    with asked_catalog(arguments) as catalog:
        run = catalog.run(arguments.run)
        attempts = catalog.attempts(run.run)
        provenance, other = whole_provenance(catalog, attempts[-1]) if attempts else ({}, None)
        story = describe.Story(
            run=run,
            attempts=attempts,
            provenance=provenance,
            recorded_with=other,
            params=catalog.params(run.run),
            summaries=catalog.summaries(run.run),
            checkpoints=catalog.checkpoints(run.run),
            artifacts=catalog.artifacts(run.run),
            notes=catalog.notes(run.run),
            events=catalog.events(run.run, newest=describe.EVENTS_SHOWN),
            links=describe.links(run, ray_dashboard=ray_dashboard(arguments)),
        )
    now = time.time()
    output.result(story.document(now), lambda: story.render(output, now))
    return 0


def experiments(arguments: argparse.Namespace, output: Output) -> int:
    with asked_catalog(arguments) as catalog:
        rows = catalog.experiments()
    now = time.time()

    def render() -> None:
        if not rows:
            output.line("no experiments")
            return
        cells = [
            (
                row.name,
                row.project,
                str(row.runs),
                str(row.active),
                text.age(None if row.last_run is None else now - row.last_run),
            )
            for row in rows
        ]
        output.table(("experiment", "project", "runs", "active", "newest"), cells, right=(2, 3, 4))

    output.result(rows, render)
    return 0


def cancel(arguments: argparse.Namespace, output: Output) -> int:
    """Ask the tracker, which tells the processes at once; without one, leave the wish in the database."""
    from orchestrator.catalog.database import DatabaseCatalog

    with open_store(arguments.home) as store:
        run = DatabaseCatalog(store).run(arguments.run)
        if run.status.is_terminal:
            raise UserError(f"Run {run.name} is {run.status}: there is nothing to cancel.")
        user = user_name()
        through = "tracker"
        try:
            _ask_tracker(Stack.load(arguments.home), run.run, user)
        except (ServiceUnavailable, ConnectionError, TimeoutError) as why:
            through = "database"
            store.request_cancel(run.run, user=user, now=time.time())
            output.message(f"orc: {why}")
            output.message("The wish is in the database: the tracker reads it there, or the run ends with its lease.")
    document = {"run": run.run, "name": run.name, "status": run.status, "cancel_requested": True, "through": through}
    output.result(
        document, lambda: output.line(f"run {run.name} was asked to stop; `orc show {run.run}` tells when it has")
    )
    return 0


def _ask_tracker(stack: Stack, run: str, user: str) -> None:
    """Raises ServiceUnavailable, ConnectionError or TimeoutError when nobody is there to ask."""
    from orchestrator.tracking.local.client import LocalTracker, is_running
    from orchestrator.tracking.local.places import places

    if is_running(places(stack)):
        LocalTracker(stack).cancel(run, user)  # one on Ray reads it in the database a moment later
        return
    from orchestrator.execution import connection  # takes seconds to import, which no other verb here should pay

    connection.connect(stack).cancel(run, user)


def _status(given: str | None) -> RunStatus | None:
    if given is None:
        return None
    names = [status.value.lower() for status in RunStatus]
    if given.lower() not in names:
        near = text.did_you_mean(text.nearest(given.lower(), names))
        raise UsageError(f"--status {given}: no such status.{near} There are {', '.join(names)}.")
    return RunStatus(given.upper())


def _tags(given: list[str]) -> dict[str, str] | None:
    pairs = [tag.partition("=") for tag in given]
    for name, equals, _ in pairs:
        if not (name and equals):
            raise UsageError(f"--tag {name}: write NAME=VALUE.")
    return {name: value for name, _, value in pairs} or None
