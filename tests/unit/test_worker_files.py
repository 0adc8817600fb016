"""Where a worker's files go, and that they reach the run's directory."""

from __future__ import annotations

import io
import logging
from pathlib import Path
from types import SimpleNamespace

import pyarrow.fs as arrow_fs
import pytest

from orchestrator.execution.run_logs import _Tee, rank_log
from orchestrator.execution.worker import copy_to_storage, local_directory, log_path
from orchestrator.records import RunTicket


def ticket(directory: str) -> RunTicket:
    return RunTicket(run="r1", name="n", experiment="e", attempt=1, directory=directory)


def test_a_file_url_is_the_path_it_means() -> None:
    assert local_directory(ticket("file:///data/my%20runs/e/r1")) == "/data/my runs/e/r1"


def test_logs_reach_a_directory_that_is_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bucket = arrow_fs.SubTreeFileSystem(str(tmp_path / "bucket"), arrow_fs.LocalFileSystem())
    (tmp_path / "bucket").mkdir()
    opened = SimpleNamespace(from_uri=lambda url: (bucket, url.partition("?")[0].removeprefix("gs://b/")))
    monkeypatch.setattr(arrow_fs, "FileSystem", opened)
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    remote = ticket("gs://b/runs/e/r1")
    path = log_path(remote, rank=0)
    path.parent.mkdir(parents=True)
    path.write_text("hello\n")
    copy_to_storage(remote, path, path.with_name("missing.log"))
    assert (tmp_path / "bucket/runs/e/r1/logs/attempt-1/rank-0.log").read_text() == "hello\n"


def test_what_is_printed_and_what_is_logged_stands_once_in_the_log_file(tmp_path: Path) -> None:
    path = tmp_path / "logs" / "rank-0.log"
    root = logging.getLogger()
    ray_like = logging.StreamHandler(io.StringIO())
    root.addHandler(ray_like)
    try:
        with rank_log(path, ticket(str(tmp_path)), 0, secrets=("canary-1234",)):
            print("printed canary-1234")
            logging.getLogger("mine").info("logged canary-1234")
    finally:
        root.removeHandler(ray_like)
    lines = path.read_text().splitlines()
    assert lines[0] == "printed ***"
    assert lines[1].endswith("INFO mine logged ***")
    assert len(lines) == 2


def test_secrets_are_hidden_however_they_are_written() -> None:
    stream, file = io.StringIO(), io.StringIO()
    _Tee(stream, file, ("canary-1234",)).writelines(["a canary-1234\n", "b\n"])
    assert stream.getvalue() == file.getvalue() == "a ***\nb\n"
