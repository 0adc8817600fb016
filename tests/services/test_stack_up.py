"""`up`, `down`, `status` and `doctor` with real servers. Ray has its own tests; here it is switched off."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import psycopg
import pytest

from cluster import ports, redis_server
from cluster.postgres import EmbeddedPostgres
from orchestrator.backends.postgres import conninfo
from orchestrator.stack import Stack

ROOT = Path(__file__).parents[2]
PASSWORD = "p@ss:w/rd"
REDIS = "up" if redis_server.program() else "off"


def start(verb: str, home: Path, *words: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-P", "-m", "cluster", verb, "--home", str(home), *words]
    return subprocess.Popen(
        command, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def run(verb: str, home: Path, *words: str) -> subprocess.CompletedProcess[str]:
    process = start(verb, home, *words)
    stdout, stderr = process.communicate(timeout=150)
    return subprocess.CompletedProcess([verb], process.returncode, stdout, stderr)


def up(home: Path, *words: str) -> Stack:
    ended = run("up", home, "ray.enabled=false", *words)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return Stack.load(home)


def status(home: Path) -> dict[str, Any]:
    ended = run("status", home, "--json")
    found = json.loads(ended.stdout)
    assert ended.returncode == (0 if found["up"] else 1)
    return found | {"parts": {part["name"]: part for part in found["parts"]}}


def pids(stack: Stack) -> dict[str, int]:
    return {name: entry["pid"] for name, entry in stack.processes.items()}


def belonging_to(home: Path) -> list[psutil.Process]:
    """Every living process that names the home, in its command line or as our mark."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            said = [*process.cmdline(), process.environ().get("ORC_PART", "")]
            if process.status() != psutil.STATUS_ZOMBIE and any(str(home) in word for word in said):
                found.append(process)
    return [process for process in found if process.pid != os.getpid()]


@contextlib.contextmanager
def new_home() -> Iterator[Path]:
    parent = Path(tempfile.mkdtemp(prefix="orct-"))
    parent.chmod(0o711)
    try:
        yield parent / "h"
    finally:
        ended = run("down", parent / "h")
        left = belonging_to(parent / "h")
        shutil.rmtree(parent)
    assert ended.returncode == 0, ended.stderr
    assert left == []


@pytest.fixture(scope="module")
def home() -> Iterator[Path]:
    """A stack of the module's own, up."""
    with new_home() as home:
        up(home)
        yield home


@pytest.fixture
def other_home() -> Iterator[Path]:
    with new_home() as home:
        yield home


def test_everything_is_up_and_says_where(home: Path) -> None:
    found = status(home)
    assert found["up"]
    assert found["parts"]["postgres"]["version"].startswith("18")
    assert {name: part["status"] for name, part in found["parts"].items()} == {
        "postgres": "up", "schema": "up", "redis": REDIS, "mlflow": "up", "api": "up", "ray": "off",
    }  # fmt: skip
    assert found["parts"]["mlflow"]["latency_ms"] > 0
    assert found["parts"]["api"]["address"] == Stack.load(home).api_url


def test_a_second_up_reuses_what_is_there(home: Path) -> None:
    before = Stack.load(home)
    asked = time.monotonic()
    assert pids(up(home)) == pids(before)
    assert time.monotonic() - asked < 10  # half a second on an idle machine; a start of MLflow alone takes more


def test_files_are_for_their_owner_only(home: Path) -> None:
    for name in ("stack.json", "api_token"):
        assert stat.S_IMODE((home / name).stat().st_mode) == 0o600
    assert stat.S_IMODE(home.stat().st_mode) & 0o066 == 0


def test_all_tcp_listeners_are_on_loopback(home: Path) -> None:
    for process in belonging_to(home):
        for connection in process.net_connections("inet"):
            assert connection.status != psutil.CONN_LISTEN or connection.laddr.ip == "127.0.0.1"


def test_a_second_stack_lives_beside_the_first(home: Path, other_home: Path) -> None:
    up(other_home, "mlflow.enabled=false")
    assert status(other_home)["up"]
    assert status(home)["up"]
    stopped = run("down", other_home, "--json")
    assert json.loads(stopped.stdout)["stopped"] == ["API", *(["Redis"] if REDIS == "up" else []), "PostgreSQL"]
    assert belonging_to(other_home) == []
    assert status(home)["up"]
    assert not status(other_home)["up"]


def test_what_died_is_told_and_started_again(home: Path) -> None:
    before = Stack.load(home)
    for name in before.processes:
        process = psutil.Process(before.processes[name]["pid"])
        family = [*process.children(recursive=True), process]
        for member in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.kill()
        psutil.wait_procs(family, timeout=5)
    found = status(home)
    assert not found["up"]
    assert found["parts"]["postgres"]["why"]
    assert found["parts"]["mlflow"]["status"] == found["parts"]["api"]["status"] == "down"
    after = up(home)
    assert (after.mlflow_uri, after.api_url) == (before.mlflow_uri, before.api_url)
    assert set(pids(after).values()).isdisjoint(pids(before).values())
    assert status(home)["up"]


def test_doctor_finds_a_fault_and_its_command_mends_it(home: Path) -> None:
    home.chmod(0o755)
    ended = run("doctor", home, "--json")
    found = json.loads(ended.stdout)
    assert ended.returncode == 1
    faults = [check for check in found["checks"] if not check["is_ok"]]
    assert [fault["check"] for fault in faults] == ["data directory"]
    subprocess.run(faults[0]["mend"], shell=True, check=True)
    ended = run("doctor", home)
    assert ended.returncode == 0, ended.stdout
    assert "torch" in ended.stdout


def test_doctor_finds_a_token_that_others_can_read(home: Path) -> None:
    token = Path(Stack.load(home).api_token_path)
    token.chmod(0o644)
    faults = [check for check in json.loads(run("doctor", home, "--json").stdout)["checks"] if not check["is_ok"]]
    assert [fault["check"] for fault in faults] == ["the API's token"]
    subprocess.run(faults[0]["mend"], shell=True, check=True)
    assert stat.S_IMODE(token.stat().st_mode) == 0o600
    assert len(token.read_text()) == 64


def test_a_running_api_server_is_not_moved_but_can_be_switched_off(home: Path) -> None:
    before = Stack.load(home)
    for words in (["api.port=9999"], ["api.host=0.0.0.0"]):
        refused = run("up", home, "ray.enabled=false", *words)
        assert (refused.returncode, "orc down" in refused.stderr) == (2, True), refused.stderr
    assert pids(Stack.load(home)) == pids(before)
    stack = up(home, "api.enabled=false")
    assert (stack.api_url, "api" in stack.processes) == ("", False)
    assert before.processes["api"]["pid"] not in [process.pid for process in belonging_to(home)]
    assert status(home)["parts"]["api"]["status"] == "off"
    assert up(home).api_token_path == before.api_token_path
    assert status(home)["parts"]["api"]["status"] == "up"


@pytest.mark.parametrize("key", ["mlflow.port", "api.port"])
def test_a_taken_port_is_named_before_anything_is_made(other_home: Path, key: str) -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        port = server.getsockname()[1]
        ended = run("up", other_home, "ray.enabled=false", f"{key}={port}")
    assert ended.returncode == 2
    assert f"(pid {os.getpid()}" in ended.stderr
    assert not other_home.exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["mlflow.enable=true"], "mlflow.enabled"),
        (["ray.num_cpus=many"], "ray.num_cpus"),
        (["api.host=http://here"], "api.host"),
        (["database.url=postgresql://nobody:hidden@127.0.0.1:1/d"], "postgresql at 127.0.0.1:1/d"),
        (["mlflow.tracking_uri=http://127.0.0.1:1"], "mlflow at http://127.0.0.1:1"),
        (["ray.address=127.0.0.1:1"], "nobody listens"),
    ],
)
def test_bad_input_ends_with_one_message_and_nothing_made(other_home: Path, words: list[str], said: str) -> None:
    ended = run("up", other_home, *words)
    assert ended.returncode == 2
    assert said in ended.stderr
    assert "Traceback" not in ended.stderr
    assert "hidden" not in ended.stderr + ended.stdout
    assert not other_home.exists()


def test_a_home_that_is_a_file_is_refused(other_home: Path) -> None:
    other_home.write_text("")
    ended = run("up", other_home, "ray.enabled=false", "mlflow.enabled=false")
    assert (ended.returncode, "Traceback" in ended.stderr) == (2, False)
    other_home.unlink()


def test_nothing_started_is_not_up(other_home: Path) -> None:
    assert status(other_home) == {
        "home": str(other_home), "up": False, "why": "Nothing was started there yet. Run `orc up`.", "parts": {},
    }  # fmt: skip
    assert not other_home.exists()


def test_an_up_that_is_killed_anywhere_is_continued_by_the_next(other_home: Path) -> None:
    for delay in (0.6, 3.0):
        process = start("up", other_home, "ray.enabled=false")
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(delay)
        process.kill()
        process.communicate()
    up(other_home)
    assert status(other_home)["up"]
    servers = [p for p in belonging_to(other_home) if "server" in p.cmdline() and "mlflow" in p.cmdline()]
    assert len(servers) == 1, [p.cmdline() for p in servers]


def test_two_ups_at_once_bring_up_one_stack(other_home: Path) -> None:
    both = [start("up", other_home, "ray.enabled=false", "mlflow.enabled=false") for _ in range(2)]
    ended = [(process.communicate(timeout=120), process.returncode) for process in both]
    assert [code for _, code in ended] == [0, 0], ended
    postmasters = [p for p in belonging_to(other_home) if "-D" in p.cmdline()]
    assert len(postmasters) == 1


@pytest.fixture(scope="module")
def external() -> Iterator[str]:
    """A database on somebody else's server: over TCP, with a password, owned by a role without any rights."""
    directory = Path(tempfile.mkdtemp(prefix="orct-"))
    directory.chmod(0o711)
    port = ports.anywhere(set())
    server = EmbeddedPostgres(directory / "pg", tcp_port=port)
    server.start()
    with psycopg.connect(conninfo(server.url("postgres")), autocommit=True) as connection:
        connection.execute(f"create role plain login nosuperuser nocreatedb password '{PASSWORD}'")
        connection.execute("create database team owner plain")
    yield f"postgresql://plain:p%40ss%3Aw%2Frd@127.0.0.1:{port}/team"
    server.stop()
    shutil.rmtree(directory)


def test_an_external_server_needs_no_superuser_and_its_password_is_not_shown(
    external: str, home: Path, other_home: Path
) -> None:
    ended = run("up", other_home, "ray.enabled=false", f"database.url={external}", "--json")
    assert ended.returncode == 0, ended.stderr
    stack = Stack.load(other_home)
    assert "postgres" not in stack.processes
    assert stack.mlflow_uri != Stack.load(home).mlflow_uri, "two servers beside each other"
    with psycopg.connect(external) as connection:
        rows = connection.execute("select table_schema, table_name from information_schema.tables").fetchall()
    assert ("public", "runs") in rows
    assert ("mlflow", "experiments") in rows
    shown = ended.stdout + ended.stderr + run("status", other_home).stdout + run("doctor", other_home).stdout
    shown += " ".join(word for process in belonging_to(other_home) for word in process.cmdline())
    assert PASSWORD not in shown
    assert "p%40ss" not in shown
    assert up(other_home).database_url == stack.database_url, "the next up knows it without being told"


def test_an_existing_sqlite_store_is_used_without_a_server(external: str, other_home: Path) -> None:
    store = other_home.parent / "mlflow.db"
    stack = up(other_home, f"database.url={external}", f"mlflow.tracking_uri=sqlite:///{store}", "api.enabled=false")
    assert stack.mlflow_uri == f"sqlite:///{store}"
    assert stack.processes.keys() <= {"redis"}


def test_a_wrong_password_is_one_message(external: str, other_home: Path) -> None:
    wrong = external.replace("p%40ss", "wrong")
    ended = run("up", other_home, f"database.url={wrong}")
    assert ended.returncode == 2
    assert "password authentication failed" in ended.stderr
    assert "wrong" not in ended.stderr
    assert not other_home.exists()
