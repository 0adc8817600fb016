"""Where a sweep runs: a Place around the one of its trials, whose `fit` is the whole sweep.

So a sweep is an attempt of its parent run, with all that an attempt has: lease, signals, logs, provenance, restarts.
What is decided, and recorded before it is done, is the core's (sweeps/core.py); here its jobs get processes.

Threads: the one of `fit` asks the core, nobody else does. Each lane has one in which its jobs run. One more, once per
second, says that the trials are alive, hears who shall stop and looks for jobs that hang.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from orchestrator.account import user_name
from orchestrator.backends.storage import Storage
from orchestrator.catalog import open_store
from orchestrator.checkpoints.catalog import Hold, release
from orchestrator.checkpoints.clone import keep
from orchestrator.config import ClusterCapacity, Job, ResourcesConfig, Settings, redact_text
from orchestrator.config.capacity import gangs
from orchestrator.config.settings import SweepConfig
from orchestrator.config.typed import dump
from orchestrator.directory import layout
from orchestrator.directory.identity import Identity
from orchestrator.errors import OrchestratorError, ServiceUnavailable, SweepTaken, UserError
from orchestrator.execution import stacks
from orchestrator.execution.driver import write_config
from orchestrator.execution.local import Locally
from orchestrator.execution.place import Notice, Place, Tracker
from orchestrator.execution.run_logs import with_log
from orchestrator.execution.sizing import Room
from orchestrator.execution.stacks import Dump
from orchestrator.execution.sweep_energy import Meter
from orchestrator.execution.sweep_plan import (
    Outlook,
    at_once,
    capacity_of,
    outlook,
    refuse_energy,
    sibling,
    trial_plan,
    trial_spec,
    unmeasured,
)
from orchestrator.execution.worker import (
    DONE,
    ENDED,
    PAUSED,
    STOPPED,
    Plan,
    Returned,
    copy_to_storage,
    local_directory,
    log_path,
)
from orchestrator.failures.classify import Evidence, RanksFailed, first_cause
from orchestrator.failures.policy import Rules
from orchestrator.failures.rules import patterns_of
from orchestrator.records import Fact, FactKind, RunSpec, RunStatus, RunTicket
from orchestrator.stack import Stack
from orchestrator.sweep_records import SweepPoll, SweepRecord, SweepSpec, SweepStep
from orchestrator.sweeps.budget import Gang
from orchestrator.sweeps.core import Core
from orchestrator.sweeps.jobs import Assigned, Ended, Ending
from orchestrator.sweeps.loop import Loop
from orchestrator.sweeps.rules import TUNE, scheduler_for
from orchestrator.sweeps.search import Searcher, searcher_for, total
from orchestrator.sweeps.space import Space
from orchestrator.sweeps.state import Scheduler
from orchestrator.sweeps.summary import SweepView, best_of, left
from orchestrator.sweeps.template import Template
from orchestrator.sweeps.warm import Warm
from orchestrator.tracking.logger import Logger

if TYPE_CHECKING:
    from orchestrator.execution.lanes import LanePool

logger = logging.getLogger(__name__)

PATIENCE = 120.0
"""Seconds in which a step is sent again when the tracker is away. It is the same step, so it counts once."""
OUTAGE = 1800.0
"""Seconds in which it is sent again when the tracker is there and its database is not: trials train meanwhile."""
HELD = 24 * 3600.0
"""Seconds after which a checkpoint that another trial starts from is let go in any case."""
BEAT = 1.0
"""Seconds between two signs of life of the trials."""
LOOK = 5.0
"""Seconds between two looks whether a job gets on."""

OURS = ("random", "grid")
"""Searchers that need no library."""

_STATUS = {
    Ended.complete: RunStatus.finished,
    Ended.paused: RunStatus.finished,
    Ended.ended: RunStatus.finished,
    Ended.stopped: RunStatus.cancelled,
    Ended.failed: RunStatus.failed,
    Ended.lost: RunStatus.crashed,
}
_HOW = {DONE: Ended.complete, STOPPED: Ended.stopped, PAUSED: Ended.paused, ENDED: Ended.ended}
_Answer = TypeVar("_Answer")


class SweepFailed(UserError):
    """Every trial of a sweep failed."""

    def __init__(self, trials: int, causes: Mapping[str, int]) -> None:
        super().__init__(trials, causes)
        self.trials, self.causes = trials, causes

    def __str__(self) -> str:
        found = "; ".join(f"{count} × {cause}" for cause, count in self.causes.items())
        return f"all {self.trials} trials failed: {found}. `orc sweep retry` runs them again."


class Patient:
    """A tracker whose sweep calls are repeated while it or its database is away, which is safe: a step counts once."""

    def __init__(
        self,
        tracker: Tracker,
        over: threading.Event,
        *,
        patience: float = PATIENCE,
        outage: float = OUTAGE,
        pause: float = 0.5,
    ) -> None:
        self._tracker, self._over, self._patience, self._pause = tracker, over, patience, pause
        self._outage = outage

    def open_sweep(self, spec: SweepSpec, driver: str) -> SweepRecord:
        return self._asked(lambda: self._tracker.open_sweep(spec, driver))

    def sweep_step(self, step: SweepStep) -> Mapping[int, RunTicket]:
        return self._asked(lambda: self._tracker.sweep_step(step))

    def sweep_poll(self, sweep: str, driver: str) -> SweepPoll:
        return self._asked(lambda: self._tracker.sweep_poll(sweep, driver))

    def _asked(self, question: Callable[[], _Answer]) -> _Answer:
        began, is_told = time.monotonic(), False
        while True:
            try:
                answer = question()
            except (ConnectionError, TimeoutError, ServiceUnavailable) as error:
                patience = self._outage if isinstance(error, ServiceUnavailable) else self._patience
                if time.monotonic() - began > patience or self._over.wait(self._pause):
                    raise
                if not is_told:
                    logger.warning("the sweep decides nothing for now, what runs goes on: %s", error)
                is_told = True
                continue
            if is_told:
                logger.warning("the sweep goes on after %.0f s", time.monotonic() - began)
            return answer


@dataclass(slots=True)
class _Running:
    """A job in somebody's hands."""

    assigned: Assigned
    place: Place | None = None
    began: float = field(default_factory=time.monotonic)
    at: float = field(default_factory=time.time)
    position: Any = None
    moved: float = field(default_factory=time.monotonic)
    killed: str = ""
    """Why we ended it, in words."""
    is_asked: bool = False
    """To stop."""


class SweepPlace:
    """A Place. `inner` is where trials run; `watch` is told in the core's thread how the sweep stands, `announce`
    the outlook before a run exists. Neither may wait."""

    def __init__(
        self,
        inner: Place,
        stack: Stack,
        parent: RunSpec,
        template: Template,
        space: Space,
        *,
        warm: Warm | None = None,
        announce: Callable[[Outlook], None] | None = None,
        watch: Callable[[SweepView], None] | None = None,
    ) -> None:
        self._inner, self._stack, self._parent = inner, stack, parent
        self._template, self._space = template, space
        self._warm, self._announce, self._watch = warm, announce, watch
        self._patterns = patterns_of(template.base.settings.failures.patterns)
        self._closed = threading.Event()
        self._sweep = ""
        self._running: dict[int, _Running] = {}
        self._lock = threading.Lock()
        self._is_to_stop = threading.Event()
        self._pool: LanePool | None = None
        self._ending: threading.Thread | None = None
        """Lets lanes go after the last job."""
        self._meter = Meter(self._joules)
        self._newest: tuple[str, Job] | None = None

    # -- what the inner place says

    @property
    def name(self) -> str:
        return self._inner.name

    @property
    def tracker(self) -> Tracker:
        return self._inner.tracker

    @property
    def job(self) -> str:
        return self._inner.job

    def resources(self) -> Mapping[str, Any]:
        return self._inner.resources()

    def room(self, wanted: ResourcesConfig, avoid: Collection[str] = ()) -> Room:
        return Room(workers=wanted.workers)  # of its trials, which find it themselves

    def notice(self) -> Notice | None:
        return None

    is_watched = False  # its trials are, one by one

    def stacks(self, ticket: RunTicket) -> Sequence[Dump]:
        return self._inner.stacks(ticket)

    def end(self, ticket: RunTicket) -> None:
        self.close()

    def network(self) -> str:
        return self._inner.network()

    def waits_for(self) -> str:
        return self._inner.waits_for()

    def check(self, settings: Settings) -> None:
        self._inner.check(settings)
        capacity = capacity_of(self._inner.resources())
        if not self._parent.run:  # one that goes on may have been asked for another budget
            refuse_energy(settings.sweep.budget.kwh, unmeasured(settings, capacity, self._stack.monitoring))
        found = outlook_of(self._template, self._space, capacity, self.name, self._warm)
        if self._announce:
            self._announce(found)

    def close(self) -> None:
        self._closed.set()
        self._is_to_stop.set()
        with self._lock:
            running = list(self._running.values())
        for each in running:
            if each.place is not None:
                each.place.close()
        if self._ending is not None:
            self._ending.join()
        self._inner.close()

    # -- the sweep

    def fit(self, plan: Plan, settings: Settings) -> Returned:
        """Runs the sweep to its end. Raises SweepTaken, SweepFailed, ServiceUnavailable."""
        ticket = plan.ticket
        self._sweep = ticket.run
        capacity = capacity_of(self._inner.resources())
        why_not = unmeasured(settings, capacity, self._stack.monitoring)
        core = self._core(ticket, settings, gangs(settings, capacity), why_not)
        first, _ = at_once(settings, capacity, core.state.settings.samples)
        room = max(gangs(settings, capacity), first)  # `orc sweep set sweep.concurrency` may ask for as many later
        points = Logger(Path(plan.spool_directory), run=ticket.run, attempt=ticket.attempt, rank=-1)
        shown = _Shown(core, ticket, points, self._watch)
        over = threading.Event()
        if not why_not:
            self._meter.start()
        threading.Thread(target=self._beat, args=(ticket, settings, over), name="sweep beat", daemon=True).start()
        try:
            if isinstance(self._inner, Locally):
                self._run_here(core, room, plan, shown)
            else:
                self._run_on_lanes(core, room, first, plan, shown, settings)
            shown.show(core.view())
            shown.tell_best(core.view())
        except (ConnectionError, TimeoutError) as error:
            where = self._stack.ray_address or self._stack.home
            raise ServiceUnavailable("the tracker", where, f"{error}.", "Then `orc sweep resume` goes on.") from error
        finally:
            over.set()
            self._meter.stop()
            points.close()
        return self._returned(core)

    def _run_here(self, core: Core, room: int, plan: Plan, shown: _Shown) -> None:
        """New processes of this host for each job."""
        Loop(
            core,
            room,
            lambda assigned: self._run(plan, assigned),
            stop=self._is_to_stop,
            stop_runs=self._ask_to_stop,
            watch=shown.show,
            kwh=lambda: self._meter.kwh,
        ).run()

    def _run_on_lanes(self, core: Core, room: int, first: int, plan: Plan, shown: _Shown, settings: Settings) -> None:
        """Tune gives the jobs to the lanes."""
        from orchestrator.execution import tuner
        from orchestrator.execution.lanes import LanePool

        ticket = plan.ticket
        tuner.prepare()
        token = driver_name(ticket).rpartition("/")[2]
        pool = LanePool(self._stack, settings, sweep=ticket.run, name=ticket.name, driver=token, size=room)
        self._pool = pool

        def more() -> None:
            wanted = min(core.settings.concurrency or room, room, max(core.state.settings.samples, 1))
            if wanted > first:
                pool.want(wanted, is_eager=False)

        try:
            pool.want(first)
            turns = _Turns(core, self._is_to_stop, self._ask_to_stop, shown, more, lambda: self._meter.kwh)
            turns.turn()  # what was asked while nobody ran it: a sweep that was over may have more to do now
            tuner.run(
                core,
                _LaneHands(self, pool, plan),
                name=f"{ticket.run}-{ticket.attempt}",
                directory=Path(self._stack.home) / "ray" / "tune",
                on_turn=turns.turn,
            )
        except BaseException:
            pool.close()  # jobs may be running: nobody shall go on with the sweep before they are gone
            raise
        else:
            # Ray Train takes a second to end a group, in which the sweep's record can be saved; `close` waits for it.
            self._ending = threading.Thread(target=pool.close, name="sweep lanes end", daemon=True)
            self._ending.start()
        finally:
            self._pool = None

    def _core(self, ticket: RunTicket, settings: Settings, room: int, unmeasured: str) -> Core:
        told = _with_objective(settings)
        spec = SweepSpec(
            sweep=ticket.run,
            project=settings.run.project,
            who=settings.run.user or user_name(),
            seed=settings.run.seed,
            settings=dump(told),
            space=self._space.to_json(),
        )
        resources = settings.resources
        core = Core.open(
            spec,
            Patient(self.tracker, self._closed),
            driver=driver_name(ticket),
            settings=told,
            space=self._space,
            scheduler=scheduler_named(told, self._space),
            searcher=self._searcher(ticket.run, told, self._space),
            renewed=lambda sweep, space: self._searcher(ticket.run, sweep, space),
            spec_of=lambda trial, repeat, values: trial_spec(self._parent, ticket, self._job(values), trial, repeat),
            params=self._template.base.params,
            gang=Gang(
                cpus=resources.workers * resources.cpus_per_worker, gpus=resources.workers * resources.gpus_per_worker
            ),
            at_once=room,
            unmeasured=unmeasured,
            stopping=asdict(settings.stopping),
            hold=lambda *, run, checkpoint, token, is_held: _hold(ticket, run, checkpoint, token, is_held=is_held),
            failures=Rules.of(asdict(settings.failures)),
        )
        if core.settings.budget.kwh and unmeasured:
            core.poll()  # it may have been asked for another budget
            refuse_energy(core.settings.budget.kwh, unmeasured)
        return core

    def _searcher(self, sweep: str, settings: SweepConfig, space: Space) -> Searcher:
        library = None
        if settings.searcher not in OURS:
            from orchestrator.execution.searchers import library as found

            library = found(database_url=self._stack.database_url, sweep=sweep)
        return searcher_for(settings, space, self._template.base.settings.run.seed, library=library)

    def _returned(self, core: Core) -> Returned:
        """How the attempt of the parent ends."""
        if self._is_to_stop.is_set():
            return Returned(how=STOPPED)
        view = core.view()
        failed = [trial for trial in view.trials if trial.status == "failed"]
        if failed and len(failed) == len(view.trials):
            causes = Counter(trial.reason.splitlines()[0] if trial.reason else "unknown" for trial in failed)
            raise SweepFailed(len(failed), dict(causes.most_common(5)))
        return Returned(how=DONE, tally={"reason": view.reason} if view.reason else {})

    def _joules(self) -> float | None:
        """Of all trials, as far as it is recorded."""
        with open_store(Path(self._stack.home)) as store:
            return store.sweep_energy(self._sweep)

    # -- jobs

    def _job(self, values: Mapping[str, Any]) -> Job:
        """The configuration of a trial, needed twice, when a job is decided and when it begins: 10 ms each time.
        Raises ConfigError."""
        key = repr(sorted(values.items()))  # which tells 1 from 1.0 and from true
        newest = self._newest
        if newest is None or newest[0] != key:
            newest = self._newest = key, self._template.job(values)
        return newest[1]

    def began(self, base: Plan, assigned: Assigned) -> tuple[Plan, Job]:
        """What the ranks of a job are told. Its attempt gets signs of life from here on. Raises ConfigError."""
        with self._lock:
            self._running[assigned.job] = _Running(assigned)
        job = self._job(assigned.values)
        _describe(assigned.ticket, job, RunStatus.running)
        return trial_plan(base, job, assigned, sweep=base.ticket.run), job

    def came_back(self, assigned: Assigned, ending: Ending) -> Ending:
        """The ending, with what is known here: how long it took, and whether we ended it."""
        with self._lock:
            running = self._running.pop(assigned.job, None)
        if ending.evidence:
            evidence = [Evidence(**each) for each in ending.evidence]
            judged = self._failed("", evidence, assigned.ticket)
            ending = replace(judged, lane=ending.lane, lane_seconds=ending.lane_seconds, started_at=ending.started_at)
        _describe(assigned.ticket, None, _STATUS[ending.how], ending.reason)
        if ending.how is Ended.failed and not ending.tally:
            # A crash leaves no words; whether it had got further than the one before decides if it is tried again.
            ending = replace(ending, tally=self._left_by(assigned.ticket))
        if running is None:
            return ending
        took = time.monotonic() - running.began
        return replace(ending, lane_seconds=ending.lane_seconds or took, started_at=ending.started_at or running.at)

    def _left_by(self, ticket: RunTicket) -> dict[str, float]:
        """What is known of an attempt that crashed: `progress` is the newest step that anybody knows of, for the last
        points of ranks that died may still be on their way, and what a checkpoint has another attempt need not do
        again."""
        from orchestrator.training.judging import tally_left

        found = [0.0]
        micro_batch = 0.0
        try:
            live = self.tracker.live(ticket.run)
            found.append(float(live.get("step") or 0))
            micro_batch = float(live.get("metrics", {}).get("perf/micro_batch", {}).get("value", 0))
        except Exception:
            logger.debug("no live values", exc_info=True)
        try:
            found.append(float(tally_left(ticket.directory).get("checkpoint", {}).get("step") or 0))
        except (OSError, OrchestratorError):
            logger.debug("no checkpoint tells how far it got", exc_info=True)
        return {"progress": max(found), "micro_batch": micro_batch}

    def defect(self, assigned: Assigned, error: Exception) -> Ending:
        """The ending of a job that could not be begun, or whose end nobody here understands."""
        if not isinstance(error, OrchestratorError):
            logger.exception("job %d of the sweep failed in the driver", assigned.job)
        message = redact_text(str(error), self._template.base.secrets)
        evidence = Evidence(rank=-1, type=type(error).__name__, message=message, at=time.time())
        return self._failed("", [evidence], assigned.ticket)

    def _run(self, base: Plan, assigned: Assigned) -> Ending:
        """One job in the thread of a lane. Blocks until it ended; what goes wrong is how it ended."""
        return self.came_back(assigned, self._ended(base, assigned))

    def _ended(self, base: Plan, assigned: Assigned) -> Ending:
        if self._closed.is_set():
            return Ending(how=Ended.lost, reason="the sweep was ended")
        try:
            plan, job = self.began(base, assigned)
            running = self._running[assigned.job]
            running.place = self._place_of_job()
            returned = running.place.fit(plan, job.settings)
        except RanksFailed as error:
            return self._failed(self._running[assigned.job].killed, error.evidence, assigned.ticket)
        except Exception as error:
            return self.defect(assigned, error)
        return Ending(how=_HOW[returned.how], tally=returned.tally, reason=str(returned.tally.get("reason", "")))

    def _place_of_job(self) -> Place:
        """One of its own for each job, where a place runs one attempt at a time and ending it ends all of it."""
        if isinstance(self._inner, Locally):
            return Locally(self._stack)
        return self._inner

    def _failed(self, killed: str, evidence: Sequence[Evidence], ticket: RunTicket) -> Ending:
        """`killed` is why we ended it, if we did."""
        if killed:
            kind = killed.partition(":")[0]
            said = {"kind": kind, "type": "Ended", "message": killed, "rank": -1, "what": killed}
            return Ending(how=Ended.failed, error=said, kind=kind, reason=killed)
        if self._closed.is_set():
            return Ending(how=Ended.lost, reason="the sweep was ended")
        told = [with_log(each, log_path(ticket, each.rank)) for each in evidence]
        finding = first_cause(told, patterns=self._patterns)
        error = {**finding.error(), "log": str(log_path(ticket, finding.evidence.rank))}
        return Ending(
            how=Ended.failed,
            error=error,
            kind=str(finding.kind),
            reason=finding.reason,
            is_restart_useful=finding.is_restart_useful,
        )

    # -- the second that comes round

    def _beat(self, parent: RunTicket, settings: Settings, over: threading.Event) -> None:
        look = time.monotonic() + LOOK
        while not over.wait(BEAT):
            with self._lock:
                running = list(self._running.values())
            attempts = [(each.run, each.attempt) for each in (parent, *(one.assigned.ticket for one in running))]
            try:
                stops = self.tracker.heartbeats(attempts)
            except Exception:
                logger.debug("no heartbeat", exc_info=True)
                continue
            if stops[0]:
                self._is_to_stop.set()
            if time.monotonic() >= look:
                look = time.monotonic() + LOOK
                for each in self._taken(running):
                    self._look(each, settings)

    def _taken(self, running: Sequence[_Running]) -> Sequence[_Running]:
        """Those that have processes; the clocks of the others, which wait for a lane, have not begun."""
        if self._pool is None:
            return running
        taken = {lane.get("job") for lane in self._pool.view().get("lanes", ())}
        for each in running:
            if each.assigned.job not in taken:
                each.began = each.moved = time.monotonic()
        return [each for each in running if each.assigned.job in taken]

    def _look(self, running: _Running, settings: Settings) -> None:
        """Ends a job that does not get on, or takes too long."""
        now, sweep = time.monotonic(), settings.sweep
        try:
            live = self.tracker.live(running.assigned.ticket.run)
        except Exception:
            logger.debug("no live values", exc_info=True)
            live = {}
        # The sampler goes on whatever the training does, so neither its values nor how many points came say anything.
        own = {key: value for key, value in live.get("metrics", {}).items() if not key.startswith("system/")}
        position = (live.get("step"), json.dumps(own, default=str))
        if not live or position != running.position:
            running.position, running.moved = position, now
        if sweep.trial_minutes and now - running.began > 60 * sweep.trial_minutes:
            self._kill(running, "time limit", f"it took longer than {sweep.trial_minutes:g} minutes")
        elif sweep.hang and now - running.moved > sweep.hang:
            self._kill(running, "hang", f"no progress for {sweep.hang:g} seconds")

    def _kill(self, running: _Running, kind: str, why: str) -> None:
        if running.killed:
            return
        running.killed = f"{kind}: {why}"
        # To ask where its ranks are takes seconds, in which the signs of life must go on.
        threading.Thread(target=self._end_job, args=(running, kind), name="sweep kill", daemon=True).start()

    def _end_job(self, running: _Running, kind: str) -> None:
        if kind == "hang" and (where := self._where(running)):
            running.killed += f". {where}"
        logger.warning("trial %d is ended: %s", running.assigned.trial, running.killed)
        try:
            if self._pool is not None:
                self._pool.condemn(running.assigned.job, kind, running.killed)
            elif running.place is not None:
                running.place.close()
        except Exception:
            logger.warning("trial %d could not be ended", running.assigned.trial, exc_info=True)

    def _where(self, running: _Running) -> str:
        """Where the ranks of a job are, in words, and all their stacks beside its logs; "" where nobody tells."""
        ticket = running.assigned.ticket
        try:
            dumps = (running.place or self._inner).stacks(ticket)
            logs = log_path(ticket, -1).parent
            files = stacks.write(logs, dumps, time.time())
            copy_to_storage(ticket, *files)
        except Exception:
            logger.warning("the ranks of trial %d could not be looked into", running.assigned.trial, exc_info=True)
            return ""
        return f"{stacks.words(dumps)} All stacks: {logs}/rank-*.stack." if files else ""

    def _ask_to_stop(self, runs: Sequence[str]) -> None:
        """The ranks of these runs learn of it with their next report. In a thread: the core does not wait for it."""
        with self._lock:
            fresh = [each for each in self._running.values() if each.assigned.ticket.run in runs and not each.is_asked]
        for each in fresh:
            each.is_asked = True
        asked = tuple(each.assigned.ticket.run for each in fresh)
        if asked:
            threading.Thread(target=self._cancel, args=(asked,), name="sweep stop", daemon=True).start()

    def _cancel(self, runs: Sequence[str]) -> None:
        for run in runs:
            try:
                self.tracker.cancel(run, user_name())
            except Exception:
                logger.warning("run %s could not be asked to stop", run, exc_info=True)


def outlook_of(
    template: Template, space: Space, capacity: ClusterCapacity | None, place: str, warm: Warm | None = None
) -> Outlook:
    """Raises ConfigError for what cannot be."""
    settings = template.base.settings
    scheduler = scheduler_named(_with_objective(settings), space)
    survives = {scheduler.name: scheduler.survives}
    library = None
    if settings.sweep.searcher not in OURS:
        from orchestrator.execution.searchers import library as found

        library = found()  # without a database: only what cannot be is to be heard of now
    searcher = searcher_for(_with_objective(settings), space, settings.run.seed, library=library)
    survives[searcher.name] = searcher.survives
    trials = total(settings.sweep, space)
    return outlook(template.base, space, capacity, trials=trials, place=place, survives=survives, warm=warm)


def scheduler_named(settings: SweepConfig, space: Space) -> Scheduler:
    """Ours, or Tune's. Raises ConfigError for a name that nobody knows."""
    if not settings.scheduler.startswith(TUNE):
        return scheduler_for(settings, space)
    from orchestrator.execution.tune_scheduler import library

    return scheduler_for(settings, space, library=library)


class _Shown:
    """What people and sinks see of the sweep: the picture, and metrics of the parent run like any others."""

    def __init__(
        self, core: Core, ticket: RunTicket, points: Logger, watch: Callable[[SweepView], None] | None
    ) -> None:
        self._core, self._ticket, self._points, self._watch = core, ticket, points, watch
        self._told: dict[str, float] = {}
        self._is_planned: bool | None = None
        """Whether it is recorded what the sweep takes; of one that goes on it is."""

    def show(self, view: SweepView) -> None:
        """Who watches must not end a sweep."""
        try:
            if self._watch:
                self._watch(replace(view, name=self._ticket.name))
            self._record(view)
        except Exception:
            logger.debug("the display failed", exc_info=True)

    def tell_best(self, view: SweepView) -> None:
        """As tags of the parent run: which trial is the best, its score and its values."""
        for trial in best_of(view):
            words = {"best_trial": str(trial.number), "best_run": trial.run, "best_score": repr(trial.score)}
            words |= {f"best_{key}": json.dumps(value) for key, value in trial.values.items()}
            for name, value in words.items():
                data = {"name": name, "value": value[:500]}
                self._points.fact(Fact(kind=FactKind.tag, at=time.time(), data=data))

    def _record(self, view: SweepView) -> None:
        if not self._is_planned:
            rest = left(view)
            if rest and self._is_planned is False:
                data = {"kind": "sweep-estimate", "level": "info", "message": str(rest)}
                self._points.fact(Fact(kind=FactKind.event, at=time.time(), data=data))
            self._is_planned = rest is not None
        counts = Counter(trial.status for trial in view.trials)
        told = {f"sweep/{status}": float(counts[status]) for status in ("complete", "failed", "running")}
        if best := best_of(view):
            told["sweep/best"] = float(best[0].score or 0.0)
        if told != self._told:
            self._told = told
            self._points.log(told, step=max(self._core.state.seq, 0))


class _Turns:
    """What the core's thread does between jobs where Tune gives them out: once per second, requests, budget, wishes to
    stop, the picture."""

    def __init__(
        self,
        core: Core,
        is_to_stop: threading.Event,
        stop_runs: Callable[[Sequence[str]], None],
        shown: _Shown,
        more: Callable[[], None],
        kwh: Callable[[], float | None],
    ) -> None:
        self._kwh = kwh
        self._core, self._is_to_stop, self._stop_runs, self._shown = core, is_to_stop, stop_runs, shown
        self._more = more
        """Sees to it that there are lanes enough."""
        self._next = 0.0

    def turn(self) -> None:
        """Raises SweepTaken, and what the core raises."""
        if self._is_to_stop.is_set():
            self._core.stop("asked to stop")
        if time.monotonic() < self._next:
            return
        polled = self._core.poll()
        if polled.is_taken:
            raise SweepTaken(self._core.sweep, "another driver")
        if polled.stops:
            self._stop_runs(polled.stops)
        if said := self._core.spend(kwh=self._kwh()):
            logger.warning("%s", said)
        self._more()
        began = time.monotonic()
        self._shown.show(self._core.view())
        # Ten thousand trials take a while to look at.
        self._next = time.monotonic() + max(BEAT, 20 * (time.monotonic() - began))


class _LaneHands:
    """`tuner.Hands`: a pool of lanes, with what the place notes of each job."""

    def __init__(self, place: SweepPlace, pool: LanePool, base: Plan) -> None:
        self._place, self._pool, self._base = place, pool, base
        self._failed: dict[int, Ending] = {}
        """Jobs that could not be put; they are unknown to the desk, and their end is this."""

    @property
    def size(self) -> int:
        return self._pool.size

    @property
    def desk(self) -> str:
        return self._pool.desk

    def put(self, assigned: Assigned) -> None:
        try:
            plan, _ = self._place.began(self._base, assigned)
        except Exception as error:
            self._failed[assigned.job] = self._place.defect(assigned, error)
            return
        if not self._pool.put(assigned, plan):
            self._pool.put(assigned, plan)  # the desk had died unnoticed, and there is another one now

    def ending(self, assigned: Assigned, raw: Mapping[str, Any]) -> Ending:
        failed = self._failed.pop(assigned.job, None)
        return self._place.came_back(assigned, failed or self._pool.ending(assigned.job, raw))


def _hold(parent: RunTicket, run: str, checkpoint: str, token: str, *, is_held: bool) -> bool:
    """Keeps a checkpoint of a trial from its retention while another trial starts from it; False if it is gone. Where
    the storage does not answer it may be there, and whoever wants it will see."""
    storage = Storage(sibling(parent.directory, run)).join("checkpoints")
    try:
        if is_held:
            return keep(storage, checkpoint, until=time.time() + HELD, token=token)
        release(storage, checkpoint, Hold.in_use, token=token)
    except (OSError, OrchestratorError) as error:
        logger.warning("checkpoint %s of run %s could not be held: %s", checkpoint, run, error)
    return True


def _with_objective(settings: Settings) -> SweepConfig:
    """The sweep's settings; where they name no objective, the metric by which the best checkpoint is chosen is it."""
    sweep, checkpoints = settings.sweep, settings.checkpoints
    if sweep.objective or not checkpoints.best_metric:
        return sweep
    return replace(sweep, objective=[f"{checkpoints.best_metric}:{checkpoints.best_direction.value}"])


def driver_name(ticket: RunTicket) -> str:
    """Of this process in this attempt. Host and pid tell whoever comes next whether it still lives."""
    return f"{socket.gethostname()}/{os.getpid()}/{ticket.attempt}-{secrets.token_hex(3)}"


def _describe(ticket: RunTicket, job: Job | None, status: RunStatus, reason: str = "") -> None:
    """The files by which the directory of a trial's run says what it is, as those of any run. Never raises."""
    directory = Path(local_directory(ticket))
    try:
        directory.mkdir(parents=True, exist_ok=True)
        if job is not None:
            write_config(directory, job)
            copy_to_storage(ticket, directory / "config.json", directory / "config.yaml")
        file = directory / layout.IDENTITY
        file.write_bytes(Identity.of(ticket, status, time.time(), reason).encode())
    except OSError as error:
        logger.warning("%s could not be described: %s", directory, error)
        return
    copy_to_storage(ticket, file)
