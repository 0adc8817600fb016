"""A stream is taken once, in order, whatever is sent twice, late or with gaps."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.records import POINT, BadFrame, Batch, Fact, FactKind, Stream, facts_payload
from orchestrator.tracking.delivery import Verdict, admit
from orchestrator.tracking.leases import Leases


def batch(first: int, count: int) -> Batch:
    points = np.zeros(count, POINT)
    points["step"] = np.arange(first, first + count)
    return Batch(
        producer="ab" * 16, run="r", attempt=1, rank=0, stream=Stream.points, first=first, count=count, keys=("x",),
        payload=points.tobytes(),
    )  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 200), st.randoms(use_true_random=False))
def test_any_delivery_that_reaches_the_end_stores_each_point_once(total: int, chance: random.Random) -> None:
    accepted, stored = 0, []
    for _ in range(10_000):
        if accepted == total:
            break
        first = chance.randint(1, total)
        decision = admit(batch(first, chance.randint(1, total - first + 1)), accepted)
        if decision.verdict is Verdict.accept:
            assert decision.batch is not None
            stored += decision.batch.points()["step"].tolist()
            accepted = decision.batch.last
        assert decision.expected == accepted + 1
    assert stored == list(range(1, accepted + 1))


def test_a_gap_is_refused_and_tells_what_is_missing() -> None:
    decision = admit(batch(5, 3), accepted=3)
    assert (decision.verdict, decision.expected, decision.batch) == (Verdict.gap, 4, None)


@settings(max_examples=50, deadline=None)
@given(st.text(max_size=30), st.integers(-1, 1000), st.lists(st.text(max_size=10), unique=True, max_size=5))
def test_a_batch_survives_the_wire(run: str, rank: int, keys: list[str]) -> None:
    sent = Batch(
        producer="0f" * 16, run=run, attempt=3, rank=rank, stream=Stream.points, first=2**40, count=2, keys=tuple(keys),
        payload=np.zeros(2, POINT).tobytes(),
    )  # fmt: skip
    assert Batch.decode(sent.encode()) == sent


def test_every_flipped_byte_is_noticed() -> None:
    frame = batch(1, 3).encode()
    for index in range(len(frame)):
        damaged = bytearray(frame)
        damaged[index] ^= 0x01
        with pytest.raises(BadFrame):
            Batch.decode(bytes(damaged))


def test_facts_are_trimmed_like_points() -> None:
    facts = [Fact(kind=FactKind.tag, at=0.0, data={"name": str(i), "value": ""}) for i in range(1, 6)]
    sent = Batch(
        producer="0f" * 16,
        run="r",
        attempt=1,
        rank=0,
        stream=Stream.facts,
        first=1,
        count=5,
        payload=facts_payload(facts),
    )
    rest = sent.after(3)
    assert rest is not None
    assert (rest.first, rest.count, [f.data["name"] for f in rest.facts()]) == (4, 2, ["4", "5"])


def test_a_lease_that_is_renewed_does_not_expire() -> None:
    leases = Leases(15.0)
    leases.begin(("a", 1), now=0.0)
    leases.begin(("b", 1), now=0.0)
    leases.renew(("b", 1), now=10.0)
    assert leases.expired(now=16.0) == [("a", 1)]
    leases.end(("a", 1))
    assert leases.expired(now=24.9) == []
