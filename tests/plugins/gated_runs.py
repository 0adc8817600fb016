"""Runs of `handing_over:steps` on Ray. Each step waits for a gate, so a test knows what is handed over and not written
yet.
"""

from __future__ import annotations

import json
import subprocess
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from orchestrator.checkpoints.local import places
from orchestrator.checkpoints.local.requests import ask
from orchestrator.checkpoints.slab import SUFFIX, SlabFile, State
from orchestrator.store.store import Store
from tests.plugins.runs import Orc, wait_until


def writer_processes(orc: Orc) -> list[psutil.Process]:
    """Those of this machine, by the lock that each holds."""
    members = str(places.members(Path(orc.stack.slab_directory)))
    found = [process for process in psutil.process_iter(["cmdline"]) if _is_writer(process)]
    return [process for process in found if any(file.path.startswith(members) for file in process.open_files())]


def _is_writer(process: psutil.Process) -> bool:
    return (process.info["cmdline"] or [""])[0].startswith("ray::CheckpointWriterProcess")


def writer(orc: Orc) -> dict[str, Any]:
    """What the node's writer says of itself."""
    return ask(places.request_socket(Path(orc.stack.slab_directory)), "describe", {}, 5.0)


def kill(pids: list[int]) -> None:
    doomed = [psutil.Process(pid) for pid in pids]
    for process in doomed:
        process.kill()
    assert psutil.wait_procs(doomed, timeout=10)[1] == []


def sealed(orc: Orc) -> int:
    """Slots that are handed over and not written."""
    count = 0
    for path in places.slabs(Path(orc.stack.slab_directory)).glob(f"*{SUFFIX}"):
        slab = SlabFile(path)
        count += len([slot for slot in slab.slots if slot.state is State.sealed])
        slab.close()
    return count


@dataclass(frozen=True)
class Gated:
    """A run of `handing_over:steps` with both ranks at a gate."""

    orc: Orc
    process: subprocess.Popen[str]
    journal: Path
    store: Store
    name: str

    @property
    def run(self) -> str:
        return self.store.runs(search=self.name)[0].run

    def open(self, step: int) -> None:
        (self.journal / f"gate-{step}").touch()

    def saved(self, step: int) -> list[tuple[int, str, str]]:
        """Process, state and name, by rank, once both ranks have saved at that step."""

        def told() -> list[list[str]]:
            if self.process.poll() is not None:
                pytest.fail("".join(self.process.communicate()))
            notes = [self.journal / f"saved-{step}-rank-{rank}" for rank in (0, 1)]
            return [note.read_text().split() for note in notes] if all(note.exists() for note in notes) else []

        return [(int(pid), state, name) for pid, state, name in wait_until(told, 120, f"both ranks saved at {step}")]

    def is_committed(self, name: str) -> bool:
        directory = Path(self.store.run(self.run).directory)
        return (directory / "checkpoints" / name / "MANIFEST.json").exists()

    def ray_snapshot(self, attempt: int) -> Path:
        """Ray Train's list of checkpoints, once there is one in it."""
        directory = self.orc.home / "ray" / "train" / f"{self.run}-attempt-{attempt}"
        (pointer,) = wait_until(lambda: list(directory.glob("checkpoint_*/pointer.json")), 60, "a pointer")
        snapshot = directory / "checkpoint_manager_snapshot.json"
        wait_until(lambda: snapshot.exists() and json.loads(snapshot.read_text())["checkpoint_results"], 30, "a list")
        told = json.loads(pointer.read_text())
        manifest = Path(told["uri"]) / "MANIFEST.json"
        assert json.loads(manifest.read_bytes())["step"] == told["step"]
        return snapshot

    def resumed(self) -> Gated:
        return replace(self, process=self.orc.start("resume", self.run))

    def continued_from(self) -> list[str]:
        """Names of the checkpoints, all of them bit for bit."""
        events = [event for event in self.store.events(self.run) if event.kind == "resumed"]
        assert all(event.details["is_exact"] for event in events)
        return [event.details["checkpoint"].rpartition("/")[2] for event in events]

    def recorded(self) -> list[int]:
        """Steps of the checkpoints that the record knows to be committed."""
        rows = self.store.checkpoints(self.run)
        return sorted(row.step or 0 for row in rows if row.state == "committed")

    def end(self) -> tuple[int, str]:
        out, err = self.process.communicate(timeout=150)
        return self.process.returncode, out + err


def start_gated(orc: Orc, journal: Path, *words: str) -> Gated:
    """Four steps on two ranks; nothing is saved but by the function itself."""
    name = f"gated-{journal.name}"
    told = ["train=handing_over:steps", f"run.name={name}", f"journal={journal}", "checkpoints=none", "steps=4"]
    return Gated(orc, orc.start("run", *told, *words), journal, orc.store(), name)


def end_gated(run: Gated) -> None:
    if run.process.poll() is None:
        run.process.kill()
        run.process.wait()
    run.store.close()
