"""What `orc keep` decides: when the stack is brought up, which runs are begun again, and when it gives up."""

from __future__ import annotations

import os
import socket
import time
from dataclasses import replace
from pathlib import Path

from cluster.keeping import (
    AT_ONCE,
    LONGEST_PAUSE,
    PAUSE,
    PROMISED,
    STEADY,
    SURE,
    Begun,
    Found,
    GiveUp,
    Keeper,
    Resubmit,
    Up,
    Wishes,
    is_interrupted,
    tried_from,
)
from cluster.stack_keep import directory_of, is_driver_gone, submission
from orchestrator.stack import Stack
from orchestrator.status import RunStatus
from orchestrator.store.views import Interrupted

FINE = (Found(name="postgres", is_down=False), Found(name="ray", is_down=False))
GONE = (Found(name="postgres", is_down=False), Found(name="ray", is_down=True, is_gone=True))
SILENT = (Found(name="postgres", is_down=False), Found(name="ray", is_down=True))
ENDED = 10_000.0

LOST = Interrupted(
    run="20261121-081530-a1b2c3d4", name="brisk-otter", attempt=1, status=RunStatus.crashed, job="j", is_sweep=False,
    is_asked_to_stop=False, has_error=False, action="", after=0.0, started=9_000.0, ended=ENDED, is_kept=True,
    directory="/project", host="here", pid=0,
)  # fmt: skip


def resubmitted(keeper: Keeper, now: float, run: Interrupted = LOST, state: Begun = Begun.unknown) -> bool:
    """Whether the run is begun again now; if so it is noted."""
    for action in keeper.step(now, FINE, [run], {run.run: state}):
        if isinstance(action, Resubmit):
            keeper.was_tried(action, now, job=action.job)
            return True
    return False


def test_a_part_whose_process_is_gone_is_brought_up_at_once() -> None:
    assert Keeper().step(0.0, GONE, []) == [Up(parts=("ray",))]


def test_a_part_that_only_does_not_answer_is_given_time() -> None:
    keeper = Keeper()
    assert keeper.step(0.0, SILENT, []) == []
    assert keeper.step(SURE - 1, FINE, []) == []
    assert keeper.step(SURE + 1, SILENT, []) == [], "its silence began anew"
    assert keeper.step(2 * SURE + 1, SILENT, []) == [Up(parts=("ray",))]


def test_up_is_repeated_with_longer_pauses_until_all_is_well() -> None:
    keeper = Keeper()
    times = [second for second in range(200) if keeper.step(float(second), GONE, [])]
    assert times == [0, 10, 30, 70, 150]
    assert keeper.step(200.0, FINE, []) == []
    assert keeper.step(201.0, GONE, []) == [Up(parts=("ray",))]


def test_runs_wait_for_what_they_need_and_for_nothing_else() -> None:
    assert Keeper().step(ENDED, SILENT, [LOST]) == []
    keeper, mirror = Keeper(), Found(name="mlflow", is_down=True)
    assert [type(action) for action in keeper.step(ENDED, [*FINE, mirror], [LOST])] == [Resubmit]
    assert keeper.step(ENDED + SURE, [*FINE, mirror], [LOST]) == [Up(parts=("mlflow",))]
    assert [type(action) for action in keeper.step(ENDED + SURE + 1, [*FINE, mirror], [LOST])] == [Resubmit]


def test_what_ended_in_silence_is_begun_again_and_what_somebody_ended_is_not() -> None:
    assert is_interrupted(LOST, ENDED)
    assert not is_interrupted(replace(LOST, is_asked_to_stop=True), ENDED)
    assert not is_interrupted(replace(LOST, has_error=True, action="stop"), ENDED + 1e6)
    assert not is_interrupted(replace(LOST, status=RunStatus.failed, has_error=True, action="stop"), ENDED)
    assert not is_interrupted(replace(LOST, status=RunStatus.failed), ENDED)
    assert not is_interrupted(replace(LOST, has_error=True), ENDED), "somebody said how it ended"


def test_a_restart_that_was_decided_and_never_came_is_an_interruption() -> None:
    promised = replace(LOST, status=RunStatus.failed, has_error=True, action="restart", after=60.0)
    assert not is_interrupted(promised, ENDED + 60.0 + PROMISED - 1)
    assert is_interrupted(promised, ENDED + 60.0 + PROMISED)
    assert is_interrupted(promised, ENDED, is_gone=True)
    assert not is_interrupted(replace(promised, action="stop"), ENDED, is_gone=True)
    here = replace(promised, host=socket.gethostname(), pid=os.getpid(), started=time.time())
    assert not is_driver_gone(here)
    assert is_driver_gone(replace(here, started=0.0)), "another process has its number"
    assert not is_driver_gone(replace(here, host="elsewhere", started=0.0))


def test_only_wanted_runs_are_begun_again() -> None:
    other, local = replace(LOST, is_kept=False), replace(LOST, job="")
    assert Keeper().step(ENDED, FINE, [other, local]) == []
    assert len(Keeper(wishes=Wishes(is_all=True)).step(ENDED, FINE, [other])) == 1
    assert len(Keeper(wishes=Wishes(is_local=True)).step(ENDED, FINE, [local])) == 1


def test_the_jobs_id_follows_from_run_and_attempt() -> None:
    (first,) = Keeper().step(ENDED, FINE, [LOST])
    assert isinstance(first, Resubmit)
    assert first.job == "orc-20261121-081530-a1b2c3d4-2"
    assert replace(first, times=3).job == "orc-20261121-081530-a1b2c3d4-2.3"


def test_code_is_sent_again_where_it_came_with_a_job_and_used_in_place_where_it_lies() -> None:
    stack = Stack(home="/home/orc", ray_dashboard="http://127.0.0.1:8265", ray_token_path="/home/orc/ray_token")
    unpacked = Path("/home/orc/ray/t/session_1/runtime_resources/working_dir_files/_ray_pkg_1")
    sent = replace(LOST, directory=str(unpacked), is_sweep=True)
    here = submission(Resubmit(run=LOST, times=1), Path("/project"), stack)[3:]
    again = submission(Resubmit(run=sent, times=1), unpacked, stack)[3:]
    assert here[:4] == ["--home", "/home/orc", "submit", "resume"]
    assert again[2:6] == ["submit", "sweep", "resume", LOST.run]
    assert [("--in-place" in words, "--detach" in words) for words in (here, again)] == [(True, True), (False, True)]
    assert "--in-place" not in submission(
        Resubmit(run=LOST, times=1), Path("/project"), replace(stack, ray_token_path="")
    )
    assert directory_of(replace(LOST, directory=""), Path("/home/orc")) == Path("/home/orc")
    assert directory_of(replace(LOST, directory="/nowhere/at/all"), Path("/home/orc")) is None


def test_a_resubmission_that_waits_is_not_repeated_and_one_that_ended_is_later() -> None:
    keeper = Keeper()
    assert resubmitted(keeper, ENDED)
    assert not resubmitted(keeper, ENDED + 10 * PAUSE, state=Begun.waiting)
    assert not resubmitted(keeper, ENDED + PAUSE - 1, state=Begun.over)
    assert resubmitted(keeper, ENDED + PAUSE, state=Begun.over)
    assert not resubmitted(keeper, ENDED + PAUSE + 2 * PAUSE - 1, state=Begun.unknown), "the pause doubles"
    assert resubmitted(keeper, ENDED + PAUSE + 2 * PAUSE, state=Begun.unknown)


def test_a_stopped_job_is_left_alone_which_is_told_once() -> None:
    keeper = Keeper()
    assert resubmitted(keeper, ENDED)
    first, again = (keeper.step(ENDED + at, FINE, [LOST], {LOST.run: Begun.stopped}) for at in (1e3, 2e3))
    assert isinstance(first[0], GiveUp)
    assert again == []


def test_runs_that_die_young_are_given_up_and_those_that_lived_are_not() -> None:
    keeper = Keeper(wishes=Wishes(most=2))
    assert resubmitted(keeper, ENDED)
    young = replace(LOST, attempt=2, started=ENDED + 5, ended=ENDED + 5 + STEADY - 1)
    assert resubmitted(keeper, young.ended + PAUSE, young)
    dead = replace(young, attempt=3, started=young.ended + 100, ended=young.ended + 110)
    (gave_up,) = keeper.step(dead.ended + 10 * PAUSE, FINE, [dead])
    assert isinstance(gave_up, GiveUp)
    assert "begun again 2 times" in gave_up.why
    old = replace(dead, attempt=4, ended=dead.started + STEADY)
    assert resubmitted(keeper, old.ended + 1, old), "it is counted anew"
    assert keeper.tried[LOST.run].times == 1


def test_pauses_have_an_end_and_so_has_one_look() -> None:
    keeper = Keeper(wishes=Wishes(most=1000))
    keeper.tried = tried_from({LOST.run: {"attempt": 1, "times": 900, "at": ENDED}, "other": {"unknown": 1}})
    assert "other" not in keeper.tried
    assert resubmitted(keeper, ENDED + LONGEST_PAUSE)
    many = [replace(LOST, run=f"r{number}") for number in range(AT_ONCE + 5)]
    assert len(Keeper().step(ENDED, FINE, many)) == AT_ONCE


def test_what_was_tried_survives_the_keeper() -> None:
    keeper = Keeper()
    assert resubmitted(keeper, ENDED)
    stored = {run: tried.to_json() for run, tried in keeper.tried.items()}
    assert not resubmitted(Keeper(tried=tried_from(stored)), ENDED + 1, state=Begun.over)
    keeper.forget(ENDED + 100, 50)
    assert keeper.tried == {}
