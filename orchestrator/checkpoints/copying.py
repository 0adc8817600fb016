"""Copying tensors in the computer's memory with more than one core. One core does not use all of the memory's speed."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Sequence

import torch

MOST_THREADS = 4
"""More hardly make memory faster."""
WORTH_A_THREAD = 8 << 20
"""Bytes that are copied in the time it takes to start some threads."""

_Pair = tuple[torch.Tensor, torch.Tensor]


def threads_here() -> int:
    """How many threads a rank may copy with: its share of the cores, if all ranks of this host save at once."""
    ranks = os.environ.get("LOCAL_WORLD_SIZE", "")
    here = int(ranks) if ranks.isdigit() else 0
    if not here and torch.distributed.is_available() and torch.distributed.is_initialized():
        here = torch.distributed.get_world_size()  # of which some may be elsewhere
    return max(1, min(MOST_THREADS, len(os.sched_getaffinity(0)) // max(here, 1)))


def copy_in_memory(places: Sequence[torch.Tensor], tensors: Sequence[torch.Tensor], *, threads: int = 1) -> None:
    """Copies each of the tensors, on the CPU, to the place beside it; other Python threads run meanwhile. Raises what
    torch raises for a pair that does not fit."""
    total = sum(tensor.nbytes for tensor in tensors)
    threads = max(1, min(threads, total // WORTH_A_THREAD))
    shares = _shares(places, tensors, total, threads) if threads > 1 else [list(zip(places, tensors, strict=True))]
    errors: list[Exception] = []
    others = [threading.Thread(target=_copy, args=(share, errors), name="copying") for share in shares[1:]]
    for thread in others:
        thread.start()
    _copy(shares[0], errors)
    for thread in others:
        thread.join()
    if errors:
        raise errors[0]


def _copy(share: Sequence[_Pair], errors: list[Exception]) -> None:
    try:
        if share:
            with torch.no_grad():  # of each thread
                torch._foreach_copy_([place for place, _ in share], [tensor for _, tensor in share])
    except Exception as error:
        errors.append(error)


def _shares(
    places: Sequence[torch.Tensor], tensors: Sequence[torch.Tensor], total: int, threads: int
) -> list[list[_Pair]]:
    """The pairs in their order, divided so that each share has about the same bytes."""
    shares: list[list[_Pair]] = [[] for _ in range(threads)]
    share = -(-total // threads)
    done = 0
    for place, tensor in zip(places, tensors, strict=True):
        for piece in _pieces(place, tensor, share // 4):
            shares[min(done // share, threads - 1)].append(piece)
            done += piece[1].nbytes
    return shares


def _pieces(place: torch.Tensor, tensor: torch.Tensor, limit_bytes: int) -> Iterator[_Pair]:
    """A large tensor in parts, where it lies in one piece."""
    is_one_piece = tensor.is_contiguous() and not (tensor.is_conj() or tensor.is_neg())
    if tensor.nbytes <= limit_bytes or not is_one_piece or place.shape != tensor.shape:
        yield place, tensor
        return
    count = -(-tensor.nbytes // limit_bytes)
    with torch.no_grad():
        yield from zip(place.view(-1).chunk(count), tensor.view(-1).chunk(count), strict=True)
