"""The newest values are kept, coalesced and bounded; publishing them disturbs nobody, whatever Redis does."""

from __future__ import annotations

import json
import math
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from orchestrator import live_records
from orchestrator.live_records import LiveRun, LiveState, LiveValue
from orchestrator.records import LOST, POINT, Batch, Fact, FactKind, RunSpec, RunStatus, RunTicket, Stream
from orchestrator.records import facts_payload as payload_of
from orchestrator.tracking import live as module
from orchestrator.tracking.live import WATCHED, LiveChange, LivePublisher, LiveValues, newest_points, planned

TICKET = RunTicket(run="r", name="n", experiment="e", attempt=1, directory="")


def batch(
    *values: tuple[str, float], run: str = "r", attempt: int = 1, rank: int = 0, step: int = 1, lost: Sequence[int] = ()
) -> Batch:
    keys = tuple(dict.fromkeys(key for key, _ in values))
    points = np.zeros(len(values), POINT)
    points["key"] = [keys.index(key) for key, _ in values]
    points["value"] = [value for _, value in values]
    points["step"], points["time"] = step + np.arange(len(values)), 1e9
    points["flags"][list(lost)] = LOST
    return Batch(
        producer="ab" * 16, run=run, attempt=attempt, rank=rank, stream=Stream.points, first=1, count=len(values),
        keys=keys, payload=points.tobytes(),
    )  # fmt: skip


def facts(*said: tuple[FactKind, dict[str, Any]], attempt: int = 1) -> Batch:
    entries = [Fact(kind=kind, at=5.0, data=data) for kind, data in said]
    return Batch(
        producer="cd" * 16, run="r", attempt=attempt, rank=0, stream=Stream.facts, first=1, count=len(entries),
        payload=payload_of(entries),
    )  # fmt: skip


def changes(live: LiveValues, at_most: int) -> list[LiveChange]:
    """What is published of runs whose plans nobody knows."""
    live.recalled(live.unplanned(), {})
    return live.changes(at_most)


class Memory:
    """A Redis in memory that can be away (`error`) and forget."""

    def __init__(self) -> None:
        self.values: dict[tuple[str, str, int], float] = {}
        self.states: dict[str, LiveState] = {}
        self.error: Exception | None = None
        self.written = 0
        self.tokens: set[str] = set()
        self.followed: set[str] = set()

    def write(self, changes: Sequence[LiveChange], token: str) -> bool:
        if self.error:
            raise self.error
        is_known = token in self.tokens
        self.tokens.add(token)
        for change in changes:
            self.states[change.run] = change.state
            self.written += len(change.values)
            self.values |= {(change.run, key, rank): value for key, rank, _, _, value in change.values}
        return is_known

    def recall(self, runs: Sequence[str]) -> Mapping[str, LiveState]:
        return {run: self.states[run] for run in runs if run in self.states}

    def watched(self, runs: Sequence[str]) -> set[str]:
        return self.followed & set(runs)

    def forget(self) -> None:
        self.values, self.states, self.tokens = {}, {}, set()

    def close(self) -> None:
        pass


def test_new_keys_may_come_while_somebody_watches() -> None:
    live, broken, done = LiveValues(), [], threading.Event()

    def watch() -> None:
        while not done.is_set():
            try:
                live.of("r")
                changes(live, 100)
            except (RuntimeError, KeyError) as error:
                broken.append(error)
                return

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        watchers = [threading.Thread(target=watch) for _ in range(2)]
        for watcher in watchers:
            watcher.start()
        for number in range(500):
            live.take(batch((f"key/{number}", 0.0)))
        done.set()
        for watcher in watchers:
            watcher.join()
    finally:
        sys.setswitchinterval(before)
    assert not broken
    assert len(live.of("r")["metrics"]) == 500


@pytest.mark.parametrize("size", [3, 64, 65, 1000])
@pytest.mark.parametrize("names", [3, 5000])
def test_the_last_point_of_each_key_counts(size: int, names: int) -> None:
    points = np.zeros(size, POINT)
    points["key"], points["step"], points["value"] = np.arange(size) % 3, np.arange(size), np.arange(size) * 0.5
    points["flags"][-1] = LOST
    points["key"][0] = 1 << 31  # no key of the table: damaged
    keys = tuple(f"k{number}" for number in range(names))
    given = Batch(
        producer="ab" * 16, run="r", attempt=1, rank=0, stream=Stream.points, first=1, count=size, keys=keys,
        payload=points.tobytes(),
    )  # fmt: skip
    newest, step, count = newest_points(given)
    good = list(range(1, size - 1))
    assert newest == {f"k{key}": (n, 0.0, n * 0.5) for key in range(3) for n in good if n % 3 == key}
    assert (step, count) == (size - 2, size - 1)


def test_a_batch_of_lost_points_changes_nothing() -> None:
    live = LiveValues()
    live.take(batch(("a", 1.0), ("b", 2.0), lost=(0, 1)))
    assert live.of("r") == {}


def test_values_coalesce_until_they_are_asked_for() -> None:
    live = LiveValues()
    for value in range(10):
        live.take(batch(("loss", float(value)), ("acc", 0.5), step=value))
    (change,) = changes(live, 100)
    assert sorted((key, value) for key, *_, value in change.values) == [("acc", 0.5), ("loss", 9.0)]
    assert changes(live, 100) == []
    live.take(batch(("loss", 10.0)))
    (change,) = changes(live, 100)
    assert [value[0] for value in change.values] == ["loss"]


def test_what_does_not_fit_one_publication_comes_with_the_next() -> None:
    live = LiveValues()
    live.take(batch(*((f"k{number}", 1.0) for number in range(25))))
    live.take(batch(("x", 1.0), run="other"))
    seen: list[str] = []
    while found := changes(live, 10):
        assert sum(len(change.values) for change in found) <= 10
        seen += [key for change in found for key, *_ in change.values]
    assert sorted(seen) == sorted(["x", *(f"k{number}" for number in range(25))])


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_RUNS", 3)
    monkeypatch.setattr(module, "MAX_SERIES", 4)
    live = LiveValues()
    for number in range(10):
        live.take(batch(*((f"k{n}", 1.0) for n in range(9)), run=f"r{number}"))
    assert [bool(live.of(f"r{number}")) for number in range(10)] == [False] * 7 + [True] * 3
    assert len(live.of("r9")["metrics"]) == 4
    assert {change.run for change in changes(live, 1000)} == {"r7", "r8", "r9"}


def test_of_each_key_the_lowest_rank_speaks_and_all_ranks_are_kept() -> None:
    live = LiveValues()
    for rank in (3, 1, 2):
        live.take(batch(("loss", float(rank)), rank=rank))
    assert live.of("r")["metrics"]["loss"] == {"rank": 1, "step": 1, "value": 1.0}
    (change,) = changes(live, 100)
    assert sorted(rank for _, rank, *_ in change.values) == [1, 2, 3]


def test_each_rank_tells_whether_it_gets_on_and_its_sampler_does_not() -> None:
    live = LiveValues()
    live.take(batch(("perf/step_time", 0.5), ("loss", 1.0), rank=1, step=7))
    live.take(batch(("system/process/rss_bytes", 9.0), ("system/load", 1.0), rank=0, step=90))
    assert live.of("r")["ranks"] == [
        {"rank": 0, "step": 0, "time": 0.0, "values": {"system/process/rss_bytes": (1e9, 9.0)}},
        {"rank": 1, "step": 8, "time": 1e9, "values": {"perf/step_time": (1e9, 0.5)}},
    ]


def test_what_an_old_attempt_left_does_not_replace_what_the_new_one_logs() -> None:
    live = LiveValues()
    live.take(batch(("loss", 1.0), step=90))
    live.take(batch(("loss", 2.0), attempt=2, step=50))
    live.take(batch(("loss", 1.5), step=91))
    assert live.of("r")["metrics"]["loss"]["value"] == 2.0
    assert live.of("r")["step"] == 50


def test_status_and_newest_checkpoints_come_from_facts() -> None:
    live = LiveValues()
    live.opened(TICKET, RunSpec(experiment="e", sweep="s", params={"epochs": 3}))
    for number in range(8):
        live.take(facts((FactKind.checkpoint, {"id": f"step-{number}", "step": number, "is_best": number == 7})))
    live.take(facts((FactKind.checkpoint, {"id": "step-7", "step": 7, "state": "deleted"})))
    live.take(facts((FactKind.param, {"name": "x", "value": "checkpoint"}), (FactKind.status, {"status": "FINISHED"})))
    (change,) = changes(live, 100)
    assert change.checkpoints is not None
    assert [each.id for each in change.checkpoints] == [f"step-{number}" for number in (7, 6, 5, 4, 3)]
    assert (change.checkpoints[0].state, change.state.status) == ("deleted", RunStatus.finished)
    assert (change.state.sweep, change.state.epochs) == ("s", 3)
    live.take(facts((FactKind.status, {"status": "no such"}), (FactKind.checkpoint, {})))
    assert changes(live, 100) == []


def test_a_crash_is_told_unless_a_later_attempt_runs() -> None:
    live = LiveValues()
    live.opened(TICKET, RunSpec(experiment="e"))
    live.ended("r", 1, RunStatus.crashed)
    assert changes(live, 9)[0].state.status is RunStatus.crashed
    live.take(batch(("a", 1.0), attempt=2))
    live.ended("r", 1, RunStatus.crashed)
    assert changes(live, 9)[0].state.status is RunStatus.running


def test_totals_are_taken_from_the_usual_names_of_a_config() -> None:
    assert planned({"optim.steps": 7, "max_steps": 100, "epochs": 5, "model.epochs": 9}) == (100, 5)
    assert planned({"epochs": True, "steps": "many", "epoch": 3, "max_epochs": -1}) == (0, 0)


def publisher(sink: Memory) -> tuple[LiveValues, LivePublisher]:
    live = LiveValues()
    return live, LivePublisher(live, lambda: sink)


def test_after_an_outage_everything_is_written_once_more(caplog: pytest.LogCaptureFixture) -> None:
    sink = Memory()
    live, out = publisher(sink)
    live.take(batch(("a", 1.0)))
    out.step(0.0)
    sink.forget()
    sink.error = ConnectionError("gone")
    live.take(batch(("b", 2.0)))
    for now in range(1, 300):
        assert out.step(float(now)) > 0
    sink.error = None
    for now in range(300, 320):
        out.step(float(now))
    assert sink.values == {("r", "a", 0): 1.0, ("r", "b", 0): 2.0}
    warnings = [record for record in caplog.records if record.levelname == "WARNING"]
    assert len(warnings) == 1


def test_a_redis_that_forgot_everything_gets_it_again_also_of_a_quiet_run() -> None:
    sink = Memory()
    live, out = publisher(sink)
    live.take(batch(("a", 1.0)))
    out.step(0.0)
    sink.forget()
    out.step(5.0)
    out.step(5.1)
    assert sink.values == {("r", "a", 0): 1.0}


def test_runs_count_as_watched_while_somebody_follows_them_and_a_little_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("orchestrator.tracking.live.time.monotonic", lambda: now)
    sink = Memory()
    sink.followed = {"r"}
    live, out = publisher(sink)
    for run in ("r", "other"):
        live.take(batch(("a", 1.0), run=run))
    assert not live.is_watched("r")
    out.step(now)
    assert live.is_watched("r")
    assert not live.is_watched("other")
    now += WATCHED + 1
    assert not live.is_watched("r")


def test_nothing_is_written_while_nothing_changes() -> None:
    sink = Memory()
    live, out = publisher(sink)
    live.take(batch(("a", 1.0)))
    for now in range(5):
        out.step(float(now))
    before = sink.written
    for now in range(5, 50):
        out.step(float(now))
    assert sink.written == before


def test_a_new_tracker_remembers_the_plan_of_a_run_that_it_did_not_open() -> None:
    sink = Memory()
    live, out = publisher(sink)
    live.opened(TICKET, RunSpec(experiment="e", sweep="s", params={"steps": 10}))
    out.step(0.0)
    live, out = publisher(sink)
    live.take(batch(("a", 1.0)))
    out.step(1.0)
    assert (sink.states["r"].sweep, sink.states["r"].steps) == ("s", 10)


def test_many_runs_that_a_new_tracker_did_not_open_keep_their_plans() -> None:
    sink, runs = Memory(), [f"r{number}" for number in range(1200)]
    sink.states = {run: replace(STATE, sweep="s", steps=10) for run in runs}
    live, out = publisher(sink)
    for run in runs:
        live.take(batch(("a", 1.0), run=run))
    for now in range(5):
        out.step(float(now))
    assert len(sink.values) == len(runs)
    assert {(state.sweep, state.steps) for state in sink.states.values()} == {("s", 10)}


def test_the_time_before_the_first_step_does_not_count_for_the_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: clock[-1])
    live = LiveValues()
    live.opened(TICKET, RunSpec(experiment="e"))
    live.take(batch(("system/load", 1.0), step=0))
    for now, step in ((104.0, 10), (105.0, 20), (106.0, 30)):
        clock.append(now)
        live.take(batch(("a", 1.0), step=step))
    (change,) = changes(live, 100)
    assert change.state.steps_per_second == 10.0


# -- JSON

STATE = LiveState(
    status=RunStatus.running, attempt=1, step=2, points=3, points_per_second=0.5, steps_per_second=0.0, steps=0,
    epochs=0, sweep="", time=1.5,
)  # fmt: skip


@pytest.mark.parametrize("value", [0.1, -0.0, 5e-324, 1.7976931348623157e308, math.inf, -math.inf, 3.0])
def test_every_value_survives_json(value: float) -> None:
    text = live_records.value_json('k"ü\n', 3, -7, 1e9, value)
    assert live_records.value_from(json.loads(text)) == LiveValue(key='k"ü\n', rank=3, step=-7, time=1e9, value=value)


def test_nan_survives_json() -> None:
    found = live_records.value_from(json.loads(live_records.value_json("k", 0, 0, 0.0, math.nan)))
    assert found is not None
    assert math.isnan(found.value)


def test_a_run_survives_json() -> None:
    run = LiveRun(
        run="r", state=STATE, values=(LiveValue(key="a", rank=0, step=1, time=2.0, value=-math.inf),),
        checkpoints=(live_records.LiveCheckpoint(
            id="c", uri="u", state="s", label="", step=None, epoch=1, size_bytes=None, is_best=True, time=1.0),),
        source="redis", cursor="1-0",
    )  # fmt: skip
    assert live_records.run_from(json.loads(json.dumps(live_records.run_document(run), allow_nan=False))) == run


@pytest.mark.parametrize(
    "poison",
    ["", "nonsense", "[]", "7", "null", '{"key":"a"}', "[" * 5000, '{"key":1,"rank":0,"step":1,"time":1,"value":1}',
     '{"key":"a","rank":true,"step":1,"time":1,"value":1}', '{"key":"a","rank":0,"step":1,"time":1,"value":"x"}',
     '{"key":"a","rank":0,"step":1,"time":1' + "0" * 400 + ',"value":1}',
     '{"key":"","rank":0,"step":1,"time":1,"value":1}'],
)  # fmt: skip
def test_poison_is_no_value(poison: str) -> None:
    assert live_records.value_from(live_records.loaded(poison)) is None
    assert live_records.state_from(live_records.loaded(poison)) is None
