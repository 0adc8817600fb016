"""Moves what is accepted from the tracker's log into PostgreSQL.

The log is the queue: the committer reads behind the writer, so an outage of any length costs disk, not memory. What it
commits twice after a crash is dropped by the producer's watermark, in the same transaction (`store.commit`).
"""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from orchestrator.errors import UserError
from orchestrator.records import BadFrame, Batch, Stream
from orchestrator.store.errors import Gap, SequenceGap, UnknownRun
from orchestrator.tracking.wal import Position, WriteAheadLog

logger = logging.getLogger(__name__)

SAVE = 1.0
"""Seconds between two words to the disk of how far the log is committed."""

Watermarks = Mapping[tuple[str, Stream], int]


class CommitTarget(Protocol):
    def commit(self, batches: Sequence[Batch]) -> Watermarks:
        """One transaction for everything; returns the new watermarks. Raises ServiceUnavailable; SequenceGap and
        UnknownRun after committing what the others sent.
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """What one step took from the log. Most steps of a tracker at rest find nothing."""

    points: int
    position: Position
    """Behind it."""


class Committer:
    """`step` commits one piece of the log. Called by one thread.

    The further it is behind, the larger the pieces: the rows that each transaction changes anyway (watermarks,
    summaries) are then fewer per point.
    """

    PIECE_BYTES, LARGEST_BYTES = 4 << 20, 16 << 20
    """Of a piece, when little waits and when much waits."""
    BATCHES = 4000
    """At most in a piece. Together with the largest size it bounds the memory: a batch takes about 10 KB beside its
    points."""

    def __init__(
        self,
        log: WriteAheadLog,
        store: CommitTarget,
        on_commit: Callable[[Watermarks], None],
        on_gap: Callable[[Sequence[Gap]], None],
        on_piece: Callable[[Piece], None] = lambda piece: None,
    ) -> None:
        self._log, self._store = log, store
        self._on_commit, self._on_gap, self._on_piece = on_commit, on_gap, on_piece
        self._position = log.load_cursor()
        self._saved_at = -math.inf
        self.failure: str = ""
        """Why the last step could not commit; empty when it could."""

    @property
    def position(self) -> Position:
        """Up to here the log is committed."""
        return self._position

    @property
    def is_done(self) -> bool:
        """Everything that is accepted is committed."""
        return self._position == self._log.synced

    def step(self) -> bool:
        """Commits the next piece. False if there is nothing to do or the database does not take it now."""
        if self.is_done:
            return False
        batches, position, end = [], self._position, self._log.synced
        limit = min(max(self.lag_bytes, self.PIECE_BYTES), self.LARGEST_BYTES)
        for after, frame in self._log.read(self._position, limit):
            position = after
            try:
                batches.append(Batch.decode(frame))
            except BadFrame as error:
                logger.error("a frame of the tracker's log cannot be read and is skipped: %s", error)
            if len(batches) == self.BATCHES:
                break
        if position == self._position:
            position = end  # nothing intact is left before there
        try:
            watermarks = self._commit_or_part(batches) if batches else {}
        except UserError as error:
            self.failure = str(error)
            return False
        self.failure = ""
        self._on_commit(watermarks)
        self._position = position
        # In this order: on a full disk the cursor cannot be written before a segment is gone.
        self._log.remove_before(position)
        self._save_cursor()
        points = sum(batch.count for batch in batches if batch.stream is Stream.points)
        self._on_piece(Piece(points=points, position=position))
        return True

    def _save_cursor(self) -> None:
        """Now and then: replacing a file costs a file system more than many a commit, and a cursor that is too old does
        no harm."""
        now = time.monotonic()
        if now - self._saved_at < SAVE:
            return
        self._saved_at = now
        with contextlib.suppress(OSError):
            self._log.save_cursor(self._position)

    def _commit_or_part(self, batches: Sequence[Batch]) -> Watermarks:
        try:
            return self._commit(batches)
        except Exception as error:
            if not _may_be_the_data(error):
                raise
            logger.warning("a commit failed (%s: %s); trying each producer's alone", type(error).__name__, error)
            return self._commit_apart(batches)

    def _commit(self, batches: Sequence[Batch]) -> Watermarks:
        try:
            return self._store.commit(batches)
        except SequenceGap as refusal:
            # A damaged log. The producers keep what is not committed: they are asked again from the first missing
            # entry.
            logger.error("the tracker's log misses entries, which are asked for again: %s", refusal)
            self._on_gap(refusal.gaps)
            return refusal.watermarks
        except UnknownRun as refusal:
            # Somebody removed the run, or the database is an older one. Never acknowledged as committed, so the
            # spools stay.
            logger.error("%s Their spools are kept.", refusal)
            return refusal.watermarks

    def _commit_apart(self, batches: Sequence[Batch]) -> Watermarks:
        """Each producer's own, after an error that nobody foresaw: what the database can never take must not hold up
        the others. It is set aside like what belongs to no run, unless nobody's can be committed: then it is tried
        again.
        """
        watermarks: dict[tuple[str, Stream], int] = {}
        refused: dict[str, Exception] = {}
        producers = dict.fromkeys(batch.producer for batch in batches)
        for producer in producers:
            try:
                watermarks |= self._commit([batch for batch in batches if batch.producer == producer])
            except Exception as error:
                if not _may_be_the_data(error):
                    raise
                refused[producer] = error
        if len(refused) == len(producers):
            raise next(iter(refused.values()))
        for producer, why in refused.items():
            logger.error("what producer %s logged cannot be committed; its spool is kept", producer, exc_info=why)
        return watermarks

    @property
    def lag_bytes(self) -> int:
        """Bytes of the log that are not committed yet, roughly (whole segments plus the difference of offsets)."""
        end, position = self._log.synced, self._position
        if end.segment == position.segment:
            return end.offset - position.offset
        return self._log.size_bytes() - position.offset


def _may_be_the_data(error: Exception) -> bool:
    """Whether it is an error that values can cause, by its type or by its SQLSTATE (class 22, data exception)."""
    if isinstance(error, UserError):
        return False
    is_python = isinstance(error, ValueError | TypeError | LookupError | ArithmeticError | RecursionError)
    return is_python or str(getattr(error, "sqlstate", None)).startswith("22")
