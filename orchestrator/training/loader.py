"""A DataLoader that gives each rank its share, knows its position, and continues there."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import CodeType
from typing import Any

import torch
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, RandomSampler, Sampler, SequentialSampler
from torch.utils.data.distributed import DistributedSampler

from orchestrator.errors import UserError
from orchestrator.seeding import derive
from orchestrator.training.pace import Pace, Signs

LeftOut = tuple[int, int, int, int]
"""Samples of a pass, counted over all ranks: epoch, pass, the first and the one behind the last."""


class CannotShard(UserError):
    """A DataLoader whose order we cannot divide among ranks."""

    def __init__(self, why: str) -> None:
        super().__init__(why)
        self.why = why

    def __str__(self) -> str:
        return (
            f"run.prepare cannot divide this DataLoader among the ranks: {self.why}. "
            "Use shuffle=True or False with batch_size, or a sampler that divides by itself "
            "(torch's DistributedSampler), or do not prepare it."
        )


class ShardedSampler(Sampler[int]):
    """This rank's indices of one pass over a dataset of `size` samples.

    The order depends on (seed, epoch, passes) only, so all ranks agree on it without talking. `even` repeats samples
    at the end (or drops the tail) until all ranks have the same number, as DistributedSampler does; without it every
    sample comes exactly once.
    """

    def __init__(
        self,
        size: int,
        *,
        shuffle: bool,
        seed: int,
        rank: int,
        world_size: int,
        even: bool = True,
        drop_last: bool = False,
    ) -> None:
        self._size, self._shuffle, self._seed, self._rank, self._world_size = size, shuffle, seed, rank, world_size
        self._even, self._drop_last = even, drop_last
        self.epoch = 0
        """Number of the epoch whose order is given."""
        self.passes = 0
        """How many passes this epoch has had before."""
        self.skip = 0
        """How many samples of the next pass, over all ranks, have been used already or left out."""
        self.left_out: frozenset[LeftOut] = frozenset()
        """Samples that are not given."""

    @property
    def total(self) -> int:
        """Samples of a pass, over all ranks."""
        if not self._even:
            return self._size
        rounded = math.floor if self._drop_last else math.ceil
        return rounded(self._size / self._world_size) * self._world_size

    def __iter__(self) -> Iterator[int]:
        if self._shuffle:
            generator = torch.Generator().manual_seed(derive(self._seed, "order", self.epoch, self.passes))
            order = torch.randperm(self._size, generator=generator).tolist()
        else:
            order = list(range(self._size))
        if self.total > self._size:
            order = (order * math.ceil(self.total / self._size))[: self.total] if order else order
        gaps = gaps_of(self.left_out, self.epoch, self.passes, self.skip, self.total)
        if not gaps:
            return iter(order[self.skip : self.total][self._rank :: self._world_size])
        starts, ends = [self.skip, *(last for _, last in gaps)], [*(first for first, _ in gaps), self.total]
        left = [index for start, end in zip(starts, ends, strict=True) for index in order[start:end]]
        if self._even and (over := len(left) % self._world_size):  # made when the group had another size
            left = left[:-over] if self._drop_last else left + order[: self._world_size - over]
        return iter(left[self._rank :: self._world_size])

    def __len__(self) -> int:
        return len(range(self._rank, self.total, self._world_size))


class ShardedLoader(DataLoader[Any]):
    """What `run.prepare` makes of a DataLoader. Batches arrive on the run's device.

    The dataset, batch_size (per worker), collate_fn and worker settings are the user's. A generator given by the user
    seeds the order, else the run's seed does. Worker processes are seeded per (epoch, pass, rank); the process's own
    generators are not used, so a pass that is continued leaves them as an uninterrupted one does.

    `state_dict` is the position counted over all ranks: it may be loaded on another number of them. A loader whose
    sampler is the user's continues in the middle of a pass by reading and dropping what was used.
    """

    def __init__(
        self,
        loader: DataLoader[Any],
        *,
        rank: int,
        world_size: int,
        seed: int,
        device: torch.device,
        even: bool = True,
        splits: int = 1,
    ) -> None:
        """`splits`: into how many parts, at least, the batches of a training loader are divided; see `self.splits`."""
        self._rank, self._world_size, self._target, self._even = rank, world_size, device, even
        self._seed = seed if loader.generator is None else loader.generator.initial_seed()
        self._used = 0  # samples of the running pass over all ranks; batches, if the sampler is not ours
        self._resume_at = 0
        self._has_passed = False
        self._is_active = False
        self._left_at: tuple[_Place, ...] = ()
        """Where the code stood, innermost first, when the loop over the last pass was left in the middle."""
        self.pace: Callable[[ShardedLoader], Pace | Signs] | None = None
        """Who takes the time of a pass that begins; None: nobody."""
        self._own: ShardedSampler | None = self._sampler_for(loader)
        self._epoch, self._passes = 0, 0
        self.splits = parts(loader.batch_size or 1, splits) if self.can_split else 1
        """How many batches are one of the user's."""
        settings: dict[str, Any] = {
            "dataset": loader.dataset, "num_workers": loader.num_workers, "collate_fn": loader.collate_fn,
            "pin_memory": loader.pin_memory, "timeout": loader.timeout, "worker_init_fn": loader.worker_init_fn,
            "multiprocessing_context": loader.multiprocessing_context, "generator": torch.Generator(),
            "prefetch_factor": loader.prefetch_factor, "persistent_workers": loader.persistent_workers,
        }  # fmt: skip
        if self._own is not None:
            size = loader.batch_size and loader.batch_size // self.splits
            settings |= {"sampler": self._own, "batch_size": size, "drop_last": loader.drop_last}
        elif isinstance(loader.dataset, IterableDataset) or type(loader.batch_sampler) is BatchSampler:
            settings |= {"batch_size": loader.batch_size, "drop_last": loader.drop_last}
            if not isinstance(loader.dataset, IterableDataset):
                settings |= {"sampler": loader.sampler}
        else:
            settings |= {"batch_sampler": loader.batch_sampler} if loader.batch_sampler else {"sampler": loader.sampler}
            if loader.batch_sampler is None:
                settings |= {"batch_size": None}
        super().__init__(**settings)

    @property
    def is_active(self) -> bool:
        """In the middle of a pass: a batch has been given out and the loop over it has not ended."""
        return self._is_active

    @property
    def is_last_batch(self) -> bool:
        """The batch in hand ends the pass. Unknown, so False, when the sampler is the user's."""
        if not self._is_active or self._own is None:
            return False
        gaps = gaps_of(self._own.left_out, self._own.epoch, self._own.passes, self._used, self._own.total)
        left = self._own.total - self._used - sum(last - first for first, last in gaps)
        return left < self._batch_total() if self.drop_last else left <= 0

    @property
    def is_shuffled(self) -> bool:
        return self._own is not None and self._own._shuffle

    @property
    def can_split(self) -> bool:
        """Whether smaller batches are of use, and how they follow each other is ours to say."""
        return self.is_shuffled

    @property
    def pass_size(self) -> int | None:
        """Samples of a pass over all ranks; None where the order is the user's sampler's."""
        return None if self._own is None else self._own.total

    def leave_out(self, what: Iterable[LeftOut]) -> None:
        """Samples that no pass gives from now on. Only where `pass_size` is known."""
        assert self._own is not None
        self._own.left_out = frozenset(what)

    def set_epoch(self, epoch: int) -> None:
        """Chooses the order of the next pass; a restored position in this very epoch stays."""
        if epoch == self._epoch and self._resume_at:
            return
        self._epoch, self._passes, self._resume_at, self._has_passed = epoch, 0, 0, False
        samplers: tuple[Any, ...] = (self.sampler, getattr(self.batch_sampler, "sampler", None), self.batch_sampler)
        for sampler in samplers:
            if hasattr(sampler, "set_epoch"):
                sampler.set_epoch(epoch)

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        if self._has_passed and not self._resume_at:
            self._passes += 1
        self._has_passed = True
        start, self._resume_at = self._resume_at, 0
        self._left_at = ()
        if self._own is not None:
            self._own.epoch, self._own.passes, self._own.skip = self._epoch, self._passes, start
        assert self.generator is not None
        self.generator.manual_seed(derive(self._seed, "workers", self._epoch, self._passes, self._rank))
        self._used = start
        return self._batches(super().__iter__(), drop=0 if self._own is not None else start)

    def state_dict(self) -> dict[str, Any]:
        """The position, plain numbers. `used` counts samples over all ranks (batches of this rank, if the sampler is
        the user's)."""
        if self._is_active:
            return {"epoch": self._epoch, "passes": self._passes, "used": self._used}
        return {"epoch": self._epoch, "passes": self._passes + self._has_passed, "used": self._resume_at}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._epoch, self._passes, self._resume_at = int(state["epoch"]), int(state["passes"]), int(state["used"])
        self._has_passed = False

    def _batches(self, batches: Iterator[Any], *, drop: int) -> Iterator[Any]:
        for _ in range(drop):
            next(batches, None)
        pace = self.pace(self) if self.pace is not None else None
        try:
            for batch in batches if pace is None else pace.timed(batches):
                if self._own is None:
                    self._used += 1
                else:
                    self._used = self._behind(self._used, self._batch_total())
                self._is_active = True
                yield to_device(batch, self._target)
        except GeneratorExit:
            self._left_at = _callers()
            raise
        finally:
            self._is_active = False  # also when the loop over us was left by `break`

    def reopen(self, error: BaseException) -> None:
        """If it was this exception that ended the loop over a pass, the loader counts as in the middle of it again."""
        if self._left_at and _was_raised_at(error, self._left_at):
            self._is_active, self._left_at = True, ()

    def _behind(self, used: int, count: int) -> int:
        """Where in the pass a batch of `count` samples over all ranks ends that begins at `used`."""
        assert self._own is not None
        for first, last in gaps_of(self._own.left_out, self._own.epoch, self._own.passes, used, self._own.total):
            if used + count <= first:
                break
            used, count = last, count - (first - used)
        return min(self._own.total, used + count)

    def _batch_total(self) -> int:
        return (self.batch_size or 1) * self._world_size

    def _sampler_for(self, loader: DataLoader[Any]) -> ShardedSampler | None:
        """Ours where the order is plain; None where the user's sampler stays."""
        if isinstance(loader.dataset, IterableDataset):
            return None  # it must divide itself: nobody else can
        has_plain_batches = type(loader.batch_sampler) in (BatchSampler, type(None))
        if type(loader.sampler) in (RandomSampler, SequentialSampler) and has_plain_batches:
            sampler: Any = loader.sampler
            if not getattr(sampler, "replacement", False) and len(sampler) == len(loader.dataset):  # type: ignore[arg-type]
                return ShardedSampler(
                    len(sampler), shuffle=type(sampler) is RandomSampler, seed=self._seed, rank=self._rank,
                    world_size=self._world_size, even=self._even, drop_last=loader.drop_last,
                )  # fmt: skip
        divides = isinstance(loader.sampler, DistributedSampler) or hasattr(loader.batch_sampler, "set_epoch")
        if self._world_size > 1 and not divides:
            unusual = loader.sampler if has_plain_batches else loader.batch_sampler
            raise CannotShard(f"its {type(unusual).__name__} draws an order of its own")
        return None


_Place = tuple[int, CodeType, int]
"""A frame (its id), its code, and the instruction that it was at."""
_DEEPEST = 32


def _callers() -> tuple[_Place, ...]:
    """Of the generator that calls this. An exception unwinds a loop while its frame is still where it was raised."""
    found: list[_Place] = []
    frame = sys._getframe(2)
    while frame is not None and len(found) < _DEEPEST:
        found.append((id(frame), frame.f_code, frame.f_lasti))
        frame = frame.f_back  # type: ignore[assignment]
    return tuple(found)


def _was_raised_at(error: BaseException, places: tuple[_Place, ...]) -> bool:
    """Whether the innermost of the places that the exception, or one that led to it, came through is where it did."""
    passed: dict[tuple[int, CodeType], set[int]] = {}
    seen: BaseException | None = error
    while seen is not None:
        trace = seen.__traceback__
        while trace is not None:
            passed.setdefault((id(trace.tb_frame), trace.tb_frame.f_code), set()).add(trace.tb_lasti)
            trace = trace.tb_next
        seen = seen.__cause__ or seen.__context__
    for frame, code, instruction in places:
        if (frame, code) in passed:
            return instruction in passed[frame, code]
    return False


def gaps_of(left_out: Iterable[LeftOut], epoch: int, passes: int, start: int, total: int) -> list[tuple[int, int]]:
    """The parts of a pass from `start` on that are left out, as (first, behind the last), in order and apart."""
    found: list[tuple[int, int]] = []
    for _, _, first, last in sorted(each for each in left_out if each[:2] == (epoch, passes)):
        first, last = max(first, start), min(last, total)
        if found and first <= found[-1][1]:
            found[-1] = found[-1][0], max(last, found[-1][1])
        elif first < last:
            found.append((first, last))
    return found


def between(first: tuple[int, ...], last: tuple[int, ...], pass_size: int) -> list[LeftOut]:
    """The samples behind one place in the data up to another one; a place is (epoch, pass, used). Nothing
    where these are not known, and where they are more than half a pass: then nobody knows which are to blame."""
    if len(first) != 3 or len(last) != 3 or first >= last:
        return []
    (epoch, passes, used), (last_epoch, last_passes, last_used) = first, last
    if (epoch, passes) == (last_epoch, last_passes):
        found = [(epoch, passes, used, last_used)]
    elif (last_epoch, last_passes) in ((epoch, passes + 1), (epoch + 1, 0)):
        # From the very beginning of a pass nobody can tell whether it took place.
        found = [*([(epoch, passes, used, pass_size)] if used else []), (last_epoch, last_passes, 0, last_used)]
    else:
        return []
    found = [each for each in found if each[2] < each[3]]
    return found if all(2 * (end - begin) <= pass_size for _, _, begin, end in found) else []


def parts(size: int, least: int) -> int:
    """The least number of equal parts of a batch that is not below `least`; its size where there are no so many."""
    return next((count for count in range(max(least, 1), size) if size % count == 0), size) if least > 1 else 1


def to_device(batch: Any, device: torch.device) -> Any:
    """The batch with its tensors on the device; containers keep their type."""
    if device.type == "cpu":
        return batch
    if isinstance(batch, torch.Tensor):
        return batch.to(device, non_blocking=batch.is_pinned())
    if isinstance(batch, Mapping):
        return type(batch)({key: to_device(item, device) for key, item in batch.items()})  # type: ignore[call-arg]
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(to_device(item, device) for item in batch))
    if isinstance(batch, list | tuple):
        return type(batch)(to_device(item, device) for item in batch)
    return batch
