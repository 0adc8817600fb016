"""Population based training.

Jaderberg, Dalibard, Osindero, Czarnecki, Donahue, Razavi, Vinyals, Green, Dunning, Simonyan, Fernando, Kavukcuoglu:
Population Based Training of Neural Networks, 2017. Each member trains for an interval; then those at the bottom take
weights and values from one at the top (exploit, by truncation selection as in its section 4.1.1) and change the
values (explore: perturbed or drawn anew).

Synchronous: a generation is ranked when all its members have ended it, so the outcome does not depend on how many
lanes there are. Asynchronous: each member is ranked at its own milestone against the newest scores of all.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from orchestrator.errors import ConfigError
from orchestrator.seeding import derive
from orchestrator.sweeps.fifo import begun_or_new
from orchestrator.sweeps.grammar import same
from orchestrator.sweeps.state import Choice, Continue, Population, Result, State, Status, Trial, plain, rank

KEPT_MEMBERS = 64
"""Of a ranking in a decision's inputs: the best and the worst ones; the digest speaks for the rest."""
TRIES = 100
"""To find values that the space's constraints allow."""


class Dimension(Protocol):
    """One searched key, as exploring needs it."""

    @property
    def key(self) -> str: ...

    @property
    def is_drawn(self) -> bool:
        """False for a constant or a grid, which exploring leaves."""
        ...

    @property
    def is_listed(self) -> bool:
        """Whether `items` are all its values; else it is a range of numbers."""
        ...

    @property
    def items(self) -> Sequence[Any]: ...

    def value(self, r: float, /) -> Any:
        """The value at this share, 0 <= r < 1, of its distribution."""
        ...

    def fitted(self, number: float, /) -> float | int:
        """The number of the range next to this one: between its ends, whole or a multiple where it must be."""
        ...


class Space(Protocol):
    @property
    def dimensions(self) -> Sequence[Dimension]: ...

    def active(self, values: Mapping[str, Any], /) -> dict[str, Any]:
        """Those of the values whose condition holds."""
        ...

    def contains(self, values: Mapping[str, Any], /) -> str:
        """Why these values are not in the space, or ''."""
        ...


@dataclass(frozen=True, slots=True)
class _Ranking:
    """Members with the results that count now, best first, and who is at either end."""

    members: tuple[tuple[Trial, int, Result], ...]
    """(member, rung of the result, result)."""
    ends: int

    @property
    def top(self) -> tuple[tuple[Trial, int, Result], ...]:
        return self.members[: self.ends]

    @property
    def bottom(self) -> set[int]:
        return {trial.number for trial, _, _ in self.members[len(self.members) - self.ends :]}

    def to_json(self) -> dict[str, Any]:
        entries = [[trial.number, rung, plain(result.score)] for trial, rung, result in self.members]
        half = KEPT_MEMBERS // 2
        shown = entries if len(entries) <= KEPT_MEMBERS else entries[:half] + entries[-half:]
        digest = hashlib.sha256(json.dumps(entries).encode()).hexdigest()[:16]
        return {"ranked": shown, "members": len(entries), "ends": self.ends, "digest": digest}


class PopulationScheduler:
    """Needs the space, to explore. A failed member goes on as a copy of a good one, and stays failed where there is no
    good one; a member that was held or added while the others went on takes nothing over until it is with them.

    With repeats a member is all its runs: their mean is ranked, and each of them goes on from the donor's run of the
    same repeat. A donor of which one run has no checkpoint, because it failed or because somebody deleted it, gives
    nothing; the decision names it in `gone`.
    """

    name = "pbt"
    survives = "everything: members, generations and what was taken over are rows"

    def __init__(self, space: Space) -> None:
        self._space = space

    def next(self, state: State) -> Choice:
        inputs = {"by": self.name, "settings": state.settings.version}
        # All members exist before one goes on: with one lane the first would otherwise be through before the last
        # begins, and never be compared.
        return begun_or_new(state, inputs) or self._onward(state) or state.idle()

    def judge(self, state: State, trial: int) -> Mapping[str, Any]:
        return {}

    def _onward(self, state: State) -> Choice | None:
        top = state.settings.top
        ready: dict[int, list[Trial]] = {}
        for trial in state.trials.values():
            if _is_ready(trial, top):
                ready.setdefault(trial.rung, []).append(trial)
        for generation in sorted(ready):
            choice = self._in_generation(state, generation, ready[generation])
            if choice is not None:
                return choice
        return None

    def _in_generation(self, state: State, generation: int, ready: Sequence[Trial]) -> Choice | None:
        rules = state.settings.population
        assert rules is not None
        if rules.is_sync and any(_is_behind(trial, generation) for trial in state.trials.values()):
            return None
        ranking = _ranking(state, generation if rules.is_sync else None)
        takes_over = [t for t in ready if t.number in ranking.bottom or not t.results[t.rung].is_finite]
        if not rules.is_sync:
            # The lowest number is whose turn it is, whatever it does.
            for trial in ready:
                choice = self._exploit(state, trial, ranking) if trial in takes_over else None
                choice = choice or self._go_on(state, trial, ranking)
                if choice is not None:
                    return choice
            return None
        # Those that take over go first: no donor may go on, and let go of the checkpoint, before it was taken.
        for trial in takes_over:
            choice = self._exploit(state, trial, ranking)
            if choice is not None:
                return choice
        return next((c for trial in ready if (c := self._go_on(state, trial, ranking)) is not None), None)

    def _go_on(self, state: State, trial: Trial, ranking: _Ranking) -> Choice | None:
        if trial.status == Status.failed:
            return None
        rung = trial.rung + 1
        return Continue(
            trial=trial.number, rung=rung, until=state.settings.until(rung), inputs=self._inputs(state, trial, ranking)
        )

    def _exploit(self, state: State, trial: Trial, ranking: _Ranking) -> Choice | None:
        rules, settings = state.settings.population, state.settings
        assert rules is not None
        donors = [
            (donor, rung, result)
            for donor, rung, result in ranking.top
            if result.is_finite
            and not donor.has_returned
            and trial.rung <= rung < settings.top
            # In step, a donor that went on has let go of that checkpoint.
            and (donor.rung == rung or not rules.is_sync)
            and donor.number != trial.number
        ]
        gone = [donor.number for donor, _, result in donors if not result.can_give]
        donors = [(donor, rung, result) for donor, rung, result in donors if result.can_give]
        if not donors:
            return None
        label = ("pbt", trial.rung, trial.number)
        share = random.Random(derive(settings.seed, *label, "donor")).random()
        donor, rung, result = donors[math.floor(share * len(donors))]
        return Continue(
            trial=trial.number,
            rung=rung + 1,
            until=settings.until(rung + 1),
            clone={"trial": donor.number, "rung": rung, **result.given()},
            values=explored(self._space, donor.values, rules, seed=settings.seed, label=label),
            inputs={
                **self._inputs(state, trial, ranking),
                "label": list(label),
                "seed": settings.seed,
                "donors": [each.number for each, _, _ in donors],
                "before": dict(trial.values),
                "of_donor": dict(donor.values),
                **({"gone": gone} if gone else {}),
            },
        )

    def _inputs(self, state: State, trial: Trial, ranking: _Ranking) -> dict[str, Any]:
        found = {"by": self.name, "settings": state.settings.version, "generation": trial.rung}
        return {**found, **ranking.to_json()}


def _is_ready(trial: Trial, top: int) -> bool:
    """Whether it has ended a generation and there is another."""
    if trial.is_held or trial.has_returned or trial.rung >= top or trial.rung not in trial.results:
        return False
    return trial.status in (Status.waiting, Status.failed)


def _is_behind(trial: Trial, generation: int) -> bool:
    """Whether the others wait for it: it lives, and has still to end this generation."""
    if trial.is_held or trial.status not in (Status.proposed, Status.running, Status.waiting):
        return False
    return trial.rung <= generation and generation not in trial.results


def _ranking(state: State, generation: int | None) -> _Ranking:
    """Of one generation, or (None) of everybody's newest results. One whose function returned before counts with its
    last result."""
    rules = state.settings.population
    assert rules is not None
    members = []
    for trial in state.trials.values():
        if trial.status == Status.cancelled or not trial.results:
            continue
        last = max(trial.results)
        rung = last if generation is None or (trial.has_returned and last < generation) else generation
        if rung in trial.results:
            members.append((trial, rung, trial.results[rung]))
    members.sort(key=lambda m: rank(state.settings.direction, m[0].number, m[2].score))
    # Rounded off a little: 0.1 of 30 members are three, not four.
    ends = min(max(1, math.ceil(len(members) * rules.quantile - 1e-9)), len(members) // 2)
    return _Ranking(tuple(members), ends)


def explored(
    space: Space, values: Mapping[str, Any], rules: Population, *, seed: int, label: Sequence[object]
) -> dict[str, Any]:
    """A donor's values, each drawn anew with probability `resample`, else perturbed. Every key has a stream of random
    numbers of its own. Values that the constraints never allow leave the donor's as they are."""
    for retry in range(TRIES):
        found: dict[str, Any] = {}
        for dimension in space.dimensions:
            key = dimension.key
            stream = random.Random(derive(seed, *label, "explore", retry, key))
            is_ours = dimension.is_drawn and (not rules.mutate or key in rules.mutate)
            if key in values and not is_ours:
                found[key] = values[key]
            elif key not in values or stream.random() < rules.resample:
                found[key] = dimension.value(stream.random())
            else:
                factor = rules.factors[math.floor(stream.random() * len(rules.factors))]
                found[key] = neighbour(dimension, values[key], factor)
        # A changed key may switch the condition of another: that one has a value now, or none any more.
        found = space.active(found)
        if not space.contains(found):
            return found
    return dict(values)


def neighbour(dimension: Dimension, value: Any, factor: float) -> Any:
    """A number times `factor`, as its range allows; of a list the item after it for a factor above 1, else the one
    before, and the same at the list's end."""
    if not dimension.is_listed:
        return dimension.fitted(value * factor)
    place = next((i for i, item in enumerate(dimension.items) if same(item, value)), None)
    if place is None:
        return value
    place += 1 if factor > 1 else -1
    return dimension.items[min(max(place, 0), len(dimension.items) - 1)]


def checked(rules: Population, samples: int) -> Population:
    """The rules, or ConfigError where no population can follow them."""
    if samples < 2:
        raise ConfigError("sweep.pbt.population", samples, "must be 2 or more:", "one member has nobody to learn from.")
    if rules.interval <= 0:
        raise ConfigError("sweep.pbt.interval", rules.interval, "must be above 0.")
    if rules.max < rules.interval:
        raise ConfigError("sweep.pbt.max", rules.max, f"is below sweep.pbt.interval = {rules.interval:g}.", "Raise it.")
    if not 0 < rules.quantile <= 0.5:
        raise ConfigError("sweep.pbt.quantile", rules.quantile, "must be above 0 and at most 0.5.")
    if not 0 <= rules.resample <= 1:
        raise ConfigError("sweep.pbt.resample", rules.resample, "is a probability:", "from 0 to 1.")
    if not rules.factors or any(factor <= 0 for factor in rules.factors):
        raise ConfigError("sweep.pbt.factors", list(rules.factors), "needs one factor at least, all above 0.")
    return rules
