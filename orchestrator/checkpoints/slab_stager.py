"""Staging through shared memory, the trainer's side: a save is a copy into a slot and one store.

Everything slow is done before a save or after it: memory is asked for, its pages and the views of its slots are made
while training goes on, and writing is another process's. Most of the copy, too, can be left to the time until the next
step of the optimizer; see overlap.py.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

import torch

from orchestrator.backends.storage import Storage
from orchestrator.checkpoints.commit import write_failure
from orchestrator.checkpoints.copying import copy_in_memory, threads_here
from orchestrator.checkpoints.image import Piece
from orchestrator.checkpoints.job import Layout, Outcome, SaveJob, SlotResult
from orchestrator.checkpoints.local.client import SlabClient
from orchestrator.checkpoints.overlap import Overlap, changed, versions_of
from orchestrator.checkpoints.policy import Mode
from orchestrator.checkpoints.slab import Owner, SlabFile, Slot, State, slot_bytes_for, touch
from orchestrator.checkpoints.staging import DirectStager, Reservation
from orchestrator.checkpoints.state import TrainState
from orchestrator.checkpoints.tensorfile import TYPES
from orchestrator.errors import OrchestratorError

FIRST_PATIENCE = 5.0
"""Seconds that a save waits for memory that was just asked for, before it does without."""
ASK_AGAIN = 60.0
"""Seconds until memory is asked for again after there was none."""
NUDGE_AGAIN = 1.0
"""Seconds between two looks for a writer while one is waited for."""
_POLL, _LONGEST_POLL = 0.001, 0.02
_LAYOUTS_KEPT = 2
"""Whose views are kept: of whole states, and of a model alone."""
_PORTABLE = 1
"""cudaHostRegisterPortable: pinned for all GPUs."""


class _Places:
    """Where the tensors of one layout lie in one slot, in the order of the pieces."""

    def __init__(self, slot: Slot, layout: Layout) -> None:
        self.layout = layout
        space = slot.space(layout)
        whole = torch.frombuffer(space, dtype=torch.uint8) if space else torch.empty(0, dtype=torch.uint8)
        self.tensors = [
            _view(whole, start + piece.start, piece)
            for image, start in zip(layout.images, layout.starts, strict=True)
            for piece in image.pieces
        ]
        self._types = [tensor.dtype for tensor in self.tensors]
        self._shapes = [tensor.shape for tensor in self.tensors]

    def check(self, tensors: Sequence[torch.Tensor]) -> None:
        """A copy would turn one type or shape into another without a word. Raises ValueError."""
        if [tensor.dtype for tensor in tensors] == self._types and [tensor.shape for tensor in tensors] == self._shapes:
            return
        pieces = [piece for image in self.layout.images for piece in image.pieces]
        if len(tensors) != len(pieces):
            raise ValueError(f"{len(tensors)} tensors for a layout of {len(pieces)}")
        for tensor, place, piece in zip(tensors, self.tensors, pieces, strict=True):
            if (tensor.dtype, tensor.shape) != (place.dtype, place.shape) and (tensor.nbytes or place.nbytes):
                raise ValueError(
                    f"{piece.name} has {tensor.nbytes} bytes, {tensor.dtype} {list(tensor.shape)}; its layout says "
                    f"{piece.size_bytes}, {place.dtype} {list(place.shape)}"
                )


def _view(whole: torch.Tensor, at: int, piece: Piece) -> torch.Tensor:
    return whole[at : at + piece.size_bytes].view(TYPES[piece.dtype]).view(piece.shape)


class _Lease:
    """Memory that is ours, and what was made of it. `prepare` may run in a thread of its own."""

    def __init__(self, slab: SlabFile) -> None:
        self.slab = slab
        self._places: dict[tuple[int, str], _Places] = {}
        """By slot and layout, the oldest first."""
        self._written: dict[int, str] = {}
        """Slot -> signature of the layout that lies in it."""
        self._lock = threading.Lock()
        self._is_pinned = False

    def prepare(self, layout: Layout, heads: Sequence[bytes]) -> None:
        """So that the first save in each slot is as fast as later ones. Before any save: slots are empty."""
        for slot in self.slab.slots:
            self.places(slot, layout)
            self.write_layout(slot, layout, heads)
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            self.pin()

    def prepare_views(self, layout: Layout) -> None:
        for slot in self.slab.slots:
            self.places(slot, layout)

    def has_places(self, layout: Layout) -> bool:
        return (0, layout.signature) in self._places

    def places(self, slot: Slot, layout: Layout) -> _Places:
        with self._lock:
            key = slot.index, layout.signature
            found = self._places.get(key)
            if found is None:
                of_slot = [kept for kept in self._places if kept[0] == slot.index]
                for oldest in of_slot[: len(of_slot) + 1 - _LAYOUTS_KEPT]:
                    del self._places[oldest]
                found = self._places[key] = _Places(slot, layout)
            return found

    def write_layout(self, slot: Slot, layout: Layout, heads: Sequence[bytes]) -> None:
        if self._written.get(slot.index) != layout.signature:
            self._written.pop(slot.index, None)
            slot.write_layout(layout, heads)
            self._written[slot.index] = layout.signature

    def pin(self) -> None:
        """So that a GPU copies into it by itself. Without it a copy is slower, and right all the same."""
        with self._lock:
            if not self._is_pinned:
                whole = torch.frombuffer(self.slab.mapping, dtype=torch.uint8)
                torch.cuda.check_error(torch.cuda.cudart().cudaHostRegister(whole.data_ptr(), whole.nbytes, _PORTABLE))
                self._is_pinned = True

    def close(self) -> None:
        if self._is_pinned:
            whole = torch.frombuffer(self.slab.mapping, dtype=torch.uint8)
            torch.cuda.cudart().cudaHostUnregister(whole.data_ptr())
            del whole
        self._places.clear()  # a map with views on it cannot be closed
        self.slab.stop_filling()
        self.slab.close()


@dataclass(frozen=True, kw_only=True)
class _Sealed:
    lease: _Lease
    slot: Slot
    generation: int
    save: str
    name: str
    copying: _LateCopy | None = None

    def outcome(self) -> Outcome | None:
        if self.lease.slab.is_gone():
            return Outcome(save=self.save, name=self.name, result=SlotResult.failed, why="the memory was removed")
        if self.copying is not None and self.copying.why:
            return Outcome(save=self.save, name=self.name, result=SlotResult.abandoned, why=self.copying.why)
        return self.slot.result(self.generation)


class _Coming:
    """Memory that was asked for, by a thread of its own, which makes it ready for saves of that layout."""

    def __init__(self, client: SlabClient, owner: Owner, layout: Layout, heads: Sequence[bytes], slots: int) -> None:
        self._client, self._owner, self._layout, self._heads, self._slots = client, owner, layout, heads, slots
        self.slot_bytes = slot_bytes_for(layout)
        self.at = time.monotonic()
        self.lease: _Lease | None = None
        self.why = ""
        """Why there is none."""
        self._thread = threading.Thread(target=self._get, name="staging memory", daemon=True)
        self._thread.start()

    def is_over(self) -> bool:
        return not self._thread.is_alive()

    def wait(self, timeout: float) -> bool:
        self._thread.join(max(timeout, 0.0))
        return self.is_over()

    def _get(self) -> None:
        slab = None
        try:
            slab = self._client.lease(self.slot_bytes, self._owner, slots=self._slots)
            if slab is None:
                self.why = f"there is no memory for slots of {self.slot_bytes:,} bytes"
            elif self._is_usable(slab):
                touch(slab.mapping)
                lease = _Lease(slab)
                lease.prepare(self._layout, self._heads)
                self.lease = lease
        except (OSError, OrchestratorError, ValueError, RuntimeError) as error:
            self.why = str(error)
        if slab is not None and self.lease is None:
            slab.close()

    def _is_usable(self, slab: SlabFile) -> bool:
        """Waits until its pages exist: to store into one that does not, on a full tmpfs, is a SIGBUS."""
        while not slab.is_ready():
            if slab.is_refused():
                self.why = "there was no memory left when it was to be used"
                return False
            if slab.is_gone():
                self.why = "the memory was removed"
                return False
            time.sleep(0.002)
        return True


class SlabStager:
    """Implements `staging.Stager`. Without memory or writer, saves go through `fallback`, and `tell(event, why)` says
    so once for each reason. `mode`: overlap leaves what it may of the copy to the time until the next step.

    Belongs to the process that made it: in a forked child it falls back as well.
    """

    def __init__(
        self,
        client: SlabClient,
        *,
        owner: Owner,
        fallback: DirectStager,
        tell: Callable[[str, str], None],
        slots: int = 2,
        mode: Mode = Mode.eager,
    ) -> None:
        self._client, self._owner, self._fallback, self._tell, self._slots = client, owner, fallback, tell, slots
        self._overlap = Overlap(tell) if mode == Mode.overlap else None
        self._lease: _Lease | None = None
        self._past: list[_Lease] = []
        """Of earlier layouts, until what was sealed in them is written."""
        self._coming: _Coming | None = None
        self._sealed: list[_Sealed] = []
        self._done: dict[str, Outcome] = {}
        self._told: set[str] = set()
        self._nudged_at = float("-inf")
        self._nudge_thread: threading.Thread | None = None
        self._patience = FIRST_PATIENCE
        """How long a save waits for memory that was asked for: the first one does, and the one after a success."""
        self._preparing: threading.Thread | None = None

    def attach(self, state: TrainState) -> None:
        if self._overlap is not None:
            self._overlap.attach(state)

    def expect(self, layout: Layout, heads: Sequence[bytes]) -> None:
        lease = self._lease
        if self._ask_for(layout, heads) is None and lease is not None and not lease.has_places(layout):
            self._end_preparing()
            self._preparing = threading.Thread(target=lease.prepare_views, args=(layout,), name="staging views")
            self._preparing.start()

    def reserve(self, layout: Layout, heads: Sequence[bytes], *, patience: float) -> Reservation | None:
        deadline = time.monotonic() + patience
        self.settle()
        self._collect()
        lease = self._leased(layout, heads, max(patience, self._patience))
        if lease is None:
            return self._fallback.reserve(layout, heads, patience=patience)
        pause = _POLL
        while True:
            for slot in lease.slab.slots:
                if slot.state is State.free:
                    return SlabReservation(self, lease, slot, layout, heads, self._overlap)
            if time.monotonic() >= deadline:
                return None
            self._nudge()
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_POLL)
            self._collect()

    def outcomes(self) -> list[Outcome]:
        self._collect()
        found, self._done = list(self._done.values()), {}
        return found

    def wait(self, save: str, timeout: float) -> Outcome:
        self.settle()
        deadline, pause = time.monotonic() + timeout, _POLL
        while True:
            self._collect()
            if (outcome := self._done.pop(save, None)) is not None:
                return outcome
            if not any(sealed.save == save for sealed in self._sealed):
                return self._fallback.wait(save, timeout)
            if time.monotonic() >= deadline:
                raise TimeoutError(f"a sealed checkpoint was not written within {timeout:.0f} s")
            self._nudge()
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_POLL)

    def settle(self) -> None:
        if self._overlap is not None:
            self._overlap.settle()

    def stalled(self) -> float:
        return 0.0 if self._overlap is None else self._overlap.stalled()

    def close(self) -> None:
        """What is sealed is written; nobody hears of it through this object any more."""
        if self._overlap is not None:
            self._overlap.close()
        self._end_preparing()
        for lease in (self._lease, *self._past):
            if lease is not None:
                lease.close()
        self._lease, self._past, self._sealed = None, [], []
        if self._coming is not None and self._coming.wait(FIRST_PATIENCE) and self._coming.lease is not None:
            self._coming.lease.close()
        self._coming = None
        self._fallback.close()

    # -- memory

    def _leased(self, layout: Layout, heads: Sequence[bytes], patience: float) -> _Lease | None:
        """Memory with slots for that layout, or None."""
        needed = slot_bytes_for(layout)
        lease = self._lease
        if lease is not None and not lease.slab.is_mine():  # a forked child
            return None
        if lease is not None and lease.slab.slot_bytes >= needed and not lease.slab.is_gone():
            return lease
        deadline = time.monotonic() + patience
        self._patience = 0.0
        coming = self._ask_for(layout, heads)
        while coming is not None and coming.wait(deadline - time.monotonic()) and coming.slot_bytes < needed:
            coming = self._ask_for(layout, heads)  # the one before was for a state without an optimizer's, say
        if coming is None or not coming.is_over():
            self._say("checkpoint-direct", "its memory is not there yet")
            return None
        if coming.lease is None:
            self._say("checkpoint-writer-missing", coming.why)
            return None
        self._coming, self._patience = None, FIRST_PATIENCE
        self._set_aside()
        self._lease = coming.lease
        return self._lease if self._lease.slab.slot_bytes >= needed else None

    def _ask_for(self, layout: Layout, heads: Sequence[bytes]) -> _Coming | None:
        """None: what there is, is enough."""
        slot_bytes = slot_bytes_for(layout)
        lease, coming = self._lease, self._coming
        if lease is not None and lease.slab.slot_bytes >= slot_bytes and not lease.slab.is_gone():
            return None
        if coming is not None:
            is_enough = coming.slot_bytes >= slot_bytes
            if not coming.is_over() or (is_enough and coming.lease is not None):
                return coming
            if is_enough and time.monotonic() - coming.at < ASK_AGAIN:
                return coming
            if coming.lease is not None:
                coming.lease.close()
        self._set_aside()  # first: what is too small makes room
        self._coming = _Coming(self._client, self._owner, layout, heads, self._slots)
        return self._coming

    def _set_aside(self) -> None:
        if self._lease is not None:
            self._past.append(self._lease)
            self._lease = None
        self._let_go()

    def _let_go(self) -> None:
        for lease in [past for past in self._past if not any(sealed.lease is past for sealed in self._sealed)]:
            self._past.remove(lease)
            self._end_preparing()
            lease.close()

    def _end_preparing(self) -> None:
        if self._preparing is not None:
            self._preparing.join()
            self._preparing = None

    # -- outcomes

    def _collect(self) -> None:
        for sealed in list(self._sealed):
            outcome = sealed.outcome()
            if outcome is not None:
                self._sealed.remove(sealed)
                self._done[sealed.save] = outcome
                if self._overlap is not None and sealed.copying is not None and sealed.copying.is_torn:
                    self._overlap.stop("checkpoint-torn", sealed.copying.why)
        if self._past:
            self._let_go()

    def sealed(
        self, lease: _Lease, slot: Slot, generation: int, job: SaveJob, copying: _LateCopy | None = None
    ) -> None:
        """A reservation of ours was sealed, or will be by `copying`, as soon as that is done."""
        self._sealed.append(
            _Sealed(lease=lease, slot=slot, generation=generation, save=job.save, name=job.name, copying=copying)
        )

    def ring(self) -> None:
        """Something is there to be written. Also called by the copying thread."""
        if self._client.ring() == 0:
            self._nudge()

    def _nudge(self) -> None:
        """A writer may have died: the next one is started, by a thread that is not waited for."""
        now = time.monotonic()
        is_at_it = self._nudge_thread is not None and self._nudge_thread.is_alive()
        if now - self._nudged_at >= NUDGE_AGAIN and not is_at_it:
            self._nudged_at = now
            self._nudge_thread = threading.Thread(target=self._client.ensure, name="start a writer", daemon=True)
            self._nudge_thread.start()

    def _say(self, event: str, why: str) -> None:
        if why not in self._told:
            self._told.add(why)
            self._tell(event, why)


class SlabReservation:
    """Implements `staging.Reservation`: one slot, ours until it is sealed."""

    is_direct = False

    def __init__(
        self,
        stager: SlabStager,
        lease: _Lease,
        slot: Slot,
        layout: Layout,
        heads: Sequence[bytes],
        overlap: Overlap | None,
    ) -> None:
        self._stager, self._lease, self._slot, self._layout, self._heads = stager, lease, slot, layout, heads
        self._overlap = overlap
        self._late: tuple[list[torch.Tensor], list[torch.Tensor]] = [], []
        """Places and tensors that are copied after the seal."""
        self._generation = slot.begin()

    def fill(self, tensors: Sequence[torch.Tensor], *, late: Sequence[bool] | None = None) -> float:
        """Copies all of them: when it returns, they may change; those that are `late` must not before the copy has
        ended (see Overlap). Raises ValueError for tensors of another layout."""
        started = time.perf_counter()
        found = self._lease.places(self._slot, self._layout)
        found.check(tensors)
        self._lease.write_layout(self._slot, self._layout, self._heads)
        places, now = found.tensors, tensors
        waiting = self._overlap.late(tensors, late) if self._overlap is not None and late is not None else []
        if waiting:
            self._late = [places[each] for each in waiting], [tensors[each] for each in waiting]
            at_once = sorted(set(range(len(tensors))).difference(waiting))
            places, now = [places[each] for each in at_once], [tensors[each] for each in at_once]
        if _gpus(tensors):
            self._lease.pin()
        _copy(places, now, threads=threads_here())
        return time.perf_counter() - started

    def seal(self, job: SaveJob) -> None:
        if self._overlap is None or not self._late[0]:
            self._slot.seal(job)
            self._stager.sealed(self._lease, self._slot, self._generation, job)
            self._stager.ring()
            return
        copying = _LateCopy(self._slot, job, *self._late, self._stager.ring)
        self._late = [], []  # views are let go with the copy, or the memory could not be closed
        self._stager.sealed(self._lease, self._slot, self._generation, job, copying)
        self._overlap.start(copying.run)

    def abandon(self) -> None:
        self._slot.cancel()


class _LateCopy:
    """The rest of a save, in a thread: copies, and seals if nothing has changed meanwhile."""

    def __init__(
        self,
        slot: Slot,
        job: SaveJob,
        places: Sequence[torch.Tensor],
        tensors: Sequence[torch.Tensor],
        ring: Callable[[], None],
    ) -> None:
        self._slot, self._job, self._places, self._tensors, self._ring = slot, job, places, tensors, ring
        self._began = time.perf_counter()
        self._versions = versions_of(tensors)
        self._ready = [torch.cuda.current_stream(gpu).record_event() for gpu in _gpus(tensors)]
        """A GPU may still be computing the values that are to be saved."""
        self.is_torn = False
        self.why = ""
        """Why it was not sealed; the last to be set."""

    def run(self) -> None:
        try:
            _copy(self._places, self._tensors, after=self._ready)
            if count := changed(self._tensors, self._versions):
                self.is_torn = True
                self._give_up(
                    f"{count} tensor(s) were changed while they were copied, not by a step of their optimizer"
                )
                return
            seconds = time.perf_counter() - self._began
            job = self._job
            self._slot.seal(replace(job, sealed_at=job.sealed_at + seconds, copy_seconds=job.copy_seconds + seconds))
        except Exception as error:  # there is nobody to raise it to
            self._give_up(f"{error}" or type(error).__name__)
            return
        finally:
            self._places, self._tensors = (), ()
        self._ring()

    def _give_up(self, why: str) -> None:
        job = self._job
        if job.world_size > 1:
            with suppress(Exception):  # rank 0's part may be in other hands, which need not wait for this one
                write_failure(Storage(job.storage_url).join(job.name), save=job.save, rank=job.rank, why=why)
        self._slot.cancel()
        self.why = why


def _copy(
    places: Sequence[torch.Tensor],
    tensors: Sequence[torch.Tensor],
    *,
    threads: int = 1,
    after: Sequence[torch.cuda.Event] | None = None,
) -> None:
    """Returns when all is copied. From GPUs: `after` those events, beside what they compute; by default in turn with
    it. Where there are none, with so many threads. Other Python threads run meanwhile."""
    if not tensors:
        return
    to, given = list(places), list(tensors)
    with torch.no_grad():
        if after:
            stream = torch.cuda.Stream()
            for event in after:
                stream.wait_event(event)
            with torch.cuda.stream(stream):
                torch._foreach_copy_(to, given, non_blocking=True)
            stream.synchronize()
            return
        gpus = _gpus(given)
        if not gpus:
            copy_in_memory(to, given, threads=threads)
            return
        torch._foreach_copy_(to, given, non_blocking=True)
        for gpu in gpus:
            torch.cuda.current_stream(gpu).synchronize()


def _gpus(tensors: Sequence[torch.Tensor]) -> set[torch.device]:
    """Where they lie, if not all on the CPU. It costs something to ask thousands of them."""
    return {tensor.device for tensor in tensors if tensor.is_cuda} if torch.cuda.is_initialized() else set()
