"""One line in a script of your own for Ray Train or Ray Tune, and what it reports becomes runs.

    RunConfig(callbacks=[orchestrator.TrainCallback(experiment="digits")])
    RunConfig(callbacks=[orchestrator.TuneCallback(experiment="digits")])

Ray calls these methods in its controller and in its loop: they put what they hear into a queue (see scribe.py), raise
nothing and wait for nothing. The tracker is the stack's where Ray is the stack's, else the local one.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import re
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import ray
from ray.train.v2._internal.execution.callback import ControllerCallback, ReportCallback, WorkerGroupCallback
from ray.tune import Callback
from ray.tune.result import AUTO_RESULT_KEYS, DEBUG_METRICS, TRAINING_ITERATION

from orchestrator.account import user_name
from orchestrator.config import config_hash, flatten, redact, redact_text
from orchestrator.errors import ServiceUnavailable
from orchestrator.execution.place import Tracker
from orchestrator.execution.scribe import Open, Over, Points, Said, Scribe
from orchestrator.failures.classify import Evidence, first_cause
from orchestrator.records import Fact, FactKind, RunSpec, RunStatus
from orchestrator.stack import Stack, default_home
from orchestrator.store.names import run_id, trial_run_id
from orchestrator.tracking.local.client import LocalTracker
from orchestrator.tracking.local.stack_start import running_stack

logger = logging.getLogger(__name__)

LAST_WORDS = 5.0
"""Seconds at the very end, when nothing waits for us any more, for what is told to reach the spool."""
SWEEP = "sweep"
_NOT_METRICS = frozenset(
    {*AUTO_RESULT_KEYS, *DEBUG_METRICS, "done", "trial_id", "experiment_tag", "checkpoint_dir_name"}
)

_COLOUR = re.compile(r"\x1b\[[\d;]*m")

Hook = TypeVar("Hook", bound=Callable[..., Any])


def _quietly(hook: Hook) -> Hook:
    """An exception in a callback would end the user's training."""

    @functools.wraps(hook)
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            return hook(*args, **kwargs)
        except Exception:
            logger.exception("%s failed; the training goes on", hook.__qualname__)
            return None

    return call  # type: ignore[return-value]


class TrainCallback(ControllerCallback, ReportCallback, WorkerGroupCallback):
    """For a TorchTrainer (Train V2) of your own: what each rank gives to `ray.train.report` becomes points.

    `params` defaults to the trainer's `train_loop_config`. The step is the number of the report, or what the metric
    named `step` says. Lives in Ray's controller; made in your script, so it is small and plain until training starts.
    """

    def __init__(
        self,
        *,
        experiment: str = "default",
        name: str = "",
        params: Mapping[str, Any] | None = None,
        tags: Mapping[str, str] | None = None,
        project: str = "default",
        step: str = "",
        home: str | os.PathLike[str] | None = None,
    ) -> None:
        self._spec = _spec(experiment, project, name, tags)
        self._params, self._step_key = params, step
        self._home = Path(home or default_home())
        self._reports = 0
        self._failures: dict[tuple[int, str], Evidence] = {}
        self._scribe: Scribe | None = None

    @_quietly
    def after_controller_start(self, train_run_context: Any) -> None:
        given = self._params if self._params is not None else train_run_context.train_loop_config
        config = _plain(given or {})
        workers = train_run_context.scaling_config.num_workers
        spec = _with_config(self._spec, config, workers if isinstance(workers, int) else max(workers))
        self._scribe = Scribe(functools.partial(tracker_here, self._home))
        self._tell(Open(key="run", spec=_stored(spec, self._home, run_id(time.time()))))

    @_quietly
    def after_report(self, training_report: Any, metrics: Sequence[Mapping[str, Any] | None]) -> None:
        self._reports += 1
        for rank, reported in enumerate(metrics):
            values = numbers(reported or {})
            step = int(values.get(self._step_key, self._reports))
            if values:
                self._tell(Points(key="run", rank=rank, step=step, values=values))
        checkpoint = getattr(training_report, "checkpoint", None)
        if checkpoint is not None:
            self._event("ray-checkpoint", f"Ray Train keeps a checkpoint in {checkpoint.path}", "info")

    @_quietly
    def after_worker_group_poll_status(self, worker_group_status: Any) -> None:
        for rank, error in (worker_group_status.errors or {}).items():
            evidence = _evidence(rank, error)
            if (rank, evidence.message) not in self._failures:
                self._failures[rank, evidence.message] = evidence
                self._event("exception", f"rank {rank}: {evidence.type}: {evidence.message}"[:2000], "error")

    @_quietly
    def after_controller_finish(self, result: Any) -> None:
        if result.error is None:
            self._end(RunStatus.finished)
            return
        finding = first_cause(list(self._failures.values()) or [_evidence(-1, result.error)])
        self._end(finding.status, finding.reason, finding.error())

    @_quietly
    def before_controller_abort(self) -> None:
        self._end(RunStatus.cancelled, "aborted")

    def _end(self, status: RunStatus, reason: str = "", error: Mapping[str, Any] | None = None) -> None:
        self._tell(Over(key="run", status=status, reason=reason, error=error))
        if self._scribe is not None:
            self._scribe.drain(LAST_WORDS)

    def _event(self, kind: str, message: str, level: str) -> None:
        data = {"kind": kind, "message": message, "level": level, "details": {}}
        self._tell(Said(key="run", fact=Fact(kind=FactKind.event, at=time.time(), data=data)))

    def _tell(self, message: Any) -> None:
        if self._scribe is not None:
            self._scribe.tell(message)


class TuneCallback(Callback):
    """For a Tuner of your own: each trial becomes a run, all of them children of one run for the sweep.

    Ids of runs follow from the sweep's and the trial's, and the sweep's is chosen here: a `Tuner.restore` finds the
    same runs again and goes on with them as their next attempts.
    """

    def __init__(
        self,
        *,
        experiment: str = "default",
        name: str = "",
        tags: Mapping[str, str] | None = None,
        project: str = "default",
        home: str | os.PathLike[str] | None = None,
    ) -> None:
        self._spec = _spec(experiment, project, name, tags)
        self._home = Path(home or default_home())
        self._id = run_id(time.time())
        self._attempts: dict[str, list[Any]] = {}
        """[run, attempt] by key, as far as an earlier process told."""
        self._running: set[str] = set()
        self._failed: set[str] = set()
        self._scribe: Scribe | None = None

    @_quietly
    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._begin_sweep(trials)
        if trial.trial_id in self._running:
            return  # it was paused
        spec = _with_config(self._spec, _plain(trial.config), 1)
        given = f"{self._spec.name}/" if self._spec.name else ""
        self._begin(trial.trial_id, replace(spec, name=f"{given}{trial}"), trial_run_id(self._id, trial.trial_id))

    @_quietly
    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        values = {key: value for key, value in numbers(result).items() if key.split("/")[0] not in _NOT_METRICS}
        values = {key: value for key, value in values.items() if not key.startswith("config/")}
        if values:
            step = int(result.get(TRAINING_ITERATION, 0))
            self._tell(Points(key=trial.trial_id, rank=0, step=step, values=values))

    @_quietly
    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._end(trial.trial_id, RunStatus.finished)

    @_quietly
    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """It failed and will be started again: as the run's next attempt."""
        self._fail(trial)

    @_quietly
    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._failed.add(trial.trial_id)
        self._fail(trial)

    @_quietly
    def on_experiment_end(self, trials: list[Any], **info: Any) -> None:
        undone = [trial for trial in trials if not trial.is_finished()]
        for key in list(self._running - {SWEEP}):
            self._end(key, RunStatus.cancelled, "the sweep ended before it")
        failed = f"{len(self._failed)} of {len(trials)} trials failed" if self._failed else ""
        if undone:
            self._end(SWEEP, RunStatus.cancelled, f"{len(undone)} of {len(trials)} trials were not done")
        else:
            self._end(SWEEP, RunStatus.finished, failed)
        if self._scribe is not None:
            self._scribe.drain(LAST_WORDS)

    def get_state(self) -> dict[str, Any]:
        known = {key: [ticket.run, ticket.attempt] for key, ticket in self._tickets().items()}
        return {"id": self._id, "attempts": {**self._attempts, **known}, "failed": sorted(self._failed)}

    def set_state(self, state: dict[str, Any]) -> None:
        self._id, self._attempts = state["id"], dict(state["attempts"])
        self._failed = set(state["failed"])

    def __getstate__(self) -> dict[str, Any]:
        """A Tuner stores its callbacks. The thread stays; who comes back goes on with the attempts."""
        return {**self.__dict__, "_scribe": None, "_running": set(), "_attempts": self.get_state()["attempts"]}

    def _begin_sweep(self, trials: Sequence[Any]) -> None:
        if self._scribe is None:
            self._scribe = Scribe(functools.partial(tracker_here, self._home))
        if SWEEP not in self._running:
            spec = _with_config(self._spec, {}, 1)
            self._begin(SWEEP, replace(spec, name=self._spec.name or f"sweep-{self._id}"), self._id)

    def _begin(self, key: str, spec: RunSpec, own_id: str) -> None:
        self._running.add(key)
        ticket, told = self._tickets().get(key), self._attempts.get(key)
        run, attempt = (ticket.run, ticket.attempt) if ticket else (told or ("", 0))
        spec = _stored(spec, self._home, own_id, run=run, after_attempt=attempt)
        self._tell(Open(key=key, spec=spec, parent="" if key == SWEEP else SWEEP))

    def _fail(self, trial: Any) -> None:
        finding = first_cause([trial_evidence(_last_error(trial))])
        self._end(trial.trial_id, finding.status, finding.reason, finding.error())

    def _end(self, key: str, status: RunStatus, reason: str = "", error: Mapping[str, Any] | None = None) -> None:
        if key in self._running:
            self._running.discard(key)
            self._tell(Over(key=key, status=status, reason=reason, error=error))

    def _tickets(self) -> dict[str, Any]:
        return dict(self._scribe.tickets) if self._scribe is not None else {}

    def _tell(self, message: Any) -> None:
        if self._scribe is not None:
            self._scribe.tell(message)


def tracker_here(home: Path) -> Tracker:
    """The tracker of the cluster to which this process is connected; where that is not the stack's, the local one.

    Raises ServiceUnavailable when the stack's own tracker does not answer now.
    """
    if ray.is_initialized():
        from orchestrator.execution import handles

        try:
            return handles.tracker(ray.get_runtime_context().gcs_address)
        except ServiceUnavailable:
            stack = Stack.find(home)
            if stack is not None and stack.ray_address == ray.get_runtime_context().gcs_address:
                raise
    local = LocalTracker(running_stack(home))
    local.ensure()
    return local


def trial_evidence(text: str) -> Evidence:
    """What Tune wrote about the last failure of a trial: a traceback, or what Ray says of an actor that is gone."""
    text = redact_text(_COLOUR.sub("", text)).strip()
    if 'File "' not in text:
        return Evidence(rank=0, type="RayActorError", message=text or "it failed", at=time.time())
    kind, _, message = text.splitlines()[-1].strip().partition(": ")
    return Evidence(rank=0, type=kind, message=message, traceback=text, at=time.time())


def _last_error(trial: Any) -> str:
    """Of the file that Tune appends each failure to."""
    try:
        text = Path(trial.error_file or "").read_text()
    except OSError:
        return ""
    return re.split(r"^Failure # .*$", text, flags=re.MULTILINE)[-1]


def numbers(values: Mapping[str, Any]) -> dict[str, float]:
    """What of a report is a number; nested names become `a/b`."""
    found: dict[str, float] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            found |= {f"{key}/{inner}": number for inner, number in numbers(value).items()}
            continue
        if hasattr(value, "item") and getattr(value, "size", None) in (1, None):
            value = value.item()
        if isinstance(value, bool | int | float):
            found[str(key)] = float(value)
    return found


def _spec(experiment: str, project: str, name: str, tags: Mapping[str, str] | None) -> RunSpec:
    shown = {str(key): str(value) for key, value in (tags or {}).items()}
    return RunSpec(experiment=experiment, project=project, name=name, tags=shown, user=user_name())


def _with_config(spec: RunSpec, config: Mapping[str, Any], workers: int) -> RunSpec:
    shown = redact(config)
    return replace(spec, params=flatten(shown), config=shown, workers=workers)


def _stored(spec: RunSpec, home: Path, new_run: str, *, run: str = "", after_attempt: int = 0) -> RunSpec:
    stack = Stack.find(home)
    storage = stack.storage_url if stack is not None and stack.storage_url else str(home / "runs")
    # The hash says which run may be continued: for a trial, whose config may change on the way, that is its id.
    identity = config_hash({"run": new_run})
    return replace(
        spec, run=run, after_attempt=after_attempt, new_run="" if run else new_run, storage_url=storage,
        config_hash=identity,
    )  # fmt: skip


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps({str(key): value for key, value in values.items()}, default=str))


def _evidence(rank: int, error: BaseException) -> Evidence:
    cause = getattr(error, "cause", None) or error.__cause__ or error
    text = "".join(traceback.format_exception(error)) if not isinstance(error, ray.exceptions.RayActorError) else ""
    message = redact_text(str(cause).strip().splitlines()[-1] if str(cause).strip() else "")
    return Evidence(rank=rank, type=type(cause).__name__, message=message, traceback=redact_text(text), at=time.time())
