"""What every rank of a lane runs: jobs from the desk, one after the other, in one process and one process group.

What a job raises ends the job, not the rank. The ranks then make a new process group, because the old one may be in the
middle of a collective; where that fails they raise, Ray ends the group, and the lane begins a new one.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import re
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from datetime import timedelta
from typing import Any, Protocol

from orchestrator.config import redact_text
from orchestrator.errors import OrchestratorError
from orchestrator.execution.desk import BREAK, JOB, LEAVE, NOTHING, REJOIN, WAIT
from orchestrator.execution.lane_cleaning import Cleaning
from orchestrator.execution.local import plan_from_json
from orchestrator.execution.ray_names import Identity
from orchestrator.execution.worker import Plan, train_rank
from orchestrator.failures.classify import Evidence, RankFailed

logger = logging.getLogger(__name__)

PATIENCE = 15.0
"""Seconds in which a desk that does not answer may come back."""
REJOIN_TIMEOUT = 10.0
"""Seconds in which all ranks must be back in a new process group."""
COLLECTIVE = timedelta(minutes=30)
"""As Ray Train's TorchConfig has it."""
_BROKEN_PROCESS = re.compile(r"CUDA|cuBLAS|cuDNN|NCCL|AcceleratorError|MemoryError|OutOfMemory|cannot allocate", re.I)
"""After these the process is not to be trusted."""
_IN_IMPORT = re.compile(r"\bin load_function\b")
"""The user's module failed while it was imported. Where an earlier job had imported it, that may be the reason: what it
registers somewhere (an operator of torch, say) is there already."""


class Desk(Protocol):
    """What a rank asks, see `desk.LaneDesk`. Raises ConnectionError and TimeoutError."""

    def take(self, lane: int, generation: int, rank: int, number: int, unfit: str = "") -> tuple[str, int, bytes]: ...
    def said(self, lane: int, generation: int, rank: int, number: int, word: Mapping[str, Any]) -> str: ...
    def meet(self, lane: int, generation: int, rank: int, number: int, address: str = "") -> str: ...


class LaneBroken(OrchestratorError):
    """The group of a lane ends by this; the job that it had has ended already."""

    def __init__(self, lane: int, why: str) -> None:
        super().__init__(lane, why)
        self.lane, self.why = lane, why

    def __str__(self) -> str:
        return f"lane {self.lane} begins anew: {self.why}"


def serve(
    desk: Desk,
    *,
    lane: int,
    generation: int,
    rank: int,
    world_size: int,
    local_rank: int,
    node: str = "",
    growth: int,
    title: Callable[[str], None] = lambda title: None,
) -> str:
    """Trains what the desk gives until it says to leave; returns why. `growth` in bytes, see Cleaning. `title` names
    the process. Raises LaneBroken."""
    _import_what_jobs_need()
    group = _Group(desk, lane=lane, generation=generation, rank=rank, world_size=world_size)
    cleaning = Cleaning(growth=growth)
    number, unfit = 0, ""
    while True:
        kind, _, raw = _asked(lane, lambda n=number, why=unfit: desk.take(lane, generation, rank, n, why))  # type: ignore[misc]
        if kind == NOTHING:
            continue
        if kind != JOB:
            return unfit or "not needed"
        plan = plan_from_json(raw.decode())
        del raw
        title(Identity.of(plan.ticket).process(rank))
        word = _train(plan, rank, world_size, local_rank, node)
        is_failed = "evidence" in word
        if is_failed:
            word["can_rejoin"] = word["can_rejoin"] and group.can_rejoin
            word["is_worn"] = number > 0 and bool(_IN_IMPORT.search(word["evidence"]["traceback"]))
        if is_failed:
            # Before the desk is told: the others may wait in a collective, and have something to say, too.
            if group.can_rejoin:
                group.leave()
            unfit = cleaning.clean(plan.code_paths)
        answer = _said(desk, lane, generation, rank, number, word)
        if answer == LEAVE:
            return unfit or "not needed"
        if answer == BREAK:
            raise LaneBroken(lane, "a rank did not answer after another one had failed")
        if not is_failed:
            unfit = cleaning.clean(plan.code_paths)
        if answer == REJOIN:
            group.leave()
            group.join(number)
        del plan, word
        number += 1


def _import_what_jobs_need() -> None:
    """While nobody waits, and before the baseline: what a library sets at its import is no change by a job."""
    import torch  # noqa: F401

    import orchestrator.checkpoints.slab_stager
    import orchestrator.provenance.ranks
    import orchestrator.tracking.logger
    import orchestrator.training.run  # noqa: F401


def _train(plan: Plan, rank: int, world_size: int, local_rank: int, node: str) -> dict[str, Any]:
    """One job in the words of this rank. What it raised stays here: its frames hold the model."""
    try:
        returned = train_rank(plan, rank=rank, world_size=world_size, local_rank=local_rank, node=node)
        return {"how": returned.how, "tally": dict(returned.tally)}
    except RankFailed as error:
        evidence = error.evidence
        _forget(error)
    except BaseException as error:  # of ours, before or after the user's function
        message = redact_text(str(error), plan.secrets)
        evidence = Evidence(
            rank=rank, type=type(error).__name__, message=message, host=socket.gethostname(), at=time.time()
        )
        logger.exception("a job failed on a lane")
        _forget(error)
    is_broken = bool(_BROKEN_PROCESS.search(f"{evidence.type}: {evidence.message}"))
    return {"evidence": asdict(evidence), "can_rejoin": not is_broken}


def _forget(error: BaseException) -> None:
    """Frames are the reason why a model outlives the exception that ended its training."""
    seen: set[int] = set()
    waiting: list[BaseException | None] = [error]
    while waiting:
        each = waiting.pop()
        if each is not None and id(each) not in seen:
            seen.add(id(each))
            waiting += [each.__cause__, each.__context__]
            each.__traceback__ = None
            each.__cause__ = each.__context__ = None


# -- the process group


class _Group:
    """The process group of all ranks of a lane, which can be left in the middle of a collective and made anew."""

    def __init__(self, desk: Desk, *, lane: int, generation: int, rank: int, world_size: int) -> None:
        import torch.distributed as dist

        self._desk, self._lane, self._generation = desk, lane, generation
        self._rank, self._world_size = rank, world_size
        self._sockets: frozenset[str] = frozenset()
        # NCCL's groups cannot be given up without a risk to hang; with gloo it is enough to hang up.
        self.can_rejoin = not dist.is_initialized() or dist.get_backend() == "gloo"
        self._is_used = dist.is_initialized()
        if self._is_used and self.can_rejoin and world_size > 1:
            # In place of Ray's, of which nobody knows which connections are its.
            self.leave()
            self.join(-1)

    def leave(self) -> None:
        """Hangs up, so that ranks that wait for this one in a collective hear of it at once. Destroying the group alone
        would not do: an exception that came out of a backward pass, or the user's model, may keep it alive."""
        import torch.distributed as dist

        for descriptor, name in _sockets().items():
            if name in self._sockets:
                with contextlib.suppress(OSError), socket.socket(fileno=os.dup(descriptor)) as connection:
                    connection.getpeername()  # raises for the one that listens: gloo ends the process if that is closed
                    connection.shutdown(socket.SHUT_RDWR)
        self._sockets = frozenset()
        gc.collect()
        if dist.is_initialized():
            dist.destroy_process_group()

    def join(self, number: int) -> None:
        """A new group, after the order of that number. Raises LaneBroken."""
        import torch.distributed as dist

        if not self._is_used:
            return
        timeout = timedelta(seconds=REJOIN_TIMEOUT)
        try:
            store = self._store(number, timeout)
            before = set(_sockets().values())
            # The store's patience counts while the ranks find each other, the group's in every collective afterwards.
            dist.init_process_group(
                "gloo", store=store, rank=self._rank, world_size=self._world_size, timeout=COLLECTIVE
            )
            self._sockets = frozenset(set(_sockets().values()) - before)
            dist.barrier()
        except LaneBroken:
            raise
        except Exception as error:
            raise LaneBroken(self._lane, f"no new process group: {type(error).__name__}: {error}") from error

    def _store(self, number: int, timeout: timedelta) -> Any:
        import torch.distributed as dist

        who, is_first = (self._lane, self._generation, self._rank, number), self._rank == 0
        told = ""
        host, port = os.environ.get("MASTER_ADDR") or "127.0.0.1", 0
        if not is_first:
            told = _asked(self._lane, lambda: self._desk.meet(*who))
            if not told:
                raise TimeoutError("rank 0 did not tell where it waits")
            host, _, text = told.partition(" ")
            port = int(text)
        store = dist.TCPStore(host, port, self._world_size, is_master=is_first, timeout=timeout, wait_for_workers=False)
        if is_first:
            _asked(self._lane, lambda: self._desk.meet(*who, f"{host} {store.port}"))
        return store


def _sockets() -> dict[int, str]:
    """This process' sockets: descriptor -> a name that no other socket has while it lives."""
    found = {}
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            link = os.readlink(f"/proc/self/fd/{name}")
            if link.startswith("socket:"):
                found[int(name)] = link
    return found


# -- the desk


def _said(desk: Desk, lane: int, generation: int, rank: int, number: int, word: Mapping[str, Any]) -> str:
    while True:
        answer = _asked(lane, lambda: desk.said(lane, generation, rank, number, word))
        if answer != WAIT:
            return answer


def _asked(lane: int, question: Callable[[], Any]) -> Any:
    """The desk's answer. Raises LaneBroken when the desk is gone: the driver then makes a new one, and new groups."""
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            return question()
        except TimeoutError as error:
            problem: Exception = error
        except ConnectionError as error:
            problem = error
            time.sleep(0.5)
        if time.monotonic() > deadline:
            raise LaneBroken(lane, f"its desk is gone: {problem}")
