"""Logging from an accelerator. Needs one that PyTorch calls cuda."""

from __future__ import annotations

from pathlib import Path

import pytest

from orchestrator.records import Stream
from orchestrator.tracking.logger import Logger
from orchestrator.tracking.spool import SpoolReader, spools

pytestmark = pytest.mark.host


def test_trap_e_log_does_not_wait_for_the_device(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    logger = Logger(tmp_path / "spools", run="r1", attempt=1, rank=0)
    weight = torch.ones((), device="cuda", requires_grad=True)
    torch.cuda.set_sync_debug_mode("error")  # whoever waits for the device raises
    try:
        for step in range(1000):
            loss = weight * step
            logger.log({"loss": loss}, step=step)
            with torch.no_grad():
                loss.fill_(-1.0)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    logger.close()
    reader = SpoolReader(next(spools(tmp_path / "spools")))
    found: list[tuple[int, float]] = []
    while (batch := reader.next_batch(Stream.points, len(found))) is not None:
        found += [(int(point["step"]), float(point["value"])) for point in batch.points()]
    assert found == [(step, float(step)) for step in range(1000)]
