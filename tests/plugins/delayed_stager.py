"""A stager whose writer is the test: what is sealed is written when the test says so."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch

from orchestrator.backends.storage import Storage
from orchestrator.checkpoints import commit
from orchestrator.checkpoints.job import Layout, Outcome, SaveJob, SlotResult
from orchestrator.checkpoints.staging import DirectReservation
from orchestrator.checkpoints.state import TrainState


class DelayedStager:
    """A Stager with room for `slots` saves. `write` makes the oldest durable and commits it, `fail` gives it up."""

    def __init__(self, storage: Storage, *, slots: int = 2) -> None:
        self.storage, self.slots = storage, slots
        self.sealed: list[tuple[DirectReservation, SaveJob]] = []
        self.expected: list[Layout] = []
        self.patience: list[float] = []
        self.abandoned = 0
        self.writes_while_waited_for = True
        self.is_closed = False
        self._outcomes: list[Outcome] = []

    def attach(self, state: TrainState) -> None:
        return

    def expect(self, layout: Layout, heads: Sequence[bytes]) -> None:
        self.expected.append(layout)

    def reserve(self, layout: Layout, heads: Sequence[bytes], *, patience: float) -> DelayedReservation | None:
        self.patience.append(patience)
        if len(self.sealed) >= self.slots:
            return None
        return DelayedReservation(self, DirectReservation(layout, heads, self.storage, 1 << 20))

    def outcomes(self) -> list[Outcome]:
        found, self._outcomes = self._outcomes, []
        return found

    def wait(self, save: str, timeout: float) -> Outcome:
        while self.writes_while_waited_for and any(job.save == save for _, job in self.sealed):
            self.write()
        for outcome in self._outcomes:
            if outcome.save == save:
                self._outcomes.remove(outcome)
                return outcome
        raise TimeoutError(save)

    def settle(self) -> None:
        return

    def stalled(self) -> float:
        return 0.0

    def close(self) -> None:
        self.is_closed = True

    def write(self) -> None:
        direct, job = self.sealed.pop(0)
        direct.seal(job)
        result, digest, size, duration = SlotResult.durable, "", 0, 0.0
        if job.rank == 0:
            deadline = time.monotonic() + 10
            while (manifest := commit.finish(self.storage.join(job.name))) is None:
                assert time.monotonic() < deadline, "the other ranks have written nothing"
                time.sleep(0.005)  # as a writer does that waits for the ranks of other hosts
            result, digest, size, duration = (
                SlotResult.committed, manifest.digest, manifest.size_bytes, manifest.duration
            )  # fmt: skip
        self._outcomes.append(
            Outcome(
                save=job.save, name=job.name, result=result, manifest_sha256=digest, size_bytes=size, duration=duration
            )
        )

    def fail(self, why: str) -> None:
        _, job = self.sealed.pop(0)
        self._outcomes.append(Outcome(save=job.save, name=job.name, result=SlotResult.failed, why=why))


class DelayedReservation:
    is_direct = False

    def __init__(self, stager: DelayedStager, direct: DirectReservation) -> None:
        self._stager, self._direct = stager, direct

    def fill(self, tensors: Sequence[torch.Tensor], *, late: Sequence[bool] | None = None) -> float:
        self._direct.fill([tensor.detach().clone() for tensor in tensors])
        return 0.25

    def seal(self, job: SaveJob) -> None:
        self._stager.sealed.append((self._direct, job))

    def abandon(self) -> None:
        self._stager.abandoned += 1
