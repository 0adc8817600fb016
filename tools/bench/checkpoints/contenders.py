"""Ways to save the state of a training, each as its documentation shows it.

Runs in the training processes, in the environment of the peers. Methods are collective: all ranks call them together.
"""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from subject import Subject


class Contender(Protocol):
    overlaps: bool
    """It copies while training goes on, and holds up the optimizer's step for it."""

    def save(self, step: int) -> None: ...
    def stepping(self) -> AbstractContextManager[Any]:
        """What the optimizer's step is to be made in."""
        ...

    def is_durable(self) -> bool:
        """This rank's part of the last save. Never waits."""
        ...

    def wait(self) -> None: ...
    def load(self) -> dict[str, torch.Tensor]:
        """What was saved last, by rank 0 alone."""
        ...

    def place(self) -> Path:
        """Where the last one lies."""
        ...

    def close(self) -> None: ...


class _Base:
    overlaps = False

    def __init__(self, directory: Path, subject: Subject, model: torch.nn.Module) -> None:
        self._directory, self._subject, self._model, self._step = directory, subject, model, 0
        self._is_main = dist.get_rank() == 0

    def _next(self, step: int) -> Path:
        """A fresh directory; the one before the last is gone."""
        if self._is_main:
            shutil.rmtree(self._directory / f"{self._step}", ignore_errors=True)
        self._step = step
        return self.place()

    def place(self) -> Path:
        return self._directory / f"{self._step}"

    def stepping(self) -> AbstractContextManager[Any]:
        return nullcontext()

    def is_durable(self) -> bool:
        return True

    def wait(self) -> None:
        return

    def close(self) -> None:
        return


class Ours(_Base):
    """orchestrator.Checkpoints, as a script under torchrun uses it."""

    mode = "eager"

    def __init__(self, directory: Path, subject: Subject, model: torch.nn.Module) -> None:
        super().__init__(directory, subject, model)
        import orchestrator

        self._load = orchestrator.load_checkpoint
        self.checkpoints = orchestrator.Checkpoints(str(directory), keep_last=2, mode=self.mode)
        self.state = self.checkpoints.state(model=model, optimizer=subject.optimizer)

    def save(self, step: int) -> None:
        info = self.checkpoints.save(self.state, step=step)
        if info is None:
            raise RuntimeError("the save was skipped: no slot was free")
        self._uri = info.uri.removeprefix("file://")

    def place(self) -> Path:
        return Path(self._uri)

    def is_durable(self) -> bool:
        return (self.place() / "MANIFEST.json").exists()

    def wait(self) -> None:
        if not self.checkpoints.flush() or not self.is_durable():
            raise RuntimeError("it did not become durable")

    def load(self) -> dict[str, torch.Tensor]:
        loaded = self._load(self.place())
        found = {f"model.{name}": tensor for name, tensor in loaded.model.items()}
        for number, name in enumerate(self._subject.names):
            found |= {f"{key}.{name}": tensor for key, tensor in loaded.optimizer["state"][number].items()}
        return found

    def close(self) -> None:
        self.checkpoints.close()


class OursOverlap(Ours):
    mode = "overlap"
    overlaps = True


class TorchSave(_Base):
    """`torch.save` by rank 0, then fsync of the file and of its directory."""

    def save(self, step: int) -> None:
        directory = self._next(step)
        if not self._is_main:
            return
        directory.mkdir()
        with (directory / "state.pt").open("wb") as file:
            torch.save(self._subject.tensors(), file)
            file.flush()
            os.fsync(file.fileno())
        _fsync_directory(directory)

    def load(self) -> dict[str, torch.Tensor]:
        return torch.load(self.place() / "state.pt", weights_only=True)


class _Dcp(_Base):
    """torch.distributed.checkpoint with `sync_files`, over a process group of its own."""

    def __init__(self, directory: Path, subject: Subject, model: torch.nn.Module) -> None:
        super().__init__(directory, subject, model)
        import torch.distributed.checkpoint as dcp

        self._dcp, self._group = dcp, dist.new_group(backend="gloo")

    def _writer(self, directory: Path) -> Any:
        return self._dcp.FileSystemWriter(directory, sync_files=True)

    def load(self) -> dict[str, torch.Tensor]:
        into = {name: torch.empty_like(tensor) for name, tensor in self._subject.tensors().items()}
        self._dcp.load(into, storage_reader=self._dcp.FileSystemReader(self.place()), no_dist=True)
        return into


class DcpSave(_Dcp):
    def save(self, step: int) -> None:
        writer = self._writer(self._next(step))
        self._dcp.save(self._subject.tensors(), storage_writer=writer, process_group=self._group)


class DcpThread(_Dcp):
    """`async_save` with one stager for all saves, which keeps its memory; the next save waits for the last, as it
    overwrites what that one reads."""

    kind = "THREAD"

    def __init__(self, directory: Path, subject: Subject, model: torch.nn.Module) -> None:
        super().__init__(directory, subject, model)
        from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
        from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType

        self._type = AsyncCheckpointerType[self.kind]
        self._stager = DefaultStager(
            StagingOptions(
                use_pinned_memory=False, use_shared_memory=self.kind == "PROCESS", use_async_staging=False,
                use_non_blocking_copy=False,
            )
        )  # fmt: skip
        self._pending: Future[Any] | None = None

    def save(self, step: int) -> None:
        self.wait()
        response = self._dcp.async_save(
            self._subject.tensors(), storage_writer=self._writer(self._next(step)), process_group=self._group,
            async_checkpointer_type=self._type, async_stager=self._stager,
        )  # fmt: skip
        self._pending = getattr(response, "upload_completion", response)

    def is_durable(self) -> bool:
        return self._pending is None or self._pending.done()

    def wait(self) -> None:
        if self._pending is not None:
            self._pending.result()

    def close(self) -> None:
        self.wait()
        self._stager.close()


class DcpProcess(DcpThread):
    kind = "PROCESS"


class TorchCheckpointing(_Base):
    """Meta's torch_checkpointing with what its documentation says for CPUs, and buffered files: past the page cache its
    writes end in EINVAL on ext4. It never calls fsync."""

    overlaps = True

    def __init__(self, directory: Path, subject: Subject, model: torch.nn.Module) -> None:
        super().__init__(directory, subject, model)
        from torch_checkpointing import CheckpointManager
        from torch_checkpointing.config import AsyncCheckpointSaverConfig
        from torch_checkpointing.staging import CheckpointStagerConfig
        from torch_checkpointing.storage.filesystem import LocalFileSystemStorageConfig

        staging = CheckpointStagerConfig(use_pinned_memory=False, use_non_blocking_copy=False)
        config = CheckpointManager.Config(
            save=AsyncCheckpointSaverConfig(staging_config=staging),
            storage_config=LocalFileSystemStorageConfig(use_direct_io=False),
        )
        self._manager = config.build()
        self._pending: Future[Any] | None = None

    def save(self, step: int) -> None:
        self._pending = self._manager.save(str(self._next(step)), {"state": self._subject.tensors()})

    def stepping(self) -> AbstractContextManager[Any]:
        return self._manager.lock()

    def is_durable(self) -> bool:
        return self._pending is None or self._pending.done()

    def wait(self) -> None:
        if self._pending is not None:
            self._pending.result()

    def load(self) -> dict[str, torch.Tensor]:
        into = {name: torch.empty_like(tensor) for name, tensor in self._subject.tensors().items()}
        return dict(self._manager.load(str(self.place()), into={"state": into})["state"])

    def close(self) -> None:
        self._manager.close()


class Lightning(_Base):
    """Lightning's AsyncCheckpointIO: clones, then `torch.save` in a thread; rank 0 saves, as under its DDP strategy."""

    def __init__(self, directory: Path, subject: Subject, model: torch.nn.Module) -> None:
        super().__init__(directory, subject, model)
        from lightning_fabric.plugins.io.torch_io import TorchCheckpointIO
        from pytorch_lightning.plugins.io import AsyncCheckpointIO

        self._written = threading.Event()
        self._written.set()
        inner = TorchCheckpointIO()
        plain = inner.save_checkpoint

        def save_and_say(*arguments: Any, **named: Any) -> None:
            try:
                plain(*arguments, **named)
            finally:
                self._written.set()

        inner.save_checkpoint = save_and_say  # type: ignore[method-assign]
        self._io = AsyncCheckpointIO(inner)

    def save(self, step: int) -> None:
        directory = self._next(step)
        if self._is_main:
            self._written.clear()
            self._io.save_checkpoint({"state": self._subject.tensors()}, str(directory / "state.ckpt"))

    def is_durable(self) -> bool:
        return self._written.is_set()

    def wait(self) -> None:
        self._written.wait()

    def load(self) -> dict[str, torch.Tensor]:
        return torch.load(self.place() / "state.ckpt", weights_only=True)["state"]

    def close(self) -> None:
        self._io.teardown()


def _fsync_directory(directory: Path) -> None:
    opened = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


KINDS: dict[str, Callable[[Path, Subject, torch.nn.Module], Contender]] = {
    "ours eager": Ours,
    "ours overlap": OursOverlap,
    "torch.save + fsync": TorchSave,
    "dcp.save": DcpSave,
    "dcp.async_save THREAD": DcpThread,
    "dcp.async_save PROCESS": DcpProcess,
    "torch_checkpointing": TorchCheckpointing,
    "Lightning AsyncCheckpointIO": Lightning,
}
