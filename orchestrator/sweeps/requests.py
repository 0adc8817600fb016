"""What somebody may ask of a sweep while it runs, or before it goes on.

| kind | details |
|---|---|
| extend | {"samples": how many more} |
| set | {key: value}: see `SETTABLE`; {"space": {key: domain}} for what is not suggested yet |
| hold, continue, stop | {"trials": [n, …]}; `stop` without trials ends the sweep |
| retry | {"trials": [n, …]}, none of them: all that failed |

Each is a decision with the old and the new value. A refusal is an answer, not an error: the sweep goes on.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from orchestrator.config.settings import BudgetConfig, SweepConfig
from orchestrator.errors import UserError
from orchestrator.sweep_records import RequestRow
from orchestrator.sweeps.asha import extended
from orchestrator.sweeps.space import Space, space
from orchestrator.sweeps.state import State, Status

SETTABLE = (
    "concurrency", "restarts", "max_failed", "samples", "asha.max", "median.grace", "median.trials", "median.every",
    *(f"budget.{each.name}" for each in dataclasses.fields(BudgetConfig)),
)  # fmt: skip
"""Keys below `sweep.` that may change while a sweep runs."""

ENDED = (Status.complete, Status.stopped, Status.failed, Status.cancelled)


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """`outcome` is what the decision says, None if nothing changes."""

    text: str
    outcome: Mapping[str, Any] | None = None
    """{"settings": what the schedulers are told, "config": {key: [old, new]}, "space", "trials": [{"trial", "what"}],
    "stop"}"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """How a sweep stands, as far as an answer needs it."""

    state: State
    settings: SweepConfig
    space: Space
    samples: Callable[[SweepConfig, Space], int]
    """How many trials it would have in all with these. May raise ConfigError."""
    unmeasured: str = ""
    """Why nobody measures the energy of its trials."""


class Refused(Exception):
    """Says in words why nothing is changed."""

    def __init__(self, why: str) -> None:
        super().__init__(why)


def answered(request: RequestRow, standing: Standing) -> Answer:
    """What becomes of a request. Pure."""
    try:
        match request.kind:
            case "extend":
                return _extended(dict(request.details), standing)
            case "set":
                return _set(dict(request.details), standing)
            case "hold" | "continue" | "stop" | "retry":
                return _trials(request.kind, request.details.get("trials") or (), standing)
        raise Refused(f"nobody knows what `{request.kind}` is")
    except (Refused, UserError) as error:
        return Answer(text=f"refused: {error}")


def changed(settings: SweepConfig, changes: Mapping[str, Any]) -> SweepConfig:
    """With other values for keys like `asha.max`. Raises ConfigError as its sections do, TypeError for no number."""
    for key, value in changes.items():
        section, _, name = key.rpartition(".")
        owner: Any = getattr(settings, section) if section else settings
        before = getattr(owner, name)
        fitting = type(before)(value) if isinstance(before, (int, float)) else value
        parts: dict[str, Any] = {section: dataclasses.replace(owner, **{name: fitting})} if section else {name: fitting}
        settings = dataclasses.replace(settings, **parts)
    return settings


def _extended(details: dict[str, Any], standing: Standing) -> Answer:
    more = details.pop("samples", 0)
    if not isinstance(more, int) or isinstance(more, bool) or more < 0 or (not more and not details):
        raise Refused(f"`samples` is {more!r}: by how many?")
    if more:
        if standing.settings.samples == 0:
            raise Refused("the grid is searched once, there is nothing more in it")
        details["samples"] = standing.settings.samples + more
    return _set(details, standing)


def _set(details: Mapping[str, Any], standing: Standing) -> Answer:
    given = {key.removeprefix("sweep."): value for key, value in details.items()}
    domains = given.pop("space", None)
    for key, value in given.items():
        if key not in SETTABLE:
            raise Refused(f"sweep.{key} cannot change any more; what can: {', '.join(SETTABLE)} and space")
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise Refused(f"sweep.{key} is a number, not {value!r}")
    if not given and domains is None:
        raise Refused("it says nothing")
    if given.get("budget.kwh") and standing.unmeasured:
        raise Refused(f"sweep.budget.kwh would limit nothing: {standing.unmeasured}")
    after = changed(standing.settings, given)
    outcome: dict[str, Any] = {}
    told: dict[str, Any] = {}
    found = standing.space
    if domains is not None:
        found = _space(domains, standing.space)
        outcome["space"] = found.to_json()
    if "samples" in given or domains is not None:
        if after.scheduler == "pbt" and "samples" in given:
            raise Refused("a population keeps its size")
        told["samples"] = standing.samples(after, found)
        if told["samples"] < len(standing.state.trials):
            raise Refused(f"{len(standing.state.trials)} trials have begun already")
    if "asha.max" in given:
        told["milestones"] = _milestones(after, standing)
    if after.median != standing.settings.median:
        told["median"] = dataclasses.asdict(after.median)
    if given:
        outcome["config"] = {key: [_value(standing.settings, key), _value(after, key)] for key in sorted(given)}
    # With none of them only the settings' version would grow, and only schedulers' settings have one.
    if told:
        outcome["settings"] = told
    words = [f"sweep.{key}: {old} → {new}" for key, (old, new) in outcome.get("config", {}).items()]
    if domains is not None:
        words.append(f"space: {', '.join(sorted(domains))} changed for trials from {len(standing.state.trials)} on")
    return Answer(text="; ".join(words), outcome=outcome)


def _milestones(after: SweepConfig, standing: Standing) -> list[float]:
    asha = standing.state.settings.asha
    if asha is None:
        raise Refused("sweep.asha.max is for sweep.scheduler=asha")
    if asha.is_open:
        raise Refused("sweep.asha.max was not set: the train function's own end is the top")
    return list(extended(asha.milestones, asha.milestones[0], float(after.asha.max), asha.reduction))


def _space(domains: Mapping[str, Any], before: Space) -> Space:
    keys = {each.key: each.text for each in before.dimensions}
    strange = sorted(set(domains) - set(keys))
    if strange:
        raise Refused(f"{', '.join(strange)}: not searched in this sweep, and keys cannot be added")
    found = space({**keys, **domains}, before.constraints, configured=before.configured)
    for old, new in zip(before.dimensions, found.dimensions, strict=True):
        if old.is_drawn != new.is_drawn or old.when != new.when:
            raise Refused(f"{old.key} may change its range, not its kind or its condition")
        if not old.is_drawn and old.text != new.text:
            raise Refused(f"{old.key} is in the grid, whose order says which trial is which")
    return found


def _value(settings: SweepConfig, key: str) -> Any:
    found: Any = settings
    for name in key.split("."):
        found = getattr(found, name)
    return found


def _trials(kind: str, numbers: Sequence[Any], standing: Standing) -> Answer:
    trials = standing.state.trials
    if kind == "stop" and not numbers:
        return Answer(text="the sweep stops; what runs saves first", outcome={"stop": True})
    if kind == "retry" and not numbers:
        numbers = [number for number, trial in trials.items() if trial.status == Status.failed]
        if not numbers:
            raise Refused("no trial has failed")
    if not numbers:
        raise Refused("which trials?")
    strange = [number for number in numbers if number not in trials]
    if strange:
        raise Refused(f"there is no trial {', '.join(map(str, strange))}; there are {len(trials)}")
    for number in numbers:
        trial = trials[number]
        if kind == "retry" and trial.status != Status.failed:
            raise Refused(f"trial {number} is {trial.status}, only failed ones are tried again")
        if kind in ("hold", "stop") and trial.status in ENDED:
            raise Refused(f"trial {number} is {trial.status} already")
        if kind == "hold" and trial.is_held:
            raise Refused(f"trial {number} is held already")
        if kind == "continue" and not trial.is_held:
            raise Refused(f"trial {number} is not held")
    said = {"hold": "held", "continue": "goes on", "stop": "stopped", "retry": "tried again"}[kind]
    outcome = {"trials": [{"trial": number, "what": kind} for number in numbers]}
    return Answer(text=f"trial {', '.join(map(str, numbers))}: {said}", outcome=outcome)
