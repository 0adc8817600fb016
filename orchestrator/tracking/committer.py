"""Moves what is accepted from the tracker's log into PostgreSQL.

The log is the queue: the committer reads behind the writer, so an outage of any length costs disk, not memory. What it
commits twice after a crash is dropped by the producer's watermark, in the same transaction (`store.commit`).
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from orchestrator.errors import UserError
from orchestrator.records import BadFrame, Batch, Stream
from orchestrator.store.errors import Gap, SequenceGap, UnknownRun
from orchestrator.tracking.wal import WriteAheadLog

logger = logging.getLogger(__name__)

Watermarks = Mapping[tuple[str, Stream], int]


class CommitTarget(Protocol):
    def commit(self, batches: Sequence[Batch]) -> Watermarks:
        """One transaction for everything; returns the new watermarks. Raises ServiceUnavailable; SequenceGap and
        UnknownRun after committing what the others sent.
        """
        ...


class Committer:
    """`step` commits one piece of the log. Called by one thread."""

    CHUNK_BYTES = 4 << 20

    def __init__(
        self,
        log: WriteAheadLog,
        store: CommitTarget,
        on_commit: Callable[[Watermarks], None],
        on_gap: Callable[[Sequence[Gap]], None],
    ) -> None:
        self._log, self._store, self._on_commit, self._on_gap = log, store, on_commit, on_gap
        self._position = log.load_cursor()
        self.failure: str = ""
        """Why the last step could not commit; empty when it could."""

    def step(self) -> bool:
        """Commits the next piece. False if there is nothing to do or the database does not take it now."""
        batches, position = [], self._position
        for after, frame in self._log.read(self._position, self.CHUNK_BYTES):
            position = after
            try:
                batches.append(Batch.decode(frame))
            except BadFrame as error:
                logger.error("a frame of the tracker's log cannot be read and is skipped: %s", error)
        if position == self._position:
            return False
        try:
            watermarks = self._commit(batches) if batches else {}
        except UserError as error:
            self._note_failure(str(error))
            return False
        self._note_success()
        self._on_commit(watermarks)
        self._position = position
        # In this order: on a full disk the cursor cannot be written before a segment is gone. A cursor that is too old
        # does no harm.
        self._log.remove_before(position)
        with contextlib.suppress(OSError):
            self._log.save_cursor(position)
        return True

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

    @property
    def lag_bytes(self) -> int:
        """Bytes of the log that are not committed yet, roughly (whole segments plus the difference of offsets)."""
        end = self._log.synced
        if end.segment == self._position.segment:
            return end.offset - self._position.offset
        return self._log.size_bytes() - self._position.offset

    def _note_failure(self, why: str) -> None:
        if not self.failure:
            logger.warning(
                "PostgreSQL does not take commits; the tracker's log keeps everything until it does: %s", why
            )
        self.failure = why

    def _note_success(self) -> None:
        if self.failure:
            logger.info("PostgreSQL takes commits again")
        self.failure = ""
