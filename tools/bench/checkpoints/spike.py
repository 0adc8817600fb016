"""What one save costs the trainer, in parts: the floor (one copy of as many bytes into warm shared memory), the copy of
many tensors into a slot, and what the writer needs to take it to the disk.

`python -m tools.bench.checkpoints.spike [--mb 256] [--saves 10] [--directory DIR]`; alone on the machine.
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

import torch

from orchestrator.backends.storage import Storage
from orchestrator.checkpoints import slab as slab_file
from orchestrator.checkpoints import writer
from orchestrator.checkpoints.image import TensorSpec
from orchestrator.checkpoints.job import SaveJob
from orchestrator.checkpoints.plan import layout
from orchestrator.checkpoints.slab import Owner, SlabFile, slot_bytes_for
from orchestrator.checkpoints.slab_stager import _views


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
    places = _views(slot, made, tensors)
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


def _rate(size: int, seconds: float) -> str:
    return f"{size / seconds / (1 << 20):7.0f} MiB/s"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mb", type=int, default=256)
    parser.add_argument("--saves", type=int, default=20)
    parser.add_argument("--directory", type=Path, default=Path(tempfile.gettempdir()))
    given = parser.parse_args(argv)
    torch.set_num_threads(1)
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
