"""run.json: which run a directory belongs to and how its driver says it stands. Pure.

Written by the driver itself when an attempt begins and when it ends, so that the directory can be found and read
where neither a service nor the database answers. A driver that was killed leaves `RUNNING`.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

from orchestrator.records import RunStatus, RunTicket

PROTOCOL = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    run: str
    name: str
    experiment: str
    attempt: int
    status: RunStatus
    reason: str = ""
    at: float = 0.0
    """When that was so."""

    @classmethod
    def of(cls, ticket: RunTicket, status: RunStatus, at: float, reason: str = "") -> Identity:
        return cls(
            run=ticket.run, name=ticket.name, experiment=ticket.experiment, attempt=ticket.attempt, status=status,
            reason=reason, at=at,
        )  # fmt: skip

    def encode(self) -> bytes:
        return (json.dumps({"protocol": PROTOCOL, **asdict(self)}, indent=2, ensure_ascii=False) + "\n").encode()


def decode(data: bytes) -> Identity | None:
    """None for what is none, or of another protocol."""
    try:
        raw = json.loads(data)
        if raw.pop("protocol") != PROTOCOL:
            return None
        return Identity(**{**raw, "status": RunStatus(raw["status"])})
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
