"""`orc sweep show|watch|best|trials|verify`: sweeps as they are recorded, wherever they run."""

from __future__ import annotations

import argparse
import json
import os
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from orchestrator.catalog.questions import Catalog
from orchestrator.cli import terminal, text
from orchestrator.cli.access import asked_catalog
from orchestrator.cli.output import Output
from orchestrator.cli.sweep_plan import SoFar
from orchestrator.cli.sweep_screen import SweepScreen
from orchestrator.config.settings import PricesConfig
from orchestrator.errors import UserError
from orchestrator.status import RunStatus
from orchestrator.sweep_records import TrialRow
from orchestrator.sweeps.budget import Gang, Work
from orchestrator.sweeps.space import Space
from orchestrator.sweeps.summary import OVER, SweepView, best_of, ended_line, left, lines, to_json

if TYPE_CHECKING:
    from orchestrator.store.views import SweepDetail


def show(arguments: argparse.Namespace, output: Output) -> int:
    with asked_catalog(arguments) as catalog:
        sweep = catalog.sweep(arguments.sweep)
        view = view_of(catalog, sweep)
        requests = [row for row in catalog.sweep_requests(sweep.sweep) if row.done_at is None]

    def render() -> None:
        for line in picture(sweep, view, arguments.trials, _width(output)):
            output.line(line)
        for row in requests:
            output.line(f" asked by {row.who or 'somebody'}: {row.kind} {json.dumps(dict(row.details))}")
        if not sweep.status.is_terminal:
            return
        goes_on = "" if sweep.status is RunStatus.finished else f"orc sweep resume {sweep.name}   "
        output.line(f" more  {goes_on}orc sweep best {sweep.name}   orc sweep trials {sweep.name}")

    output.result(document(sweep, view), render)
    return 0


def watch(arguments: argparse.Namespace, output: Output) -> int:
    """Redrawn on a terminal, else a line for each trial that came further, with `--json` a document for each look. Ends
    with the sweep, and says how that ended."""
    is_drawn = output.is_rich and os.environ.get("TERM", "").lower() not in ("", "dumb", "unknown")
    screen = SweepScreen(output) if is_drawn and not arguments.once else None
    try:
        sweep = _watched(arguments, output, screen)
    finally:
        if screen is not None:
            screen.close()
    output.has_result = True
    is_over = sweep.status.is_terminal
    if is_over and not output.as_json:
        why = f": {sweep.reason}" if sweep.reason else ""
        output.line(f"sweep {sweep.name} {sweep.status.value}{why}")
        output.stdout.flush()
    return 0 if sweep.status.value == "FINISHED" or not is_over else 1


def _watched(arguments: argparse.Namespace, output: Output, screen: SweepScreen | None) -> SweepDetail:
    """How the sweep stands after the last look. Ten thousand trials take a while to read: a look that took t seconds is
    followed by a pause of at least five times that."""
    told: dict[int, Any] = {}
    while True:
        began = time.monotonic()
        with asked_catalog(arguments) as catalog:
            sweep = catalog.sweep(arguments.sweep)
            view = view_of(catalog, sweep)
        arguments.sweep = sweep.sweep  # `last` may become another one
        if output.as_json:
            output.stdout.write(json.dumps(text.jsonable(document(sweep, view)), allow_nan=False) + "\n")
            output.stdout.flush()
        elif screen is not None:
            screen.show(partial(_fitting, sweep, view, arguments.trials))
        elif output.is_rich or arguments.once:
            for line in picture(sweep, view, arguments.trials, _width(output)):
                output.line(line)
        else:
            _tell_new(view, told, output)
        if sweep.status.is_terminal or arguments.once:
            return sweep
        time.sleep(max(arguments.interval, 0.2, 5 * (time.monotonic() - began)))


def _fitting(sweep: SweepDetail, view: SweepView, most: int, columns: int, height: int) -> list[str]:
    """The picture with as many trials as there is room for."""
    found = picture(sweep, view, most, columns)
    if len(found) > height:
        found = picture(sweep, view, max(most - (len(found) - height) - 1, 1), columns)
    return found[:height]


def best(arguments: argparse.Namespace, output: Output) -> int:
    with asked_catalog(arguments) as catalog:
        sweep = catalog.sweep(arguments.sweep)
        view = view_of(catalog, sweep)
        found = chosen(view, arguments.count, arguments.metric)
        runs = {trial.number: catalog.run(trial.run) for trial in found if trial.run}
        checkpoints = {number: _checkpoint(catalog, run.run) for number, run in runs.items()}
    documents: list[dict[str, Any]] = [
        {
            "trial": trial.number,
            "run": trial.run,
            "values": dict(trial.values),
            "metric": arguments.metric or view.metric,
            "score": score_of(trial, arguments.metric, view),
            "spread": trial.spread,
            "n": trial.n,
            "resource": trial.resource,
            "status": trial.status,
            "checkpoint": checkpoints.get(trial.number, ""),
            "config": dict(runs[trial.number].config) if trial.number in runs else {},
        }
        for trial in found
    ]

    def render() -> None:
        if not found:
            output.line(f"sweep {sweep.name} has no trial with a score yet")
        for each in documents:
            spread = f" ± {text.number(each['spread'])} (n = {each['n']})" if each["n"] > 1 else ""
            output.line(f"trial {each['trial']}: {each['metric']} {text.number(each['score'])}{spread}", style="bold")
            had = f"{text.number(float(each['resource']))} {view.unit or 'report'}s"
            output.fields(
                [
                    *((key, text.number(value)) for key, value in each["values"].items()),
                    ("status", f"{each['status']} after {had}"),
                    ("run", each["run"]),
                    ("checkpoint", each["checkpoint"] or "none"),
                    ("again", f"orc run --from {each['run']}"),
                    ("export", f"orc checkpoint export {each['run']}@best" if each["checkpoint"] else ""),
                ],
                indent="  ",
            )

    output.result(documents, render)
    return 0 if found else 1


def trials(arguments: argparse.Namespace, output: Output) -> int:
    with asked_catalog(arguments) as catalog:
        sweep = catalog.sweep(arguments.sweep)
        view = view_of(catalog, sweep)
    rows = [trial for trial in view.trials if arguments.status in ("", trial.status)]

    def render() -> None:
        if not rows:
            output.line("no trials")
            return
        metric = view.metric or "score"
        output.table(
            ("trial", "status", f"{view.unit or 'report'}s", metric, *view.keys, "run", "why"),
            [
                (
                    str(trial.number),
                    f"{trial.status} (held)" if trial.is_held else trial.status,
                    text.number(float(trial.resource)),
                    text.number(trial.score),
                    *(text.number(trial.values.get(key)) for key in view.keys),
                    trial.run,
                    text.one_line(trial.reason, 80),
                )
                for trial in rows
            ],
            right=(0, *range(2, 4 + len(view.keys))),
            optional=("why", "run"),
        )

    output.result(rows, render)
    return 0


def verify(arguments: argparse.Namespace, output: Output) -> int:
    from orchestrator.config import Settings
    from orchestrator.config.typed import build
    from orchestrator.execution.sweep_place import scheduler_named
    from orchestrator.sweeps.replay import verify_stored
    from orchestrator.sweeps.search import searcher_for
    from orchestrator.sweeps.state import Decision, Kind

    with asked_catalog(arguments) as catalog:
        sweep = catalog.sweep(arguments.sweep)
        decisions = catalog.decisions(sweep.sweep)
        jobs = catalog.sweep_jobs(sweep.sweep)
    settings = build(Settings, {"sweep": dict(sweep.settings)}).sweep
    space = Space.from_json(sweep.space)
    # Optuna and Tune's searchers live where a sweep runs; what they suggested is only looked at for its order.
    searcher = searcher_for(settings, space, sweep.seed) if settings.searcher in ("random", "grid") else None
    judges = {job.number: job.judge["median"] for job in jobs if "median" in job.judge}
    stored = [
        Decision(seq=row.seq, kind=Kind(row.kind), trial=row.trial, job=row.job, inputs=row.inputs, outcome=row.outcome)
        for row in decisions
    ]
    found = verify_stored(sweep.facts, stored, scheduler_named(settings, space), judges=judges, searcher=searcher)
    kinds = Counter(decision.kind for decision in decisions)
    told = {"sweep": sweep.sweep, "decisions": len(decisions), "kinds": dict(kinds)}

    def render() -> None:
        counts = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))
        output.line(f"{len(decisions)} decisions ({counts}): " + ("the same again" if not found else "they differ"))
        for each in found:
            output.line(f"  {each}")

    output.result({**told, "differences": [str(each) for each in found]}, render)
    return 1 if found else 0


# -- what is recorded, as what is shown


def view_of(catalog: Catalog, sweep: SweepDetail) -> SweepView:
    """As the core makes it while it runs."""
    jobs = catalog.sweep_jobs(sweep.sweep)
    rows = catalog.trials(sweep.sweep)
    rules = sweep.facts.get("current") or sweep.facts.get("rules") or {}
    asha = rules.get("asha") or {}
    population, held = rules.get("population") or {}, sweep.facts.get("work") or {}
    prices = PricesConfig(**(sweep.settings.get("prices") or {}))
    running = [job for job in jobs if job.ended_at is None and not sweep.status.is_terminal]
    return SweepView(
        sweep=sweep.sweep,
        name=sweep.name,
        scheduler=str(sweep.settings.get("scheduler", "")),
        objectives=tuple((metric, way) for metric, way in sweep.facts.get("objectives") or ()),
        unit=str(sweep.facts.get("unit", "")),
        samples=int(rules.get("samples", len(rows))),
        milestones=tuple(asha.get("milestones", ())),
        reduction=int(asha.get("reduction", 0)),
        ends_at=float(population.get("max", 0)),
        seq=sweep.decisions - 1,
        trials=tuple(rows),
        jobs=tuple(running),
        keys=tuple(dict.fromkeys(key for trial in rows for key in trial.values)),
        spent=sweep.spent,
        currency=prices.currency,
        work=Work(
            gang=Gang(cpus=held["cpus"], gpus=held["gpus"]),
            at_once=int(held["at_once"]),
            lane_seconds=sum(job.lane_seconds for job in jobs),
            prices=prices,
        )
        if held
        else None,
        failures=dict(Counter(str(job.error.get("kind", "error")) for job in jobs if job.status == "failed")),
        reason=sweep.reason if sweep.status.is_terminal else "",
    )


def so_far(catalog: Catalog, sweep: SweepDetail) -> SoFar:
    """What there is of it, and what is left with all that it was asked to do besides and has not begun."""
    view = view_of(catalog, sweep)
    more = sum(
        int(row.details.get("samples") or 0)
        for row in catalog.sweep_requests(sweep.sweep)
        if row.done_at is None and row.kind == "extend"
    )
    if more:
        view = replace(view, samples=view.samples + more * max(len(Space.from_json(sweep.space).grid()), 1))
    over = sum(trial.status in OVER for trial in view.trials)
    gpu, cpu = (float(sweep.spent.get(name, 0.0)) for name in ("gpu_hours", "cpu_hours"))
    spent = f"{gpu:.2f} GPU-hours" if gpu else f"{cpu:.2f} CPU-hours"
    return SoFar(words=f"{over} of {view.samples} trials are over, {spent}", left=left(view))


def picture(sweep: SweepDetail, view: SweepView, shown: int, width: int) -> list[str]:
    head, *rest = lines(view, width=width, shown=shown)
    took = text.duration((sweep.ended if sweep.ended is not None else time.time()) - sweep.created)
    tail = f"  {sweep.status.value}  {took}".rstrip()
    room = width - len(tail)
    return [(head if len(head) <= room else head[: room - 1] + "…") + tail, *rest]


def document(sweep: SweepDetail, view: SweepView) -> dict[str, Any]:
    return {
        "status": sweep.status.value,
        "experiment": sweep.experiment,
        "created": sweep.created,
        "ended": sweep.ended,
        "driver": sweep.driver,
        **to_json(view),
    }


def chosen(view: SweepView, count: int, metric: str) -> Sequence[TrialRow]:
    """The best by the first objective, or by another one of them. Raises UserError for a metric that is none."""
    directions = dict(view.objectives)
    if not metric or metric == view.metric:
        return best_of(view, count)
    if metric not in directions:
        near = text.did_you_mean(text.nearest(metric, directions))
        known = ", ".join(directions) or "none yet"
        raise UserError(f"{metric} is no objective of this sweep.{near} There are: {known}.")
    sign = -1.0 if directions[metric] == "max" else 1.0
    scored = [(score, trial) for trial in view.trials if (score := score_of(trial, metric, view)) is not None]
    return [trial for _, trial in sorted(scored, key=lambda each: (sign * each[0], each[1].number))[:count]]


def score_of(trial: TrialRow, metric: str, view: SweepView) -> float | None:
    if not metric or metric == view.metric:
        return trial.score
    found = (trial.scores.get("objectives") or {}).get(metric)
    return None if found is None else float(found)


def _checkpoint(catalog: Catalog, run: str) -> str:
    """The best one's address, else the newest's; '' where there is none."""
    rows = [row for row in catalog.checkpoints(run) if row.uri and row.state not in ("deleted", "quarantined", "bad")]
    best_row = next((row for row in rows if row.is_best), None)
    newest = max(rows, key=lambda row: row.step if row.step is not None else -1, default=None)
    row = best_row or newest
    return row.uri if row else ""


def _tell_new(view: SweepView, told: dict[int, Any], output: Output) -> None:
    for trial in view.trials:
        now = (len(trial.scores.get("rungs", ())), trial.status if trial.ended_at is not None else "")
        if any(now) and told.get(trial.number) != now:
            told[trial.number] = now
            output.line(ended_line(view, trial))
    output.stdout.flush()


def _width(output: Output) -> int:
    return terminal.width(output.stdout, os.environ) - 1 if output.is_rich else 400
