"""The ranks of one training, and the few things they do together."""

from __future__ import annotations

from functools import cached_property
from typing import TypeVar

import torch
import torch.distributed as dist

Value = TypeVar("Value", float, torch.Tensor)

_SHORT_BYTES = 1024
"""Texts up to this size travel in one message."""


class Group:
    """All ranks, over the process group, which must be initialised when the first method is called. Every method is
    collective: all ranks call it, in the same order. With one rank nothing is sent and torch.distributed is not needed.
    """

    def __init__(self, rank: int = 0, world_size: int = 1) -> None:
        self.rank, self.world_size = rank, world_size

    @cached_property
    def _device(self) -> torch.device:
        """Where what is sent has to lie."""
        if not dist.is_initialized():
            raise RuntimeError(f"{self.world_size} ranks need torch.distributed: call init_process_group first.")
        # NCCL moves only what is on the accelerator.
        on_gpu = dist.get_backend() == "nccl"
        return torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")

    def share(self, text: str) -> str:
        """Rank 0's text, on all ranks."""
        if self.world_size == 1:
            return text
        data = text.encode() if self.rank == 0 else b""
        message = _framed(data).to(self._device)
        dist.broadcast(message, src=0)
        size = _size(message)
        if size <= _SHORT_BYTES:
            return _text(message[8 : 8 + size])
        rest = _bytes(data, size).to(self._device)
        dist.broadcast(rest, src=0)
        return _text(rest)

    def gather(self, text: str) -> list[str]:
        """Every rank's text, by rank, on all ranks."""
        if self.world_size == 1:
            return [text]
        data = text.encode()
        sizes = self._gather(torch.tensor([len(data)], dtype=torch.int64))
        longest = max(int(size) for size in sizes)
        rows = self._gather(_bytes(data, longest))
        return [_text(row[: int(size)]) for row, size in zip(rows, sizes, strict=True)]

    def sum(self, value: Value) -> Value:
        """The sum over all ranks, as float64 for a float, in the tensor's own type for a tensor."""
        if isinstance(value, torch.Tensor):
            total = value.detach().clone()
            if self.world_size == 1:
                return total
            moved = total.to(self._device)
            dist.all_reduce(moved)
            return moved.to(total.device)
        return self.sum(torch.tensor(float(value), dtype=torch.float64)).item()

    def mean(self, value: Value) -> Value:
        """The mean over all ranks."""
        return self.sum(value) / self.world_size

    def lowest(self, value: int) -> int:
        """The lowest of all ranks' numbers: one message, the cheapest way to agree."""
        if self.world_size == 1:
            return value
        lowest = torch.tensor(value, dtype=torch.int64, device=self._device)
        dist.all_reduce(lowest, op=dist.ReduceOp.MIN)
        return int(lowest)

    def copy_from_main(self, tensor: torch.Tensor) -> None:
        """Overwrites the tensor with rank 0's."""
        if self.world_size == 1:
            return
        moved = tensor.detach().to(self._device)
        dist.broadcast(moved, src=0)
        with torch.no_grad():
            tensor.copy_(moved)

    def barrier(self) -> None:
        """Waits until all ranks are here."""
        self.gather("")

    def _gather(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        mine = tensor.to(self._device)
        all_of_them = [torch.empty_like(mine) for _ in range(self.world_size)]
        dist.all_gather(all_of_them, mine)
        return all_of_them


def _framed(data: bytes) -> torch.Tensor:
    """The size, then the data if it is short."""
    head = len(data).to_bytes(8, "little") + (data if len(data) <= _SHORT_BYTES else b"")
    return _bytes(head, 8 + _SHORT_BYTES)


def _size(message: torch.Tensor) -> int:
    return int.from_bytes(bytes(message[:8].tolist()), "little")


def _bytes(data: bytes, size: int) -> torch.Tensor:
    return torch.frombuffer(bytearray(data.ljust(size, b"\0")) or bytearray(1), dtype=torch.uint8)[:size]


def _text(message: torch.Tensor) -> str:
    return message.cpu().numpy().tobytes().decode()
