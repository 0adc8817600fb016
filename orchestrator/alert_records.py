"""Values about alerts that cross a process border or come out of the database. They import nothing of ours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class AlertRow:
    """One alert of a run: a rule on a series, and how it stands. Times are seconds since 1970."""

    run: str
    rule: str
    rank: int
    """-1: of no rank."""
    key: str
    """The metric, or the kind of event."""
    attempt: int
    is_firing: bool
    number: int
    """How often it fired."""
    level: str
    message: str
    value: float | None
    step: int | None
    fired_at: float
    resolved_at: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Notice:
    """What somebody is to be told, whoever tells it. `key` is the same whenever it is sent again."""

    key: str
    subject: str
    """What it is about: a firing and its end have the same."""
    kind: str
    """fired, resolved, completion, failure or test"""
    title: str
    """One line."""
    message: str
    level: str
    at: float
    run: str = ""
    run_name: str = ""
    experiment: str = ""
    attempt: int = 0
    details: Mapping[str, Any] = field(default_factory=dict)
    """Further facts, name -> value, for people."""


class NotSent(Exception):
    """A notice was not taken. `is_final`: trying again would not help. `wait`: the seconds that the server asks for."""

    def __init__(self, why: str, is_final: bool = False, wait: float = 0.0) -> None:
        super().__init__(why, is_final, wait)
        self.why, self.is_final, self.wait = why, is_final, wait

    def __str__(self) -> str:
        return self.why


@dataclass(frozen=True, slots=True, kw_only=True)
class Posting:
    """A notice on its way to one channel."""

    channel: str
    """Id of the channel, in the file of addresses on the tracker's host."""
    notifier: str
    """Its kind, for people: slack, webhook …"""
    notice: Notice
    after: float = 0.0
    """Not before: seconds since 1970."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Claimed:
    """A posting that is to be sent now."""

    id: int
    channel: str
    notifier: str
    tries: int
    """With this one."""
    notice: Notice


@dataclass(frozen=True, slots=True, kw_only=True)
class NotificationRow:
    """A notification that is not sent, or could not be."""

    run: str
    notifier: str
    kind: str
    title: str
    state: str
    """waiting, sent or failed"""
    tries: int
    error: str
    created: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Watched:
    """A run whose rules or end somebody wants to be told of."""

    run: str
    attempt: int
    name: str
    experiment: str
    status: str
    reason: str
    error: Mapping[str, Any] | None
    ended_at: float | None
    alerts: Mapping[str, Any]
    """As `RunSpec.alerts`, without addresses."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TurnRow:
    """An alert that fired or was resolved, with whom to tell. Example: see alerts/service.py."""

    alert: AlertRow
    at: float
    details: Mapping[str, Any] = field(default_factory=dict)
    postings: Sequence[Posting] = ()


ROWS = (AlertRow, NotificationRow)
"""What the API serves."""
