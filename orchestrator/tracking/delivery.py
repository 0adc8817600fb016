"""Exactly once: who numbers, who drops. Pure.

A producer numbers its entries 1, 2, 3 … per stream. The tracker accepts a batch when it continues what it has; what it
has already is acknowledged again and not stored again; a gap is refused, and the answer tells from where to send.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from orchestrator.records import Batch


class Verdict(StrEnum):
    accept = "accept"
    duplicate = "duplicate"
    gap = "gap"


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """What to do with a batch: `batch` is what is new in it (verdict accept), `expected` the next missing number."""

    verdict: Verdict
    expected: int
    batch: Batch | None = None


def admit(batch: Batch, accepted: int) -> Decision:
    """Decides about `batch` of a stream of which everything up to number `accepted` is already accepted."""
    if batch.first > accepted + 1:
        return Decision(verdict=Verdict.gap, expected=accepted + 1)
    new = batch.after(accepted)
    if new is None:
        return Decision(verdict=Verdict.duplicate, expected=accepted + 1)
    return Decision(verdict=Verdict.accept, expected=new.last + 1, batch=new)
