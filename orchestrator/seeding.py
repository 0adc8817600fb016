"""Seeds of named streams of random numbers, all from one root."""

from __future__ import annotations

import hashlib


def derive(root: int, *name: object) -> int:
    """The 63-bit seed of a stream. Example: derive(0, "torch", 1) is rank 1's for torch."""
    text = "/".join(map(str, (root, *name)))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1
