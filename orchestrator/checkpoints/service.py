"""The writer of a machine: takes what trainers sealed in memory to the storage, and commits it.

Several members, threads or processes may work under one slab root: slots are divided by locks. One of them, the serving
one, also gives out memory and clears up after trainers that died. All state is in slabs and in the storage: a member
may be killed at any point, and another one, or the next one, goes on.

Nothing here imports torch.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import select
import shutil
import socket
import threading
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from orchestrator.backends.storage import Storage
from orchestrator.checkpoints import commit, writer
from orchestrator.checkpoints import slab as slab_file
from orchestrator.checkpoints.job import KeepRules, Layout, Outcome, SaveJob, SlotResult
from orchestrator.checkpoints.keeping import Keeping, Tidied
from orchestrator.checkpoints.local import places
from orchestrator.checkpoints.local.requests import Requests
from orchestrator.checkpoints.manifest import MANIFEST, CheckpointInfo, CheckpointState, Manifest, rank_file
from orchestrator.checkpoints.memory import NO_LIMIT, grant
from orchestrator.checkpoints.slab import Owner, Ready, SlabDamaged, SlabFile, Slot, State
from orchestrator.clock import Clock, SystemClock
from orchestrator.errors import CheckpointCorrupt
from orchestrator.monitoring.cgroup import ControlGroup
from orchestrator.records import Fact, FactKind

logger = logging.getLogger(__name__)

ORPHAN = 60.0
"""Seconds that memory is kept warm for the next attempt after its trainer is gone."""
PROMISE = 15.0
"""Seconds that a trainer has for taking what was given to it."""
PULSE = 0.5
"""Seconds between two looks when no bell rings."""
_KEEPINGS = 16
"""Runs whose checkpoints are remembered between two commits."""
_FIRST_PAUSE, _LONGEST_PAUSE = 0.01, 0.5


@dataclass(kw_only=True)
class _Known:
    """A slab that this member has open."""

    slab: SlabFile
    orphan_since: float | None = None
    """Since when no trainer has it."""
    promised_until: float = 0.0


@dataclass(kw_only=True)
class _Held:
    """A slot that this member has claimed."""

    slab: SlabFile
    slot: Slot
    was_begun: bool
    """Another writer had it before, and died."""
    is_busy: bool = True
    job: SaveJob | None = None
    """Known once its files are written; then it waits for the commit."""
    since: float = 0.0
    due: float = 0.0
    pause: float = _FIRST_PAUSE


class WriterService:
    """Writes what is sealed under `root`; serves leases if no other member does. All state is in slabs and storage:
    kill it anywhere.

    `memory_bytes` is what all slabs together may take, 0 what the machine has. `step` may be called by several threads.
    """

    def __init__(self, root: str, *, threads: int = 2, memory_bytes: int = 0, clock: Clock | None = None) -> None:
        self._root, self._threads = Path(root), threads
        self._memory_bytes = memory_bytes
        self._clock = clock or SystemClock()
        places.prepare(self._root)
        self._lock = threading.Lock()
        self._looking, self._leasing, self._tidying = threading.Lock(), threading.Lock(), threading.Lock()
        self._stopped = threading.Event()
        self._known: dict[Path, _Known] = {}
        self._held: dict[tuple[Path, int], _Held] = {}
        self._storages: dict[str, Storage] = {}
        self._keepings: dict[tuple[str, int, KeepRules], Keeping] = {}
        self._last_error = ""
        self._written = self._committed = self._refused = 0
        self._serving_fd = -1
        self._requests: Requests | None = None
        self._is_listening = False
        self._asked = self._asked_seen = 0
        self.number, self._member_fd = _join(self._root)
        self._bell = _bell(places.bell(self._root, self.number))

    # -- running -----------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Until `stop`, or until the slab root is removed. Work that is begun by then is ended."""
        others = [threading.Thread(target=self._loop, name=f"writer-{n}") for n in range(1, self._threads)]
        for thread in others:
            thread.start()
        self._loop()
        for thread in others:
            thread.join()

    def _loop(self) -> None:
        while not self._stopped.is_set():
            try:
                if self.step(self._clock.monotonic()):
                    continue
            except Exception as error:
                if not self._root.exists():
                    logger.info("%s was removed: nobody seals anything there any more", self._root)
                    self._stopped.set()
                    return
                self._fault("looking after the slots failed", error)
            self._wait()

    def stop(self) -> None:
        self._stopped.set()
        self._ring()

    def close(self) -> None:
        """Gives everything back that this member holds. Sealed slots stay for the next one."""
        if self._requests is not None:
            self._requests.close()
        for held in self._held.values():
            held.slab.release(held.slot.index)
        self._held.clear()
        for known in self._known.values():
            known.slab.close()
        self._known.clear()
        self._bell.close()
        places.bell(self._root, self.number).unlink(missing_ok=True)
        for fd in (self._serving_fd, self._member_fd):
            if fd >= 0:
                os.close(fd)

    def step(self, now: float) -> bool:
        """Looks around, then does one thing: writes a slot, or tries to commit one. True if something moved. `now` is
        monotonic."""
        self._look_around(now)
        held = self._next(now)
        if held is None:
            return False
        try:
            return self._advance(held, now)
        except Exception as error:  # of one save: the others go on
            self._fault(f"slot {held.slot.name} could not be written", error)
            self._end(held, self._outcome(held, SlotResult.failed, f"{type(error).__name__}: {error}"))
            return True
        finally:
            held.is_busy = False

    def _wait(self) -> None:
        with self._lock:
            dues = [held.due for held in self._held.values() if not held.is_busy]
        pause = min(PULSE, max(0.0, min(dues, default=PULSE) - self._clock.monotonic())) if dues else PULSE
        select.select([self._bell], [], [], pause)
        with contextlib.suppress(BlockingIOError):
            while True:
                self._bell.recv(16)

    def _ring(self) -> None:
        """Wakes a thread of our own."""
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
            sender.setblocking(False)
            sender.sendto(b"!", str(places.bell(self._root, self.number)))

    # -- what there is -----------------------------------------------------------------------------------------------

    def _look_around(self, now: float) -> None:
        if not self._looking.acquire(blocking=False):
            return
        try:
            self._try_to_serve()
            self._open_new(now)
            if self.is_serving:
                for path, known in list(self._known.items()):
                    self._look_after(path, known, now)
        finally:
            self._looking.release()

    def _open_new(self, now: float) -> None:
        directory = places.slabs(self._root)
        there = {directory / name for name in os.listdir(directory)}
        for path in there - self._known.keys():
            if path.suffix == slab_file.SUFFIX:
                self._open(path, now)
            elif self.is_serving and _age(path) > ORPHAN and not self._is_wanted(path):
                path.unlink(missing_ok=True)  # whoever made it died over it
        for path in self._known.keys() - there:
            with self._lock:
                if not any(key[0] == path for key in self._held):
                    self._known.pop(path).slab.close()

    def _open(self, path: Path, now: float) -> None:
        try:
            slab = SlabFile(path)
        except FileNotFoundError:
            return
        except SlabDamaged as error:
            if self.is_serving and slab_file.remove_unused(path):
                self._fault("memory was given up", error)
            return
        with self._lock:
            self._known[path] = _Known(slab=slab, promised_until=now + PROMISE)

    def _is_wanted(self, path: Path) -> bool:
        """A job that lies beside its slab."""
        return path.suffix == slab_file.ASIDE and path.with_suffix("").with_suffix(slab_file.SUFFIX) in self._known

    def _look_after(self, path: Path, known: _Known, now: float) -> None:
        """What only the serving member does, to memory whose trainer is gone."""
        slab = known.slab
        if slab.has_filler():
            known.orphan_since, known.promised_until = None, 0.0
            return
        if known.orphan_since is None:
            known.orphan_since = now
        if now < known.promised_until and not slab.was_taken():
            return
        for slot in slab.slots:
            if slot.state is State.filling:
                slot.cancel()  # nothing was promised
        if now - known.orphan_since >= ORPHAN and _is_empty(slab):
            self._remove(path)

    def _remove(self, path: Path) -> None:
        with self._lock:
            slab_file.remove(path)
            known = self._known.pop(path, None)
        if known is not None:
            known.slab.close()

    # -- writing -----------------------------------------------------------------------------------------------------

    def _next(self, now: float) -> _Held | None:
        """Something to do, which is this thread's from now on. The oldest seal first, then commits: these may wait for
        what is not written yet."""
        with self._lock:
            free = [
                (slot.sealed_at, path, known.slab, slot)
                for path, known in self._known.items()
                for slot in known.slab.slots
                if slot.state >= State.sealed and (path, slot.index) not in self._held
            ]
            for _, path, slab, slot in sorted(free, key=lambda each: each[0]):
                if not slab.try_claim(slot.index):
                    continue
                state = slot.state
                if state < State.sealed:  # another member was faster
                    slab.release(slot.index)
                    continue
                held = _Held(slab=slab, slot=slot, was_begun=state is not State.sealed)
                self._held[path, slot.index] = held
                if len(free) > 1 and self._threads > 1:
                    self._ring()
                return held
            due = [held for held in self._held.values() if not held.is_busy and held.due <= now]
            if due:
                held = min(due, key=lambda each: each.due)
                held.is_busy = True
                return held
        return None

    def _advance(self, held: _Held, now: float) -> bool:
        if held.job is not None:
            return self._try_to_commit(held, held.job, now)
        try:
            layout, job = held.slot.job()
        except SlabDamaged as error:
            self._fault("a sealed slot is damaged", error)
            self._end(held, Outcome(save=held.slot.save, name="", result=SlotResult.failed, why=str(error)))
            return True
        if held.slot.is_abandoned():
            self._end(held, self._outcome_of(job, SlotResult.abandoned))
            return True
        held.slot.begin_writing()
        try:
            size = self._write(held, layout, job)
        except Exception as error:
            self._fault(f"{job.name} of {job.run} was not written", error)
            with contextlib.suppress(Exception):
                inside = self._storage(job).join(job.name)
                commit.write_failure(inside, save=job.save, rank=job.rank, why=f"{type(error).__name__}: {error}")
            self._end(held, self._outcome_of(job, SlotResult.failed, f"{type(error).__name__}: {error}"))
            return True
        self._written += 1
        held.slot.is_written()
        if job.rank != 0:
            self._end(held, self._outcome_of(job, SlotResult.durable, size_bytes=size))
            return True
        held.since = held.due = self._clock.monotonic()  # the write may have taken long
        held.job = job
        return True

    def _write(self, held: _Held, layout: Layout, job: SaveJob) -> int:
        """Bytes written. What a writer that died had ended is not written again: its receipt may stand in a manifest
        by now, and ours would have another hash."""
        storage = self._storage(job)
        if held.was_begun and (receipt := _receipt(storage.join(job.name), job.save, job.rank)):
            return sum(file.size_bytes for file in receipt.files)
        receipt = writer.write_job(job, layout, held.slot.images(layout), storage)
        return sum(file.size_bytes for file in receipt.files)

    # -- committing --------------------------------------------------------------------------------------------------

    def _try_to_commit(self, held: _Held, job: SaveJob, now: float) -> bool:
        storage = self._storage(job)
        inside = storage.join(job.name)
        if held.slot.is_abandoned():
            self._give_up(held, job, SlotResult.abandoned, "")
            return True
        try:
            manifest = commit.finish(inside)
        except (commit.CommitRefused, CheckpointCorrupt) as error:
            self._give_up(held, job, SlotResult.failed, str(error))
            return True
        except OSError as error:
            self._fault(f"{job.name} of {job.run} was not committed yet", error)
            manifest = None
        if manifest is not None:
            self._after_commit(held, job, storage, manifest)
            return True
        if why := self._hopeless(inside, job):
            self._give_up(held, job, SlotResult.failed, why)
            return True
        if now - held.since >= job.wait_for_ranks:
            why = f"not all {job.world_size} ranks had written their files after {job.wait_for_ranks:.0f} s"
            self._end(held, self._outcome_of(job, SlotResult.failed, why))  # they may come: a restore can still commit
            return True
        held.due = now + held.pause
        held.pause = min(2 * held.pause, _LONGEST_PAUSE)
        return False

    def _hopeless(self, inside: Storage, job: SaveJob) -> str:
        """Why a rank of this machine will never write its part; '' if nothing speaks for that."""
        with self._lock:
            slabs = [known.slab for known in self._known.values()]
        is_there: dict[int, bool] = {}
        """By rank: one that needed more memory has left a slab behind, and is not dead for that."""
        for slab in slabs:
            with contextlib.suppress(SlabDamaged, ValueError):
                owner = slab.owner
                if (owner.run, owner.attempt) != (job.run, job.attempt) or owner.rank == job.rank:
                    continue
                is_there[owner.rank] = is_there.get(owner.rank, False) or slab.has_filler()
                for slot in slab.slots:
                    if slot.save != job.save:
                        continue
                    outcome = slot.result(slot.generation)
                    if outcome is not None and outcome.save == job.save:
                        if outcome.result is SlotResult.failed:
                            return f"rank {owner.rank} could not write its files: {outcome.why}"
                        is_there[owner.rank] = True
                    # The token alone says nothing: it is written before the seal, and stays if that never comes.
                    elif slot.state >= State.sealed:
                        is_there[owner.rank] = True
        for rank in sorted(rank for rank, is_so in is_there.items() if not is_so):
            if _receipt(inside, job.save, rank) is None:
                return f"rank {rank} died before its part was in memory"
        return ""

    def _give_up(self, held: _Held, job: SaveJob, result: SlotResult, why: str) -> None:
        """Nobody can commit it any more: its files go, the receipt first, so that nobody does now."""
        inside = self._storage(job).join(job.name)
        with contextlib.suppress(OSError):
            receipt = _receipt(inside, job.save, job.rank)
            if receipt is not None:
                inside.delete(rank_file(job.rank))
            if receipt is not None and not inside.exists(MANIFEST):
                self._storage(job).delete_dir(job.name)
        self._end(held, self._outcome_of(job, result, why))

    def _after_commit(self, held: _Held, job: SaveJob, storage: Storage, manifest: Manifest) -> None:
        if manifest.save != job.save:
            self._end(held, self._outcome_of(job, SlotResult.failed, "another save lies under its name"))
            return
        self._committed += 1
        tidied = self._tidied(job, manifest)
        if tidied.why:
            logger.warning("after the commit of %s: %s", manifest.id, tidied.why, extra={"run": job.run})
        if job.spool_directory and not held.slab.has_filler():
            self._tell(job, storage, manifest, tidied)
        outcome = self._outcome_of(
            job, SlotResult.committed, tidied.why, manifest_sha256=manifest.digest, size_bytes=manifest.size_bytes,
            duration=manifest.duration, deleted=tuple(each.name for each in tidied.deleted), for_quota=tidied.for_quota,
        )  # fmt: skip
        logger.info("checkpoint committed", extra={"run": job.run, "step": manifest.step})
        self._end(held, outcome)

    def _tell(self, job: SaveJob, storage: Storage, manifest: Manifest, tidied: Tidied) -> None:
        """In the trainer's place, which is gone. Opened and closed at once: an open spool would keep the run alive."""
        from orchestrator.tracking.logger import Logger  # a writer that never does this needs none of it

        infos = [CheckpointInfo.of(manifest, storage.uri(manifest.name))]
        infos += [CheckpointInfo.of(each, storage.uri(each.name), CheckpointState.deleted) for each in tidied.deleted]
        try:
            record = Logger(Path(job.spool_directory), run=job.run, attempt=job.attempt, rank=0)
            try:
                for info in infos:
                    record.fact(Fact(kind=FactKind.checkpoint, at=self._clock.now(), data=info.to_json()))
                if tidied.for_quota:
                    told = {"kind": "checkpoint-quota", "message": tidied.for_quota, "level": "warning"}
                    record.fact(Fact(kind=FactKind.event, at=self._clock.now(), data=told))
            finally:
                record.close()
        except Exception as error:  # the next restore tells it
            self._fault(f"{manifest.id} is committed, but its record could not be told", error)

    def _end(self, held: _Held, outcome: Outcome) -> None:
        held.slot.free(outcome)
        with self._lock:
            self._held.pop((held.slab.path, held.slot.index), None)
        held.slab.release(held.slot.index)

    def _outcome(self, held: _Held, result: SlotResult, why: str) -> Outcome:
        name = held.job.name if held.job is not None else ""
        return Outcome(save=held.slot.save, name=name, result=result, why=why)

    def _outcome_of(self, job: SaveJob, result: SlotResult, why: str = "", **more: Any) -> Outcome:
        return Outcome(save=job.save, name=job.name, result=result, why=why, **more)

    def _storage(self, job: SaveJob) -> Storage:
        storage = self._storages.get(job.storage_url)
        if storage is None:
            storage = self._storages[job.storage_url] = Storage(job.storage_url)
        return storage

    def _tidied(self, job: SaveJob, manifest: Manifest) -> Tidied:
        """Never raises: the checkpoint is safe whatever happens here. One thread at a time; what is known of an
        attempt's checkpoints is kept from commit to commit."""
        of = job.storage_url, job.attempt, replace(job.keep, vouched=-1)  # that changes with each save
        with self._tidying:
            try:
                keeping = self._keepings.pop(of, None) or Keeping(self._storage(job), job.keep, attempt=job.attempt)
                keeping.vouch(job.keep.vouched)
                self._keepings[of] = keeping
                while len(self._keepings) > _KEEPINGS:
                    del self._keepings[next(iter(self._keepings))]
                return keeping.after_commit(manifest, now=self._clock.now())
            except Exception as error:
                return Tidied(why=f"{type(error).__name__}: {error}")

    def _fault(self, what: str, error: BaseException) -> None:
        self._last_error = f"{what}: {type(error).__name__}: {error}"
        logger.warning("%s", self._last_error)

    # -- giving out memory -------------------------------------------------------------------------------------------

    @property
    def is_serving(self) -> bool:
        return self._serving_fd >= 0

    def serve(self) -> None:
        """From now on requests are answered over the socket, while this member is the serving one."""
        self._is_listening = True

    def _try_to_serve(self) -> None:
        if self._serving_fd < 0:
            fd = os.open(places.serving_lock(self._root), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                os.close(fd)
                return
            self._serving_fd = fd
        if self._requests is None and self._is_listening:
            self._requests = Requests(places.request_socket(self._root), self._answer)

    def _answer(self, method: str, given: Mapping[str, Any]) -> Any:
        self._asked += 1
        match method:
            case "lease":
                return self.lease(given["slot_bytes"], given["owner"], slots=given.get("slots", 2))
            case "describe":
                return self.describe()
            case "health":
                return self.health()
            case "stop":
                return self.stop()
        raise ConnectionError(f"there is no method {method}")

    def lease(self, slot_bytes: int, owner: Mapping[str, Any], *, slots: int = 2) -> dict[str, Any]:
        """Memory for one rank's saves: `{"slab": path, "slots": n}`; slots 0: no room. Answers at once; the slab says
        `ready` when its pages exist. Whoever gets it takes its lock within PROMISE seconds."""
        who = Owner(**owner)
        with self._leasing:
            now = self._clock.monotonic()
            self._look_around(now)
            if not self.is_serving:
                raise ConnectionError("another member gives out the memory")
            path = self._warm(slot_bytes, slots, who, now)
            if path is None:
                path, slots = self._new(slot_bytes, slots, who, now)
        if path is None:
            self._refused += 1
            return {"slab": "", "slots": 0}
        return {"slab": str(path), "slots": slots}

    def _warm(self, slot_bytes: int, slots: int, owner: Owner, now: float) -> Path | None:
        for path, known in list(self._known.items()):
            slab = known.slab
            if slab.slot_bytes == slot_bytes and slab.slot_count == slots and self._is_to_spare(known, now):
                if slab.is_refused():
                    continue
                slab.hand_over(owner)
                known.promised_until, known.orphan_since = now + PROMISE, None
                return path
        return None

    def _is_to_spare(self, known: _Known, now: float) -> bool:
        is_over = known.slab.was_taken() or now >= known.promised_until
        return is_over and _is_empty(known.slab) and not known.slab.has_filler()

    def _new(self, slot_bytes: int, slots: int, owner: Owner, now: float) -> tuple[Path | None, int]:
        granted = min(slots, self._grant(slot_bytes))
        for path, known in sorted(self._known.items(), key=lambda item: item[1].orphan_since or now):
            if granted >= slots:
                break
            if self._is_to_spare(known, now):
                self._remove(path)
                granted = min(slots, self._grant(slot_bytes))
        if granted == 0:
            return None, 0
        path = places.slabs(self._root) / f"{uuid.uuid4().hex}{slab_file.SUFFIX}"
        slab_file.create(path, slots=granted, slot_bytes=slot_bytes, owner=owner)
        self._open(path, now)
        threading.Thread(target=self._populate, args=(path,), name="populate", daemon=True).start()
        return path, granted

    def _grant(self, slot_bytes: int) -> int:
        """First slots get two in all: the rest of a slab is one page, or 2 MiB."""
        with self._lock:
            slabs = [known.slab for known in self._known.values()]
        taken = sum(slab.size_bytes for slab in slabs)
        coming = sum(slab.size_bytes for slab in slabs if not slab.is_ready() and not slab.is_refused())
        room = shutil.disk_usage(self._root).free
        return grant(
            slot_bytes,
            free_shm=room - coming - slab_file.HUGE,
            available=_available() - coming,
            cgroup=ControlGroup().memory(),
            limit=self._memory_bytes - taken if self._memory_bytes else NO_LIMIT,
        )

    def _populate(self, path: Path) -> None:
        try:
            slab = SlabFile(path)
        except (OSError, SlabDamaged):
            return  # removed already
        try:
            slab_file.populate(slab)
            slab.tell(Ready.ready)
        except OSError as error:
            self._fault("no memory for staging", error)
            slab.tell(Ready.refused)
            slab_file.remove(path)
        finally:
            slab.close()

    # -- what can be asked -------------------------------------------------------------------------------------------

    def is_idle(self) -> bool:
        """No trainer has memory, nothing is sealed, and nobody asked anything since the last call."""
        was_asked, self._asked_seen = self._asked_seen != self._asked, self._asked
        with self._lock:
            if self._held or was_asked:
                return False
            slabs = [known.slab for known in self._known.values()]
        return not any(slab.has_filler() or any(s.state >= State.sealed for s in slab.slots) for slab in slabs)

    def remove_orphans(self) -> None:
        """What nobody uses any more goes; for the last member's end."""
        for path, known in list(self._known.items()):
            if _is_empty(known.slab) and not known.slab.has_filler():
                self._remove(path)

    def describe(self) -> dict[str, Any]:
        return {
            "root": str(self._root), "pid": os.getpid(), "member": self.number, "is_serving": self.is_serving,
            "threads": self._threads, "memory_bytes": self._memory_bytes, "protocol": slab_file.PROTOCOL,
        }  # fmt: skip

    def health(self) -> dict[str, Any]:
        """`pending` slots with how many bytes, since when, the last error, what was written, committed, refused."""
        with self._lock:
            slabs = [known.slab for known in self._known.values()]
        pending = [slot for slab in slabs for slot in slab.slots if slot.state >= State.sealed]
        oldest = min((slot.sealed_at for slot in pending), default=0.0)
        return {
            "pending": len(pending), "pending_bytes": sum(slot.sealed_bytes for slot in pending),
            "oldest": max(0.0, self._clock.now() - oldest) if pending else 0.0,
            "slabs": len(slabs), "slab_bytes": sum(slab.size_bytes for slab in slabs),
            "written": self._written, "committed": self._committed, "refused": self._refused,
            "last_error": self._last_error,
        }  # fmt: skip


def _receipt(inside: Storage, save: str, rank: int) -> commit.Receipt | None:
    """A rank's, if it is of this save."""
    path = rank_file(rank)
    try:
        receipt = commit.Receipt.decode(inside.read_bytes(path), inside.uri(path))
    except (FileNotFoundError, CheckpointCorrupt):
        return None
    return receipt if receipt.save == save else None


def _is_empty(slab: SlabFile) -> bool:
    return all(slot.state is State.free for slot in slab.slots)


def _join(root: Path) -> tuple[int, int]:
    """The lowest number that no member has, and its lock."""
    for number in range(1000):
        fd = os.open(places.members(root) / f"{number}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return number, fd
        except OSError:
            os.close(fd)
    raise OSError(24, "a thousand writers are at work", str(root))


def _bell(path: Path) -> socket.socket:
    path.unlink(missing_ok=True)  # of a member that was killed: we hold its lock
    bell = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    bell.bind(str(path))
    path.chmod(0o600)
    bell.setblocking(False)
    return bell


def _available() -> int:
    """Bytes of memory that the machine has left."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return NO_LIMIT


def _age(path: Path) -> float:
    try:
        return time.time() - path.stat().st_mtime
    except OSError:
        return 0.0
