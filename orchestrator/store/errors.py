"""What a commit may refuse. Light to import: the tracker knows these without opening a database."""

from __future__ import annotations

from dataclasses import dataclass

from orchestrator.errors import OrchestratorError
from orchestrator.records import Stream

Watermarks = dict[tuple[str, Stream], int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Gap:
    """Entries are missing. Example: Gap(producer="6f…", stream=Stream.points, expected=41, found=50)."""

    producer: str
    stream: Stream
    expected: int
    found: int


class SequenceGap(OrchestratorError):
    """Nothing of the producers named in `gaps` was committed; everything of the others was, see `watermarks`."""

    def __init__(self, gaps: tuple[Gap, ...], watermarks: Watermarks) -> None:
        super().__init__(gaps, watermarks)
        self.gaps, self.watermarks = gaps, watermarks

    def __str__(self) -> str:
        return "; ".join(
            f"producer {gap.producer}: {gap.stream.name} {gap.expected} must come next, got {gap.found}"
            for gap in self.gaps
        )


class UnknownRun(OrchestratorError):
    """The database has no such runs. Nothing of their producers was committed; everything of the others was."""

    def __init__(self, runs: tuple[str, ...], producers: tuple[str, ...], watermarks: Watermarks) -> None:
        super().__init__(runs, producers, watermarks)
        self.runs, self.producers, self.watermarks = runs, producers, watermarks

    def __str__(self) -> str:
        runs = ", ".join(self.runs)
        return f"The database has no run {runs}; what {len(self.producers)} producers sent for it was not stored."
