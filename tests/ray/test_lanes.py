"""Lanes on a real cluster: one group of workers runs one trial after the other, as new workers would."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.plugins.runs import PROJECT, Orc, wait_until

EPOCHS = 3
TRIALS = [{"lr": 0.1, "width": 8}, {"lr": 0.01, "width": 8}, {"lr": 0.1, "width": 16}]


def on_lanes(orc: Orc, trials: Sequence[dict[str, Any]], lanes: str = "auto", **more: Any) -> dict[str, Any]:
    asked = json.dumps({"trials": trials, "lanes": lanes, **more})
    done = subprocess.run(
        [sys.executable, "on_lanes.py", asked], cwd=PROJECT, capture_output=True, text=True, timeout=240, check=False,
        env={**orc.own.environment, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def numbers(orc: Orc, endings: Sequence[dict[str, Any]]) -> list[Any]:
    """All that the trials recorded, and the weights in their last checkpoints, bit for bit."""
    store, found = orc.store(), []
    for ending in endings:
        points = {}
        for key in ("loss", "weights"):
            for rank in (0, 1):
                read = functools.partial(store.points, ending["run"], key, rank=rank)
                wait_until(lambda read=read: len(read().values) == EPOCHS, 30, "all points")  # type: ignore[misc]
                points[key, rank] = read().values.tobytes()
        found.append((points, weights(Path(ending["directory"]))))
    return found


def weights(directory: Path) -> list[str]:
    """The hashes of all tensors in the newest checkpoint."""
    newest = max(directory.glob("checkpoints/*/MANIFEST.json"))
    files = json.loads(newest.read_text())["files"]
    found = sorted(f"{tensor['name']} {tensor['xxh3']}" for file in files for tensor in file["tensors"])
    assert found
    return found


def test_trials_on_a_lane_are_those_of_new_workers_bit_for_bit(orc: Orc, tmp_path: Path) -> None:
    journal = {"journal": str(tmp_path)}
    lane = on_lanes(orc, [{**trial, **journal} for trial in TRIALS])
    assert [ending["how"] for ending in lane["endings"]] == ["complete"] * 3, lane
    assert lane["view"]["groups"] == 1
    processes = {json.loads(line)["pid"] for line in (tmp_path / "rank-0").read_text().splitlines()}
    assert len(processes) == 1
    new = on_lanes(orc, TRIALS[1:], "off")
    assert [ending["how"] for ending in new["endings"]] == ["complete"] * 2, new
    assert new["view"]["groups"] == 2
    assert numbers(orc, lane["endings"][1:]) == numbers(orc, new["endings"])


@pytest.fixture(scope="module")
def mixed(orc: Orc) -> dict[str, Any]:
    """Bad trials beside good ones on one lane."""
    kinds = ["good", "raises", "good", "backward", "leaves", "good", "exits", "hangs", "good"]
    return on_lanes(orc, [{**TRIALS[0], "kind": kind} for kind in kinds], condemn=kinds.index("hangs"))


def test_bad_trials_fail_alone_and_are_told_as_they_failed(mixed: dict[str, Any]) -> None:
    good = ("complete", "", False)
    bug = ("failed", "user_bug", False)
    told = [(ending["how"], ending["kind"], ending["is_restart_useful"]) for ending in mixed["endings"]]
    died, hung = ("failed", "worker_killed", True), ("failed", "hang", False)
    assert told == [good, bug, good, bug, good, good, died, hung, good], mixed
    assert mixed["endings"][1]["reason"].startswith("ArithmeticError: this trial cannot be trained on rank 1")
    assert mixed["endings"][3]["error"]["message"] == "no gradient today"


def test_only_dead_and_spoilt_groups_are_replaced(mixed: dict[str, Any]) -> None:
    view = mixed["view"]
    assert view["crashes"] == 2, "the one that exits and the one that hangs"
    assert list(view["recycled"]) == ["1 threads of the job run on: left-behind"]
    assert view["groups"] == 1 + 2 + 1


def test_good_trials_beside_bad_ones_compute_what_they_always_do(orc: Orc, mixed: dict[str, Any]) -> None:
    good = [mixed["endings"][number] for number in (0, 2, 5, 8)]
    found = numbers(orc, good)
    assert found == [found[0]] * 4
