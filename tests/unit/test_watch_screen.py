"""What `orc watch` shows, without a run: answers and the time in, text out."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
from rich.cells import cell_len

from orchestrator.cli.sparkline import sparkline
from orchestrator.cli.watch import frame
from orchestrator.cli.watched import HISTORY, Choice, Watched, evenly
from orchestrator.live_records import LiveCheckpoint, LiveRun, LiveState, LiveValue
from orchestrator.status import RunStatus
from orchestrator.store.views import RunDetail, SinkLag

RUN = RunDetail(
    run="r1", name="brave-otter", experiment="e", project="p", user="", status=RunStatus.running, reason="", attempt=1,
    workers=1, job="", sweep="", created=0.0, started=0.0, ended=None, description="", directory="", config={},
    config_hash="", seed=0, model={}, dataset={}, error=None, cancel_requested=None, cancel_requested_by="",
    parents={}, links={},
)  # fmt: skip
STATE = LiveState(
    status=RunStatus.running, attempt=1, step=0, points=0, points_per_second=0.0, steps_per_second=0.0, steps=0,
    epochs=0, sweep="", time=0.0,
)  # fmt: skip


def value(key: str, number: float, *, rank: int = 0, step: int = 1, time: float = 1.0) -> LiveValue:
    return LiveValue(key=key, rank=rank, step=step, time=time, value=number)


def answer(*values: LiveValue, source: str = "redis", **state: Any) -> LiveRun:
    return LiveRun(
        run="r1", state=replace(STATE, **state), values=values, checkpoints=(), source=source, cursor="1-0"
    )  # fmt: skip


def test_a_sparkline_shows_the_shape() -> None:
    assert sparkline([0, 1, 2, 3], 4) == "▁▃▆█"
    assert sparkline(list(range(800)), 8) == "▁▂▃▄▅▆▇█"
    assert sparkline([5.0, 5.0], 10) == "▅▅"
    assert sparkline([], 10) == ""
    assert sparkline([1.0], 0) == ""


def test_a_sparkline_survives_every_number() -> None:
    assert sparkline([math.nan, math.inf], 2) == "××"
    assert sparkline([0.0, math.nan, 1.0], 3) == "▁×█"
    assert sparkline([-1.7e308, 1.7e308], 2) == "▁█"
    assert sparkline([1.7e308] * 10 + [0.0], 2) == "█▁"


def test_of_each_key_the_lowest_rank_is_shown_and_what_tells_most_comes_first() -> None:
    series = [("train/loss", 1), ("train/loss", 0), ("val/acc", 2), ("system/load", 0), ("b", 0)]
    assert Choice().of(series) == [("val/acc", 2), ("train/loss", 0), ("b", 0)]
    assert Choice(all_ranks=True, keys=("train/*",)).of(series) == [("train/loss", 0), ("train/loss", 1)]
    assert Choice(rank=1).of(series) == [("train/loss", 1)]
    assert Choice(keys=("system/*", "b")).of(series) == [("b", 0), ("system/load", 0)]


def test_only_what_is_new_is_told() -> None:
    watched = Watched(RUN, Choice())
    assert len(watched.merge(answer(value("a", 1.0), value("b", math.nan)))) == 2
    assert watched.merge(answer(value("a", 1.0), value("b", math.nan))) == []
    assert watched.merge(answer(value("a", 2.0, step=2), value("system/load", 2.0))) == [value("a", 2.0, step=2)]
    assert [value for _, value in watched.histories["a", 0]] == [1.0, 2.0]


def test_the_record_is_behind_and_only_adds_what_was_missed() -> None:
    watched = Watched(RUN, Choice())
    watched.merge(answer(value("a", 5.0, time=5.0), step=5, time=5.0))
    new = watched.merge(answer(value("a", 4.0, time=4.0), value("b", 1.0), source="database", step=4, time=4.0))
    assert new == [value("b", 1.0)]
    assert (watched.state and watched.state.step, watched.source) == (5, "redis")


def test_the_record_replaces_a_redis_that_stands_still() -> None:
    watched = Watched(RUN, Choice())
    watched.merge(answer(value("a", 5.0, time=5.0), time=5.0))
    assert watched.merge(answer(value("a", 9.0, time=9.0), source="database", time=9.0)) == [value("a", 9.0, time=9.0)]
    assert watched.source == "database"


def test_an_attempt_that_is_over_says_nothing_any_more() -> None:
    watched = Watched(RUN, Choice())
    watched.merge(answer(value("a", 1.0), attempt=2, step=3))
    assert watched.merge(answer(value("a", 7.0), attempt=1, step=90)) == []
    assert watched.state is not None
    assert watched.state.step == 3


def test_the_time_left_follows_the_steps() -> None:
    watched = Watched(RUN, Choice())
    watched.merge(answer(value("a", 1.0), step=100, steps=1000, time=100.0))
    assert watched.eta(100.0) is None
    watched.merge(answer(value("a", 2.0), step=200, steps=1000, time=110.0))
    assert watched.eta(110.0) == pytest.approx(80.0)
    assert watched.eta(120.0) == pytest.approx(70.0)
    watched.merge(answer(step=200, steps=1000, steps_per_second=100.0, time=110.0))
    assert watched.eta(110.0) == pytest.approx(8.0)


def test_the_time_left_follows_the_epochs_where_steps_are_unknown() -> None:
    watched = Watched(RUN, Choice())
    for epoch in range(3):
        watched.merge(answer(value("epoch", float(epoch), time=epoch * 60.0), epochs=10, time=epoch * 60.0))
    assert watched.eta(120.0) == pytest.approx(7 * 60.0)
    assert watched.eta(1e9) == 0.0
    assert "epoch 2/10" in watched.position(120.0)
    assert "ETA 7m00s" in watched.position(120.0)


def test_a_run_that_has_not_begun_is_waited_for() -> None:
    watched = Watched(RUN, Choice())
    assert watched.position(0.0) == "waiting for the first metrics"
    watched.run = replace(RUN, status=RunStatus.crashed)
    assert watched.position(0.0) == "no metrics"


def test_a_document_names_ranks_and_odd_numbers() -> None:
    watched = Watched(RUN, Choice(all_ranks=True))
    new = watched.merge(answer(value("a", math.inf, rank=1), value("a", 1.0, rank=3), step=4, steps=8))
    document = watched.document(new, 9.0)
    assert document["metrics"] == {
        "a": {"step": 1, "value": "inf", "time": 1.0, "rank": 1},
        "a/rank_3": {"step": 1, "value": 1.0, "time": 1.0, "rank": 3},
    }
    assert (document["step"], document["steps"], document["epochs"]) == (4, 8, None)


def test_a_stored_curve_comes_before_what_was_seen() -> None:
    watched = Watched(RUN, Choice())
    watched.merge(answer(value("a", 3.0, time=3.0)))
    watched.merge(answer(value("a", 4.0, time=4.0)))
    assert watched.unseeded() == [("a", 0)]
    watched.seed(("a", 0), [(1.0, 1.0), (2.0, 2.0), (3.0, 3.0)])
    assert [value for _, value in watched.histories["a", 0]] == [1.0, 2.0, 3.0, 4.0]
    assert watched.unseeded() == []


def test_a_curve_covers_all_that_was_seen_evenly_and_memory_is_bounded() -> None:
    watched = Watched(RUN, Choice())
    watched.merge(answer(value("a", 0.0, time=0.0)))
    for second in range(1, 3 * HISTORY):  # ten times slower in the first third
        watched.merge(answer(value("a", float(second), time=second * (10.0 if second < HISTORY else 1.0))))
    history = watched.histories["a", 0]
    assert (len(history) <= HISTORY, history[0]) == (True, (0.0, 0.0))
    assert evenly([(0.0, 1.0), (8.0, 3.0), (9.0, 5.0)], 2) == [1.0, 4.0]
    assert evenly([(0.0, 1.0), (100.0, 2.0), (101.0, 3.0), (102.0, 4.0)], 3) == [1.0, 1.0, 3.0]
    assert evenly([(5.0, 1.0), (5.0, 2.0), (5.0, 3.0)], 2) == [1.0, 2.0, 3.0]  # one moment has no even parts


LONG = ("verlust/größe/学習率/🙂/" + "x" * 300, "日本語", "a\x1b[2J\nb", *(f"k/{number}" for number in range(40)))


@pytest.mark.parametrize(("width", "height"), [(24, 4), (40, 9), (79, 23), (200, 99)])
def test_a_frame_fits_its_terminal_and_keeps_the_numbers(width: int, height: int) -> None:
    watched = Watched(RUN, Choice())
    for step in range(45, 50):
        watched.merge(answer(*(value(key, step / 7, step=step, time=float(step)) for key in LONG), step=step))
    watched.trouble = "no answer. " * 40
    lines = ["".join(piece for piece, _ in line) for line in frame(watched, 60.0, width, height)]
    assert len(lines) <= height
    rows = [line for line in lines if " 49" in line and "step" not in line]
    assert len(rows) >= min(1, height - 3)
    assert all("7" in row and cell_len(row) <= width for row in rows)
    assert all(line.isprintable() for line in lines)
    if height == 99:
        assert len(rows) == len(LONG)
    elif height > 4:
        assert any("more" in line and "--keys" in line for line in lines)


def test_a_choice_that_fits_nothing_says_so() -> None:
    watched = Watched(RUN, Choice(keys=("nokey",)))
    watched.merge(answer(value("a", 1.0), value("b", 1.0, rank=3)))
    assert "nothing fits --keys and --rank; there are 2 metrics of rank 0, 3" in watched.notes(0.0)


def test_notes_tell_of_checkpoints_mirrors_and_what_is_hidden() -> None:
    watched = Watched(RUN, Choice())
    watched.merge(answer(value("system/load", 1.0), source="database"))
    watched.checkpoints = (
        LiveCheckpoint(
            id="step-3", uri="", state="committed", label="", step=3, epoch=None, size_bytes=2048, is_best=True,
            time=40.0,
        ),
    )  # fmt: skip
    lag = SinkLag(sink="mlflow", points=7, seconds=1.5, runs=1, state="closed", error="", updated=0.0)
    watched.mirrors = [lag, replace(lag, sink="directory", runs=0), replace(lag, sink="tb", error="disk full")]
    told = "\n".join(watched.notes(100.0))
    assert "step-3 (2.0 KiB, 1m ago, best)" in told
    assert "mlflow: 1.5s and 7 points behind  tb: disk full" in told  # run directories are behind on purpose
    assert "1 more     --keys" in told
    assert "not from Redis" in told
