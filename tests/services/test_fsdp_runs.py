"""Whole runs with FSDP2 on two ranks: parts saved every few steps, whole tensors every second epoch, through shared
memory; killed and continued.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from safetensors.torch import load_file

from orchestrator.backends.storage import Storage
from orchestrator.checkpoints import catalog
from orchestrator.checkpoints.load import load_checkpoint
from orchestrator.checkpoints.local import places
from orchestrator.checkpoints.local.client import SlabClient
from orchestrator.checkpoints.manifest import Manifest
from orchestrator.checkpoints.triggers import FULL
from orchestrator.records import RunStatus
from tests.plugins.local_stack import LocalStack
from tests.plugins.runs import PROJECT
from tests.ray.project.noted import digest

EPOCH, STEPS = 5, 20


@dataclass(frozen=True)
class Played:
    """A run that has ended."""

    local: LocalStack
    out: Path
    name: str
    run: str

    @property
    def checkpoints(self) -> Path:
        return Path(self.local.store.run(self.run).directory) / "checkpoints"

    def committed(self) -> list[Manifest]:
        """The oldest first."""
        found = catalog.scan(Storage(str(self.checkpoints)))
        assert found.corrupt == ()
        return sorted(found.committed, key=lambda manifest: catalog.age_key(manifest.name))

    def last(self) -> list[str]:
        """By rank, what it ended with."""
        return [json.loads((self.out / f"{self.name}-{rank}.json").read_text()) for rank in range(2)]

    def digests(self) -> dict[int, str]:
        """By step, of all tensors as rank 0 saw them; in every attempt the same."""
        found: dict[int, str] = {}
        for line in (self.out / f"{self.name}-0.digests").read_text().splitlines():
            step, value = line.split()
            assert found.setdefault(int(step), value) == value, f"step {step} was another one the second time"
        return found

    def curve(self, rank: int) -> dict[int, float]:
        points, by_step = self.local.store.points(self.run, "loss", rank=rank), {}
        for step, value in zip(points.steps.tolist(), points.values.tolist(), strict=True):
            assert by_step.setdefault(step, value) == value
        return by_step

    def troubles(self) -> list[str]:
        """What did not go through memory, late if it may be. On a busy machine one may be skipped, see `kinds`."""
        return [
            f"{event.kind}: {event.message}"
            for event in self.local.store.events(self.run)
            if event.kind.startswith(("checkpoint-", "overlap-")) and event.kind != "checkpoint-skipped"
        ]


@pytest.fixture(scope="module")
def local(schema_url: str) -> Iterator[LocalStack]:
    stack = LocalStack.make(schema_url)
    # The first save waits some seconds for memory; its writer shall not begin to start only then.
    assert SlabClient(str(places.slab_root(str(stack.home))), may_start=True).ensure()
    yield stack
    stack.remove()


def play(local: LocalStack, out: Path, name: str, kill_at: int, mode: str) -> Played:
    local.run(
        "-m", "orchestrator.cli.main", "run", "--local", "train=sharded:train", f"run.name={name}", f"out={out}",
        f"kill_at={kill_at}", "failures.max_restarts=1", f"checkpoints.mode={mode}", "checkpoints.every_steps=3",
        "checkpoints.every_epochs=0", "checkpoints.full_every_epochs=2", "checkpoints.keep_last=0",
        cwd=PROJECT, timeout=180,
    )  # fmt: skip
    return Played(local, out, name, local.store.runs(limit=1)[0].run)


@pytest.fixture(scope="module")
def undisturbed(local: LocalStack, tmp_path_factory: pytest.TempPathFactory) -> Played:
    return play(local, tmp_path_factory.mktemp("whole"), "whole", 0, "eager")


def is_whole_state(played: Played, manifest: Manifest) -> None:
    """It holds what the training had at its step, for us and, the model, for plain safetensors."""
    inside = played.checkpoints / manifest.name
    loaded = load_checkpoint(inside)
    assert digest(loaded.model, loaded.optimizer["state"]) == played.digests()[manifest.step], manifest.name
    parts = [tensor.offsets is not None for file in manifest.files for tensor in file.tensors]
    assert any(parts) == (manifest.kind == "sharded")
    if manifest.kind == "full":
        index = json.loads((inside / "model" / "model.safetensors.index.json").read_text())["weight_map"]
        files = {name: load_file(inside / "model" / name) for name in set(index.values())}
        plain = {name: files[file][name] for name, file in index.items()}
        assert digest(plain, loaded.optimizer["state"]) == played.digests()[manifest.step]


def kinds(played: Played) -> None:
    """Of the right kind at the right time. Where no slot was free one comes later, or not at all."""
    found = played.committed()
    assert {manifest.kind for manifest in found} == {"sharded", "full"}
    for manifest in found:
        assert (manifest.kind == "full") == (FULL in manifest.reasons)
        is_whole_state(played, manifest)
    full = sorted({manifest.step for manifest in found if manifest.kind == "full"})
    assert full[0] >= 2 * EPOCH
    assert len(full) <= 2


def test_parts_every_few_steps_and_whole_tensors_at_the_epoch(undisturbed: Played) -> None:
    kinds(undisturbed)
    assert undisturbed.troubles() == []
    root = places.slab_root(str(undisturbed.local.home))
    health = SlabClient(str(root), may_start=False).health()
    assert health["committed"] >= len(undisturbed.committed()), "all of them went through its memory"


@pytest.mark.parametrize("mode", ["eager", "overlap"])
def test_killed_and_continued_it_ends_bit_equal(
    local: LocalStack, undisturbed: Played, tmp_path: Path, mode: str
) -> None:
    kill_at = random.randint(2 * EPOCH - 1, STEPS - 1)
    played = play(local, tmp_path, mode, kill_at, mode)
    attempts = local.store.attempts(played.run)
    assert [attempt.status for attempt in attempts] == [RunStatus.crashed, RunStatus.finished], "the fault happened"
    assert played.last() == undisturbed.last(), f"killed at step {kill_at}"
    for rank in range(2):
        assert played.curve(rank) == undisturbed.curve(rank)
        assert sorted(played.curve(rank)) == list(range(1, STEPS + 1))
    assert played.digests() == undisturbed.digests()
    kinds(played)
    (resumed,) = [event for event in local.store.events(played.run) if event.kind == "resumed"]
    assert resumed.details["is_exact"]
    assert played.troubles() == []
