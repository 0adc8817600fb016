"""Chunks of one row stand at one position: a copy takes all of them or none."""

from __future__ import annotations

import numpy as np

from orchestrator.backends.sinks import RunFacts, Target
from orchestrator.store.views import ChunkRow, FeedPosition
from orchestrator.tracking.copies import Copy, Rules


def chunk(key: str, rank: int, place: int) -> ChunkRow:
    steps = np.arange(2)
    return ChunkRow(
        key=key, attempt=1, rank=rank, steps=steps, times=steps / 10, values=steps / 7,
        position=FeedPosition(xid=place, id=place),
    )  # fmt: skip


def test_a_row_with_a_key_that_has_to_wait_waits_as_a_whole() -> None:
    rules = Rules(name_for=str, complete=100, grace=10.0)
    facts = RunFacts(id="r", experiment="e", name="n")
    copy = Copy(cursor_id="r", target=Target(id="t", url=""), facts=facts, rules=rules)
    # Rank 0 may log `b` yet, so rank 1 is not its curve so far.
    chunks = [chunk("a", 0, 1), chunk("a", 1, 2), chunk("b", 1, 2), chunk("a", 0, 3)]
    placed, _ = copy.decide(chunks, lambda: (), now=0.0)
    assert [each.position.id for each, _ in placed] == [1]
    copy.take(placed)
    assert copy.pending_position == FeedPosition(xid=1, id=1)
    placed, _ = copy.decide(chunks[1:], lambda: (), now=20.0)
    assert [(each.key, each.position.id) for each, _ in placed] == [("a", 2), ("b", 2), ("a", 3)]
