"""Whether a sweep's decisions are what its rules say: each one is made again from those before it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from orchestrator.sweeps import rules
from orchestrator.sweeps.median import compare
from orchestrator.sweeps.search import Searcher
from orchestrator.sweeps.state import Decision, Direction, Kind, Scheduler, Settings, State, Status, Wait, number
from orchestrator.sweeps.values import Telling, Told


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """A decision that the rules would not have made. `what` is where it differs: kind, trial, outcome.rung …"""

    seq: int
    kind: Kind
    what: str
    recorded: Any
    computed: Any

    def __str__(self) -> str:
        return f"decision {self.seq} ({self.kind}): {self.what} is {self.recorded!r}, the rules say {self.computed!r}"


def verify(
    settings: Settings,
    decisions: Sequence[Decision],
    scheduler: Scheduler,
    *,
    judges: Mapping[int, Mapping[str, Any]] | None = None,
    suggest: Callable[[int], Mapping[str, Any]] | None = None,
) -> list[Difference]:
    """All differences, in order; none if the sweep can be repeated to the letter.

    `settings` are those that the sweep began with: later ones are decisions. Made again are the scheduler's decisions
    (their inputs name it in `by`), and the stops whose table `judges` has, by job. With `suggest`, values of a trial by
    its number, what the searcher suggested is compared as well. A decision that cannot follow those before it ends the
    list: nothing after it can be told.
    """
    state = State(settings)
    found: list[Difference] = []
    for decision in decisions:
        if "by" in decision.inputs:
            found += _chosen(state, decision, scheduler)
        judge = judges.get(decision.job) if judges and decision.job is not None else None
        if decision.kind == Kind.stop and judge is not None:
            found += _stopped(decision, judge)
        if decision.kind == Kind.suggest and suggest and decision.trial is not None and "values" in decision.outcome:
            found += _compared(decision, "outcome.values", decision.outcome["values"], suggest(decision.trial))
        try:
            state.apply(decision)
        except ValueError as error:
            found.append(
                Difference(seq=decision.seq, kind=decision.kind, what="order", recorded=str(error), computed="")
            )
            break
    return found


def verify_stored(
    facts: Mapping[str, Any],
    decisions: Sequence[Decision],
    scheduler: Scheduler,
    *,
    judges: Mapping[int, Mapping[str, Any]] | None = None,
    searcher: Searcher | None = None,
) -> list[Difference]:
    """As `verify`, of what a ledger has: `facts` are the sweep's, `decisions` have their inputs, `judges` are those of
    the jobs' medians. With a new `searcher`, all of it that a suggestion read is compared as well, as far as the space
    and the number of samples stayed what they were.
    """
    settings = rules.from_json(facts["rules"])
    if facts.get("objectives"):
        settings = replace(settings, direction=Direction(facts["objectives"][0][1]))
    found = verify(settings, decisions, scheduler, judges=judges)
    return found if searcher is None else [*found, *_suggested(settings, decisions, searcher)]


def _suggested(settings: Settings, decisions: Sequence[Decision], searcher: Searcher) -> list[Difference]:
    state, found, values = State(settings), list[Difference](), dict[int, Mapping[str, Any]]()
    told: set[int] = set()
    for decision in decisions:
        outcome = decision.outcome
        if decision.kind == Kind.request and ("space" in outcome or "samples" in outcome.get("config", {})):
            break  # from here on it was another searcher
        if decision.kind == Kind.suggest and decision.trial is not None:
            again = searcher.suggest(decision.trial)
            found += _compared(decision, "outcome.values", outcome["values"], dict(again.values) if again else None)
            if again:
                found += _compared(decision, "inputs.search", decision.inputs.get("search"), dict(again.inputs))
            values[decision.trial] = outcome["values"]
        try:
            state.apply(decision)
        except ValueError:
            break  # said by `verify`
        for trial, telling in tellings(state, decision, told):
            searcher.told(trial, values[trial], telling.resource, telling.scores, telling.state)
    return found


def tellings(state: State, decision: Decision, told: set[int]) -> list[tuple[int, Telling]]:
    """What the searcher hears of a decision that `state` has just taken in; `told` are the trials that it has heard of,
    and is brought up to date.

    Every rung's end is told. A trial that somebody ended is told as failed, unless something was said of it before: who
    suggested it must not wait for it for ever.
    """
    found: list[tuple[int, Telling]] = []
    if decision.kind in (Kind.result, Kind.fail) and state.entered is not None:
        trial = state.trials[state.entered[0]]
        result = trial.results[state.entered[1]]
        if trial.status == Status.failed:
            telling = Telling(seq=decision.seq, resource=result.resource, scores=None, state=Told.failed)
        else:
            how = Told.complete if trial.status == Status.complete else Told.pruned
            scores = result.objectives or (result.score,)
            telling = Telling(seq=decision.seq, resource=result.resource, scores=scores, state=how)
        found.append((trial.number, telling))
    elif decision.kind in (Kind.result, Kind.fail, Kind.request):
        numbers = [each["trial"] for each in decision.outcome.get("trials", ())]
        for number in numbers or ([] if decision.trial is None else [decision.trial]):
            if state.trials[number].status == Status.cancelled and number not in told:
                given_up = Telling(seq=decision.seq, resource=0.0, scores=None, state=Told.failed)
                found.append((number, given_up))
    told.update(number for number, _ in found)
    return found


def _chosen(state: State, decision: Decision, scheduler: Scheduler) -> list[Difference]:
    choice = scheduler.next(state)
    if isinstance(choice, Wait):
        return _compared(decision, "kind", decision.kind.value, "wait")
    found = _compared(decision, "kind", decision.kind.value, choice.kind.value)
    if found:
        return found
    if decision.kind == Kind.suggest:
        found += _compared(decision, "trial", decision.trial, len(state.trials))
    found += _compared(decision, "inputs", dict(decision.inputs), {**choice.inputs}, only=choice.inputs)
    return found + _compared(decision, "outcome", dict(decision.outcome), choice.outcome(), only=choice.outcome())


def _stopped(decision: Decision, judge: Mapping[str, Any]) -> list[Difference]:
    said = decision.inputs
    again = compare(judge, resource=float(said["resource"]), best=number(said["best"]))
    computed = again.to_json() if again else None
    return _compared(decision, "inputs", dict(said), computed, only=computed or ())


def _compared(decision: Decision, what: str, recorded: Any, computed: Any, *, only: Any = None) -> list[Difference]:
    """One difference per key where both are mappings; of the recorded keys those in `only`."""
    recorded, computed = _as_stored(recorded), _as_stored(computed)
    if isinstance(recorded, dict) and isinstance(computed, dict):
        keys = sorted(set(computed) | (set(recorded) if only is None else set()))
        pairs = [(f"{what}.{key}", recorded.get(key), computed.get(key)) for key in keys]
    else:
        pairs = [(what, recorded, computed)]
    return [
        Difference(seq=decision.seq, kind=decision.kind, what=name, recorded=was, computed=is_now)
        for name, was, is_now in pairs
        if was != is_now
    ]


def _as_stored(value: Any) -> Any:
    """What comes back from JSON: tuples are lists."""
    return json.loads(json.dumps(value))
