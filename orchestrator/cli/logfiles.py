"""The log files in a run's directory: which there are, their last lines, and what is added to them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from orchestrator.backends.storage import Storage

DRIVER = "driver"
BLOCK = 1 << 16


def attempts(directory: Storage) -> list[int]:
    """Numbers of the attempts that have logs, oldest first."""
    found = (re.fullmatch(r"attempt-(\d+)", entry.name) for entry in directory.entries("logs") if entry.is_dir)
    return sorted(int(match[1]) for match in found if match)


def sources(directory: Storage, attempt: int) -> list[str]:
    """`driver` and `rank-0`, `rank-1` …, as far as they have a file."""
    names = [
        entry.name.removesuffix(".log") for entry in directory.entries(f"logs/attempt-{attempt}") if not entry.is_dir
    ]
    ranks = sorted((name for name in names if re.fullmatch(r"rank-\d+", name)), key=lambda name: int(name[5:]))
    return [name for name in names if name == DRIVER] + ranks


def path(attempt: int, source: str) -> str:
    """Of a source's file, within the run's directory."""
    return f"logs/attempt-{attempt}/{source}.log"


def tail_offset(directory: Storage, path: str, lines: int) -> int:
    """Where the last `lines` lines of the file begin, found from its end without reading all of it."""
    with directory.open_input(path) as stream:
        end = position = stream.seek(0, 2)
        if lines == 0:
            return end
        wanted = lines + 1  # the newline that ends the last unwanted line; the file's own last one counts too
        while position > 0:
            start = max(0, position - BLOCK)
            stream.seek(start)
            block = stream.read(position - start)
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


@dataclass(slots=True)
class Reader:
    """Reads one file piece by piece; gives only whole lines until told that no more will come."""

    directory: Storage
    path: str
    offset: int = 0
    _rest: bytes = b""

    def lines(self, *, is_final: bool = False) -> Iterator[str]:
        with self.directory.open_input(self.path) as stream:
            stream.seek(self.offset)
            while block := stream.read(BLOCK):
                self.offset += len(block)
                *whole, self._rest = (self._rest + block).split(b"\n")
                yield from (line.decode(errors="replace") for line in whole)
        if is_final and self._rest:
            yield self._rest.decode(errors="replace")
            self._rest = b""
