"""Where a trainer's state goes when it is saved: the trainer's side.

A save reserves room, fills it and seals it. What is sealed is no longer the trainer's business: it becomes durable
whatever happens to the trainer. `DirectStager` has no room of its own: it writes at the seal, from the tensors
themselves, and the trainer waits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Protocol

import torch

from orchestrator.backends.storage import Storage
from orchestrator.checkpoints import writer
from orchestrator.checkpoints.commit import write_failure
from orchestrator.checkpoints.image import Image
from orchestrator.checkpoints.job import Layout, Outcome, SaveJob, SlotResult
from orchestrator.checkpoints.state import TrainState
from orchestrator.checkpoints.tree import raw


class Reservation(Protocol):
    """Room for one save of one rank. Ends with `seal` or `abandon`, one of them, once."""

    is_direct: bool
    """The seal writes, and returns when this rank's part is durable; the trainer then commits."""

    def fill(self, tensors: Sequence[torch.Tensor], *, late: Sequence[bool] | None = None) -> float:
        """Takes the tensors, in the order of the layout's pieces over all images; gives the seconds it took. `late`:
        which of them nothing but an optimizer's step changes: those may still be read after the seal, until
        `Stager.settle` or the next step of an optimizer of the attached state."""
        ...

    def seal(self, job: SaveJob) -> None:
        """From here on the save is the writer's. Raises OSError."""
        ...

    def abandon(self) -> None:
        """Nothing will come of it."""
        ...


class Stager(Protocol):
    """One per rank and training. Not for several threads."""

    def attach(self, state: TrainState) -> None:
        """What will be saved from now on: an optimizer of it does not step while its tensors are being copied."""
        ...

    def expect(self, layout: Layout, heads: Sequence[bytes]) -> None:
        """A hint that saves of about this layout will come: asks for room and returns at once."""
        ...

    def reserve(self, layout: Layout, heads: Sequence[bytes], *, patience: float) -> Reservation | None:
        """Room for a save; None if there is none after `patience` seconds (0: now)."""
        ...

    def outcomes(self) -> list[Outcome]:
        """What became of sealed saves since the last call. Never blocks."""
        ...

    def wait(self, save: str, timeout: float) -> Outcome:
        """The outcome of one sealed save, once. Raises TimeoutError."""
        ...

    def settle(self) -> None:
        """Waits until no tensor is being copied: called before they are changed by anything but an optimizer's step."""
        ...

    def stalled(self) -> float:
        """Seconds that steps of optimizers have waited for copies since the last call."""
        ...

    def close(self) -> None:
        """No further saves; what is sealed goes on."""
        ...


class DirectStager:
    """Writes at the seal, from the tensors themselves. Needs no other process, and no memory but one window for what
    lies on a GPU or not in one piece."""

    def __init__(self, storage: Storage | None = None, *, window_bytes: int = 64 << 20) -> None:
        """`storage`: the root of the checkpoints, if it is not to be opened by the URL of each save. `window_bytes`:
        how much of a tensor is copied at a time where it cannot be written from where it lies."""
        self._storage, self._window_bytes = storage, window_bytes

    def attach(self, state: TrainState) -> None:
        return

    def expect(self, layout: Layout, heads: Sequence[bytes]) -> None:
        return

    def reserve(self, layout: Layout, heads: Sequence[bytes], *, patience: float) -> DirectReservation:
        return DirectReservation(layout, heads, self._storage, self._window_bytes)

    def outcomes(self) -> list[Outcome]:
        return []

    def wait(self, save: str, timeout: float) -> Outcome:
        """What a seal did is known when it returns: this is asked only after one that did not raise."""
        return Outcome(save=save, name="", result=SlotResult.durable)

    def settle(self) -> None:
        return

    def stalled(self) -> float:
        return 0.0

    def close(self) -> None:
        return


class DirectReservation:
    """See Reservation. Keeps references to the tensors from `fill` to `seal`."""

    is_direct = True

    def __init__(self, layout: Layout, heads: Sequence[bytes], storage: Storage | None, window_bytes: int) -> None:
        self._layout, self._heads, self._storage, self._window_bytes = layout, heads, storage, window_bytes
        self._tensors: Sequence[torch.Tensor] = ()

    def fill(self, tensors: Sequence[torch.Tensor], *, late: Sequence[bool] | None = None) -> float:
        self._tensors = tensors
        return 0.0

    def seal(self, job: SaveJob) -> None:
        storage = self._storage or Storage(job.storage_url)
        remaining = iter(self._tensors)
        images = [
            _TensorImage(image, head, [next(remaining) for _ in image.pieces], self._window_bytes)
            for image, head in zip(self._layout.images, self._heads, strict=True)
        ]
        try:
            writer.write_job(job, self._layout, images, storage)
        except OSError as error:
            with suppress(OSError):  # rank 0's part may be in other hands, which need not wait for this one
                if job.world_size > 1:
                    write_failure(storage.join(job.name), save=job.save, rank=job.rank, why=str(error))
            raise
        finally:
            self._tensors = ()

    def abandon(self) -> None:
        self._tensors = ()


class _TensorImage:
    """An ImageBytes over living tensors."""

    def __init__(self, image: Image, head: bytes, tensors: Sequence[torch.Tensor], window_bytes: int) -> None:
        self._image, self._head, self._tensors, self._window_bytes = image, head, tensors, window_bytes

    def chunks(self) -> Iterator[memoryview]:
        if self._head:
            yield memoryview(self._head)
        for piece, tensor in zip(self._image.pieces, self._tensors, strict=True):
            if tensor.nbytes != piece.size_bytes:
                raise ValueError(f"{piece.name} has {tensor.nbytes} bytes, its layout says {piece.size_bytes}")
            yield from _parts(tensor.detach(), self._window_bytes)


def _parts(tensor: torch.Tensor, window_bytes: int) -> Iterator[memoryview]:
    """Its bytes, in order. What is copied on the way is copied a window at a time."""
    if not tensor.nbytes:
        return
    if tensor.is_contiguous():
        flat = tensor.reshape(-1)
        step = max(window_bytes // flat.element_size(), 1)
        for start in range(0, flat.numel(), step):
            yield raw(flat[start : start + step])
    elif tensor.nbytes <= window_bytes:
        yield raw(tensor)
    else:
        rows = window_bytes // (tensor.nbytes // len(tensor))
        for part in tensor.split(rows) if rows else tensor:
            yield from _parts(part, window_bytes)
