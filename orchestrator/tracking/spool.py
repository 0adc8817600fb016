"""The spool: where a producer's points and facts are *logged*, on the producer's own node.

One directory per producer, named by its id:

    control         4 KiB, memory-mapped by producer and agent: counters, one writer per field; who the producer is
    keys            that once more, and the names of the metric keys in the order of their first use
    points-000000   segments of pages of records, see spool_layout.py
    next-000001     the next segment, reserved by the agent; the producer takes it by renaming it
    facts           one fact per line, numbered; from the first one on
    owner           locked with lockf by the living producer

The producer stores a record and then moves its position; the agent reads up to the position. Both are plain stores into
shared memory, so what was logged survives SIGKILL of the producer. `fcntl.lockf`, not `flock`: a forked DataLoader
worker that outlives its killed parent would keep a flock.

Everything carries a checksum, but for the newest page of points. What does not match any more is *lost*: it keeps its
number and is shipped as such (`records.LOST`), so that it is counted and the rest arrives.
"""

from __future__ import annotations

from orchestrator.tracking.spool_layout import MEMBER, SAMPLER, SEGMENT_POINTS, WITNESS, Owner
from orchestrator.tracking.spool_reader import SpoolReader, remove_leftovers, spools
from orchestrator.tracking.spool_root import SpoolUnusable, file_system_of, prepare_root
from orchestrator.tracking.spool_writer import DEFAULT_BYTES, SpoolWriter

__all__ = [
    "DEFAULT_BYTES", "MEMBER", "SAMPLER", "SEGMENT_POINTS", "WITNESS", "Owner", "SpoolReader", "SpoolUnusable",
    "SpoolWriter", "file_system_of", "prepare_root", "remove_leftovers", "spools",
]  # fmt: skip
