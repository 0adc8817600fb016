"""Searchers that need a library: Optuna, and those of Ray Tune."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from orchestrator.config.settings import SweepConfig
from orchestrator.errors import ConfigError, UserError
from orchestrator.seeding import derive
from orchestrator.sweeps.grammar import token
from orchestrator.sweeps.rules import CHANGING
from orchestrator.sweeps.search import Heard, Library, Searcher, inputs_of
from orchestrator.sweeps.space import Dimension, Kind, Space
from orchestrator.sweeps.values import Past, Rebuilt, Suggestion, Telling, Told
from orchestrator.sweeps.warm import TOLD

if TYPE_CHECKING:
    from orchestrator.backends.optuna import Axis, Param, Row

_LATTICE = 2**20
"""Of so many points of a normal distribution, equally likely, one is chosen: each can be told from its neighbours after
any number of roundings."""
_REFUSALS = 100
"""So often Optuna is asked again for what a constraint refuses; then it is drawn at random."""
_EXACT = ("TPESampler", "RandomSampler", "NSGAIISampler")
"""Samplers that keep nothing but the study."""


def library(*, database_url: str = "", sweep: str = "") -> Library:
    """What makes these searchers for a sweep. `database_url` is that of our PostgreSQL, where Optuna's study lies; it
    is called like the sweep."""

    def make(settings: SweepConfig, space: Space, seed: int, *, samples: int, first: int) -> Searcher:
        if settings.searcher == "optuna":
            return OptunaSearcher(
                settings, space, seed, samples=samples, first=first, database_url=database_url, sweep=sweep
            )
        from orchestrator.execution.tune_search import TuneSearcher

        return TuneSearcher(settings, space, seed, samples=samples, first=first)

    return make


class OptunaSearcher:
    """Optuna's samplers, TPE unless `sweep.searcher_args.sampler` names another.

    Every suggestion comes from a sampler of its own, seeded with the sweep's seed and the trial's number: it depends on
    the rows of the study and on nothing else, and these follow from the sweep's decisions. Raises ConfigError without
    objectives, and where Optuna is not installed.
    """

    name = "optuna"

    def __init__(
        self,
        settings: SweepConfig,
        space: Space,
        seed: int,
        *,
        samples: int,
        first: int = 0,
        database_url: str = "",
        sweep: str = "",
    ) -> None:
        objectives = settings.objectives
        if not objectives:
            hint = "Name it: sweep.objective=[val/accuracy:max], or checkpoints.best_metric."
            raise ConfigError("sweep.objective", None, "optuna must know from the start what gets better.", hint)
        if importlib.util.find_spec("optuna") is None:
            raise ConfigError("sweep.searcher", "optuna", "is not installed.", "Install it: pip install optuna")
        from orchestrator.backends import optuna

        arguments = {name: value for name, value in settings.searcher_args.items() if name not in ("sampler", TOLD)}
        sampler = str(settings.searcher_args.get("sampler", "TPESampler"))
        self._library = optuna
        self._space, self._seed, self._first, self.total = space, seed, first, samples
        self._sizes = len(objectives)
        self._is_population = settings.scheduler in CHANGING
        self._ordered = _parents_first(space)
        self._axes = {each.key: _axis(each) for each in self._ordered if each.kind is not Kind.fixed}
        self._study = optuna.Study(
            sweep or "sweep",
            list(self._axes.values()),
            [str(direction) for _, direction in objectives],
            database_url=database_url,
            sampler=sampler,
            arguments=arguments,
        )
        self._known: Sequence[Any] = settings.searcher_args.get(TOLD, [])
        self._is_exact = sampler in _EXACT
        self.survives = "everything: its study is filled again from the recorded results"
        if not self._is_exact:
            self.survives = f"the study; {sampler} may keep more than that, which is lost"
        self._heard = Heard()
        self._asked: dict[int, Suggestion] = {}
        self._turns: dict[int, int] = {}
        """Trial -> rows of it that are no running ones."""

    def suggest(self, number: int) -> Suggestion | None:
        turn = number - self._first
        if not 0 <= turn < self.total:
            return None
        if number not in self._asked:
            self._asked[number] = self._suggested(number)
        return self._asked[number]

    def told(
        self, number: int, values: Mapping[str, Any], resource: float, scores: Sequence[float] | None, state: Told
    ) -> None:
        self._heard.add(number, resource, scores, state)
        told = self._outcome(number, resource, scores, state)
        if self._study.is_running(number):
            self._study.tell(number, told["state"], told["values"], told["step"])
            self._turns[number] = 1
        elif self._counts(number, told["state"]):
            turn = self._turns.get(number, 0)
            self._study.add(self._row(number, turn, values, told))
            self._turns[number] = turn + 1

    def rebuild(self, history: Sequence[Past]) -> Rebuilt:
        self._heard.rebuild(history)
        self._asked, self._turns = {}, {}
        rows = self._begin()
        places: dict[int, int] = {}
        for _, past, telling in _events(history):
            number = past.number
            if telling is None:
                if number >= self._first:
                    places[number] = len(rows)
                    rows.append(self._row(number, 0, past.values, {"state": self._library.State.running}))
                continue
            told = self._outcome(number, telling.resource, telling.scores, telling.state)
            if number in places:
                rows[places.pop(number)] = self._row(number, 0, past.values, told)
                self._turns[number] = 1
            elif self._counts(number, told["state"]):
                turn = self._turns.get(number, 0)
                rows.append(self._row(number, turn, past.values, told))
                self._turns[number] = turn + 1
        is_same_space, left_out = self._study.restore(rows, self._space.hash)
        if left_out:
            return Rebuilt(is_exact=False, why=f"{left_out} earlier results are outside the space as it is now")
        if not is_same_space:
            return Rebuilt(is_exact=False, why="the space was changed")
        why = "" if self._is_exact else "its sampler may keep more than its study"
        return Rebuilt(is_exact=self._is_exact or not history, why=why if history else "")

    def flush(self) -> None:
        """Waits until the database has the whole study; nobody needs to."""
        self._study.flush()

    def _suggested(self, number: int) -> Suggestion:
        values: dict[str, Any] = {}
        for retry in range(_REFUSALS):
            label = derive(self._seed, "optuna", number, retry) % 2**32
            params = self._study.ask(number, label, self._is_active)
            values = self._values(params)
            if not self._space.contains(values):
                self._study.keep(number, params)
                return self._suggestion(number, values, self.name, retry)
            self._study.refuse(number)
        values, retry = self._space.drawn(self._seed, number)
        self._study.add(self._row(number, 0, values, {"state": self._library.State.running}))
        return self._suggestion(number, values, "random", _REFUSALS + retry)

    def _suggestion(self, number: int, values: Mapping[str, Any], origin: str, retry: int) -> Suggestion:
        inputs = inputs_of(self._space, self._seed, number, retry, self._heard)
        return Suggestion(values=values, origin=origin, inputs=inputs, token=str(number))

    def _begin(self) -> list[Row]:
        """What was known before the first trial."""
        state = self._library.State.complete
        told = [{"state": state, "values": tuple(map(float, scores)), "step": 0} for _, scores in self._known]
        return [
            self._row(-1 - place, 0, values, told[place])
            for place, (values, scores) in enumerate(self._known)
            if len(scores) == self._sizes
        ]

    def _counts(self, number: int, state: str) -> bool:
        """Whether a further result of a trial becomes a row. Members of a population have other values by then."""
        return state != "failed" and not (self._is_population and self._turns.get(number, 0))

    def _outcome(self, number: int, resource: float, scores: Sequence[float] | None, state: Told) -> dict[str, Any]:
        states = self._library.State
        if state is Told.failed or scores is None or not all(map(math.isfinite, scores)) or len(scores) != self._sizes:
            return {"state": states.failed, "values": (), "step": 0}
        # Optuna has no pruned trials where there is more than one objective.
        is_pruned = state is Told.pruned and self._sizes == 1
        return {
            "state": states.pruned if is_pruned else states.complete,
            "values": tuple(map(float, scores)),
            "step": int(resource) if is_pruned else 0,
        }

    def _row(self, number: int, turn: int, values: Mapping[str, Any], told: Mapping[str, Any]) -> Row:
        params = {key: _param(self._space[key], values[key]) for key in self._axes if key in values}
        return self._library.Row(trial=number, turn=turn, params=params, **told)

    def _values(self, params: Mapping[str, Param]) -> dict[str, Any]:
        found = {key: _value(self._space[key], param) for key, param in params.items()}
        fixed = {each.key: each.items[0] for each in self._ordered if each.kind is Kind.fixed}
        return self._space.active({**fixed, **found})

    def _is_active(self, key: str, params: Mapping[str, Param]) -> bool:
        return key in self._space.active({**self._values(params), key: None})


def _events(history: Sequence[Past]) -> list[tuple[tuple[int, int], Past, Telling | None]]:
    """Suggestions (without a telling) and tellings, in the order of their decisions."""
    found: list[tuple[tuple[int, int], Past, Telling | None]] = []
    for past in history:
        found.append(((past.seq, past.number), past, None))
        found += [((telling.seq, past.number), past, telling) for telling in past.tellings]
    return sorted(found, key=lambda event: event[0])


def _parents_first(space: Space) -> list[Dimension]:
    """The dimensions in their order, but none before the one that its condition is about."""
    found: dict[str, Dimension] = {}

    def add(each: Dimension) -> None:
        if each.key not in found:
            if each.when is not None:
                add(space[each.when.key])
            found[each.key] = each

    for each in space.dimensions:
        add(each)
    return list(found.values())


def _axis(each: Dimension) -> Axis:
    from orchestrator.backends.optuna import Axis

    if each.is_listed:
        return Axis(key=each.key, choices=tuple(map(token, each.items)))
    if each.kind in (Kind.normal, Kind.lognormal):
        return Axis(key=each.key, low=0, high=_LATTICE - 1, is_whole=True)
    low, high = each.low, each.high
    if each.kind is Kind.qnormal:
        low, high = max(low, each.mu - 4 * each.sigma), min(high, each.mu + 4 * each.sigma)
    if each.step:
        first, last = round(each.fitted(low) / each.step), round(each.fitted(high) / each.step)
        return Axis(key=each.key, low=first, high=last, is_whole=True, is_log=each.is_log)
    return Axis(key=each.key, low=low, high=high, is_whole=each.is_whole, is_log=each.is_log)


def _value(each: Dimension, param: Param) -> Any:
    if each.is_listed:
        return next(item for item in each.items if token(item) == param)
    if isinstance(param, str):
        raise UserError(f"{each.key}: {param} is no number")
    if each.kind in (Kind.normal, Kind.lognormal):
        return each.value((param + 0.5) / _LATTICE)
    return each.fitted(param * each.step if each.step else param)


def _param(each: Dimension, value: Any) -> Param:
    """What `_value` makes the value of."""
    if each.is_listed:
        return token(value)
    if each.kind in (Kind.normal, Kind.lognormal):
        return min(max(math.floor(each.share(value) * _LATTICE), 0), _LATTICE - 1)
    if each.step:
        return round(value / each.step)
    return int(value) if each.is_whole else float(value)
