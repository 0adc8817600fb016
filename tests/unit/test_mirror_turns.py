"""Whose turn it is, and what a mirror with many runs holds and writes."""

from __future__ import annotations

from collections import Counter

import pytest

from orchestrator.backends.sinks import Series, SinkUnavailable, Target
from orchestrator.clock import ManualClock
from orchestrator.store.views import SinkCursor
from orchestrator.tracking import backlog, mirror
from orchestrator.tracking.backlog import Backlog
from orchestrator.tracking.mirror import MirrorConfig, MirrorService
from orchestrator.tracking.turns import Turns
from tests.plugins.mirror_parts import START, MemoryFeed, RecordingSink


def turns() -> Turns:
    return Turns(linger=10.0, aside=60.0)


def test_of_many_runs_each_waits_for_more_and_a_single_one_does_not() -> None:
    some = turns()
    some.visited("a", 100.0, seconds=0.05, is_small=True, waits=False)
    assert some.due(["a"], 100.0) == ["a"]
    for i in range(20):
        some.visited(f"b{i}", 100.0, seconds=0.05, is_small=True, waits=False)
    some.visited("a", 100.0, seconds=0.05, is_small=True, waits=False)
    assert some.due(["a", "c"], 103.9) == ["c"]
    assert not some.is_any_ready(["a"], 103.9)
    assert some.due(["a", "c"], 104.0) == ["a", "c"]
    some.visited("a", 104.0, seconds=9.0, is_small=True, waits=False)
    assert some.due(["a"], 114.0) == ["a"]  # the longest it waits
    some.visited("a", 114.0, seconds=9.0, is_small=True, waits=False)
    assert some.due(["a"], 114.0) == ["a"]  # the others are silent


def test_a_run_that_has_ended_waits_for_nothing_but_what_was_on_its_way() -> None:
    some = turns()
    for run in ("a", "b", "c"):
        some.visited(run, 100.0, seconds=1.0, is_small=True, waits=run == "b")
    assert some.due(["a", "b", "c"], 101.0) == ["a"]
    assert some.resting(["a", "b", "c"], 101.0) == ["c"], "b waits for its own points"
    for now in (101.0, 101.4):
        some.ended(["c"], now)
        assert some.due(["c"], now) == []
    assert some.due(["c"], 101.5) == ["c"]


def test_a_run_with_much_to_copy_goes_on_at_its_next_turn() -> None:
    some = turns()
    some.visited("b", 100.0, seconds=2.0, is_small=False, waits=False)
    some.visited("a", 100.0, seconds=2.0, is_small=False, waits=False)
    assert some.is_any_ready(["a"], 100.0)
    some.visited("a", 100.0, seconds=2.0, is_small=False, waits=True)
    assert not some.is_any_ready(["a"], 100.0)  # its points come later: no reason to hurry
    assert some.due(["a"], 100.0) == ["a"]


def test_a_refused_run_is_aside_for_growing_pauses_until_it_is_taken() -> None:
    some = turns()
    assert some.put_aside("a", 0.0)
    assert not some.put_aside("a", 60.0)
    assert (some.due(["a"], 179.0), some.due(["a"], 180.0), some.aside) == ([], ["a"], ["a"])
    some.visited("a", 180.0, seconds=0.1, is_small=True, waits=False)
    assert some.aside == []


class Many:
    """Runs that log a little every second, and a sink whose requests take 20 ms each."""

    def __init__(self, runs: int, budget: float = 2.0) -> None:
        self.feed, self.sink, self.clock = MemoryFeed(), RecordingSink(), ManualClock(START)
        self.runs = [f"r{i}" for i in range(runs)]
        self.requests: Counter[str] = Counter()
        send = self.sink.log_metrics

        def slowly(target: Target, series: list[Series]) -> None:
            self.clock.advance(0.02)
            self.requests[target.id] += 1
            send(target, series)

        self.sink.log_metrics = slowly  # type: ignore[method-assign,assignment]
        for run in self.runs:
            self.feed.open(run)
        self.mirror = MirrorService(self.feed, self.sink, config=MirrorConfig(budget=budget), clock=self.clock)
        self.step()
        self.requests.clear()

    def step(self) -> None:
        while self.mirror.step(self.clock.monotonic()):
            pass

    def log(self, seconds: int) -> None:
        for second in range(seconds):
            for run in self.runs:
                self.feed.log(run, "loss", [1.0], first_step=second)
            self.step()
            self.clock.advance(1.0)


def test_many_runs_with_few_points_cost_few_requests_and_arrive_within_seconds() -> None:
    many = Many(30)
    many.log(20)
    assert all(3 <= count <= 10 for count in many.requests.values())  # not one a second
    assert min(len(many.sink.curve(run, "loss")) for run in many.runs) >= 20 - 10 - 1
    for _ in range(11):
        many.step()
        many.clock.advance(1.0)
    assert all(len(many.sink.curve(run, "loss")) == 20 for run in many.runs)


def test_one_run_with_a_large_backlog_keeps_nobody_waiting() -> None:
    many = Many(5)
    many.feed.log("r0", "loss", range(200_000))
    begun = many.clock.monotonic()
    for run in many.runs[1:]:
        many.feed.log(run, "loss", [1.0])
    while not all(many.sink.curve(run, "loss") for run in many.runs[1:]):
        many.mirror.step(many.clock.monotonic())
    assert many.clock.monotonic() - begun < 3.0
    assert 0 < many.requests["r0"] < 200


def test_what_is_held_in_memory_is_bounded_and_nothing_is_lost_by_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mirror, "MOST_HELD", 12_000)
    many = Many(6, budget=0.2)
    for run in many.runs:
        for first in range(0, 8000, 1000):
            many.feed.log(run, "loss", range(first, first + 1000), first_step=first)
    held, copies = [], []
    for _ in range(200):
        many.mirror.step(many.clock.monotonic())
        held.append(sum(copy.held for copy in many.mirror._copies.values()))
        copies.append(len(many.mirror._copies))
        many.clock.advance(0.1)
    assert max(held) <= 12_000 + 8000  # what one run reads is not cut
    assert min(copies) < 6
    assert all(len(many.sink.curve(run, "loss")) == 8000 for run in many.runs)


def test_a_sink_says_that_it_lives_also_while_nothing_changes_or_it_fails() -> None:
    feed, said = MemoryFeed(), []
    save = feed.save_cursor

    def saved(sink: str, run: str, cursor: SinkCursor) -> None:
        if not run:
            said.append(cursor.state["state"])
        save(sink, run, cursor)

    feed.save_cursor = saved  # type: ignore[method-assign]
    sink, clock = RecordingSink(), ManualClock(START)
    service = MirrorService(feed, sink, clock=clock)
    for _ in range(130):
        service.step(clock.monotonic())
        clock.advance(1.0)
    assert said == ["closed"] * 3
    feed.open("r1")
    sink.is_down = SinkUnavailable("recording", "gone")
    for _ in range(200):
        service.step(clock.monotonic())
        clock.advance(1.0)
    assert said[-1] in ("open", "half-open")
    (lag,) = feed.sink_lags()
    assert lag.error == "recording: gone"
    sink.is_down = None
    for _ in range(40):
        service.step(clock.monotonic())
        clock.advance(1.0)
    (lag,) = feed.sink_lags()
    assert (lag.state, lag.error, lag.runs) == ("closed", "", 0)


def test_a_long_list_of_runs_is_written_rarely_and_an_empty_one_at_once() -> None:
    feed = MemoryFeed()
    some = Backlog(feed, "recording")
    runs = [f"r{i}" for i in range(3 * backlog.RUNS_PER_SECOND)]
    some.noticed()
    some.save(runs[:-1], 0.0, state="", error="")
    some.save(runs, 2.9, state="", error="")
    assert len(feed.cursor("recording").state["runs"]) == len(runs) - 1
    some.save(runs, 3.0, state="", error="")
    assert len(feed.cursor("recording").state["runs"]) == len(runs)
    some.save([], 3.0, state="", error="")
    assert feed.cursor("recording").state["runs"] == []
