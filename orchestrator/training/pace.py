"""How fast a rank goes: step time, wait for data, throughput and peak memory, measured without being asked."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

METRICS: Mapping[str, Mapping[str, str]] = {
    "perf/step_time": {"unit": "s", "direction": "min", "reduction": "mean"},
    "perf/step_time_max": {"unit": "s", "direction": "min", "reduction": "max"},
    "perf/data_wait": {"unit": "s", "direction": "min", "reduction": "mean"},
    "perf/samples_per_second": {"unit": "1/s", "direction": "max", "reduction": "mean"},
    "perf/peak_memory_bytes": {"unit": "bytes", "direction": "min", "reduction": "max"},
}
"""What is recorded, and what it means: means over the steps of a window, the slowest of them, seconds per step that the
loader was waited for, samples of this rank, and the most memory so far (of the GPU where there is one, else of the
process)."""

CHECKPOINT_METRICS: Mapping[str, Mapping[str, str]] = {
    "perf/checkpoint_stall": {"unit": "s", "direction": "min", "reduction": "max"},
    "perf/checkpoint_copy": {"unit": "s", "direction": "min", "reduction": "max"},
    "perf/checkpoints_skipped": {"direction": "min", "reduction": "max"},
}
"""What is recorded when one is due: how long training stood still for it, how long of that it copied, and
how many were skipped so far."""

MICRO_BATCH_METRICS: Mapping[str, Mapping[str, str]] = {
    "perf/micro_batch": {"unit": "samples", "reduction": "mean"},
}
"""Where the train function divides its batches by `run.accumulate`: samples of a rank's micro-batch."""

ALIVE_METRICS: Mapping[str, Mapping[str, str]] = {"perf/alive": {"reduction": "max"}}
"""In long phases without other points: how many signs of life the rank has given."""

SIGNS = 5.0
"""Seconds between two of them."""
WINDOW = 1.0
"""Seconds of training that one recorded point covers, at least."""
_LONG = 4.0
_MOST_STEPS = 1 << 20


class Pace:
    """Adds up the steps of one rank and gives `record` their means about once a second.

    A step is a batch of a pass over the training data (`timed`) and what is done with it; where no prepared DataLoader
    gives batches, what lies between two new steps that are logged (`logged`). A window ends after a number of steps
    that is a multiple of a power of two, so that ranks in step with each other record the same steps. Costs a step two
    looks at the clock and a few additions. One thread at a time.
    """

    def __init__(
        self,
        record: Callable[[dict[str, float]], None],
        peak_memory: Callable[[], float],
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._record, self._peak_memory, self._clock = record, peak_memory, clock
        self._steps = 0
        """Of this attempt."""
        self._mask = 0
        """A window may end where these bits of `_steps` are 0."""
        self._has_loader = self._has_recorded = False
        self._last: float | None = None
        """When the last step was logged."""
        self._first = self._samples = 0
        self._time = self._waited = self._slowest = 0.0

    def timed(self, batches: Iterator[Any]) -> Iterator[Any]:
        """The same batches, with their time taken."""
        clock = self._clock
        self._has_loader = True
        asked = clock()
        for batch in batches:
            wait = clock() - asked
            size = samples_in(batch)
            yield batch
            self._waited += wait
            self._samples += size
            asked = self._add(asked)
        if not self._has_recorded:
            self.close()  # a short run has at least its first pass

    def logged(self) -> None:
        """A new step was logged."""
        if self._has_loader:
            return
        # What `_add` does, here: in a training loop every function is a cold one, and a call more costs as much as all
        # of the rest.
        now, last = self._clock(), self._last
        self._last = now
        if last is None:
            return
        seconds = now - last
        self._time += seconds
        if seconds > self._slowest:
            self._slowest = seconds
        self._steps = steps = self._steps + 1
        if not steps & self._mask:
            self._end_window()

    def close(self) -> None:
        """Records the window as it is, if there was a step in it."""
        steps = self._steps - self._first
        if not steps:
            return
        found = {"perf/step_time": self._time / steps, "perf/step_time_max": self._slowest}
        if self._has_loader:
            found["perf/data_wait"] = self._waited / steps
        if self._samples and self._time > 0:
            found["perf/samples_per_second"] = self._samples / self._time
        found["perf/peak_memory_bytes"] = self._peak_memory()
        self._first, self._samples = self._steps, 0
        self._time = self._waited = self._slowest = 0.0
        self._has_recorded = True
        self._record(found)

    def _add(self, began: float) -> float:
        """A step that began then is over. Gives the time."""
        now = self._clock()
        seconds = now - began
        self._time += seconds
        if seconds > self._slowest:
            self._slowest = seconds
        self._steps = steps = self._steps + 1
        if not steps & self._mask:
            self._end_window()
        return now

    def _end_window(self) -> None:
        if self._time < WINDOW:
            self._mask = min(2 * self._mask + 1, _MOST_STEPS - 1)
            return
        if self._time > _LONG:
            self._mask >>= 1
        self.close()


class Signs:
    """Gives a sign of life with each batch of a pass that is not timed."""

    def __init__(self, alive: Callable[[], None]) -> None:
        self._alive = alive

    def timed(self, batches: Iterator[Any]) -> Iterator[Any]:
        for batch in batches:
            self._alive()
            yield batch


def samples_in(batch: Any) -> int:
    """Length of the first tensor's first dimension; 0 where there is no tensor in front."""
    if type(batch) in (list, tuple) and batch:  # nearly always
        batch = batch[0]
    while not isinstance(batch, torch.Tensor):
        if isinstance(batch, list | tuple):
            batch = batch[0] if batch else None
        elif isinstance(batch, Mapping):
            batch = next(iter(batch.values()), None)
        else:
            return 0
    if batch.is_nested and batch.layout is torch.strided:
        return batch.size(0)  # it has no shape
    shape = batch.shape
    return shape[0] if shape else 1


def peak_memory(device: torch.device) -> Callable[[], float]:
    """How to ask for the most bytes that were in use so far. Asking does not wait for the GPU."""
    if device.type == "cuda":
        return lambda: float(torch.cuda.max_memory_allocated(device))
    return _peak_of_process


def memory_now(device: torch.device) -> Callable[[], float]:
    """How to ask for the bytes that are in use now. Asking does not wait for the GPU."""
    if device.type == "cuda":
        return lambda: float(torch.cuda.memory_allocated(device))
    return _memory_of_process


def _memory_of_process() -> float:
    try:
        with open("/proc/self/statm", "rb") as file:
            return float(file.read().split()[1]) * resource.getpagesize()
    except (OSError, IndexError, ValueError):
        return 0.0


def _peak_of_process() -> float:
    try:
        with open("/proc/self/status") as file:
            return next(float(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        # Not the same: it counts what the process was before it became this program.
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0
