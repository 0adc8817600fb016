"""Decisions of local mode: where to run, which GPUs a rank sees, when the tracker may end, what crosses the socket."""

from __future__ import annotations

import json
import socket
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import pytest

from orchestrator.config import Enabled, Settings
from orchestrator.errors import ConfigError, NotFound, UserError
from orchestrator.execution.choice import _instead_of_ray, is_local
from orchestrator.execution.local import plan_from_json, plan_to_json, share_of_gpus
from orchestrator.execution.script import _plain
from orchestrator.execution.worker import Plan
from orchestrator.records import RunTicket
from orchestrator.stack import Stack
from orchestrator.tracking.local.places import MAX_SOCKET_BYTES, places, private_directory, socket_path
from orchestrator.tracking.local.places import settings as tracker_settings
from orchestrator.tracking.local.process import Rest, Work
from orchestrator.tracking.local.protocol import Request, Response, failure, receive_request, send, value_of

NO_RAY, WITH_RAY = Stack(home="/h"), Stack(home="/h", ray_address="127.0.0.1:6379")


def settings(enabled: Enabled, address: str = "") -> Settings:
    made = Settings()
    made.ray.enabled, made.ray.address = enabled, address
    return made


@pytest.mark.parametrize(
    ("enabled", "stack", "asked", "is_job", "local"),
    [
        (Enabled.auto, None, False, False, True),
        (Enabled.auto, NO_RAY, False, False, True),
        (Enabled.auto, WITH_RAY, False, False, False),
        (Enabled.auto, NO_RAY, False, True, False),  # a job on a cluster never trains beside it by mistake
        (Enabled.auto, WITH_RAY, True, False, True),
        (Enabled.false, WITH_RAY, False, False, True),
        (Enabled.true, NO_RAY, False, False, False),  # and there it is refused
    ],
)
def test_ray_is_used_where_it_is(enabled: Enabled, stack: Stack | None, asked: bool, is_job: bool, local: bool) -> None:
    assert is_local(settings(enabled), stack, asked=asked, is_job=is_job) is local


def test_who_names_a_cluster_wants_it() -> None:
    assert not is_local(settings(Enabled.auto, "10.0.0.1:6379"), None, asked=False, is_job=False)


def test_where_ray_does_not_answer_this_host_stands_in_only_if_it_may() -> None:
    said: list[str] = []
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))  # and does not listen
        stack = Stack(home="/h", ray_address=f"127.0.0.1:{nobody.getsockname()[1]}")
        may, wants = settings(Enabled.auto), settings(Enabled.true)
        may.ray.fallback = wants.ray.fallback = True
        assert _instead_of_ray(settings(Enabled.auto), stack, False, said.append) is None
        assert _instead_of_ray(wants, stack, False, said.append) is None
        assert _instead_of_ray(may, stack, True, said.append) is None
        assert said == []
        assert _instead_of_ray(may, stack, False, said.append) is not None
        assert "Connection refused" in said[0]
        nobody.listen()
        assert _instead_of_ray(may, stack, False, said.append) is None


def test_local_and_ray_at_once_is_refused() -> None:
    with pytest.raises(ConfigError, match="--local"):
        is_local(settings(Enabled.true), WITH_RAY, asked=True, is_job=False)


@pytest.mark.parametrize(
    ("rank", "each", "seen", "backend", "device"),
    [
        (1, 0.0, "", "gloo", 1),
        (1, 1.0, "4,5,6,7", "nccl", 1),
        (1, 2.0, "6,7", "nccl", 0),
        (0, 0.5, "4", "gloo", 0),
        (1, 0.5, "4", "gloo", 0),
        (2, 0.5, "5", "gloo", 0),
    ],
)
def test_each_rank_sees_its_share_of_the_gpus(rank: int, each: float, seen: str, backend: str, device: int) -> None:
    assert share_of_gpus(rank, each, ["4", "5", "6", "7"]) == ({"CUDA_VISIBLE_DEVICES": seen}, backend, device)


def test_a_plan_survives_the_way_to_a_rank() -> None:
    ticket = RunTicket(run="r1", name="n", experiment="e", attempt=2, directory="/r1")
    plan = Plan(
        ticket=ticket, train="a:b", user={"lr": float("inf"), "layers": [1, 2], "none": None}, spool_directory="/s",
        spool_bytes=1, flush_timeout=2.0, seed=3, checkpoints={"keep_last": 3}, config_hash="h",
        code_paths=("/a", "/b"), secrets=("s",), threads=2,
    )  # fmt: skip
    assert plan_from_json(plan_to_json(plan)) == plan
    assert {field.name for field in fields(Plan)} == set(json.loads(plan_to_json(plan)))


def test_the_tracker_ends_when_nothing_is_left_and_waits_long_for_what_cannot_be_moved() -> None:
    rest = Rest(idle=60, patience=900)
    done, stuck, moving = Work(is_used=False), Work(is_used=False, left=1), Work(is_used=False, left=1, position=(1,))
    assert not rest.is_over(done, now=0)
    assert not rest.is_over(done, now=59)
    assert not rest.is_over(Work(is_used=True), now=60)
    assert not rest.is_over(done, now=119)
    assert rest.is_over(done, now=120)
    assert not rest.is_over(moving, now=200), "something was done"
    assert not rest.is_over(stuck, now=201)
    assert not rest.is_over(stuck, now=1100)
    assert rest.is_over(stuck, now=1101)


def test_errors_cross_the_socket_with_all_they_know() -> None:
    with pytest.raises(NotFound) as found:
        value_of(failure(NotFound("run", "r1", ("r2", "r3"))))
    assert found.value.args == ("run", "r1", ("r2", "r3"))

    class Strange(UserError):
        def __init__(self) -> None:
            super().__init__("what to do")

    with pytest.raises(UserError, match="what to do"):
        value_of(failure(Strange()))
    with pytest.raises(ConnectionError, match="ZeroDivisionError: by zero"):
        value_of(failure(ZeroDivisionError("by zero")))
    assert value_of(Response(value=[1])) == [1]


def test_a_long_data_directory_has_its_socket_elsewhere(tmp_path: Path) -> None:
    assert socket_path(Path("/home/me/.orc")) == Path("/home/me/.orc/local/socket")
    long = Path("/" + "a" * 120)
    assert len(str(socket_path(long))) <= MAX_SOCKET_BYTES
    assert socket_path(long) != socket_path(long / "b")


def test_everybody_finds_the_same_socket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = tmp_path / ("long" * 30)
    before = socket_path(home)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert socket_path(home) == before


def test_a_tracker_of_another_version_is_another_one(monkeypatch: pytest.MonkeyPatch) -> None:
    before = tracker_settings(NO_RAY)
    monkeypatch.setattr("orchestrator.application.version", lambda: "0.0.1")
    assert tracker_settings(NO_RAY) != before


@pytest.mark.parametrize(("method", "is_heard"), [("describe", True), ("stop", True), ("open_run", False)])
def test_a_newer_version_can_end_an_older_tracker(method: str, is_heard: bool) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        send(ours, Request(method=method, protocol=99))
        if is_heard:
            assert receive_request(theirs).method == method
        else:
            with pytest.raises(ConnectionError, match="protocol 99"):
                receive_request(theirs)


@dataclass
class Lr:
    value: float = 0.1


def test_parameters_of_every_kind_become_plain_values() -> None:
    given = {"a": {(1, 2): 3}, "b": np.float32(0.5), "c": Lr(), "d": (1, None), "e": {1: True}, "f": float("inf")}
    assert _plain(given) == {
        "a": {"(1, 2)": 3}, "b": 0.5, "c": {"value": 0.1}, "d": [1, None], "e": {"1": True}, "f": float("inf"),
    }  # fmt: skip
    assert _plain(Lr()) == {"value": 0.1}
    assert _plain(None) == {}


def test_the_local_tracker_shares_no_file_with_the_one_on_ray() -> None:
    where = places(Stack(home="/h", spool_directory="/h/spools"))
    assert (where.log, where.spools) == (Path("/h/local/wal"), Path("/h/local/spools"))
    told = places(Stack(home="/h", spool_directory="/disk", external={"tracking.spool_dir": "/disk"}))
    assert told.spools.parent == Path("/disk")


def test_a_directory_that_others_can_enter_is_refused(tmp_path: Path) -> None:
    open_to_all = tmp_path / "open"
    open_to_all.mkdir(mode=0o755)
    with pytest.raises(PermissionError, match="0700"):
        private_directory(open_to_all)
    private_directory(tmp_path / "new")
    assert (tmp_path / "new").stat().st_mode & 0o777 == 0o700
