"""The `run` object that a train function gets."""

from __future__ import annotations

import hashlib
import io
import json
import logging
import math
import mimetypes
import os
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from orchestrator.backends.storage import Storage
from orchestrator.checkpoints.clone import is_clone
from orchestrator.checkpoints.engine import CheckpointEngine, NotWorthSaving, SaveFailed, TooLarge
from orchestrator.checkpoints.manifest import CheckpointInfo, CheckpointState
from orchestrator.checkpoints.policy import CheckpointPolicy
from orchestrator.checkpoints.reader import Stored
from orchestrator.checkpoints.staging import Stager
from orchestrator.checkpoints.state import TrainState
from orchestrator.checkpoints.triggers import FULL, Moment, improved, reasons_to_save
from orchestrator.clock import Clock, SystemClock
from orchestrator.errors import BadMetric, CheckpointError, RunFailed, UserError
from orchestrator.failures.rules import kind_named
from orchestrator.provenance import datasets
from orchestrator.provenance.fingerprint import data as data_fingerprint
from orchestrator.records import Fact, FactKind, RunTicket
from orchestrator.tracking.circuits import News
from orchestrator.training import rates, seeds
from orchestrator.training.gradients import are_numbers
from orchestrator.training.group import Group, Value
from orchestrator.training.guards import Diverged, Finding
from orchestrator.training.judging import Action, Judge, Report, Verdict
from orchestrator.training.loader import LeftOut, ShardedLoader, between
from orchestrator.training.pace import (
    ALIVE_METRICS,
    CHECKPOINT_METRICS,
    METRICS,
    MICRO_BATCH_METRICS,
    SIGNS,
    Pace,
    Signs,
    memory_now,
    peak_memory,
)
from orchestrator.training.pointers import Pointers
from orchestrator.training.recorder import Recorder
from orchestrator.training.steps import OptimizerSteps
from orchestrator.training.storage_watch import StorageWatch
from orchestrator.training.watching import Place, Watch, Watching, Wrong

logger = logging.getLogger(__name__)

_SETTLE = 5.0
"""Seconds that a rank which ends by an exception waits to hear of what it had handed over."""


class RunStopped(BaseException):
    """The run was asked to stop (`orc cancel`, `ray job stop`). Raised by `run.report` on all ranks, after saving.

    No Exception, so that an `except Exception` in a training loop does not swallow it.
    """

    def __init__(self, run: str, step: int) -> None:
        super().__init__(run, step)
        self.run, self.step = run, step

    def __str__(self) -> str:
        return f"Run {self.run} was asked to stop at step {self.step}."


class RunPaused(RunStopped):
    """The run has reached the milestone up to which it was to train, and is saved: another attempt may go on."""

    def __str__(self) -> str:
        return f"Run {self.run} waits at its milestone, at step {self.step}."


class RunEnded(RunStopped):
    """The run was ended early, see judging.py. Raised only where the train function does not use `run.epochs`, which
    else gives no further epoch."""

    def __str__(self) -> str:
        return f"Run {self.run} was ended early at step {self.step}."


PERIODIC = ("every_steps", "every_epochs", "every_minutes", FULL)
"""Reasons to save that come again: where there is no room, such a checkpoint is skipped."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """What happens at a report."""

    reasons: tuple[str, ...] = ()
    """To save; empty for none."""
    is_best: bool = False
    stop: bool = False
    best: str | None = None
    """The best value of the policy's metric so far."""
    announced: str = ""
    """What the engine needs to know of the save on all ranks."""
    pointer: str = ""
    """What the launcher's `pointers` shall be given on all ranks."""
    action: Action = Action.go
    """What the judge says; a wish to stop goes before it."""
    why: str = ""
    wrong: str = ""
    """Why the attempt is to fail; goes before the judge."""
    good: int = -1
    """With `wrong`: the last step at which rank 0 knows that all was well. Else the one that no guard can find fault
    with any more; -1 where none ends the attempt."""

    @property
    def must(self) -> bool:
        return any(reason not in PERIODIC for reason in self.reasons)

    @property
    def leaves(self) -> bool:
        """Whether nothing follows that could save what this report was not given."""
        return self.stop or self.action is Action.pause

    def to_json(self) -> str:
        return json.dumps(
            (self.reasons, self.is_best, self.stop, self.best, self.announced, self.pointer, self.action, self.why,
             self.wrong, self.good)
        )  # fmt: skip

    @classmethod
    def from_json(cls, text: str) -> Decision:
        reasons, is_best, stop, best, announced, pointer, action, why, wrong, good = json.loads(text)
        return cls(
            reasons=tuple(reasons), is_best=is_best, stop=stop, best=best, announced=announced, pointer=pointer,
            action=Action(action), why=why, wrong=wrong, good=good,
        )  # fmt: skip


class Run:
    """One rank's view of its attempt of a run. Made by the launcher, given to `train(run, cfg)` on every DDP rank.

    Collective (all ranks call it together): `report`, `save`, `state` while resuming, `sum`, `mean`, `finish`, and
    `prepare` for models. Everything else is local. `log` and `event` record on the rank that calls them; `params`,
    `tags`, `note`, `metric`, `dataset`, `artifact` and `figure` count on rank 0 and do nothing on the others, so a
    train function needs no `if` around them. Making a Run seeds the process's random generators, unless told not to.
    """

    def __init__(
        self,
        ticket: RunTicket,
        recorder: Recorder,
        *,
        rank: int = 0,
        world_size: int = 1,
        local_rank: int = 0,
        seed: int = 0,
        seeds_generators: bool = True,
        checkpoints: CheckpointPolicy | None = None,
        stager: Stager | None = None,
        spool_directory: str = "",
        resume: bool = True,
        config_hash: str = "",
        device: torch.device | str | None = None,
        accumulation_steps: int = 1,
        splits: int = 1,
        shares: int = 1,
        perf: bool = False,
        pointers: Pointers | None = None,
        judge: Judge | None = None,
        watch: Watch | None = None,
        rollback: Mapping[str, Any] | None = None,
        is_new: bool = False,
        clock: Clock | None = None,
    ) -> None:
        """`resume` continues from the newest valid checkpoint in the ticket's directory, if there is one. `stager`
        takes checkpoints from training's hands; without one a save writes before it returns. `spool_directory`: where
        the record hears of a checkpoint that became durable after this process was gone. `perf` records how fast
        it goes; see pace.py. `pointers` hear of checkpoints; given on all ranks or on none, as is `judge`, which may
        pause or end the training; see judging.py. `splits`: into how many micro-batches each batch of a prepared
        training DataLoader is divided, so that `accumulation_steps` grows and the global batch stays. `shares`: of how
        many workers each one has the share of a global batch, for the same end. `watch`: what the
        guards watch for; see guards.py. `rollback`: what is done otherwise since an earlier attempt went wrong: `skip`,
        samples that are left out, `lr`, the factor of all learning rates, `until`, the step at which it was found.
        `is_new`: nothing can have been saved yet, so the storage is not asked and may be away."""
        self._pointers = pointers
        self._ticket, self._recorder, self._resume, self._config_hash = ticket, recorder, resume, config_hash
        self._is_new = is_new
        self._clock = clock or SystemClock()
        self._device = torch.device(device) if device is not None else _default_device(local_rank)
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)
        self._group = Group(rank, world_size)
        self._seed = seed
        self._accumulation_steps = accumulation_steps
        self._splits, self._micro_batch_told = splits, False
        self._policy = checkpoints or CheckpointPolicy()
        self._storage = Storage(ticket.directory)
        self._checkpoints = CheckpointEngine(
            self._storage.join("checkpoints"),
            run=ticket.run,
            attempt=ticket.attempt,
            group=self._group,
            policy=self._policy,
            clock=self._clock,
            diary=_Diary(self),
            stager=stager,
            seed=seed,
            config_hash=config_hash,
            spool_directory=spool_directory,
        )
        self._loaders: list[ShardedLoader] = []
        self._datasets: dict[str, dict[str, Any]] = {}
        self._state: TrainState | None = None
        self._generators: dict[str, Any] | None = None
        self._divided = 1
        self._shares = shares
        """Micro-batches that one batch of the user's is divided into."""
        self._step, self._logged = 0, False
        self._epoch, self._first_epoch = 0, 0
        self._micro_batch = 0
        self._best: float | None = None
        self._saved = Moment(time=self._clock.monotonic())
        self._durable = self._saved
        """Where the newest checkpoint is that surely exists; `_saved` may be one that is still being written."""
        self._staged: dict[str, Moment] = {}
        self._is_state_new = False
        self._optimizer_steps = OptimizerSteps()
        self._last_report: tuple[Any, ...] = ()
        """Where the training was then, see `_whereabouts`."""
        self._is_known_too_large = False
        self._skips_logged = 0
        self._pace = Pace(self._record_pace, peak_memory(self._device)) if perf else None
        self._explained: set[str] = set()
        self._alive_at, self._signs = self._clock.monotonic(), 0
        self._judge = judge
        self._rollback = dict(rollback or {})
        self._left_out: frozenset[LeftOut] = frozenset(map(_left_out, self._rollback.get("skip", ())))
        self._lr_factor = float(self._rollback.get("lr", 1.0))
        self._trains: tuple[Any, ...] = ()
        """What there are optimizers and schedulers among."""
        tell, memory = self._tell_finding, memory_now(self._device)
        if watch and self._rollback:
            watch = replace(watch, close_until=int(self._rollback.get("until", 0)))
        self._watching = Watching(watch, tell, memory, self._clock, self._where) if watch else None
        self._wrong: Wrong | None = None
        """On rank 0: why the attempt ends in this report."""
        self._storage_watch = StorageWatch(self._tell_news, self._clock) if rank == 0 else None
        self._verdict = Verdict(Action.go)
        """The judge's last word, on all ranks."""
        self._uses_epochs = self._ended_in_epochs = False
        if seeds_generators:
            seeds.seed_everything(seed, rank)

    def __repr__(self) -> str:
        where = f"rank {self.rank} of {self.world_size}, step {self._step}"
        return f"<Run {self.name} ({self.id}) attempt {self.attempt}, {where}>"

    # -- who and where -----------------------------------------------------------------------------------------------

    @property
    def id(self) -> str:
        return self._ticket.run

    @property
    def name(self) -> str:
        return self._ticket.name

    @property
    def attempt(self) -> int:
        """1, 2, 3 …; a restart is a new attempt of the same run."""
        return self._ticket.attempt

    @property
    def directory(self) -> str:
        """Where the run's checkpoints and artifacts are, a path or URL."""
        return self._ticket.directory

    @property
    def rank(self) -> int:
        return self._group.rank

    @property
    def world_size(self) -> int:
        return self._group.world_size

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0

    @property
    def device(self) -> torch.device:
        return self._device

    @property
    def step(self) -> int:
        """The step last logged: how often `log` was called without a step, or the highest step it was given. Restored
        on resume."""
        return self._step

    @property
    def epoch(self) -> int:
        """The epoch that `epochs` gave last, from 0."""
        return self._epoch

    @property
    def verdict(self) -> Verdict:
        """Whether the run's judge has paused or ended it; the same on all ranks."""
        return self._verdict

    def tally(self) -> dict[str, Any]:
        """`judging.Tally.to_json` of what the judge has counted; empty without one, and on other ranks than 0."""
        if self._judge is None or not self.is_main:
            return {}
        newest = self._checkpoints.newest()
        found = {} if newest is None else {
            "name": newest.id.rpartition("/")[2], "sha256": newest.manifest_sha256, "step": newest.step
        }  # fmt: skip
        return replace(self._judge.tally(), checkpoint=found).to_json()

    @property
    def should_stop(self) -> bool:
        """Whether this rank has heard that the run shall stop. Ranks hear it at different times: to stop together,
        call `report`."""
        return self._recorder.stop_requested()

    @property
    def has_state(self) -> bool:
        """Whether `state` has been called: there is something to save."""
        return self._state is not None

    # -- metrics -----------------------------------------------------------------------------------------------------

    def log(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Records numbers of this rank; a memory write. Without `step` each call is the next step: 1, 2, 3 …

        Values: Python and numpy numbers, bools, 0-d tensors, NaN and ±inf. Raises BadMetric naming the key.
        """
        if step is None:
            self._step = step = self._step + 1
            if self._pace is not None:
                self._pace.logged()
        elif step > self._step:
            self._step = step
            if self._pace is not None:
                self._pace.logged()
        self._logged = True
        self._recorder.log(metrics, step)

    def report(
        self, metrics: Mapping[str, Any] | None = None, state: TrainState | None = None, *, best: bool = False
    ) -> CheckpointInfo | None:
        """Collective. Records the metrics at the current step; saves `state` if a checkpoint is due (always, with
        `best`).

        Without a `log` since the last one that had metrics, it is a step of its own. Rank 0's metrics, clock and stop
        request decide for all. Gives the checkpoint, if one was saved. A save that fails is an event, and training
        goes on. Raises RunStopped; RunPaused and RunEnded where the run has a judge.
        """
        self._hear_of_saves()
        metrics = metrics or {}
        if metrics:
            self._step += not self._logged
            if self._pace is not None and not self._logged:
                self._pace.logged()
            self._logged = False
            self._recorder.log(metrics, self._step)
        numbers = {key: _number(key, value) for key, value in metrics.items()}
        if state is not None and self._is_state_new:
            self._is_state_new = False
            self._checkpoints.expect(state)  # again: most optimizers have no state before their first step
        decision = self._decide(numbers, state is not None, best)
        if decision.good >= 0:
            self._checkpoints.vouch(decision.good)
        info = None
        if decision.reasons:
            state = self._state if state is None and decision.leaves else state
            if state is None:
                raise UserError(
                    f"rank 0 called run.report with a state, rank {self.rank} without: give it on every rank."
                )
            info = self._save_or_tell(state, numbers, decision)
        if decision.wrong:
            raise self._diverged(decision)
        if decision.stop or decision.action is not Action.go:
            self._obey(decision)
        if self._state is not None and self._policy.on_exception:
            self._last_report = self._whereabouts()
        return info

    def alive(self) -> None:
        """Says that this rank gets on, in a long phase without `log`, `report` or a prepared DataLoader; else it counts
        as hanging one day (`failures.hang`). Call it as often as you like: it records at most every five seconds."""
        now = self._clock.monotonic()
        if now - self._alive_at >= SIGNS:
            self._alive_at = now
            self._signs += 1
            self._explain(ALIVE_METRICS)
            self._recorder.log({"perf/alive": float(self._signs)}, self._step)

    def sum(self, value: Value) -> Value:
        """Collective. The sum of a number or tensor over all ranks."""
        return self._group.sum(value)

    def mean(self, value: Value) -> Value:
        """Collective. The mean of a number or tensor over all ranks. Example: loss = run.mean(loss.item())."""
        return self._group.mean(value)

    # -- preparing ---------------------------------------------------------------------------------------------------

    def prepare(self, *objects: Any, even: bool = True) -> Any:
        """Models go to the device and become DistributedDataParallel; DataLoaders give each rank its share; the rest
        stays.

        Gives one object, or a tuple. `batch_size` stays what each worker uses: two workers make twice the global
        batch. The order of samples depends on the run's seed (on the DataLoader's generator, if it has one) and the
        epoch. `even` makes all ranks do the same number of batches by repeating a few samples; for an evaluation in
        which each sample counts once, say `even=False`. A model without trainable parameters only gets rank 0's
        values.
        """
        prepared = tuple(self._prepared(thing, even) for thing in objects)
        return prepared[0] if len(prepared) == 1 else prepared

    @contextmanager
    def accumulate(self, *models: torch.nn.Module) -> Iterator[bool]:
        """Around forward and backward of one micro-batch. Gives True when this one completes an optimizer step.

        Gradients are exchanged between ranks only then. Divide the loss by `run.accumulation_steps`, so that the sum
        of the micro-batches' gradients is the mean; call `optimizer.step()` and `zero_grad()` only when it gave True.
        The last batch of a prepared DataLoader always completes a step. With `accumulation_steps` 1 each batch does,
        and nothing changes:

            with run.accumulate(model) as is_complete:
                (loss_of(model, batch) / run.accumulation_steps).backward()
            if is_complete:
                optimizer.step()
                optimizer.zero_grad()
        """
        if not self._micro_batch_told:
            self._tell_micro_batch()
        self._micro_batch += 1
        ends = any(loader.is_last_batch for loader in self._loaders)
        is_complete = ends or self._micro_batch >= self.accumulation_steps
        if is_complete:
            self._micro_batch = 0
        with ExitStack() as stack:
            for model in models:
                if not is_complete and isinstance(model, DistributedDataParallel):
                    stack.enter_context(model.no_sync())
            yield is_complete

    @property
    def accumulation_steps(self) -> int:
        """Micro-batches per optimizer step; see `accumulate`. What is set is multiplied by the parts into which a batch
        had to be divided, so it is known once the training DataLoader is prepared."""
        return self._accumulation_steps * self._divided * self._shares

    @accumulation_steps.setter
    def accumulation_steps(self, count: int) -> None:
        self._accumulation_steps = count

    def _tell_micro_batch(self) -> None:
        """So that the driver knows what could be halved."""
        for loader in self._loaders:
            if loader.is_active and loader.can_split and loader.batch_size is not None:
                self._micro_batch_told = True
                self._explain(MICRO_BATCH_METRICS)
                self._recorder.log({"perf/micro_batch": float(loader.batch_size)}, self._step)
                return

    @property
    def lr_factor(self) -> float:
        """By what the learning rates are multiplied because the training went wrong before: 1 if it did not. Optimizers
        and schedulers that `run.state` was given have it in them; who sets rates by hand multiplies by it."""
        return self._lr_factor

    def epochs(self, count: int) -> Iterator[int]:
        """0, 1, … count-1; after a resume only those that are left, the interrupted one first.

        An epoch is over when the loops over its prepared DataLoaders are: a checkpoint saved inside such a loop
        continues there, one saved after it (or without any) continues with the next epoch. Call `run.state` before.
        None is left for a run that was ended early (`stopping`, a sweep).
        """
        self._uses_epochs = True
        for epoch in range(self._first_epoch, count):
            if self._verdict.action is Action.end:
                return
            self._epoch = epoch
            for loader in self._loaders:
                loader.set_epoch(epoch)
            if self._generators is not None:
                # Again: what the train function drew between `state` and here would make the continuation differ.
                seeds.restore(self._generators)
                self._generators = None
            yield epoch
            self._first_epoch = epoch + 1

    # -- checkpoints -------------------------------------------------------------------------------------------------

    def state(
        self,
        *,
        model: Any = None,
        optimizer: Any = None,
        scheduler: Any = None,
        scaler: Any = None,
        loader: Any = None,
        extra: Mapping[str, Any] | None = None,
        files: Mapping[str, bytes] | None = None,
        **more: Any,
    ) -> TrainState:
        """What `report` and `save` shall store; see TrainState. Collective while resuming: restores at once from the
        newest valid checkpoint, random generators, step and epoch included. Raises CheckpointMismatch when that one
        belongs to other code. Without `loader` the shuffled DataLoader that was prepared is taken, if it is the only
        one. Example: state = run.state(model=model, optimizer=optimizer, extra={"best": 0.0},
        files={"vocabulary.json": data}).
        """
        state = TrainState(
            model=model, optimizer=optimizer, scheduler=scheduler, scaler=scaler, loader=loader, extra=extra,
            files=files, **more,
        )  # fmt: skip
        shuffled = [each for each in self._loaders if each.is_shuffled]
        if loader is None and len(shuffled) == 1:
            state.loader = shuffled[0]
        self._state = state
        self._trains = (optimizer, scheduler, *(extra or {}).values(), *more.values())
        self._optimizer_steps.watch(*self._trains)
        if self._watching is not None and self.is_main:
            self._watching.optimizers(*self._trains)
        stored = None
        if self._resume and not self._is_new:
            stored = self._checkpoints.restore(state, must_be_numbers=bool(self._rollback))
            if stored is not None:
                self._continue_from(stored, state)
        if stored is None:
            self._do_otherwise(applied=1.0)
        if self._watching is not None:
            self._watching.begins()
        self._checkpoints.expect(state)
        self._is_state_new = True
        if self._verdict.action is Action.pause:
            raise RunPaused(self.id, self._step)
        if self._verdict.action is Action.end and not self._ended_in_epochs:
            raise RunEnded(self.id, self._step)
        return state

    def save(
        self, state: TrainState, *, best: bool = False, wait: bool = True, weights_only: bool = False
    ) -> CheckpointInfo:
        """Collective. Saves now and waits until it is durable; without `wait` only until it is safe from what training
        does next. `weights_only` saves the model alone: such a checkpoint is for others, no run continues from it.
        Raises SaveFailed, or TooLarge, on all ranks if it could not be written."""
        reasons = ("best",) if best else ("now",)
        info = self._save(state, {}, is_best=best, reasons=reasons, waits=wait, weights_only=weights_only)
        assert info is not None  # only what need not be is skipped
        return info

    def rescue(self, error: BaseException | str) -> CheckpointInfo | None:
        """Saves the last good state when something went wrong: the launcher calls it when the train function raised,
        and whoever watches the training may, in words: `run.rescue("loss is nan")`. Never raises; an event says what
        was done.

        Nothing in it is collective, the other ranks may be dead: each saves its part, and there is a checkpoint once
        all ranks have done so at the same step. Without one, earlier checkpoints stay the newest. Gives None, with
        nothing saved, if nothing changed since the newest one, if parameters hold nan or inf, if an optimizer's step
        is under way, for what a guard found, and for exceptions with `checkpoints.on_exception` false.
        """
        is_exception = isinstance(error, BaseException)
        state, steps = self._state, self._optimizer_steps
        if state is None or (is_exception and not self._policy.on_exception) or isinstance(error, Diverged):
            return None
        try:
            self._checkpoints.await_own(_SETTLE)
            self._hear_of_saves()
            if (self._step, steps.count) == (self._saved.step, self._saved.optimizer_steps):
                return None
            if steps.is_inside:
                raise NotWorthSaving("an optimizer's step was under way")
            for loader in self._loaders:
                if isinstance(error, BaseException):
                    loader.reopen(error)
            info = self._rescued(state, "exception" if is_exception else "alarm")
        except Exception as failure:  # the error on its way is what counts
            self.event("checkpoint-not-rescued", str(failure) or type(failure).__name__, level="warning")
            return None
        what = "is saved" if info.state is CheckpointState.committed else "is a checkpoint once all ranks' parts are"
        why = error if isinstance(error, str) else type(error).__name__
        if self.is_main:
            self.event("checkpoint-rescued", f"after {why}: the state of step {info.step} {what}", uri=info.uri)
        return info

    def close(self) -> None:
        """Not collective, never raises; called by the launcher when the train function has ended, however it did. No
        further saves; what is handed over is still written."""
        try:
            self._hear_of_saves()
            self._checkpoints.close()
        except Exception:  # how the run ended is known already
            logger.exception("rank %d could not give back what it saved through", self.rank, extra={"run": self.id})

    def finish(self) -> None:
        """Collective; called by the launcher after the train function returned. Saves what is newer than the last
        checkpoint."""
        self._end_pace()
        if self._policy.best_metric and self._best is None and self._state is not None and self.is_main:
            what = f"checkpoints.best_metric is {self._policy.best_metric!r}, but run.report was never given it"
            self.event("best-metric-missing", what, level="warning")
        if self._judge is not None and self.is_main and (missing := self._judge.missing()):
            what = f"{', '.join(missing)} is to judge the run by, but run.report was never given it"
            self.event("objective-missing", what, level="warning")
        if self._state is None:
            return  # of all ranks: perhaps rank 0 alone records, so nothing collective
        self._await_saves()
        due = self._policy.at_end and self._step > self._durable.step
        ending = Decision(reasons=("end",) if due else ())
        if due and self.is_main and (wrong := self._spoilt()) is not None:
            self._wrong, ending = wrong, Decision(wrong=wrong.what, good=wrong.good)
        ending = Decision.from_json(self._group.share(ending.to_json()))
        if ending.wrong:
            raise self._diverged(ending)
        if ending.reasons:
            self._save_or_tell(self._state, {}, ending)
        if self._storage_watch is not None:
            self._storage_watch.end()
        if self._pointers:
            if pointer := self._group.share(self._pointers.due(is_last=True) if self.is_main else ""):
                self._pointers.put(pointer)
            self._pointers.close(_SETTLE)

    # -- record ------------------------------------------------------------------------------------------------------

    def params(self, values: Mapping[str, Any]) -> None:
        """Parameters of the run, searchable; nested ones become `optim.lr`. Values are JSON; others are written as
        their text."""
        for name, value in _flat(values):
            self._tell_once(FactKind.param, {"name": name, "value": _json(value)})

    def tags(self, values: Mapping[str, Any]) -> None:
        for name, value in values.items():
            self._tell_once(FactKind.tag, {"name": str(name), "value": str(value)})

    def note(self, text: str) -> None:
        self._tell_once(FactKind.note, {"text": text})

    def event(self, kind: str, message: str, *, level: str = "info", **details: Any) -> None:
        """Something that happened, on this rank. Example: run.event("lr-drop", "plateau for 5 epochs", lr=1e-4)."""
        if level not in ("debug", "info", "warning", "error"):
            raise UserError(f"run.event: level is {level!r}; it is debug, info, warning or error.")
        data = {"kind": kind, "message": message, "level": level, "step": self._step, "details": _json(details)}
        self._tell(FactKind.event, data)

    def fail(self, kind: str, message: str) -> NoReturn:
        """Ends the attempt as a failure of that kind, whose policy follows. Raises RunFailed on this rank; the others
        hear of it as of any exception. A kind of your own ends the run, unless `failures.limits` gives it a budget.
        Raises ConfigError for what is no name, or looks like a mistyped kind of ours. Example:
        run.fail("data_error", "shard 7 is empty")."""
        raise RunFailed(kind_named("run.fail", kind), message)

    def metric(self, name: str, *, unit: str = "", direction: str = "", reduction: str = "") -> None:
        """Says what a metric means: its unit, which `direction` is better (min, max), how ranks are reduced (mean,
        min, max, sum, last).

        Say it once; what is left out stays as it was said before. A key belongs to all runs: the latest declaration
        counts for all of them, and one that contradicts an earlier one is an event of this run.
        """
        _one_of("direction", direction, ("min", "max"))
        _one_of("reduction", reduction, ("mean", "min", "max", "sum", "last"))
        given = {"unit": unit, "direction": direction, "reduction": reduction}
        self._tell_once(FactKind.metric, {"name": name, **{key: value for key, value in given.items() if value}})
        if direction and self._judge is not None:
            self._judge.declared(name, direction)

    def dataset(
        self,
        name: str,
        *,
        fingerprint: str = "",
        uri: str = "",
        version: str = "",
        size: int | None = None,
        split: str = "",
        details: Mapping[str, Any] | None = None,
    ) -> None:
        """Declares data that the run uses; part of the run's fingerprint. `size` is the number of samples.

        `orchestrator.provenance.datasets.fingerprint` makes a fingerprint of files, arrays or tensors. The same name
        and split again replaces the earlier declaration. Example: run.dataset("cifar10", split="train",
        fingerprint=fingerprint("data/cifar/train"), size=50_000). Raises BadDataset.
        """
        key, values = datasets.declared(
            name, fingerprint=fingerprint, uri=uri, version=version, size=size, split=split, details=_json(details)
        )
        self._datasets[key] = values
        hashes = {"data": data_fingerprint(self._datasets)}
        self._tell_once(FactKind.provenance, {"datasets": {key: values}, "fingerprint": hashes})

    def artifact(self, source: str | os.PathLike[str] | bytes, name: str | None = None) -> str:
        """Copies a file (or bytes, which need a name) to the run's `artifacts/` and records size and SHA-256. Gives
        the URI.

        The same name again replaces the earlier one.
        """
        if name is None:
            if isinstance(source, bytes):
                raise UserError("run.artifact: bytes need a name, e.g. run.artifact(data, 'confusion.csv').")
            name = Path(source).name
        path = f"artifacts/{name}"
        uri = self._storage.uri(path)
        if not self.is_main:
            return uri
        size, digest = 0, hashlib.sha256()
        with _opened(source) as reader, self._storage.open_output(path) as output:
            while chunk := reader.read(1 << 20):
                output.write(chunk)
                digest.update(chunk)
                size += len(chunk)
        media_type = mimetypes.guess_type(name)[0] or "application/octet-stream"
        self._tell(
            FactKind.artifact,
            {"name": name, "uri": uri, "size_bytes": size, "sha256": digest.hexdigest(), "media_type": media_type,
             "step": self._step},
        )  # fmt: skip
        return uri

    def figure(self, name: str, figure: Any) -> str:
        """Stores a matplotlib figure (as PNG, unless the name ends in .svg or .pdf), or an image's bytes, as an
        artifact."""
        if isinstance(figure, bytes):
            return self.artifact(figure, name)
        if not hasattr(figure, "savefig"):
            kind = type(figure).__qualname__
            raise UserError(f"run.figure: {kind} is neither a matplotlib figure nor bytes of an image.")
        known = Path(name).suffix in (".png", ".svg", ".pdf")
        name = name if known else f"{name}.png"
        if not self.is_main:
            return self._storage.uri(f"artifacts/{name}")
        drawn = io.BytesIO()
        figure.savefig(drawn, format=Path(name).suffix[1:])
        return self.artifact(drawn.getvalue(), name)

    # -- inside ------------------------------------------------------------------------------------------------------

    def _pace_of(self, loader: ShardedLoader) -> Pace | Signs:
        """Of a pass that begins. An evaluation has no gradients, or is not shuffled where the training is: of that only
        signs of life are recorded."""
        is_training = loader.is_shuffled or not any(each.is_shuffled for each in self._loaders)
        return self._pace if self._pace is not None and is_training and torch.is_grad_enabled() else Signs(self.alive)

    def _record_pace(self, values: dict[str, float]) -> None:
        self._explain(METRICS)
        self._recorder.log(values, self._step)

    def _explain(self, metrics: Mapping[str, Mapping[str, str]]) -> None:
        """What metrics that are recorded unasked mean; told once each."""
        for name, meaning in metrics.items():
            if name not in self._explained:
                self._explained.add(name)
                self.metric(name, **meaning)

    def _end_pace(self) -> None:
        if self._pace is not None:
            self._pace.close()

    def _rescued(self, state: TrainState, reason: str) -> CheckpointInfo:
        now = self._whereabouts()
        loader_state = state.loader_state()
        info = self._checkpoints.rescue(
            state,
            step=self._step,
            optimizer_steps=self._optimizer_steps.count,
            epoch=self._epoch,
            epoch_complete=self._epoch_complete(),
            reasons=(reason,),
            progress={**self._progress(), "is_between_steps": now == self._last_report},
            rank_state={"generators": seeds.capture(), "loader": loader_state},
            data=_json(loader_state) if isinstance(state.loader, ShardedLoader) else {},
        )
        self._saved = self._moment({})
        if info.state is CheckpointState.staged:
            self._staged[info.id] = self._saved
        else:
            self._durable = self._saved
        return info

    def _whereabouts(self) -> tuple[Any, ...]:
        """What tells whether the training has done anything since: optimizer steps, loaders, random numbers."""
        return self._optimizer_steps.count, [loader.state_dict() for loader in self._loaders], seeds.drawn()

    def _progress(self) -> dict[str, Any]:
        progress: dict[str, Any] = {"best": _text(self._best), "micro_batch": self._micro_batch, "logged": self._logged}
        progress["splits"] = self._divided * self._shares
        if self._left_out:
            progress["left_out"] = sorted(self._left_out)
        if self._lr_factor != 1:
            progress["lr_factor"] = self._lr_factor
        if self._judge is not None and self.is_main:  # rank 0's is what is stored
            progress["judge"] = self._judge.state()
        return progress

    def _obey(self, decision: Decision) -> None:
        """At the end of a report that is the last one, or that the judge wants to be. Raises RunStopped."""
        if not decision.stop:
            self._verdict = Verdict(decision.action, decision.why)
            if decision.action is Action.end and self.is_main:
                self.event("stopped-early", decision.why)
            if decision.action is Action.end and self._uses_epochs:
                return
        self._await_saves()
        self._end_pace()
        if decision.stop:
            raise RunStopped(self.id, self._step)
        if decision.action is Action.end:
            raise RunEnded(self.id, self._step)
        raise RunPaused(self.id, self._step)

    def _decide(self, metrics: Mapping[str, float], has_state: bool, best: bool) -> Decision:
        """Rank 0's, on all ranks."""
        decision = Decision()
        if self.is_main:
            now = self._moment(metrics)
            stop = self._recorder.stop_requested()
            self._wrong = self._watching.reported(metrics, self._step) if self._watching is not None else None
            reasons = reasons_to_save(self._policy, now, self._saved) if has_state else ()
            reasons += ("best",) if best and has_state else ()
            reasons += ("stop",) if stop and (has_state or self._state is not None) and self._policy.on_stop else ()
            is_better = improved(self._policy, now)
            if is_better:
                self._best = metrics[self._policy.best_metric]
            action, why = Action.go, ""
            if self._judge is not None and metrics and self._verdict.action is not Action.end:
                can_save = has_state or self._state is not None
                action, why = self._judge.reported(
                    Report(metrics, self._step, now.epochs_done, self._uses_epochs, can_save)
                )
                reasons += ("rung",) if action is Action.pause and can_save else ()
            if reasons and self._wrong is None:
                self._wrong = self._spoilt()
            if self._wrong is not None:
                reasons, action = (), Action.go
            good = self._watching.vouched if self._watching is not None else -1
            wrong = "" if stop or self._wrong is None else self._wrong.what
            good = self._wrong.good if wrong and self._wrong is not None else good
            announced = self._checkpoints.announce(self._step) if reasons else ""
            decision = Decision(
                reasons=reasons, is_best=is_better or best, stop=stop, best=_text(self._best), announced=announced,
                pointer=self._pointers.due() if self._pointers else "", action=action, why=why, wrong=wrong,
                good=good,
            )  # fmt: skip
        elif self._watching is not None:
            self._watching.heard(metrics, self._step)
        decision = Decision.from_json(self._group.share(decision.to_json()))
        if decision.pointer and self._pointers:
            self._pointers.put(decision.pointer)
        self._best = None if decision.best is None else float(decision.best)
        return decision

    def _spoilt(self) -> Wrong | None:
        """What must not be saved, on rank 0: weights that are no numbers, whatever the last loss was."""
        watching = self._watching
        if watching is None or not watching.must_be_finite or are_numbers(*self._trains):
            return None
        return watching.spoilt("the weights are nan or infinite")

    def _diverged(self, decision: Decision) -> Diverged:
        """Collective. What all ranks raise, once nobody can go on any more from what was saved since all was well."""
        good, bad = self._watching.own if self._watching is not None else (decision.good, self._step)
        heard = [json.loads(text) for text in self._group.gather(json.dumps((min(good, decision.good), bad)))]
        good, bad = (min(column) for column in zip(*heard, strict=True))
        found = self._given_up(decision.wrong, good, bad) if self.is_main else {}
        found = json.loads(self._group.share(json.dumps(found)))
        return Diverged(decision.wrong, self._step, good, found)

    def _given_up(self, why: str, good: int, bad: int) -> dict[str, Any]:
        """On rank 0, where no rank vouches for more than step `good` and one has seen it at step `bad`: what another
        attempt needs to know; nothing if there shall be none that goes back."""
        self._checkpoints.await_own(_SETTLE)
        self._hear_of_saves()
        try:
            newest = self._checkpoints.spoil(good, f"{why} (step {self._step})")
        except (OSError, CheckpointError) as error:
            message = f"the storage could not be told that checkpoints after step {good} are no good: {error}"
            self.event("checkpoints-not-marked", message, level="error")
            return {}
        if self._wrong is None or self._watching is None or not self._wrong.is_rollback:
            return {}
        loader = self._ordered_loader()
        pass_size = loader.pass_size if loader is not None else None
        batches = between(*self._watching.window(self._wrong, good, bad), pass_size) if pass_size else []
        to = newest.step if newest is not None and self._state is not None and self._resume else None
        return {"rollback": {"to": to, "batches": batches, "until": self._step}}

    def _where(self) -> tuple[int, Place]:
        """The step, and the place in the data."""
        loader = self._ordered_loader()
        if loader is None:
            return self._step, ()
        position = loader.state_dict()
        return self._step, (position["epoch"], position["passes"], position["used"])

    def _ordered_loader(self) -> ShardedLoader | None:
        """The one that is trained on, if the order of its samples is ours to say."""
        loader = self._state.loader if self._state is not None else None
        return loader if isinstance(loader, ShardedLoader) and loader.pass_size is not None else None

    def _do_otherwise(self, *, applied: float) -> None:
        """Since the training went wrong: leaves samples out, and lowers the learning rates, by what of the factor is
        not `applied` in them yet."""
        if (loader := self._ordered_loader()) is not None and self._left_out:
            loader.leave_out(self._left_out)
        if self._lr_factor != applied:
            rates.cut(self._lr_factor / applied, *self._trains)
        if not self._rollback or not self.is_main:
            return
        self.event("rolled-back", f"goes on {_otherwise(self._left_out, self._lr_factor)}", **self._rollback)

    def _tell_finding(self, finding: Finding) -> None:
        self.event("guard", finding.what, level="warning", rule=finding.rule.value, key=finding.key)

    def _moment(self, metrics: Mapping[str, float]) -> Moment:
        done = self._epoch + self._epoch_complete()
        return Moment(
            step=self._step, epochs_done=done, time=self._clock.monotonic(), metrics=metrics, best=self._best,
            optimizer_steps=self._optimizer_steps.count,
        )  # fmt: skip

    def _epoch_complete(self) -> bool:
        """Whether no loop over training data is running; an unshuffled loader counts if it is part of the state."""
        trained_on = self._state.loader if self._state is not None else None
        return not any(loader.is_active and (loader.is_shuffled or loader is trained_on) for loader in self._loaders)

    def _save_or_tell(
        self, state: TrainState, metrics: Mapping[str, float], decision: Decision
    ) -> CheckpointInfo | None:
        """A save that nobody asked for by name: where it fails, an event says so and training goes on."""
        ends = decision.leaves or "end" in decision.reasons
        try:
            info = self._save(
                state, metrics, is_best=decision.is_best, reasons=decision.reasons, announced=decision.announced,
                must=decision.must, waits=ends,
            )  # fmt: skip
        except (SaveFailed, TooLarge) as error:
            info = None
            if isinstance(error, TooLarge):
                self._saved = self._moment({})  # the next time that one is due is soon enough to try again
            if self.is_main and not (isinstance(error, TooLarge) and self._is_known_too_large):
                self.event("checkpoint-failed", str(error), level="error", reasons=list(decision.reasons))
            self._is_known_too_large |= isinstance(error, TooLarge)
        return info

    def _save(
        self,
        state: TrainState,
        metrics: Mapping[str, float],
        *,
        is_best: bool,
        reasons: tuple[str, ...],
        must: bool = True,
        waits: bool = True,
        weights_only: bool = False,
        announced: str = "",
    ) -> CheckpointInfo | None:
        started = time.monotonic()
        loader_state = state.loader_state()
        try:
            info = self._checkpoints.save(
                state,
                step=self._step,
                epoch=self._epoch,
                epoch_complete=self._epoch_complete(),
                metrics=metrics,
                is_best=is_best,
                reasons=reasons,
                progress=self._progress(),
                rank_state={"generators": seeds.capture(), "loader": loader_state},
                data=_json(loader_state) if isinstance(state.loader, ShardedLoader) else {},
                must=must,
                waits=waits,
                weights_only=weights_only,
                full=FULL in reasons,
                announced=announced,
            )
        except SaveFailed as error:
            self._heard(error)
            raise
        if info is not None and info.state is CheckpointState.committed:
            self._heard()
        if info is not None and not weights_only:
            self._saved = self._moment({})
            if info.state is CheckpointState.staged:
                self._staged[info.id] = self._saved
            else:
                self._durable = self._saved
        if self._pace is not None:
            self._explain(CHECKPOINT_METRICS)
            stalled = time.monotonic() - started + self._checkpoints.stalled()
            found = {"perf/checkpoint_stall": stalled, **self._skips()}
            if info is not None and self._checkpoints.copy_seconds:
                found["perf/checkpoint_copy"] = self._checkpoints.copy_seconds
            self._recorder.log(found, self._step)
        return info

    def _skips(self) -> dict[str, float]:
        """The number of skipped checkpoints, if it grew."""
        skipped = self._checkpoints.skipped
        if skipped == self._skips_logged:
            return {}
        self._skips_logged = skipped
        return {"perf/checkpoints_skipped": float(skipped)}

    def _await_saves(self) -> None:
        """Collective. Nothing is staged afterwards, or it takes longer than the policy allows."""
        self._checkpoints.drain(self._policy.wait)
        self._hear_of_saves()

    def _hear_of_saves(self) -> None:
        """What became of staged checkpoints. Where one failed, the next is due as if it had not been taken."""
        for ended in self._checkpoints.poll():
            moment = self._staged.pop(ended.info.id, None)
            if ended.why:
                self._saved = self._durable
            elif moment is not None:
                self._durable = moment
            self._heard(ended.why)
        if self._storage_watch is not None:
            self._storage_watch.look()

    def _heard(self, why: object = "") -> None:
        """How a save ended; '': well."""
        if self._storage_watch is not None:
            self._storage_watch.failed(why) if why else self._storage_watch.succeeded()

    def _tell_news(self, news: News) -> None:
        self.event(news.kind, news.message, level=news.level, **news.details())

    def _continue_from(self, stored: Stored, state: TrainState) -> None:
        manifest = stored.manifest
        self._step, self._epoch = manifest.step, manifest.epoch
        self._first_epoch = manifest.epoch + manifest.epoch_complete
        # What stands in micro-batches of then is meant in those of now.
        done = stored.progress["micro_batch"] * self._divided * self._shares / stored.progress.get("splits", 1)
        self._micro_batch, self._logged = int(done), stored.progress["logged"]
        self._best = None if stored.progress["best"] is None else float(stored.progress["best"])
        why = self._why_relaxed(stored)
        applied = 1.0
        if not is_clone(manifest):
            applied = float(stored.progress.get("lr_factor", 1.0))
            self._lr_factor = min(self._lr_factor, applied)
            self._left_out |= frozenset(map(_left_out, stored.progress.get("left_out", ())))
        if self._left_out or self._lr_factor != 1:
            why.append(_otherwise(self._left_out, self._lr_factor))
        same_world = manifest.world_size == self.world_size
        if stored.rank["loader"] is not None and hasattr(state.loader, "load_state_dict"):
            if same_world or isinstance(state.loader, ShardedLoader):
                state.loader.load_state_dict(stored.rank["loader"])
            else:
                why.append("the loader's position cannot be divided among another number of workers")
        elif not manifest.epoch_complete:
            why.append("the position within the epoch was not saved, which begins anew: give run.state(loader=…)")
        if same_world:
            self._generators = dict(stored.rank["generators"])
            seeds.restore(self._generators)
        self._saved = Moment(
            step=self._step, epochs_done=self._first_epoch, time=self._clock.monotonic(),
            optimizer_steps=self._optimizer_steps.count,
        )  # fmt: skip
        self._durable = self._saved
        if self._judge is not None and (judged := stored.progress.get("judge")) is not None:
            self._verdict = self._judge.restore(judged, is_clone=is_clone(manifest))
            self._ended_in_epochs = bool(judged["uses_epochs"])
        self._do_otherwise(applied=applied)
        if self.is_main:
            where = f"continues from {manifest.name}: step {manifest.step}, epoch {self._first_epoch}"
            exact = "bit for bit" if not why else "relaxed: " + "; ".join(why)
            self.event("resumed", f"{where} ({exact})", checkpoint=manifest.id, is_exact=not why, why=why)

    def _why_relaxed(self, stored: Stored) -> list[str]:
        """Reasons why the continued training cannot equal an uninterrupted one bit for bit."""
        manifest, why = stored.manifest, list(stored.why)
        if manifest.world_size != self.world_size:
            why.append(f"{manifest.world_size} workers then, {self.world_size} now")
        if manifest.config_hash != self._config_hash:
            why.append("the config changed")
        if manifest.seed != self._seed:
            why.append(f"seed {manifest.seed} then, {self._seed} now")
        if manifest.versions.get("torch") != torch.__version__:
            why.append(f"torch {manifest.versions.get('torch')} then, {torch.__version__} now")
        if not stored.progress.get("is_between_steps", True):
            why.append("it was saved when something went wrong, in the middle of a step")
        return why

    def _prepared(self, thing: Any, even: bool) -> Any:
        if isinstance(thing, ShardedLoader | DistributedDataParallel):
            return thing
        if isinstance(thing, torch.nn.Module):
            return self._prepared_model(thing)
        if isinstance(thing, DataLoader):
            loader = ShardedLoader(
                thing, rank=self.rank, world_size=self.world_size, seed=self._seed, device=self._device, even=even,
                splits=self._splits,
            )  # fmt: skip
            if loader.splits > self._divided:
                self._divided = loader.splits
            loader.pace = self._pace_of
            self._loaders.append(loader)
            return loader
        return thing

    def _prepared_model(self, model: torch.nn.Module) -> torch.nn.Module:
        model = model.to(self._device)
        if self.world_size == 1:
            return model
        if any(parameter.requires_grad for parameter in model.parameters()):
            return DistributedDataParallel(model, device_ids=[self._device] if self._device.type == "cuda" else None)
        for tensor in [*model.parameters(), *model.buffers()]:
            self._group.copy_from_main(tensor)
        return model

    def _tell(self, kind: FactKind, data: Mapping[str, Any]) -> None:
        self._recorder.fact(Fact(kind=kind, at=self._clock.now(), data=data))

    def _tell_once(self, kind: FactKind, data: Mapping[str, Any]) -> None:
        if self.is_main:
            self._tell(kind, data)


class _Diary:
    """Tells the run's record what happens to its checkpoints."""

    def __init__(self, run: Run) -> None:
        self._run = run

    def checkpoint(self, info: CheckpointInfo) -> None:
        self._run._tell(FactKind.checkpoint, info.to_json())
        if self._run._pointers and info.state is CheckpointState.committed:
            self._run._pointers.offer(info)

    def event(self, kind: str, message: str, *, level: str, **details: Any) -> None:
        self._run.event(kind, message, level=level, **details)


def _left_out(told: Sequence[int]) -> LeftOut:
    epoch, passes, first, last = told
    return epoch, passes, first, last


def _otherwise(left_out: Collection[LeftOut], lr_factor: float) -> str:
    """In words, what is done otherwise since a training went wrong."""
    samples = sum(last - first for _, _, first, last in left_out)
    epochs = ", ".join(str(epoch) for epoch in sorted({each[0] for each in left_out}))
    without = f"without {samples:,} samples of epoch {epochs}" if samples else ""
    slower = f"with {lr_factor:g} of the learning rate" if lr_factor != 1 else ""
    return " and ".join(filter(None, [without, slower])) or "with nothing else"


@contextmanager
def _opened(source: str | os.PathLike[str] | bytes) -> Iterator[Any]:
    if isinstance(source, bytes):
        yield io.BytesIO(source)
        return
    if not Path(source).is_file():
        raise UserError(f"run.artifact: {os.fspath(source)} is no file.")
    with open(source, "rb") as reader:
        yield reader


def _default_device(local_rank: int) -> torch.device:
    return torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")


def _number(key: str, value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise BadMetric(key, f"is {type(value).__name__}, which is no number") from error


def _text(number: float | None) -> str | None:
    """JSON knows no infinity; text does."""
    return None if number is None else repr(float(number))


def _json(value: Any) -> Any:
    """The value as JSON that every reader accepts: no nan or inf, and text for what JSON lacks."""
    if value is None or isinstance(value, bool | int | str):
        return value
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:
        return _json(value.item())
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, Mapping):
        return {str(key): _json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_json(item) for item in value]
    return str(value)


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _one_of(what: str, given: str, allowed: tuple[str, ...]) -> None:
    if given and given not in allowed:
        raise UserError(f"run.metric: {what} is {given!r}; it is {', '.join(allowed)}.")
