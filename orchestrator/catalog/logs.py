"""Log files where they lie: in a run's directory, on any storage."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from orchestrator.errors import NotFound

if TYPE_CHECKING:
    from orchestrator.backends.storage import Storage

DRIVER = "driver"
STRUCTURED, STACKS = ".jsonl", ".stack"
SOURCE = re.compile(r"driver(\.jsonl)?|rank-\d{1,6}(\.jsonl|\.stack)?")
"""Every source there is; with an ending, its structured lines, or where its threads stood when the run hung. A name
that somebody sends is compared with it before it becomes part of a path."""

MOST = 1 << 20
"""Bytes given by one `read`."""


def path(attempt: int, source: str) -> str:
    """Of a source's file, within the run's directory. Raises NotFound for what is no source."""
    if not SOURCE.fullmatch(source):
        raise NotFound("log", source)
    return f"logs/attempt-{int(attempt)}/{source if kind_of(source) else f'{source}.log'}"


def kind_of(source: str) -> str:
    """STRUCTURED, STACKS, or "" for text."""
    return next((each for each in (STRUCTURED, STACKS) if source.endswith(each)), "")


def _place(source: str) -> tuple[int, int]:
    """Text before structured lines before stacks, the driver before the ranks."""
    name = source.removesuffix(kind := kind_of(source))
    return ("", STRUCTURED, STACKS).index(kind), -1 if name == DRIVER else int(name.removeprefix("rank-"))


class StoredLogs:
    """`LogFiles` of the run whose directory is `directory`; works with no service running."""

    def __init__(self, directory: str) -> None:
        self._directory = directory

    def attempts(self) -> list[int]:
        entries = self._storage().entries("logs") if self._directory else []
        found = (re.fullmatch(r"attempt-(\d+)", entry.name) for entry in entries if entry.is_dir)
        return sorted(int(match[1]) for match in found if match)

    def sources(self, attempt: int) -> dict[str, int]:
        entries = self._storage().entries(f"logs/attempt-{int(attempt)}") if self._directory else []
        sizes = {
            entry.name.removesuffix(".log"): entry.size_bytes
            for entry in entries
            if not entry.is_dir and entry.name.endswith((".log", STRUCTURED, STACKS))
        }
        return {name: sizes[name] for name in sorted(filter(SOURCE.fullmatch, sizes), key=_place)}

    def read(self, attempt: int, source: str, offset: int, limit: int) -> bytes:
        try:
            with self._storage().open_input(path(attempt, source)) as file:
                file.seek(offset)
                return file.read(min(limit, MOST))
        except FileNotFoundError:
            raise NotFound("log", source, tuple(self.sources(attempt))) from None

    def uri(self, attempt: int = 0, source: str = "") -> str:
        return self._storage().uri(path(attempt, source) if source else "logs")

    def _storage(self) -> Storage:
        from orchestrator.backends.storage import Storage  # imports pyarrow, which takes a quarter of a second

        return Storage(self._directory)
