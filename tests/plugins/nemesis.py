"""Breaks everything at random under a training job and a sweep, and compares what they come to.

    python -m tests.plugins.nemesis --seconds 1800 [--seed N] [--only kill,freeze] [--replay FILE]

On a stack of its own a digits job with two workers and an ASHA sweep on one lane go on, each followed by the next one
with the same seeds, while one fault after another is drawn from one generator. The whole plan follows from the seed
(printed first) and from what is there to be broken; it names targets, not processes. Every fault is written into a
journal with the proof that it happened, and `--replay` of that file does the same again. A driver that is gone is
followed by `orc resume` or `orc sweep resume`, as its user would. At the end everything is left in peace: the job is
FINISHED with the weights of an undisturbed one, bit for bit, the sweep's table is the undisturbed one, `orc fsck` finds
nothing wrong, no process and no slab is left. Exit code 1 otherwise.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import functools
import importlib.util
import itertools
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil

from cluster import ray_head
from orchestrator.checkpoints.load import load_checkpoint
from orchestrator.checkpoints.local import places
from orchestrator.errors import NotFound
from orchestrator.status import RunStatus
from orchestrator.store.names import run_id
from tests.plugins.own_stack import OwnStack
from tests.plugins.ray_nodes import RayNode
from tests.plugins.runs import PROJECT, Orc, wait_until
from tests.plugins.sweep_campaign import Table, table_of
from tools.bench.failures import subject

ROOT = Path(__file__).resolve().parents[2]
LONGEST = 600.0
"""Seconds in which job and sweep must have come to their ends when nothing is broken any more."""
PATIENCE = 120.0
"""Seconds in which a target must be there; a worker is not while its attempt is being started."""
RETRY = 3.0
"""Seconds between two tries to bring a driver back: a run looks active until its lease is over."""

SERVICES = {
    "tracker": "ray::TrackerProcess", "mirror": "ray::MirrorProcess", "agent": "ray::NodeProcess",
    "writer": "ray::CheckpointWriterProcess", "desk": "ray::LaneDesk",
}  # fmt: skip
"""Ours on Ray, by the beginning of their processes' titles."""
LOCAL = {"tracker": "orchestrator.tracking.local.process", "writer": "orchestrator.checkpoints.local.process"}
"""Ours without Ray, by what their command lines have."""
STACK = ("ray.num_cpus=2",)
LOCAL_STACK = ("ray.enabled=false", "mlflow.enabled=false", "api.enabled=false")
NOT_LOCAL = ("agent", "desk", "mirror", "mlflow")
JOB = {"worker": 4, "driver": 2}
SWEEP = {"trial": 3, "sweep driver": 2}
KILLED = {**JOB, **SWEEP, "tracker": 2, "mirror": 1, "agent": 2, "writer": 2, "desk": 1, "backend": 1}
FROZEN = {**JOB, **SWEEP, "tracker": 2, "mirror": 1, "agent": 2, "writer": 2, "redis": 1, "mlflow": 1}
JOB_AND_SWEEP_DRIVERS = {"driver": 1, "sweep driver": 1}
RESTARTED = {"postgres": 2, "redis": 1, "mlflow": 1}
TARGETS: Mapping[str, Mapping[str, int]] = {
    "kill": KILLED, "freeze": FROZEN, "restart": RESTARTED, "node": {"second node": 1},
    "partition": {"second node": 1}, "gcs": {"gcs": 1}, "disk": {"runs": 2, "spools": 1, "wal": 1},
    "clock": JOB_AND_SWEEP_DRIVERS,
}  # fmt: skip
"""What can be done to whom, and how often against the others."""
KINDS = {"kill": 10, "freeze": 6, "restart": 3, "node": 1, "partition": 1, "gcs": 1, "disk": 3, "clock": 1}
LASTING = {
    "freeze": (1.0, 20.0), "restart": (0.0, 5.0), "node": (5.0, 20.0), "partition": (5.0, 40.0), "gcs": (0.0, 5.0),
    "disk": (5.0, 20.0),
}  # fmt: skip
"""Seconds that a fault lasts, by lot; the others are over at once."""
SMALL_DISKS = {"runs": "1g", "spools": "192m", "wal": "192m"}
"""So small that they are full in a moment, so large that half an hour's runs do not fill them."""
DISK_IS_SHARED = "failures.patterns=[{match: 'No space left on device', kind: service}]"
"""Of a user whose disk is full now and then: by default such a failure is not restarted."""
SKEWS = ("-1d", "+1d")


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """One thing that is done. It follows from the seed alone."""

    at: float
    """Seconds from the begin."""
    kind: str
    target: str
    seconds: float
    """How long it lasts."""
    draw: float
    """From 0 to 1: which one of several."""


def planned(
    by_lot: random.Random, seconds: float, kinds: Sequence[str] = tuple(KINDS), *, pause: tuple[float, float] = (4, 14),
    longest: float = 20.0, absent: Collection[str] = (),
) -> tuple[Fault, ...]:  # fmt: skip
    """Faults for so long, none of which is at the same target before the one before it there is over, or at one of
    `absent`."""
    found: list[Fault] = []
    over: dict[str, float] = {}
    at = by_lot.uniform(*pause) / 2
    while at < seconds:
        (kind,) = by_lot.choices(kinds, [KINDS[kind] for kind in kinds])
        there = {name: weight for name, weight in TARGETS[kind].items() if name not in absent}
        (target,) = by_lot.choices(list(there), list(there.values()))
        low, high = LASTING.get(kind, (0.0, 0.0))
        lasts = min(by_lot.uniform(low, high), longest)
        fault = Fault(at=round(at, 2), kind=kind, target=target, seconds=round(lasts, 2), draw=by_lot.random())
        at += by_lot.uniform(*pause)
        if fault.at >= over.get(target, 0.0):
            over[target] = fault.at + lasts
            found.append(fault)
    return tuple(found)


class Journal:
    """What was meant, what was done and what proves it: a line each, as JSON."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path, self._began = path, time.monotonic()
        self._file = path.open("w", buffering=1)

    def write(self, what: str, **more: Any) -> None:
        line = {"t": round(time.monotonic() - self._began, 2), "what": what, **more}
        self._file.write(json.dumps(line, default=str) + "\n")

    def close(self) -> None:
        self._file.close()


def faults_of(path: Path) -> tuple[int, tuple[Fault, ...]]:
    """Seed and plan of a journal."""
    first = json.loads(path.read_text().splitlines()[0])
    return first["seed"], tuple(Fault(**each) for each in first["plan"])


# -- what goes on meanwhile --------------------------------------------------------------------------------------------


class Kept:
    """Somebody's command that is started again, in the words that go on with it, whenever it has gone."""

    def __init__(self, orc: Orc, directory: Path, journal: Journal, name: str) -> None:
        self.orc, self.directory, self.journal, self.name = orc, directory, journal, name
        self.run = ""
        self.runs: list[str] = []
        """All that were begun."""
        self.process: subprocess.Popen[bytes] | None = None
        self.brought_back = 0
        self.gave_up: list[str] = []
        """Last words of drivers that ended by themselves before the work was done."""
        self.skew: dict[str, str] = {}
        """Of the clock of the next driver: its environment besides."""
        self._next = 0.0

    def begin(self) -> None:
        self.run = run_id(time.time())
        self.runs.append(self.run)
        self._marks().mkdir(parents=True)
        self.journal.write("begins", name=self.name, run=self.run)
        self._start(*self.words())

    def words(self) -> list[str]:
        raise NotImplementedError

    def again(self) -> list[str]:
        raise NotImplementedError

    def is_over(self) -> bool:
        """Whether it has come to its end. Brings it back where nobody is at it."""
        assert self.process is not None
        code = self.process.poll()
        if code is None:
            return False
        if code == 0 or self._status() is RunStatus.finished:
            return True
        if time.monotonic() < self._next:
            return False
        try:
            with contextlib.closing(self.orc.store()) as store:
                store.run(self.run)
        except NotFound:  # it was killed before anybody had heard of it
            self._again(self.words())
            return False
        except Exception:
            self.journal.write("unknown", name=self.name)  # the database is what is broken just now
        if code not in (-signal.SIGKILL, 2):  # killed by us; refused, as while its lease runs
            self.gave_up.append(f"{self.name}: driver ended with {code}: {self._said(1_500)}")
            self.journal.write("ended", name=self.name, code=code, said=self._said(20_000))
        self._again(self.again())
        return False

    def end(self) -> None:
        """If it goes on, not gently."""
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait()

    def _again(self, words: Sequence[str]) -> None:
        self._next = time.monotonic() + RETRY
        self.brought_back += 1
        self._start(*words)

    def _start(self, *words: str) -> None:
        paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
        environment = {**self.orc.own.environment, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths, **self.skew}
        self.skew = {}
        with (self._marks() / "driver.log").open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "orchestrator.cli.main", *words], cwd=PROJECT, env=environment,
                stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            )  # fmt: skip

    def _status(self) -> RunStatus | None:
        """None while the database is away."""
        with contextlib.suppress(Exception), contextlib.closing(self.orc.store()) as store:
            return store.run(self.run).status
        return None

    def _said(self, most: int) -> str:
        """The end of it. A process that Ray's core aborts says why in front of thousands of characters of its stack."""
        return (self._marks() / "driver.log").read_text(errors="replace")[-most:]

    def _marks(self) -> Path:
        return self.directory / self.run

    def driver(self) -> list[psutil.Process]:
        assert self.process is not None
        with contextlib.suppress(psutil.NoSuchProcess):
            return [psutil.Process(self.process.pid)] if self.process.poll() is None else []
        return []

    def workers(self) -> list[psutil.Process]:
        """Those that have said they train, and live."""
        found = {}
        for line in subject.began(self._marks()):
            with contextlib.suppress(psutil.Error):
                process = psutil.Process(line["pid"])
                if process.create_time() <= line["at"] and process.status() != psutil.STATUS_ZOMBIE:
                    found[process.pid] = process
        return list(found.values())


class DigitsJob(Kept):
    """The digits training, with a pause in each step so that it lasts."""

    def __init__(self, *args: Any, epochs: int, pause: float, options: Sequence[str] = ()) -> None:
        super().__init__(*args)
        self.epochs, self.pause, self.options = epochs, pause, options

    def words(self) -> list[str]:
        return [
            "run", *self.options, f"--run-id={self.run}", "train=tools.bench.failures.subject:digits",
            f"journal={self._marks()}", f"epochs={self.epochs}", f"pause={self.pause}", "run.experiment=nemesis",
            "run.seed=5", "resources.workers=2", "resources.cpus_per_worker=0.5", "checkpoints.every_epochs=0",
            f"checkpoints.every_minutes={2 / 60}", "failures.max_restarts=-1", "failures.max_repeats=0",
            "failures.max_fruitless=0", DISK_IS_SHARED,
        ]  # fmt: skip

    def again(self) -> list[str]:
        return ["resume", *self.options, self.run]

    def weights(self) -> dict[str, Any]:
        loaded = load_checkpoint(self.run, home=self.orc.home)
        return {"step": loaded.step, **loaded.model}

    def problems(self, expected: Mapping[str, Any]) -> list[str]:
        import torch

        with contextlib.closing(self.orc.store()) as store:
            status = store.run(self.run).status
            points = store.points(self.run, "train/loss", rank=0)
        found = self.weights()
        wrong = [] if status is RunStatus.finished else [f"{self.run} is {status.value}"]
        if found["step"] != expected["step"]:
            wrong.append(f"{self.run} ended at step {found['step']}, not {expected['step']}")
        for name, value in expected.items():
            if isinstance(value, torch.Tensor) and not torch.equal(value, found[name]):
                wrong.append(f"{self.run}: {name} differs by up to {(value - found[name]).abs().max().item():g}")
        if missing := set(range(1, expected["step"] + 1)) - {int(step) for step in points.steps}:
            wrong.append(f"{self.run}: no loss of {len(missing)} steps, the first of them {min(missing)}")
        return wrong


class AshaSweep(Kept):
    """Trials whose score tells how many steps they really made."""

    MILESTONES = 9

    def __init__(self, *args: Any, trials: int, pause: float, options: Sequence[str] = ()) -> None:
        super().__init__(*args)
        self.trials, self.pause, self.options = trials, pause, options

    def words(self) -> list[str]:
        return [
            "sweep", *self.options, f"--run-id={self.run}", "train=searched:train", "lr=loguniform(1e-3,1.0)",
            "width=choice(4,8,16)", f"epochs={self.MILESTONES}", f"pause={self.pause}", f"journal={self._marks()}",
            f"sweep.samples={self.trials}", "sweep.scheduler=asha", "sweep.concurrency=1",
            "sweep.objective=[loss:min]", "sweep.restarts=50", "resources.workers=1", "resources.cpus_per_worker=0.5",
            "failures.max_repeats=0", "failures.max_fruitless=0", DISK_IS_SHARED,
        ]  # fmt: skip

    def again(self) -> list[str]:
        return ["sweep", "resume", *self.options, self.run]

    def table(self) -> Table:
        with contextlib.closing(self.orc.store()) as store:
            return table_of(store, self.run)

    def problems(self, expected: Table) -> list[str]:
        found = self.table()
        wrong = [f"{self.run}: {a} became {b}" for a, b in zip(expected, found, strict=False) if a != b]
        if len(found) != len(expected):
            wrong.append(f"{self.run}: {len(found)} trials, not {len(expected)}")
        try:
            self.orc("sweep", "verify", self.run)
        except AssertionError as error:
            wrong.append(f"{self.run}: {error}")
        return wrong


# -- what breaks it ----------------------------------------------------------------------------------------------------


class World:
    """The stack, and whatever in it can be broken."""

    def __init__(
        self, orc: Orc, job: DigitsJob, sweep: AshaSweep, journal: Journal, second: SecondNode | None = None
    ) -> None:
        self.orc, self.job, self.sweep, self.journal, self.second = orc, job, sweep, journal, second
        self.landed: Counter[str] = Counter()
        self.missed: Counter[str] = Counter()
        self._going: list[tuple[float, Fault, Callable[[], None]]] = []
        """Until when, what, and how it is ended."""
        self._up: subprocess.Popen[bytes] | None = None
        self._wants_up = False

    def held(self) -> set[str]:
        return {fault.target for _, fault, _ in self._going}

    def found(self, target: str) -> list[psutil.Process]:
        """The processes of that name that live."""
        if target in ("worker", "driver"):
            return self.job.workers() if target == "worker" else self.job.driver()
        if target in ("trial", "sweep driver"):
            return self.sweep.workers() if target == "trial" else self.sweep.driver()
        if target in SERVICES and self.orc.stack.ray_address:
            return self._titled(SERVICES[target])
        if target in SERVICES:
            return [each for each in processes_of(str(self.orc.home)) if LOCAL.get(target, "-") in each.cmdline()]
        if target == "backend":  # of the database, of those that serve a client
            return [each for each in _children(self._recorded("postgres")) if "postgres: orc" in _title(each)]
        if target == "gcs":
            return [each for each in ray_head.parts(self.orc.home) if _name(each) == "gcs_server"]
        return self._recorded(target)

    def _titled(self, title: str) -> list[psutil.Process]:
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):
                is_ours = _title(process).startswith(title) and process.environ().get("ORC_HOME") == str(self.orc.home)
                if is_ours and _is_alive(process):
                    found.append(process)
        return found

    def _recorded(self, service: str) -> list[psutil.Process]:
        entry = self.orc.stack.processes.get(service) or {}
        with contextlib.suppress(psutil.Error):
            process = psutil.Process(int(entry.get("pid", -1)))
            if _is_alive(process) and abs(process.create_time() - float(entry["started"])) < 1:
                return [process]
        return []

    # -- doing

    def do(self, fault: Fault) -> bool:
        """Whether it landed; that is proved then."""
        if fault.kind in ("node", "partition", "disk"):
            proof = getattr(self, f"_{fault.kind}")(fault)
        else:
            there = sorted(self.found(fault.target), key=lambda process: process.pid)
            proof = there and getattr(self, f"_{fault.kind}")(fault, there[int(fault.draw * len(there))])
        if proof:
            self.landed[f"{fault.kind} {fault.target}"] += 1
            self.journal.write("done", fault=asdict(fault), proof=proof)
        return bool(proof)

    def _kill(self, fault: Fault, victim: psutil.Process) -> str:
        with contextlib.suppress(psutil.NoSuchProcess):
            victim.kill()
            for process in (self.job.process, self.sweep.process):
                if process is not None and process.pid == victim.pid:
                    return f"{victim.pid} ended with {process.wait(20)}"
            _wait_for_the_end(victim)
            return f"{victim.pid} is gone"
        return ""

    def _freeze(self, fault: Fault, victim: psutil.Process) -> str:
        with contextlib.suppress(psutil.NoSuchProcess):
            victim.send_signal(signal.SIGSTOP)
            deadline = time.monotonic() + 5
            while (state := victim.status()) != psutil.STATUS_STOPPED and time.monotonic() < deadline:
                time.sleep(0.005)
            self._until(fault, lambda: _continue(victim))
            return f"{victim.pid} is {state}" if state == psutil.STATUS_STOPPED else ""
        return ""

    def _restart(self, fault: Fault, victim: psutil.Process) -> str:
        # PostgreSQL's immediate shutdown, which leaves its log to be replayed; the others have no such thing.
        victim.send_signal(signal.SIGQUIT if fault.target == "postgres" else signal.SIGKILL)
        _wait_for_the_end(victim)
        self._until(fault, self._want_up)
        return f"{victim.pid} is gone"

    def _gcs(self, fault: Fault, victim: psutil.Process) -> str:
        """Ray's control store, with its tables on disk. `orc up` starts it again under what runs."""
        return self._restart(fault, victim)

    def _clock(self, fault: Fault, victim: psutil.Process) -> str:
        """Its next driver's clock is a day off."""
        skew = SKEWS[int(fault.draw * len(SKEWS))]
        environment = {"LD_PRELOAD": faketime(), "FAKETIME": skew, "DONT_FAKE_MONOTONIC": "1"}
        command = [sys.executable, "-S", "-c", "import time; print(time.time())"]
        told = subprocess.run(
            command, env={**os.environ, **environment}, check=True, capture_output=True, text=True
        ).stdout
        (self.job if fault.target == "driver" else self.sweep).skew = environment
        gone = self._kill(fault, victim)
        return f"{gone}; for the next one it is {(float(told) - time.time()) / 3600:.1f} h later" if gone else ""

    def _node(self, fault: Fault) -> str:
        if self.second is None or not self.second.is_alive:
            return ""
        killed = self.second.lose()
        self._until(fault, self.second.start)
        return f"{len(killed)} processes of {self.second.node.address} are gone"

    def _partition(self, fault: Fault) -> str:
        """Nobody reaches the node's servers any more. It still reaches the others: a one-way partition."""
        if (second := self.second) is None or not second.is_alive:
            return ""
        address = second.node.address
        route = [f"{address}/32", "table", "local"]
        subprocess.run(["ip", "route", "add", "blackhole", *route], check=True)

        def heal() -> None:
            subprocess.run(["ip", "route", "del", "blackhole", *route], check=True)
            second.start_if_dead()

        self._until(fault, heal)
        try:
            socket.create_connection((address, 1), timeout=1).close()
        except ConnectionRefusedError:
            return ""  # it was reached
        except OSError as error:
            return f"{address}: {error}"
        return ""

    def _disk(self, fault: Fault) -> str:
        """All that is left of the disk is taken by a file."""
        filler = self.orc.home / fault.target / "filler"

        def room() -> None:
            filler.unlink()

        self._until(fault, room)
        with filler.open("wb", buffering=0) as file:
            try:
                while True:
                    file.write(bytes(1 << 16))
            except OSError as error:
                if error.errno == errno.ENOSPC:
                    return f"{error}, with {file.tell()} bytes in {filler}"
                raise

    def _until(self, fault: Fault, undo: Callable[[], None]) -> None:
        self._going.append((time.monotonic() + fault.seconds, fault, undo))

    def _want_up(self) -> None:
        self._wants_up = True

    # -- undoing

    def tend(self, now: float) -> None:
        """Ends the faults whose time is over, and has `orc up` bring back what does not come by itself."""
        for entry in [each for each in self._going if each[0] <= now]:
            self._going.remove(entry)
            entry[2]()
            self.journal.write("over", kind=entry[1].kind, target=entry[1].target)
        if self._up is not None and self._up.poll() is not None:
            self.journal.write("up", code=self._up.returncode)
            self._wants_up |= self._up.returncode != 0
            if self._up.returncode == 0 and self.second is not None and "second node" not in self.held():
                self.second.start_if_dead()  # where the head had to be replaced, its nodes went with it
            self._up = None
        if self._wants_up and self._up is None:
            self._wants_up = False
            command = [sys.executable, "-m", "orchestrator.cli.main", "up"]
            with (self.job.directory / "up.log").open("ab") as log:
                self._up = subprocess.Popen(
                    command, env=self.orc.own.environment, cwd=PROJECT, stdin=subprocess.DEVNULL, stdout=log, stderr=log
                )

    def close(self) -> None:
        """Nothing stays frozen, full or out of reach, whatever happened."""
        for _, _, undo in self._going:
            undo()
        self._going.clear()
        if self._up is not None:
            self._up.wait(300)

    def in_peace(self) -> bool:
        return not self._going and self._up is None and not self._wants_up


class SecondNode:
    """A node of the stack's own Ray, with an address of its own on this machine. It may be lost and replaced."""

    def __init__(self, orc: Orc, directory: Path, cpus: int = 2) -> None:
        self._orc, self._directory, self._cpus = orc, directory, cpus
        self._addresses = (f"127.0.0.{number}" for number in itertools.count(3))
        self.node = RayNode(id="", address="", raylet=-1)
        self._process: psutil.Popen | None = None

    @property
    def is_alive(self) -> bool:
        return self.node.raylet > 0 and self.node.is_alive

    def start(self) -> None:
        """Returns when it has a raylet; Ray knows it a moment later."""
        self.stop()
        stack, address = self._orc.stack, next(self._addresses)
        told = {**self._orc.own.environment, **stack.client_environment(), "OMP_NUM_THREADS": "1"}
        told.pop("RAY_ADDRESS")
        # `ray start` would refuse to add a node; the address is no 127.0.0.1, so it stays what it is here, too.
        told["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "1"
        command = [
            sys.executable, "-P", "-m", "ray.scripts.scripts", "start", "--block", "--address", stack.ray_address,
            "--node-ip-address", address, "--num-cpus", str(self._cpus), "--object-store-memory", str(150 << 20),
            "--min-worker-port", "0", "--max-worker-port", "0", "--disable-usage-stats",
        ]  # fmt: skip
        with (self._directory / "second-node.log").open("ab") as log:
            self._process = psutil.Popen(
                command, env=told, cwd=self._directory, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        raylet = wait_until(lambda: self._raylet(), 120, "a second raylet")
        self.node = RayNode(id="", address=address, raylet=raylet)

    def _raylet(self) -> int:
        assert self._process is not None
        with contextlib.suppress(psutil.Error):
            named = [each.pid for each in self._process.children(recursive=True) if each.name() == "raylet"]
            return named[0] if named else 0
        return 0

    def lose(self) -> list[psutil.Process]:
        """As when the machine loses power. Returns what was killed."""
        return self.stop()

    def start_if_dead(self) -> None:
        """Ray may not have noticed, and then it goes on."""
        if not self.is_alive:
            self.start()

    def stop(self) -> list[psutil.Process]:
        if self._process is None:
            return []
        doomed = [self._process]
        with contextlib.suppress(psutil.Error):
            doomed += self._process.children(recursive=True)
        for process in doomed:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self._process.wait(20)
        for process in doomed[1:]:
            _wait_for_the_end(process)
        return doomed


def faketime() -> str:
    """The library that shifts a process's clock; "" where there is none."""
    spec = importlib.util.find_spec("libfaketime")
    inside = Path(spec.origin).parent.glob("vendor/libfaketime/src/libfaketime.so.1") if spec and spec.origin else ()
    found = [*inside, *Path("/usr/lib").glob("*/faketime/libfaketime.so.1")]
    return str(found[0]) if found else ""


def apart() -> None:
    """This program again, where mounts and routes are its own and loopback is the only network."""
    if os.environ.get("ORCT_APART"):
        return
    os.environ["ORCT_APART"] = "1"
    inside = ["sh", "-c", 'ip link set lo up && exec "$@"', "sh", sys.executable, "-m", "tests.plugins.nemesis"]
    os.execvp("unshare", ["unshare", "--net", "--mount", "--propagation", "private", *inside, *sys.argv[1:]])


def impossible(is_local: bool) -> dict[str, str]:
    """Kinds of faults that cannot be had here, and why."""
    found = {} if faketime() else {"clock": "it needs libfaketime: pip install libfaketime"}
    if os.geteuid() != 0 or not shutil.which("unshare") or not shutil.which("ip"):
        needs = "it needs root, unshare and ip"
        found |= {"partition": needs, "disk": needs}
    if is_local:
        found |= dict.fromkeys(("node", "partition", "gcs"), "there are no nodes without Ray")
    return found


def _children(processes: Sequence[psutil.Process]) -> list[psutil.Process]:
    with contextlib.suppress(psutil.Error):
        return [child for process in processes for child in process.children(recursive=True)]
    return []


def _title(process: psutil.Process) -> str:
    with contextlib.suppress(psutil.Error):
        return (process.cmdline() or [""])[0]
    return ""


def _name(process: psutil.Process) -> str:
    with contextlib.suppress(psutil.Error):
        return process.name()
    return ""


def _is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _wait_for_the_end(process: psutil.Process, seconds: float = 20.0) -> None:
    """Whether somebody has asked how it ended is the same."""
    deadline = time.monotonic() + seconds
    while _is_alive(process):
        assert time.monotonic() < deadline, f"{process} does not end"
        time.sleep(0.01)


def _continue(process: psutil.Process) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        process.send_signal(signal.SIGCONT)


# -- the whole ---------------------------------------------------------------------------------------------------------


@dataclass
class Nemesis:
    """A job and a sweep on a stack, `plan` against them, and what became of all that."""

    orc: Orc
    directory: Path
    journal: Journal
    epochs: int = 15
    trials: int = 9
    pause: float = 0.1
    """Seconds that a step of the job takes besides."""
    trial_pause: float = 0.15
    options: tuple[str, ...] = ()
    """Of `orc run`, `orc sweep` and their likes: --local for a stack without Ray."""
    second: SecondNode | None = None
    say: Callable[[str], None] = print
    problems: list[str] = field(default_factory=list)
    jobs: int = 0
    sweeps: int = 0

    def __post_init__(self) -> None:
        self.job = self._job(self.directory / "jobs", self.pause, self.options)
        self.sweep = self._sweep(self.directory / "sweeps", self.trial_pause, self.options)
        self.world = World(self.orc, self.job, self.sweep, self.journal, self.second)

    def _job(self, directory: Path, pause: float, options: Sequence[str]) -> DigitsJob:
        told = (self.orc, directory, self.journal, "job")
        return DigitsJob(*told, epochs=self.epochs, pause=pause, options=options)

    def _sweep(self, directory: Path, pause: float, options: Sequence[str]) -> AshaSweep:
        told = (self.orc, directory, self.journal, "sweep")
        return AshaSweep(*told, trials=self.trials, pause=pause, options=options)

    def undisturbed(self) -> tuple[dict[str, Any], Table]:
        """Weights and table of a job and a sweep that nobody breaks anything of, both at once, without a pause, and
        without Ray, which takes longer and comes to the same."""
        job, sweep = (make(self.directory / "calm", 0.0, ("--local",)) for make in (self._job, self._sweep))
        for each in (job, sweep):
            each.begin()
        deadline = time.monotonic() + LONGEST
        try:
            while not all([job.is_over(), sweep.is_over()]):
                assert time.monotonic() < deadline, "the undisturbed ones take too long"
                assert not job.brought_back + sweep.brought_back, f"undisturbed, and {job.gave_up} {sweep.gave_up}"
                time.sleep(0.1)
            return job.weights(), sweep.table()
        finally:
            job.end()
            sweep.end()

    def go(self, plan: Sequence[Fault], seconds: float, expected: tuple[dict[str, Any], Table]) -> None:
        """Carries the plan out, for `seconds` if that is not 0, and waits for the end of job and sweep. Those that end
        before are followed by the next ones."""
        begun = time.monotonic()
        for each in (self.job, self.sweep):
            each.begin()
        waiting, late = list(plan), 0.0
        over = {"job": False, "sweep": False}
        deadline = begun + seconds + LONGEST
        while True:
            now = time.monotonic()
            is_time_left = now - begun < seconds if seconds else bool(waiting)
            self.world.tend(now)
            self._look("job", over, is_time_left, lambda: self.job.problems(expected[0]))
            self._look("sweep", over, is_time_left, lambda: self.sweep.problems(expected[1]))
            if all(over.values()) and not waiting and self.world.in_peace():
                return
            # The plan's clock stands still while it waits for a target, so that a slow machine gets no two at once.
            if waiting and waiting[0].at <= now - begun - late and self._try(waiting, now - begun, late):
                late = max(now - begun - waiting.pop(0).at, late)
            if seconds and not is_time_left:
                waiting.clear()
            if now > deadline:
                self.problems.append(f"not at the end {LONGEST:.0f} s after the last fault: {over}")
                return
            time.sleep(0.05)

    def _try(self, waiting: Sequence[Fault], now: float, late: float) -> bool:
        """The next fault, if its target is there and left alone by the others. Whether that is done with."""
        fault = waiting[0]
        if fault.target not in self.world.held() and self.world.do(fault):
            self.say(f"[{now:6.1f} s] {fault.kind} {fault.target}" + (f" {fault.seconds:.1f} s" * bool(fault.seconds)))
            return True
        if now - late - fault.at < PATIENCE:
            return False
        self.world.missed[f"{fault.kind} {fault.target}"] += 1
        self.journal.write("missed", fault=asdict(fault))
        return True

    def _look(self, name: str, over: dict[str, bool], is_time_left: bool, judge: Callable[[], list[str]]) -> None:
        kept: Kept = getattr(self, name)
        if over[name] or not kept.is_over():
            return
        # Judged when the database answers: it may be what is broken just now.
        if kept._status() is None or not self.world.in_peace():
            return
        found = judge()
        self.problems += [f"{name} {problem}" for problem in found]
        self.journal.write("judged", name=name, run=kept.run, problems=found)
        self.say(f"{name} {kept.run} has ended: {'; '.join(found) or 'as the undisturbed one'}")
        setattr(self, f"{name}s", getattr(self, f"{name}s") + 1)
        if is_time_left:
            kept.begin()
        else:
            over[name] = True

    def after(self) -> None:
        """Once all is over: the record is sound, nothing of the runs lives, and no memory of theirs is left."""
        try:
            self.orc("fsck")
        except AssertionError as error:
            self.problems.append(str(error))
        left = [*self.job.workers(), *self.sweep.driver(), *self.job.driver()]
        self.problems += [f"{process} is left" for process in left]

    def close(self) -> None:
        self.world.close()
        self.job.end()
        self.sweep.end()

    def report(self, seed: int, seconds: float) -> str:
        landed = ", ".join(f"{count} × {what}" for what, count in sorted(self.world.landed.items()))
        missed = ", ".join(f"{count} × {what}" for what, count in sorted(self.world.missed.items()))
        back = self.job.brought_back + self.sweep.brought_back
        verdict = "\n".join(("BROKEN", *self.problems[:20])) if self.problems else "nothing differs"
        words = [
            f"seed {seed}: {self.world.landed.total()} faults landed ({landed})",
            f"{self.jobs} jobs and {self.sweeps} sweeps ended, drivers were brought back {back} times",
        ]
        words += [f"not there to be broken: {missed}"] if missed else []
        return "; ".join([*words, verdict, f"{seconds:.0f} s"])


def slabs_left(directory: str) -> list[Path]:
    """Memory of checkpoints that nobody removed with the stack."""
    found = Path(directory)
    return sorted(places.slabs(found).glob("*")) if found.is_dir() else []


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.plugins.nemesis", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--seconds", type=float, default=1800.0, help="0: the whole plan of --replay, however long")
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--only", default=",".join(KINDS), help="kinds of faults")
    parser.add_argument("--replay", type=Path, default=None, help="a journal: its seed and its faults")
    parser.add_argument("--journal", type=Path, default=None, help="default: build/chaos/nemesis-SEED.jsonl")
    parser.add_argument("--local", action="store_true", help="without Ray")
    parser.add_argument("--keep", action="store_true", help="leave the data for whoever looks into a failure")
    given = parser.parse_args(argv)
    left_out = impossible(given.local)
    if argv is None and "disk" not in left_out:
        apart()
    if given.replay:
        seed, plan = faults_of(given.replay)
    else:
        seed = random.SystemRandom().randrange(1 << 32) if given.seed is None else given.seed
        kinds = [kind for kind in given.only.split(",") if kind not in left_out]
        plan = planned(random.Random(seed), given.seconds, kinds, absent=NOT_LOCAL if given.local else ())
    print(f"seed {seed}", flush=True)
    for kind, why in left_out.items():
        print(f"NOT DONE: {kind}: {why}", flush=True)
    path = given.journal or ROOT / "build" / "chaos" / f"nemesis-{seed}.jsonl"
    journal = Journal(path)
    journal.write("plan", seed=seed, seconds=given.seconds, plan=[asdict(fault) for fault in plan])
    begun = time.monotonic()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # whatever was started is stopped then, too
    try:
        nemesis = _fought(given, plan, journal, "disk" not in left_out)
    finally:
        journal.close()
    print(nemesis.report(seed, time.monotonic() - begun), flush=True)
    print(f"journal: {path}", flush=True)
    return 1 if nemesis.problems else 0


def _fought(given: argparse.Namespace, plan: Sequence[Fault], journal: Journal, has_disks: bool) -> Nemesis:
    """The whole, on a stack that is there for it alone."""
    with contextlib.ExitStack() as ending:
        directory = Path(tempfile.mkdtemp(prefix="orct-"))
        directory.chmod(0o711)
        if not given.keep:
            ending.callback(shutil.rmtree, directory, ignore_errors=True)
        with own_stack(given.keep) as own:
            if has_disks:
                mount_disks(own.home)
                ending.callback(unmount_disks, own, is_kept=given.keep)  # what is mounted there cannot be removed
            own.orc("up", *(LOCAL_STACK if given.local else STACK), timeout=400)
            orc = Orc(own)
            slabs, home = orc.stack.slab_directory, str(own.home)
            second = None
            if not given.local:
                second = SecondNode(orc, directory)
                ending.callback(second.stop)
                second.start()
            options = ("--local",) if given.local else ()
            said = functools.partial(print, flush=True)
            nemesis = Nemesis(orc, directory, journal, options=options, second=second, say=said)
            with contextlib.closing(nemesis):
                nemesis.go(plan, given.seconds, nemesis.undisturbed())
                nemesis.after()
            if second is not None:
                second.stop()
    nemesis.problems += [f"{process} is left" for process in processes_of(home)]
    nemesis.problems += [f"{slab} is left" for slab in slabs_left(slabs)]
    return nemesis


def unmount_disks(own: OwnStack, *, is_kept: bool) -> None:
    """What is on them goes with them, unless somebody wants to look into it."""
    for name in TARGETS["disk"]:
        if is_kept:
            shutil.copytree(own.home / name, own.home / f"{name}-kept", ignore_dangling_symlinks=True)
        subprocess.run(["umount", "--lazy", str(own.home / name)], check=False, timeout=10)
    if not is_kept:
        shutil.rmtree(own.directory, ignore_errors=True)


def mount_disks(home: Path) -> None:
    """Small ones, for what job and services write."""
    home.mkdir(mode=0o711, exist_ok=True)
    for name in TARGETS["disk"]:
        (home / name).mkdir(exist_ok=True)
        command = ["mount", "-t", "tmpfs", "-o", f"size={SMALL_DISKS[name]}", "none", str(home / name)]
        subprocess.run(command, check=True, timeout=10)


@contextlib.contextmanager
def own_stack(keep: bool) -> Iterator[OwnStack]:
    own = OwnStack()
    if not keep:
        with own:
            yield own
        return
    print(f"the stack's data: {own.home}", flush=True)
    try:
        yield own
    finally:
        own.orc("down")


def processes_of(home: str) -> list[psutil.Process]:
    """Those that know this data directory, in their environment or on their command line."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            told = [*process.cmdline(), process.environ().get("ORC_HOME", "")]
            if process.pid != os.getpid() and any(home in word for word in told) and _is_alive(process):
                found.append(process)
    return found


__all__ = ["Fault", "Journal", "Nemesis", "World", "planned"]

if __name__ == "__main__":
    sys.exit(main())
