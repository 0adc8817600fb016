"""Checkpoints without a run: in a plain script, or under torchrun."""

from __future__ import annotations

import difflib
import json
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import urlsplit

import torch
import torch.distributed as dist

from orchestrator.backends.storage import Storage
from orchestrator.checkpoints import catalog
from orchestrator.checkpoints.engine import CheckpointEngine
from orchestrator.checkpoints.local.client import SlabClient
from orchestrator.checkpoints.local.ending import SETTLE, await_sealed
from orchestrator.checkpoints.local.places import slab_root
from orchestrator.checkpoints.manifest import CheckpointInfo
from orchestrator.checkpoints.policy import CheckpointPolicy, Direction, Mode, also_best
from orchestrator.checkpoints.reader import Stored
from orchestrator.checkpoints.slab import Owner
from orchestrator.checkpoints.slab_stager import SlabStager
from orchestrator.checkpoints.staging import DirectStager, Stager
from orchestrator.checkpoints.state import TrainState
from orchestrator.checkpoints.triggers import Moment, improved, reasons_to_save
from orchestrator.clock import Clock, SystemClock
from orchestrator.errors import UserError
from orchestrator.training import seeds
from orchestrator.training.group import Group

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedFrom:
    """The checkpoint that a state was restored from."""

    name: str
    step: int
    epoch: int
    metrics: Mapping[str, float]
    is_exact: bool
    """Training on equals, bit for bit, a training that was never interrupted, if the script does its part."""
    why: tuple[str, ...] = ()
    """Why it is not exact."""
    _generators: Mapping[str, Any] | None = field(default=None, repr=False)

    def restore_generators(self) -> None:
        """Lets this rank's random numbers go on where they were: call it right before training goes on. Does nothing
        if another number of ranks saved them."""
        if self._generators is not None:
            seeds.restore(dict(self._generators))


class Checkpoints:
    """Checkpoints under one directory or URL, without a run, a database or a cluster.

        checkpoints = orchestrator.Checkpoints("checkpoints/digits", keep_last=3, save_best="val/accuracy")
        state = checkpoints.state(model=model, optimizer=optimizer)
        if found := checkpoints.load_latest(state):
            first_step = found.step + 1
            found.restore_generators()
        ...
            checkpoints.save(state, step=step, metrics={"val/accuracy": accuracy})

    Under torchrun every rank makes one, after `init_process_group`, and calls its methods together with the others:
    each writes its share. Whatever dies whenever, `load_latest` finds the newest checkpoint that was completely
    written. Every start counts as an attempt of its own, and checkpoints of later attempts are newer. No signal
    handlers, and nothing that has to run at exit: what `save` has taken becomes durable by itself.
    """

    def __init__(
        self,
        url: str,
        *,
        keep_last: int = 3,
        save_best: str = "",
        keep_best: int = 1,
        every_steps: int = 0,
        every_minutes: float = 0.0,
        mode: str = "eager",
        slab_directory: str | os.PathLike[str] | None = None,
        stager: Stager | None = None,
        clock: Clock | None = None,
        **policy: Any,
    ) -> None:
        """`save_best` is the metric whose best are kept besides the last ones: "val/accuracy" or "val/loss:min".
        `every_steps` and `every_minutes` are for `due`. `mode`: "eager" copies to shared memory, and a process of its
        own, which starts by itself and ends when nothing is left, writes from there, also when this one is killed right
        after; "overlap" copies while the next step computes, up to `optimizer.step`; "direct" writes before `save`
        returns, as the others do where there is no memory. `slab_directory`: where that memory is, by default in
        /dev/shm. `policy`: see CheckpointPolicy. Collective. Raises UserError for settings that make no sense,
        ConfigError for a URL that cannot be opened."""
        if mode not in tuple(Mode):
            raise UserError(
                f"orchestrator.Checkpoints: mode is {mode!r}; it is {', '.join(map(repr, map(str, Mode)))}."
            )
        _check_names(policy)
        metric, direction, _ = also_best(save_best) if save_best else ("", Direction.max, 0)
        self._policy = CheckpointPolicy(
            **{
                "every_epochs": 0, "keep_last": keep_last, "keep_best": keep_best, "best_metric": metric,
                "best_direction": direction, "every_steps": every_steps, "every_minutes": every_minutes,
                "mode": Mode(mode), **policy,
            }
        )  # fmt: skip
        # A path from the root: the writer works elsewhere.
        self._storage = Storage(url if "://" in url else os.path.abspath(os.path.expanduser(url)))
        self._clock = clock or SystemClock()
        is_one_of_many = dist.is_available() and dist.is_initialized()
        self._group = Group(dist.get_rank(), dist.get_world_size()) if is_one_of_many else Group()
        slabs = Path(slab_directory) if slab_directory else slab_root()
        # What an earlier start left in memory takes its place first: this one is newer.
        await_sealed(slabs, lambda job: job.storage_url == self._storage.url, may_start=True)
        run, attempt = _last_part(self._storage.uri()), self._new_attempt()
        if self._policy.mode is not Mode.direct and stager is None:
            owner = Owner(run=run, attempt=attempt, rank=self._group.rank, pid=os.getpid())
            stager = SlabStager(
                SlabClient(str(slabs), may_start=True), owner=owner,
                fallback=DirectStager(self._storage, window_bytes=self._policy.window_mb << 20),
                tell=lambda event, why: logger.warning("%s: %s", event, why), mode=self._policy.mode,
            )  # fmt: skip
        self._engine = CheckpointEngine(
            self._storage,
            run=run,
            attempt=attempt,
            group=self._group,
            policy=self._policy,
            clock=self._clock,
            diary=_Log(),
            stager=stager,
        )
        self._best: float | None = None
        self._saved = Moment(time=self._clock.monotonic())
        self._expected: TrainState | None = None
        """Will be saved, and no memory was asked for yet."""

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.flush()
        self.close()

    def state(self, **parts: Any) -> TrainState:
        """What `save` stores and `load_latest` restores: `model`, `optimizer`, `scheduler`, `scaler`, `loader`,
        `extra`, `files`, and anything else by name; see TrainState. Nothing is restored yet."""
        self._expected = TrainState(**parts)
        return self._expected

    def due(self, *, step: int, epoch: int = 0, metrics: Mapping[str, float] | None = None) -> bool:
        """Collective. Whether `every_steps`, `every_minutes`, `every_epochs` or a better `save_best` metric say that it
        is time; rank 0's clock and metrics decide for all. The first call asks for the memory that a save will take:
        make it after the first step, when the optimizer has its state."""
        self._ask_for_room()
        now = self._moment(step, epoch, metrics or {})
        return bool(self._group.share("due" if reasons_to_save(self._policy, now, self._saved) else ""))

    def save(
        self,
        state: TrainState,
        *,
        step: int,
        epoch: int = 0,
        metrics: Mapping[str, float] | None = None,
        best: bool = False,
        wait: bool = False,
        weights_only: bool = False,
    ) -> CheckpointInfo | None:
        """Collective. Saves now; `wait`: returns when it is durable. `best` says that it is the best so far, besides
        what `save_best` finds. `weights_only` saves the model alone, for others.

        None if earlier ones are still being written and this one is neither waited for nor the best. Raises SaveFailed,
        TooLarge or StateRefused, on all ranks.
        """
        self._engine.poll()
        self._expected = None
        now = self._moment(step, epoch, metrics or {})
        is_better = improved(self._policy, now)
        decision = {"is_best": best or is_better, "announced": self._engine.announce(step)}
        decision = json.loads(self._group.share(json.dumps(decision)))
        loader = state.loader_state()
        info = self._engine.save(
            state,
            step=step,
            epoch=epoch,
            epoch_complete=False,
            metrics=now.metrics,
            is_best=decision["is_best"],
            reasons=("best",) if decision["is_best"] else ("now",),
            progress={"best": None if self._best is None else repr(self._best)},
            rank_state={"generators": seeds.capture(), "loader": loader},
            data={},
            must=wait or decision["is_best"] or weights_only,
            waits=wait,
            weights_only=weights_only,
            announced=decision["announced"],
        )
        if info is not None:
            self._best = now.metrics[self._policy.best_metric] if is_better else self._best
            self._saved = now
        return info

    def load_latest(self, state: TrainState, *, which: str = "latest") -> LoadedFrom | None:
        """Collective. Restores the newest checkpoint that is whole (`which="best"`: the best one by `save_best`; or the
        name of one), in place; None if there is none. Damaged ones are put aside on the way, with an error in the log.

        Raises CheckpointMismatch when it belongs to other code, Unreadable when the storage does not answer.
        """
        self._engine.drain(SETTLE)
        self._engine.poll()
        stored = self._engine.restore(state, which=which)
        if stored is None:
            return None
        manifest, same_world = stored.manifest, stored.manifest.world_size == self._group.world_size
        why = self._why_relaxed(stored)
        loader = stored.rank.get("loader")
        if loader is not None and hasattr(state.loader, "load_state_dict"):
            if same_world:
                state.loader.load_state_dict(loader)
            else:
                why += ("the loader's position cannot be divided among another number of ranks",)
        self._expected = state
        self._ask_for_room()
        best = stored.progress.get("best")
        self._best = None if best is None else float(best)
        self._saved = Moment(step=manifest.step, epochs_done=manifest.epoch, time=self._clock.monotonic())
        return LoadedFrom(
            name=manifest.name, step=manifest.step, epoch=manifest.epoch, metrics=manifest.metrics, is_exact=not why,
            why=why, _generators=stored.rank.get("generators") if same_world else None,
        )  # fmt: skip

    def flush(self, timeout: float = 600.0) -> bool:
        """Collective. Waits until everything saved is durable; False if it took longer. What failed is in the log."""
        is_done = self._engine.drain(timeout)
        self._engine.poll()
        return is_done

    def close(self) -> None:
        """No further saves. What is staged is still written."""
        self._engine.close()

    def _ask_for_room(self) -> None:
        """So that the first save need not wait for memory, nor for the start of a writer."""
        if self._expected is not None:
            self._engine.expect(self._expected)
            self._expected = None

    def _why_relaxed(self, stored: Stored) -> tuple[str, ...]:
        manifest, why = stored.manifest, list(stored.why)
        if manifest.world_size != self._group.world_size:
            why.append(f"{manifest.world_size} ranks then, {self._group.world_size} now")
        if manifest.versions.get("torch") != torch.__version__:
            why.append(f"torch {manifest.versions.get('torch')} then, {torch.__version__} now")
        return tuple(why)

    def _moment(self, step: int, epoch: int, metrics: Mapping[str, float]) -> Moment:
        numbers = {name: float(value) for name, value in metrics.items()}
        return Moment(
            step=step, epochs_done=epoch, time=self._clock.monotonic(), metrics=numbers, best=self._best
        )  # fmt: skip

    def _new_attempt(self) -> int:
        """One more than any that left something here. Two that choose alike at the same moment cannot mix: the files of
        a save carry its token."""
        found = ""
        if self._group.rank == 0:
            names = (entry.name for entry in self._storage.entries() if entry.is_dir and catalog.is_name(entry.name))
            found = str(1 + max((catalog.age_key(name)[0] for name in names), default=0))
        return int(self._group.share(found))


class _Log:
    """A Diary where there is no record: the engine logs what goes wrong by itself."""

    def checkpoint(self, info: CheckpointInfo) -> None:
        logger.debug("checkpoint %s is %s", info.uri, info.state.value)

    def event(self, kind: str, message: str, *, level: str, **details: Any) -> None:
        logger.debug("%s: %s", kind, message)


def _check_names(settings: Mapping[str, Any]) -> None:
    known = sorted(field.name for field in fields(CheckpointPolicy))
    for name in settings:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"Did you mean {near[0]!r}?" if near else f"There are {', '.join(known)}."
            raise UserError(f"orchestrator.Checkpoints has no setting {name!r}. {hint}")


def _last_part(uri: str) -> str:
    """What the checkpoints are called, there being no run."""
    return urlsplit(uri).path.rstrip("/").rpartition("/")[2] or "checkpoints"
