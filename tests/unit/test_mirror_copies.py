"""What a copy is made of beyond one rank's points: attempts, reductions, datasets, files, and a run's own wishes."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest

from orchestrator.backends.sinks import SinkGone, SinkRefused, SinkUnavailable
from orchestrator.clock import ManualClock
from orchestrator.records import RunStatus
from orchestrator.tracking.mirror import MirrorConfig, MirrorService, lag_of
from tests.plugins.mirror_parts import START, MemoryFeed, RecordingSink

AWAY = SinkUnavailable("recording", "connection refused")


class Mirror:
    """A mirror whose clock the test turns. `restart` is what a crash leaves behind: only the feed and the sink."""

    def __init__(self, feed: MemoryFeed | None = None, **config: float) -> None:
        self.feed, self.sink, self.clock = feed or MemoryFeed(), RecordingSink(), ManualClock(START + 1000)
        self._config = MirrorConfig(**config)  # type: ignore[arg-type]
        self.restart()

    def restart(self) -> None:
        self.service = MirrorService(self.feed, self.sink, config=self._config, clock=self.clock)

    def settle(self, steps: int = 3, seconds: float = 1.0) -> None:
        for _ in range(steps):
            while self.service.step(self.clock.monotonic()):
                pass
            self.clock.advance(seconds)


@pytest.fixture
def mirror() -> Mirror:
    return Mirror()


# -- attempts ---------------------------------------------------------------------------------------------------------


def test_one_attempt_is_one_run_and_a_second_makes_two_children(mirror: Mirror) -> None:
    mirror.feed.open("r1", params={"lr": 0.1}, tags={"team": "a"}, git={"commit": "aaa"}, provenance={"host": "n1"})
    mirror.feed.log("r1", "loss", [9.0, 8.0, 7.0])
    mirror.settle()
    assert set(mirror.sink.runs) == {"r1"}
    mirror.feed.end("r1", RunStatus.crashed, at=START + 40)
    mirror.feed.change("r1", attempt=2, status=RunStatus.running, ended=None, git={"commit": "bbb"})
    mirror.feed.log("r1", "loss", [6.5, 6.0], first_step=2, attempt=2)
    mirror.settle()
    mirror.feed.log("r1", "loss", [5.0], first_step=4, attempt=2)
    mirror.feed.end("r1")
    mirror.settle()
    run, first, second = (mirror.sink.runs[name] for name in ("r1", "r1.1", "r1.2"))
    assert mirror.sink.curve("r1.1", "loss") == {0: 9.0, 1: 8.0, 2: 7.0}
    assert mirror.sink.curve("r1.2", "loss") == {2: 6.5, 3: 6.0, 4: 5.0}
    assert {(step, value) for _, _, step, value in run["points"]} == {
        (0, "9.0"), (1, "8.0"), (2, "7.0"), (2, "6.5"), (3, "6.0"), (4, "5.0"),
    }  # fmt: skip
    assert first["status"] == (RunStatus.crashed, round((START + 40) * 1000))
    assert second["status"] == run["status"] == (RunStatus.finished, round((START + 100) * 1000))
    assert (first["facts"].name, first["facts"].parent, first["facts"].git["commit"]) == (
        "calm-otter attempt 1", "r1", "aaa",
    )  # fmt: skip
    assert second["facts"].git["commit"] == "bbb"
    assert (first["params"], first["tags"]) == ({}, {"orc.status": "CRASHED"})


def test_late_points_of_an_earlier_attempt_go_to_its_child_and_not_behind_the_later_one(mirror: Mirror) -> None:
    mirror.feed.open("r1")
    mirror.feed.log("r1", "loss", [9.0, 8.0])
    mirror.settle()
    mirror.feed.change("r1", attempt=2)
    mirror.feed.log("r1", "loss", [7.5], first_step=2, attempt=2)
    mirror.settle()
    mirror.restart()
    mirror.feed.log("r1", "loss", [7.0, 6.0], first_step=2)  # from a node that was cut off
    mirror.feed.end("r1")
    mirror.settle()
    assert mirror.sink.curve("r1", "loss") == {0: 9.0, 1: 8.0, 2: 7.5}
    assert mirror.sink.curve("r1.1", "loss") == {0: 9.0, 1: 8.0, 2: 7.0, 3: 6.0}
    assert mirror.service.lag().points == 0


def test_a_child_that_a_person_deleted_holds_up_neither_the_run_nor_the_other_children(mirror: Mirror) -> None:
    mirror.feed.open("r1")
    mirror.feed.change("r1", attempt=2)
    ensure = mirror.sink.ensure_run

    def without_first(facts):  # type: ignore[no-untyped-def]
        if facts.attempt_of and facts.attempt == 1:
            raise SinkGone("recording", "r1", "deleted by a person", True)
        return ensure(facts)

    mirror.sink.ensure_run = without_first  # type: ignore[method-assign]
    mirror.feed.log("r1", "loss", [1.0], attempt=2)
    mirror.feed.end("r1")
    mirror.settle()
    assert set(mirror.sink.runs) == {"r1", "r1.2"}
    assert mirror.sink.runs["r1"]["status"][0] is RunStatus.finished
    assert lag_of(mirror.feed, "recording").runs == 0


def test_an_attempt_that_is_over_and_copied_is_not_read_again(mirror: Mirror) -> None:
    mirror.feed.open("r1")
    mirror.feed.log("r1", "loss", [1.0])
    mirror.feed.change("r1", attempt=2)
    mirror.settle()
    asked: list[str] = []
    save = mirror.feed.save_cursor
    mirror.feed.save_cursor = lambda sink, run, cursor: (asked.append(run), save(sink, run, cursor))[1]  # type: ignore[method-assign]
    mirror.feed.log("r1", "loss", [2.0], first_step=1, attempt=2)
    mirror.settle()
    assert set(asked) == {"", "r1", "r1/attempt-2"}


# -- reductions -------------------------------------------------------------------------------------------------------


def test_the_plain_key_is_the_declared_reduction() -> None:
    mirror = Mirror(other_ranks=True)
    mirror.feed.reductions["loss"] = "mean"
    mirror.feed.open("r1", workers=2)
    mirror.feed.log("r1", "loss", [1.0, 2.0, 3.0])
    mirror.feed.log("r1", "lr", [0.5])
    mirror.settle()
    assert mirror.sink.curve("r1", "loss") == {}
    mirror.restart()
    mirror.feed.log("r1", "loss", [3.0, 4.0], rank=1)
    mirror.settle()
    assert mirror.sink.curve("r1", "loss") == {0: 2.0, 1: 3.0}
    assert mirror.sink.curve("r1", "loss/rank_0") == {0: 1.0, 1: 2.0, 2: 3.0}
    assert mirror.sink.curve("r1", "loss/rank_1") == {0: 3.0, 1: 4.0}
    assert mirror.sink.curve("r1", "lr") == {0: 0.5}
    assert mirror.sink.runs["r1"]["tags"]["orc.reduction.loss"] == "mean over ranks"


def test_the_end_of_an_attempt_gives_out_what_a_dead_rank_left_open_after_a_grace_time() -> None:
    mirror = Mirror(grace=10.0)
    mirror.feed.reductions["loss"] = "mean"
    mirror.feed.open("r1", workers=2)
    mirror.feed.log("r1", "loss", [1.0, 2.0, 3.0])
    mirror.feed.log("r1", "loss", [3.0], rank=1)
    mirror.settle(20)
    assert mirror.sink.curve("r1", "loss") == {0: 2.0}
    mirror.feed.end("r1", RunStatus.crashed)
    mirror.settle(5)
    mirror.feed.log("r1", "loss", [4.0], rank=1, first_step=1)  # what was still on its way
    mirror.settle(4)
    assert mirror.sink.curve("r1", "loss") == {0: 2.0, 1: 3.0}
    assert mirror.sink.runs["r1"]["status"][0] is RunStatus.running
    mirror.settle(12)
    assert mirror.sink.curve("r1", "loss") == {0: 2.0, 1: 3.0, 2: 3.0}
    assert mirror.sink.runs["r1"]["status"][0] is RunStatus.crashed
    mirror.feed.log("r1", "loss", [5.0], rank=1, first_step=2)
    mirror.settle(12)
    assert mirror.sink.curve("r1", "loss") == {0: 2.0, 1: 3.0, 2: 3.0}
    assert mirror.sink.runs["r1"]["tags"]["orc.late.loss"].startswith("1 points")
    assert lag_of(mirror.feed, "recording").points == 0


class Died(BaseException):
    """The process is gone: nothing catches it."""


def die_after(mirror: Mirror, count: int) -> None:
    """The mirror dies right after so many requests to the sink or writes of cursors were done."""
    done = 0

    def dying(call):  # type: ignore[no-untyped-def]
        def called(*args: object) -> object:
            nonlocal done
            answer = call(*args)
            done += 1
            if done == count:
                raise Died
            return answer

        return called

    for name in ("ensure_run", "set_tags", "log_params", "log_metrics", "log_datasets", "set_status"):
        setattr(mirror.sink, name, dying(getattr(mirror.sink, name)))
    mirror.feed.save_cursor = dying(mirror.feed.save_cursor)  # type: ignore[method-assign]


@pytest.mark.parametrize("dies_after", range(1, 12))
def test_a_rank_that_was_given_up_doubles_nothing_wherever_the_mirror_died(dies_after: int) -> None:
    """The mirror stops waiting, sends, and dies before it can note it; then the rank logs after all."""
    mirror = Mirror(grace=2.0)
    mirror.feed.reductions["loss"] = "sum"
    mirror.feed.open("r1", workers=3)
    mirror.feed.log("r1", "loss", [1.0] * 4)
    mirror.feed.log("r1", "loss", [1.0] * 4, rank=1)
    die_after(mirror, dies_after)
    with pytest.raises(Died):
        mirror.settle(5)
    mirror.restart()
    mirror.feed.log("r1", "loss", [1.0] * 6, rank=2)
    for rank in (0, 1):
        mirror.feed.log("r1", "loss", [1.0] * 2, rank=rank, first_step=4)
    mirror.feed.end("r1")
    mirror.settle(5)
    assert list(mirror.sink.curve("r1", "loss")) == list(range(6))


def test_a_reduction_that_is_declared_after_the_first_points_leaves_the_curve_as_it_began(mirror: Mirror) -> None:
    mirror.feed.open("r1", workers=2)
    mirror.feed.log("r1", "loss", [1.0])
    send = mirror.sink.log_metrics

    def send_and_die(*args: object) -> None:
        send(*args)  # type: ignore[arg-type]
        raise Died

    mirror.sink.log_metrics = send_and_die  # type: ignore[method-assign,assignment]
    with pytest.raises(Died):
        mirror.settle(1)
    mirror.sink.log_metrics = send  # type: ignore[method-assign]
    mirror.restart()
    mirror.feed.reductions["loss"] = "mean"
    mirror.feed.log("r1", "loss", [9.0, 9.0], rank=1)
    mirror.feed.log("r1", "loss", [2.0], first_step=1)
    mirror.settle(1)
    assert mirror.sink.curve("r1", "loss") == {0: 1.0, 1: 2.0}


def test_wherever_a_mirror_dies_the_next_one_makes_the_same_copy() -> None:
    def written() -> Mirror:
        mirror = Mirror(grace=1.0)
        mirror.feed.reductions["loss"] = "mean"
        mirror.feed.open("r1", workers=2, params={"lr": 0.1}, provenance={"datasets": [{"name": "digits"}]})
        for attempt in (1, 2):
            mirror.feed.change("r1", attempt=attempt)
            for rank, count in ((0, 5), (1, 4)):
                for key in ("loss", "lr"):
                    mirror.feed.log("r1", key, range(count), rank=rank, first_step=3 * attempt, attempt=attempt)
        mirror.feed.end("r1")
        return mirror

    undisturbed = written()
    undisturbed.settle(10)
    expected = {name: {**copy, "facts": None} for name, copy in undisturbed.sink.runs.items()}
    deaths = 0
    while True:
        mirror = written()
        die_after(mirror, deaths + 1)
        try:
            mirror.settle(10)
        except Died:
            deaths += 1
        else:
            break
        mirror.restart()
        mirror.settle(10)
        assert {name: {**copy, "facts": None} for name, copy in mirror.sink.runs.items()} == expected
    assert deaths > 25


@pytest.mark.parametrize("seed", range(8))
def test_crashes_and_failures_lose_and_double_nothing_over_ranks_and_attempts(seed: int) -> None:
    mirror, dice = Mirror(complete=100, grace=1e5), random.Random(seed)
    feed = mirror.feed
    feed.reductions["a"] = "mean"
    feed.open("r1", workers=3)
    for attempt in (1, 2):
        if attempt == 2:
            feed.change("r1", attempt=2)
        steps = {(key, rank): 40 * (attempt - 1) for key in "ab" for rank in range(3)}
        behind = [source for source in steps for _ in range(5)]
        dice.shuffle(behind)
        for key, rank in behind:
            first, count = steps[key, rank], dice.randint(5, 20)
            feed.log("r1", key, [dice.random() for _ in range(count)], first_step=first, rank=rank, attempt=attempt)
            steps[key, rank] += count
            mirror.sink.faults = [AWAY] * dice.choice([0, 0, 1])
            feed.forgets_cursors = dice.random() < 0.2
            mirror.service.step(mirror.clock.monotonic())
            if feed.forgets_cursors or dice.random() < 0.2:
                mirror.restart()
            mirror.clock.advance(dice.random() * 40)
        feed.forgets_cursors, mirror.sink.faults = False, []
        mirror.settle(8, 1e5)
    feed.end("r1")
    mirror.settle(8, 1e5)
    points = {name: copy["points"] for name, copy in mirror.sink.runs.items()}
    feed._cursors.clear()
    undisturbed = Mirror(feed, complete=100, grace=1e5)
    undisturbed.settle(8, 1e5)
    assert points == {name: copy["points"] for name, copy in undisturbed.sink.runs.items()}
    assert set(points) == {"r1", "r1.1", "r1.2"}
    assert all(mirror.sink.curve(name, key) for name in ("r1.1", "r1.2") for key in "ab")


# -- what else belongs to a run ---------------------------------------------------------------------------------------


def test_a_run_s_own_configuration_asks_for_other_ranks_and_a_prefix(mirror: Mirror) -> None:
    asks = {"recording": {"other_ranks": True, "experiment_prefix": "team-a/"}}
    for run, config in (("r1", asks), ("r2", {})):
        mirror.feed.open(run, config=config)
        mirror.feed.log(run, "loss", [1.0])
        mirror.feed.log(run, "loss", [2.0], rank=1)
    mirror.settle()
    assert mirror.sink.curve("r1", "loss/rank_1") == {0: 2.0}
    assert mirror.sink.curve("r2", "loss/rank_1") == {}
    assert mirror.sink.runs["r1"]["facts"].experiment == "team-a/digits"
    assert mirror.sink.runs["r2"]["facts"].experiment == "digits"


@pytest.mark.parametrize(
    "said",
    [
        [{"name": "digits", "fingerprint": "xxh128:ab", "split": "train", "size": 7}],
        {"digits/train": {"name": "digits", "fingerprint": "xxh128:ab", "split": "train", "size": 7}},
        {"datasets": [{"name": "digits", "fingerprint": "xxh128:ab", "split": "train", "size": 7}, 3, {"uri": "x"}]},
    ],
)
def test_declared_datasets_arrive_once(mirror: Mirror, said: object) -> None:
    mirror.feed.open("r1", provenance={"datasets": said})
    mirror.settle()
    mirror.feed.log("r1", "loss", [1.0])
    mirror.settle()
    (dataset,) = mirror.sink.runs["r1"]["datasets"]
    assert (dataset.name, dataset.fingerprint, dataset.split, dataset.size) == ("digits", "xxh128:ab", "train", 7)
    assert mirror.sink.requests.count("log_datasets") == 1


def test_files_are_sent_once_and_again_when_they_change() -> None:
    mirror = Mirror()
    mirror.sink.takes_files = True
    mirror.feed.open("r1", artifacts={"plot.png": "v1", "notes.md": "n"})
    mirror.settle()
    mirror.restart()
    mirror.feed.change("r1", artifacts={"plot.png": "v2", "notes.md": "n"})
    mirror.settle()
    assert mirror.sink.runs["r1"]["files"] == {"plot.png": "v2", "notes.md": "n"}
    assert mirror.sink.requests.count("upload") == 3


@pytest.mark.parametrize("fault", [SinkRefused("recording", "plot.png", "no"), AWAY])
def test_a_file_that_the_sink_does_not_take_holds_up_nothing(fault: Exception) -> None:
    mirror = Mirror()
    mirror.sink.takes_files, mirror.sink.upload_fault = True, fault
    mirror.feed.open("r1", artifacts={f"plot-{i}.png": "v1" for i in range(9)})
    mirror.feed.log("r1", "loss", [1.0, math.nan])
    mirror.feed.end("r1")
    mirror.settle()
    assert len(mirror.sink.curve("r1", "loss")) == 2
    assert mirror.sink.runs["r1"]["status"][0] is RunStatus.finished
    assert lag_of(mirror.feed, "recording").points == 0
    assert mirror.sink.requests.count("upload") == (9 if isinstance(fault, SinkRefused) else 1)
    assert mirror.service.health()["state"] == "closed"
    mirror.settle(9 * 3 + 3, 61)  # one try a minute, three for each file
    assert mirror.sink.requests.count("upload") == (9 if isinstance(fault, SinkRefused) else 27)
    assert lag_of(mirror.feed, "recording").runs == 0


def test_a_file_that_failed_once_arrives_after_a_pause() -> None:
    mirror = Mirror()
    mirror.sink.takes_files, mirror.sink.upload_fault = True, AWAY
    mirror.feed.open("r1", artifacts={"plot.png": "v1"})
    mirror.feed.end("r1")
    mirror.settle()
    mirror.sink.upload_fault = None
    mirror.settle(2, 61)
    assert mirror.sink.runs["r1"]["files"] == {"plot.png": "v1"}
    assert lag_of(mirror.feed, "recording").runs == 0


def test_a_cursor_of_the_version_before_goes_on(mirror: Mirror) -> None:
    """It knew no reductions, attempts and files: what was begun as rank 0's curve stays that."""
    mirror.feed.open("r1", workers=2)
    mirror.feed.log("r1", "loss", [3.0, 2.0])
    mirror.feed.log("r1", "only_1", [7.0], rank=1)
    mirror.settle(15)
    saved = mirror.feed.cursor("recording", "r1")
    old = {name: saved.state[name] for name in ("target", "curves", "ranks", "nonfinite", "last_ms")}
    mirror.feed.save_cursor("recording", "r1", replace(saved, state=old))
    received = mirror.sink.received
    mirror.feed.reductions = {"loss": "mean", "only_1": "sum"}
    mirror.restart()
    for rank in (0, 1):
        mirror.feed.log("r1", "loss", [1.0 + rank], first_step=2, rank=rank)
        mirror.feed.log("r1", "only_1", [8.0 + rank], first_step=1, rank=rank)
    mirror.feed.end("r1")
    mirror.settle(15)
    assert mirror.sink.curve("r1", "loss") == {0: 3.0, 1: 2.0, 2: 1.0}
    assert mirror.sink.curve("r1", "only_1") == {0: 7.0, 1: 8.0}, "rank 0 has it now"
    assert mirror.sink.received == received + 2, "nothing was sent again"
