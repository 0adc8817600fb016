"""The mailbox between a sweep's driver and its lanes.

A lane is a group of ranks that stays while jobs come and go. The driver puts a job's plan here; the ranks of a free
lane fetch it, all of them the same sequence of orders, and say how it ended. One actor per sweep, owned by the driver:
it dies with it. Plain asyncio; nothing here knows Ray, and nothing here waits for another service.

What a rank asks is repeated when an answer is lost, so every question says which order it is about: the orders of a
lane's generation are numbered from 0.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict, deque
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from orchestrator.execution.worker import DONE, ENDED, PAUSED, STOPPED
from orchestrator.failures.classify import Evidence, first_cause, is_echo
from orchestrator.sweeps.jobs import Ended, Ending

JOB, NOTHING, LEAVE = "job", "nothing", "leave"
"""Orders of a lane: a job to train, none yet (ask again), and to return, which ends the group."""

WAIT, NEXT, REJOIN, BREAK = "wait", "next", "rejoin", "break"
"""Answers to a rank that said how its job ended: ask again, take the next order, make a new process group first, or
raise, so that Ray ends the whole group: one of its ranks does not answer any more. LEAVE is one, too."""

ECHO = 5.0
"""Seconds that the other ranks have to say what they know after the first one failed."""
NOTICE = 45.0
"""The same, where all that is known is that somebody hung up: Ray tells within these whether a process or node died."""
KEPT = 256
"""Endings that are kept for whoever asks again; the driver asks once, a Trainable that was started anew a second time.
"""

_HOW = {DONE: Ended.complete, PAUSED: Ended.paused, ENDED: Ended.ended, STOPPED: Ended.stopped}


@dataclass(slots=True)
class _Job:
    number: int
    plan: bytes = field(repr=False)
    done: asyncio.Event = field(default_factory=asyncio.Event)
    ending: Ending | None = None
    lane: int | None = None
    given_at: float = 0.0


@dataclass(slots=True)
class _Order:
    """What all ranks of a lane get at the same place of their sequence."""

    kind: str
    job: _Job | None = None
    takers: set[int] = field(default_factory=set)
    words: dict[int, Mapping[str, Any]] = field(default_factory=dict)
    deadline: float | None = None
    """After which silent ranks are not waited for, by the loop's clock."""
    answer: str = ""
    settled: asyncio.Event = field(default_factory=asyncio.Event)


@dataclass(slots=True)
class _Meeting:
    """Where rank 0 awaits the others for a new process group."""

    address: str = ""
    is_told: asyncio.Event = field(default_factory=asyncio.Event)


@dataclass(slots=True)
class _Lane:
    """One generation of a lane."""

    number: int
    generation: int
    world_size: int
    orders: list[_Order] = field(default_factory=list)
    meetings: dict[int, _Meeting] = field(default_factory=dict)
    ready: set[int] = field(default_factory=set)
    """Ranks that wait for an order that does not exist yet."""
    unfit: str = ""
    """Why it shall end after its job."""
    free_since: float | None = None
    news: asyncio.Event = field(default_factory=asyncio.Event)
    n_jobs: int = 0

    @property
    def is_up(self) -> bool:
        return bool(self.ready or self.orders)

    @property
    def is_free(self) -> bool:
        return len(self.ready) == self.world_size

    @property
    def is_leaving(self) -> bool:
        return bool(self.orders) and self.orders[-1].kind == LEAVE

    @property
    def running(self) -> _Order | None:
        """The order of a job that has not ended."""
        last = self.orders[-1] if self.orders else None
        return last if last is not None and last.job is not None and last.job.ending is None else None

    @property
    def state(self) -> str:
        if self.is_leaving:
            return "leaving"
        if not self.is_up:
            return "starting"
        if self.running:
            return "busy"
        return "free" if self.is_free else "cleaning"


class LaneDesk:
    """All methods return within `wait` seconds and may be called again with the same arguments.

    `jobs_per_group`: jobs after which a lane's group ends; 0: no limit. `idle`: seconds without a job after which it
    ends, so that others get its place; 0: at once when nothing waits.
    """

    def __init__(
        self, *, jobs_per_group: int = 0, idle: float = 30.0, echo: float = ECHO, notice: float = NOTICE
    ) -> None:
        self._jobs_per_group, self._idle, self._echo, self._notice = jobs_per_group, idle, echo, notice
        self._waiting: deque[_Job] = deque()
        self._jobs: OrderedDict[int, _Job] = OrderedDict()
        self._lanes: dict[int, _Lane] = {}
        self._wanted: int | None = None
        self._is_closed = False
        self._timers: set[asyncio.TimerHandle] = set()

    # -- the driver and Tune's trainables

    async def put(self, job: int, plan: bytes) -> None:
        """Queues a job, first come, first served. One that is open already stays as it is."""
        known = self._jobs.get(job)
        if known is not None and known.ending is None:
            return
        entry = _Job(job, plan)
        self._jobs[job] = entry
        self._jobs.move_to_end(job)
        self._waiting.append(entry)
        for number in [n for n, old in self._jobs.items() if old.ending is not None][:-KEPT]:
            del self._jobs[number]
        self._turn()

    async def look(self, job: int, wait: float = 20.0) -> dict[str, Any] | None:
        """The Ending of a job as JSON, see `ending_from`; None: not ended yet, ask again. Whoever asks, and however
        often, gets the same one. A job that is not known is lost."""
        entry = self._jobs.get(job)
        if entry is None:
            return asdict(Ending(how=Ended.lost, reason="the desk does not know the job"))
        await _within(wait, entry.done)
        return asdict(entry.ending) if entry.ending is not None else None

    async def condemn(self, job: int, kind: str, reason: str) -> tuple[int, int] | None:
        """Ends a job as failed, whatever its ranks do. Returns the lane and generation that must be killed for it, None
        where it had not begun or has ended."""
        entry = self._jobs.get(job)
        if entry is None or entry.ending is not None:
            return None
        error = {"kind": kind, "type": kind, "message": reason, "rank": -1, "what": reason, "traceback": "", "hint": ""}
        if entry in self._waiting:
            self._waiting.remove(entry)
        self._end(entry, Ending(how=Ended.failed, kind=kind, reason=reason, error=error))
        lane = next((lane for lane in self._lanes.values() if lane.orders and lane.orders[-1].job is entry), None)
        if lane is None:
            return None
        self._settle(lane.orders[-1], BREAK)
        return lane.number, lane.generation

    async def fail_waiting(self, evidence: Sequence[Mapping[str, Any]]) -> int:
        """Ends the jobs that no lane has taken, because lanes cannot be started; says how many."""
        doomed = list(self._waiting)
        self._waiting.clear()
        for entry in doomed:
            self._end(entry, ending_of({}, [Evidence(**each) for each in evidence]))
        return len(doomed)

    async def want(self, lanes: int) -> None:
        """Lanes of this number and above end when they are free."""
        self._wanted = lanes
        self._turn()

    async def close(self) -> None:
        """Lanes end when they are free; jobs that wait are lost."""
        self._is_closed = True
        for entry in list(self._waiting):
            self._end(entry, Ending(how=Ended.lost, reason="the sweep's driver closed its lanes"))
        self._waiting.clear()
        self._turn()

    async def view(self) -> dict[str, Any]:
        """How it stands: {"lanes": [{"lane", "generation", "state", "job", "jobs", "why"}], "waiting"}."""
        lanes = [
            {
                "lane": lane.number,
                "generation": lane.generation,
                "state": lane.state,
                "job": lane.running.job.number if lane.running and lane.running.job else None,
                "jobs": lane.n_jobs,
                "why": lane.unfit,
            }
            for lane in sorted(self._lanes.values(), key=lambda lane: lane.number)
        ]
        return {"lanes": lanes, "waiting": len(self._waiting)}

    # -- the driver's lanes

    async def begin(self, lane: int, generation: int, world_size: int, is_asked: bool = False) -> bool:
        """Whether the lane shall start a group now; if so it counts as starting. `is_asked`: although no job waits."""
        known = self._lanes.get(lane)
        if known is not None:
            return known.generation == generation  # asked again after a lost answer
        if self._is_closed or (self._wanted is not None and lane >= self._wanted):
            return False
        coming = sum(other.state in ("starting", "free", "cleaning") for other in self._lanes.values())
        if not is_asked and len(self._waiting) <= coming:
            return False
        self._lanes[lane] = _Lane(lane, generation, world_size)
        return True

    async def gone(self, lane: int, generation: int, evidence: Sequence[Mapping[str, Any]] = ()) -> tuple[int, str]:
        """The group of a lane ended. A job that it had, and that nobody ended, fails by the evidence; one that no rank
        had taken goes to another lane. Returns how many jobs the group has taken, and why it was not to take more."""
        known = self._lanes.get(lane)
        if known is None or known.generation != generation:
            return 0, ""
        del self._lanes[lane]
        order = known.running
        if order is not None and order.job is not None:
            if order.takers:
                found = [Evidence(**each) for each in evidence]
                self._end(order.job, ending_of(order.words, found, silent=_silent(order, known)))
            else:
                known.n_jobs -= 1
                order.job.lane = None
                self._waiting.appendleft(order.job)
        for order in known.orders:
            self._settle(order, BREAK)
        known.news.set()
        self._turn()
        return known.n_jobs, known.unfit

    # -- the ranks

    async def take(
        self, lane: int, generation: int, rank: int, number: int, unfit: str = "", wait: float = 20.0
    ) -> tuple[str, int, bytes]:
        """(kind, job, plan) of the order of that number. `unfit` says why the group should end before another job."""
        known = self._known(lane, generation)
        if known is None:
            return LEAVE, 0, b""
        if number == len(known.orders) and not known.is_leaving:
            known.ready.add(rank)
            known.unfit = known.unfit or unfit
            if known.is_free and known.free_since is None:
                known.free_since = _now()
                self._after(self._idle)
            news = known.news  # before an order may come: each order has news of its own
            self._turn()
            await _within(wait, news)
        if number >= len(known.orders):
            return (LEAVE if self._known(lane, generation) is None else NOTHING), 0, b""
        order = known.orders[number]
        order.takers.add(rank)
        return order.kind, order.job.number if order.job else 0, order.job.plan if order.job else b""

    async def said(
        self, lane: int, generation: int, rank: int, number: int, word: Mapping[str, Any], wait: float = 20.0
    ) -> str:
        """A rank's end of its job: {"how", "tally"}, or {"evidence", "can_rejoin", "is_worn"}: whether the process can
        go on, and whether an earlier job may be the reason. What it has to do next."""
        known = self._known(lane, generation)
        if known is None or number >= len(known.orders):
            return LEAVE
        order = known.orders[number]
        order.words[rank] = word
        if word.get("is_worn"):
            known.unfit = known.unfit or "the user's code cannot be imported again"
        if "evidence" in word and not word.get("can_rejoin"):
            known.unfit = known.unfit or "its ranks cannot be trusted after a failure"
        self._judge(known, order)
        await _within(wait, order.settled)
        return order.answer or WAIT

    async def meet(
        self, lane: int, generation: int, rank: int, number: int, address: str = "", wait: float = 10.0
    ) -> str:
        """The address at which rank 0 awaits the others after the order of that number, before the first one: -1. ''
        where it has told none."""
        known = self._known(lane, generation)
        if known is None:
            return ""
        meeting = known.meetings.setdefault(number, _Meeting())
        if rank == 0:
            meeting.address = address
            meeting.is_told.set()
        await _within(wait, meeting.is_told)
        return meeting.address

    # -- decisions

    def _known(self, lane: int, generation: int) -> _Lane | None:
        known = self._lanes.get(lane)
        return known if known is not None and known.generation == generation else None

    def _turn(self) -> None:
        """Gives jobs to free lanes, the lowest first, and lets go those that are not needed."""
        for lane in sorted(self._lanes.values(), key=lambda lane: lane.number):
            if not lane.is_free or lane.is_leaving:
                continue
            if self._must_leave(lane):
                self._order(lane, _Order(LEAVE))
            elif self._waiting:
                job = self._waiting.popleft()
                job.lane, job.given_at = lane.number, time.time()
                lane.n_jobs += 1
                self._order(lane, _Order(JOB, job))

    def _must_leave(self, lane: _Lane) -> bool:
        if self._is_closed or lane.unfit or (self._wanted is not None and lane.number >= self._wanted):
            return True
        if self._jobs_per_group and lane.n_jobs >= self._jobs_per_group:
            return True
        is_idle = lane.free_since is not None and _now() - lane.free_since >= self._idle
        return is_idle and not self._waiting

    def _order(self, lane: _Lane, order: _Order) -> None:
        lane.orders.append(order)
        lane.ready.clear()
        lane.free_since = None
        news, lane.news = lane.news, asyncio.Event()
        news.set()

    def _judge(self, lane: _Lane, order: _Order) -> None:
        """Whether enough is known of how the order's job ended, and what then."""
        if order.settled.is_set() or order.job is None:
            return
        failures = [Evidence(**word["evidence"]) for word in order.words.values() if "evidence" in word]
        is_complete = len(order.words) == lane.world_size
        if not failures:
            if is_complete:
                self._end(order.job, ending_of(order.words, ()))
                self._settle(order, NEXT if len({word["how"] for word in order.words.values()}) == 1 else REJOIN)
            return
        if order.deadline is None:
            order.deadline = _now() + self._echo
        patience = self._notice - self._echo if all(is_echo(failure) for failure in failures) else 0.0
        left = order.deadline + patience - _now()
        if not is_complete and left > 0:
            self._after(left, lane, order)
            return
        self._end(order.job, ending_of(order.words, (), silent=_silent(order, lane)))
        if not is_complete:
            self._settle(order, BREAK)
        else:
            self._settle(order, LEAVE if lane.unfit else REJOIN)

    def _after(self, seconds: float, lane: _Lane | None = None, order: _Order | None = None) -> None:
        """Looks again when that much time is over."""

        def look() -> None:
            self._timers.discard(timer)
            if lane is not None and order is not None and self._lanes.get(lane.number) is lane:
                self._judge(lane, order)
            self._turn()

        timer = asyncio.get_running_loop().call_later(seconds, look)
        self._timers.add(timer)

    def _settle(self, order: _Order, answer: str) -> None:
        if not order.settled.is_set():
            order.answer = answer
            order.settled.set()

    def _end(self, job: _Job, ending: Ending) -> None:
        if job.ending is not None:
            return
        now = time.time()
        place: dict[str, Any] = {}
        if job.lane is not None:
            place = {"lane": str(job.lane), "lane_seconds": now - job.given_at, "started_at": job.given_at}
        job.ending = Ending(**{**{name: getattr(ending, name) for name in ending.__dataclass_fields__}, **place})
        job.plan = b""
        job.done.set()


def ending_of(
    words: Mapping[int, Mapping[str, Any]], evidence: Sequence[Evidence], *, silent: Sequence[int] = ()
) -> Ending:
    """How a job ended, from what its ranks said, what Ray says of their processes, and who said nothing. Pure."""
    said = [Evidence(**word["evidence"]) for word in words.values() if "evidence" in word]
    # What a rank said itself is more than what Ray says of its process afterwards.
    spoke = {found.rank for found in said}
    known = [*said, *(found for found in evidence if found.rank not in spoke)]
    if not known and (silent or not words):
        return Ending(how=Ended.lost, reason="the lane's group ended without a word")
    if not known:
        word = words.get(0, {})
        tally = word.get("tally") or {}
        return Ending(how=_HOW[word["how"]], tally=tally, reason=str(tally.get("reason", "")))
    finding = first_cause(known)
    if any(word.get("is_worn") for word in words.values()):
        return Ending(how=Ended.lost, reason=f"tried again in a new process: {finding.reason}")
    return Ending(
        how=Ended.failed,
        error=finding.error(),
        kind=str(finding.kind),
        reason=finding.reason,
        is_restart_useful=finding.is_restart_useful,
        evidence=[asdict(each) for each in known],
    )


def ending_from(raw: Mapping[str, Any]) -> Ending:
    """Of `asdict` and of JSON."""
    return Ending(**{**raw, "how": Ended(raw["how"])})


def _silent(order: _Order, lane: _Lane) -> list[int]:
    return [rank for rank in range(lane.world_size) if rank not in order.words]


def _now() -> float:
    return asyncio.get_running_loop().time()


async def _within(seconds: float, event: asyncio.Event) -> None:
    try:
        await asyncio.wait_for(event.wait(), seconds)
    except TimeoutError:
        return
