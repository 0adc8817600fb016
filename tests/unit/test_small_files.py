"""Small files of a run, read for somebody who must not wait."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from orchestrator.backends.small_files import NotRead, SmallFiles


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.md").write_text("seen")
    (tmp_path / "secret").write_text("no")
    return tmp_path / "run"


def test_a_file_in_the_directory_is_read(directory: Path) -> None:
    files = SmallFiles()
    assert files.read(str(directory), f"{directory}/notes.md") == b"seen"
    assert files.read(f"file://{directory}", f"file://{directory}/notes.md") == b"seen"


def test_nothing_outside_the_directory_is_read(directory: Path) -> None:
    (directory / "link").symlink_to(directory.parent / "secret")
    for uri in (directory.parent / "secret", directory / ".." / "secret", directory / "link", directory / "missing"):
        with pytest.raises(NotRead):
            SmallFiles().read(str(directory), str(uri))


def test_a_file_that_is_not_small_is_not_read(directory: Path) -> None:
    with pytest.raises(NotRead, match="larger than 3 bytes"):
        SmallFiles(most_bytes=3).read(str(directory), f"{directory}/notes.md")


def test_a_storage_that_hangs_costs_a_moment_once(directory: Path) -> None:
    os.mkfifo(directory / "pipe")
    files = SmallFiles(patience=0.05)
    for name in ("pipe", "notes.md"):
        with pytest.raises(NotRead, match="does not answer"):
            files.read(str(directory), f"{directory}/{name}")
    os.close(os.open(directory / "pipe", os.O_WRONLY))  # lets the reader go
    assert files._reading is not None
    files._reading.join(10)
    assert files.read(str(directory), f"{directory}/notes.md") == b"seen"
