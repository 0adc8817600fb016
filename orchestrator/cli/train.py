"""`orc run`: compose, check, train, show. The same code runs inside `ray job submit` (see orchestrator/launch.py)."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from orchestrator.cli import progress, text
from orchestrator.cli.configs import composed
from orchestrator.cli.output import Output
from orchestrator.records import RunStatus

if TYPE_CHECKING:
    from orchestrator.execution.driver import Outcome

METRICS_AT_THE_END = 12


def run(arguments: argparse.Namespace, output: Output) -> int:
    job = composed(arguments, name=arguments.name)
    from orchestrator.execution import driver  # after the config is known to be right: it imports ray

    display = progress.display(output.stderr if output.as_json else output.stdout)
    try:
        outcome = driver.train(job, home=arguments.home, progress=display)
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
