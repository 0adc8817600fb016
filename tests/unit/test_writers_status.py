"""What `orc status` says of checkpoint writers, and the writer as a process of the cluster, without Ray."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from cluster import stack_status
from orchestrator.checkpoints.service import WriterService
from orchestrator.execution.services.writer import CheckpointWriterProcess
from orchestrator.stack import Stack


@pytest.fixture
def root() -> Iterator[Path]:
    directory = Path(tempfile.mkdtemp(prefix="orct-"))  # short: a socket lives in it
    yield directory / "slabs"
    shutil.rmtree(directory)


@pytest.fixture
def stack(root: Path, tmp_path: Path) -> Stack:
    return Stack(home=str(tmp_path), slab_directory=str(root), ray_address="127.0.0.1:1")


def test_a_writer_that_should_be_there_and_is_not_is_down(stack: Stack) -> None:
    found = stack_status.writers(stack)
    assert (found.status, found.root) == ("down", stack.slab_directory)
    assert "orc up" in found.why


def test_where_nobody_needs_one_it_is_idle(stack: Stack) -> None:
    assert stack_status.writers(replace(stack, ray_address="")).status == "idle"
    assert stack_status.writers(replace(stack, checkpoint_writers=0)).status == "idle"


def test_one_that_answers_says_what_is_before_it(stack: Stack, root: Path) -> None:
    service = WriterService(str(root))
    service.serve()
    service.step(0.0)  # from here on it answers
    thread = threading.Thread(target=service.run)
    thread.start()
    try:
        found = stack_status.writers(stack)
        assert (found.status, found.pending, found.oldest, found.why) == ("up", 0, 0.0, "")
        assert stack_status.document(stack, [], [], found)["checkpoint_writers"]["status"] == "up"
    finally:
        service.stop()
        thread.join()
        service.close()


def test_a_directory_that_cannot_be_used_is_said_and_not_raised(tmp_path: Path) -> None:
    mine = tmp_path / "open"
    mine.mkdir()
    mine.chmod(0o755)
    pid = os.fork()  # it takes the whole process for its own
    if pid == 0:
        try:
            writer = CheckpointWriterProcess(str(mine), 7, str(tmp_path / "spools"), "")
            (tmp_path / "said").write_text(json.dumps({**writer.describe(), **writer.health()}))
        finally:
            os._exit(0)
    os.waitpid(pid, 0)
    said = json.loads((tmp_path / "said").read_text())
    assert "is not ours alone" in said["why"]
    assert (said["last_error"], said["root"], said["memory_bytes"]) == (said["why"], str(mine), 7)
