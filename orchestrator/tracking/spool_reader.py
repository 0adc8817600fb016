"""The agent's side of a spool: what a producer logged, checked, as batches; what the tracker answered, handed back."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import mmap
import os
import time as clock
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from orchestrator import disk
from orchestrator.records import LOST, POINT, Batch, Fact, FactKind, Stream
from orchestrator.tracking import spool_layout as layout
from orchestrator.tracking.spool_layout import PAGE_BYTES, PAGE_DATA_BYTES, PAGE_POINTS, SEGMENT_POINTS, Owner
from orchestrator.tracking.spool_root import SpoolForeign, map_file, own_producers, reserve_file

logger = logging.getLogger(__name__)

_FACTS_BYTES_MOST = 1 << 20
"""Facts in a batch, unless one alone is larger."""


class SpoolReader:
    """The agent's side of one producer's spool. Raises SpoolForeign when the directory is no such spool, OSError when
    it cannot be read now.

    Keeps nothing open or mapped while it `rest`s; every call wakes it.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.producer = directory.name
        self._salt = layout.salt_of(self.producer)
        self._control: mmap.mmap | None = None
        self._mapped: memoryview | None = None
        self._keys: dict[int, str] = {}
        self._keys_read = 0
        who = self._identity()
        try:
            self.owner = Owner(**{name: who[name] for name in Owner.__dataclass_fields__})
            self._max_bytes = int(who["max_bytes"])
        except (KeyError, TypeError, ValueError) as error:
            raise SpoolForeign(str(directory), f"it does not say who wrote it ({error})") from error
        words = self._look_into()
        self._accepted, self._committed = (
            {
                stream: layout.confirmed(*words[at[which] : at[which] + 2]) or 0
                for stream, at in layout.WATERMARKS.items()
            }
            for which in (0, 1)
        )
        self._released = layout.confirmed(*words[layout.RELEASED : layout.RELEASED + 2]) or 0
        self._removed = layout.segment_of(self._released // PAGE_BYTES)
        """Segments before this one are gone."""
        self._logged = dict.fromkeys(Stream, 0)
        self._end: dict[Stream, int] | None = None
        """What there is in all, once the producer is gone."""
        self._facts_at = (0, 0)  # (facts read, byte offset behind them)
        self._lost = 0

    def _identity(self) -> Mapping[str, Any]:
        control, keys = self._whole("control")[layout.IDENTITY_OFFSET :], self._whole("keys")
        for raw in (control, keys):
            found = layout.read_entries(raw, self._salt)[0].get(layout.IDENTITY)
            if found is not None:
                who: dict[str, Any] = json.loads(found)
                if who.get("version") == layout.VERSION:
                    return who
                raise SpoolForeign(str(self.directory), f"its version is {who.get('version')}")
        if (self.directory / "meta.json").exists():
            raise SpoolForeign(str(self.directory), "its version is 1")
        raise SpoolForeign(str(self.directory), "both places that say who wrote it are damaged, or it is no spool")

    def _whole(self, name: str) -> bytes:
        try:
            return (self.directory / name).read_bytes()
        except FileNotFoundError:
            return b""

    # -- how much there is

    def logged(self, stream: Stream) -> int:
        """Entries that are there, as far as the producer's counters can be believed."""
        if self._end is None:
            self._look()
        return self.seen(stream)

    def has_news(self) -> bool:
        """There is something that is not accepted."""
        if self._end is None:
            self._look()
        return any(self.seen(stream) > self._accepted[stream] for stream in Stream)

    def _look(self) -> None:
        words = self._look_into()
        for stream, found in ((Stream.points, self._points_said(words)), (Stream.facts, self._facts_said(words))):
            self._logged[stream] = max(found or 0, self._logged[stream])

    def seen(self, stream: Stream) -> int:
        """`logged` as it was at the last look."""
        return self._end[stream] if self._end is not None else self._logged[stream]

    def accepted(self, stream: Stream) -> int:
        return self._accepted[stream]

    def committed(self, stream: Stream) -> int:
        return self._committed[stream]

    @property
    def held_bytes(self) -> int:
        """What its segments take on the disk."""
        page = max(self.seen(Stream.points) - 1, 0) // PAGE_POINTS
        number = layout.segment_of(page)
        end = (layout.segment_start(number) + layout.segment_pages(number)) * PAGE_BYTES
        return max(end - self._released, 0)

    def _points_said(self, words: Any) -> int | None:
        """A position that no other word confirms is none: of a living producer the next one will be right, and a dead
        one's records tell themselves.
        """
        before, position, after = words[layout.PAGES], words[layout.POSITION], words[layout.PAGES]
        page = position // PAGE_BYTES
        is_likely = page <= after and before <= page + 1 and position % layout.RECORD_BYTES == 0
        return layout.points_before(position) if is_likely else None

    def _facts_said(self, words: Any) -> int | None:
        return layout.confirmed(words[layout.FACTS], words[layout.FACTS + 1])

    def settle(self) -> None:
        """The producer is gone: from now on what its records say counts, where they say more than its counters, and
        where the counters are damaged.
        """
        if self._end is None:
            words = self._look_into()
            points, facts = self._points_said(words), self._facts_said(words)
            self._end = {
                Stream.points: max(points or 0, self._last_point()),
                Stream.facts: max(self._last_fact(), facts or 0),
            }

    def _last_point(self) -> int:
        """The number of the newest record that is whole."""
        for number in sorted(self._segments(), reverse=True):
            start, pages = layout.segment_start(number), layout.segment_pages(number)
            records, _ = self._read_pages(number, 0, pages)
            whole = np.flatnonzero(records["end"] == layout.ends(0, pages))
            if len(whole):
                return start * PAGE_POINTS + int(whole[-1]) + 1
        return 0

    def _last_fact(self) -> int:
        last = 0
        with contextlib.suppress(FileNotFoundError), (self.directory / "facts").open("rb") as file:
            for line in file:
                last = (layout.read_fact_line(line, self._salt) or (last, b""))[0]
        return last

    def _segments(self) -> list[int]:
        return [int(path.name[7:]) for path in self.directory.glob("points-*")]

    # -- entries

    def next_batch(self, stream: Stream, after: int, limit: int = SEGMENT_POINTS) -> Batch | None:
        """The entries behind number `after`, at most `limit` and to the end of a segment; None if there are none.

        What is damaged is in it as lost. Raises OSError when the files cannot be read for another reason than damage.
        """
        count = min(self.logged(stream) - after, limit)
        if count <= 0:
            return None
        return self._points(after, count) if stream is Stream.points else self._facts(after, count)

    def _points(self, after: int, count: int) -> Batch | None:
        page, index = divmod(after, PAGE_POINTS)
        number = layout.segment_of(page)
        first = page - layout.segment_start(number)
        pages = min(-(-(index + count) // PAGE_POINTS), layout.segment_pages(number) - first)
        count = min(count, pages * PAGE_POINTS - index)
        logged = self.seen(Stream.points)
        records, is_lost = self._checked_pages(number, first, pages, logged)
        if is_lost[index : index + count].any():  # once more: it may have been the reading
            records, is_lost = self._checked_pages(number, first, pages, logged)
        names = self._names(records["key"], is_lost)
        found, is_lost = records[index : index + count], is_lost[index : index + count]
        if self._end is None and after + count == logged and is_lost[-1]:
            # At the very end of a living producer it is rather its position that is wrong; the next point will tell.
            good = np.flatnonzero(~is_lost)
            count = int(good[-1]) + 1 if len(good) else 0
            if count == 0:
                return None
            found, is_lost = found[:count], is_lost[:count]
        self._say_lost(after, is_lost)
        payload, keys = _points_payload(found, is_lost, names)
        return self._batch(Stream.points, after, count, keys, payload)

    def _checked_pages(self, number: int, first: int, pages: int, logged: int) -> tuple[np.ndarray, np.ndarray]:
        """Records of some pages of a segment, and which of them are lost. Sealed pages by their checksum, the newest
        one by what the records say of themselves.
        """
        records, seals = self._read_pages(number, first, pages)
        is_lost = records["end"] != layout.ends(first, pages)
        start = layout.segment_start(number) + first
        newest = max(logged - 1, 0) // PAGE_POINTS
        raw = records.view(np.uint8)
        for page in range(pages):
            here = slice(page * PAGE_POINTS, (page + 1) * PAGE_POINTS)
            whole = raw[page * PAGE_DATA_BYTES : (page + 1) * PAGE_DATA_BYTES]
            if start + page < newest:
                is_lost[here] = layout.checksum(whole, start + page, self._salt) != seals[page]
            elif start + page == newest and (rest := self._rest_checksum()) is not None:
                held = logged - newest * PAGE_POINTS
                is_same = layout.checksum(whole[: held * layout.RECORD_BYTES], newest, self._salt) == rest
                is_lost[here] |= not is_same
        return records, is_lost

    def _rest_checksum(self) -> int | None:
        """Of the newest page, from a producer that closed its spool."""
        mark, rest = self._look_into()[layout.CLOSED : layout.CLOSED + 2]
        return rest if mark == layout.CLOSED_MARK else None

    def _read_pages(self, number: int, first: int, pages: int) -> tuple[np.ndarray, list[int]]:
        """The records, shape (pages * PAGE_POINTS,), and the seals' checksums. What is not there is zero."""
        raw = self._read(self.directory / f"points-{number:06d}", first * PAGE_BYTES, pages * PAGE_BYTES)
        rows = np.frombuffer(raw, layout.RECORD).reshape(pages, PAGE_POINTS + 1)
        seals = np.frombuffer(raw, "<u4").reshape(pages, PAGE_BYTES // 4)[:, -1].tolist()
        return rows[:, :PAGE_POINTS].reshape(-1), seals

    def _read(self, path: Path, offset: int, size: int) -> bytearray:
        """Zeros stand for what cannot be read: a file that is gone or cut off, a bad sector."""
        raw = bytearray(size)
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            if not self.directory.exists():
                raise
            return raw
        try:
            with memoryview(raw) as view:
                try:
                    os.preadv(fd, [view], offset)
                except OSError as error:
                    if error.errno != errno.EIO:
                        raise
                    for start in range(0, size, PAGE_BYTES):
                        with contextlib.suppress(OSError):
                            os.preadv(fd, [view[start : start + PAGE_BYTES]], offset + start)
        finally:
            os.close(fd)
        return raw

    def _names(self, keys: np.ndarray, is_lost: np.ndarray) -> dict[int, str]:
        """Names of the keys that are used. A record whose key has no name that could be read is lost."""
        used = _distinct(keys[~is_lost])
        if any(index not in self._keys for index in used):
            self._read_keys()
        if any(index not in self._keys for index in used):
            # Where a signal handler's key was written first, a key may have come to stand before what was read.
            self._keys_read = 0
            self._read_keys()
        names = {index: self._keys[index] for index in used if index in self._keys}
        if len(names) < len(used):
            is_lost |= ~np.isin(keys, list(names))
        return names

    def _read_keys(self) -> None:
        path = self.directory / "keys"
        raw = self._read(path, self._keys_read, max(path.stat().st_size - self._keys_read, 0))
        found, after = layout.read_entries(bytes(raw), self._salt)
        self._keys_read += after
        found.pop(layout.IDENTITY, None)
        self._keys |= {index: name.decode() for index, name in found.items()}

    def _facts(self, after: int, count: int) -> Batch:
        """A number that no line has was damaged: an event says so in its place."""
        number, offset = self._facts_at if self._facts_at[0] <= after else (0, 0)
        found: list[bytes] = []
        size = 0
        stop = after + min(count, 1000)
        with contextlib.suppress(FileNotFoundError), (self.directory / "facts").open("rb") as file:
            file.seek(offset)
            while number < stop and size < _FACTS_BYTES_MOST and (line := file.readline()):
                read = layout.read_fact_line(line, self._salt)
                if read is not None and number < read[0] <= stop:
                    found += [self._lost_fact(lost) for lost in range(max(number, after) + 1, read[0])]
                    number = read[0]
                    if number > after:
                        found.append(read[1])
                        size += len(line)
                elif read is not None:
                    break  # so many are lost that it belongs into a later batch
                offset += len(line)
        if size < _FACTS_BYTES_MOST:
            found += [self._lost_fact(lost) for lost in range(max(number, after) + 1, stop + 1)]
            number = stop
        self._facts_at = (number, offset)
        return self._batch(Stream.facts, after, len(found), (), b"[" + b",".join(found) + b"]")

    def _lost_fact(self, number: int) -> bytes:
        logger.error("fact %d in the spool %s is damaged; it is recorded as lost", number, self.directory)
        message = f"fact {number} of rank {self.owner.rank} could not be read any more: its spool is damaged"
        details = {"number": number, "producer": self.producer}
        data = {"kind": "lost_fact", "message": message, "level": "error", "details": details}
        return json.dumps(Fact(kind=FactKind.event, at=clock.time(), data=data).to_json()).encode()

    def _say_lost(self, after: int, is_lost: np.ndarray) -> None:
        """Once per spool, and again only for what lies behind."""
        numbers = np.flatnonzero(is_lost)
        if len(numbers) and after + int(numbers[-1]) >= self._lost:
            self._lost = after + int(numbers[-1]) + 1
            logger.error(
                "%d points between number %d and %d in the spool %s cannot be read any more; they are recorded as lost",
                len(numbers), after + int(numbers[0]) + 1, self._lost, self.directory,
            )  # fmt: skip

    def _batch(self, stream: Stream, after: int, count: int, keys: tuple[str, ...], payload: bytes) -> Batch:
        return Batch(
            producer=self.producer, run=self.owner.run, attempt=self.owner.attempt, rank=self.owner.rank,
            stream=stream, first=after + 1, count=count, keys=keys, payload=payload,
        )  # fmt: skip

    # -- what the tracker answered

    def acknowledge(self, stream: Stream, accepted: int, committed: int) -> None:
        """What the tracker answered. `accepted` may go back: a tracker that lost its log asks again."""
        if (accepted, committed) != (self._accepted[stream], self._committed[stream]):
            words = self._awake()
            self._accepted[stream], self._committed[stream] = accepted, committed
            for at, number in zip(layout.WATERMARKS[stream], (accepted, committed), strict=True):
                words[at], words[at + 1] = number, layout.inverted(number)
        if stream is Stream.points:
            self.release(committed)
            if self.held_bytes > self._max_bytes // 2:
                self.release(accepted)

    def release(self, points: int) -> None:
        """Removes the segments that hold nothing behind number `points`. The newest stays: the producer may be writing
        into it."""
        newest = layout.segment_of(max(self.seen(Stream.points) - 1, 0) // PAGE_POINTS)
        whole = min(layout.segment_of(points // PAGE_POINTS), newest)
        if whole <= self._removed:
            return
        for number in range(self._removed, whole):
            disk.unlink(self.directory / f"points-{number:06d}")
            disk.unlink(self.directory / f"next-{number:06d}")  # the producer had not waited for it
        self._removed, self._released = whole, layout.segment_start(whole) * PAGE_BYTES
        words = self._awake()
        words[layout.RELEASED], words[layout.RELEASED + 1] = self._released, layout.inverted(self._released)

    def reserve_ahead(self) -> None:
        """Makes the next segment for a producer that is half through its own, so that it need not. Raises OSError."""
        page = max(self.seen(Stream.points) - 1, 0) // PAGE_POINTS
        number = layout.segment_of(page)
        if 2 * (page - layout.segment_start(number)) < layout.segment_pages(number) or self._end is not None:
            return
        path = self.directory / f"next-{number + 1:06d}"
        if path.exists() or (self.directory / f"points-{number + 1:06d}").exists():
            return
        making = self.directory / f"making-{number + 1:06d}"
        try:
            reserve_file(making, layout.segment_pages(number + 1) * PAGE_BYTES, is_new=True)
            disk.rename(making, path)
        except OSError:
            disk.unlink(making)
            raise

    def request_stop(self) -> None:
        self._awake()[layout.STOP] = layout.STOP_MARK

    # -- the producer's life and the spool's end

    def is_owned(self) -> bool:
        """The producer still lives."""
        if self.producer in own_producers:
            return True
        try:
            fd = os.open(self.directory / "owner", os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            return False  # somebody removed the directory
        try:
            fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return True
        finally:
            os.close(fd)
        return False

    def is_done(self) -> bool:
        """Everything that will ever be here is committed, or somebody removed the directory."""
        if not self.directory.exists():
            return True
        if self._end is None and not self.is_owned():
            self.settle()  # the producer may have logged its last points between the last look and its death
        return self._end is not None and all(self._committed[s] >= self._end[s] for s in Stream)

    def remove(self) -> None:
        """First out of sight, so that nobody meets half of it."""
        self.rest()
        gone = self.directory.parent / f".{self.producer}.gone"
        with contextlib.suppress(FileNotFoundError):
            disk.rename(self.directory, gone)
        remove_directory(gone)

    def rest(self) -> None:
        """Gives up what it holds in memory, until it is needed again."""
        if self._mapped is not None and self._control is not None:
            self._mapped.release()
            self._control.close()
            self._mapped = self._control = None
        self._keys, self._keys_read = {}, 0

    close = rest

    def _awake(self) -> memoryview:
        if self._mapped is None:
            self._control = map_file(self.directory / "control", PAGE_BYTES)
            self._mapped = memoryview(self._control).cast("Q")
        return self._mapped

    def _look_into(self) -> Any:
        """The control words: the living ones when awake, else a copy."""
        if self._mapped is not None:
            return self._mapped
        fd = os.open(self.directory / "control", os.O_RDONLY | os.O_CLOEXEC)
        try:
            raw = os.pread(fd, PAGE_BYTES, 0)
        finally:
            os.close(fd)
        return memoryview(raw.ljust(PAGE_BYTES, b"\0")).cast("Q")


def _points_payload(found: np.ndarray, is_lost: np.ndarray, names: Mapping[int, str]) -> tuple[bytes, tuple[str, ...]]:
    """Records as they travel: POINT, `key` an index into the names that are used, lost ones zero but for the flag."""
    used = [index for index in _distinct(found["key"][~is_lost]) if index in names]
    keys = tuple(dict.fromkeys(names[index] for index in used))
    place = {name: number for number, name in enumerate(keys)}
    points = np.zeros(len(found), POINT)
    for field in ("step", "time", "value"):
        points[field] = found[field]
    if used:
        local = np.zeros(used[-1] + 1, np.uint32)
        local[used] = [place[names[index]] for index in used]
        points["key"] = local[np.minimum(found["key"], used[-1])]
    if is_lost.any():
        points[is_lost] = np.array((0, LOST, 0, 0.0, 0.0), POINT)
    return points.tobytes(), keys


def _distinct(keys: np.ndarray) -> list[int]:
    """The different values, sorted."""
    if len(keys) and (highest := int(keys.max())) < 4 * len(keys) + 1024:
        return np.flatnonzero(np.bincount(keys, minlength=highest + 1)).tolist()
    return np.unique(keys).tolist()


def spools(root: Path) -> Iterator[Path]:
    """Directories of all producers under `root`."""
    with contextlib.suppress(FileNotFoundError), os.scandir(root) as entries:
        for entry in entries:
            if not entry.name.startswith(".") and entry.is_dir():
                yield Path(entry.path)


def remove_leftovers(root: Path) -> None:
    """Directories that were being removed, or being made, by a process that died meanwhile."""
    with contextlib.suppress(FileNotFoundError), os.scandir(root) as entries:
        for entry in entries:
            name = entry.name.removeprefix(".").removesuffix(".gone")
            if name == entry.name or len(name) != 32 or not entry.is_dir():
                continue
            is_old = clock.time() - entry.stat().st_mtime > 600  # nobody takes ten minutes to make a spool
            if entry.name.endswith(".gone") or is_old:
                remove_directory(Path(entry.path))


def remove_directory(directory: Path) -> None:
    with contextlib.suppress(FileNotFoundError):
        for path in directory.iterdir():
            disk.unlink(path)
        directory.rmdir()
