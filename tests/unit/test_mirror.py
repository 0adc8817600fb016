"""The mirror against a feed and a sink in memory: what arrives, and what happens when something fails in between."""

from __future__ import annotations

import logging
import math
import random

import numpy as np
import pytest

from orchestrator.backends.sinks import SinkGone, SinkRefused, SinkUnavailable
from orchestrator.clock import ManualClock
from orchestrator.records import RunStatus
from orchestrator.tracking.mirror import MirrorConfig, MirrorService, lag_of, text_batches
from tests.plugins.mirror_parts import START, MemoryFeed, RecordingSink

AWAY = SinkUnavailable("recording", "connection refused")
BROKEN = SinkUnavailable("recording", "500", answered=True)


class Mirror:
    """A mirror whose clock the test turns. `restart` is what a crash leaves behind: only the feed and the sink."""

    def __init__(self, **config: float) -> None:
        self.feed, self.sink, self.clock = MemoryFeed(), RecordingSink(), ManualClock(START + 1000)
        self._config = MirrorConfig(**config)  # type: ignore[arg-type]
        self.restart()

    def restart(self) -> None:
        self.service = MirrorService(self.feed, self.sink, config=self._config, clock=self.clock)

    def step(self) -> bool:
        return self.service.step(self.clock.monotonic())

    def settle(self, steps: int = 20, seconds: float = 1.0) -> None:
        for _ in range(steps):
            while self.step():
                pass
            self.clock.advance(seconds)


@pytest.fixture
def mirror() -> Mirror:
    return Mirror()


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def test_a_run_arrives_with_its_points_facts_and_end(mirror: Mirror) -> None:
    mirror.feed.open("r1", params={"lr": 0.1}, tags={"team": "a"})
    mirror.feed.log("r1", "loss", [3.0, 2.0, 1.0])
    mirror.feed.log("r1", "loss", [0.5], first_step=3)
    mirror.step()
    copy = mirror.sink.runs["r1"]
    assert mirror.sink.curve("r1", "loss") == {0: 3.0, 1: 2.0, 2: 1.0, 3: 0.5}
    assert ("loss", int(START * 1000) + 300, 3, "0.5") in copy["points"]
    assert copy["params"] == {"lr": "0.1"}
    assert copy["tags"] == {"team": "a", "orc.status": "RUNNING"}
    assert copy["status"] == (RunStatus.running, None)
    assert mirror.feed.links["r1"]["recording"] == {"run_id": "r1", "url": "memory:r1"}
    mirror.feed.end("r1")
    mirror.step()
    assert copy["status"] == (RunStatus.finished, int((START + 100) * 1000))


def test_a_run_that_declines_the_sink_is_not_copied_and_the_others_are(mirror: Mirror) -> None:
    mirror.feed.open("quiet", config={"recording": {"enabled": "false"}})
    mirror.feed.open("loud", config={"recording": {"enabled": "auto"}})
    mirror.feed.log("quiet", "loss", [1.0])
    mirror.feed.log("loud", "loss", [1.0])
    mirror.settle(2)
    assert set(mirror.sink.runs) == {"loud"}


def test_what_did_not_change_is_not_sent_again(mirror: Mirror) -> None:
    mirror.feed.open("r1", params={"lr": 0.1}, tags={"team": "a"})
    mirror.settle(2)
    before = len(mirror.sink.requests)
    mirror.settle(2)
    assert len(mirror.sink.requests) == before
    mirror.feed.log("r1", "loss", [1.0])
    mirror.settle(1)
    assert mirror.sink.requests[before:] == ["log_metrics"]


def test_a_new_attempt_is_running_again_and_its_own_end_counts(mirror: Mirror) -> None:
    mirror.feed.open("r1")
    mirror.feed.end("r1", RunStatus.crashed)
    mirror.settle(1)
    mirror.feed.change("r1", status=RunStatus.running, ended=None, attempt=2)
    mirror.settle(1)
    assert mirror.sink.runs["r1"]["status"] == (RunStatus.running, None)
    mirror.feed.end("r1", at=START + 500)
    mirror.settle(1)
    assert mirror.sink.runs["r1"]["status"] == (RunStatus.finished, int((START + 500) * 1000))


def test_a_crash_between_sending_and_saving_the_cursor_loses_and_doubles_nothing(mirror: Mirror) -> None:
    mirror.feed.open("r1")
    mirror.feed.log("r1", "loss", range(2500))
    mirror.feed.forgets_cursors = True
    mirror.settle(1)
    assert mirror.sink.received == 2500
    mirror.feed.forgets_cursors = False
    mirror.restart()
    mirror.settle(2)
    assert mirror.sink.received == 5000
    assert mirror.sink.curve("r1", "loss") == {i: float(i) for i in range(2500)}


def test_a_saved_cursor_is_where_the_next_process_goes_on(mirror: Mirror) -> None:
    mirror.feed.open("r1")
    mirror.feed.log("r1", "loss", range(700))
    mirror.settle(1)
    mirror.restart()
    mirror.feed.log("r1", "loss", range(700, 900), first_step=700)
    mirror.settle(1)
    assert mirror.sink.received == 900
    assert len(mirror.sink.curve("r1", "loss")) == 900


@pytest.mark.parametrize("seed", range(30))
def test_crashes_and_failures_at_random_places_lose_and_double_nothing(seed: int) -> None:
    mirror, dice = Mirror(complete=200), random.Random(seed)
    steps = {"a": 0, "b": 0}
    mirror.feed.open("r1")
    for _ in range(60):
        key, count = dice.choice("ab"), dice.randint(1, 90)
        mirror.feed.log("r1", key, [dice.random() for _ in range(count)], first_step=steps[key])
        steps[key] += count
        mirror.sink.faults = [dice.choice([AWAY, BROKEN]) for _ in range(dice.choice([0, 0, 1, 2]))]
        mirror.feed.forgets_cursors = dice.random() < 0.2
        mirror.step()
        if mirror.feed.forgets_cursors or dice.random() < 0.2:
            mirror.restart()
        mirror.clock.advance(dice.random() * 40)
    mirror.feed.forgets_cursors, mirror.sink.faults = False, []
    undisturbed = Mirror(complete=200)
    undisturbed.feed = mirror.feed
    mirror.settle(10, 70)
    undisturbed.feed._cursors.clear()
    undisturbed.restart()
    undisturbed.settle(2)
    assert mirror.sink.runs["r1"]["points"] == undisturbed.sink.runs["r1"]["points"]
    assert lag_of(mirror.feed, "recording").points == 0


def test_a_copy_that_vanished_is_made_again_from_the_start(mirror: Mirror) -> None:
    mirror.feed.open("r1")
    mirror.feed.log("r1", "loss", [1.0, 2.0])
    mirror.settle(1)
    mirror.sink.runs.clear()
    mirror.sink.faults = [SinkGone("recording", "r1", "no such run", False)]
    mirror.feed.log("r1", "loss", [3.0], first_step=2)
    mirror.settle(2)
    assert mirror.sink.curve("r1", "loss") == {0: 1.0, 1: 2.0, 2: 3.0}


def test_a_run_deleted_in_the_sink_is_left_alone_and_reported_once(
    mirror: Mirror, caplog: pytest.LogCaptureFixture
) -> None:
    mirror.feed.open("gone")
    mirror.sink.faults = [SinkGone("recording", "gone", "deleted by a person", True)]
    mirror.settle(30)
    assert mirror.sink.requests == ["ensure_run"]
    mirror.feed.open("other")
    mirror.settle(1)
    assert "other" in mirror.sink.runs
    assert len(warnings(caplog)) == 1


def test_a_run_removed_from_the_feed_is_forgotten(mirror: Mirror) -> None:
    mirror.feed.open("r1")
    mirror.service._backlog.noticed()
    mirror.feed.remove("r1")
    mirror.settle(2)
    assert lag_of(mirror.feed, "recording").runs == 0


# -- a sink that fails ------------------------------------------------------------------------------------------------


def test_an_outage_is_reported_once_when_it_begins_and_once_when_it_ends(
    mirror: Mirror, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    mirror.feed.open("r1")
    mirror.settle(1)
    mirror.sink.is_down = AWAY
    mirror.feed.log("r1", "loss", range(3000))
    mirror.settle(300)
    assert len(warnings(caplog)) == 1
    assert mirror.service.health()["state"] in ("open", "half-open")
    mirror.sink.is_down = None
    mirror.settle(40)
    assert [record.getMessage() for record in caplog.records][-1] == "mirror recording works again and catches up"
    assert len(warnings(caplog)) == 1
    assert mirror.service.health()["state"] == "closed"
    assert len(mirror.sink.curve("r1", "loss")) == 3000


def test_a_dead_sink_is_asked_rarely(mirror: Mirror) -> None:
    mirror.feed.open("r1")
    mirror.sink.is_down = AWAY
    mirror.settle(600)
    assert len(mirror.sink.requests) < 35


def test_a_sink_that_answers_but_cannot_write_is_no_recovery(mirror: Mirror, caplog: pytest.LogCaptureFixture) -> None:
    mirror.feed.open("r1")
    mirror.settle(1)
    mirror.feed.log("r1", "loss", range(10))

    def full(*_: object) -> None:
        raise BROKEN

    mirror.sink.log_metrics = full  # type: ignore[method-assign,assignment]
    mirror.settle(300)
    assert len(warnings(caplog)) == 2  # the outage, and the run put aside; nothing is thrown away
    assert lag_of(mirror.feed, "recording").points == 10


def test_a_server_error_of_one_run_does_not_keep_the_others_waiting(mirror: Mirror) -> None:
    send = mirror.sink.log_metrics

    def breaks_on_one(target, series) -> None:  # type: ignore[no-untyped-def]
        if target.id == "bad":
            raise BROKEN
        send(target, series)

    mirror.sink.log_metrics = breaks_on_one  # type: ignore[method-assign,assignment]
    mirror.feed.open("bad")
    mirror.feed.log("bad", "loss", [1.0])
    for i in range(5):
        mirror.feed.open(f"good{i}")
        mirror.feed.log(f"good{i}", "loss", [1.0])
    mirror.settle(60)
    assert all(mirror.sink.curve(f"good{i}", "loss") == {0: 1.0} for i in range(5))
    assert mirror.service.health()["aside"] == ["bad"]


def test_requests_that_are_too_slow_become_smaller(mirror: Mirror) -> None:
    mirror.feed.open("r1")
    mirror.feed.log("r1", "loss", range(2000))
    send, sizes = mirror.sink.log_metrics, []

    def slow(target, series) -> None:  # type: ignore[no-untyped-def]
        sizes.append(sum(map(len, series)))
        if sizes[-1] > 300:
            raise SinkUnavailable("recording", "timed out")
        send(target, series)

    mirror.sink.log_metrics = slow  # type: ignore[method-assign,assignment]
    mirror.settle(100)
    assert len(mirror.sink.curve("r1", "loss")) == 2000
    assert max(sizes[2:]) <= 500


def test_a_step_begins_nothing_new_when_its_time_is_up(mirror: Mirror) -> None:
    mirror.feed.open("r1")
    mirror.feed.log("r1", "loss", range(10_000))
    send = mirror.sink.log_metrics

    def slow(target, series) -> None:  # type: ignore[no-untyped-def]
        mirror.clock.advance(1.5)
        send(target, series)

    mirror.sink.log_metrics = slow  # type: ignore[method-assign,assignment]
    begun = mirror.clock.monotonic()
    assert mirror.step()
    assert mirror.clock.monotonic() - begun <= 3.0
    mirror.settle(1)
    assert len(mirror.sink.curve("r1", "loss")) == 10_000


def test_a_refused_point_is_left_out_and_all_others_arrive(mirror: Mirror) -> None:
    mirror.feed.open("r1")
    mirror.feed.log("r1", "loss", range(1500))
    mirror.sink.refused_values = {777.0}
    mirror.settle(2)
    assert mirror.sink.curve("r1", "loss") == {i: float(i) for i in range(1500) if i != 777}
    assert mirror.sink.runs["r1"]["tags"]["orc.refused.loss"].startswith("step 777")


def test_a_refused_tag_is_left_out_and_all_others_arrive(mirror: Mirror) -> None:
    mirror.feed.open("r1", tags={f"t{i}": "x" for i in range(20)})
    mirror.feed.log("r1", "loss", [1.0])
    mirror.sink.refused_tags = {"t7"}
    mirror.settle(1)
    assert set(mirror.sink.runs["r1"]["tags"]) == {f"t{i}" for i in range(20) if i != 7} | {"orc.status"}
    assert mirror.sink.curve("r1", "loss") == {0: 1.0}


def test_a_refused_run_is_put_aside_and_tried_again_later(mirror: Mirror) -> None:
    mirror.feed.open("r1")
    mirror.sink.faults = [SinkRefused("recording", "run r1", "no")]
    mirror.settle(30)
    assert mirror.sink.requests == ["ensure_run"]
    mirror.settle(40)
    assert "r1" in mirror.sink.runs
    assert mirror.service.health()["aside"] == []


# -- a feed that fails, and a second mirror ---------------------------------------------------------------------------


def test_a_feed_that_is_away_is_reported_once_and_then_goes_on(
    mirror: Mirror, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    mirror.feed.open("r1")
    mirror.feed.log("r1", "loss", [1.0])
    mirror.feed.is_away = True
    mirror.settle(50)
    assert len(warnings(caplog)) == 1
    assert mirror.service.health()["behind_points"] is None
    mirror.feed.is_away = False
    mirror.settle(50)
    assert mirror.sink.curve("r1", "loss") == {0: 1.0}
    assert [record.getMessage() for record in caplog.records][-1] == "mirror recording has its source back"
    assert len(warnings(caplog)) == 1


def test_only_one_of_two_mirrors_writes(mirror: Mirror) -> None:
    mirror.feed.open("r1")
    mirror.feed.is_locked_elsewhere = True
    mirror.settle(3)
    assert mirror.sink.requests == []
    assert mirror.service.health()["writer"] is False
    mirror.feed.is_locked_elsewhere = False
    mirror.settle(1)
    assert "r1" in mirror.sink.runs


def test_run_repeats_steps_until_it_is_stopped(mirror: Mirror) -> None:
    mirror.feed.open("r1")
    end = mirror.sink.set_status

    def last(*args: object) -> None:
        end(*args)  # type: ignore[arg-type]
        mirror.service.stop()

    mirror.sink.set_status = last  # type: ignore[method-assign,assignment]
    mirror.service.run()
    assert "r1" in mirror.sink.runs


# -- which points -----------------------------------------------------------------------------------------------------


def test_the_plain_key_is_rank_0_whatever_arrives_first(mirror: Mirror) -> None:
    mirror.feed.open("r1")
    mirror.feed.log("r1", "loss", [9.0, 9.0], rank=1)
    mirror.settle(1)
    mirror.feed.log("r1", "loss", [1.0, 2.0], rank=0)
    mirror.feed.log("r1", "loss", [9.0], rank=1, first_step=2)
    mirror.settle(1)
    assert mirror.sink.curve("r1", "loss") == {0: 1.0, 1: 2.0}


def test_a_key_that_rank_0_never_logs_takes_the_lowest_rank_that_does() -> None:
    mirror = Mirror(grace=10.0)
    mirror.clock = ManualClock(START)
    mirror.restart()
    mirror.feed.open("r1")
    for key in ("memory", "disk"):
        mirror.feed.log("r1", key, [3.0, 3.0], rank=3)
        mirror.feed.log("r1", key, [2.0, 2.0], rank=2)
    mirror.settle(5)
    assert mirror.sink.runs["r1"]["points"] == set()
    mirror.settle(7)
    assert mirror.sink.curve("r1", "memory") == {0: 2.0, 1: 2.0}
    assert mirror.sink.curve("r1", "disk") == {0: 2.0, 1: 2.0}
    mirror.restart()
    mirror.feed.log("r1", "memory", [5.0], rank=2, first_step=2)
    mirror.settle(1)
    assert mirror.sink.curve("r1", "memory") == {0: 2.0, 1: 2.0, 2: 5.0}


def test_the_end_of_a_run_waits_for_no_rank() -> None:
    mirror = Mirror(grace=1e9)
    mirror.feed.open("r1")
    mirror.feed.log("r1", "memory", [3.0], rank=3)
    mirror.feed.end("r1")
    mirror.settle(1)
    assert mirror.sink.curve("r1", "memory") == {0: 3.0}


def test_the_driver_is_not_waited_for(mirror: Mirror) -> None:
    mirror.feed.open("r1")
    mirror.feed.log("r1", "system/cpu", [50.0], rank=-1)
    mirror.step()
    assert mirror.sink.curve("r1", "system/cpu") == {0: 50.0}


def test_other_ranks_are_copied_when_asked_for() -> None:
    mirror = Mirror(other_ranks=True)
    mirror.feed.open("r1")
    for rank in range(3):
        mirror.feed.log("r1", "loss", [float(rank)], rank=rank)
    mirror.settle(1)
    assert {point[0]: point[3] for point in mirror.sink.runs["r1"]["points"]} == {
        "loss": "0.0",
        "loss/rank_1": "1.0",
        "loss/rank_2": "2.0",
    }


def test_nan_passes_and_infinities_are_also_tags(mirror: Mirror) -> None:
    mirror.feed.open("r1")
    mirror.feed.log("r1", "loss", [1.0, math.nan, math.inf, -math.inf])
    mirror.settle(1)
    curve = mirror.sink.curve("r1", "loss")
    assert math.isnan(curve[1])
    assert (curve[2], curve[3]) == (math.inf, -math.inf)
    assert mirror.sink.runs["r1"]["tags"]["orc.nonfinite.loss"] == "2:inf,3:-inf"
    mirror.feed.log("r1", "loss", [math.inf] * 30, first_step=4)
    mirror.restart()
    mirror.settle(1)
    assert mirror.sink.runs["r1"]["tags"]["orc.nonfinite.loss"].endswith("21:inf and 12 more")


def test_a_name_the_sink_changes_is_kept_in_a_tag(mirror: Mirror) -> None:
    mirror.feed.open("r1")
    mirror.feed.log("r1", "acc@5", [1.0])
    mirror.settle(1)
    assert mirror.sink.curve("r1", "acc_5") == {0: 1.0}
    assert mirror.sink.runs["r1"]["tags"]["orc.key.acc_5"] == "acc@5"


def test_a_long_curve_is_complete_first_and_then_decimated() -> None:
    mirror = Mirror(complete=1000)
    values = np.sin(np.arange(5000))
    values[3333], values[4444] = 100.0, -100.0
    mirror.feed.open("r1")
    for first in range(0, 5000, 250):
        mirror.feed.log("r1", "loss", list(values[first : first + 250]), first_step=first)
    mirror.settle(3)
    mirror.feed.end("r1")
    mirror.settle(1)
    curve = mirror.sink.curve("r1", "loss")
    assert all(curve[i] == values[i] for i in range(1000))
    assert len(curve) < 1000 + 3 * 400 + 3
    assert (curve[3333], curve[4444], curve[4999]) == (100.0, -100.0, values[4999])
    assert "complete up to 1000" in mirror.sink.runs["r1"]["tags"]["orc.decimated.loss"]


# -- lag and small parts ----------------------------------------------------------------------------------------------


def test_lag_counts_points_and_seconds_that_are_missing_in_the_sink(mirror: Mirror) -> None:
    mirror.feed.open("r1")
    mirror.feed.log("r1", "loss", range(100))
    mirror.settle(2)
    assert mirror.service.lag().points == 0
    mirror.sink.is_down = AWAY
    mirror.feed.log("r1", "loss", range(50), first_step=100)
    mirror.feed.log("r1", "loss", range(50), first_step=100, rank=1)
    mirror.settle(3)
    lag = mirror.service.lag()
    assert (lag.points, lag.runs) == (100, 1)
    assert lag.seconds == pytest.approx(5.0)


def test_text_is_cut_by_entries_and_by_bytes() -> None:
    assert [len(batch) for batch in text_batches({f"k{i}": "v" for i in range(250)})] == [100, 100, 50]
    assert [len(batch) for batch in text_batches({f"k{i}": "ä" * 1000 for i in range(10)}, most_bytes=20_000)] == [
        3,
        3,
        3,
        1,
    ]


def test_many_keys_of_few_points_fill_the_requests(mirror: Mirror) -> None:
    mirror.feed.open("r1")
    for i in range(3000):
        mirror.feed.log("r1", f"k{i}", [float(i)])
    mirror.settle(2)
    assert len(mirror.sink.runs["r1"]["points"]) == 3000
    assert mirror.sink.requests.count("log_metrics") <= 12
