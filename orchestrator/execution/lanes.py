"""The lanes of a sweep: groups of ranks on Ray that stay while jobs come and go.

Starting a group costs seconds, a job may take one. So a lane is a TorchTrainer whose ranks run one job after the other;
in the driver it is a thread that waits for `fit`. All belongs to the driver's process: when it dies, its lanes die with
it. Jobs go through the desk, see desk.py. With one job per group (`sweep.lanes=off`) nothing else differs.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from orchestrator.config import Settings
from orchestrator.config.settings import Lanes
from orchestrator.execution.desk import LaneDesk, ending_from
from orchestrator.execution.local import plan_to_json
from orchestrator.execution.on_ray import evidence_of, with_lost_nodes
from orchestrator.execution.placement import Placement
from orchestrator.execution.ray_names import LaneIdentity, named_controller
from orchestrator.execution.sizing import per_worker
from orchestrator.execution.worker import Plan
from orchestrator.failures.classify import Evidence
from orchestrator.stack import Stack
from orchestrator.sweeps.jobs import Assigned, Ended, Ending

logger = logging.getLogger(__name__)

LOOK = 1.0
"""Seconds between two looks of a lane without a group whether it is needed."""
LONGEST_PAUSE = 30.0
"""Seconds between two groups of a lane that died before they had ended a job; 0, 1, 2, 4 … before."""
HOPELESS = 5
"""Groups in a row, of all lanes together, that died before they took a job, after which jobs that wait fail."""
DESK = {
    "num_cpus": 0,  # must start on a full cluster
    "max_restarts": 0,  # it holds what cannot be had again: which rank is where
    "max_concurrency": 1000,  # every rank and every trainable waits in a call of its own
    "scheduling_strategy": "DEFAULT",  # or a trial's placement group would own it
    "enable_task_events": False,  # a rank asks again and again
}


class LanePool:
    """At most `size` lanes. `driver` makes the desk's name unique among the drivers of a sweep. All methods may be
    called from any thread.
    """

    def __init__(self, stack: Stack, settings: Settings, *, sweep: str, name: str, driver: str, size: int) -> None:
        import ray.train.torch  # noqa: F401  # here: threads that import it at the same time find half of it

        self._stack, self._settings, self.size = stack, settings, size
        self.sweep, self.name, self._driver = sweep, name, driver
        self._lock = threading.Lock()
        self._changed = threading.Condition()
        self._closed = threading.Event()
        self._lanes: list[_Lane] = []
        self._secrets: frozenset[str] = frozenset()
        self._n_desks = self._groups = self._crashes = self._hopeless = 0
        self._recycled: dict[str, int] = {}
        self._open_desk()

    @property
    def desk(self) -> str:
        """The name of the desk as it is now; a trainable finds it by `handles.RemoteDesk(name)`."""
        return self.current_desk.name

    # -- jobs

    def run_job(self, assigned: Assigned, plan: Plan) -> Ending:
        """Blocks until the job has ended. A desk that dies meanwhile loses the job."""
        if not self.put(assigned, plan):
            return Ending(how=Ended.lost, reason="the lanes are closed or their desk died")
        desk = self.current_desk
        while not self._closed.is_set():
            try:
                raw = desk.look(assigned.job)
            except TimeoutError:
                continue
            except ConnectionError:
                self.renew_desk(desk)
                return self.ending(assigned.job, {})
            if raw is not None:
                return self.ending(assigned.job, raw)
        return Ending(how=Ended.lost, reason="the lanes are closed")

    def put(self, assigned: Assigned, plan: Plan) -> bool:
        """Queues a job for the first lane that is free; False where it will never run."""
        if self._closed.is_set():
            return False
        if self._stack.checkpoint_writers:
            plan = replace(plan, slab_directory=self._stack.slab_directory)
        # The agent ships what a lane's ranks recorded; nothing that follows a job needs to see all of it.
        raw = plan_to_json(replace(plan, waits_for_record=False)).encode()
        self._secrets |= frozenset(plan.secrets)
        desk = self.current_desk
        try:
            desk.put(assigned.job, raw)
        except (ConnectionError, TimeoutError):
            self.renew_desk(desk)
            return False
        self.want(self.size if len(self._lanes) >= self.size else len(self._lanes) or 1, is_eager=False)
        return True

    def ending(self, job: int, raw: Mapping[str, Any]) -> Ending:
        """What `RemoteDesk.run` returned for a job; {} where the desk is gone."""
        return ending_from(raw) if raw else Ending(how=Ended.lost, reason=f"the desk that had job {job} died")

    # -- lanes

    def want(self, lanes: int, *, is_eager: bool = True) -> None:
        """So many lanes at most, and these exist; `is_eager`: they start now, not only when a job waits."""
        lanes = min(lanes, self.size)
        with self._lock:
            for number in range(len(self._lanes), lanes):
                self._lanes.append(_Lane(self, number, is_eager))
                self._lanes[-1].start()
        with self._changed:
            self._changed.notify_all()

    def resize(self, size: int) -> None:
        """From now on at most so many; those above end after their jobs."""
        self.size = size
        self._tell("want", size)
        self.want(size, is_eager=False)

    def condemn(self, job: int, kind: str, reason: str) -> bool:
        """Fails a job whose ranks may hang, and ends the group that has it. False where it had ended already."""
        found = self._tell("condemn", job, kind, reason)
        if found:
            self.kill(found[0])
        return bool(found)

    def kill(self, lane: int) -> None:
        """Ends the processes of a lane, whatever they do. Its job, if it has one, fails as one of a killed worker."""
        from orchestrator.execution import handles

        generation = self._lanes[lane].generation
        identity = self._identity(lane, generation)
        ranks = [identity.part(f"rank-{rank}") for rank in range(self._settings.resources.workers)]
        if not handles.end_actors(ranks):
            handles.end_actors([identity.part("controller")])

    def view(self) -> dict[str, Any]:
        """How it stands, for people: {"lanes": as LaneDesk.view with "waits_for", "waiting": jobs that no lane has,
        "groups": that were begun, "crashes": groups that died, "recycled": {why a group was ended: how often}};
        {} where the desk does not answer."""
        seen = self._tell("view")
        if not seen:
            return {}
        lanes = {lane.number: lane for lane in self._lanes}
        told = [{**each, "waits_for": lanes[each["lane"]].waits_for} for each in seen["lanes"]]
        return {
            "lanes": told,
            "waiting": seen["waiting"],
            "groups": self._groups,
            "crashes": self._crashes,
            "recycled": dict(self._recycled),
        }

    def close(self, grace: float = 10.0) -> None:
        """Lets go the lanes that are free, and ends the others when `grace` is over."""
        self._tell("close")
        self._closed.set()
        with self._changed:
            self._changed.notify_all()
        deadline = time.monotonic() + grace
        for lane in self._lanes:
            lane.join(max(deadline - time.monotonic(), 0.0))
        for lane in [lane for lane in self._lanes if lane.is_alive()]:
            try:
                self.kill(lane.number)
            except Exception:
                logger.warning("lane %d could not be ended", lane.number, exc_info=True)
        for lane in self._lanes:
            lane.join(5.0)
        self._handle = None

    # -- what lanes ask

    @property
    def is_closed(self) -> bool:
        return self._closed.is_set()

    def wait_for_change(self, seconds: float) -> None:
        with self._changed:
            self._changed.wait(seconds)

    def pause(self, seconds: float) -> None:
        """Over at once when the pool is closed."""
        self._closed.wait(seconds)

    def group(self, lane: int, generation: int) -> tuple[Any, Placement, LaneIdentity]:
        """A trainer that begins a generation when it is fitted, who watches where it is placed, and its names."""
        from orchestrator.execution.trainer import lane_trainer

        resources, identity = self._settings.resources, self._identity(lane, generation)
        trainer = lane_trainer(
            identity,
            desk=self.desk,
            growth=int(self._settings.sweep.lane_growth_mb * (1 << 20)),
            workers=resources.workers,
            resources_per_worker=per_worker(resources),
            placement=resources.placement.value.upper(),
            storage=str(Path(self._stack.home) / "ray" / "train"),
        )
        return trainer, Placement(identity.title), identity

    def evidence(self, error: Exception, placement: Placement) -> list[Evidence]:
        return with_lost_nodes(evidence_of(error, sorted(self._secrets)), placement)

    @property
    def workers(self) -> int:
        return self._settings.resources.workers

    def began(self) -> None:
        """A lane begins a group."""
        with self._lock:
            self._groups += 1

    def ended(self, n_jobs: int, evidence: Sequence[Evidence], why: str) -> None:
        """A group ended after so many jobs. Where some in a row die before they took one, the jobs that wait fail."""
        with self._lock:
            self._crashes += bool(evidence)
            if why and not evidence:
                self._recycled[why] = self._recycled.get(why, 0) + 1
            self._hopeless = self._hopeless + 1 if evidence and not n_jobs else 0
            is_hopeless = self._hopeless >= HOPELESS
            self._hopeless %= HOPELESS
        if is_hopeless:
            n_failed = self._tell("fail_waiting", [asdict(each) for each in evidence])
            logger.warning("the workers of lanes cannot be started; %s jobs failed for it", n_failed)

    def renew_desk(self, dead: Any) -> None:
        """A new desk in the place of one that does not answer; its lanes end by themselves."""
        with self._lock:
            if self.current_desk is not dead or self._closed.is_set():
                return
            logger.warning("the desk of the lanes died; its jobs are tried again")
            self._open_desk()

    # -- details

    def _identity(self, lane: int, generation: int) -> LaneIdentity:
        return LaneIdentity(self.name, self.sweep, lane, generation)

    def _open_desk(self) -> None:
        from orchestrator.execution import handles

        sweep = self._settings.sweep
        suffix = f"-{self._n_desks + 1}" if self._n_desks else ""
        self._n_desks += 1
        # The slash keeps it out of the actors of which every node has one.
        name = f"orc-sweep/{self.sweep}/{self._driver}/desk{suffix}"
        self._handle = handles.start_desk(
            LaneDesk,
            {**DESK, "name": name, "namespace": handles.NAMESPACE},
            jobs_per_group=1 if sweep.lanes is Lanes.off else sweep.lane_jobs,
            idle=sweep.lane_idle,
        )
        self.current_desk = handles.RemoteDesk(name)

    def _tell(self, method: str, *args: Any) -> Any:
        """The desk's answer; None where it does not answer."""
        desk = self.current_desk
        try:
            return getattr(desk, method)(*args)
        except TimeoutError:
            logger.warning("the desk of the lanes did not answer to %s", method)
        except ConnectionError:
            self.renew_desk(desk)
        return None


class _Lane(threading.Thread):
    """One lane in the driver: begins a group when one is needed, waits for its end, tells the desk."""

    def __init__(self, pool: LanePool, number: int, is_eager: bool) -> None:
        super().__init__(name=f"lane-{number}", daemon=True)
        self.number, self.generation = number, 0
        self._pool, self._is_eager = pool, is_eager
        self._placement: Placement | None = None
        self._failures = 0

    @property
    def waits_for(self) -> str:
        return self._placement.waits_for if self._placement else ""

    def run(self) -> None:
        pool = self._pool
        while not pool.is_closed:
            desk = pool.current_desk
            try:
                is_needed = desk.begin(self.number, self.generation + 1, pool.workers, self._is_eager)
            except TimeoutError:
                continue
            except ConnectionError:
                pool.renew_desk(desk)
                pool.wait_for_change(LOOK)
                continue
            if not is_needed:
                pool.wait_for_change(LOOK)
                continue
            self._is_eager = False
            self.generation += 1
            pool.began()
            self._live(desk)
            if self._failures > 1:
                pool.pause(min(2.0 ** (self._failures - 2), LONGEST_PAUSE))

    def _live(self, desk: Any) -> None:
        """One generation, from its start to its end."""
        evidence: list[Evidence] = []
        try:
            trainer, placement, identity = self._pool.group(self.number, self.generation)
            with placement, named_controller(identity):
                self._placement = placement
                try:
                    trainer.fit()
                except Exception as error:  # Ray Train's, with one exception per rank inside
                    evidence = self._pool.evidence(error, placement)
        except Exception as error:  # of ours: the lane must not end in silence
            logger.exception("lane %d could not begin", self.number)
            evidence = [Evidence(rank=-1, type=type(error).__name__, message=str(error), at=time.time())]
        self._placement = None
        for found in evidence:
            logger.info("lane %d ended: rank %d: %s: %s", self.number, found.rank, found.type, found.message)
        try:
            n_jobs, why = desk.gone(self.number, self.generation, [asdict(found) for found in evidence])
        except (ConnectionError, TimeoutError):
            self._pool.renew_desk(desk)
            n_jobs, why = 1, ""
        self._failures = self._failures + 1 if evidence and not n_jobs else 0
        self._pool.ended(n_jobs, evidence, why)


def described(view: Mapping[str, Any]) -> str:
    """A pool's view in one line, for people. Example: lanes: 0 busy (job 7), 1 starting; 2 jobs wait."""
    words = []
    for lane in view.get("lanes", ()):
        what = f"job {lane['job']}" if lane["job"] is not None else lane.get("waits_for") or ""
        words.append(f"{lane['lane']} {lane['state']}" + (f" ({what})" if what else ""))
    waiting = f"; {view['waiting']} jobs wait" if view.get("waiting") else ""
    return f"lanes: {', '.join(words) or 'none'}{waiting}"
