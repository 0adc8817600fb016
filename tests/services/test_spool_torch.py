"""What is logged beside and inside of PyTorch: tensors, and the workers of a DataLoader."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from orchestrator.records import Stream
from orchestrator.tracking.deferred import _TorchTransfer
from orchestrator.tracking.logger import Logger
from orchestrator.tracking.spool import SpoolReader, spools


def logged(reader: SpoolReader) -> list[tuple[str, int, float]]:
    found: list[tuple[str, int, float]] = []
    while (batch := reader.next_batch(Stream.points, len(found))) is not None:
        found += [(batch.keys[p["key"]], int(p["step"]), float(p["value"])) for p in batch.points()]
    return found


class Logging(Dataset):
    """Logs each item that it gives out, in whatever process that happens."""

    def __init__(self, logger: Logger) -> None:
        self.logger = logger

    def __len__(self) -> int:
        return 400

    def __getitem__(self, index: int) -> torch.Tensor:
        self.logger.log({"worker/item": float(index)}, step=index)
        return torch.tensor(float(index))


def test_trap_c_workers_of_a_data_loader_log_into_spools_of_their_own(tmp_path: Path) -> None:
    logger = Logger(tmp_path / "spools", run="r1", attempt=1, rank=0)
    logger.log({"loss": 0.0}, step=0)
    loader = DataLoader(Logging(logger), batch_size=4, num_workers=2, multiprocessing_context="fork")
    for step, batch in enumerate(loader, start=1):
        logger.log({"loss": batch.mean()}, step=step)
    readers = [SpoolReader(directory) for directory in spools(tmp_path / "spools")]
    by_key: dict[str, list[int]] = {}
    for reader in readers:
        points = logged(reader)
        assert len({key for key, _, _ in points}) == 1, "nobody wrote into another's spool"
        by_key.setdefault(points[0][0], []).extend(step for _, step, _ in points)
    assert len(readers) == 3
    assert by_key["loss"] == list(range(101))
    assert sorted(by_key["worker/item"]) == list(range(400))
    assert [reader.is_owned() for reader in readers].count(True) == 1, "the workers are gone, their points are not"


def test_trap_e_a_tensor_that_holds_a_graph_and_changes_later_is_stored_as_it_was(tmp_path: Path) -> None:
    logger = Logger(tmp_path / "spools", run="r1", attempt=1, rank=0)
    weight = torch.tensor(2.0, requires_grad=True)
    loss = weight * 3
    logger.log({"loss": loss})
    with torch.no_grad():
        loss.add_(1)
    assert logged(SpoolReader(next(spools(tmp_path / "spools")))) == [("loss", 0, 6.0)]


def test_trap_e_a_transfer_brings_every_type_of_number_in_one_copy_each() -> None:
    tensors = [torch.tensor(0.1, dtype=torch.float32), torch.tensor(3), torch.tensor(0.1, dtype=torch.float64),
               torch.tensor(2.5, dtype=torch.bfloat16), torch.tensor(4)]  # fmt: skip
    moving = _TorchTransfer(tensors)
    assert moving.is_done()
    assert moving.values() == [float(np.float32(0.1)), 3, 0.1, 2.5, 4]
    assert len(moving._groups) == 4
