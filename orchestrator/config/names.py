"""Which known name did somebody mean?"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable


def nearest(word: str, known: Iterable[str], *, cutoff: float = 0.6) -> str:
    """The known name most like `word`, or "" if none is like it."""
    names = list(known)
    found = difflib.get_close_matches(word, names, n=1, cutoff=cutoff)
    found = found or ([name for name in names if name.startswith(word)] if len(word) >= 3 else [])
    return found[0] if found else ""


def did_you_mean(word: str, known: Iterable[str], *, cutoff: float = 0.6) -> str:
    """A sentence, or ""."""
    name = nearest(word, known, cutoff=cutoff)
    return f"Did you mean {name}?" if name else ""


def lookalike(key: str, known: Iterable[str]) -> str:
    """The known dotted key that `key` is probably a slip of, or "".

    Compared part by part, so that a long common beginning does not make every sibling alike; names that differ only in
    digits (`beta1`, `beta2`) are siblings.
    """
    parts = key.split(".")
    best, best_ratio = "", 0.0
    for candidate in known:
        others = candidate.split(".")
        if len(others) != len(parts) or candidate == key:
            continue
        ratios = [_likeness(a, b) for a, b in zip(parts, others, strict=True)]
        if min(ratios) >= 0.8 and sum(ratios) / len(ratios) > best_ratio:
            best, best_ratio = candidate, sum(ratios) / len(ratios)
    return best


def _likeness(a: str, b: str) -> float:
    if a == b:
        return 1.0
    if re.sub(r"\d+", "0", a) == re.sub(r"\d+", "0", b):
        return 0.0
    if a.replace("_", "").replace("-", "").lower() == b.replace("_", "").replace("-", "").lower():
        return 0.99
    if sorted(a) == sorted(b):
        return 0.9  # two letters swapped
    return difflib.SequenceMatcher(None, a, b).ratio()
