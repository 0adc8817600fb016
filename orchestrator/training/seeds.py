"""All random numbers of a run from one root seed.

Every stream has a seed of its own, SHA-256 of the root and the stream's name. Streams that must differ between ranks
(dropout, augmentation) have the rank in their name; streams that must not (shuffling) do not. A run started again
begins with the same ones.
"""

from __future__ import annotations

import ctypes
import random
from typing import Any

import numpy as np
import torch

from orchestrator.seeding import derive

_MT19937_BYTES = 624 * 4 + 4
"""Its numbers and its place among them."""


def seed_everything(root: int, rank: int) -> None:
    """Seeds Python's, numpy's and torch's generators (CPU and GPU) of this process, each differently per rank."""
    random.seed(derive(root, "python", rank))
    np.random.seed(derive(root, "numpy", rank) % 2**32)
    torch.manual_seed(derive(root, "torch", rank))


def capture() -> dict[str, Any]:
    """The state of all generators, as plain values, arrays and uint8 tensors."""
    states: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def drawn() -> tuple[Any, ...]:
    """What changes with every number drawn in this process, on the CPU or this GPU, and with nothing else. In a few
    microseconds: it is asked at every report."""
    bits: Any = np.random.get_bit_generator()  # type: ignore[attr-defined]
    if isinstance(bits, np.random.MT19937):
        # Its `state` copies number by number; this is the same in one go.
        numpy: Any = ctypes.string_at(bits.ctypes.state_address, _MT19937_BYTES)
    else:
        numpy = repr(bits.state)
    on_gpu = torch.cuda.get_rng_state().numpy().tobytes() if torch.cuda.is_initialized() else b""
    return random.getstate(), numpy, torch.get_rng_state().numpy().tobytes(), on_gpu


def restore(states: dict[str, Any]) -> None:
    """Continues where `capture` was called. The GPU's is skipped where there is none."""
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    torch.set_rng_state(states["torch"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
