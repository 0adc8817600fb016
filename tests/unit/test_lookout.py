"""What is done about an attempt that does not get on: its ranks are asked first, and ended only where nothing speaks
against it. The ranks are in memory, the clock is turned by hand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from orchestrator.execution.lookout import Lookout
from orchestrator.execution.stacks import Dump
from orchestrator.execution.watch import Alarm, HangRules, Limits, Watch
from orchestrator.records import RunStatus, RunTicket
from tests.unit.test_stacks import LOADS, SAVES, WAITS

TICKET = RunTicket(run="r", name="n", experiment="e", attempt=1, directory="/nowhere")


class Run:
    """A run of two ranks, its tracker and its place."""

    def __init__(self, logs: Path, limits: Limits | None = None) -> None:
        self.now = 1000.0
        self.logs, self.position = logs, 0
        self.dumps: Sequence[Dump] | Exception = ()
        self.ended: list[RunTicket] = []
        self.events: list[tuple[str, str, str]] = []
        self.details: list[Mapping[str, Any]] = []
        self.stopped: list[Alarm] = []
        self.asked = 0
        self.lookout = Lookout(
            Watch(HangRules(), limits, now=self.now), self, TICKET, live=self.live, logs=logs, saving=600.0,
            tell=self.tell, stop=self.stopped.append,
        )  # fmt: skip

    def live(self) -> Mapping[str, Any]:
        times = (float(self.position), self.position / 2)
        return {"ranks": [{"rank": k, "step": self.position, "time": at, "values": {}} for k, at in enumerate(times)]}

    def stacks(self, ticket: RunTicket) -> Sequence[Dump]:
        self.asked += 1
        if isinstance(self.dumps, Exception):
            raise self.dumps
        return self.dumps

    def end(self, ticket: RunTicket) -> None:
        self.ended.append(ticket)

    def tell(self, kind: str, level: str, message: str, details: Mapping[str, Any]) -> None:
        self.events.append((kind, level, message))
        self.details.append(details)

    def look(self, seconds: int, *, moves: bool = False) -> None:
        for _ in range(seconds):
            self.now += 1
            self.position += moves
            self.lookout.step(self.now, is_quiet=False)
            if (asking := self.lookout._asking) is not None:
                asking.join(timeout=30)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    made = Run(tmp_path / "attempt-1")
    made.look(30, moves=True)
    return made


def dump(rank: int, text: str, *, is_late: bool = False) -> Dump:
    return Dump(rank=rank, pid=rank + 1, host="h", text=text, is_late=is_late)


def test_a_hang_is_a_finding_with_the_line_of_the_rank_that_hangs_and_all_stacks(run: Run) -> None:
    run.dumps = [dump(0, WAITS), dump(1, LOADS)]
    run.look(130)
    found = run.lookout.hang
    assert found is not None
    assert (found.kind, found.rank, found.status, found.is_restart_useful) == ("hang", 1, RunStatus.failed, True)
    assert found.what.startswith("no progress for 121 s, longer than 120 s")
    assert found.hint.startswith("Rank 1 (pid 2 on h) is in load at /home/me/shards.py:31")
    assert found.hint.endswith(f"All stacks: {run.logs}/rank-*.stack.")
    assert found.error()["traceback"].splitlines()[-2].endswith('shards.py", line 31, in load')
    assert [Path(file).name for file in run.lookout.files] == ["rank-0.stack", "rank-1.stack"]
    assert [kind for kind, _, _ in run.events] == ["stall", "hang"]
    assert run.details[1]["stacks"] == list(run.lookout.files)
    assert run.ended == [TICKET]
    assert not run.lookout.is_overdue
    run.look(121)
    assert run.lookout.is_overdue, "its place does not notice that its ranks are gone"
    run.look(500)
    assert (run.asked, len(run.ended)) == (4, 1), "several times, to see whether the one that is at work moves"


def test_a_save_has_time_of_its_own_but_not_for_ever(run: Run) -> None:
    run.dumps = [dump(0, SAVES), dump(1, WAITS)]
    run.look(1000)
    assert not run.ended
    run.look(600)
    assert run.ended, "twice the time that a save may take, and more"


def test_a_rank_that_moves_in_code_of_its_own_has_five_times_as_long(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def stacks(ticket: RunTicket) -> Sequence[Dump]:
        run.asked += 1
        elsewhere = LOADS.replace("line 9 in train", f"line {run.asked} in train")
        return [dump(0, WAITS), dump(1, elsewhere)]

    monkeypatch.setattr(run, "stacks", stacks)
    run.look(120 + 5 * 120)
    assert (run.ended, run.lookout.hang) == ([], None)
    run.look(70)
    assert len(run.ended) == 1
    assert run.lookout.hang is not None
    assert run.lookout.hang.rank == 1


def test_a_rank_that_moved_and_then_stands_still_is_ended(run: Run) -> None:
    run.dumps = [dump(0, LOADS)]
    run.look(122)
    run.dumps = [dump(0, SAVES.replace("checkpoints", "elsewhere"))]
    run.look(8)
    assert not run.ended, "it has moved"
    run.look(70)
    assert run.ended


@pytest.mark.parametrize("dumps", [[dump(0, WAITS, is_late=True)], []])
def test_points_that_nobody_collects_or_agents_that_do_not_answer_put_it_off_three_times(
    run: Run, dumps: list[Dump]
) -> None:
    run.dumps = dumps
    run.look(290)
    assert (run.asked, run.ended) == (3, [])
    run.look(100)
    assert (run.asked, len(run.ended)) == (4, 1)


def test_what_moves_again_while_it_is_asked_is_left_alone(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def moves(ticket: RunTicket) -> Sequence[Dump]:
        run.position += 1
        run.now += 1
        run.lookout.step(run.now, is_quiet=False)
        return [dump(0, WAITS)]

    monkeypatch.setattr(run, "stacks", moves)
    run.look(125)
    assert not run.ended
    assert run.lookout.hang is None


def test_a_place_that_cannot_tell_does_not_keep_a_hang_alive(run: Run) -> None:
    run.dumps = ConnectionError("no cluster")
    run.look(125)
    assert run.lookout.hang is not None
    assert run.lookout.hang.rank == 1, "which logged longest ago"
    assert run.ended


def test_a_limit_is_told_and_stops_the_run_once(tmp_path: Path) -> None:
    run = Run(tmp_path, Limits(hours=0.01))
    run.look(60, moves=True)
    assert [kind for kind, _, _ in run.events] == ["limit", "limit"]
    assert run.events[1][2] == "0.01 of 0.01 hours are used (resources.limits.hours); it saves and stops"
    assert [alarm.details["key"] for alarm in run.stopped] == ["resources.limits.hours"]
