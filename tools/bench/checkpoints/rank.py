"""One rank of a training that saves when it is told to: `python rank.py SOCKET RANK WORLD_SIZE`.

The benchmark sends every rank the same orders, as lines of JSON, and gets an answer from each.
"""

from __future__ import annotations

import cProfile
import io
import json
import mmap
import os
import pstats
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from contenders import KINDS, Contender, Ours
from subject import Adder, Subject

_POLL = 0.002
_PAUSE_STEPS = 0.25
"""Seconds of computing between a save and the step, for those that copy meanwhile."""


class Rank:
    def __init__(self) -> None:
        self._kinds: dict[str, Callable[..., Contender]] = dict(KINDS)
        self._open: dict[str, Contender] = {}
        self._directories: dict[str, Path] = {}

    # -- orders: each gives an answer

    def prepare(self, size_mib: int, tensors: int, is_trained: bool) -> dict[str, Any]:
        self._subject = Subject(size_mib, tensors, is_trained=is_trained)
        self._model: torch.nn.Module = self._subject.model
        self._step = 0
        if is_trained:
            if dist.get_world_size() > 1:
                self._model = torch.nn.parallel.DistributedDataParallel(self._model, gradient_as_bucket_view=True)
            self._calibrate()
        share = self._subject.size_bytes // dist.get_world_size()
        self._floor_from = torch.ones(share, dtype=torch.uint8)
        return {"size_bytes": self._subject.size_bytes, "batch": self._batch.shape[0] if is_trained else 0}

    def open(self, contender: str, directory: str) -> dict[str, Any]:
        place = Path(directory)
        place.mkdir(parents=True, exist_ok=True)
        self._directories[contender] = place
        self._open[contender] = self._kinds[contender](place, self._subject, self._model)
        return {}

    def close(self, contender: str) -> dict[str, Any]:
        self._open.pop(contender).close()
        return {}

    def floor(self) -> dict[str, Any]:
        """Seconds of one copy of 1/N into shared memory that is there already."""
        if not hasattr(self, "_floor_to"):
            self._floor_to = _shared_memory(self._floor_from.numel())
            self._floor_to.copy_(self._floor_from)
        self._meet()
        begun = time.perf_counter()
        self._floor_to.copy_(self._floor_from)
        return {"seconds": time.perf_counter() - begun}

    def save(self, contender: str) -> dict[str, Any]:
        """One save, and right after it one added to every tensor."""
        chosen, optimizer = self._open[contender], self._subject.optimizer
        assert isinstance(optimizer, Adder)
        self._meet()
        self._step += 1
        self._saved_at = optimizer.steps
        busy, begun = _busy(), time.perf_counter()
        chosen.save(self._step)
        called = time.perf_counter()
        if chosen.overlaps:
            self._compute(_PAUSE_STEPS)
        resumed = time.perf_counter()
        with chosen.stepping():
            optimizer.step()
        fence = optimizer.entered - resumed
        durable = self._until_durable(chosen) - begun
        return {"call": called - begun, "fence": fence, "durable": durable, "cpu": _busy() - busy}

    def verify(self, contender: str) -> dict[str, Any]:
        """Names of tensors that are not what they were at the last save."""
        wrong: list[str] = []
        if dist.get_rank() == 0:
            wrong = self._subject.differing(self._open[contender].load(), self._saved_at)
        dist.barrier()
        return {"wrong": wrong[:5], "count": len(wrong)}

    def written(self, contender: str) -> dict[str, Any]:
        """Bytes of the last checkpoint on the disk."""
        place = self._open[contender].place()
        return {"bytes": sum(file.stat().st_blocks * 512 for file in place.rglob("*") if file.is_file())}

    def lost(self, contender: str, steps: int) -> dict[str, Any]:
        """Wall-clock seconds of iterations; the first saves. Goes on until that is durable."""
        chosen = self._open.get(contender)
        self._meet()
        self._step += 1
        busy, begun, walls = _busy(), time.perf_counter(), []
        durable_after = 0
        call = 0.0
        while len(walls) < steps or (chosen is not None and not durable_after):
            started = time.perf_counter()
            if chosen is not None and not walls:
                chosen.save(self._step)
                call = time.perf_counter() - started
            self._iterate(chosen)
            walls.append(time.perf_counter() - started)
            if chosen is not None and not durable_after and self._all(chosen.is_durable()):
                durable_after = len(walls)
            if len(walls) > 200:
                raise RuntimeError("it does not become durable")
        started = time.perf_counter()
        if chosen is not None:
            chosen.wait()
        ended = time.perf_counter()
        return {
            "walls": walls, "durable_after": durable_after, "call": call, "flush": ended - started,
            "wall": ended - begun, "cpu": _busy() - busy,
        }  # fmt: skip

    def loop(self, contender: str, steps: int) -> dict[str, Any]:
        """A block of training, with a save at its first step or without."""
        chosen = self._open.get(contender)
        self._meet()
        self._step += 1
        begun = time.perf_counter()
        for number in range(steps):
            if chosen is not None and number == 0:
                chosen.save(self._step)
            self._iterate(chosen)
        seconds = time.perf_counter() - begun
        is_durable = chosen is None or self._all(chosen.is_durable())
        if chosen is not None:
            chosen.wait()
        return {"seconds": seconds, "is_durable": is_durable}

    def write(self, contender: str) -> dict[str, Any]:
        """Seconds from the return of a save until it is durable."""
        self._meet()
        self._step += 1
        self._open[contender].save(self._step)
        begun = time.perf_counter()
        return {"seconds": self._until_durable(self._open[contender]) - begun}

    def plain_write(self, directory: str) -> dict[str, Any]:
        """Seconds of a sequential write and fsync of as many bytes as the state has."""
        self._meet()
        path, data = Path(directory) / f"plain-{dist.get_rank()}", memoryview(self._floor_from.numpy())
        begun = time.perf_counter()
        with path.open("wb", buffering=0) as file:
            for start in range(0, len(data), 8 << 20):
                file.write(data[start : start + (8 << 20)])
            os.fsync(file.fileno())
        seconds = time.perf_counter() - begun
        path.unlink()
        return {"seconds": seconds}

    def plain_read(self, contender: str) -> dict[str, Any]:
        """Seconds of reading the last checkpoint's files into one small buffer."""
        files = sorted(file for file in self._open[contender].place().rglob("*") if file.is_file())
        buffer = bytearray(8 << 20)
        begun, total = time.perf_counter(), 0
        for path in files:
            with path.open("rb", buffering=0) as file:
                while count := file.readinto(buffer):
                    total += count
        return {"seconds": time.perf_counter() - begun, "bytes": total}

    def restore(self, contender: str) -> dict[str, Any]:
        chosen = self._open[contender]
        assert isinstance(chosen, Ours)
        begun = time.perf_counter()
        found = chosen.checkpoints.load_latest(chosen.state)
        seconds = time.perf_counter() - begun
        if found is None:
            raise RuntimeError("there was nothing to restore")
        return {"seconds": seconds}

    def profile(self, contender: str, lines: int = 45) -> dict[str, Any]:
        """Where the time of a call goes."""
        chosen, profile, output = self._open[contender], cProfile.Profile(), io.StringIO()
        self._step += 1
        profile.enable()
        chosen.save(self._step)
        profile.disable()
        self._until_durable(chosen)
        pstats.Stats(profile, stream=output).sort_stats("tottime").print_stats(lines)
        return {"text": output.getvalue()}

    # -- what they are made of

    def _meet(self) -> None:
        dist.barrier()

    def _all(self, value: bool) -> bool:
        agreed = torch.tensor(int(value))
        dist.all_reduce(agreed, op=dist.ReduceOp.MIN)
        return bool(agreed)

    def _until_durable(self, chosen: Contender) -> float:
        """When it was, on the slowest rank; the rest of what there is to wait for comes after."""
        while not chosen.is_durable():
            time.sleep(_POLL)
        self._meet()
        at = time.perf_counter()
        chosen.wait()
        return at

    def _iterate(self, chosen: Contender | None) -> None:
        loss = self._model(self._batch).square().mean()
        loss.backward()
        if chosen is None:
            self._subject.optimizer.step()
        else:
            with chosen.stepping():
                self._subject.optimizer.step()
        self._subject.optimizer.zero_grad(set_to_none=False)

    def _calibrate(self) -> None:
        """Makes a step take a quarter of a second at least."""
        size = 8
        while True:
            self._batch = torch.randn(size, self._subject.model.width)
            self._iterate(None)
            begun = time.perf_counter()
            for _ in range(2):
                self._iterate(None)
            if self._all((time.perf_counter() - begun) / 2 >= 0.26):
                return
            size *= 2

    def _compute(self, seconds: float) -> None:
        """Matrix products, as a forward and backward pass has them."""
        if not hasattr(self, "_matrix"):
            self._matrix = torch.randn(512, 512)
            self._product = torch.empty_like(self._matrix)
        until = time.perf_counter() + seconds
        while time.perf_counter() < until:
            torch.mm(self._matrix, self._matrix, out=self._product)


def _shared_memory(size: int) -> torch.Tensor:
    """In large pages where the kernel gives them: the best floor there is."""
    with tempfile.TemporaryFile(dir="/dev/shm") as file:
        file.truncate(size)
        mapping = mmap.mmap(file.fileno(), size)
    with suppress(OSError):
        mapping.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(mapping, dtype=torch.uint8)


def _busy() -> float:
    """CPU-seconds that the machine's cores have worked."""
    with open("/proc/stat") as file:
        numbers = [int(each) for each in file.readline().split()[1:]]
    user, nice, system, _, _, irq, softirq = numbers[:7]
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")


def serve(path: str, rank: int, more: dict[str, Callable[..., Contender]] | None = None) -> None:
    """Takes orders until the other side closes."""
    torch.set_num_threads(1)
    me = Rank()
    me._kinds |= more or {}
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(path)
        with connection.makefile("rw") as lines:
            print(json.dumps({"rank": rank}), file=lines, flush=True)
            for line in lines:
                print(json.dumps(_answer(me, json.loads(line))), file=lines, flush=True)


def _answer(me: Rank, order: dict[str, Any]) -> dict[str, Any]:
    try:
        return getattr(me, order.pop("do"))(**order)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # DCP's CheckpointException is no Exception; the benchmark says it in the row
        traceback.print_exc()
        return {"error": f"{type(error).__name__}: {error}"}


def main() -> None:
    path, rank, world_size, store = sys.argv[1:]
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=store, rank=int(rank), world_size=int(world_size), timeout=timedelta(seconds=120)
    )
    serve(path, int(rank))
    os._exit(0)  # what a contender leaves behind (threads, daemons) is not waited for


if __name__ == "__main__":
    main()
