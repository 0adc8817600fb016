"""Which configuration the next trial has. Searchers that need no library: random, grid, and the user's own points.

A suggestion follows from the settings, the space, the seed, the trial's number and what was told so far, and from
nothing else: a sweep that is resumed gets the suggestions that it would have got.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from orchestrator.config.names import did_you_mean
from orchestrator.config.settings import SweepConfig
from orchestrator.errors import ConfigError
from orchestrator.sweeps.space import Space
from orchestrator.sweeps.values import Past, Rebuilt, Suggestion, Telling, Told

NAMES = ("random", "grid", "optuna")
"""Ours; `tune:NAME` names one of Tune's."""

_GRID_TRIED = 1000
"""For so many combinations of the grid it is tried beforehand whether the constraints leave anything."""


class Searcher(Protocol):
    """Suggests configurations and hears how they did. Called by one thread, the sweep's core."""

    name: str
    survives: str
    """In words: what is left of it after a restart."""
    total: int
    """How many trials it suggests."""

    def suggest(self, number: int) -> Suggestion | None:
        """The configuration of trial `number`, counted from 0; None if there is none, now and for all later numbers.
        Asking twice with nothing told in between gives the same."""
        ...

    def told(
        self, number: int, values: Mapping[str, Any], resource: float, scores: Sequence[float] | None, state: Told
    ) -> None:
        """A result of a trial, one score per objective, None if it failed. May come several times per trial."""
        ...

    def rebuild(self, history: Sequence[Past]) -> Rebuilt:
        """Makes a new searcher the one that had suggested and heard all this."""
        ...


class Heard:
    """How many results a searcher has heard, and a digest of all of them in their order.

    Both are inputs of a suggestion: if a replay has other ones, it has not heard the same.
    """

    def __init__(self) -> None:
        self.count = 0
        self.digest = ""

    def add(self, number: int, resource: float, scores: Sequence[float] | None, state: Told) -> None:
        told = [number, float(resource), None if scores is None else list(map(float, scores)), str(state)]
        # json writes the shortest text that reads back as the same float; NaN and infinity are words.
        self.digest = hashlib.sha256(f"{self.digest}{json.dumps(told)}".encode()).hexdigest()[:16]
        self.count += 1

    def rebuild(self, history: Sequence[Past]) -> None:
        """As if all results of `history` had just been heard, in the order of their decisions."""
        self.count, self.digest = 0, ""
        for past, telling in in_order(history):
            self.add(past.number, telling.resource, telling.scores, telling.state)


def in_order(history: Sequence[Past]) -> list[tuple[Past, Telling]]:
    """All tellings of all trials, in the order in which they were told."""
    tellings = [(past, telling) for past in history for telling in past.tellings]
    return sorted(tellings, key=lambda pair: pair[1].seq)


class RandomSearcher:
    """The whole grid once per sample; what is not in the grid is drawn for each trial anew.

    Trials are in the order of the samples, within one in the order of the grid, its last key fastest. So more samples
    only append trials. What it is told changes nothing. Raises ConfigError if something is drawn and `samples` is 0,
    UserError if the constraints leave nothing to draw for a combination of the grid.
    """

    name = "random"
    survives = "everything: a suggestion follows from the seed and the trial's number"

    def __init__(self, space: Space, *, seed: int, samples: int, first: int = 0) -> None:
        """`first` is the number of its first trial, where points of the user come before it."""
        if samples <= 0 and space.is_drawn:
            drawn = ", ".join(each.key for each in space.dimensions if each.is_drawn)
            hint = "Say how many, as in sweep.samples=20, or write grid(…) for each of them."
            raise ConfigError("sweep.samples", samples, f"{drawn} would be drawn at random without an end.", hint)
        self._space, self._seed, self._first = space, seed, first
        self._grid = space.grid()
        self._heard = Heard()
        self.total = len(self._grid) * max(samples, 1)
        """How many trials it suggests."""
        if space.constraints:
            for place, point in enumerate(self._grid[:_GRID_TRIED]):
                space.drawn(seed, first + place, point)

    def suggest(self, number: int) -> Suggestion | None:
        turn = number - self._first
        if not 0 <= turn < self.total:
            return None
        place = turn % len(self._grid)
        values, retry = self._space.drawn(self._seed, number, self._grid[place])
        inputs = inputs_of(self._space, self._seed, number, retry, self._heard)
        return Suggestion(values=values, origin="random", inputs={**inputs, "grid": place})

    def told(
        self, number: int, values: Mapping[str, Any], resource: float, scores: Sequence[float] | None, state: Told
    ) -> None:
        self._heard.add(number, resource, scores, state)

    def rebuild(self, history: Sequence[Past]) -> Rebuilt:
        self._heard.rebuild(history)
        return Rebuilt(is_exact=True)


class GridSearcher:
    """Every combination of the grid once, the last key fastest. Raises ConfigError if a key is drawn at random."""

    name = "grid"
    survives = "everything: a suggestion is a place in the grid"

    def __init__(self, space: Space, *, seed: int = 0, first: int = 0) -> None:
        for each in space.dimensions:
            if each.is_drawn:
                hint = f"Write {each.key}=grid(…), or use sweep.searcher=random with sweep.samples."
                raise ConfigError(each.key, each.text, "is drawn at random, a grid search draws nothing.", hint)
        self._random = RandomSearcher(space, seed=seed, samples=1, first=first)
        self.total = self._random.total
        """How many trials it suggests."""

    def suggest(self, number: int) -> Suggestion | None:
        found = self._random.suggest(number)
        if found is None:
            return None
        return Suggestion(values=found.values, origin="grid", inputs=found.inputs)

    def told(
        self, number: int, values: Mapping[str, Any], resource: float, scores: Sequence[float] | None, state: Told
    ) -> None:
        self._random.told(number, values, resource, scores, state)

    def rebuild(self, history: Sequence[Past]) -> Rebuilt:
        return self._random.rebuild(history)


class PointsFirst:
    """The user's own configurations, then another searcher's, which hears the results of all.

    What a point leaves out is drawn as for any trial, of grid keys one at random. Raises ConfigError, naming the point,
    for one that is not in the space. The other searcher's first trial has the number `len(points)`.
    """

    def __init__(
        self,
        points: Sequence[Mapping[str, Any]],
        rest: Searcher,
        *,
        space: Space,
        seed: int,
        key: str = "sweep.points",
        origin: str = "point",
        most: int | None = None,
    ) -> None:
        """`most`: of trials in all, the points among them."""
        for place, point in enumerate(points):
            space.check_point(f"{key}[{place}]", point)
        self._points, self._rest, self._space, self._seed = points, rest, space, seed
        self._origin = origin
        self._heard = Heard()
        self.name, self.survives = rest.name, rest.survives
        self.total = len(points) + rest.total if most is None else most
        """How many trials it suggests."""

    def suggest(self, number: int) -> Suggestion | None:
        if number >= self.total:
            return None
        if number >= len(self._points):
            return self._rest.suggest(number)
        values, retry = self._space.drawn(self._seed, number, self._points[number], keep=True)
        inputs = inputs_of(self._space, self._seed, number, retry, self._heard)
        return Suggestion(values=values, origin=self._origin, inputs={**inputs, "point": dict(self._points[number])})

    def told(
        self, number: int, values: Mapping[str, Any], resource: float, scores: Sequence[float] | None, state: Told
    ) -> None:
        self._heard.add(number, resource, scores, state)
        self._rest.told(number, values, resource, scores, state)

    def rebuild(self, history: Sequence[Past]) -> Rebuilt:
        self._heard.rebuild(history)
        return self._rest.rebuild(history)


class Library(Protocol):
    """Makes the searchers that need a library: `optuna` and `tune:NAME`."""

    def __call__(self, settings: SweepConfig, space: Space, seed: int, *, samples: int, first: int) -> Searcher:
        """It suggests `samples` trials, the first of which has the number `first`, and hears of those before, too."""
        ...


def searcher_for(settings: SweepConfig, space: Space, seed: int, *, library: Library | None = None) -> Searcher:
    """The searcher that a sweep's settings ask for, behind its own points.

    A population is one trial for each member, the points among them. Raises ConfigError for an unknown searcher, for
    draws without an end, and for points outside the space.
    """
    check_name(settings.searcher)
    members = _members(settings)
    first = len(settings.points)
    samples = settings.samples if members is None else max(members - first, 0)
    if settings.searcher == "random" and members is not None:
        samples = max(math.ceil(samples / len(space.grid())), 1)
    rest: Searcher
    if settings.searcher == "random":
        rest = RandomSearcher(space, seed=seed, samples=samples, first=first)
    elif settings.searcher == "grid":
        rest = GridSearcher(space, seed=seed, first=first)
    elif library is None:
        raise ConfigError("sweep.searcher", settings.searcher, "needs a library, and this place has none.")
    else:
        if samples <= 0 and members is None:
            hint = "Say how many, as in sweep.samples=20."
            raise ConfigError("sweep.samples", settings.samples, f"{settings.searcher} has no end of its own.", hint)
        rest = library(settings, space, seed, samples=samples, first=first)
    if not settings.points and members is None:
        return rest
    return PointsFirst(settings.points, rest, space=space, seed=seed, most=members)


def total(settings: SweepConfig, space: Space) -> int:
    """How many trials such a sweep has, points included. Raises ConfigError as `searcher_for` does."""
    return searcher_for(settings, space, 0, library=_Counted).total


def _members(settings: SweepConfig) -> int | None:
    """Of a population; None where trials have nothing to do with each other."""
    if settings.scheduler != "pbt":
        return None
    members = settings.pbt.population or settings.samples
    if members < 2:
        why = "a population has at least two members."
        raise ConfigError("sweep.pbt.population", members, why, "Example: sweep.pbt.population=8")
    if len(settings.points) > members:
        why = f"there are {len(settings.points)} points for them."
        raise ConfigError("sweep.pbt.population", members, why, "Leave some of sweep.points out.")
    return members


class _Counted:
    """A searcher of which only the number of its trials is asked."""

    name, survives = "", ""

    def __init__(self, settings: SweepConfig, space: Space, seed: int, *, samples: int, first: int) -> None:
        self.total = samples

    def suggest(self, number: int) -> Suggestion | None:
        raise AssertionError(number)

    def told(
        self, number: int, values: Mapping[str, Any], resource: float, scores: Sequence[float] | None, state: Told
    ) -> None:
        raise AssertionError(number)

    def rebuild(self, history: Sequence[Past]) -> Rebuilt:
        raise AssertionError(history)


def check_name(name: str) -> None:
    """Raises ConfigError with the nearest name if there is no such searcher."""
    if name not in NAMES and not name.startswith("tune:"):
        near = did_you_mean(name, NAMES) or f"There are {', '.join(NAMES)} and tune:NAME."
        raise ConfigError("sweep.searcher", name, "there is no such searcher.", near)


def inputs_of(space: Space, seed: int, number: int, retry: int, heard: Heard) -> dict[str, Any]:
    """All that a suggestion was made from."""
    return {
        "seed": seed,
        "number": number,
        "retry": retry,
        "space": space.hash,
        "n_told": heard.count,
        "told": heard.digest,
    }
