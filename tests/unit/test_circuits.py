"""Which services are away: one outage however often they fail, told once to a log, a file and each run."""

from __future__ import annotations

import json
import logging
import os
from dataclasses import replace
from pathlib import Path

import pytest

from orchestrator.clock import ManualClock
from orchestrator.tracking.breaker import BreakerState, CircuitBreaker
from orchestrator.tracking.circuits import Circuits, CircuitState, Link, News, Outages, directory_of, told

BEGAN = 1_700_000_000.0


def link(circuits: Circuits, user: str = "commits") -> Link:
    return circuits.link(
        "postgres", lost=f"{user} wait", back=f"{user} go on", breaker=CircuitBreaker(threshold=1, first_pause=1.0)
    )


def words(caplog: pytest.LogCaptureFixture) -> list[tuple[str, str]]:
    return [(record.levelname, record.getMessage()) for record in caplog.records]


def test_a_service_that_comes_and_goes_is_one_outage(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    clock = ManualClock()
    circuits = Circuits("tracker", clock=clock, settle=5.0)
    commits = link(circuits)
    for _ in range(10):
        commits.failed(ConnectionError("no\nroute to postgresql://me:secret@host/db"), clock.monotonic())
        clock.advance(2.0)
        commits.succeeded(clock.monotonic())
        clock.advance(1.0)
    (state,) = circuits.states()
    assert (state.state, state.failures, state.began, state.ended) == ("half-open", 10, BEGAN, 0.0)
    clock.advance(5.0)
    commits.succeeded(clock.monotonic())
    (state,) = circuits.states()
    assert (state.state, state.began, state.ended) == ("closed", BEGAN, clock.now())
    assert words(caplog) == [
        ("WARNING", "commits wait: no route to postgresql://me:***@host/db"), ("INFO", "commits go on"),
    ]  # fmt: skip
    commits.failed("again", clock.monotonic())
    assert circuits.states()[0].began == clock.now()
    assert len(words(caplog)) == 3


def test_users_of_a_service_share_an_outage_and_have_breakers_of_their_own(caplog: pytest.LogCaptureFixture) -> None:
    clock = ManualClock()
    circuits = Circuits("tracker", clock=clock, settle=0.0)
    commits, merging = link(circuits), link(circuits, "merging")
    assert circuits.states() == [], "nobody has tried"
    assert merging.failed("gone", 0.0)
    assert not commits.failed("gone", 0.0)
    assert [record.message for record in caplog.records] == ["merging wait: gone"]
    assert not merging.allows(0.5)
    assert merging.state(1.5) is BreakerState.half_open
    assert not merging.succeeded(1.0), "the commits still fail"
    assert merging.allows(1.0)
    assert not commits.allows(0.5)
    assert circuits.states()[0].is_away
    commits.breaker.failed(1.0)  # a defect of ours says nothing of the service
    assert circuits.states()[0].failures == 2
    assert commits.succeeded(2.0)
    assert not circuits.states()[0].is_away


def test_an_outage_ends_although_nobody_uses_the_service_any_more() -> None:
    clock = ManualClock()
    circuits = Circuits("tracker", clock=clock, settle=5.0)
    commits = link(circuits)
    commits.failed("gone", 0.0)
    assert not commits.succeeded(1.0)
    clock.advance(6.0)
    assert not circuits.states()[0].is_away


def test_others_read_of_living_processes_in_files(tmp_path: Path) -> None:
    directory = directory_of(tmp_path)
    assert told(directory) == []
    clock = ManualClock()
    circuits = Circuits("node/a", directory, clock=clock)
    commits = link(circuits)
    commits.succeeded(0.0)
    assert [(state.by, state.name, state.state) for state in told(directory)] == [("node/a", "postgres", "closed")]
    commits.failed("gone", clock.monotonic())
    (file,) = directory.glob("*.json")
    assert told(directory) == circuits.states()
    assert told(directory, without="node/a") == []
    assert Circuits("tracker", directory).of_all() == circuits.of_all() == circuits.states()
    (directory / "other.json").write_text("{}")
    assert len(told(directory)) == 1
    raw = json.loads(file.read_text())
    file.write_text(json.dumps({**raw, "born": "1"}))
    assert told(directory) == [], "another process has its number"
    Circuits("node/a", directory)
    assert not file.exists(), "the next process begins anew"
    if os.geteuid():
        directory.chmod(0o500)
        commits.failed("gone", clock.monotonic())  # costs the file only


def state(name: str = "redis", by: str = "tracker", **more: object) -> CircuitState:
    return CircuitState(name=name, by=by, **more)  # type: ignore[arg-type]


def test_a_run_is_told_once_per_outage() -> None:
    outages = Outages(since=BEGAN)
    well, away = state(), state(state="open", began=BEGAN + 1, failures=1, error="gone")
    assert outages.news([well, state("postgres")]) == []
    (news,) = outages.news([away])
    assert (news.is_away, news.name) == (True, "redis")
    assert news.message == "redis does not work, the run goes on without it: gone"
    assert outages.news([replace(away, state="half-open", failures=9)]) == []
    assert outages.away == ["redis"]
    assert outages.news([]) == [], "nobody says that it is back"
    back = replace(away, state="closed", ended=BEGAN + 61, failures=9)
    assert outages.news([back]) == [News(is_away=False, name="redis", seconds=60.0, failures=9)]
    assert outages.news([back]) == []


def test_a_run_hears_of_what_was_away_before_it_began_only_if_it_still_is() -> None:
    over = state(began=BEGAN - 9, ended=BEGAN - 5)
    still = state("mlflow", state="open", began=BEGAN - 9)
    assert [(news.is_away, news.name) for news in Outages(since=BEGAN).news([over, still])] == [(True, "mlflow")]


def test_a_run_hears_of_an_outage_between_two_looks() -> None:
    outages = Outages(since=BEGAN)
    outages.news([state(began=BEGAN - 9, ended=BEGAN - 5)])
    found = outages.news([state(began=BEGAN + 1, ended=BEGAN + 8, failures=3, error="gone")])
    assert [(news.is_away, round(news.seconds)) for news in found] == [(True, 0), (False, 7)]
    assert outages.away == []


def test_a_service_is_away_while_anybody_says_so() -> None:
    outages = Outages(since=BEGAN)
    first = state("tracker", "node-a", state="open", began=BEGAN + 1)
    second = state("tracker", "driver", state="half-open", began=BEGAN + 2)
    assert len(outages.news([first, second])) == 1
    assert outages.news([replace(first, state="closed", ended=BEGAN + 5)]) == []
    (news,) = outages.news([replace(second, state="closed", ended=BEGAN + 6)])
    assert (news.is_away, news.seconds) == (False, 5.0)
