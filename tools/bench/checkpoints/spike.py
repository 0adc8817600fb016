"""What one save costs the trainer, in parts: the floor (one copy of as many bytes into warm shared memory), the copy of
many tensors into a slot, and what the writer needs to take it to the disk.

`python -m tools.bench.checkpoints.spike [--mb 256] [--saves 10] [--directory DIR]`; alone on the machine.
With `--plasma` the same copy beside Ray's object store, in one and two processes at a time: see `plasma`.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from orchestrator.backends.storage import Storage
from orchestrator.checkpoints import slab as slab_file
from orchestrator.checkpoints import writer
from orchestrator.checkpoints.image import TensorSpec
from orchestrator.checkpoints.job import SaveJob
from orchestrator.checkpoints.plan import layout
from orchestrator.checkpoints.slab import Owner, SlabFile, slot_bytes_for
from orchestrator.checkpoints.slab_stager import _Places


def state(megabytes: int, count: int) -> list[torch.Tensor]:
    """Adam-like: two thirds of the tensors large, one third of one element."""
    large = count * 2 // 3
    size = (megabytes << 20) // 4 // large
    return [torch.randn(size) for _ in range(large)] + [torch.tensor(float(n)) for n in range(count - large)]


def times(what: Callable[[], object], saves: int) -> str:
    taken = []
    for _ in range(saves):
        begun = time.perf_counter()
        what()
        taken.append(1000 * (time.perf_counter() - begun))
    return f"p50 {statistics.median(taken):8.2f} ms   p95 {sorted(taken)[int(0.95 * (len(taken) - 1))]:8.2f} ms"


def job(directory: Path, step: int) -> SaveJob:
    return SaveJob(
        save=f"{step:032x}", storage_url=str(directory), name=f"step_{step:08d}-a1", run="spike", attempt=1, rank=1,
        world_size=2, content={},
    )  # fmt: skip


def measure(megabytes: int, count: int, saves: int, directory: Path, root: Path) -> None:
    tensors = state(megabytes, count)
    specs = [TensorSpec(f"t{n}", "F32", tuple(t.shape), t.nbytes, True) for n, t in enumerate(tensors)]
    made, heads = layout({"model": specs}, {f"model/{spec.name}": 0 for spec in specs}, 0, 1)
    tensors = [tensors[int(piece.name[1:])] for image in made.images for piece in image.pieces]
    path = root / "0.slab"
    slab_file.create(path, slots=2, slot_bytes=slot_bytes_for(made), owner=Owner(run="", attempt=1, rank=0, pid=0))
    slab = SlabFile(path)
    begun = time.perf_counter()
    slab_file.populate(slab)
    seconds = time.perf_counter() - begun
    print(f"\n{megabytes} MiB in {count} tensors")
    print(f"  populate                  {seconds:.3f} s, {seconds / slab.size_bytes * (1 << 30):.3f} s per GiB")
    slot = slab.slots[0]
    slot.begin()
    begun = time.perf_counter()
    slot.write_layout(made, heads)
    places = _Places(slot, made).tensors
    print(f"  views, once per layout    {1000 * (time.perf_counter() - begun):8.2f} ms")
    total = sum(tensor.nbytes for tensor in tensors)
    source = torch.empty(total, dtype=torch.uint8).fill_(1)
    target = torch.frombuffer(slab.slots[1].space(made), dtype=torch.uint8)[:total]
    target.copy_(source)
    print(f"  floor: one copy_          {times(lambda: target.copy_(source), saves)}")

    def each() -> None:
        for place, tensor in zip(places, tensors, strict=True):
            place.copy_(tensor)

    each()
    with torch.no_grad():
        print(f"  copy_ of each             {times(each, saves)}")
        print(f"  _foreach_copy_            {times(lambda: torch._foreach_copy_(places, tensors), saves)}")
    saved = job(directory, 1)

    def seal() -> None:
        slot.seal(saved)

    print(f"  seal                      {times(seal, saves)}")
    write(made, slot, directory, saved)
    slab.close()
    path.unlink()


def write(made: object, slot: slab_file.Slot, directory: Path, saved: SaveJob) -> None:
    """The writer's side, past the page cache as it does it, and by buffered writes."""
    layout_, _ = slot.job()
    for _ in range(3):
        cpu, begun = time.process_time(), time.perf_counter()
        writer.write_job(saved, layout_, slot.images(layout_), Storage(str(directory)))
        taken, cpu = time.perf_counter() - begun, time.process_time() - cpu
        print(f"  write_job (direct, xxh3)  {taken:6.3f} s   CPU {cpu:6.3f} s   {_rate(layout_.size_bytes, taken)}")
    for _ in range(3):
        cpu, begun = time.process_time(), time.perf_counter()
        buffered(slot.space(layout_), directory / "buffered")
        taken, cpu = time.perf_counter() - begun, time.process_time() - cpu
        print(f"  buffered write, fsync     {taken:6.3f} s   CPU {cpu:6.3f} s   {_rate(layout_.size_bytes, taken)}")


def buffered(data: memoryview, path: Path) -> None:
    with path.open("wb", buffering=0) as file:
        for start in range(0, len(data), 8 << 20):
            file.write(data[start : start + (8 << 20)])
        os.fsync(file.fileno())
    path.unlink()


class Training:
    """One rank: its share of the state, and the ways to hand it over. An actor, as trainings on Ray are."""

    def __init__(self, megabytes: int, count: int, writer: object) -> None:
        torch.set_num_threads(1)
        tensors = state(megabytes, count)
        specs = [TensorSpec(f"t{n}", "F32", tuple(t.shape), t.nbytes, True) for n, t in enumerate(tensors)]
        self._layout, heads = layout({"model": specs}, {f"model/{spec.name}": 0 for spec in specs}, 0, 1)
        self._tensors = [tensors[int(piece.name[1:])] for image in self._layout.images for piece in image.pieces]
        self._root = Path(tempfile.mkdtemp(dir="/dev/shm"))
        owner = Owner(run="", attempt=1, rank=0, pid=0)
        slab_file.create(self._root / "0.slab", slots=2, slot_bytes=slot_bytes_for(self._layout), owner=owner)
        self._slab = SlabFile(self._root / "0.slab")
        slab_file.populate(self._slab)
        for slot in self._slab.slots:
            slot.write_layout(self._layout, heads)
        self._slots = [(slot, _Places(slot, self._layout).tensors) for slot in self._slab.slots]
        total = sum(tensor.nbytes for tensor in tensors)
        self._plain = torch.empty(total, dtype=torch.uint8).fill_(1)
        self._target = torch.frombuffer(self._slab.slots[0].space(self._layout), dtype=torch.uint8)[:total]
        self._writer = writer
        self._job = job(self._root, 1)
        self._turn = 0

    def floor(self) -> float:
        begun = time.perf_counter()
        self._target.copy_(self._plain)
        return time.perf_counter() - begun

    def slab(self) -> float:
        self._turn = 1 - self._turn
        slot, places = self._slots[self._turn]
        begun = time.perf_counter()
        slot.begin()
        with torch.no_grad():
            torch._foreach_copy_(places, self._tensors)
        slot.seal(self._job)
        taken = time.perf_counter() - begun
        slot.cancel()
        return taken

    def plasma(self) -> float:
        """Until the writer has the arrays before it, in its own memory: before that they die with this process."""
        import ray

        begun = time.perf_counter()
        ray.get(self._writer.stage.remote([tensor.reshape(-1).view(torch.uint8).numpy() for tensor in self._tensors]))  # type: ignore[attr-defined]
        return time.perf_counter() - begun

    def end(self) -> None:
        shutil.rmtree(self._root)


class Writing:
    """Keeps the save that came last, as a writer does that is at work on it."""

    def __init__(self) -> None:
        self._held: list[np.ndarray] = []

    def stage(self, arrays: list[np.ndarray]) -> int:
        self._held = arrays
        return sum(array.nbytes for array in arrays)


def plasma(megabytes: int, count: int, ranks: int, saves: int) -> None:
    """p50 and p95 over the slowest rank of each round; the ways take turns. The store has room for six states; then
    three fifths of it are taken by something else, as a data set would."""
    import ray
    from ray._private.internal_api import memory_summary

    store = max(6 * megabytes, 256) << 20
    ray.init(num_cpus=ranks + 1, object_store_memory=store, include_dashboard=False, log_to_driver=False)
    try:
        writers = [ray.remote(Writing).options(num_cpus=0).remote() for _ in range(ranks)]
        training = ray.remote(Training).options(runtime_env={"env_vars": {"PYTHONPATH": os.getcwd()}})
        trainings = [training.remote(megabytes // ranks, count // ranks, writer) for writer in writers]

        def rounds(way: str) -> float:
            return max(ray.get([getattr(each, way).remote() for each in trainings]))

        taken: dict[str, list[float]] = {way: [] for way in ("floor", "slab", "plasma", "plasma, store 60 % full")}
        for n in range(saves + 2):
            for way in ("floor", "slab", "plasma"):
                seconds = rounds(way)
                if n >= 2:
                    taken[way].append(seconds)
        fill = [ray.put(np.ones(store // 10, dtype=np.uint8)) for _ in range(6)]
        taken["plasma, store 60 % full"] = [rounds("plasma") for _ in range(saves)]
        spilled = [line.strip() for line in memory_summary(stats_only=True).splitlines() if "pilled" in line]
        del fill
        print(f"\n{megabytes} MiB in {count} tensors, {ranks} rank(s), {saves} saves")
        for way, seconds_of in taken.items():
            print(f"  {way:25} {_shown(seconds_of)}")
        print(f"  {'; '.join(spilled) or 'nothing was spilled'}", flush=True)
        ray.get([each.end.remote() for each in trainings])
    finally:
        ray.shutdown()


def _shown(seconds: Sequence[float]) -> str:
    taken = sorted(1000 * each for each in seconds)
    late = taken[int(0.95 * (len(taken) - 1))]
    return f"p50 {statistics.median(taken):8.2f} ms   p95 {late:8.2f} ms   min {taken[0]:8.2f} ms"


def _rate(size: int, seconds: float) -> str:
    return f"{size / seconds / (1 << 20):7.0f} MiB/s"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mb", type=int, default=256)
    parser.add_argument("--saves", type=int, default=20)
    parser.add_argument("--directory", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--plasma", action="store_true")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--tensors", type=int, nargs="+", default=[150, 2000])
    given = parser.parse_args(argv)
    torch.set_num_threads(1)
    if given.plasma:
        for ranks in given.ranks:
            for count in given.tensors:
                plasma(given.mb, count, ranks, given.saves)
        return
    directory = Path(tempfile.mkdtemp(dir=given.directory))
    root = Path(tempfile.mkdtemp(dir="/dev/shm"))
    try:
        for count in (150, 2000):
            measure(given.mb, count, given.saves, directory, root)
    finally:
        shutil.rmtree(directory)
        shutil.rmtree(root)


if __name__ == "__main__":
    main()
