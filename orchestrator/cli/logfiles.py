"""Reading log files: their last lines, and what is added to them, whoever keeps them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from orchestrator.catalog import LogFiles

BLOCK = 1 << 16


class LogFile(Protocol):
    """One file that may grow."""

    def size_bytes(self) -> int: ...

    def read(self, offset: int, limit: int) -> bytes:
        """At most `limit` bytes, possibly fewer; nothing at the end."""
        ...


@dataclass(frozen=True, slots=True)
class RunLog:
    """What one process of a run's attempt wrote."""

    files: LogFiles
    attempt: int
    source: str

    def size_bytes(self) -> int:
        return self.files.sources(self.attempt).get(self.source, 0)

    def read(self, offset: int, limit: int) -> bytes:
        return self.files.read(self.attempt, self.source, offset, limit)


@dataclass(frozen=True, slots=True)
class LocalLog:
    """A file on this machine."""

    path: Path

    def size_bytes(self) -> int:
        return self.path.stat().st_size

    def read(self, offset: int, limit: int) -> bytes:
        with self.path.open("rb") as stream:
            stream.seek(offset)
            return stream.read(limit)


def tail_offset(file: LogFile, lines: int) -> int:
    """Where the last `lines` lines of the file begin, found from its end without reading all of it."""
    end = position = file.size_bytes()
    if lines == 0:
        return end
    wanted = lines + 1  # the newline that ends the last unwanted line; the file's own last one counts too
    while position > 0:
        start = max(0, position - BLOCK)
        block = _exactly(file, start, position - start)
        if position == end and not block.endswith(b"\n"):
            wanted -= 1
        breaks = block.count(b"\n")
        if breaks >= wanted:
            at = len(block)
            for _ in range(wanted):
                at = block.rindex(b"\n", 0, at)
            return start + at + 1
        wanted -= breaks
        position = start
    return 0


def _exactly(file: LogFile, offset: int, count: int) -> bytes:
    block = b""
    while len(block) < count and (more := file.read(offset + len(block), count - len(block))):
        block += more
    return block


@dataclass(slots=True)
class Reader:
    """Reads one file piece by piece; gives only whole lines until told that no more will come."""

    file: LogFile
    offset: int = 0
    _rest: bytes = b""

    def lines(self, *, is_final: bool = False) -> Iterator[str]:
        while block := self.file.read(self.offset, BLOCK):
            self.offset += len(block)
            *whole, self._rest = (self._rest + block).split(b"\n")
            yield from (line.decode(errors="replace") for line in whole)
        if is_final and self._rest:
            yield self._rest.decode(errors="replace")
            self._rest = b""


def reader(file: LogFile, tail: int | None) -> Reader:
    """From the beginning, or from the last `tail` lines on."""
    return Reader(file, 0 if tail is None else tail_offset(file, tail))
