"""Which processes and ports are ours."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from cluster import environment, ports, processes, ray_head, stack_up
from cluster.progress import Progress
from orchestrator.errors import ConfigError, ServiceUnavailable
from orchestrator.stack import Stack, StackSettings
from tests.plugins.runs import wait_until

SLEEPER = [sys.executable, "-S", "-c", "import time; time.sleep(60)"]


@pytest.fixture
def sleeper(tmp_path: Path) -> Iterator[psutil.Process]:
    process = processes.start_detached(SLEEPER, {environment.PART_VARIABLE: "/h:test"}, tmp_path / "log", tmp_path)
    yield process
    processes.stop([process], grace=5)


@pytest.fixture
def listener() -> Iterator[int]:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        yield server.getsockname()[1]


def test_a_started_process_has_nothing_of_our_terminal(sleeper: psutil.Process) -> None:
    assert os.getsid(sleeper.pid) == sleeper.pid != os.getsid(0)


def test_a_process_is_recognised_by_its_record_and_by_its_mark(sleeper: psutil.Process) -> None:
    assert processes.recorded(processes.record(sleeper)) == sleeper
    assert processes.marked("/h:test") == [sleeper]
    assert processes.marked("/h:other") == []


def test_another_process_with_the_same_number_is_not_ours(sleeper: psutil.Process) -> None:
    entry = processes.record(sleeper)
    assert processes.recorded({**entry, "started": entry["started"] - 100}) is None


def test_a_raylet_of_another_node_on_this_host_is_none_of_the_head(tmp_path: Path) -> None:
    home = tmp_path / "h"
    home.mkdir()
    sessions = f"{ray_head.temp_directory(home)}/session_1"
    mark = {environment.PART_VARIABLE: environment.mark(home, "ray")}
    started: list[psutil.Process] = []

    def start(name: str, variables: dict[str, str]) -> psutil.Process:
        directory = tmp_path / str(len(started))
        directory.mkdir()
        program = shutil.copy(sys.executable, directory / name)
        code = "import time; time.sleep(60)"
        words = [program, "-S", "-c", code, sessions]
        paths = {"LD_LIBRARY_PATH": sysconfig.get_config_var("LIBDIR"), "PYTHONHOME": sys.base_prefix}
        started.append(processes.start_detached(words, variables | paths, tmp_path / "log", tmp_path))
        wait_until(lambda: started[-1].name() == name, 10, (tmp_path / "log").read_text())
        return started[-1]

    try:
        foreign, store = start("raylet", {}), start("gcs_server", mark)
        assert {each.pid for each in ray_head.parts(home)} == {foreign.pid, store.pid}, "it goes when the head goes"
        assert ray_head.core(home) == {"gcs_server": store}
        assert not ray_head.is_complete(home)
        processes.stop([store], grace=0)
        assert ray_head.restart_control_store(Stack(home=str(home)), ["false"]) is None, "there is no head any more"
        own = start("raylet", mark)
        assert ray_head.core(home) == {"raylet": own}
    finally:
        processes.stop(started, grace=0)


@pytest.mark.parametrize("losses", [0, 1, 2, 3])
def test_a_control_store_that_is_lost_while_services_start_comes_first(
    losses: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []

    def services(*_: object) -> None:
        done.append("services")
        if done.count("services") <= losses:
            raise ServiceUnavailable("services", "here", "the control store ended.", "")

    monkeypatch.setattr(stack_up, "_services", services)
    monkeypatch.setattr(stack_up, "_ray", lambda *_: done.append("ray"))
    gone = Stack(home="/h", processes={"ray": {"pid": 1, "started": 0.0}})
    pieces: Any = SimpleNamespace(stack=gone)
    with pytest.raises(ServiceUnavailable) if losses == 3 else contextlib.nullcontext():
        stack_up._services_of_a_living_head(pieces, StackSettings(), Progress(sys.stderr))
    assert done == ["services", *["ray", "services"] * min(losses, 2)]
    pieces.stack = Stack(home="/h")  # a cluster of somebody else's
    done.clear()
    with pytest.raises(ServiceUnavailable) if losses else contextlib.nullcontext():
        stack_up._services_of_a_living_head(pieces, StackSettings(), Progress(sys.stderr))
    assert done == ["services"]


def test_stopping_ends_what_ignores_sigterm(tmp_path: Path) -> None:
    code = "import signal, time; signal.signal(15, signal.SIG_IGN); print('ready', flush=True); time.sleep(60)"
    stubborn = subprocess.Popen([sys.executable, "-S", "-c", code], stdout=subprocess.PIPE)
    assert stubborn.stdout is not None
    assert stubborn.stdout.readline() == b"ready\n"
    processes.stop([psutil.Process(stubborn.pid)], grace=0.1)
    assert not psutil.pid_exists(stubborn.pid)


def test_this_process_never_counts_as_a_part(monkeypatch: pytest.MonkeyPatch) -> None:
    code = "from cluster import processes; print(processes.marked('/h:self'))"
    variables = os.environ | {environment.PART_VARIABLE: "/h:self"}
    said = subprocess.run(
        [sys.executable, "-c", code], env=variables, capture_output=True, text=True, check=True
    ).stdout
    assert said == "[]\n"


def test_a_taken_port_is_refused_with_its_owner(listener: int) -> None:
    with pytest.raises(ConfigError, match=rf"mlflow.port = {listener}: .* taken by .*\(pid {os.getpid()}") as refused:
        ports.choose("mlflow.port", listener, 5000, set())
    assert "auto" in str(refused.value)


def test_without_a_wish_the_next_free_port_is_chosen(listener: int) -> None:
    taken: set[int] = set()
    port = ports.choose("mlflow.port", 0, listener, taken)
    assert port != listener
    assert ports.is_free(port)
    assert taken == {port}
    assert ports.choose("ray.port", 0, port, taken) != port


def test_the_same_port_twice_is_refused() -> None:
    taken: set[int] = set()
    port = ports.anywhere(taken)
    with pytest.raises(ConfigError, match="another part of this stack"):
        ports.choose("ray.port", port, 1, taken)


def test_the_token_of_somebody_elses_cluster_comes_from_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = tmp_path / "token"
    theirs.write_text("abc\n")
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(theirs))
    assert ray_head.token("") == "abc"
    monkeypatch.setenv("RAY_AUTH_TOKEN", "def")
    assert ray_head.token("") == "def"
    assert ray_head.token(tmp_path / "none") == ""
