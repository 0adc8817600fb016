"""A training whose state is a function of its step, so that whatever is loaded can be judged; its ranks and its writer
are processes of their own, to be killed.

Processes are forked from the one that asks, which has loaded everything and has no threads: a killed one is there
again within milliseconds. What they do they say in a journal, line by line, in writes that a SIGKILL cannot cut.
"""

from __future__ import annotations

import ctypes
import faulthandler
import json
import os
import shutil
import signal
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn

from orchestrator import disk
from orchestrator.backends.storage import Storage
from orchestrator.checkpoints import catalog
from orchestrator.checkpoints import slab as slab_file
from orchestrator.checkpoints.engine import CheckpointEngine
from orchestrator.checkpoints.load import load_checkpoint
from orchestrator.checkpoints.local.client import SlabClient
from orchestrator.checkpoints.local.process import WriterProcess
from orchestrator.checkpoints.manifest import CheckpointInfo, CheckpointState
from orchestrator.checkpoints.policy import CheckpointPolicy
from orchestrator.checkpoints.slab import Owner
from orchestrator.checkpoints.slab_stager import SlabStager
from orchestrator.checkpoints.staging import DirectStager, Stager
from orchestrator.checkpoints.state import TrainState
from orchestrator.clock import SystemClock
from orchestrator.training.group import Group

KEEP = 3
_DIE_WITH_PARENT = 1
"""PR_SET_PDEATHSIG, of prctl(2)."""

torch.set_num_threads(1)  # before anything is computed: a forked child has none of its parent's threads

# -- the state, and what it has to be ----------------------------------------------------------------------------------


@cache
def _bases(count: int, numel: int) -> tuple[torch.Tensor, ...]:
    """Whole numbers: with a step added, each is still exact."""
    generator = torch.Generator().manual_seed(5)
    return tuple(torch.randint(0, 1 << 20, (numel + 7 * index,), generator=generator).float() for index in range(count))


class Trained:
    """A model and an Adam whose every number follows from the step: `go_to` makes them, `is_right` judges them."""

    def __init__(self, *, count: int = 16, numel: int = 24_000) -> None:
        """`count` parameters of about `numel` numbers; with Adam three times 4 bytes each."""
        self._bases = _bases(count, numel)
        self.model = nn.ParameterList([nn.Parameter(torch.zeros_like(base)) for base in self._bases])
        self.model.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.optimizer = torch.optim.Adam(self.model.parameters())
        for parameter in self.model:
            parameter.grad = torch.zeros_like(parameter)
        self.optimizer.step()  # its state exists from now on
        for parameter in self.model:
            parameter.grad = None
        self.state = TrainState(model=self.model, optimizer=self.optimizer)

    def _wanted(self, step: int) -> Iterator[tuple[torch.Tensor, torch.Tensor, int]]:
        for parameter, base in zip(self.model, self._bases, strict=True):
            of = self.optimizer.state[parameter]
            yield parameter.data, base, step
            yield of["exp_avg"], base, -step
            yield of["exp_avg_sq"], base, 2 * step

    @torch.no_grad()
    def go_to(self, step: int) -> None:
        for tensor, base, plus in self._wanted(step):
            torch.add(base, plus, out=tensor)
        self.model.steps.fill_(step)
        for of in self.optimizer.state.values():
            of["step"].fill_(step)

    def forget(self) -> None:
        """No number is right afterwards."""
        self.go_to(-7)

    def is_right(self, step: int) -> bool:
        return (
            all(torch.equal(tensor, base + plus) for tensor, base, plus in self._wanted(step))
            and int(self.model.steps) == step
            and all(float(of["step"]) == step for of in self.optimizer.state.values())
        )

    def named(self) -> dict[str, Any]:
        """As torch's own checkpoints are given it: tensors by name, those that live."""
        found: dict[str, Any] = {"steps": self.model.steps}
        for index, parameter in enumerate(self.model):
            of = self.optimizer.state[parameter]
            found[f"{index}"] = parameter.data
            found |= {f"{index}.{name}": of[name] for name in ("exp_avg", "exp_avg_sq", "step")}
        return found


# -- what is said ------------------------------------------------------------------------------------------------------


class Journal:
    """Lines of JSON that many processes add to; each is there whole or not at all."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self._read_bytes = 0
        self._lines: list[dict[str, Any]] = []

    def say(self, what: str, **more: Any) -> None:
        os.write(self._fd, json.dumps({"what": what, **more}).encode() + b"\n")

    def lines(self) -> list[dict[str, Any]]:
        """All so far; only what is new is read."""
        with self.path.open("rb") as file:
            file.seek(self._read_bytes)
            new = file.read()
        self._read_bytes += len(new)
        self._lines += [json.loads(line) for line in new.splitlines()]
        return self._lines


@dataclass
class Diary:
    """What an engine tells; what is committed goes into the journal."""

    journal: Journal
    attempt: int
    events: list[str] = field(default_factory=list)

    def checkpoint(self, info: CheckpointInfo) -> None:
        if info.state is CheckpointState.committed:
            own = info.attempt == self.attempt
            self.journal.say("committed", attempt=self.attempt, step=info.step, of=info.attempt, own=own)

    def event(self, kind: str, message: str, *, level: str, **details: Any) -> None:
        self.events.append(kind)
        self.journal.say("event", attempt=self.attempt, kind=kind, message=message)


# -- the processes -----------------------------------------------------------------------------------------------------


def forked(what: Callable[[], None], output: Path) -> int:
    """A process that does it and ends. What it says goes to `output`."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        with output.open("ab") as said:
            os.dup2(said.fileno(), 1)
            os.dup2(said.fileno(), 2)
        ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGKILL)
        faulthandler.dump_traceback_later(45)  # before those who wait for it give up
        what()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def kill(pid: int) -> bool:
    """SIGKILL; True if that was what ended it."""
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    return wait(pid) == -signal.SIGKILL


def wait(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def has_ended(pid: int) -> int | None:
    """How it ended by itself, None while it lives. To be asked once after the end."""
    done, status = os.waitpid(pid, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if done else None


def die_at(number: int) -> None:
    """From now on this process kills itself before its change `number` (0, 1, …) of a file or of shared memory; a
    negative number is never."""
    left = number

    def count(*_: str) -> None:
        nonlocal left
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        left -= 1

    disk.watch(count)
    slab_file.watch(count)


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a training takes place."""

    directory: Path
    """Of this test: storage, journal, output."""
    slabs: Path | None = None
    """The slab root; None: saves are direct."""

    @property
    def storage(self) -> Path:
        return self.directory / "checkpoints"

    @property
    def output(self) -> Path:
        return self.directory / "output.log"

    @property
    def journal(self) -> Journal:
        return Journal(self.directory / "journal.jsonl")

    def said(self) -> str:
        return self.output.read_text(errors="replace")[-3000:] if self.output.exists() else ""

    def progress(self) -> int:
        """The step that rank 0 has come to."""
        try:
            return int((self.directory / "step").read_text() or 0)
        except FileNotFoundError:
            return 0


def writer(place: Place, *, idle: float = 3600.0) -> None:
    """Serves until it is killed, or until nothing was to do for `idle` seconds."""
    assert place.slabs is not None
    WriterProcess(str(place.slabs), threads=2, idle=idle).run()


def engine_of(place: Place, group: Any, attempt: int, journal: Journal) -> CheckpointEngine:
    storage = Storage(str(place.storage))
    stager: Stager | None = None
    if place.slabs is not None:
        owner = Owner(run="r1", attempt=attempt, rank=group.rank, pid=os.getpid())
        stager = SlabStager(
            SlabClient(str(place.slabs), may_start=False), owner=owner, fallback=DirectStager(storage),
            tell=lambda event, why: journal.say("event", attempt=attempt, kind=event, message=why),
        )  # fmt: skip
    return CheckpointEngine(
        storage, run="r1", attempt=attempt, group=group, policy=CheckpointPolicy(keep_last=KEEP, wait=60.0),
        clock=SystemClock(), diary=Diary(journal, attempt), stager=stager,
    )  # fmt: skip


def save(engine: CheckpointEngine, trained: Trained, step: int, *, waits: bool = False) -> CheckpointInfo | None:
    return engine.save(
        trained.state, step=step, epoch=0, epoch_complete=False, metrics={}, is_best=False, reasons=("every_steps",),
        progress={"step": step}, rank_state={"step": step}, data={}, must=waits, waits=waits,
    )  # fmt: skip


def resumed(engine: CheckpointEngine, trained: Trained) -> dict[str, Any]:
    """Step of what is loaded and the attempt that saved it, 0 for nothing, and whether every bit of it is right."""
    trained.forget()
    stored = engine.restore(trained.state)
    if stored is None:
        return {"step": 0, "of": 0, "right": True}
    step = stored.manifest.step
    is_right = trained.is_right(step) and stored.rank == {"step": step} and stored.progress == {"step": step}
    return {"step": step, "of": stored.manifest.attempt, "right": is_right}


def stranger(place: Place, **size: int) -> None:
    """Loads the newest without being a training, and says what it was."""
    trained = Trained(**size)
    loaded = load_checkpoint(place.storage, model=trained.model, optimizer=trained.optimizer)
    of = catalog.age_key(loaded.info.id.rpartition("/")[2])[0]
    place.journal.say("loaded", step=loaded.step, of=of, right=trained.is_right(loaded.step), skipped=loaded.skipped)


def meet(place: Place, rank: int, world_size: int, attempt: int) -> None:
    meeting = f"file://{place.directory}/meeting-{attempt}"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=world_size)


def ours(place: Place, rank: int, world_size: int, attempt: int, *, every: int = 4) -> None:
    """Trains until it is killed; saves as often as there is room."""
    journal, trained = place.journal, Trained()
    if world_size > 1:
        meet(place, rank, world_size, attempt)
    engine = engine_of(place, Group(rank, world_size), attempt, journal)
    found = resumed(engine, trained)
    journal.say("resumed", attempt=attempt, rank=rank, **found)
    step = found["step"]
    trained.go_to(step)
    engine.expect(trained.state)
    with _counter(place, rank) as count:
        while True:
            step += 1
            trained.go_to(step)
            count(step)
            if step % every == 0:
                if rank == 0:
                    journal.say("begin", attempt=attempt, step=step)
                info = save(engine, trained, step)
                if rank == 0 and info is None:
                    journal.say("skipped", attempt=attempt, step=step)
            for ended in engine.poll():
                if ended.why:
                    journal.say("failed", attempt=attempt, step=ended.info.step, why=ended.why)


class _counter:
    """Where the training is, for whoever wants to know after its death."""

    def __init__(self, place: Place, rank: int) -> None:
        self._rank, self._path = rank, place.directory / "step"

    def __enter__(self) -> Callable[[int], None]:
        if self._rank:
            return lambda step: None
        self._fd = os.open(self._path, os.O_WRONLY | os.O_CREAT, 0o600)
        return lambda step: [os.pwrite(self._fd, b"%012d" % step, 0), None][1]

    def __exit__(self, *_: object) -> None:
        if not self._rank:
            os.close(self._fd)


# -- torch's own -------------------------------------------------------------------------------------------------------


def dcp_steps(directory: Path) -> list[int]:
    """What torch's checkpoints call complete, newest first: `.metadata` is written last."""
    return sorted((int(path.parent.name[5:]) for path in directory.glob("step_*/.metadata")), reverse=True)


def dcp_resumed(place: Place, trained: Trained, journal: Journal, attempt: int, rank: int) -> tuple[int, bool]:
    """Loads the newest that can be loaded; what cannot be is told."""
    for step in dcp_steps(place.storage):
        trained.forget()
        state = trained.named()
        try:
            dcp.load(state, checkpoint_id=str(place.storage / f"step_{step}"), no_dist=True)
        except Exception as error:
            journal.say("refused", attempt=attempt, rank=rank, step=step, why=f"{type(error).__name__}: {error}"[:200])
            continue
        return step, trained.is_right(step)
    return 0, True


def torch_own(
    place: Place, rank: int, world_size: int, attempt: int, *, every: int = 4, is_async: bool = False
) -> None:  # fmt: skip
    """As `ours`, with `dcp.save` or `dcp.async_save`, one save at a time; keeps the last few as people do it."""
    journal, trained = place.journal, Trained()
    meet(place, rank, world_size, attempt)
    step, is_right = dcp_resumed(place, trained, journal, attempt, rank)
    journal.say("resumed", attempt=attempt, rank=rank, step=step, of=0, right=is_right)
    dist.barrier()
    saving: tuple[int, Any] | None = None

    def done(saved: int) -> None:
        if rank == 0:
            journal.say("committed", attempt=attempt, step=saved, of=0, own=True)
            for old in dcp_steps(place.storage)[KEEP:]:
                shutil.rmtree(place.storage / f"step_{old}", ignore_errors=True)

    with _counter(place, rank) as count:
        while True:
            step += 1
            trained.go_to(step)
            count(step)
            if step % every:
                continue
            if saving is not None:
                saving[1].result()
                done(saving[0])
                saving = None
            if rank == 0:
                journal.say("begin", attempt=attempt, step=step)
            target = str(place.storage / f"step_{step}")
            if is_async:
                saving = step, dcp.async_save(trained.named(), checkpoint_id=target)
            else:
                dcp.save(trained.named(), checkpoint_id=target)
                done(step)


Train = Callable[[Place, int, int, int], None]
CONTENDERS: Mapping[str, Train] = {
    "ours": ours, "dcp": torch_own, "dcp-async": partial(torch_own, is_async=True),
}  # fmt: skip


# -- a training as a whole ---------------------------------------------------------------------------------------------


class Processes:
    """The ranks of an attempt and the writer. At the end of the block all of them are killed."""

    def __init__(self, place: Place, train: Train, world_size: int) -> None:
        self.place, self.train, self.world_size = place, train, world_size
        self.attempt = 0
        self.ranks: list[int] = []
        self.writer = 0
        place.storage.mkdir(parents=True, exist_ok=True)
        self.journal = place.journal

    def __enter__(self) -> Processes:
        if self.place.slabs is not None:
            self.start_writer()
        return self

    def __exit__(self, *_: object) -> None:
        for pid in (*self.ranks, *filter(None, [self.writer])):
            kill(pid)
        self.ranks, self.writer = [], 0

    def start_writer(self) -> None:
        self.writer = forked(partial(writer, self.place), self.place.output)

    def start(self) -> None:
        self.attempt += 1
        self.ranks = [
            forked(partial(self.train, self.place, rank, self.world_size, self.attempt), self.place.output)
            for rank in range(self.world_size)
        ]

    def kill_ranks(self, *first: int) -> bool:
        """Those first, then the others, as a launcher does it. True if one of the first lived until then: a rank may
        end by itself as soon as another is gone."""
        for rank in first:
            os.kill(self.ranks[rank], signal.SIGKILL)
        landed = [kill(self.ranks[rank]) for rank in first]
        for rank in range(self.world_size):
            if rank not in first:
                kill(self.ranks[rank])
        self.ranks = []
        return any(landed)

    def killed_or_done(self, victim: int) -> bool:
        """Waits for a rank that kills itself, and then kills the others; False if all of them came to their ends."""
        ends = [wait(self.ranks[victim])]
        assert ends[0] in (0, -signal.SIGKILL), self.place.said()
        others = [pid for rank, pid in enumerate(self.ranks) if rank != victim]
        self.ranks = []
        if ends[0]:
            for pid in others:
                kill(pid)
            return True
        assert [wait(pid) for pid in others] == [0] * len(others), self.place.said()
        return False

    def kill_writer(self) -> bool:
        landed, self.writer = kill(self.writer), 0
        return landed

    def wait_for(self, what: Callable[[], object], why: str, seconds: float = 60.0) -> None:
        deadline = time.monotonic() + seconds
        while not what():
            for pid in self.ranks:
                if (ended := has_ended(pid)) is not None:
                    self.ranks.remove(pid)
                    raise AssertionError(f"a rank ended by itself ({ended}): {self.place.said()}")
            assert time.monotonic() < deadline, f"not within {seconds:.0f} s: {why}; {self.place.said()}"
            time.sleep(0.005)

    def resumed(self) -> list[dict[str, Any]]:
        """What the ranks of the attempt that runs say that they loaded."""
        return [line for line in self.journal.lines() if line["what"] == "resumed" and line["attempt"] == self.attempt]
