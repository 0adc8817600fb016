"""`orc sweep` and `orc sweep resume`: plan, then run. The same code runs inside `ray job submit`."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.account import user_name
from orchestrator.catalog import open_catalog, open_store
from orchestrator.cli import sweep_display, sweep_plan, sweep_show, text
from orchestrator.cli.output import Output
from orchestrator.cli.sweep_control import is_gone, settings_of
from orchestrator.cli.train import exit_code
from orchestrator.errors import RunIsActive, UserError
from orchestrator.failures.explain import five_lines
from orchestrator.status import RunStatus
from orchestrator.sweeps.space import Space
from orchestrator.sweeps.template import Template, template

if TYPE_CHECKING:
    from orchestrator.config import ClusterCapacity, Settings
    from orchestrator.execution.driver import Outcome
    from orchestrator.execution.sweep_plan import Outlook
    from orchestrator.store.views import SweepDetail


def run(arguments: argparse.Namespace, output: Output) -> int:
    if arguments.dry_run:
        _, plan = planned(arguments, name=arguments.name)
        output.result(sweep_plan.document(plan), lambda: sweep_plan.render(plan, output))
        return 0
    made, space = _composed(arguments, arguments.name)
    return _swept(made, space, arguments, output, new_run=arguments.run_id)


def planned(
    arguments: argparse.Namespace, *, name: str | None = None, ask_cluster: bool = True
) -> tuple[Template, Outlook]:
    """What a sweep would do, without a run. Raises ConfigError for what could never be."""
    made, space = _composed(arguments, name)
    return made, _outlook(made, space, arguments, ask_cluster=ask_cluster)


def _composed(arguments: argparse.Namespace, name: str | None) -> tuple[Template, Space]:
    overrides = list(arguments.overrides)
    if name:
        overrides.append(f"run.name={json.dumps(name, ensure_ascii=False)}")
    base = None
    if arguments.base:
        with open_catalog(arguments.home) as catalog:
            base = catalog.run(arguments.base).config
    directory = Path(arguments.config_dir) if arguments.config_dir else None
    return template(overrides, config_dir=directory, base=base)


def resume(arguments: argparse.Namespace, output: Output) -> int:
    """The stored sweep as its next attempt: open jobs first, then what it would have decided."""
    with open_catalog(arguments.home) as catalog:
        sweep = catalog.sweep(arguments.sweep)
        parent = catalog.run(sweep.sweep)
    check_over(sweep)
    wishes = {**settings_of(arguments.overrides)}
    made, space = template((), base=parent.config, keeps_sweep=True)
    if wishes.get("budget.kwh"):
        from orchestrator.execution.sweep_plan import refuse_energy, unmeasured

        capacity, _, monitoring = _there_is(made.base.settings, arguments)
        refuse_energy(wishes["budget.kwh"], unmeasured(made.base.settings, capacity, monitoring))
    if arguments.failed or wishes:
        with open_store(arguments.home) as store:
            if arguments.failed:
                store.ask_sweep(sweep.sweep, "retry", {"trials": []}, user_name())
            if wishes:
                store.ask_sweep(sweep.sweep, "set", wishes, user_name())
    elif sweep.status is RunStatus.finished and not _has_requests(arguments, sweep):
        hint = f"Give it more to do: `orc sweep extend {sweep.name} +20`, or `orc sweep resume --failed`."
        raise UserError(f"Sweep {sweep.name} is FINISHED: there is nothing left to resume. {hint}")
    with open_catalog(arguments.home) as catalog:
        so_far = sweep_show.so_far(catalog, sweep)
    after = 0 if sweep.status.is_terminal else parent.attempt
    return _swept(made, space, arguments, output, run=sweep.sweep, after_attempt=after, so_far=so_far)


def check_over(sweep: SweepDetail) -> None:
    """Raises RunIsActive while the sweep's driver lives, as far as that can be told: a driver that was killed on this
    host is known to be gone at once, elsewhere when its lease is over."""
    if sweep.status.is_terminal or is_gone(sweep.driver):
        return
    raise RunIsActive(sweep.sweep, sweep.status)


def _has_requests(arguments: argparse.Namespace, sweep: SweepDetail) -> bool:
    with open_catalog(arguments.home) as catalog:
        return any(request.done_at is None for request in catalog.sweep_requests(sweep.sweep))


def _outlook(made: Template, space: Space, arguments: argparse.Namespace, *, ask_cluster: bool) -> Outlook:
    """Without a run, and without starting anything. Raises ConfigError for what could never run."""
    from orchestrator.config import check_resources
    from orchestrator.execution.earlier import warm_start
    from orchestrator.execution.sweep_place import outlook_of
    from orchestrator.execution.sweep_plan import refuse_energy, unmeasured

    warm = warm_start(made, space, arguments.home)
    settings = made.base.settings
    capacity, place, monitoring = _there_is(settings, arguments) if ask_cluster else (None, "ray", 1.0)
    if capacity is not None:
        check_resources(settings, capacity)
    refuse_energy(settings.sweep.budget.kwh, unmeasured(settings, capacity, monitoring))
    return outlook_of(made, space, capacity, place, warm)


def _there_is(settings: Settings, arguments: argparse.Namespace) -> tuple[ClusterCapacity | None, str, float]:
    """What the sweep would run on (None: no cluster is there to be asked), where, and seconds between two samples of
    its machines."""
    from orchestrator.execution import choice
    from orchestrator.stack import Stack

    stack = Stack.find(arguments.home)
    is_job = bool(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR"))
    capacity, place = None, "ray"
    if choice.is_local(settings, stack, asked=arguments.local, is_job=is_job):
        from orchestrator.execution.local import host_capacity

        capacity, place = host_capacity(), "local"
    elif stack is not None:
        from orchestrator.execution.on_ray import OnRay

        opened = OnRay(stack)
        try:
            from orchestrator.execution.sweep_plan import capacity_of

            capacity = capacity_of(opened.resources())
        finally:
            opened.close()
    return capacity, place, stack.monitoring if stack else 1.0


def _swept(
    made: Template,
    space: Space,
    arguments: argparse.Namespace,
    output: Output,
    *,
    run: str = "",
    new_run: str = "",
    after_attempt: int = 0,
    so_far: sweep_plan.SoFar | None = None,
) -> int:
    from orchestrator.execution import choice, sweep_api  # after the config is known to be right: it imports ray

    job = made.base
    place = choice.choose_place(
        job.settings, arguments.home, local=arguments.local, warn=lambda line: output.message(f"orc: {line}")
    )
    stream = output.stderr if output.as_json else output.stdout

    def announce(plan: Outlook) -> None:
        stream.write("\n".join(sweep_plan.lines(plan, so_far)) + "\n")
        stream.flush()

    display: _Late = _Late(lambda: sweep_display.display(stream))
    try:
        outcome = sweep_api.run_sweep(
            made, space, home=arguments.home, progress=display, watch=display.sweep, announce=announce, run=run,
            new_run=new_run, after_attempt=after_attempt, open_place=place,
        )  # fmt: skip
    finally:
        display.close()
    output.result(_document(outcome), lambda: render(outcome, output))
    return exit_code(outcome)


class _Late:
    """A display that begins with its first word, because the plan is printed before."""

    def __init__(self, make: Callable[[], sweep_display.SweepDisplay]) -> None:
        self._make = make
        self._made: sweep_display.SweepDisplay | None = None

    def _display(self) -> sweep_display.SweepDisplay:
        if self._made is None:
            self._made = self._make()
        return self._made

    def started(self, ticket: Any) -> None:
        self._display().started(ticket)

    def phase(self, what: str) -> None:
        if self._made is not None:
            self._made.phase(what)

    def update(self, view: Any) -> None:
        pass

    def sweep(self, view: Any) -> None:
        self._display().sweep(view)

    def finished(self, outcome: Any) -> None:
        self._display().finished(outcome)

    def close(self) -> None:
        if self._made is not None:
            self._made.close()


def _document(outcome: Outcome) -> Mapping[str, Any]:
    return {
        "sweep": outcome.run,
        "name": outcome.name,
        "experiment": outcome.experiment,
        "attempt": outcome.attempt,
        "status": outcome.status.value,
        "reason": outcome.reason,
        "directory": outcome.directory,
        "summaries": dict(outcome.summaries),
        "links": dict(outcome.links),
        "error": dict(outcome.error),
        "elapsed": outcome.elapsed,
    }


def render(outcome: Outcome, output: Output) -> None:
    if outcome.error:
        output.fields(five_lines(outcome.error), indent="  ")
    resume = "" if outcome.status is RunStatus.finished else f"orc sweep resume {outcome.run}"
    output.fields(
        [
            ("time", text.duration(outcome.elapsed)),
            *((name.replace("_", " "), address) for name, address in outcome.links.items()),
            ("best", f"orc sweep best {outcome.run}"),
            ("more", f"orc sweep show {outcome.run}"),
            ("go on", resume),
        ],
        indent="  ",
    )
