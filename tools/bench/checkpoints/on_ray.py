"""The same ranks as workers of Ray Train, and its ways to save: `python on_ray.py SOCKET WORLD_SIZE DIRECTORY`.

Each way is the documented one: rank 0 of a DDP training writes `torch.save` into a temporary directory and reports it;
or all ranks `async_save` to the place that Ray names, and the report's upload function waits for that.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import rank as ranks
import ray
import ray.train
import torch
import torch.distributed as dist
from contenders import Contender, Ours, _Base
from ray.train import Checkpoint, CheckpointConfig, CheckpointUploadMode, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from subject import Subject


class RaySync(_Base):
    mode = CheckpointUploadMode.SYNC

    def save(self, step: int) -> None:
        self._step, self._size, source = step, 0, None
        if self._is_main:
            source = Path(tempfile.mkdtemp(dir=self._directory))
            torch.save(self._subject.tensors(), source / "state.pt")
            self._size = (source / "state.pt").stat().st_size
        checkpoint = None if source is None else Checkpoint.from_directory(str(source))
        ray.train.report(
            {"step": step}, checkpoint=checkpoint, checkpoint_dir_name=self._name, checkpoint_upload_mode=self.mode
        )
        if source is not None and self.mode is CheckpointUploadMode.SYNC:
            shutil.rmtree(source)

    @property
    def _name(self) -> str:
        return f"{type(self).__name__}-{self._step}"

    def place(self) -> Path:
        return Path(ray.train.get_context().get_storage().build_checkpoint_path_from_name(self._name))

    def is_durable(self) -> bool:
        if not self._is_main:
            return True
        uploaded = self.place() / "state.pt"
        return uploaded.exists() and uploaded.stat().st_size == self._size

    def load(self) -> dict[str, torch.Tensor]:
        return torch.load(self.place() / "state.pt", weights_only=True)


class RayAsync(RaySync):
    mode = CheckpointUploadMode.ASYNC


class RayAsyncDcp(RaySync):
    def __init__(self, directory: Path, subject: Subject, model: torch.nn.Module) -> None:
        super().__init__(directory, subject, model)
        import torch.distributed.checkpoint as dcp

        self._dcp, self._group = dcp, dist.new_group(backend="gloo")
        self._pending: Future[Any] | None = None

    def save(self, step: int) -> None:
        self._step = step
        self._pending = pending = self._dcp.async_save(
            self._subject.tensors(), checkpoint_id=self.place(), process_group=self._group
        )

        def wait(checkpoint: Checkpoint, _: str) -> Checkpoint:
            pending.result()
            return checkpoint

        ray.train.report(
            {"step": step}, checkpoint=Checkpoint(str(self.place())), checkpoint_dir_name=self._name,
            checkpoint_upload_mode=CheckpointUploadMode.ASYNC, checkpoint_upload_fn=wait,
            delete_local_checkpoint_after_upload=False,  # it lies where it belongs; by default it would be deleted
        )  # fmt: skip

    def is_durable(self) -> bool:
        return self._pending is None or self._pending.done()

    def load(self) -> dict[str, torch.Tensor]:
        into = {name: torch.empty_like(tensor) for name, tensor in self._subject.tensors().items()}
        self._dcp.load(into, storage_reader=self._dcp.FileSystemReader(self.place()), no_dist=True)
        return into


RAY_KINDS: dict[str, Callable[[Path, Subject, torch.nn.Module], Contender]] = {
    "ours eager in Ray Train": Ours,
    "Ray Train SYNC": RaySync,
    "Ray Train ASYNC": RayAsync,
    "Ray Train ASYNC + async_save": RayAsyncDcp,
}


def main() -> None:
    path, world_size, directory = sys.argv[1], int(sys.argv[2]), sys.argv[3]

    def train() -> None:
        from on_ray import RAY_KINDS  # not by value: classes of this module

        ranks.serve(path, ray.train.get_context().get_world_rank(), RAY_KINDS)

    ray.init(num_cpus=world_size + 1, include_dashboard=False, object_store_memory=128 << 20, log_to_driver=True)
    try:
        TorchTrainer(
            train,
            torch_config=TorchConfig(backend="gloo"),
            scaling_config=ScalingConfig(num_workers=world_size),
            run_config=RunConfig(
                name="bench", storage_path=str(Path(directory) / "ray"),
                checkpoint_config=CheckpointConfig(num_to_keep=4),
            ),
        ).fit()  # fmt: skip
    finally:
        ray.shutdown()


if __name__ == "__main__":
    main()
