"""What happens when a training process calls `log()`: values become float64, keys become numbers, a record is stored
in memory.

No I/O call, no lock, no thread, no network. Everything else is done by the node's agent (`shipper.py`).
"""

from __future__ import annotations

import logging
import math
import operator
import os
import socket
import struct
import threading
import time
import weakref
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from orchestrator.errors import BadMetric
from orchestrator.records import MAX_KEY_BYTES, Fact, WhenFull
from orchestrator.tracking.deferred import Deferred, DeferredPoints
from orchestrator.tracking.spool import DEFAULT_BYTES, MEMBER, Owner, SpoolWriter
from orchestrator.tracking.spool_layout import POSITION, RECORD_STRUCT

_messages = logging.getLogger(__name__)

_INT64 = 1 << 63

# Looked up once: `log` is what training waits for.
_now = time.time
_thread = threading.get_ident
_store = RECORD_STRUCT.pack_into


class Logger:
    """Records points and facts of one rank of one attempt.

    Promises: `log` returns after a memory write; what it was given survives SIGKILL of this process. A value that
    cannot be recorded raises BadMetric naming the key, after the rest of the mapping was recorded. May be called from
    any thread and from forked children: each gets a spool (and a producer id) of its own.
    """

    def __init__(
        self,
        root: Path,
        *,
        run: str,
        attempt: int,
        rank: int,
        max_bytes: int = DEFAULT_BYTES,
        when_full: WhenFull = WhenFull.block,
        role: str = MEMBER,
    ) -> None:
        self._root, self._max_bytes, self._when_full = root, max_bytes, when_full
        self._is_asked_to_stop = False
        self._identity = (run, attempt, rank, role)
        self._spool = self._new_spool()
        self._thread = threading.get_ident()
        self._others = threading.local()
        self._free: deque[SpoolWriter] = deque()
        """Of threads that ended: the next ones go on with them, so that threads that come and go leave nothing open."""
        self._all = [self._spool]
        self._deferred = DeferredPoints()
        self.step = 0
        """The step of the next `log` that gives none; it then counts up by one."""
        _loggers.add(self)

    def log(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Records one point per metric. Raises BadMetric."""
        now = _now()
        if step is None:
            step = self.step
            self.step = step + 1
        elif type(step) is not int:
            step = _as_step(step)
        spool = self._spool if _thread() == self._thread else self._own_spool()
        if not self._deferred.is_empty:
            self._record(self._deferred.arrived(now))
        keys = spool.keys
        bad: BadMetric | None = None
        try:
            for key, value in metrics.items():
                if type(value) is not float or key not in keys:
                    try:
                        value = self._prepared(spool, key, value, step, now)
                    except BadMetric as error:
                        bad = bad or error
                        continue
                    if value is None:
                        continue
                # What `spool.append` does, here: a call would cost as much again.
                while True:
                    offset = spool.offset
                    if offset != spool.limit:
                        try:
                            _store(spool.segment, offset, step, now, value, keys[key], offset + 32)
                        except struct.error:
                            raise BadMetric("step", f"{step} does not fit 64 bits") from None
                        if spool.offset == offset:  # else a signal handler logged just now and took the place
                            spool.offset = offset + 32
                            break
                    elif not spool.next_page(step):
                        break
        finally:  # also what stands before a value that raised an error of its own
            spool.words[POSITION] = spool.base + spool.offset
            spool.bell_words[0] = 1
        if bad is not None:
            raise bad

    def fact(self, fact: Fact) -> None:
        spool = self._spool if _thread() == self._thread else self._own_spool()
        spool.append_fact(fact)

    def stop_requested(self) -> bool:
        return self._is_asked_to_stop or self._spool.stop_requested

    def request_stop(self) -> None:
        """As if the tracker had asked; for what this process hears by itself. May be called in a signal handler."""
        self._is_asked_to_stop = True

    def flush(self, timeout: float) -> bool:
        """Waits until everything logged is accepted by the tracker; False if that took longer than `timeout`."""
        return self._wait(SpoolWriter.is_accepted, timeout)

    def wait_committed(self, timeout: float) -> bool:
        """Like `flush`, until everything is in a PostgreSQL commit."""
        return self._wait(SpoolWriter.is_committed, timeout)

    def close(self) -> None:
        self._record(self._deferred.all())
        for spool in self._all:
            spool.close()
        _loggers.discard(self)

    # -- threads and forks

    def _own_spool(self) -> SpoolWriter:
        held: _Held | None = getattr(self._others, "held", None)
        if held is None:
            try:
                spool = self._free.pop()
            except IndexError:
                spool = self._new_spool()
                self._all.append(spool)
            held = self._others.held = _Held(spool, self._free)
        return held.spool

    def _new_spool(self) -> SpoolWriter:
        run, attempt, rank, role = self._identity
        owner = Owner(run=run, attempt=attempt, rank=rank, pid=os.getpid(), host=socket.gethostname(), role=role)
        return SpoolWriter(self._root, owner, max_bytes=self._max_bytes, when_full=self._when_full)

    def _after_fork(self) -> None:
        # The child shares the parent's mapping: writing there would tear its points. It starts a spool when it first
        # logs.
        for spool in self._all:
            spool.abandon_after_fork()
        self._thread = -1
        self._others, self._free = threading.local(), deque()
        self._all = []
        self._deferred = DeferredPoints()

    # -- values

    def _prepared(self, spool: SpoolWriter, key: str, value: Any, step: int, now: float) -> float | None:
        """`value` as `_number` has it, its key written down. None, too, when the point was dropped."""
        if key not in spool.keys and not spool.add_key(_checked_key(key), step):
            return None
        if isinstance(value, float):
            return float(value)  # numpy's float64 is one, too
        if getattr(value, "is_cpu", False):
            # A tensor, most likely the loss: by the shortest way, for in a training loop every call is a cold one.
            try:
                number = value.item()
            except (RuntimeError, ValueError):
                pass  # not one number: said below
            else:
                if type(number) is float:
                    return number
        return self._number(key, value, step, now)

    def _number(self, key: str, value: Any, step: int, now: float) -> float | None:
        """`value` as float64; None when it will be resolved later (a tensor on an accelerator)."""
        kind = type(value)
        if kind is int or kind is bool:
            return _exact_float(key, value)
        if isinstance(value, np.generic):
            return _as_number(key, value.item())
        device = getattr(value, "device", None)
        if getattr(device, "type", "cpu") != "cpu" and hasattr(value, "detach"):
            if value.numel() != 1:
                raise BadMetric(key, f"is a tensor of shape {tuple(value.shape)}; log a scalar, e.g. its mean()")
            if not -_INT64 <= step < _INT64:
                raise BadMetric("step", f"{step} does not fit 64 bits")
            # A copy on the device's own queue: no synchronisation now, and later in-place changes do not matter.
            self._deferred.add(Deferred(key, step, now, value.detach().reshape(()).clone()))
            return None
        shape = getattr(value, "shape", ())
        if len(shape) and math.prod(shape) != 1:
            raise BadMetric(key, f"is an array of shape {tuple(shape)}; log a scalar, e.g. its mean()")
        if hasattr(value, "detach"):
            value = value.detach()
        if hasattr(value, "item"):
            value = value.item()
        return _as_number(key, value)

    def _record(self, points: list[tuple[Deferred, Any]]) -> None:
        """Points that were on an accelerator, with the step and the time at which they were logged.

        They may have been logged by another thread, but go into the spool of the one that is here: each has one writer
        and keys of its own.
        """
        if not points:
            return
        spool = self._spool if _thread() == self._thread else self._own_spool()
        for point, value in points:
            try:
                number = _as_number(point.key, value)
            except BadMetric as error:
                _messages.error("a point of step %d is lost: %s", point.step, error)
                continue
            if point.key in spool.keys or spool.add_key(point.key, point.step):
                spool.append(spool.keys[point.key], point.step, point.time, number)

    def _wait(self, reached: Any, timeout: float) -> bool:
        self._record(self._deferred.all())
        deadline = time.monotonic() + timeout
        while late := [spool for spool in self._all if not reached(spool)]:
            for spool in late:
                spool.hurry()
            if time.monotonic() > deadline:
                return False
            time.sleep(0.01)
        return True


class _Held:
    """A thread's hold of its spool. It ends with the thread, which takes its locals along."""

    __slots__ = ("_free", "spool")

    def __init__(self, spool: SpoolWriter, free: deque[SpoolWriter]) -> None:
        self.spool, self._free = spool, free

    def __del__(self) -> None:
        self._free.append(self.spool)


_loggers: weakref.WeakSet[Logger] = weakref.WeakSet()


def _after_fork_in_child() -> None:
    for logger in list(_loggers):
        logger._after_fork()


os.register_at_fork(after_in_child=_after_fork_in_child)


def _checked_key(key: Any) -> str:
    if not isinstance(key, str):
        raise BadMetric(repr(key)[:80], f"a metric key is a string, not {type(key).__name__}")
    if not key:
        raise BadMetric(key, "a metric key cannot be empty")
    if "\0" in key:
        raise BadMetric(key.replace("\0", "\\0")[:80], "a metric key cannot contain NUL")
    try:
        size_bytes = len(key.encode())
    except UnicodeEncodeError as error:
        raise BadMetric(ascii(key)[:80], "is no valid Unicode text") from error
    if size_bytes > MAX_KEY_BYTES:
        raise BadMetric(key[:40] + "…", f"has {size_bytes:,} bytes; a key has at most {MAX_KEY_BYTES}")
    return key


def _exact_float(key: str, value: int) -> float:
    try:
        number = float(value)
    except OverflowError as error:
        raise BadMetric(key, f"is an integer of {value.bit_length()} bits; float64 cannot hold it") from error
    if int(number) != value:
        raise BadMetric(key, f"{value} cannot be stored exactly; log float(x) if rounding is fine")
    return number


def _as_number(key: str, value: Any) -> float:
    if isinstance(value, bool | int):
        return _exact_float(key, value)
    if value is None or isinstance(value, complex | str | bytes):
        raise BadMetric(key, f"is {_shown(value)}; a metric is a number (text belongs into run.params or run.tags)")
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError) as error:
        raise BadMetric(key, f"is {_shown(value)}, which is no number") from error


def _as_step(step: Any) -> int:
    try:
        return operator.index(step)
    except TypeError:
        pass
    item = getattr(step, "item", None)
    if item is not None and getattr(step, "ndim", 0) == 0:
        step = item()
    if isinstance(step, float) and step.is_integer():
        return int(step)
    if isinstance(step, int):
        return step
    raise BadMetric("step", f"is {_shown(step)}; a step is a whole number")


def _shown(value: Any) -> str:
    text = repr(value)
    return f"{text[:60]}… ({type(value).__name__})" if len(text) > 60 else f"{text} ({type(value).__name__})"
