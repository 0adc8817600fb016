"""What the tracker knows of each producer: what is written to the log, durable there, and committed. Pure.

Three marks per stream. *written*: handed to the log, perhaps not on disk yet; the next batch must follow it.
*accepted*: fsynced. *committed*: in the database. What is forgotten here is learned again from the database, which has
everything that the log has no more.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

from orchestrator.records import Ack, Batch, Stream
from orchestrator.tracking.delivery import Decision, Verdict, admit

UNKNOWN = -1
"""A mark about which neither log nor database has told yet."""

QUIET = 300.0
"""Seconds after which a producer of which nothing is heard, and nothing is left to commit, is forgotten."""

Mark = tuple["Standing", Stream, int]
"""A stream of a producer, and how far it will be accepted with the next sync."""


@dataclass(slots=True, eq=False)
class Standing:
    """One producer's marks, indexed by stream."""

    heard: float
    """Monotonic time of its last word."""
    written: list[int] = field(default_factory=lambda: [UNKNOWN] * len(Stream))
    accepted: list[int] = field(default_factory=lambda: [UNKNOWN] * len(Stream))
    committed: list[int] = field(default_factory=lambda: [UNKNOWN] * len(Stream))

    def is_known(self) -> bool:
        # Of both streams: the log and a commit may tell of one alone.
        return UNKNOWN not in self.accepted and UNKNOWN not in self.committed

    def is_settled(self) -> bool:
        """Everything of it is in the database."""
        return self.written == self.accepted == self.committed

    def raise_to(self, stream: Stream, committed: int) -> None:
        """What is committed is accepted, too, whoever accepted it."""
        self.committed[stream] = max(self.committed[stream], committed)
        self.accepted[stream] = max(self.accepted[stream], committed)
        self.written[stream] = max(self.written[stream], committed)


class Admission:
    """Not safe for threads, but for `unknown` and `ack`.

    Example: admission.decide(batch, now) -> Decision; then append, `written`, sync, `accepted`.
    """

    def __init__(self) -> None:
        self._standings: dict[str, Standing] = {}
        self._asked: set[str] = set()
        """Producers about which the database is being asked, and whose answer still counts."""

    def __len__(self) -> int:
        return len(self._standings)

    def recovered(self, batch: Batch, now: float) -> None:
        """`batch` was found in the log at the start. After a hole only what is before it counts: the producer sends the
        rest again."""
        standing = self._standings.setdefault(batch.producer, Standing(now))
        stream = batch.stream
        known = standing.accepted[stream]
        if known == UNKNOWN:
            known = batch.first - 1
        if batch.first <= known + 1:
            standing.accepted[stream] = standing.written[stream] = max(known, batch.last)

    # -- what the database knows

    def unknown(self, producers: Iterable[str]) -> list[str]:
        """Those about which the database must be asked: new ones, or all after a restart."""
        found = []
        for producer in dict.fromkeys(producers):
            standing = self._standings.get(producer)
            if standing is None or not standing.is_known():
                found.append(producer)
        return found

    def asking(self, producers: Iterable[str]) -> None:
        self._asked = set(producers)

    def learned(self, stored: Mapping[tuple[str, Stream], int], now: float) -> bool:
        """The answer about all that were asked for. It does not count for who was forgotten meanwhile: it may be older
        than what was forgotten. True if the log told more of one of them than the database has."""
        is_behind = False
        for producer in self._asked:
            standing = self._standings.setdefault(producer, Standing(now))
            is_behind |= any(standing.accepted[stream] > stored.get((producer, stream), 0) for stream in Stream)
            for stream in Stream:
                # A log that was lost or cut counts for nothing against what is committed, and the other way round.
                standing.raise_to(stream, stored.get((producer, stream), 0))
        self._asked = set()
        return is_behind

    def committed(self, watermarks: Mapping[tuple[str, Stream], int]) -> None:
        for (producer, stream), mark in watermarks.items():
            standing = self._standings.get(producer)
            if standing is not None:
                standing.raise_to(stream, mark)

    # -- batches

    def decide(self, batch: Batch, now: float) -> Decision | None:
        """None: nothing is known of the producer, nothing can be said. A gap at a producer of which everything is
        committed makes it forgotten: another tracker may have gone on with it."""
        standing = self._standings.get(batch.producer)
        if standing is None or standing.written[batch.stream] == UNKNOWN:
            return None
        standing.heard = now
        decision = admit(batch, standing.written[batch.stream])
        if decision.verdict is Verdict.gap and standing.is_settled():
            self.forget([batch.producer])
        return decision

    def written(self, batch: Batch) -> None:
        """The log has the batch that `decide` gave, perhaps not yet on disk."""
        self._standings[batch.producer].written[batch.stream] = batch.last

    def marks(self, batches: Iterable[Batch]) -> list[Mark]:
        """What of the streams of these batches the next sync makes durable."""
        found = []
        for batch in batches:
            standing = self._standings.get(batch.producer)
            if standing is not None and standing.accepted[batch.stream] < standing.written[batch.stream]:
                found.append((standing, batch.stream, standing.written[batch.stream]))
        return found

    @staticmethod
    def accepted(marks: Iterable[Mark]) -> None:
        """A sync that began after `marks` was asked is done. Who was forgotten meanwhile has another standing now."""
        for standing, stream, mark in marks:
            standing.accepted[stream] = max(standing.accepted[stream], mark)

    def ack(self, producer: str, stream: Stream, *, stop: bool, watched: bool = False) -> Ack | None:
        """None: nothing is known of it; it asks again."""
        standing = self._standings.get(producer)
        if standing is None or standing.accepted[stream] == UNKNOWN:
            return None
        accepted = standing.accepted[stream]
        committed = min(max(standing.committed[stream], 0), accepted)
        return Ack(producer=producer, stream=stream, accepted=accepted, committed=committed, stop=stop, watched=watched)

    def heard(self, producers: Iterable[str], now: float) -> None:
        for producer in producers:
            standing = self._standings.get(producer)
            if standing is not None:
                standing.heard = now

    # -- forgetting

    def quiet(self, now: float, empty_at: float) -> list[str]:
        """Producers that need not be remembered: long silent, and nothing of them waits in the log. `empty_at`: when
        the committer last had nothing to do, so that what is older was at least looked at (a run that the database does
        not know is never committed)."""
        before, passed = now - QUIET, empty_at - QUIET
        return [
            producer
            for producer, standing in list(self._standings.items())
            if standing.heard < before and (standing.is_settled() or standing.heard < passed)
        ]

    def unsettled(self) -> list[str]:
        """Producers of which something is accepted and not committed."""
        found = list(self._standings.items())
        return [producer for producer, standing in found if standing.is_known() and not standing.is_settled()]

    def forget(self, producers: Collection[str]) -> None:
        for producer in producers:
            self._standings.pop(producer, None)
            self._asked.discard(producer)
