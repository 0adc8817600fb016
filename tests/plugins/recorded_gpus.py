"""A recorded series of two GPUs in place of NVIDIA's driver: 100 W and 300 W, and who computes on them."""

from __future__ import annotations

from orchestrator.backends.nvml import GpuReading

WATTS = (100.0, 300.0)


class RecordedGpus:
    """What a `SystemSampler` takes as `gpus`. Their counters began long ago, as those of real ones did."""

    def __init__(self) -> None:
        self.joules = [5000.0, 70.0]
        self.pids: list[set[int]] = [set(), set()]
        """Empty: the driver does not tell, as in a container."""
        self._at: float | None = None

    def __call__(self) -> RecordedGpus:
        return self

    def read(self, at: float) -> list[GpuReading]:
        passed = 0.0 if self._at is None else at - self._at
        self._at = at
        self.joules = [joules + watts * passed for joules, watts in zip(self.joules, WATTS, strict=True)]
        return [
            GpuReading(
                index=index,
                at=at,
                energy_joules=self.joules[index],
                power_watts=WATTS[index],
                pids=frozenset(pids),
            )
            for index, pids in enumerate(self.pids)
        ]

    def close(self) -> None:
        pass
