"""What Tune is given and what it says, at the border of its searcher: the real exchange, a core and lanes of few
lines, and a Tune that does what the controller of Ray 2.60 does with a searcher."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest

from orchestrator.errors import ServiceUnavailable
from orchestrator.execution.tuner import DEATHS, Exchange, Given
from orchestrator.records import RunTicket
from orchestrator.sweeps.jobs import Assigned, Ended, Ending


def assigned(job: int) -> Assigned:
    ticket = RunTicket(run=f"r{job}", name="n", experiment="e", attempt=1, directory="/tmp/r")
    return Assigned(job=job, trial=job, repeat=0, rung=0, ticket=ticket, values={}, seed=0)


@dataclass
class Jobs:
    """A core: jobs 0 … n-1, and what was said of them. `lost` jobs come again, as the core does it."""

    count: int
    log: list[str] = field(default_factory=list)
    endings: dict[int, Ending] = field(default_factory=dict)
    breaks_at: int = -1
    asked: int = 0
    _next: deque[int] = field(default_factory=deque)
    _running: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        self._next.extend(range(self.count))

    def next_job(self) -> Assigned | None:
        self.asked += 1
        if not self._next:
            return None
        job = self._next.popleft()
        if job == self.breaks_at:
            raise ServiceUnavailable("the tracker", "somewhere", "it is gone.", "Wait.")
        self._running.add(job)
        self.log.append(f"give {job}")
        return assigned(job)

    def ended(self, job: int, ending: Ending) -> None:
        self._running.remove(job)
        self.log.append(f"end {job}")
        self.endings[job] = ending
        if ending.how is Ended.lost:
            self._next.append(job)

    def is_over(self) -> bool:
        return not self._next and not self._running

    def stop(self, reason: str) -> None:
        self._next.clear()

    def running(self) -> Sequence[Assigned]:
        return [assigned(job) for job in sorted(self._running)]


@dataclass
class Lanes:
    size: int = 2
    desk: str = "desk-0"
    laid: list[int] = field(default_factory=list)

    def put(self, assigned: Assigned) -> None:
        self.laid.append(assigned.job)

    def ending(self, assigned: Assigned, raw: Mapping[str, Any]) -> Ending:
        return Ending(how=Ended(raw.get("how", "lost")))


@dataclass
class Tune:
    """TuneController.step, as far as a searcher sees it."""

    exchange: Exchange
    pending: int = 2
    running: list[Given] = field(default_factory=list)
    given: list[Given] = field(default_factory=list)
    answer: Callable[[Given], Mapping[str, Any] | None] = lambda given: {"how": "complete"}

    def fit(self) -> None:
        while self.running or not self.exchange.is_finished():
            while len(self.running) < self.pending and not self.exchange.is_finished():
                given = self.exchange.next()
                if given is None:
                    break
                self.running.append(given)
                self.given.append(given)
            self.exchange.turn()
            if self.running:
                first = self.running.pop(0)
                self.exchange.ended(first.id, self.answer(first))


def exchange(core: Jobs, lanes: Lanes, **more: Any) -> Exchange:
    return Exchange(core, lanes, **more)


def test_every_job_is_given_once_and_told_once() -> None:
    core, lanes = Jobs(7), Lanes()
    Tune(exchange(core, lanes)).fit()
    assert core.is_over()
    assert lanes.laid == list(range(7))
    assert {ending.how for ending in core.endings.values()} == {Ended.complete}


def test_no_more_jobs_are_out_than_there_are_lanes() -> None:
    core, most = Jobs(9), 0

    def answer(given: Given) -> Mapping[str, Any]:
        nonlocal most
        most = max(most, len(core.running()))
        return {"how": "complete"}

    Tune(exchange(core, Lanes(size=3)), pending=10, answer=answer).fit()
    assert most == 3


def test_a_dead_trainable_is_no_end_of_its_job() -> None:
    """The lane works on: another Trainable waits for the same job under another id, before any new one."""
    core, deaths = Jobs(3), [1]

    def answer(given: Given) -> Mapping[str, Any] | None:
        if given.job == 1 and deaths:
            return deaths.clear()
        return {"how": "complete"}

    lanes = Lanes(size=1)
    tune = Tune(exchange(core, lanes), pending=1, answer=answer)
    tune.fit()
    assert core.log == ["give 0", "end 0", "give 1", "end 1", "give 2", "end 2"]
    assert [given.job for given in tune.given] == [0, 1, 1, 2]
    assert lanes.laid == [0, 1, 2], "it lies on the desk already"
    assert len({given.id for given in tune.given}) == 4


def test_trainables_that_die_one_after_the_other_end_the_sweep() -> None:
    core = Jobs(3)
    tune = Tune(exchange(core, Lanes()), answer=lambda given: None)
    with pytest.raises(ServiceUnavailable, match=f"{DEATHS} of its processes died"):
        tune.fit()
    assert core.endings == {}


def test_a_lost_desk_is_told_to_the_core_which_gives_the_job_again() -> None:
    core, losses = Jobs(2), [1]

    def answer(given: Given) -> Mapping[str, Any]:
        if losses:
            losses.clear()
            return {}
        return {"how": "complete"}

    Tune(exchange(core, Lanes(size=1)), pending=1, answer=answer).fit()
    assert core.log == ["give 0", "end 0", "give 1", "end 1", "give 0", "end 0"]


def test_an_error_of_the_core_ends_tune_at_once_and_is_raised() -> None:
    core = Jobs(5, breaks_at=2)
    wires = exchange(core, Lanes())
    tune = Tune(wires)
    with pytest.raises(ServiceUnavailable, match="the tracker"):
        tune.fit()
    assert wires.is_finished()
    assert wires.next() is None
    wires.ended(tune.running[0].id if tune.running else "", {"how": "complete"})
    assert len(core.endings) < 2, "nothing is told to a core that failed"


def test_after_so_many_jobs_the_next_tuner_goes_on() -> None:
    core, lanes = Jobs(7), Lanes()
    wires, fits = exchange(core, lanes, most=3), 0
    while not core.is_over():
        wires.renew()
        Tune(wires).fit()
        fits += 1
    assert fits == 3
    assert lanes.laid == list(range(7))


def test_what_a_tuner_had_when_it_went_is_waited_for_by_the_next() -> None:
    core, lanes = Jobs(3), Lanes(size=2)
    wires = exchange(core, lanes)
    first, second = wires.next(), wires.next()
    assert first is not None
    assert second is not None
    wires.lost()
    wires.renew()
    tune = Tune(wires)
    tune.fit()
    assert [given.job for given in tune.given] == [0, 1, 2]
    assert core.is_over()
    assert not {first.id, second.id} & {given.id for given in tune.given}


def test_the_core_is_not_asked_again_before_anything_happened() -> None:
    core = Jobs(1)
    wires = exchange(core, Lanes(size=2))
    given = wires.next()
    assert given is not None
    for _ in range(50):
        assert wires.next() is None
    assert core.asked == 2
    wires.ended(given.id, {"how": "complete"})
    assert wires.is_finished()


def test_where_everything_is_held_the_turns_go_on_until_there_is_a_job() -> None:
    core = Jobs(0)
    core._running.add(99)  # what a person holds is not over
    turns: list[int] = []

    def turn() -> None:
        turns.append(1)
        if len(turns) == 3:
            core._next.append(5)

    given = exchange(core, Lanes(), on_turn=turn).next()
    assert given is not None
    assert given.job == 5
