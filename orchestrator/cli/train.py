"""`orc run`: compose, check, train, show. The same code runs inside `ray job submit` (see orchestrator/launch.py)."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from orchestrator import config
from orchestrator.catalog import Catalog, open_catalog
from orchestrator.cli import progress, text
from orchestrator.cli.configs import composed
from orchestrator.cli.output import Output
from orchestrator.config import Job
from orchestrator.errors import NotFound, RunIsActive, UserError
from orchestrator.failures.explain import five_lines
from orchestrator.records import RunStatus

if TYPE_CHECKING:
    from orchestrator.execution.driver import Outcome
    from orchestrator.store.views import RunDetail

METRICS_AT_THE_END = 12


def run(arguments: argparse.Namespace, output: Output) -> int:
    return _trained(composed(arguments, name=arguments.name), arguments, output, new_run=arguments.run_id)


def resume(arguments: argparse.Namespace, output: Output) -> int:
    """The stored config of the run, with overrides, as its next attempt."""
    with open_catalog(arguments.home) as catalog:
        interrupted = catalog.run(arguments.run)
        _refuse_sweeps(catalog, interrupted)
    if not interrupted.status.is_terminal:
        raise RunIsActive(interrupted.run, interrupted.status)
    if interrupted.status is RunStatus.finished and not arguments.overrides:
        hint = (
            f"Give it more to do, e.g. `orc resume {interrupted.name} epochs=40`, or start anew with `orc run --from`."
        )
        raise UserError(f"Run {interrupted.name} is FINISHED: there is nothing left to resume. {hint}")
    directory = Path(arguments.config_dir) if arguments.config_dir else None
    job = config.compose(arguments.overrides, config_dir=directory, base=interrupted.config)
    return _trained(job, arguments, output, run=interrupted.run)


def _refuse_sweeps(catalog: Catalog, run: RunDetail) -> None:
    """What belongs to a sweep goes on with it: an attempt beside it would be none of its decisions."""
    try:
        sweep = catalog.sweep(run.sweep or run.run)
    except NotFound:
        return
    if sweep.driver:
        what = f"is a trial of sweep {sweep.name}" if run.sweep else "is a sweep"
        hint = f"It goes on with `orc sweep resume {sweep.name}`; `orc run --from {run.name}` trains the same anew."
        raise UserError(f"Run {run.name} {what}. {hint}")


def _trained(job: Job, arguments: argparse.Namespace, output: Output, *, run: str = "", new_run: str = "") -> int:
    from orchestrator.execution import choice, driver  # after the config is known to be right: it imports ray

    place = choice.choose_place(
        job.settings, arguments.home, local=arguments.local, warn=lambda line: output.message(f"orc: {line}")
    )
    display = progress.display(output.stderr if output.as_json else output.stdout)
    try:
        outcome = driver.train(job, home=arguments.home, progress=display, run=run, new_run=new_run, open_place=place)
    finally:
        display.close()
    output.result(outcome, lambda: render(outcome, output))
    return exit_code(outcome)


def exit_code(outcome: Outcome) -> int:
    """0 when it finished, 130 when ctrl-C ended it, else 1."""
    if outcome.status is RunStatus.finished:
        return 0
    interrupted = outcome.status is RunStatus.cancelled and "SIGINT" in outcome.reason
    return 130 if interrupted else 1


def render(outcome: Outcome, output: Output) -> None:
    """What happened and where to look; the display has said the status."""
    if outcome.error:
        output.fields(five_lines(outcome.error), indent="  ")
    metrics = progress.chosen_metrics(outcome.summaries, most=METRICS_AT_THE_END)
    output.fields([(key, text.number(value)) for key, value in metrics], indent="  ")
    output.fields(
        [
            ("time", text.duration(outcome.elapsed)),
            *((name.replace("_", " "), address) for name, address in outcome.links.items()),
            ("more", f"orc show {outcome.run}"),
        ],
        indent="  ",
    )
