"""What Ray Train hears of checkpoints: seldom, in order, and never at training's expense."""

from __future__ import annotations

import json
import logging
import threading
from pathlib import Path
from typing import Any

import pytest

from orchestrator.checkpoints.manifest import CheckpointInfo, CheckpointState, Manifest
from orchestrator.execution import ray_pointer
from orchestrator.execution.ray_pointer import RayPointers, forgive_pointers


def committed(step: int) -> CheckpointInfo:
    manifest = Manifest(
        run="r1", name=f"step_{step:08d}-a1", attempt=1, step=step, epoch=0, epoch_complete=False, world_size=1, seed=0,
        config_hash="", created=0.0, duration=0.0, files=(), metrics={}, is_best=False, reasons=(), label="", data={},
        versions={},
    )  # fmt: skip
    return CheckpointInfo.of(manifest, f"/runs/r1/checkpoints/{manifest.name}", CheckpointState.committed)


class Ray:
    """Stands for `ray.train.report`: may wait for the others, or fail."""

    def __init__(self) -> None:
        self.reports: list[tuple[dict[str, Any], bytes | None]] = []
        self.lets_through = threading.Event()
        self.lets_through.set()
        self.error: Exception | None = None

    def report(self, metrics: dict[str, Any], pointer: bytes | None) -> None:
        assert self.lets_through.wait(30)
        if self.error is not None:
            raise self.error
        self.reports.append((metrics, pointer))


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    (tmp_path / ".validate_storage_marker").touch()
    return tmp_path


def test_rank_0_reports_the_pointer_and_the_others_only_that_they_are_there(directory: Path) -> None:
    rays = [Ray(), Ray()]
    ranks = [RayPointers(directory, rank=rank, report=rays[rank].report) for rank in (0, 1)]
    ranks[0].offer(committed(7))
    pointer = ranks[0].due()
    assert len(pointer) < 1000
    for rank in ranks:
        rank.put(pointer)
        rank.close(30)
    ((metrics, content),) = rays[0].reports
    assert content is not None
    told = json.loads(content)
    assert (metrics, type(metrics["step"])) == ({"step": 7}, int)
    assert (told["step"], told["uri"]) == (7, "/runs/r1/checkpoints/step_00000007-a1")
    assert len(told["manifest_sha256"]) == 64
    assert rays[1].reports == [({"step": 7}, None)]


def test_a_report_that_waits_keeps_nobody_and_the_next_pointer_is_the_newest_then(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_pointer, "INTERVAL", 0.0)
    ray = Ray()
    pointers = RayPointers(directory, rank=0, report=ray.report)
    ray.lets_through.clear()
    pointers.offer(committed(1))
    pointers.put(pointers.due())
    for step in (2, 3):
        pointers.offer(committed(step))
        assert pointers.due() == "", "one at a time"
    ray.lets_through.set()
    pointers.close(30)
    pointers.put(pointers.due())
    pointers.close(30)
    assert [metrics["step"] for metrics, _ in ray.reports] == [1, 3]
    assert pointers.due() == "", "nothing is new"


def test_pointers_are_apart_but_the_last_one_is_told(directory: Path) -> None:
    pointers = RayPointers(directory, rank=0, report=Ray().report)
    pointers.offer(committed(1))
    assert pointers.due()
    pointers.offer(committed(2))
    assert pointers.due() == ""
    assert json.loads(pointers.due(is_last=True))["step"] == 2


def test_a_directory_that_only_another_host_has_gets_no_pointers(tmp_path: Path) -> None:
    pointers = RayPointers(tmp_path / "elsewhere", rank=0, report=Ray().report)
    pointers.offer(committed(1))
    assert pointers.due() == ""
    assert pointers.due(is_last=True) == ""


def test_an_error_is_one_warning_and_the_end_of_it(directory: Path, caplog: pytest.LogCaptureFixture) -> None:
    ray = Ray()
    ray.error = RuntimeError("Ray looks different")
    pointers = RayPointers(directory, rank=0, report=ray.report)
    with caplog.at_level(logging.WARNING):
        for step in (1, 2):
            pointers.offer(committed(step))
            pointers.put(pointers.due(is_last=True) or "{}")
            pointers.close(30)
    assert len([record for record in caplog.records if "Ray looks different" in record.getMessage()]) == 1
    assert pointers.due(is_last=True) == ""


def test_what_goes_wrong_in_rays_controller_ends_no_run(caplog: pytest.LogCaptureFixture) -> None:
    from ray.train.v2._internal.execution.checkpoint.checkpoint_manager import CheckpointManager

    original = CheckpointManager.after_report
    unfinished = object.__new__(CheckpointManager)  # every attribute that it needs is missing
    with pytest.raises(AttributeError):
        unfinished.after_report(None, [])  # type: ignore[arg-type]
    try:
        forgive_pointers()
        forgive_pointers()
        unfinished.after_report(None, [])  # type: ignore[arg-type]
    finally:
        CheckpointManager.after_report = original  # type: ignore[method-assign]
    assert len([record for record in caplog.records if "disturbs no training" in record.getMessage()]) == 1
