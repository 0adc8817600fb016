"""Which runs a sink still has to look at: noticed through the feed, kept beside the sink's cursor."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

from orchestrator.store.views import ChangedRuns, SinkCursor

SIGN_OF_LIFE = 60.0
"""A sink's row is written at least once in so many seconds, also when nothing changes: what every living sink has read
may be merged, and one that has been silent for a day counts as gone."""

RUNS_PER_SECOND = 1000
"""A list of so many runs is written at most once a second, one of ten times as many every ten seconds."""


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
        self._saved: tuple[tuple[str, ...], Mapping[str, Any]] | None = None
        self._has_moved = False
        self._saved_at = float("-inf")

    @property
    def is_fresh(self) -> bool:
        """Nothing was saved since it was read: nobody can see yet that this sink lives."""
        return self._saved is None

    def __len__(self) -> int:
        return len(self._runs or ())

    def noticed(self) -> OrderedDict[str, None]:
        """What is waiting, with what has changed since the last look. The owner takes out what it has copied."""
        if self._runs is None:
            cursor = self._feed.cursor(self._sink)
            self._seen = cursor.facts
            self._runs = OrderedDict.fromkeys(cursor.state.get("runs", ()))
            self._saved = None
            self._saved_at = float("-inf")
        changed = self._feed.changed_runs(self._seen)
        if changed.runs:
            self._runs.update(dict.fromkeys(changed.runs))
            self._has_moved = True  # the cursor alone moves with every transaction of anyone: not worth a write
        self._seen = changed.cursor
        return self._runs

    def save(self, runs: Iterable[str], now: float, **about: Any) -> None:
        """What is not copied yet stands beside the cursor: no crash forgets it, and no stuck run holds the cursor.

        `about` is kept with it (how the sink is). Runs that changed while a long list is not written are noticed
        again after a crash. `now` is monotonic.
        """
        waiting = tuple(sorted(runs))
        since = now - self._saved_at
        is_new = self._has_moved or self._saved != (waiting, about)
        if since < (len(waiting) / RUNS_PER_SECOND if is_new else SIGN_OF_LIFE):
            return
        cursor = SinkCursor(facts=self._seen, state={"runs": list(waiting), **about})
        self._feed.save_cursor(self._sink, "", cursor)
        self._saved, self._has_moved, self._saved_at = (waiting, about), False, now

    def forget(self) -> None:
        self._runs = None
