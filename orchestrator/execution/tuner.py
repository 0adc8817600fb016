"""Has Ray Tune run the jobs of a sweep on its lanes.

`run` keeps the contract of `sweeps.loop.Loop.run`: it asks the core for jobs and tells it how they ended, all from the
calling thread, until the core is over. Between the two stands the `Exchange`, which knows no Ray.
"""

from __future__ import annotations

import importlib
import logging
import os
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from orchestrator.errors import ServiceUnavailable
from orchestrator.sweeps.jobs import Assigned, Ending, Jobs

logger = logging.getLogger(__name__)

JOBS_PER_TUNER = 1000
"""Tune keeps every trial that it ever had, and looks through all of them now and then: after so many a new Tuner goes
on. Lanes and desk do not notice."""
TURN = 0.2
"""Seconds between two turns of the caller, while nothing ends."""
DEATHS = 5
"""Trainables that may die, one after the other, before somebody must look at the cluster."""
ENVIRONMENT = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_GLOBAL_CHECKPOINT_S": "1000000000",  # its snapshots are never read
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "TUNE_RESULT_BUFFER_LENGTH": "1",
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
    "TUNE_WARN_INSUFFICENT_RESOURCE_THRESHOLD_S": "1000000000",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_AIR_NEW_OUTPUT": "0",  # the new one prints a table even where it is told to be quiet
}


class Hands(Protocol):
    """What runs the jobs: a sweep's place around its `lanes.LanePool`. Called from the core's thread, and must not wait
    for a job."""

    @property
    def size(self) -> int:
        """Lanes at most."""
        ...

    @property
    def desk(self) -> str:
        """The name under which Trainables find the desk now."""
        ...

    def put(self, assigned: Assigned) -> None:
        """Lays a job on the desk. Once per job and attempt."""
        ...

    def ending(self, assigned: Assigned, raw: Mapping[str, Any]) -> Ending:
        """What the desk said at a job's end, in the words of the core; {} where there is no desk: it is lost."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Given:
    """A job that Tune has; what its Trainable is told."""

    id: str
    """Unique among Tune's trials: a job whose Trainable died is given again under another."""
    job: int
    desk: str


class Exchange:
    """Jobs go out, endings come in. Belongs to one thread, in which Tune calls it.

    Tune swallows what a searcher raises, or makes a failed trial of it. So an error of the core is kept here: nothing
    is given out any more, and the next `turn` raises it.
    """

    def __init__(
        self,
        core: Jobs,
        hands: Hands,
        *,
        on_turn: Callable[[], None] | None = None,
        most: int = JOBS_PER_TUNER,
    ) -> None:
        self._core, self._hands, self._on_turn, self._most = core, hands, on_turn, most
        self._out: dict[str, Assigned] = {}
        self._again: list[Assigned] = []
        self._given = self._times = self._deaths = 0
        self._turned_at = float("-inf")
        self._has_news = True
        """Whether anything happened since the core had no job: it is not asked ten times a second for nothing."""
        self.error: BaseException | None = None

    def renew(self) -> None:
        """For the next Tuner."""
        self._given = 0

    def next(self) -> Given | None:
        """The next job for Tune; None: not now. Where Tune has nothing at all to do this waits until there is a job,
        for Tune itself would sleep a second at a time; None then: there will be none."""
        try:
            while self.error is None and not self.is_finished():
                if len(self._out) < self._hands.size and (assigned := self._next_job()) is not None:
                    return self._give(assigned)
                if self._out or self._core.is_over():
                    return None
                time.sleep(TURN)  # everything is held, or a request is on its way
                self._turn()
        except BaseException as error:
            self.error = error
        return None

    def _next_job(self) -> Assigned | None:
        if self._again:  # it lies on the desk, and may have ended: laid there again it would run again
            return self._again.pop(0)
        if not self._has_news:
            return None
        assigned = self._core.next_job()
        self._has_news = assigned is not None
        if assigned is not None:
            self._hands.put(assigned)
        return assigned

    def _give(self, assigned: Assigned) -> Given:
        self._given, self._times = self._given + 1, self._times + 1
        given = Given(id=f"{assigned.job:06d}-{self._times}", job=assigned.job, desk=self._hands.desk)
        self._out[given.id] = assigned
        return given

    def ended(self, trial_id: str, raw: Mapping[str, Any] | None) -> None:
        """`raw` is what the desk said, {} if there is none any more; None: the Trainable died."""
        assigned = self._out.pop(trial_id, None)
        if assigned is None or self.error is not None:
            return
        try:
            self._end(assigned, raw)
        except BaseException as error:
            self.error = error

    def _end(self, assigned: Assigned, raw: Mapping[str, Any] | None) -> None:
        if raw is None:
            self._deaths += 1
            if self._deaths >= DEATHS:
                hint = "`orc logs` and Ray's dashboard tell why its processes die; then `orc sweep resume`."
                raise ServiceUnavailable("Ray Tune", "the head node", f"{DEATHS} of its processes died.", hint)
            logger.warning("a process of Ray Tune died; another one waits for job %d, which goes on", assigned.job)
            self._again.append(assigned)
            return
        self._deaths = 0
        self._core.ended(assigned.job, self._hands.ending(assigned, raw))
        self._has_news = True
        self._turn()

    def is_finished(self) -> bool:
        """Whether this Tuner gets no further job."""
        if self.error is not None:
            return True
        if self._again:
            return False
        return self._given >= self._most or (not self._out and self._is_over())

    def _is_over(self) -> bool:
        try:
            return self._core.is_over()
        except BaseException as error:
            self.error = error
            return True

    def turn(self) -> None:
        """Once per step of Tune. Raises what went wrong."""
        if self.error is None and time.monotonic() - self._turned_at >= TURN:
            self._turn()
        if self.error is not None:
            raise self.error

    def _turn(self) -> None:
        self._turned_at = time.monotonic()
        self._has_news = True
        if self._on_turn is not None:
            self._on_turn()

    def lost(self) -> None:
        """What Tune still had when it went: nobody waits for it any more, so the next Tuner does."""
        self._again += self._out.values()
        self._out.clear()


def prepare() -> None:
    """Loads Ray Tune and Ray Train, with Tune told to be quiet. Call it before another thread uses them: their modules
    import each other, and two threads that begin at different ends break both."""
    os.environ.update(ENVIRONMENT)
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # what it would say of a dead process we say ourselves
    for module in ("ray.train.torch", "ray.tune", "orchestrator.execution.bridge"):
        importlib.import_module(module)


def run(
    core: Jobs,
    hands: Hands,
    *,
    name: str,
    directory: Path,
    on_turn: Callable[[], None] | None = None,
    most: int = JOBS_PER_TUNER,
) -> None:
    """Returns when the core is over. `name` is unique among Tuners of the cluster, `directory` is for Tune's own files,
    which are removed; `on_turn` is called a few times a second and after every job's end. Raises what the core, the
    hands and `on_turn` raise, and what the cluster does."""
    prepare()
    os.environ["TUNE_MAX_PENDING_TRIALS_PG"] = str(max(hands.size, 1))  # else lanes would fill one after the other
    exchange = Exchange(core, hands, on_turn=on_turn, most=most)
    number = 0
    while not core.is_over():
        exchange.renew()
        _tune(exchange, f"{name}-{number}", directory)
        number += 1


def _tune(exchange: Exchange, name: str, directory: Path) -> None:
    """One Tuner, until the exchange is finished with it."""
    from ray import tune

    from orchestrator.execution.bridge import LaneTrainable, Quiet, SweepSearch

    trainable = f"orc-{name}"
    search = SweepSearch(exchange, trainable)
    tune.register_trainable(trainable, LaneTrainable)
    tuner = tune.Tuner(
        trainable,
        tune_config=tune.TuneConfig(search_alg=search, scheduler=Quiet(exchange), reuse_actors=True),
        run_config=tune.RunConfig(
            name=name,
            storage_path=str(directory),
            verbose=0,
            failure_config=tune.FailureConfig(max_failures=0),
            # Tuner turns saving at the end on for class Trainables that say nothing.
            checkpoint_config=tune.CheckpointConfig(checkpoint_frequency=0, checkpoint_at_end=False),
        ),
    )
    try:
        tuner.fit()
    except Exception:
        if exchange.error is None:
            raise
    finally:
        exchange.lost()
        for place in (str(directory / name), search.staging):
            if place:
                shutil.rmtree(place, ignore_errors=True)
    if exchange.error is not None:
        raise exchange.error
