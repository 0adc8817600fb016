"""Copies with several threads: the same bytes as with one, whatever the tensors are."""

from __future__ import annotations

import threading

import pytest
import torch

from orchestrator.checkpoints import copying
from orchestrator.checkpoints.copying import copy_in_memory, threads_here


def _tensors() -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [
        torch.randn(700, 900),  # larger than a share's quarter: copied in parts
        torch.nn.Parameter(torch.randn(301)),
        torch.randn(400, 500).t(),  # in no single piece
        torch.empty(0),
        torch.tensor(3.0),
        torch.randint(0, 255, (999,), dtype=torch.uint8),
        torch.randn(64, 64).bfloat16(),
        torch.randn(50, 50, dtype=torch.complex64).conj(),
    ]


@pytest.mark.parametrize("threads", [1, 2, 3, 7])
def test_every_byte_is_copied_once(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copying, "WORTH_A_THREAD", 1 << 10)
    tensors = _tensors()
    places = [torch.full_like(tensor.detach(), 7, memory_format=torch.contiguous_format) for tensor in tensors]
    seen = set()
    real = torch._foreach_copy_

    def copy(to: list[torch.Tensor], given: list[torch.Tensor]) -> None:
        seen.add(threading.get_ident())
        real(to, given)

    monkeypatch.setattr(torch, "_foreach_copy_", copy)
    copy_in_memory(places, tensors, threads=threads)
    assert all(torch.equal(place, tensor) for place, tensor in zip(places, tensors, strict=True))
    assert (len(seen) > 1) == (threads > 1)


def test_shares_are_about_equal() -> None:
    tensors = [torch.empty(1_000_000), *(torch.empty(1000) for _ in range(500))]
    total = sum(tensor.nbytes for tensor in tensors)
    shares = copying._shares(tensors, tensors, total, 3)
    sizes = [sum(tensor.nbytes for _, tensor in share) for share in shares]
    assert sum(sizes) == total
    assert max(sizes) - min(sizes) <= total / 6


@pytest.mark.parametrize("threads", [1, 2])
def test_what_does_not_fit_is_raised(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copying, "WORTH_A_THREAD", 1)
    with pytest.raises(RuntimeError):
        copy_in_memory([torch.empty(8), torch.empty(3)], [torch.zeros(8), torch.zeros(4)], threads=threads)


def test_ranks_of_a_host_share_its_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copying.os, "sched_getaffinity", lambda pid: set(range(6)))
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert threads_here() == 4
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert threads_here() == 3
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "16")
    assert threads_here() == 1
