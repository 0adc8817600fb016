"""A producer without a training process: it numbers points and facts and packs them into batches."""

from __future__ import annotations

import json
import uuid
from collections.abc import Sequence
from typing import Any

import numpy as np

from orchestrator.records import POINT, Batch, Fact, FactKind, RunTicket, Stream, facts_payload

NOW = 1_700_000_000.0
KEYS = ("train/loss", "val/accuracy")


class Producer:
    """Numbers what it sends, as a training process does."""

    def __init__(self, ticket: RunTicket, rank: int = 0) -> None:
        self.id, self.ticket, self.rank = uuid.uuid4().hex, ticket, rank
        self.sent = {Stream.points: 0, Stream.facts: 0}

    def batch(self, stream: Stream, count: int, payload: bytes) -> Batch:
        first = self.sent[stream] + 1
        self.sent[stream] += count
        return Batch(
            producer=self.id, run=self.ticket.run, attempt=self.ticket.attempt, rank=self.rank, stream=stream,
            first=first, count=count, keys=KEYS if stream is Stream.points else (), payload=payload,
        )  # fmt: skip

    def points(self, rows: Sequence[tuple[int, int, float]]) -> Batch:
        """(key, step, value); the time is the step's."""
        payload = np.array(
            [(key, 0, step, NOW + number, value) for number, (key, step, value) in enumerate(rows)], POINT
        )
        return self.batch(Stream.points, len(rows), payload.tobytes())

    def facts(self, *facts: Fact) -> Batch:
        return self.batch(Stream.facts, len(facts), facts_payload(facts))

    def raw_facts(self, *facts: Any) -> Batch:
        return self.batch(Stream.facts, len(facts), json.dumps(facts).encode())


def fact(kind_of_fact: FactKind, at: float = NOW, **data: Any) -> Fact:
    return Fact(kind=kind_of_fact, at=at, data=data)


def series(count: int, start: int = 0) -> list[tuple[int, int, float]]:
    return [(number % 2, number, number / 7) for number in range(start, start + count)]
