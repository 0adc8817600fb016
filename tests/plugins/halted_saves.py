"""Halts saves of runs on Ray at chosen points, and judges what is there. A run is one of `noted:steps`.

`plugins/save_points/sitecustomize.py` is the other side: it runs in the processes of the nodes that were started with
`Halts.environment`.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from orchestrator.backends.storage import Storage
from orchestrator.checkpoints import catalog
from orchestrator.checkpoints.load import load_checkpoint
from orchestrator.checkpoints.local import places
from orchestrator.checkpoints.reader import verify
from orchestrator.checkpoints.slab import SUFFIX, SlabFile, State
from orchestrator.store.store import Store
from tests.plugins.runs import Orc, wait_until
from tests.ray.project.noted import digest

POINTS = ("seal", "first-file", "second-file", "manifest", "result")
"""Of a save, in their order: before the store that hands a rank's part over, before the writer's first file, with the
model's file there and not the optimizer's, with all receipts and no manifest, with the manifest and nobody told."""


@dataclass(frozen=True)
class Halts:
    """One point at a time, in processes that one raylet started."""

    directory: Path

    @property
    def environment(self) -> dict[str, str]:
        """For the nodes; goes before what Python is told anyway."""
        here = str(Path(__file__).parent / "save_points")
        told = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
        return {"PYTHONPATH": os.pathsep.join([here, *told]), "ORCT_SAVE_POINTS": str(self.directory)}

    def arm(self, point: str, raylet: int) -> None:
        self.directory.mkdir(exist_ok=True)
        for path in self.directory.iterdir():
            path.unlink()
        (self.directory / "new").write_text(str(raylet))
        (self.directory / "new").rename(self.directory / point)

    def reached(self, point: str) -> list[int]:
        """The processes that halted there, those that were killed too."""
        return [int(path.name.split(".")[1]) for path in self.directory.glob(f"{point}.*.reached")]

    def release(self, point: str) -> None:
        (self.directory / point).unlink()


@dataclass(frozen=True)
class Noted:
    """A run of `noted:steps`; each of its steps waits for a gate."""

    orc: Orc
    process: subprocess.Popen[str]
    journal: Path
    store: Store
    name: str
    ranks: int

    @property
    def run(self) -> str:
        return self.store.runs(search=self.name)[0].run

    @property
    def checkpoints(self) -> Path:
        return Path(self.store.run(self.run).directory) / "checkpoints"

    def open(self, step: int) -> None:
        (self.journal / f"gate-{step}").touch()

    def wait(self, what: Callable[[], object], why: str, seconds: float = 90) -> None:
        """As `wait_until`, but not longer than the run lives."""

        def asked() -> object:
            if (found := what()) or self.process.poll() is None:
                return found
            pytest.fail("".join(self.process.communicate()))

        wait_until(asked, seconds, why)

    def begun(self, attempt: int) -> list[tuple[int, int, str]]:
        """Process, step and digest of each rank when it had been given its state."""
        notes = [self.journal / f"begun-{attempt}-rank-{rank}" for rank in range(self.ranks)]
        self.wait(lambda: all(note.exists() for note in notes), f"attempt {attempt} has begun", 120)
        return [(int(pid), int(step), found) for pid, step, found in (note.read_text().split() for note in notes)]

    def saving(self, step: int, attempt: int) -> list[str]:
        """Digest of each rank when it was about to save."""
        return [
            (self.journal / f"saving-{step}-attempt-{attempt}-rank-{rank}").read_text() for rank in range(self.ranks)
        ]

    def newest(self) -> tuple[int, int]:
        """Step and attempt of what is loaded by who wants the latest. It is the newest that is committed, its bytes
        are right, and nothing that is no whole checkpoint looks like one."""
        storage = Storage(str(self.checkpoints))
        found = catalog.scan(storage)
        assert found.corrupt == ()
        assert [verify(storage.join(manifest.name), manifest) for manifest in found.committed] == [
            [] for _ in found.committed
        ]
        loaded = load_checkpoint(self.checkpoints)
        attempt = catalog.age_key(loaded.info.id.rpartition("/")[2])[0]
        assert digest(loaded.model, loaded.optimizer["state"]) == self.saving(loaded.step, attempt)[0]
        assert (loaded.step, loaded.skipped) == (max(manifest.step for manifest in found.committed), ())
        return loaded.step, attempt

    def is_settled(self, step: int) -> bool:
        """It is committed, and no writer has anything left to do, such as to delete older ones."""
        if not list(self.checkpoints.glob(f"step_{step:08d}-a*/MANIFEST.json")):
            return False
        for path in places.slabs(Path(self.orc.stack.slab_directory)).glob(f"*{SUFFIX}"):
            with contextlib.closing(SlabFile(path)) as slab:
                if any(slot.state is not State.free for slot in slab.slots):
                    return False
        return True

    def files(self, step: int, attempt: int) -> set[str]:
        """Of one checkpoint, those that have their names: what is half written is another file."""
        inside = self.checkpoints / f"step_{step:08d}-a{attempt}"
        found = [path for path in inside.rglob("*") if path.is_file() and not path.name.endswith(".partial")]
        return {str(path.relative_to(inside)) for path in found}

    def continued_from(self) -> list[str]:
        """Names of the checkpoints, all of them bit for bit."""
        events = [event for event in self.store.events(self.run) if event.kind == "resumed"]
        assert all(event.details["is_exact"] for event in events)
        return [event.details["checkpoint"].rpartition("/")[2] for event in events]

    def recorded(self) -> set[str]:
        """Names of the checkpoints that the record knows to be committed."""
        rows = self.store.checkpoints(self.run)
        return {row.uri.rpartition("/")[2] for row in rows if row.state == "committed"}

    def end(self) -> tuple[int, str]:
        out, err = self.process.communicate(timeout=150)
        return self.process.returncode, out + err

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        self.store.close()


def start_noted(orc: Orc, journal: Path, ranks: int, steps: int, *words: str) -> Noted:
    name = f"noted-{journal.name}"
    told = [
        f"run.name={name}",
        f"journal={journal}",
        "checkpoints=none",
        f"steps={steps}",
        f"resources.workers={ranks}",
    ]
    process = orc.start("run", "train=noted:steps", *told, *words)
    return Noted(orc, process, journal, orc.store(), name, ranks)


def assert_halted(run: Noted, point: str, step: int, attempt: int) -> None:
    """The save is where it was to be halted."""
    files, ranks = run.files(step, attempt), range(run.ranks)
    models = {f"model/model-{rank + 1:05d}-of-{run.ranks:05d}.safetensors" for rank in ranks}
    receipts = {f"rank-{rank:04d}.json" for rank in ranks}
    facts: tuple[object, ...] = {
        "seal": (len(files & receipts) < run.ranks,),
        "first-file": (not files,),
        "second-file": (files & models, not files & receipts, not any(path.startswith("optim/") for path in files)),
        "manifest": (receipts <= files, models <= files, "MANIFEST.json" not in files),
        "result": (receipts <= files, models <= files, "MANIFEST.json" in files),
    }[point]
    assert all(facts), (point, sorted(files))
