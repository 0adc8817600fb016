"""The Ray head as `up` starts it: closed, reused, and stopped without touching another one. Takes about a minute."""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from cluster import ray_head, web
from orchestrator.stack import Stack

ROOT = Path(__file__).parents[2]


def run(verb: str, home: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-P", "-m", "cluster", verb, "--home", str(home), *words]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)


@pytest.fixture(scope="module")
def home() -> Iterator[Path]:
    parent = Path(tempfile.mkdtemp(prefix="orct-"))
    parent.chmod(0o711)
    home = parent / "h"
    ended = run("up", home, "mlflow.enabled=false", "ray.num_cpus=2")
    assert ended.returncode == 0, ended.stdout + ended.stderr
    yield home
    ended = run("down", home)
    left = ray_head.parts(home)
    shutil.rmtree(parent)
    assert ended.returncode == 0, ended.stderr
    assert left == []


def test_everything_of_the_head_listens_on_loopback(home: Path) -> None:
    addresses = {
        connection.laddr.ip.removeprefix("::ffff:")
        for process in ray_head.parts(home)
        for connection in process.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    }
    assert addresses == {"127.0.0.1"}


def test_the_head_wants_the_token_and_only_its_owner_has_it(home: Path) -> None:
    stack = Stack.load(home)
    assert stat.S_IMODE(Path(stack.ray_token_path).stat().st_mode) == 0o600
    assert web.get(f"{stack.ray_dashboard}/api/v0/nodes").status == 401
    token = ray_head.token(stack.ray_token_path)
    assert web.get(f"{stack.ray_dashboard}/api/v0/nodes", token=token).ok


def test_rays_open_directory_lies_in_a_closed_one(home: Path) -> None:
    assert stat.S_IMODE(ray_head.temp_directory(home).parent.stat().st_mode) == 0o700


def test_a_second_up_keeps_the_head_and_its_services(home: Path) -> None:
    before = Stack.load(home)
    ended = run("up", home, "--json", "mlflow.enabled=false")
    assert ended.returncode == 0, ended.stderr
    assert json.loads(ended.stdout)["up"]
    assert Stack.load(home).processes["ray"] == before.processes["ray"]
    assert Stack.load(home).services == before.services


def test_another_number_of_cpus_is_not_forced_on_a_running_head(home: Path) -> None:
    ended = run("up", home, "ray.num_cpus=3")
    assert ended.returncode == 2
    assert "orc down" in ended.stderr


def test_a_head_without_its_raylet_is_started_anew_with_the_same_address(home: Path) -> None:
    before = Stack.load(home)
    raylet = next(process for process in ray_head.parts(home) if process.name() == "raylet")
    raylet.kill()
    psutil.wait_procs([raylet], timeout=5)
    ended = run("up", home, "mlflow.enabled=false", "ray.num_cpus=2")
    assert ended.returncode == 0, ended.stdout + ended.stderr
    after = Stack.load(home)
    assert after.processes["ray"]["pid"] != before.processes["ray"]["pid"]
    assert after.ray_address == before.ray_address
    assert run("status", home).returncode == 0


def test_jobs_are_submitted_with_plain_ray_tooling(home: Path, tmp_path: Path) -> None:
    stack = Stack.load(home)
    (tmp_path / "job.py").write_text(
        "import ray; ray.init(); print('answer', ray.get(ray.remote(lambda: 42).remote()))"
    )
    command = [sys.executable, "-m", "ray.scripts.scripts", "job", "submit", "--address", stack.ray_dashboard]
    command += ["--working-dir", str(tmp_path), "--", "python", "job.py"]
    variables = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": stack.ray_token_path}
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")} | variables
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "answer 42" in ended.stdout
