"""All random numbers of a run from one root seed.

Every stream has a seed of its own, SHA-256 of the root and the stream's name. Streams that must differ between ranks
(dropout, augmentation) have the rank in their name; streams that must not (shuffling) do not. A run started again
begins with the same ones.
"""

from __future__ import annotations

import hashlib
import random
from typing import Any

import numpy as np
import torch


def derive(root: int, *name: object) -> int:
    """The 63-bit seed of a stream. Example: derive(0, "torch", 1) is rank 1's for torch."""
    text = "/".join(map(str, (root, *name)))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


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


def restore(states: dict[str, Any]) -> None:
    """Continues where `capture` was called. The GPU's is skipped where there is none."""
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    torch.set_rng_state(states["torch"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
