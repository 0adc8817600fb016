"""How a spool looks inside: pages of records, checksums, entries. Pure: numbers and bytes in, numbers and bytes out.

A producer's points are one endless row of pages of 4 KiB. Each holds 127 records and a seal: a checksum over them, the
page's number and the producer, written when the page is full. The row is cut into segments, files that grow from two
pages to 256. A *position* is a byte offset in the row, so that the writer only ever counts up.

A record ends with its own place in the segment. It is stored last: a record that says where it stands is whole, and a
page that never reached the disk is known by its zeros. That is all that protects the newest page, which has no seal
yet.
"""

from __future__ import annotations

import json
import struct
import zlib
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from orchestrator.records import Stream

VERSION = 2
"""Of everything here. A reader refuses what it does not know."""

PAGE_BYTES = 4096
RECORD = np.dtype([("step", "<i8"), ("time", "<f8"), ("value", "<f8"), ("key", "<u4"), ("end", "<u4")])
"""A point in the file. `end`: the offset in the segment at which the record ends."""
RECORD_STRUCT = struct.Struct("@qddII")
"""The same, for one record: native, because that is faster and stores each field at once, in this order."""
RECORD_BYTES = RECORD.itemsize
PAGE_POINTS = PAGE_BYTES // RECORD_BYTES - 1
PAGE_DATA_BYTES = PAGE_POINTS * RECORD_BYTES
"""The seal stands behind it."""
SEAL = struct.Struct("<QQQII")
"""Page number, 0, 0, 0, checksum."""

_FIRST_SEGMENTS = (2, 8, 32, 128)
_LARGEST_SEGMENT = 256
_STARTS = (0, 2, 10, 42, 170)
"""First page of each segment up to the first one of full size."""
SEGMENT_POINTS = _LARGEST_SEGMENT * PAGE_POINTS
"""Points in a segment of full size: 1 MiB."""


def segment_pages(number: int) -> int:
    """Pages of segment `number`: small at first, since most producers log little."""
    return _FIRST_SEGMENTS[number] if number < len(_FIRST_SEGMENTS) else _LARGEST_SEGMENT


def segment_start(number: int) -> int:
    """The first page of segment `number`."""
    grown = len(_STARTS) - 1
    return _STARTS[number] if number < grown else _STARTS[grown] + (number - grown) * _LARGEST_SEGMENT


def segment_of(page: int) -> int:
    """The segment that holds page `page`."""
    grown = len(_STARTS) - 1
    if page >= _STARTS[grown]:
        return grown + (page - _STARTS[grown]) // _LARGEST_SEGMENT
    return bisect_right(_STARTS, page) - 1


def points_before(position: int) -> int:
    """How many points stand before a position."""
    page, rest = divmod(position, PAGE_BYTES)
    return page * PAGE_POINTS + min(rest // RECORD_BYTES, PAGE_POINTS)


def salt_of(producer: str) -> int:
    """Goes into every checksum of a producer's files, so that another's are not taken for them."""
    return zlib.crc32(producer.encode())


def checksum(records: Any, page: int, salt: int) -> int:
    """Of the first records of page `page`, as bytes."""
    return zlib.crc32(records, (salt + page) & 0xFFFFFFFF)


def ends(first_page: int, pages: int) -> np.ndarray:
    """`end` of every record of `pages` pages from page `first_page` of a segment, shape (pages * PAGE_POINTS,)."""
    starts = (first_page + np.arange(pages, dtype=np.uint32)) * PAGE_BYTES
    return (starts[:, None] + np.arange(1, PAGE_POINTS + 1, dtype=np.uint32) * RECORD_BYTES).reshape(-1)


MEMBER, WITNESS, SAMPLER = "member", "witness", "sampler"
"""What a producer is to its run: one of its own processes; one that records on behalf of them (for a callback of a
trainer); or the sampler of a node, the only one whose life says nothing about the run's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Owner:
    """Whose points these are. Example: Owner(run="r1", attempt=1, rank=0)."""

    run: str
    attempt: int
    rank: int
    pid: int = 0
    host: str = ""
    role: str = MEMBER


# Words of `control`. Each group is a cache line of its own, written by one side only.
POSITION, PAGES, FACTS, CLOSED = 0, 8, 16, 24
"""By the producer."""
RELEASED, STOP = 112, 120
"""By the agent."""
WATERMARKS = {Stream.points: (64, 72), Stream.facts: (80, 88)}
"""Accepted and committed, by the agent."""
IDENTITY_OFFSET = 2048
CLOSED_MARK = 0x636C6F7365640000
STOP_MARK = 0x73746F7073746F70

# -- a number that matters is stored twice, the second time inverted

_ALL_BITS = (1 << 64) - 1


def inverted(number: int) -> int:
    return number ^ _ALL_BITS


def confirmed(first: int, second: int) -> int | None:
    """A number as stored in two words; None if they do not agree."""
    return first if first == inverted(second) else None


# -- key names, and who the producer is

_ENTRY = struct.Struct("<IIH")
_ENTRY_BYTES_MOST = 4096
IDENTITY = 0xFFFFFFFF
"""The index of the entry that says who the producer is."""


def entry(index: int, name: bytes, salt: int) -> bytes:
    """A key's name as stored: checksum, index, length, name."""
    rest = struct.pack("<IH", index, len(name)) + name
    return struct.pack("<I", zlib.crc32(rest, salt)) + rest


def entry_bytes(name: bytes) -> int:
    return _ENTRY.size + len(name)


def read_entries(raw: bytes, salt: int) -> tuple[dict[int, bytes], int]:
    """The names that are whole, by index, and the offset behind the last one. What is damaged is left out; the search
    goes on behind it.
    """
    found: dict[int, bytes] = {}
    position = after = 0
    stop = len(raw.rstrip(b"\0")) - _ENTRY.size
    while position < stop:
        checksum, index, length = _ENTRY.unpack_from(raw, position)
        end = position + _ENTRY.size + length
        if 0 < length <= _ENTRY_BYTES_MOST and zlib.crc32(raw[position + 4 : end], salt) == checksum:
            found[index] = raw[position + _ENTRY.size : end]
            position = after = end
        else:
            position += 1
    return found, after


def identity_entry(who: Mapping[str, Any], salt: int) -> bytes:
    return entry(IDENTITY, json.dumps({"version": VERSION, **who}).encode(), salt)


# -- facts


def fact_line(number: int, fact: bytes, salt: int) -> bytes:
    """A fact as stored: checksum, number, JSON, in one line."""
    rest = b"%d %s" % (number, fact)
    return b"%08x %s\n" % (zlib.crc32(rest, salt), rest)


def read_fact_line(line: bytes, salt: int) -> tuple[int, bytes] | None:
    """Number and JSON; None where the line is not what was written."""
    rest = line[9:-1]
    if line[:9] != b"%08x " % zlib.crc32(rest, salt) or line[-1:] != b"\n":
        return None
    number, _, fact = rest.partition(b" ")
    return int(number), fact
