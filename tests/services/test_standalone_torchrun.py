"""`orchestrator.Checkpoints` under torchrun: two ranks share a checkpoint, and one alone goes on from it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

from orchestrator.checkpoints.local.ending import end_writers

SCRIPT = """
import json, sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

import orchestrator

out, url, is_alone = Path(sys.argv[1]), sys.argv[2], sys.argv[3] == "alone"
torch.set_num_threads(1)
if not is_alone:
    dist.init_process_group("gloo")
rank = 0 if is_alone else dist.get_rank()
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(20, 20), nn.Linear(20, 20))
optimizer = torch.optim.Adam(model.parameters())
with orchestrator.Checkpoints(url, save_best="loss:min", slab_directory=sys.argv[4]) as checkpoints:
    state = checkpoints.state(model=model, optimizer=optimizer)
    found = checkpoints.load_latest(state)
    seen = []
    for step in range(found.step + 1 if found else 1, (found.step if found else 0) + 4):
        model(torch.full((2, 20), float(step))).square().mean().backward()
        if not is_alone:
            for parameter in model.parameters():
                dist.all_reduce(parameter.grad)
        optimizer.step()
        # Each rank measures something else: rank 0's counts.
        info = checkpoints.save(state, step=step, metrics={"loss": 1.0 / step if rank == 0 else float(step)})
        seen.append([info.step, info.is_best])
result = {
    "seen": seen,
    "found": None if found is None else [found.step, found.is_exact, list(found.why)],
    "weights": model[0].weight.detach().flatten()[:5].tolist(),
    "files": sorted(str(path.relative_to(info.uri)) for path in Path(info.uri).rglob("*.safetensors")),
}
(out / f"rank-{rank}.json").write_text(json.dumps(result))
if not is_alone:
    dist.destroy_process_group()
"""


def started(directory: Path, url: Path, how: str, slabs: Path) -> list[dict[str, Any]]:
    script = directory / "train.py"
    script.write_text(SCRIPT)
    out = directory / how
    out.mkdir()
    launcher = [] if how == "alone" else ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {
        **os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        "GLOO_SOCKET_IFNAME": "lo",
    }  # fmt: skip
    words = [sys.executable, *launcher, str(script), str(out), str(url), how, str(slabs)]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    return [json.loads(path.read_text()) for path in sorted(out.glob("rank-*.json"))]


@pytest.fixture(scope="module")
def played(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    directory = tmp_path_factory.mktemp("torchrun")
    slabs = Path(tempfile.mkdtemp(prefix="orct-", dir="/dev/shm" if Path("/dev/shm").is_dir() else None))
    ways = ("first", "second", "alone")
    played = {how: started(directory, directory / "checkpoints", how, slabs) for how in ways}
    assert list((slabs / "members").iterdir()), "they went through memory"
    assert end_writers(slabs)
    assert not slabs.exists()
    return played


def test_both_ranks_write_and_rank_0_decides_what_is_best(played: dict[str, list[dict[str, Any]]]) -> None:
    one, two = played["first"]
    assert one["seen"] == two["seen"] == [[step, True] for step in (1, 2, 3)]
    assert "model/model-00001-of-00002.safetensors" in one["files"]
    assert "optim/optim-00002-of-00002.safetensors" in one["files"]


def test_the_next_start_goes_on_exactly(played: dict[str, list[dict[str, Any]]]) -> None:
    for each in played["second"]:
        assert each["found"] == [3, True, []]
    assert played["second"][0]["weights"] == played["second"][1]["weights"] != played["first"][0]["weights"]


def test_one_process_goes_on_from_what_two_saved_and_says_so(played: dict[str, list[dict[str, Any]]]) -> None:
    (alone,) = played["alone"]
    assert alone["found"] == [6, False, ["2 ranks then, 1 now"]]
    assert [step for step, _ in alone["seen"]] == [7, 8, 9]
