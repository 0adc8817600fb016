"""Saves and restores the checkpoints of one run, together on all ranks."""

from __future__ import annotations

import hashlib
import json
import logging
import platform
import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any, NoReturn, Protocol

import torch

from orchestrator.backends.storage import Storage
from orchestrator.checkpoints import catalog, commit, goodness, plan, pointers
from orchestrator.checkpoints.clone import is_clone
from orchestrator.checkpoints.job import Layout, Outcome, SaveJob, SlotResult
from orchestrator.checkpoints.keeping import Keeping, keep_rules
from orchestrator.checkpoints.manifest import MANIFEST, STATE, CheckpointInfo, CheckpointState, Manifest, directory_name
from orchestrator.checkpoints.policy import CheckpointPolicy, label_of
from orchestrator.checkpoints.reader import Stored, read, read_manifest, shapes
from orchestrator.checkpoints.retention import ranked
from orchestrator.checkpoints.staging import DirectStager, Reservation, Stager
from orchestrator.checkpoints.state import Snapshot, TrainState, specs
from orchestrator.checkpoints.tree import NotStorable, inline, pack
from orchestrator.clock import Clock
from orchestrator.errors import CheckpointCorrupt, CheckpointError, UserError

logger = logging.getLogger(__name__)

_REFUSED, _NO_ROOM, _NO_PLAN, _DIRECT, _READY = range(5)
"""How far a rank has come when a save is agreed on: the lowest of all counts."""
_SKIPS_TOLD_EVERY = 60.0
_CLOCKS_DIFFER = 60.0
"""Seconds by which a storage's clock may be behind ours."""
RESCUED = 1_000_000
"""Names of rescues count from here, so that none takes another save's: some rank may not know of it."""
RESCUE_ROOM = 5.0
"""Seconds that a rescue waits for room, and a rank alone for its commit."""
RESCUE_RANKS = 10.0
"""Seconds that whoever commits a rescue waits for the other ranks."""
RESCUE_TOGETHER = 2.0
"""Seconds that a rank which raised waits itself: most often the others hang, and nothing comes."""


class Group(Protocol):
    """The ranks of a training. Every method is collective; implemented by training/group.py."""

    rank: int
    world_size: int

    def share(self, text: str) -> str: ...
    def gather(self, text: str) -> list[str]: ...
    def lowest(self, value: int) -> int: ...


class Diary(Protocol):
    """Where changes are told; called on rank 0 only."""

    def checkpoint(self, info: CheckpointInfo) -> None: ...
    def event(self, kind: str, message: str, *, level: str, **details: Any) -> None: ...


class SaveFailed(CheckpointError):
    """A checkpoint could not be written on some rank; nothing of it can be loaded, earlier ones are untouched."""

    def __init__(self, uri: str, why: str) -> None:
        super().__init__(uri, why)
        self.uri, self.why = uri, why

    def __str__(self) -> str:
        return f"No checkpoint was saved at {self.uri}: {self.why}. Earlier checkpoints are untouched."


class TooLarge(CheckpointError):
    """The state is larger than a checkpoint may be, or than the storage has room for; nothing was written."""

    def __init__(self, uri: str, why: str) -> None:
        super().__init__(uri, why)
        self.uri, self.why = uri, why

    def __str__(self) -> str:
        return f"No checkpoint was saved at {self.uri}: {self.why}. Earlier checkpoints are untouched."


class StateRefused(CheckpointError, UserError):
    """The state that was to be saved holds something that cannot be stored."""

    def __init__(self, why: str) -> None:
        super().__init__(why)
        self.why = why

    def __str__(self) -> str:
        return f"run.state(…) holds what no checkpoint can: {self.why}"


class NotWorthSaving(CheckpointError):
    """A state that no training should go on from."""

    def __init__(self, why: str) -> None:
        super().__init__(why)
        self.why = why

    def __str__(self) -> str:
        return f"The state was not saved: {self.why}."


class Closed(CheckpointError, UserError):
    """A save after the end."""

    def __init__(self, uri: str) -> None:
        super().__init__(uri)
        self.uri = uri

    def __str__(self) -> str:
        return f"No checkpoint was saved at {self.uri}: the training has ended. Save before it does."


class Unreadable(CheckpointError):
    """The storage did not answer while a checkpoint was read. That says nothing about the checkpoint, so nothing is
    skipped."""

    def __init__(self, uri: str, why: str) -> None:
        super().__init__(uri, why)
        self.uri, self.why = uri, why

    def __str__(self) -> str:
        return f"Checkpoints under {self.uri} could not be read: {self.why}. Try again when the storage answers."


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """What became of a staged save. `why` is empty if it is committed."""

    info: CheckpointInfo
    why: str = ""


@dataclass(slots=True, kw_only=True)
class _Planned:
    """What this rank writes of states that look alike."""

    specs: plan.Groups
    own: plan.Groups
    files: Mapping[str, int]
    sha256: str
    layout: Layout
    heads: tuple[bytes, ...]
    size_bytes: int
    """Of all tensors and side files, on all ranks together."""
    own_bytes: int
    """Of what is rank 0's alone."""
    late: tuple[bool, ...]
    """Of the layout's tensors, which change in an optimizer's step only and may be copied until then."""


@dataclass(slots=True, kw_only=True)
class _Attempted:
    """This rank's side of a save until all ranks agree that it takes place."""

    kind: str
    snapshot: Snapshot | None = None
    specs: plan.Groups = field(default_factory=dict)
    own: plan.Groups = field(default_factory=dict)
    content: Any = None
    texts: Mapping[str, str] = field(default_factory=dict)
    reservation: Reservation | None = None
    is_agreed_direct: bool = False
    """Some rank writes at the seal: then all of them wait."""
    error: Exception | None = None

    @property
    def files(self) -> dict[str, int]:
        return {name: len(data) for name, data in self.snapshot.files.items()} if self.snapshot else {}

    def abandon(self) -> None:
        if self.reservation is not None:
            self.reservation.abandon()
            self.reservation = None


class CheckpointEngine:
    """The checkpoints of one run, under `storage`.

    `save`, `drain` and `restore` are collective: all ranks call them together, rank 0 decides, and all of them return
    the same thing or raise the same error. Each rank writes its share of what is the same on all of them. Whatever dies
    whenever: what `restore` finds is the newest checkpoint that was completely written.

    Without a `stager` a save writes before it returns. With one whose seal only hands over, `save` gives a checkpoint
    that is `staged`; `poll` says later what became of it.
    """

    def __init__(
        self,
        storage: Storage,
        *,
        run: str,
        attempt: int,
        group: Group,
        policy: CheckpointPolicy,
        clock: Clock,
        diary: Diary,
        stager: Stager | None = None,
        seed: int = 0,
        config_hash: str = "",
        spool_directory: str = "",
    ) -> None:
        self._storage, self._group, self._policy, self._clock, self._diary = storage, group, policy, clock, diary
        self._run, self._attempt, self._seed, self._config_hash = run, attempt, seed, config_hash
        self._stager: Stager = stager or DirectStager(storage, window_bytes=policy.window_mb << 20)
        self._spool_directory = spool_directory
        self._rules = keep_rules(policy)
        self._keeping = Keeping(storage, self._rules, attempt=attempt)
        self._plans: dict[str, _Planned] = {}
        self._staged: dict[str, CheckpointInfo] = {}
        """Token -> what is being written."""
        self._ended: list[Ended] = []
        self._is_failing = False
        """The last staged save came to nothing."""
        self._told: dict[str, CheckpointInfo] = {}
        """Name -> what the diary was told of committed ones."""
        self._counts: dict[int, int] = {}
        """Step -> how many saves of this attempt were sealed there."""
        self.skipped = 0
        """Saves that found no room."""
        self.copy_seconds = 0.0
        """How long the last save copied."""
        self._is_closed = False
        self._skips_untold, self._skips_told_at = 0, float("-inf")
        self._is_known_too_large = False

    # -- saving ------------------------------------------------------------------------------------------------------

    def expect(self, state: TrainState) -> None:
        """Not collective: may be called early, when the state is known, so that room is there when the first save
        comes, and again when it has grown. Says as an event, once, that it will be too large to save."""
        self._stager.attach(state)
        try:
            mine = self._captured(state, "sharded", {}, {})
        except NotStorable:
            return  # the save will say so, on all ranks
        layout, heads = self._layout(mine, plan.own_bytes(mine.specs))
        self._stager.expect(layout, heads)
        if self._group.rank == 0 and not self._is_known_too_large:
            with suppress(OSError):
                if why := self._too_large(_size_bytes(mine.specs, mine.files)):
                    self._is_known_too_large = True
                    self._tell("checkpoint-too-large", f"a checkpoint of this state cannot be saved: {why}")

    def announce(self, step: int) -> str:
        """On rank 0: token and name of the next save, to be given to every rank's `save`."""
        return f"{secrets.token_hex(16)} {directory_name(step, self._attempt, self._counts.get(step, 0) + 1)}"

    def save(
        self,
        state: TrainState,
        *,
        step: int,
        epoch: int,
        epoch_complete: bool,
        metrics: Mapping[str, float],
        is_best: bool,
        reasons: Sequence[str],
        progress: Mapping[str, Any],
        rank_state: Mapping[str, Any],
        data: Mapping[str, Any],
        must: bool = True,
        waits: bool = True,
        weights_only: bool = False,
        full: bool = False,
        announced: str = "",
    ) -> CheckpointInfo | None:
        """Takes a checkpoint. Raises SaveFailed, TooLarge, StateRefused or Closed, on all ranks.

        `progress` is JSON that belongs to the run, `rank_state` what differs between ranks, `data` the position in
        the data. A save that `must` be waits for room; another one is skipped without: then None. With `waits` it
        returns when the checkpoint is durable; else it may be `staged`, with only its files' places known.
        `full` puts the parts of sharded tensors together; where ranks hold the same, all is whole in any case.
        `announced` is what rank 0's `announce` gave, if the ranks know it already.
        """
        if self._is_closed:
            raise Closed(self._storage.uri())
        created = self._clock.now()
        token, name = (announced or self._group.share(self.announce(step))).split(" ")
        kind = "weights" if weights_only else "full" if full else "sharded"
        mine = self._agreed(state, kind, rank_state, progress, must, self._storage.uri(name))
        if mine is None:
            self._count_skip(name, reasons)
            return None
        self._counts[step] = self._counts.get(step, 0) + 1
        planned = self._plan_for(mine)
        assert planned is not None
        draft = self._draft(
            name, token, planned, created=created, step=step, epoch=epoch, epoch_complete=epoch_complete,
            metrics=metrics, is_best=is_best, reasons=tuple(reasons), data=data, kind=kind, resumable=not weights_only,
        )  # fmt: skip
        info = self._staged_info(draft, planned)
        failure = self._seal(mine, planned, draft, is_waited_for=waits)
        if mine.is_agreed_direct or waits:
            return self._concluded(mine, info, token, failure)
        self._staged[token] = info
        if failure is not None:
            self._end_badly(self._staged.pop(token), _told(failure))
        return info

    def rescue(
        self,
        state: TrainState,
        *,
        step: int,
        optimizer_steps: int,
        epoch: int,
        epoch_complete: bool,
        reasons: Sequence[str],
        progress: Mapping[str, Any],
        rank_state: Mapping[str, Any],
        data: Mapping[str, Any],
    ) -> CheckpointInfo:
        """Saves without a word to the other ranks, which may be dead or wait for what will not come. Not collective.

        Each rank that calls it at the same point finds the same token by itself; there is a checkpoint if all of them
        do within RESCUE_RANKS seconds, or once they have. What is given is `staged` then, and committed at once where
        this rank is the only one. Raises NotWorthSaving, SaveFailed, NotStorable, Closed, OSError.
        """
        if self._is_closed:
            raise Closed(self._storage.uri())
        created = self._clock.now()
        self._stager.attach(state)
        mine = self._captured(state, "sharded", rank_state, progress)
        assert mine.snapshot is not None
        if name := _not_finite(mine.snapshot):
            raise NotWorthSaving(f"{name} holds nan or inf")
        planned = self._plan_alone(mine)
        point = f"{self._run} {self._attempt} {step} {optimizer_steps} {planned.sha256} {planned.own_bytes}"
        token = hashlib.sha256(point.encode()).hexdigest()[:32]
        draft = self._draft(
            directory_name(step, self._attempt, RESCUED + optimizer_steps), token, planned, created=created, step=step,
            epoch=epoch, epoch_complete=epoch_complete, metrics={}, is_best=False, reasons=tuple(reasons), data=data,
            kind="sharded", resumable=True,
        )  # fmt: skip
        info = self._staged_info(draft, planned)
        mine.reservation = self._stager.reserve(planned.layout, planned.heads, patience=RESCUE_ROOM)
        if mine.reservation is None:  # all room is taken by what is being written
            mine.reservation = DirectStager(self._storage).reserve(planned.layout, planned.heads, patience=0.0)
        if (failure := self._seal(mine, planned, draft, is_waited_for=True, wait_for_ranks=RESCUE_RANKS)) is not None:
            raise SaveFailed(info.uri, _told(failure)) from failure
        patience = RESCUE_ROOM if self._group.world_size == 1 else RESCUE_TOGETHER
        if mine.reservation.is_direct:
            return self._commit_alone(info, token, patience)
        self._staged[token] = info
        self.await_own(patience)
        return next((ended.info for ended in self._ended if ended.info.id == info.id and not ended.why), info)

    def _commit_alone(self, info: CheckpointInfo, token: str, patience: float) -> CheckpointInfo:
        """What this rank has written is a checkpoint as soon as the others have written, too. Whoever sees that commits
        it; the record is rank 0's to tell, or the next attempt's."""
        inside, deadline = self._storage.join(_name_of(info)), time.monotonic() + patience
        while commit.finish(inside) is None:
            if self._group.rank != 0 or time.monotonic() > deadline:
                return info
            time.sleep(0.02)
        if self._group.rank != 0:
            return info
        outcome, timings = self._commit(info, token)
        info = replace(_committed_info(info, outcome), timings=timings)
        self._has_committed(info, outcome)
        return info

    def _plan_alone(self, mine: _Attempted) -> _Planned:
        """The plan that is agreed on, or the same one that the other ranks make of states like this one's."""
        planned = self._plan_for(mine)
        if planned is not None:
            return planned
        own_bytes = plan.own_bytes(mine.specs)
        layout, heads = self._layout(mine, own_bytes)
        return _Planned(
            specs=mine.specs, own=mine.own, files=mine.files, layout=layout, heads=heads, own_bytes=own_bytes,
            late=_late(layout, mine.snapshot),
            sha256=plan.plan_sha256(mine.specs, self._group.world_size), size_bytes=_size_bytes(mine.specs, mine.files),
        )  # fmt: skip

    def _draft(self, name: str, token: str, planned: _Planned, *, created: float, **what: Any) -> Manifest:
        """What rank 0 knows of a checkpoint before it is written."""
        return Manifest(
            run=self._run, name=name, attempt=self._attempt, world_size=self._group.world_size, seed=self._seed,
            config_hash=self._config_hash, created=created, duration=0.0, files=(), save=token,
            label=label_of(self._policy.label, epoch=what["epoch"], step=what["step"], attempt=self._attempt),
            versions={"torch": torch.__version__, "python": platform.python_version()}, plan_sha256=planned.sha256,
            **what,
        )  # fmt: skip

    def _staged_info(self, draft: Manifest, planned: _Planned) -> CheckpointInfo:
        info = CheckpointInfo.of(draft, self._storage.uri(draft.name), CheckpointState.staged)
        return replace(info, manifest_sha256="", size_bytes=planned.size_bytes)

    def _agreed(
        self,
        state: TrainState,
        kind: str,
        rank_state: Mapping[str, Any],
        progress: Mapping[str, Any],
        must: bool,
        uri: str,
    ) -> _Attempted | None:
        """Room on every rank, or None on every rank; whatever goes wrong on one of them is raised on all."""
        mine = _Attempted(kind=kind)
        try:
            self._stager.attach(state)
            mine = self._captured(state, kind, rank_state, progress)
        except Exception as error:  # whatever it is, the other ranks wait to hear of it
            mine.error = error
        while True:
            lowest = self._group.lowest(self._readiness(mine, must))
            if lowest == _NO_PLAN:
                mine.abandon()
                self._make_plan(mine, uri)
                continue
            if lowest == _READY:
                return mine
            if lowest == _DIRECT:
                self._go_direct(mine)
                return mine
            mine.abandon()
            if lowest == _REFUSED:
                self._raise_together(mine.error, uri)
            if must:
                raise SaveFailed(uri, f"there was no room to put it within {self._policy.wait:g} s")
            return None

    def _go_direct(self, mine: _Attempted) -> None:
        """All ranks or none: one that waits for the rest must not depend on the writer that another one found."""
        mine.is_agreed_direct = True
        planned = self._plan_for(mine)
        if planned is not None and mine.reservation is not None and not mine.reservation.is_direct:
            mine.abandon()
            mine.reservation = DirectStager(self._storage).reserve(planned.layout, planned.heads, patience=0.0)

    def _captured(
        self, state: TrainState, kind: str, rank_state: Mapping[str, Any], progress: Mapping[str, Any]
    ) -> _Attempted:
        """Raises NotStorable."""
        snapshot = state.capture(weights_only=kind == "weights", full=kind == "full")
        is_main = self._group.rank == 0
        texts = {}
        if is_main:
            done = json.dumps(dict(progress), allow_nan=False)
            texts[STATE] = f'{{"tree": {snapshot.tree_text}, "progress": {done}}}'
        own = (
            {} if is_main else {plan.OWN: specs(Snapshot(tensors={plan.OWN: snapshot.own}, tree={})).get(plan.OWN, [])}
        )
        return _Attempted(
            kind=kind, snapshot=snapshot, specs=specs(snapshot), own=own, texts=texts,
            content=pack(rank_state, inline, f"rank {self._group.rank}"),
        )  # fmt: skip

    def _readiness(self, mine: _Attempted, must: bool) -> int:
        if mine.error is not None:
            return _REFUSED
        planned = self._plan_for(mine)
        if planned is None:
            return _NO_PLAN
        patience = self._policy.wait if must else 0.0
        try:
            mine.reservation = self._stager.reserve(planned.layout, planned.heads, patience=patience)
        except Exception as error:  # whatever it is, the other ranks wait to hear of it
            mine.error = error
            return _REFUSED
        if mine.reservation is None:
            return _NO_ROOM
        return _DIRECT if mine.reservation.is_direct else _READY

    def _plan_for(self, mine: _Attempted) -> _Planned | None:
        """The one that is agreed on for such states; where ranks hold the same, a full save is like any other."""
        for kind in dict.fromkeys((mine.kind, "sharded" if mine.kind == "full" else mine.kind)):
            planned = self._plans.get(kind)
            if planned and (planned.specs, planned.own, planned.files) == (mine.specs, mine.own, mine.files):
                return planned
        return None

    def _make_plan(self, mine: _Attempted, uri: str) -> None:
        """Who writes what, from what all ranks have; once for states that look alike. Raises StateRefused, TooLarge."""
        sha256 = plan.plan_sha256(mine.specs, self._group.world_size)
        reply: dict[str, Any] = {"sha256": sha256, "own_bytes": plan.own_bytes(mine.specs), "too_large": ""}
        size_bytes = _size_bytes(mine.specs, mine.files)
        if self._group.rank == 0 and mine.error is None:
            try:
                reply["too_large"] = self._too_large(size_bytes)
            except OSError as error:
                mine.error = error
        replies = [json.loads(text) for text in self._group.gather(json.dumps(reply))]
        if replies[0]["too_large"]:
            raise TooLarge(uri, replies[0]["too_large"])
        if any(each["sha256"] != replies[0]["sha256"] for each in replies):
            self._refuse_plans(mine)
        if mine.error is not None:
            return
        try:
            layout, heads = self._layout(mine, replies[0]["own_bytes"])
        except Exception as error:  # whatever it is, the other ranks wait to hear of it
            mine.error = error
            return
        self._plans[mine.kind] = _Planned(
            specs=mine.specs, own=mine.own, files=mine.files, sha256=sha256, layout=layout, heads=heads,
            size_bytes=size_bytes, own_bytes=replies[0]["own_bytes"], late=_late(layout, mine.snapshot),
        )  # fmt: skip

    def _layout(self, mine: _Attempted, own_bytes: int) -> tuple[Layout, tuple[bytes, ...]]:
        rank, world_size = self._group.rank, self._group.world_size
        owners = plan.owners(mine.specs, world_size, own_bytes=own_bytes)
        owners |= {f"{group}/{spec.name}": rank for group, each in mine.own.items() for spec in each}
        return plan.layout({**mine.specs, **mine.own}, owners, rank, world_size, files=mine.files)

    def _refuse_plans(self, mine: _Attempted) -> None:
        """Names the first tensor in which two ranks differ."""
        described = [json.loads(text) for text in self._group.gather(json.dumps(plan.described(mine.specs)))]
        for rank, each in enumerate(described):
            if (found := plan.difference(described[0], each)) is not None:
                key, here, there = found
                raise StateRefused(
                    f"{key} is {here} on rank 0 and {there} on rank {rank}. Parameters and the optimizer's state must "
                    "be the same on every rank."
                )

    def _too_large(self, size_bytes: int) -> str:
        """Why a state of that size cannot be saved; "" if it can."""
        size, limit = f"{size_bytes / 1e9:.3g} GB", self._policy.max_gb
        if limit and size_bytes > limit * 1e9:
            return f"it has {size}, checkpoints.max_gb allows {limit:g}"
        free = self._storage.free_bytes()
        if free is not None and free < 1.1 * size_bytes:
            return f"it has {size}, the disk has {free / 1e9:.3g} GB left, and a tenth more is needed"
        return ""

    def _seal(
        self,
        mine: _Attempted,
        planned: _Planned,
        draft: Manifest,
        *,
        is_waited_for: bool,
        wait_for_ranks: float = 300.0,
    ) -> Exception | None:
        """What went wrong, if anything did: the other ranks do not wait for this one here."""
        reservation, snapshot = mine.reservation, mine.snapshot
        assert reservation is not None
        assert snapshot is not None
        try:
            copied = self.copy_seconds = reservation.fill(
                _tensors(planned.layout, snapshot), late=None if is_waited_for else planned.late
            )
            reservation.seal(
                SaveJob(
                    save=draft.save, storage_url=self._storage.url, name=draft.name, run=self._run,
                    attempt=self._attempt, rank=self._group.rank, world_size=self._group.world_size,
                    content=mine.content, texts=mine.texts,
                    draft=commit.draft_of(draft) if self._group.rank == 0 else None, keep=self._rules,
                    sealed_at=self._clock.now(), copy_seconds=copied, spool_directory=self._spool_directory,
                    wait_for_ranks=wait_for_ranks,
                )
            )  # fmt: skip
        except Exception as error:  # whatever it is, the other ranks may wait to hear of it
            logger.warning("rank %d could not save", self._group.rank, exc_info=error, extra={"run": self._run})
            with suppress(Exception):
                reservation.abandon()
            return error
        return None

    def _concluded(
        self, mine: _Attempted, info: CheckpointInfo, token: str, failure: Exception | None
    ) -> CheckpointInfo:
        """Waits until the checkpoint is committed. Raises SaveFailed on all ranks."""
        assert mine.reservation is not None
        is_main, is_direct = self._group.rank == 0, mine.reservation.is_direct
        why = "" if failure is None else _told(failure)
        if not why and not is_direct and not is_main:  # what a direct seal did is known when it returns
            why = _failure_of(self._waited(token, info))
        replies = self._group.gather(why)
        wrong = [f"rank {rank}: {each}" for rank, each in enumerate(replies) if each]
        if wrong:
            if is_main and is_direct:
                with suppress(OSError):
                    self._storage.delete_dir(_name_of(info))
            raise SaveFailed(info.uri, "; ".join(wrong)) from failure

        def committed() -> str:
            if is_direct:
                outcome, timings = self._commit(info, token)
            else:
                outcome, timings = self._waited(token, info), {}
            if wrong := _failure_of(outcome):
                raise CheckpointError(wrong)
            self._has_committed(replace(_committed_info(info, outcome), timings=timings), outcome)
            return outcome.encode().decode()

        return _committed_info(info, Outcome.decode(self._on_main(committed, SaveFailed, info.uri).encode()))

    def _commit(self, info: CheckpointInfo, token: str) -> tuple[Outcome, Mapping[str, float]]:
        """Makes a checkpoint of what all ranks have written. Raises CheckpointError, OSError."""
        name = _name_of(info)
        try:
            manifest = commit.finish(self._storage.join(name))
        except (OSError, CheckpointError):
            with suppress(OSError):  # or the next attempt would commit what this one called failed
                catalog.remove(self._storage, name)
            raise
        if manifest is None:
            raise CheckpointError(
                f"not every rank's files are there: {self._storage.uri()} must be the same place on all hosts"
            )
        if manifest.save != token:
            raise CheckpointError("another save has taken its name: two trainings write to one place")
        tidied = self._keeping.after_commit(manifest, now=self._clock.now())
        outcome = Outcome(
            save=token, name=name, result=SlotResult.committed, why=tidied.why, manifest_sha256=manifest.digest,
            size_bytes=manifest.size_bytes, duration=manifest.duration,
            deleted=tuple(each.name for each in tidied.deleted), for_quota=tidied.for_quota,
        )  # fmt: skip
        for deleted in tidied.deleted:
            self._told.setdefault(deleted.name, CheckpointInfo.of(deleted, self._storage.uri(deleted.name)))
        return outcome, manifest.timings

    def _waited(self, token: str, info: CheckpointInfo) -> Outcome:
        try:
            return self._stager.wait(token, self._policy.wait)
        except TimeoutError:
            self._staged[token] = info  # it may still be committed: `poll` will hear of it
            why = f"it was not durable after {self._policy.wait:g} s, and may still become so"
            return Outcome(save=token, name=_name_of(info), result=SlotResult.failed, why=why)

    def _count_skip(self, name: str, reasons: Sequence[str]) -> None:
        self.skipped += 1
        self._skips_untold += 1
        if time.monotonic() - self._skips_told_at < _SKIPS_TOLD_EVERY:
            return
        count, self._skips_untold, self._skips_told_at = self._skips_untold, 0, time.monotonic()
        message = f"{count} checkpoint(s) skipped, the last at {name}: earlier ones are still being written"
        self._tell("checkpoint-skipped", message, count=count, reasons=list(reasons))

    def vouch(self, step: int) -> None:
        """On all ranks, before a save: up to `step` the training is known to have gone well, and what lies beyond may
        still turn out to be no good. So the newest checkpoint up to there is kept."""
        if step != self._rules.vouched:
            self._rules = replace(self._rules, vouched=step)
            self._keeping.vouch(step)

    def spoil(self, good_step: int, why: str) -> CheckpointInfo | None:
        """On rank 0: the training has gone wrong after `good_step`. What it saved since is not gone on from by any
        attempt, nor counted by retention, nor called best. Gives the newest one that is good. Raises OSError,
        CheckpointError."""
        made = goodness.Mark(attempt=self._attempt, good_step=good_step, why=why, at=self._clock.now())
        goodness.mark(self._storage, made)
        found = catalog.scan(self._storage)
        pointers.update(self._storage, found.good, self._rules, now=self._clock.now())
        for each in found.found:
            if each.is_bad and each.manifest.name in self._told:
                self._call_bad(each.manifest)
        usable = [manifest for manifest in found.good if manifest.resumable]
        return CheckpointInfo.of(usable[0], self._storage.uri(usable[0].name)) if usable else None

    def _call_bad(self, manifest: Manifest) -> None:
        """In the record; rank 0 only."""
        info = CheckpointInfo.of(manifest, self._storage.uri(manifest.name), CheckpointState.bad)
        self._told[manifest.name] = info
        self._diary.checkpoint(info)

    # -- what became of staged ones ----------------------------------------------------------------------------------

    def poll(self) -> list[Ended]:
        """What became of staged saves since the last call; not collective. Rank 0 tells the diary."""
        for outcome in self._stager.outcomes():
            self._hear(outcome)
        ended, self._ended = self._ended, []
        return ended

    def drain(self, timeout: float) -> bool:
        """Collective. Waits until nothing is staged any more; False if that took longer. `poll` gives the results."""
        return bool(self._group.lowest(self.await_own(timeout)))

    def await_own(self, timeout: float) -> bool:
        """As `drain`, for this rank alone."""
        deadline = time.monotonic() + timeout
        for token in list(self._staged):
            with suppress(TimeoutError):
                self._hear(self._stager.wait(token, max(deadline - time.monotonic(), 0.0)))
        return not self._staged

    def close(self) -> None:
        """No further saves. What is staged goes on."""
        if not self._is_closed:
            self._is_closed = True
            self._stager.close()

    def _hear(self, outcome: Outcome) -> None:
        info = self._staged.pop(outcome.save, None)
        if info is None:
            return
        if wrong := _failure_of(outcome):
            self._end_badly(info, wrong)
            return
        if self._group.rank != 0:  # whose part is durable; what came of the whole, rank 0 hears
            self._ended.append(Ended(info=info))
            return
        info = _committed_info(info, outcome)
        self._has_committed(info, outcome)
        self._ended.append(Ended(info=info))

    def _end_badly(self, info: CheckpointInfo, why: str) -> None:
        message = str(SaveFailed(info.uri, why))
        if self._group.rank == 0:
            # Each is an event; a storage that is away for hours is not an error line per save.
            logger.log(logging.DEBUG if self._is_failing else logging.ERROR, message, extra={"run": self._run})
            self._diary.event("checkpoint-failed", message, level="error", reasons=list(info.reasons))
        self._is_failing = True
        self._ended.append(Ended(info=info, why=why))

    def _has_committed(self, info: CheckpointInfo, outcome: Outcome) -> None:
        """Tells of a checkpoint and of what it has displaced; rank 0 only."""
        logger.info("checkpoint committed", extra={"run": self._run, "step": info.step, "uri": info.uri})
        self._is_failing = False
        self._told[_name_of(info)] = info
        self._diary.checkpoint(info)
        for name in outcome.deleted:
            if (gone := self._told.pop(name, None)) is not None:
                self._diary.checkpoint(replace(gone, state=CheckpointState.deleted))
        if outcome.for_quota:
            self._tell("checkpoint-quota", outcome.for_quota)
        if outcome.why:
            message = f"old checkpoints could not be deleted: {outcome.why}"
            self._tell("checkpoint-retention-failed", message, level="warning")

    def newest(self) -> CheckpointInfo | None:
        """The newest durable one that training can go on from, as far as rank 0 knows; None on other ranks."""
        usable = [info for info in self._told.values() if info.resumable and info.state is not CheckpointState.bad]
        return max(usable, key=lambda info: catalog.age_key(_name_of(info)), default=None)

    def stalled(self) -> float:
        """Seconds since the last call that training waited for copies besides what `save` took."""
        return self._stager.stalled()

    # -- restoring ---------------------------------------------------------------------------------------------------

    def restore(self, state: TrainState, *, which: str = "latest", must_be_numbers: bool = False) -> Stored | None:
        """Loads the newest valid checkpoint into `state` (`which="best"`: the best valid one; or the one of that name);
        None if there is none. Those that are no good are passed over, unless one is named; with `must_be_numbers` also
        one whose model holds nan, which is no good from then on. Damaged ones are quarantined on the way, and what all
        ranks had written when they died is
        committed. Tells the diary of all that exist.

        Raises CheckpointMismatch when it belongs to other code, Unreadable when the storage does not answer.
        """
        self._stager.settle()
        names = json.loads(self._on_main(lambda: self._candidates(which), Unreadable, self._storage.uri()))
        skipped = 0
        for name in names:
            with self._in_use(name):
                stored, why = self._read_together(name, state)
            if stored is None:
                self._quarantine(name, why)
                skipped += 1
                continue
            if must_be_numbers and (found := self._nan_together(stored.snapshot)):
                self._pass_over(stored.manifest, found)
                continue
            state.apply(stored.snapshot, keeps_settings=is_clone(stored.manifest))
            if skipped:
                message = f"{name} is used instead of {skipped} newer, damaged one(s)"
                self._tell("checkpoint-fallback", message, checkpoint=name)
            return stored
        if skipped:
            message = "no valid checkpoint is left: training starts from the beginning"
            self._tell("checkpoint-fallback", message, level="error")
        return None

    def _candidates(self, which: str) -> str:
        found = catalog.scan(self._storage)
        for name, error in found.corrupt:
            self._quarantine(name, str(error))
        committed = [*found.committed, *filter(None, map(self._finished, found.incomplete))]
        committed.sort(key=lambda manifest: catalog.age_key(manifest.name), reverse=True)
        self._tell_of_deleted(committed)
        marks = goodness.marks(self._storage)
        bad = {each.name: why for each in committed if (why := goodness.why_bad(each, marks))}
        for manifest in reversed(committed):
            if manifest.name in bad:
                self._call_bad(manifest)
                continue
            self._told[manifest.name] = CheckpointInfo.of(manifest, self._storage.uri(manifest.name))
            if manifest.attempt == self._attempt:  # a clone: its name is taken
                _, step, again = catalog.age_key(manifest.name)
                self._counts[step] = max(self._counts.get(step, 0), again)
            self._diary.checkpoint(self._told[manifest.name])
        usable = [manifest for manifest in committed if manifest.resumable and manifest.name not in bad]
        if which in bad:
            usable = [manifest for manifest in committed if manifest.resumable]
        elif passed := [name for name in bad if not usable or catalog.age_key(name) > catalog.age_key(usable[0].name)]:
            message = f"{len(passed)} newer checkpoint(s) are passed over, the newest {passed[0]}: {bad[passed[0]]}"
            self._tell("checkpoint-passed-over", message, checkpoints=passed)
        if which == "best":
            usable = ranked(usable, self._rules.best[0])
        elif which != "latest":
            usable = [manifest for manifest in usable if manifest.name == which]
        return json.dumps([manifest.name for manifest in usable])

    def _finished(self, name: str) -> Manifest | None:
        """The checkpoint that an earlier attempt wrote and did not live to commit."""
        try:
            return commit.finish(self._storage.join(name))
        except CheckpointError as error:
            logger.info("%s stays unfinished: %s", name, error, extra={"run": self._run})
            return None

    def _read_together(self, name: str, state: TrainState) -> tuple[Stored | None, str]:
        """The checkpoint if it is right on every rank, else None and why. Every byte is verified before any is used."""
        inside = self._storage.join(name)
        stored, reply = None, {"verdict": "valid", "why": ""}
        try:
            manifest = read_manifest(inside)
            stored = read(
                inside, manifest, rank=self._group.rank, world_size=self._group.world_size,
                boxes=state.boxes(shapes(manifest)),
            )  # fmt: skip
        except (CheckpointCorrupt, FileNotFoundError) as error:
            reply = {"verdict": "corrupt", "why": _told(error)}
        except Exception as error:  # whatever it is, the other ranks wait to hear of it
            reply = {"verdict": "unreadable", "why": _told(error)}
        replies = [json.loads(text) for text in self._group.gather(json.dumps(reply))]
        for verdict in ("unreadable", "corrupt"):
            wrong = [f"rank {rank}: {each['why']}" for rank, each in enumerate(replies) if each["verdict"] == verdict]
            if wrong and verdict == "unreadable":
                raise Unreadable(inside.uri(), "; ".join(wrong))
            if wrong:
                return None, "; ".join(wrong)
        return stored, ""

    def _nan_together(self, snapshot: Snapshot) -> str:
        """Collective. The first tensor of the model with nan in it, on any rank; "" if there is none."""
        return next(filter(None, self._group.gather(_nan_in(snapshot))), "")

    def _pass_over(self, manifest: Manifest, tensor: str) -> None:
        if self._group.rank != 0:
            return
        why = f"{tensor} holds nan"
        made = goodness.Mark(attempt=manifest.attempt, good_step=manifest.step - 1, why=why, at=self._clock.now())
        with suppress(OSError):  # then the next attempt finds it again
            goodness.mark(self._storage, made)
        self._call_bad(manifest)
        self._tell("checkpoint-passed-over", f"{manifest.name} is passed over: {why}", checkpoints=[manifest.name])

    def _tell_of_deleted(self, committed: Sequence[Manifest]) -> None:
        """What others deleted since this run saved last: a neighbour for the quota, a user."""
        since = max((each.created + each.duration for each in committed), default=0.0) - _CLOCKS_DIFFER
        for name in catalog.deleted_names(self._storage, since=since):
            if (note := catalog.deletion(self._storage, name)) is not None:
                self._diary.checkpoint(CheckpointInfo.from_json(note))

    @contextmanager
    def _in_use(self, name: str) -> Iterator[None]:
        """Nobody deletes it meanwhile, where we may say so."""
        with ExitStack() as held:
            if self._group.rank == 0:
                with suppress(OSError):
                    held.enter_context(catalog.in_use(self._storage, name, now=self._clock.now()))
            yield

    def _quarantine(self, name: str, why: str) -> None:
        if self._group.rank != 0:
            return
        with suppress(OSError):
            if not self._storage.exists(f"{name}/{MANIFEST}"):
                self._tell("checkpoint-gone", f"{name} was deleted before it was read", checkpoint=name)
                return
        message = f"{name} is damaged and will not be used: {why}"
        self._tell("checkpoint-quarantined", message, level="error", checkpoint=name)
        try:
            manifest = read_manifest(self._storage.join(name))
            self._diary.checkpoint(CheckpointInfo.of(manifest, self._storage.uri(name), CheckpointState.quarantined))
        except (CheckpointError, OSError):
            pass  # the manifest itself is what is damaged: then the event is all that can be told
        try:
            catalog.quarantine(self._storage, name, why, now=self._clock.now())
        except OSError as error:
            self._tell("checkpoint-quarantine-failed", f"{name} could not be marked: {error}", checkpoint=name)

    # -- together ----------------------------------------------------------------------------------------------------

    def _on_main(self, action: Callable[[], str], failure: type[SaveFailed] | type[Unreadable], uri: str) -> str:
        """What `action` gives on rank 0, for all ranks; its exception becomes `failure` on all of them."""
        cause: Exception | None = None
        reply = {"error": "", "value": ""}
        if self._group.rank == 0:
            try:
                reply["value"] = action()
            except Exception as error:  # whatever it is, the other ranks wait to hear of it
                reply["error"], cause = _told(error), error
        reply = json.loads(self._group.share(json.dumps(reply)))
        if reply["error"]:
            raise failure(uri, reply["error"]) from cause
        return reply["value"]

    def _raise_together(self, error: Exception | None, uri: str) -> NoReturn:
        """Raises on all ranks what went wrong on some."""
        mine = {"error": "" if error is None else _told(error), "is_state": isinstance(error, NotStorable)}
        replies = [json.loads(text) for text in self._group.gather(json.dumps(mine))]
        why = "; ".join(f"rank {rank}: {each['error']}" for rank, each in enumerate(replies) if each["error"])
        if any(each["is_state"] for each in replies):
            raise StateRefused(why) from error
        raise SaveFailed(uri, why) from error

    def _tell(self, kind: str, message: str, *, level: str = "warning", **details: Any) -> None:
        if self._group.rank == 0:
            logger.log(logging.ERROR if level == "error" else logging.WARNING, message, extra={"run": self._run})
            self._diary.event(kind, message, level=level, **details)


def _tensors(layout: Layout, snapshot: Snapshot) -> list[torch.Tensor]:
    """Those of the layout's pieces, in their order. Collective if some are to be put together first."""
    gathered = {}
    if snapshot.spread:
        gathered = snapshot.gathered(
            {f"{image.path.partition('/')[0]}/{piece.name}" for image in layout.images for piece in image.pieces}
        )
    found = []
    for image in layout.images:
        group, _, name = image.path.partition("/")
        if group == plan.SIDE:
            data = snapshot.files[name]
            found.append(torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0))
            continue
        tensors = snapshot.own if group == plan.OWN else snapshot.tensors[group]
        if gathered:
            found += [gathered.get(f"{group}/{piece.name}", tensors[piece.name]) for piece in image.pieces]
        else:
            found += [tensors[piece.name] for piece in image.pieces]
    return found


def _late(layout: Layout, snapshot: Snapshot | None) -> tuple[bool, ...]:
    """Which of the layout's pieces nothing but a step of an optimizer changes."""
    assert snapshot is not None
    return tuple(
        (key := f"{image.path.partition('/')[0]}/{piece.name}") in snapshot.shared or key in snapshot.parts
        for image in layout.images
        for piece in image.pieces
    )


def _not_finite(snapshot: Snapshot) -> str:
    """The first of the model's parameters with a value that is no number; "" if there is none. Of a split parameter,
    this rank's part is looked at."""
    for name, tensor in snapshot.tensors["model"].items():
        is_parameter = f"model/{name}" in snapshot.shared or f"model/{name}" in snapshot.parts
        if not is_parameter or not (tensor.is_floating_point() or tensor.is_complex()):
            continue
        wide = (
            tensor.detach().float() if tensor.element_size() == 1 else tensor.detach()
        )  # float8 knows no such question
        if not bool(torch.isfinite(wide).all()):
            return name
    return ""


def _nan_in(snapshot: Snapshot) -> str:
    """The first of the model's tensors, as they were stored, with nan in it; "" if there is none. Infinity may be
    meant: masks have it."""
    for name, tensor in snapshot.tensors["model"].items():
        if not (tensor.is_floating_point() or tensor.is_complex()):
            continue
        wide = tensor.float() if tensor.element_size() == 1 else tensor
        if bool(torch.isnan(wide).any()):
            return name
    return ""


def _size_bytes(groups: plan.Groups, files: Mapping[str, int]) -> int:
    return plan.size_bytes(groups) + sum(files.values())


def _committed_info(info: CheckpointInfo, outcome: Outcome) -> CheckpointInfo:
    return replace(
        info, state=CheckpointState.committed, manifest_sha256=outcome.manifest_sha256, size_bytes=outcome.size_bytes,
        duration=outcome.duration,
    )  # fmt: skip


def _failure_of(outcome: Outcome) -> str:
    """Why there is no checkpoint; "" if nothing went wrong."""
    if outcome.result in (SlotResult.failed, SlotResult.abandoned):
        return outcome.why or f"its writer says {outcome.result.value}"
    return ""


def _name_of(info: CheckpointInfo) -> str:
    return info.id.rpartition("/")[2]


def _told(error: Exception) -> str:
    return f"{error}" or type(error).__name__
