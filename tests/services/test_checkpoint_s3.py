"""Checkpoints on an object store: what S3 lacks and does differently, and a server that fails or does not answer."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from orchestrator.backends.storage import Storage
from orchestrator.checkpoints import catalog, commit, pointers
from orchestrator.checkpoints.commit import Receipt
from orchestrator.checkpoints.image import file_entry, raw_image
from orchestrator.checkpoints.job import KeepRules
from orchestrator.checkpoints.manifest import Manifest, directory_name
from tests.plugins.s3_server import S3Server

NAME = directory_name(7, 1)
TOKEN = "a" * 32


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    running = S3Server()
    yield running
    running.close()


@pytest.fixture
def url(server: S3Server, request: pytest.FixtureRequest) -> Iterator[str]:
    bucket = server.bucket(request.node.name)
    yield f"s3://key:secret@{bucket}/runs/r1/checkpoints?{server.options}&connect_timeout=1&request_timeout=1"
    server.fault = lambda method, path: ""
    server.faults.clear()


def rank_done(inside: Storage, rank: int, size: int = 100) -> None:
    made = raw_image(f"side/of-rank-{rank}", size)
    with inside.open_image(made.path, size) as output:
        output.write(memoryview(bytes(size)))
    draft = Manifest(
        run="r1", name=NAME, attempt=1, step=7, epoch=0, epoch_complete=True, world_size=2, seed=0, config_hash="",
        created=100.0, duration=0.0, files=(),
    )  # fmt: skip
    receipt = Receipt(
        save=TOKEN, rank=rank, world_size=2, files=(file_entry(made, "", [""]),), content={}, sealed_at=101.0,
        draft=commit.draft_of(draft) if rank == 0 else None,
    )  # fmt: skip
    commit.write_receipt(inside, receipt)


def test_a_checkpoint_is_written_committed_listed_and_deleted(url: str) -> None:
    storage = Storage(url)
    inside = storage.join(NAME)
    rank_done(inside, 1, size=12 << 20)  # more than one part of an upload
    assert commit.finish(inside) is None
    rank_done(inside, 0)
    manifest = commit.finish(inside)
    assert manifest is not None
    assert commit.finish(inside) == manifest
    catalog.hold(storage, NAME, catalog.Hold.pinned)
    (found,) = catalog.scan(storage, with_holds=True).found
    assert found.manifest == manifest
    assert found.holds == {catalog.Hold.pinned}
    pointers.update(storage, [manifest], KeepRules(), now=1.0)
    assert pointers.read(storage, "latest") == NAME
    assert storage.free_bytes() is None
    assert time.time() - 600 < storage.modified(NAME) < time.time() + 600
    catalog.remove(storage, NAME)
    assert catalog.scan(storage).committed == ()
    assert [path for path, _ in storage.files()] == ["latest.json"]


def test_leftovers_are_swept_when_they_are_old(url: str) -> None:
    storage = Storage(url)
    rank_done(storage.join(NAME), 1)
    assert catalog.sweep(storage, attempt=2, now=time.time()) == []
    assert catalog.sweep(storage, attempt=2, now=time.time() + 7200) == [NAME]
    assert list(storage.files()) == []


def test_a_server_error_that_passes_is_not_noticed(url: str, server: S3Server) -> None:
    inside = Storage(url).join(NAME)
    server.fault = lambda method, path: "500" if method == "PUT" and not server.faults else ""
    rank_done(inside, 0)
    rank_done(inside, 1)
    assert commit.finish(inside) is not None
    assert len(server.faults) == 1


@pytest.mark.parametrize("fault", ["500", "stall"])
def test_a_server_that_fails_or_does_not_answer_is_an_error_in_time(url: str, server: S3Server, fault: str) -> None:
    """And never a checkpoint: when it is back, the save can be finished."""
    inside = Storage(f"{url}&attempts=1").join(NAME)
    rank_done(inside, 0)
    rank_done(inside, 1)
    server.fault = lambda method, path: fault if "MANIFEST" in path else ""
    with pytest.raises(OSError, match="MANIFEST"):
        commit.finish(inside)  # what does not answer would do so in five minutes
    assert server.faults
    server.fault = lambda method, path: ""
    assert not inside.exists("MANIFEST.json")
    assert commit.finish(inside) is not None
