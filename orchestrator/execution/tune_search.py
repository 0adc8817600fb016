"""Any search algorithm of Ray Tune behind our protocol: `sweep.searcher=tune:hyperopt`, `tune:package.module:Class`.

Tune's own wrapping and its pickled states are not used: what an algorithm has suggested and heard is replayed to a new
one, and only if that gives the same suggestions again does the sweep go on exactly as it would have.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from typing import Any

from ray import tune
from ray.tune.search import SEARCH_ALG_IMPORT
from ray.tune.search import Searcher as Algorithm

from orchestrator.config.functions import load_class
from orchestrator.config.names import did_you_mean
from orchestrator.config.settings import SweepConfig
from orchestrator.errors import ConfigError
from orchestrator.seeding import derive
from orchestrator.sweeps.grammar import same, token
from orchestrator.sweeps.rules import CHANGING
from orchestrator.sweeps.search import Heard, inputs_of
from orchestrator.sweeps.space import Dimension, Kind, Space
from orchestrator.sweeps.values import Past, Rebuilt, Suggestion, Told
from orchestrator.sweeps.warm import TOLD

_PREFIX = "tune:"
_REFUSALS = 100
"""So often an algorithm is asked again for what a constraint refuses; then it is drawn at random."""
_SEEDS = ("seed", "random_state_seed", "random_state")
"""What algorithms call it."""
_NOT_ALONE = {
    "bohb": "works only together with Tune's hb_bohb, which tells it of every pause and cannot be used here.",
    "random": "is no algorithm of its own: sweep.searcher=random.",
    "variant_generator": "is no algorithm of its own: sweep.searcher=random.",
}


class TuneSearcher:
    """One of Tune's algorithms. Raises ConfigError for one that there is not, that is not installed, that does not take
    its arguments, or for a space that Tune cannot say: keys with conditions."""

    survives = "its suggestions and results are replayed; its own random state only where that gives the same again"

    def __init__(self, settings: SweepConfig, space: Space, seed: int, *, samples: int, first: int = 0) -> None:
        for each in space.dimensions:
            if each.when is not None:
                why = f"is searched only when {each.when}: {settings.searcher} knows no conditions."
                raise ConfigError(each.key, each.text, why, "Use sweep.searcher=random or optuna.")
        if not settings.objectives:
            hint = "Name it: sweep.objective=[val/accuracy:max], or checkpoints.best_metric."
            raise ConfigError("sweep.objective", None, f"{settings.searcher} must know what gets better.", hint)
        self.name, self.total = settings.searcher, samples
        self._settings, self._space, self._seed, self._first = settings, space, seed, first
        self._metrics = [metric for metric, _ in settings.objectives]
        self._made = _algorithm(settings.searcher)
        self._known: Sequence[Any] = settings.searcher_args.get(TOLD, [])
        self._heard = Heard()
        self._start()

    def suggest(self, number: int) -> Suggestion | None:
        if not 0 <= number - self._first < self.total:
            return None
        if number not in self._asked:
            self._asked[number] = self._suggested(number)
        return self._asked[number]

    def told(
        self, number: int, values: Mapping[str, Any], resource: float, scores: Sequence[float] | None, state: Told
    ) -> None:
        self._heard.add(number, resource, scores, state)
        self._tell(number, values, resource, scores, state)

    def rebuild(self, history: Sequence[Past]) -> Rebuilt:
        self._heard.rebuild(history)
        self._start()
        heard = Heard()
        current, self._heard = self._heard, heard
        events = [((past.seq, past.number), past, None) for past in history] + [
            ((telling.seq, past.number), past, telling) for past in history for telling in past.tellings
        ]
        is_same = True
        try:
            for _, past, telling in sorted(events, key=lambda event: event[0]):
                if telling is not None:
                    heard.add(past.number, telling.resource, telling.scores, telling.state)
                    self._tell(past.number, past.values, telling.resource, telling.scores, telling.state)
                elif past.number >= self._first:
                    again = self._suggested(past.number)
                    is_same = again is not None and same(dict(again.values), dict(past.values))
                    if not is_same:
                        break
                    self._asked[past.number] = again
        finally:
            self._heard = current
        if is_same:
            return Rebuilt(is_exact=True)
        self._start()
        for _, past, telling in sorted(events, key=lambda event: event[0]):
            if telling is not None and telling.scores is not None:
                self._observe(past.values, telling.scores)
            self._ended.add(past.number)
        return Rebuilt(is_exact=False, why=f"the random state of {self.name} was not kept")

    def _start(self) -> None:
        """A new algorithm that knows nothing but what the sweep began with."""
        arguments = {name: value for name, value in self._settings.searcher_args.items() if name != TOLD}
        takes = inspect.signature(self._made).parameters
        for name in _SEEDS:
            if name in takes and name not in arguments:
                arguments[name] = derive(self._seed, "tune") % 2**31
                break
        metrics = [metric for metric, _ in self._settings.objectives]
        modes = [str(direction) for _, direction in self._settings.objectives]
        several = len(metrics) > 1
        domains = {each.key: _domain(each) for each in self._space.dimensions if each.kind is not Kind.fixed}
        try:
            self._algorithm = self._made(**arguments)
            # Its signature knows one metric; those that take several take lists.
            said: tuple[Any, Any] = (metrics, modes) if several else (metrics[0], modes[0])
            is_taken = self._algorithm.set_search_properties(*said, domains)
        except (TypeError, ValueError, AssertionError, ImportError, NotImplementedError) as error:
            why = f"{self.name} does not take them: {type(error).__name__}: {error}."
            raise ConfigError("sweep.searcher_args", dict(arguments), why) from error
        if not is_taken:
            raise ConfigError("sweep.searcher", self.name, "does not take the space of this sweep.")
        self._asked: dict[int, Suggestion | None] = {}
        self._open: dict[int, str] = {}
        """Trial -> what it is called, until its first result."""
        self._ended: set[int] = set()
        for values, scores in self._known:
            self._observe(values, scores)

    def _suggested(self, number: int) -> Suggestion | None:
        for retry in range(_REFUSALS):
            called = f"{number}-{retry}"
            params = self._algorithm.suggest(called)
            if params == Algorithm.FINISHED:
                return None
            if params is None:
                break  # it waits for results, and a lane does not
            values = self._values(params)
            if not self._space.contains(values):
                self._open[number] = called
                return self._suggestion(number, values, self.name, retry)
            self._algorithm.on_trial_complete(called, error=True)
        values, retry = self._space.drawn(self._seed, number)
        return self._suggestion(number, values, "random", _REFUSALS + retry)

    def _suggestion(self, number: int, values: Mapping[str, Any], origin: str, retry: int) -> Suggestion:
        inputs = inputs_of(self._space, self._seed, number, retry, self._heard)
        return Suggestion(values=values, origin=origin, inputs=inputs)

    def _tell(
        self, number: int, values: Mapping[str, Any], resource: float, scores: Sequence[float] | None, state: Told
    ) -> None:
        is_good = state is not Told.failed and scores is not None and all(map(math.isfinite, scores))
        called = self._open.pop(number, None)
        if called is None:
            if is_good and scores is not None and not (self._settings.scheduler in CHANGING and number in self._ended):
                self._observe(values, scores)
        elif is_good and scores is not None:
            result = dict(zip(self._metrics, map(float, scores), strict=True))
            self._algorithm.on_trial_complete(called, {**result, "training_iteration": int(resource)})
        else:
            self._algorithm.on_trial_complete(called, error=True)
        self._ended.add(number)

    def _observe(self, values: Mapping[str, Any], scores: Sequence[float]) -> None:
        """What it did not suggest itself, if it can learn from that."""
        if len(self._metrics) != 1 or not all(map(math.isfinite, scores)):
            return
        params = {each.key: _param(each, values[each.key]) for each in self._space.dimensions if _is_asked(each)}
        try:
            self._algorithm.add_evaluated_point(params, float(scores[0]))
        except (NotImplementedError, ValueError, AttributeError):
            return

    def _values(self, params: Mapping[str, Any]) -> dict[str, Any]:
        return {
            each.key: _value(each, params[each.key]) if _is_asked(each) else each.items[0]
            for each in self._space.dimensions
        }


def _algorithm(searcher: str) -> type[Algorithm]:
    name = searcher.removeprefix(_PREFIX)
    if name in _NOT_ALONE:
        raise ConfigError("sweep.searcher", searcher, _NOT_ALONE[name])
    if ":" in name:
        found = load_class("sweep.searcher", searcher, name)
    elif name in SEARCH_ALG_IMPORT:
        try:
            found = SEARCH_ALG_IMPORT[name]()
        except ImportError as error:
            raise ConfigError("sweep.searcher", searcher, f"is not installed: {error}.") from error
    else:
        known = [each for each in SEARCH_ALG_IMPORT if each not in _NOT_ALONE]
        hint = did_you_mean(name, known) or f"There are {', '.join(known)}, and module:Class."
        raise ConfigError("sweep.searcher", searcher, "Ray Tune has no such search algorithm.", hint)
    if not (isinstance(found, type) and issubclass(found, Algorithm)):
        raise ConfigError("sweep.searcher", searcher, "is no ray.tune.search.Searcher.")
    return found


def _is_asked(each: Dimension) -> bool:
    return each.kind is not Kind.fixed


def _domain(each: Dimension) -> Any:
    """As Tune says it. Lists go by the text of their items; normal kinds by a share of their distribution."""
    if each.is_listed:
        return tune.choice(list(map(token, each.items)))
    low, high = each.low, each.high
    match each.kind:
        case Kind.uniform:
            return tune.uniform(low, high)
        case Kind.loguniform:
            return tune.loguniform(low, high)
        case Kind.randint:
            return tune.randint(int(low), int(high) + 1)
        case Kind.lograndint:
            return tune.lograndint(int(low), int(high) + 1)
        case Kind.quniform | Kind.qloguniform | Kind.qrandint:
            first, last = round(each.fitted(low) / each.step), round(each.fitted(high) / each.step)
            return (tune.lograndint if each.is_log else tune.randint)(first, last + 1)
        case _:
            return tune.uniform(0.0, 1.0)


def _value(each: Dimension, param: Any) -> Any:
    if each.is_listed:
        return next(item for item in each.items if token(item) == param)
    if each.kind in (Kind.normal, Kind.lognormal, Kind.qnormal):
        return each.value(float(param))
    return each.fitted(param * each.step if each.step else param)


def _param(each: Dimension, value: Any) -> Any:
    if each.is_listed:
        return token(value)
    if each.kind in (Kind.normal, Kind.lognormal, Kind.qnormal):
        return each.share(float(value))
    return round(value / each.step) if each.step else value
