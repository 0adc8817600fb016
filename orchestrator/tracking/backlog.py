"""Which runs a sink still has to look at: noticed through the feed, kept beside the sink's cursor."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from typing import Protocol

from orchestrator.store.views import ChangedRuns, SinkCursor


class Cursors(Protocol):
    """Where changes are told and cursors are kept; `Store` is one."""

    def changed_runs(self, after: int = 0) -> ChangedRuns: ...
    def cursor(self, sink: str, run: str = "") -> SinkCursor: ...
    def save_cursor(self, sink: str, run: str, cursor: SinkCursor) -> None: ...


class Backlog:
    """The runs with something to copy. Valid while its owner holds the sink's lock; `forget` when that is lost."""

    def __init__(self, feed: Cursors, sink: str) -> None:
        self._feed, self._sink = feed, sink
        self._runs: OrderedDict[str, None] | None = None  # None: not read yet
        self._seen = 0
        self._saved: tuple[str, ...] | None = None

    def __len__(self) -> int:
        return len(self._runs or ())

    def noticed(self) -> OrderedDict[str, None]:
        """What is waiting, with what has changed since the last look. The owner takes out what it has copied."""
        if self._runs is None:
            cursor = self._feed.cursor(self._sink)
            self._seen = cursor.facts
            self._runs = OrderedDict.fromkeys(cursor.state.get("runs", ()))
            self._saved = tuple(sorted(self._runs))
        changed = self._feed.changed_runs(self._seen)
        if changed.runs:
            self._runs.update(dict.fromkeys(changed.runs))
            self._saved = None  # the cursor alone moves with every transaction of anyone: not worth a write
        self._seen = changed.cursor
        return self._runs

    def save(self, runs: Iterable[str]) -> None:
        """What is not copied yet stands beside the cursor: no crash forgets it, and no stuck run holds the cursor."""
        waiting = tuple(sorted(runs))
        if waiting != self._saved:
            self._feed.save_cursor(self._sink, "", SinkCursor(facts=self._seen, state={"runs": list(waiting)}))
            self._saved = waiting

    def forget(self) -> None:
        self._runs = None
