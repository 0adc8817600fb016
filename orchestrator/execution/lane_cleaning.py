"""What a job leaves behind in a process that goes on: found, put back, or named as a reason to end the process.

The next job must compute what it would compute in a new process, bit for bit. So the state of the interpreter and of
torch that a train function may change is noted before the first job and put back after each, and the user's modules
are forgotten: their globals are made anew. What cannot be put back (a thread that runs on, memory that is not given
back) is a reason to end the process instead. Not noticed: attributes of other libraries that the user's code replaced.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import logging
import os
import random
import resource
import signal
import sys
import threading
import time
import types
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import psutil

logger = logging.getLogger(__name__)

GPU_GROWTH = 16 << 20
"""Bytes of GPU memory that may stay allocated after a job: workspaces of libraries."""
THREADS_END = 1.0
"""Seconds that a thread has to end after its job."""
_OURS = frozenset({"orchestrator", "actors", "jobs", "cluster", "ray", "torch", "numpy"})
_THREADS_OF_OTHERS = ("orchestrator.", "ray.", "torch.", "pyarrow.", "fsspec.", "grpc.")
"""Modules whose threads serve the whole process."""
_LIMITS = tuple(name for name in dir(resource) if name.startswith("RLIMIT_"))


@dataclass(frozen=True)
class _Flag:
    """A piece of state of the process."""

    name: str
    get: Callable[[], Any]
    put: Callable[[Any], Any]


class Cleaning:
    """Made before the first job, by the thread that runs them; `clean` after each, by the same.

    `growth` is in bytes: how much more private memory the process may hold than after its first job.
    """

    def __init__(self, *, growth: int) -> None:
        self._growth = growth
        self._flags = [(flag, value) for flag in _flags() if (value := _noted(flag)) is not _ABSENT]
        self._environment = dict(os.environ)
        self._directory = os.getcwd()
        self._modules = frozenset(sys.modules)
        self._roots: tuple[str, ...] = ()
        self._libraries: dict[str, Any] = {}
        """What jobs imported and does not lie in `_roots`: found out once, a thousand paths take a while to look up."""
        self._limits = {name: resource.getrlimit(getattr(resource, name)) for name in _LIMITS}
        self._signals = {number: signal.getsignal(number) for number in signal.valid_signals()}
        self._loggers = {name: _logger_state(each) for name, each in _loggers()}
        self._threads = frozenset(threading.enumerate())
        self._children = frozenset(child.pid for child in psutil.Process().children())
        self._hooks = {name: dict(hooks) for name, hooks in _module_hooks().items()}
        self._is_joined = _is_joined()
        self._memory: int | None = None
        self._gpu: dict[int, int] = {}
        # What is there now stays for ever; later collections need not look at it.
        gc.collect()
        gc.freeze()

    def clean(self, code_paths: Sequence[str]) -> str:
        """Puts everything back, and says why the process had better end; '' if it can take another job.

        `code_paths` are the directories of the user's code. The caller has let go of all that the job gave it.
        """
        why = [self._end_children()]
        self._forget_modules(code_paths)
        why.append(self._put_back())
        gc.collect()
        if self._memory is None:
            gc.freeze()  # the libraries that the first job imported: they stay as well
        why.append(self._wait_for_threads())
        _give_memory_back()
        why += [self._look_at_groups(), self._look_at_memory(), self._look_at_gpu()]
        return "; ".join(word for word in why if word)

    # -- what is put back

    def _put_back(self) -> str:
        failed = []
        for flag, value in self._flags:
            try:
                if not _is_same(flag.get(), value):
                    flag.put(value)
            except Exception as error:
                failed.append(f"{flag.name} cannot be put back: {type(error).__name__}: {error}")
        for name in set(os.environ) - set(self._environment):
            del os.environ[name]
        for name, text in self._environment.items():
            if os.environ.get(name) != text:
                os.environ[name] = text
        with contextlib.suppress(OSError):
            os.chdir(self._directory)
        for name, limits in self._limits.items():
            if resource.getrlimit(getattr(resource, name)) != limits:
                try:
                    resource.setrlimit(getattr(resource, name), limits)
                except (OSError, ValueError) as error:
                    failed.append(f"{name} cannot be put back: {error}")
        for number, known in self._signals.items():
            if signal.getsignal(number) is not known:
                failed.append(f"the handler of {signal.Signals(number).name} was replaced")
        for name, each in _loggers():
            if name in self._loggers:
                _put_logger_back(each, self._loggers[name])
        for name, hooks in _module_hooks().items():
            hooks.clear()
            hooks.update(self._hooks.get(name, {}))
        return "; ".join(failed)

    def _forget_modules(self, code_paths: Sequence[str]) -> None:
        roots = tuple(
            os.path.join(os.path.realpath(path), "") for path in (*code_paths, *_working_directories()) if path
        )
        if roots != self._roots:
            self._roots, self._libraries = roots, {}
        doomed = [
            name for name, module in list(sys.modules.items())
            if name not in self._modules and self._libraries.get(name) is not module and _is_users(name, module, roots)
        ]  # fmt: skip
        for name in doomed:
            del sys.modules[name]
            parent, _, child = name.rpartition(".")
            if parent in sys.modules and parent not in doomed:
                with contextlib.suppress(AttributeError):
                    delattr(sys.modules[parent], child)
            if name in logging.Logger.manager.loggerDict and name not in self._loggers:
                own = logging.getLogger(name)
                own.handlers.clear()
                own.setLevel(logging.NOTSET)
        self._libraries = {name: module for name, module in sys.modules.items() if name not in self._modules}
        importlib.invalidate_caches()

    def _end_children(self) -> str:
        """Kills the processes that the job left; DataLoaders' workers mostly."""
        left = []
        for child in psutil.Process().children():
            with contextlib.suppress(psutil.Error):
                words = " ".join(child.cmdline())
                if child.pid not in self._children and not ("resource_tracker" in words or "forkserver" in words):
                    for each in (*child.children(recursive=True), child):
                        each.kill()
                    left.append(child)
        _, alive = psutil.wait_procs(left, timeout=2)
        return f"{len(alive)} of its processes cannot be ended" if alive else ""

    # -- what is only looked at

    def _wait_for_threads(self) -> str:
        deadline = time.monotonic() + THREADS_END
        while left := [t for t in threading.enumerate() if t not in self._threads and not _serves_the_process(t)]:
            if time.monotonic() > deadline:
                names = ", ".join(sorted(thread.name for thread in left)[:3])
                return f"{len(left)} threads of the job run on: {names}"
            for thread in left:
                if thread is not threading.current_thread():
                    thread.join(0.05)
        return ""

    def _look_at_groups(self) -> str:
        """The process group must be there as it was; further ones are ended."""
        if not self._is_joined:
            return ""
        import torch.distributed as dist
        from torch.distributed import distributed_c10d as c10d

        if not dist.is_initialized():
            return ""  # after a failure: whoever calls makes a new one
        for group in list(c10d._world.pg_map):
            if group is not dist.group.WORLD:
                dist.destroy_process_group(group)
        return ""

    def _look_at_memory(self) -> str:
        used = _private_memory()
        if self._memory is None:
            self._memory = used
            return ""
        grown = used - self._memory
        if grown <= self._growth:
            return ""
        return f"its memory has grown by {grown / (1 << 20):.0f} MiB since its first job (sweep.lane_growth_mb)"

    def _look_at_gpu(self) -> str:
        torch = sys.modules.get("torch")
        if torch is None or not torch.cuda.is_initialized():
            return ""
        torch.cuda.empty_cache()
        for device in range(torch.cuda.device_count()):
            # Of this process only: a device that it never used says 0.
            used = torch.cuda.memory_allocated(device)
            before = self._gpu.setdefault(device, used)
            if used - before > GPU_GROWTH:
                return f"{(used - before) / (1 << 20):.0f} MiB of GPU {device} stay allocated"
            if used:
                torch.cuda.reset_peak_memory_stats(device)
        return ""


_ABSENT = object()


def _noted(flag: _Flag) -> Any:
    try:
        return flag.get()
    except Exception:  # this version of torch, or this host, has it not
        return _ABSENT


def _is_same(now: Any, then: Any) -> bool:
    same = now == then
    return bool(same.all() if hasattr(same, "all") else same)


def _flags() -> Iterator[_Flag]:
    yield _Flag("random", random.getstate, random.setstate)
    yield _Flag("sys.path", lambda: list(sys.path), lambda value: sys.path.__setitem__(slice(None), value))
    yield _Flag("sys.argv", lambda: list(sys.argv), lambda value: sys.argv.__setitem__(slice(None), value))
    yield _Flag("recursion limit", sys.getrecursionlimit, sys.setrecursionlimit)
    yield _Flag("sys.excepthook", lambda: sys.excepthook, lambda value: setattr(sys, "excepthook", value))
    yield _Flag("warnings", lambda: list(warnings.filters), _put_warnings)
    yield _Flag("umask", _umask, os.umask)
    yield _Flag("garbage collection", lambda: (gc.isenabled(), gc.get_threshold()), _put_gc)
    yield _Flag("priority", lambda: os.getpriority(os.PRIO_PROCESS, 0), lambda v: os.setpriority(os.PRIO_PROCESS, 0, v))
    if "numpy" in sys.modules:
        import numpy as np

        yield _Flag("numpy's errors", np.geterr, lambda value: np.seterr(**value))
        yield _Flag("numpy's generator", lambda: repr(np.random.get_state()), _put_numpy(np.random.get_state()))
        yield _Flag("numpy's printing", np.get_printoptions, lambda value: np.set_printoptions(**value))
    if "torch" in sys.modules:
        yield from _torch_flags()


def _torch_flags() -> Iterator[_Flag]:
    import torch
    import torch.multiprocessing

    yield _Flag("torch's generator", torch.get_rng_state, torch.set_rng_state)
    yield _Flag("default device", _default_device, torch.set_default_device)
    yield _Flag("default dtype", torch.get_default_dtype, torch.set_default_dtype)
    yield _Flag("gradients", torch.is_grad_enabled, torch._C._set_grad_enabled)
    yield _Flag("deterministic", torch.get_deterministic_debug_mode, torch.set_deterministic_debug_mode)
    yield _Flag("matmul precision", torch.get_float32_matmul_precision, torch.set_float32_matmul_precision)
    yield _Flag("threads", torch.get_num_threads, torch.set_num_threads)
    yield _Flag("anomalies", lambda: (torch.is_anomaly_enabled(), torch.is_anomaly_check_nan_enabled()),
                lambda value: torch.autograd.set_detect_anomaly(*value))  # fmt: skip
    yield _Flag("warnings of torch", torch.is_warn_always_enabled, torch.set_warn_always)
    yield _Flag("sharing", torch.multiprocessing.get_sharing_strategy, torch.multiprocessing.set_sharing_strategy)
    for device in ("cpu", "cuda"):
        yield _Flag(
            f"autocast on {device}",
            partial(torch.is_autocast_enabled, device),
            partial(torch.set_autocast_enabled, device),
        )
        yield _Flag(
            f"autocast's dtype on {device}",
            partial(torch.get_autocast_dtype, device), partial(torch.set_autocast_dtype, device),
        )  # fmt: skip
    yield from _attributes(torch.utils.deterministic, "fill_uninitialized_memory")
    yield from _attributes(
        torch.backends.cudnn, "enabled", "benchmark", "benchmark_limit", "deterministic", "allow_tf32"
    )
    yield from _attributes(
        torch.backends.cuda.matmul,
        "allow_tf32", "allow_fp16_reduced_precision_reduction", "allow_bf16_reduced_precision_reduction",
    )  # fmt: skip
    yield from _attributes(torch.backends.mkldnn, "enabled")
    for name in ("flash", "mem_efficient", "math", "cudnn"):
        cuda = torch.backends.cuda
        if hasattr(cuda, f"enable_{name}_sdp"):
            yield _Flag(f"{name} attention", getattr(cuda, f"{name}_sdp_enabled"), getattr(cuda, f"enable_{name}_sdp"))


def _attributes(owner: Any, *names: str) -> Iterator[_Flag]:
    for name in names:
        title = f"{getattr(owner, '__name__', owner)}.{name}"
        yield _Flag(title, partial(getattr, owner, name), partial(setattr, owner, name))


def _default_device() -> Any:
    """None where none was chosen, which is not the same as the CPU: a choice costs every call of torch a look."""
    import torch

    chosen = getattr(torch._GLOBAL_DEVICE_CONTEXT, "device_context", None)
    return None if chosen is None else chosen.device


def _put_warnings(filters: list[Any]) -> None:
    warnings.filters[:] = filters  # type: ignore[index]
    getattr(warnings, "_filters_mutated", lambda: None)()


def _put_gc(value: tuple[bool, tuple[int, int, int]]) -> None:
    (gc.enable if value[0] else gc.disable)()
    gc.set_threshold(*value[1])


def _put_numpy(state: Any) -> Callable[[Any], None]:
    import numpy as np

    return lambda _: np.random.set_state(state)


def _umask() -> int:
    now = os.umask(0o077)
    os.umask(now)
    return now


@dataclass(frozen=True)
class _LoggerState:
    level: int
    handlers: list[logging.Handler]
    filters: list[Any]
    propagate: bool
    disabled: bool
    extra: Mapping[str, Any] = field(default_factory=dict)


def _loggers() -> list[tuple[str, logging.Logger]]:
    named = [(name, each) for name, each in list(logging.Logger.manager.loggerDict.items())
             if isinstance(each, logging.Logger)]  # fmt: skip
    return [("", logging.getLogger()), *named]


def _logger_state(each: logging.Logger) -> _LoggerState:
    return _LoggerState(each.level, list(each.handlers), list(each.filters), each.propagate, each.disabled)


def _put_logger_back(each: logging.Logger, then: _LoggerState) -> None:
    if each.level != then.level:
        each.setLevel(then.level)
    each.handlers[:] = then.handlers
    each.filters[:] = then.filters
    each.propagate, each.disabled = then.propagate, then.disabled


def _module_hooks() -> dict[str, dict[Any, Any]]:
    """Hooks that torch calls for every module of the process."""
    if "torch" not in sys.modules:
        return {}
    module: Any = importlib.import_module("torch.nn.modules.module")
    return {
        name: value for name, value in vars(module).items()
        if name.startswith("_global_") and "hooks" in name and isinstance(value, dict)
    }  # fmt: skip


def _working_directories() -> Iterator[str]:
    """Where Ray unpacks the code of a job on this host."""
    return (path for path in sys.path if "runtime_resources" in path)


def _is_users(name: str, module: types.ModuleType | None, roots: tuple[str, ...]) -> bool:
    if name.partition(".")[0] in _OURS or name == "__main__":
        return False
    file = getattr(module, "__file__", None)
    if file is None:
        # A package without __init__.py has a place, too.
        places = [*getattr(module, "__path__", ())] if module is not None else []
        file = os.path.join(places[0], "") if places else None
    if not file or not file.endswith((".py", ".pyc", os.sep)):
        return False
    place = os.path.realpath(file)
    if file.endswith(os.sep):
        place = os.path.join(place, "")
    inside = "site-packages" not in place and "dist-packages" not in place
    return inside and place.startswith(roots)


def _serves_the_process(thread: threading.Thread) -> bool:
    """One of a library, which next jobs will use as well."""
    if isinstance(thread, threading._DummyThread):  # of native code: autograd's, for one
        return True
    target = getattr(thread, "_target", None)
    module = getattr(target, "__module__", "") or ""
    return f"{module}.".startswith(_THREADS_OF_OTHERS) or f"{type(thread).__module__}.".startswith(_THREADS_OF_OTHERS)


def _is_joined() -> bool:
    dist: Any = sys.modules.get("torch.distributed")
    return dist is not None and dist.is_available() and dist.is_initialized()


def _private_memory() -> int:
    """Bytes that are this process' own: without the slabs, which it shares with writers."""
    memory = psutil.Process().memory_info()
    return memory.rss - memory.shared


def _give_memory_back() -> None:
    """What was freed, from the allocator to the kernel."""
    dynamo: Any = sys.modules.get("torch._dynamo")
    if dynamo is not None and hasattr(dynamo, "reset"):
        dynamo.reset()
    with contextlib.suppress(OSError, AttributeError):  # another C library than glibc
        ctypes.CDLL(None).malloc_trim(0)
