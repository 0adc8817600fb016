"""The mailbox of a sweep's lanes: who gets which job, and what is made of what ranks say."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable, Coroutine
from dataclasses import asdict
from typing import Any

import pytest

from orchestrator.execution.desk import BREAK, JOB, LEAVE, NEXT, NOTHING, REJOIN, WAIT, LaneDesk, ending_from
from orchestrator.failures.classify import Evidence
from orchestrator.sweeps.jobs import Ended, Ending

DONE = {"how": "done", "tally": {"resource": 3, "reason": ""}}
FOREVER = 1000.0


def on_a_loop(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    @functools.wraps(test)
    def run(*args: Any, **kwargs: Any) -> None:
        asyncio.run(asyncio.wait_for(test(*args, **kwargs), 5))

    return run


def failed(rank: int, message: str = "no", *, type: str = "ValueError", at: float = 1.0, rejoin: bool = True) -> Any:
    traceback = "" if type == "ActorDiedError" else 'File "x.py", line 3, in train'
    evidence = Evidence(rank=rank, type=type, message=message, at=at, traceback=traceback)
    return {"evidence": asdict(evidence), "can_rejoin": rejoin}


async def ended(desk: LaneDesk, job: int) -> Ending:
    raw = await desk.look(job)
    assert raw is not None
    return ending_from(raw)


async def taken(desk: LaneDesk, lane: int, number: int, *, generation: int = 1, ranks: int = 2) -> tuple[str, int]:
    """What all ranks of a lane get, which is the same."""
    answers = await asyncio.gather(*(desk.take(lane, generation, rank, number) for rank in range(ranks)))
    assert len({answer[:2] for answer in answers}) == 1
    return answers[0][:2]


async def trained(desk: LaneDesk, lane: int, number: int, *words: Any, generation: int = 1) -> list[str]:
    said = (desk.said(lane, generation, rank, number, word) for rank, word in enumerate(words))
    return await asyncio.gather(*said)


@on_a_loop
async def test_jobs_go_to_the_lowest_free_lane_in_the_order_they_came() -> None:
    desk = LaneDesk()
    for lane in (1, 0):
        assert await desk.begin(lane, 1, 2, is_asked=True)
    first, second = asyncio.create_task(taken(desk, 1, 0)), asyncio.create_task(taken(desk, 0, 0))
    await asyncio.sleep(0)
    while [lane["state"] for lane in (await desk.view())["lanes"]] != ["free", "free"]:
        await asyncio.sleep(0)
    await desk.put(7, b"plan 7")
    await desk.put(8, b"plan 8")
    assert (await second, await first) == ((JOB, 7), (JOB, 8))
    assert await trained(desk, 0, 0, DONE, DONE) == [NEXT, NEXT]
    ending = await ended(desk, 7)
    assert (ending.how, ending.tally, ending.lane) == (Ended.complete, DONE["tally"], "0")
    assert ending.started_at is not None
    assert ending.lane_seconds >= 0


@on_a_loop
async def test_a_lane_gets_nothing_before_all_its_ranks_ask_and_a_lost_answer_is_given_again() -> None:
    desk = LaneDesk()
    await desk.begin(0, 1, 2, is_asked=True)
    await desk.put(1, b"plan")
    assert await desk.take(0, 1, 0, 0, wait=0.01) == (NOTHING, 0, b"")
    for _ in range(2):
        assert await desk.take(0, 1, 1, 0) == (JOB, 1, b"plan")
    assert await desk.take(0, 1, 0, 0) == (JOB, 1, b"plan")
    assert await desk.said(0, 1, 0, 0, DONE, wait=0.01) == WAIT
    assert await desk.look(1, wait=0.01) is None
    assert await desk.said(0, 1, 1, 0, DONE) == NEXT
    assert await desk.said(0, 1, 0, 0, DONE) == NEXT
    assert asdict(await ended(desk, 1)) == asdict(await ended(desk, 1))


@on_a_loop
async def test_a_job_put_twice_runs_once_and_may_be_put_again_after_its_end() -> None:
    desk = LaneDesk()
    await desk.begin(0, 1, 1, is_asked=True)
    await desk.put(1, b"first")
    await desk.put(1, b"first")
    assert await taken(desk, 0, 0, ranks=1) == (JOB, 1)
    await desk.put(1, b"first")
    await trained(desk, 0, 0, failed(0))
    await desk.put(1, b"second")
    assert await desk.look(1, wait=0.01) is None
    assert await desk.take(0, 1, 0, 1) == (JOB, 1, b"second")
    assert (await desk.view())["waiting"] == 0


@on_a_loop
async def test_the_first_cause_over_the_ranks_is_the_failure_and_the_ranks_rejoin() -> None:
    desk = LaneDesk(echo=FOREVER)
    await desk.begin(0, 1, 2, is_asked=True)
    await desk.put(1, b"")
    await taken(desk, 0, 0)
    echo = failed(0, "Connection closed by peer [127.0.0.1]", type="RuntimeError", at=1.0)
    assert await trained(desk, 0, 0, echo, failed(1, "bad data", at=2.0)) == [REJOIN, REJOIN]
    ending = await ended(desk, 1)
    assert (ending.how, ending.kind, ending.is_restart_useful) == (Ended.failed, "user_bug", False)
    assert ending.reason == "ValueError: bad data on rank 1"
    assert (ending.error["type"], ending.error["rank"]) == ("ValueError", 1)
    # The lane goes on, its ranks meet where rank 0 says.
    later = asyncio.create_task(desk.meet(0, 1, 1, 0))
    await desk.meet(0, 1, 0, 0, "10.0.0.1 4000")
    assert await later == "10.0.0.1 4000"
    await desk.put(2, b"")
    assert await taken(desk, 0, 1) == (JOB, 2)


@on_a_loop
async def test_a_rank_that_stays_silent_after_a_failure_breaks_the_group() -> None:
    desk = LaneDesk(echo=0.01)
    await desk.begin(0, 1, 2, is_asked=True)
    await desk.put(1, b"")
    await taken(desk, 0, 0)
    assert await desk.said(0, 1, 1, 0, failed(1)) == BREAK
    assert (await ended(desk, 1)).reason == "ValueError: no on rank 1"
    assert await desk.gone(0, 1, [asdict(Evidence(rank=0, type="LaneBroken", message="x"))]) == (1, "")
    assert (await ended(desk, 1)).reason == "ValueError: no on rank 1"


@on_a_loop
async def test_an_echo_alone_waits_for_what_ray_says_of_the_process_that_died() -> None:
    desk = LaneDesk(echo=0.0, notice=FOREVER)
    await desk.begin(0, 1, 2, is_asked=True)
    await desk.put(1, b"")
    await taken(desk, 0, 0)
    echo = failed(0, "Connection closed by peer [127.0.0.1]", type="RuntimeError")
    said = asyncio.create_task(desk.said(0, 1, 0, 0, echo))
    await asyncio.sleep(0.02)
    assert not said.done()
    died = Evidence(rank=1, type="ActorDiedError", message="The actor died unexpectedly")
    await desk.gone(0, 1, [asdict(died)])
    assert await said == BREAK
    ending = await ended(desk, 1)
    assert (ending.kind, ending.is_restart_useful, ending.error["rank"]) == ("worker_killed", True, 1)


@on_a_loop
async def test_a_group_that_ends_before_its_ranks_took_the_job_gives_it_to_another() -> None:
    desk = LaneDesk()
    await desk.begin(0, 1, 1, is_asked=True)
    asking = asyncio.create_task(desk.take(0, 1, 0, 0))
    await asyncio.sleep(0)
    asking.cancel()
    await desk.put(1, b"")
    assert await desk.gone(0, 1, [asdict(Evidence(rank=0, type="ActorDiedError", message="x"))]) == (0, "")
    assert await desk.look(1, wait=0.01) is None
    assert await desk.begin(0, 2, 1)
    assert await taken(desk, 0, 0, generation=2, ranks=1) == (JOB, 1)


@on_a_loop
async def test_a_job_whose_group_ends_without_a_word_is_lost() -> None:
    desk = LaneDesk()
    await desk.begin(0, 1, 1, is_asked=True)
    await desk.put(1, b"")
    await taken(desk, 0, 0, ranks=1)
    await desk.gone(0, 1)
    assert (await ended(desk, 1)).how is Ended.lost
    assert (await ended(desk, 99)).how is Ended.lost, "a job that the desk does not know"


@pytest.mark.parametrize(
    ("arguments", "unfit"), [({"jobs_per_group": 1}, ""), ({}, "its memory has grown"), ({"idle": 0.0}, "")]
)
@on_a_loop
async def test_a_lane_leaves_after_its_jobs_when_it_is_unfit_and_when_it_is_idle(
    arguments: dict[str, Any], unfit: str
) -> None:
    desk = LaneDesk(**arguments)
    await desk.begin(0, 1, 1, is_asked=True)
    await desk.put(1, b"")
    await taken(desk, 0, 0, ranks=1)
    if "idle" not in arguments:
        await desk.put(2, b"")
    await trained(desk, 0, 0, DONE)
    assert (await desk.take(0, 1, 0, 1, unfit))[0] == LEAVE
    assert await desk.gone(0, 1) == (1, unfit)
    assert await desk.begin(0, 2, 1) is ("idle" not in arguments), "a new group only where a job waits"


@on_a_loop
async def test_a_failure_that_spoils_the_process_ends_the_group_without_a_crash() -> None:
    desk = LaneDesk()
    await desk.begin(0, 1, 2, is_asked=True)
    await desk.put(1, b"")
    await taken(desk, 0, 0)
    spoilt = failed(0, "CUDA error: device-side assert triggered", rejoin=False)
    assert await trained(desk, 0, 0, spoilt, failed(1)) == [LEAVE, LEAVE]


@on_a_loop
async def test_what_an_earlier_job_may_be_the_reason_of_is_tried_again_in_a_new_process() -> None:
    desk = LaneDesk()
    await desk.begin(0, 1, 1, is_asked=True)
    await desk.put(1, b"")
    await taken(desk, 0, 0, ranks=1)
    assert await trained(desk, 0, 0, {**failed(0, "registered twice"), "is_worn": True}) == [LEAVE]
    assert (await ended(desk, 1)).how is Ended.lost


@on_a_loop
async def test_lanes_begin_when_jobs_wait_for_them_and_not_otherwise() -> None:
    desk = LaneDesk()
    assert not await desk.begin(0, 1, 1)
    await desk.put(1, b"")
    assert await desk.begin(0, 1, 1)
    assert await desk.begin(0, 1, 1), "the answer was lost"
    assert not await desk.begin(1, 1, 1), "one is starting for the only job"
    await desk.put(2, b"")
    assert await desk.begin(1, 1, 1)


@on_a_loop
async def test_what_an_old_generation_says_changes_nothing() -> None:
    desk = LaneDesk()
    await desk.begin(0, 2, 1, is_asked=True)
    await desk.put(1, b"")
    assert await desk.take(0, 1, 0, 0) == (LEAVE, 0, b"")
    assert await desk.said(0, 1, 0, 0, DONE) == LEAVE
    assert await desk.gone(0, 1) == (0, "")
    assert await taken(desk, 0, 0, generation=2, ranks=1) == (JOB, 1)


@on_a_loop
async def test_a_condemned_job_fails_at_once_and_names_the_group_that_must_be_killed() -> None:
    desk = LaneDesk()
    await desk.begin(0, 3, 1, is_asked=True)
    await desk.put(1, b"")
    await desk.put(2, b"")
    await taken(desk, 0, 0, generation=3, ranks=1)
    assert await desk.condemn(1, "hang", "no report for 600 s") == (0, 3)
    ending = await ended(desk, 1)
    assert (ending.how, ending.kind, ending.reason) == (Ended.failed, "hang", "no report for 600 s")
    assert await desk.condemn(2, "hang", "x") is None, "no lane has it"
    assert (await ended(desk, 2)).how is Ended.failed
    await desk.gone(0, 3, [asdict(Evidence(rank=0, type="ActorDiedError", message="x"))])
    assert (await ended(desk, 1)).kind == "hang"


@on_a_loop
async def test_a_closed_desk_lets_all_go() -> None:
    desk = LaneDesk()
    await desk.begin(0, 1, 1, is_asked=True)
    await desk.put(1, b"")
    await taken(desk, 0, 0, ranks=1)
    await desk.put(2, b"")
    await desk.close()
    assert (await ended(desk, 2)).how is Ended.lost
    await trained(desk, 0, 0, DONE)
    assert (await taken(desk, 0, 1, ranks=1))[0] == LEAVE
    assert not await desk.begin(0, 2, 1, is_asked=True)
