"""What a commit may refuse. Light to import: the tracker knows these without opening a database."""

from __future__ import annotations

from dataclasses import dataclass

from orchestrator.errors import OrchestratorError, UserError
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


class RunIsThere(UserError):
    """A run that shall be imported is in the database already, and is another one or was changed since."""

    def __init__(self, run: str, is_half_removed: bool = False) -> None:
        super().__init__(run, is_half_removed)
        self.run, self.is_half_removed = run, is_half_removed

    def __str__(self) -> str:
        if self.is_half_removed:
            return f"Run {self.run} was removed, but not yet all of its files. Run `orc rm {self.run}` first."
        return (
            f"Run {self.run} is in this database already and differs from the bundle (a tag, a note or a resume is "
            f"enough). Remove it with `orc rm {self.run}` to take the bundle's, or keep what is here."
        )


class BadRecord(UserError, ValueError):
    """A record of a run that does not fit together, or that this version cannot read."""

    def __init__(self, part: str, why: str) -> None:
        super().__init__(part, why)
        self.part, self.why = part, why

    def __str__(self) -> str:
        return f"The record cannot be read ({self.part}): {self.why}"


class SweepHasTrials(UserError):
    """The parent run of a sweep whose trials' runs are still there."""

    def __init__(self, run: str, trials: int) -> None:
        super().__init__(run, trials)
        self.run, self.trials = run, trials

    def __str__(self) -> str:
        return (
            f"Run {self.run} is a sweep with {self.trials} runs of trials: `orc rm --trials {self.run}` removes them "
            "with it."
        )


class ModelDependsOnRun(UserError):
    """A registered model was made from a checkpoint of the run."""

    def __init__(self, run: str, model: str) -> None:
        super().__init__(run, model)
        self.run, self.model = run, model

    def __str__(self) -> str:
        return f"Run {self.run} cannot be removed: model {self.model} was made from one of its checkpoints."
