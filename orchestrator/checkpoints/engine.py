"""Saves and restores the checkpoints of one run, together on all ranks."""

from __future__ import annotations

import json
import logging
import platform
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from typing import Any, Protocol

import torch

from orchestrator.backends.storage import Storage
from orchestrator.checkpoints import catalog, writer
from orchestrator.checkpoints.manifest import CheckpointInfo, CheckpointState, FileEntry, Manifest
from orchestrator.checkpoints.policy import CheckpointPolicy
from orchestrator.checkpoints.reader import Stored, read, read_manifest
from orchestrator.checkpoints.retention import to_delete
from orchestrator.checkpoints.state import TrainState
from orchestrator.checkpoints.tree import NotStorable
from orchestrator.clock import Clock
from orchestrator.errors import CheckpointCorrupt, CheckpointError, UserError

logger = logging.getLogger(__name__)


class Group(Protocol):
    """The ranks of a training. Every method is collective; implemented by training/group.py."""

    rank: int
    world_size: int

    def share(self, text: str) -> str: ...
    def gather(self, text: str) -> list[str]: ...


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


class StateRefused(CheckpointError, UserError):
    """The state that was to be saved holds something that cannot be stored."""

    def __init__(self, why: str) -> None:
        super().__init__(why)
        self.why = why

    def __str__(self) -> str:
        return f"run.state(…) holds what no checkpoint can: {self.why}"


class Unreadable(CheckpointError):
    """The storage did not answer while a checkpoint was read. That says nothing about the checkpoint, so nothing is
    skipped."""

    def __init__(self, uri: str, why: str) -> None:
        super().__init__(uri, why)
        self.uri, self.why = uri, why

    def __str__(self) -> str:
        return f"Checkpoints under {self.uri} could not be read: {self.why}. Try again when the storage answers."


class Checkpoints:
    """The checkpoints of one run, under `storage`.

    `save` and `restore` are collective: all ranks call them together, rank 0 decides, and all of them return the same
    thing or raise the same error. Whatever dies whenever: what `restore` finds is the newest checkpoint that was
    completely written.
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
        seed: int = 0,
        config_hash: str = "",
    ) -> None:
        self._storage, self._group, self._policy, self._clock, self._diary = storage, group, policy, clock, diary
        self._run, self._attempt, self._seed, self._config_hash = run, attempt, seed, config_hash
        self._committed: list[Manifest] | None = None
        self._orphans: tuple[str, ...] = ()

    # -- saving ------------------------------------------------------------------------------------------------------

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
    ) -> CheckpointInfo:
        """Writes a checkpoint and waits until it is durable. Raises SaveFailed or StateRefused, on all ranks.

        `progress` is JSON that belongs to the run, `rank_state` what differs between ranks, `data` the position in
        the data.
        """
        started, created = self._clock.monotonic(), self._clock.now()
        name = self._on_main(lambda: self._free_name(step), SaveFailed)
        target = self._storage.join(name)
        files = self._write_files(name, state, progress, rank_state)

        def commit() -> str:
            manifest = Manifest(
                run=self._run, name=name, attempt=self._attempt, step=step, epoch=epoch, epoch_complete=epoch_complete,
                world_size=self._group.world_size, seed=self._seed, config_hash=self._config_hash, created=created,
                duration=self._clock.monotonic() - started, files=tuple(files), metrics=metrics, is_best=is_best,
                reasons=tuple(reasons), label=f"v{epoch}.{step}", data=data,
                versions={"torch": torch.__version__, "python": platform.python_version()},
            )  # fmt: skip
            writer.commit(target, manifest)
            return manifest.encode().decode()

        manifest = Manifest.decode(self._on_main(commit, SaveFailed).encode(), target.uri())
        info = CheckpointInfo.of(manifest, target.uri())
        if self._group.rank == 0:
            logger.info("checkpoint committed", extra={"run": self._run, "step": step, "uri": info.uri})
            self._diary.checkpoint(info)
            self._forget_old(manifest)
        return info

    def _free_name(self, step: int) -> str:
        again = 1
        while self._storage.exists(name := writer.directory_name(step, self._attempt, again)):
            again += 1
        return name

    def _write_files(
        self, name: str, state: TrainState, progress: Mapping[str, Any], rank_state: Mapping[str, Any]
    ) -> list[FileEntry]:
        """Each rank writes its part; all of them go on only if all could."""
        target = self._storage.join(name)
        reply: dict[str, Any] = {}
        try:
            files = [writer.write_rank(target, self._group.rank, rank_state)]
            if self._group.rank == 0:
                files += writer.write_shared(target, state.capture(), progress)
            reply["files"] = [asdict(file) for file in files]
        except Exception as error:  # whatever it is, the other ranks wait to hear of it
            reply["error"], reply["is_state"] = _told(error), isinstance(error, NotStorable)
            failure: Exception | None = error
        else:
            failure = None
        replies = [json.loads(text) for text in self._group.gather(json.dumps(reply))]
        wrong = [f"rank {rank}: {each['error']}" for rank, each in enumerate(replies) if "error" in each]
        if wrong:
            if self._group.rank == 0:
                with suppress(OSError):
                    self._storage.delete_dir(name)
            if any(each.get("is_state") for each in replies):
                raise StateRefused("; ".join(wrong)) from failure
            raise SaveFailed(target.uri(), "; ".join(wrong)) from failure
        return [FileEntry.from_json(file) for each in replies for file in each["files"]]

    # -- restoring ---------------------------------------------------------------------------------------------------

    def restore(self, state: TrainState) -> Stored | None:
        """Loads the newest valid checkpoint into `state`; None if there is none. Damaged ones are quarantined on the
        way.

        Raises CheckpointMismatch when it belongs to other code, Unreadable when the storage does not answer.
        """
        names = json.loads(self._on_main(self._candidates, Unreadable))
        skipped = 0
        for name in names:
            stored, why = self._read_together(name)
            if stored is None:
                self._quarantine(name, why)
                skipped += 1
                continue
            state.apply(stored.snapshot)
            if skipped:
                message = f"{name} is used instead of {skipped} newer, damaged one(s)"
                self._tell("checkpoint-fallback", message, checkpoint=name)
            return stored
        if skipped:
            message = "no valid checkpoint is left: training starts from the beginning"
            self._tell("checkpoint-fallback", message, level="error")
        return None

    def _candidates(self) -> str:
        found = catalog.scan(self._storage)
        for name, error in found.corrupt:
            self._quarantine(name, str(error))
        return json.dumps([manifest.name for manifest in found.committed])

    def _read_together(self, name: str) -> tuple[Stored | None, str]:
        """The checkpoint if it is right on every rank, else None and why. Every byte is verified before any is used."""
        inside = self._storage.join(name)
        stored, reply = None, {"verdict": "valid", "why": ""}
        try:
            stored = read(inside, read_manifest(inside), rank=self._group.rank, world_size=self._group.world_size)
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

    def _quarantine(self, name: str, why: str) -> None:
        if self._group.rank != 0:
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

    # -- keeping -----------------------------------------------------------------------------------------------------

    def _forget_old(self, newest: Manifest) -> None:
        """Deletes what no rule keeps, after a newer one is committed. A failure here costs space, not the run."""
        try:
            if self._committed is None:
                found = catalog.scan(self._storage)
                self._committed, self._orphans = list(found.committed), found.incomplete
            else:
                self._committed.insert(0, newest)
            pinned = [m.name for m in self._committed if self._storage.exists(f"{m.name}/{catalog.PINNED}")]
            for manifest in to_delete(self._committed, self._policy, pinned):
                self._remove(manifest)
            self._sweep()
        except (OSError, CheckpointError) as error:
            self._tell("checkpoint-retention-failed", f"old checkpoints could not be deleted: {error}", level="warning")

    def _remove(self, manifest: Manifest) -> None:
        catalog.remove(self._storage, manifest.name)
        assert self._committed is not None
        self._committed.remove(manifest)
        self._diary.checkpoint(CheckpointInfo.of(manifest, self._storage.uri(manifest.name), CheckpointState.deleted))

    def _sweep(self) -> None:
        """What earlier attempts left half written. Were one of them still alive, its commit would lack files and be
        refused."""
        for name in self._orphans:
            if catalog.age_key(name)[0] < self._attempt:
                catalog.remove(self._storage, name)
        self._orphans = ()

    # -- together ----------------------------------------------------------------------------------------------------

    def _on_main(self, action: Callable[[], str], failure: type[SaveFailed] | type[Unreadable]) -> str:
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
            raise failure(self._storage.uri(), reply["error"]) from cause
        return reply["value"]

    def _tell(self, kind: str, message: str, *, level: str = "warning", **details: Any) -> None:
        if self._group.rank == 0:
            logger.log(logging.ERROR if level == "error" else logging.WARNING, message, extra={"run": self._run})
            self._diary.event(kind, message, level=level, **details)


def _told(error: Exception) -> str:
    return f"{error}" or type(error).__name__
