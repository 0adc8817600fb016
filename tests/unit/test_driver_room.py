"""A driver opens an attempt only where it can log."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from orchestrator import disk
from orchestrator.errors import UserError
from orchestrator.execution import driver


def test_a_full_disk_is_told_before_anything_is_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(fd: int, size: int, path: str = "") -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(disk, "reserve", full)
    with pytest.raises(UserError) as refused:
        driver._await_room(tmp_path, patience=0.0)
    assert str(refused.value) == (
        f"Nothing can be logged in {tmp_path}: no space left on device. Nothing was started. Make room there, then try "
        "again."
    )


def test_a_restart_waits_for_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tries = 0

    def full_twice(fd: int, size: int, path: str = "") -> None:
        nonlocal tries
        tries += 1
        if tries < 3:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(disk, "reserve", full_twice)
    monkeypatch.setattr(driver, "PAUSE", 0.01)
    driver._await_room(tmp_path, patience=60.0)
    assert (tries, list(tmp_path.iterdir())) == (3, [])


def test_a_directory_that_is_not_there_yet_is_made_by_who_logs(tmp_path: Path) -> None:
    driver._await_room(tmp_path / "spools", patience=0.0)
    assert not (tmp_path / "spools").exists()
