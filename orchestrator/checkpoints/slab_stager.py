"""Staging through shared memory, the trainer's side: a save is a copy into a slot and one store.

Everything slow is done before a save or after it: memory is asked for and its pages are made while training goes on,
views of the slot are made once per layout, and writing is another process's.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from orchestrator.checkpoints.job import Layout, Outcome, SaveJob, SlotResult
from orchestrator.checkpoints.local.client import SlabClient
from orchestrator.checkpoints.slab import Owner, SlabFile, Slot, State, slot_bytes_for, touch
from orchestrator.checkpoints.staging import DirectStager, Reservation
from orchestrator.errors import OrchestratorError

FIRST_PATIENCE = 5.0
"""Seconds that a save waits for memory that was just asked for, before it does without."""
ASK_AGAIN = 60.0
"""Seconds until memory is asked for again after there was none."""
NUDGE_AGAIN = 1.0
"""Seconds between two looks for a writer while one is waited for."""
_POLL, _LONGEST_POLL = 0.001, 0.02


@dataclass(eq=False, kw_only=True)
class _Lease:
    """Memory that is ours, and what was made of it."""

    slab: SlabFile
    views: dict[int, tuple[str, list[torch.Tensor]]] = field(default_factory=dict)
    """Slot -> signature of the layout that lies in it, and its tensors in the order of the pieces."""
    is_pinned: bool = False

    def tensors(self, slot: Slot, layout: Layout, heads: Sequence[bytes], like: Sequence[torch.Tensor]) -> list:
        """The places of a layout's tensors. `like` says their types."""
        signature, made = self.views.get(slot.index, ("", []))
        if signature != layout.signature or not _match(made, like):
            self.views.pop(slot.index, None)
            slot.write_layout(layout, heads)
            made = _views(slot, layout, like)
            self.views[slot.index] = layout.signature, made
        return made

    def pin(self) -> None:
        """So that a GPU copies into it by itself. Without it a copy is slower, and right all the same."""
        if not self.is_pinned:
            whole = torch.frombuffer(self.slab.mapping, dtype=torch.uint8)
            torch.cuda.check_error(torch.cuda.cudart().cudaHostRegister(whole.data_ptr(), whole.nbytes, 0))
            self.is_pinned = True

    def close(self) -> None:
        if self.is_pinned:
            whole = torch.frombuffer(self.slab.mapping, dtype=torch.uint8)
            torch.cuda.cudart().cudaHostUnregister(whole.data_ptr())
            del whole
        self.views.clear()  # a map with views on it cannot be closed
        self.slab.stop_filling()
        self.slab.close()


@dataclass(frozen=True, kw_only=True)
class _Sealed:
    lease: _Lease
    slot: Slot
    generation: int
    save: str
    name: str

    def outcome(self) -> Outcome | None:
        if self.lease.slab.is_gone():
            return Outcome(save=self.save, name=self.name, result=SlotResult.failed, why="the memory was removed")
        return self.slot.result(self.generation)


class _Coming:
    """Memory that was asked for, by a thread of its own."""

    def __init__(self, client: SlabClient, owner: Owner, slot_bytes: int, slots: int) -> None:
        self._client, self._owner, self.slot_bytes, self._slots = client, owner, slot_bytes, slots
        self.at = time.monotonic()
        self.slab: SlabFile | None = None
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
        try:
            slab = self._client.lease(self.slot_bytes, self._owner, slots=self._slots)
            if slab is None:
                self.why = f"there is no memory for slots of {self.slot_bytes:,} bytes"
                return
            if self._is_usable(slab):
                touch(slab.mapping)
                self.slab = slab
            else:
                slab.close()
        except (OSError, OrchestratorError, ValueError) as error:
            self.why = str(error)

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
    so once for each reason.

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
    ) -> None:
        self._client, self._owner, self._fallback, self._tell, self._slots = client, owner, fallback, tell, slots
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

    def expect(self, layout: Layout, heads: Sequence[bytes]) -> None:
        self._ask_for(slot_bytes_for(layout))

    def reserve(self, layout: Layout, heads: Sequence[bytes], *, patience: float) -> Reservation | None:
        deadline = time.monotonic() + patience
        self._collect()
        needed = slot_bytes_for(layout)
        lease = self._leased(needed, max(patience, self._patience))
        if lease is None:
            return self._fallback.reserve(layout, heads, patience=patience)
        pause = _POLL
        while True:
            for slot in lease.slab.slots:
                if slot.state is State.free:
                    return SlabReservation(self, lease, slot, layout, heads)
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

    def close(self) -> None:
        """What is sealed is written; nobody hears of it through this object any more."""
        for lease in (self._lease, *self._past):
            if lease is not None:
                lease.close()
        self._lease, self._past, self._sealed = None, [], []
        if self._coming is not None and self._coming.wait(FIRST_PATIENCE) and self._coming.slab is not None:
            self._coming.slab.stop_filling()
            self._coming.slab.close()
        self._coming = None
        self._fallback.close()

    # -- memory

    def _leased(self, needed: int, patience: float) -> _Lease | None:
        """Memory with slots of that size, or None."""
        lease = self._lease
        if lease is not None and not lease.slab.is_mine():  # a forked child
            return None
        if lease is not None and lease.slab.slot_bytes >= needed and not lease.slab.is_gone():
            return lease
        coming = self._ask_for(needed)
        self._patience = 0.0
        if coming is None or not coming.wait(patience if coming.slot_bytes >= needed else 0.0):
            self._say("checkpoint-direct", "its memory is not there yet")
            return None
        if coming.slab is None:
            self._say("checkpoint-writer-missing", coming.why)
            return None
        self._coming, self._patience = None, FIRST_PATIENCE
        self._set_aside()
        self._lease = _Lease(slab=coming.slab)
        return self._lease if coming.slab.slot_bytes >= needed else None

    def _ask_for(self, slot_bytes: int) -> _Coming | None:
        lease, coming = self._lease, self._coming
        if lease is not None and lease.slab.slot_bytes >= slot_bytes and not lease.slab.is_gone():
            return None
        if coming is not None:
            is_enough = coming.slot_bytes >= slot_bytes
            if not coming.is_over() or (is_enough and coming.slab is not None):
                return coming
            if is_enough and time.monotonic() - coming.at < ASK_AGAIN:
                return coming
            if coming.slab is not None:
                coming.slab.stop_filling()
                coming.slab.close()
        self._set_aside()  # first: what is too small makes room
        self._coming = _Coming(self._client, self._owner, slot_bytes, self._slots)
        return self._coming

    def _set_aside(self) -> None:
        if self._lease is not None:
            self._past.append(self._lease)
            self._lease = None
        self._let_go()

    def _let_go(self) -> None:
        for lease in [past for past in self._past if not any(sealed.lease is past for sealed in self._sealed)]:
            self._past.remove(lease)
            lease.close()

    # -- outcomes

    def _collect(self) -> None:
        for sealed in list(self._sealed):
            outcome = sealed.outcome()
            if outcome is not None:
                self._sealed.remove(sealed)
                self._done[sealed.save] = outcome
        if self._past:
            self._let_go()

    def sealed(self, lease: _Lease, slot: Slot, generation: int, job: SaveJob) -> None:
        """A reservation of ours was sealed."""
        self._sealed.append(_Sealed(lease=lease, slot=slot, generation=generation, save=job.save, name=job.name))
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

    def __init__(self, stager: SlabStager, lease: _Lease, slot: Slot, layout: Layout, heads: Sequence[bytes]) -> None:
        self._stager, self._lease, self._slot, self._layout, self._heads = stager, lease, slot, layout, heads
        self._generation = slot.begin()

    def fill(self, tensors: Sequence[torch.Tensor], *, late: Sequence[bool] | None = None) -> float:
        """Copies all of them: when it returns, they may change. Raises ValueError for tensors of another layout."""
        started = time.perf_counter()
        with torch.no_grad():
            tensors = [tensor.detach() for tensor in tensors]
            places = self._lease.tensors(self._slot, self._layout, self._heads, tensors)
            if any(tensor.is_cuda for tensor in tensors):
                self._copy_from_gpu(places, tensors)
            else:
                torch._foreach_copy_(places, tensors)
        return time.perf_counter() - started

    def _copy_from_gpu(self, places: Sequence[torch.Tensor], tensors: Sequence[torch.Tensor]) -> None:
        self._lease.pin()
        for place, tensor in zip(places, tensors, strict=True):
            place.copy_(tensor, non_blocking=True)
        torch.cuda.current_stream().synchronize()

    def seal(self, job: SaveJob) -> None:
        self._slot.seal(job)
        self._stager.sealed(self._lease, self._slot, self._generation, job)

    def abandon(self) -> None:
        self._slot.cancel()


def _views(slot: Slot, layout: Layout, like: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    pieces = [
        (start, piece) for image, start in zip(layout.images, layout.starts, strict=True) for piece in image.pieces
    ]
    if len(pieces) != len(like):
        raise ValueError(f"{len(like)} tensors for a layout of {len(pieces)}")
    space = slot.space(layout)
    whole = torch.frombuffer(space, dtype=torch.uint8) if space else torch.empty(0, dtype=torch.uint8)
    made = []
    for (start, piece), tensor in zip(pieces, like, strict=True):
        if tensor.nbytes != piece.size_bytes:
            raise ValueError(f"{piece.name} has {tensor.nbytes} bytes, its layout says {piece.size_bytes}")
        if not tensor.nbytes:
            made.append(torch.empty_like(tensor, device="cpu"))
            continue
        at = start + piece.start
        made.append(whole[at : at + piece.size_bytes].view(tensor.dtype).view(tensor.shape))
    return made


def _match(made: Sequence[torch.Tensor], like: Sequence[torch.Tensor]) -> bool:
    """A copy would turn one type into another without a word."""
    return len(made) == len(like) and all(
        place.dtype is tensor.dtype and place.shape == tensor.shape for place, tensor in zip(made, like, strict=True)
    )
