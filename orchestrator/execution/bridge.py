"""Ray Tune's side of a sweep: its trials are our jobs, its searcher asks our core, its Trainables wait at the desk.

Tune executes and decides nothing. One Tune trial is one job, a stretch of one of our trials up to its next milestone,
and one call of `train()`: what Tune would keep for itself (schedulers, checkpoints, pauses, files) would not survive a
restart, so nothing of it is used. No object of ours is pickled into Tune's files: they would hold the user's secrets.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any, Protocol

from ray.tune import CheckpointConfig, PlacementGroupFactory, Trainable
from ray.tune.experiment import Trial
from ray.tune.schedulers import FIFOScheduler
from ray.tune.search.search_algorithm import SearchAlgorithm

from orchestrator.execution import handles

SLOT = PlacementGroupFactory([{"node:__internal_head__": 0.001}])
"""Of a Trainable: only the head has this resource, and a thousand fit. It takes no CPU, so that it starts on a full
cluster, where its lane holds all of them; a request for no resource at all is refused by Tune."""


class Given(Protocol):
    """A job for a Trainable; `tuner.Given`."""

    @property
    def id(self) -> str: ...
    @property
    def job(self) -> int: ...
    @property
    def desk(self) -> str: ...


class Exchange(Protocol):
    """What Tune's thread may ask of ours; `tuner.Exchange`. None of these raises but `turn`."""

    def next(self) -> Given | None: ...
    def ended(self, trial_id: str, raw: Mapping[str, Any] | None) -> None: ...
    def is_finished(self) -> bool: ...
    def turn(self) -> None: ...


class SweepSearch(SearchAlgorithm):
    """Asks the exchange for the next job, and tells it how one ended."""

    def __init__(self, exchange: Exchange | None = None, trainable: str = "") -> None:
        self._exchange, self._trainable = exchange, trainable
        self._storage: Any = None

    def __reduce__(self) -> tuple[Any, ...]:
        # `Tuner` writes its searcher into a file, which nobody reads: an empty one does.
        return SweepSearch, ()

    def add_configurations(self, experiments: Any) -> None:
        (experiment,) = experiments if isinstance(experiments, list) else [experiments]
        self._storage = experiment.storage

    @property
    def staging(self) -> str:
        """The directory of this Tuner alone in Ray's session, with one for each of its trials; "" before it began."""
        return os.path.dirname(self._storage.experiment_driver_staging_path) if self._storage else ""

    def next_trial(self) -> Trial | None:
        given = self._exchange.next() if self._exchange else None
        if given is None:
            return None
        return Trial(
            self._trainable,
            config={"job": given.job, "desk": given.desk},  # Tune writes it into files: ids and nothing else
            trial_id=given.id,
            experiment_tag=given.id,
            storage=self._storage,
            placement_group_factory=SLOT,
            checkpoint_config=CheckpointConfig(checkpoint_frequency=0, checkpoint_at_end=False),
        )

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        if self._exchange is None:
            return
        said = (result or {}).get("ending")
        self._exchange.ended(trial_id, None if error or said is None else json.loads(said))

    def is_finished(self) -> bool:
        return self._exchange is None or self._exchange.is_finished()


class Quiet(FIFOScheduler):
    """Lets Tune start what is pending in the order in which it came: FIFOScheduler walks all trials twice per step."""

    def __init__(self, exchange: Exchange | None = None) -> None:
        super().__init__()
        self._exchange = exchange

    def __reduce__(self) -> tuple[Any, ...]:
        return Quiet, ()

    def choose_trial_to_run(self, tune_controller: Any) -> None:
        # Tune asks this once per step and lets what is raised here through: the only way to end `fit` at once.
        if self._exchange is not None:
            self._exchange.turn()


class LaneTrainable(Trainable):
    """Waits at the desk until a lane has run its job. Killed, it is started anew and waits for the same job: the lane
    works on meanwhile."""

    def setup(self, config: dict[str, Any]) -> None:
        self._job, self._desk = config["job"], config["desk"]

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self.setup(new_config)
        return True

    def step(self) -> dict[str, Any]:
        try:
            ending = handles.RemoteDesk(self._desk).run(self._job)
        except ConnectionError:  # the desk is gone: the pool, not Tune, knows what became of the job
            ending = {}
        # As text: Tune joins the keys of nested dicts with a slash, and names of metrics hold slashes.
        return {"done": True, "ending": json.dumps(ending)}

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        raise RuntimeError("a job of a sweep keeps its checkpoints itself; Tune must not ask for one")

    def load_checkpoint(self, checkpoint: Any) -> None:
        raise RuntimeError("a job of a sweep loads its checkpoints itself; Tune must not give it one")
