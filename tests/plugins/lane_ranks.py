"""A lane of two ranks without Ray: the real desk behind a socket, real processes, and trainings that fail.

`python -m tests.plugins.lane_ranks PORT RANK` is one rank; `LaneRanks` has the desk and starts them. What the ranks
train is `_user`, in the place of `train_rank`, which needs a tracker.
"""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from multiprocessing.managers import BaseManager
from typing import Any

from orchestrator.execution.desk import LaneDesk, ending_from
from orchestrator.execution.local import plan_to_json
from orchestrator.execution.worker import DONE, Plan, Returned
from orchestrator.failures.classify import Evidence, RankFailed
from orchestrator.records import RunTicket
from orchestrator.sweeps.jobs import Ending

KEY = b"lane"
LANE, GENERATION = 0, 1


class _Wire(BaseManager):
    pass


class LaneRanks:
    """One generation of one lane with two ranks. Use as a context manager."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, daemon=True).start()
        self._desk = LaneDesk()
        _Wire.register("desk", callable=lambda: self)
        server = _Wire(("127.0.0.1", 0), KEY).get_server()
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address: Any = server.address
        self.call("begin", LANE, GENERATION, 2, True)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        common = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        words = [sys.executable, "-m", "tests.plugins.lane_ranks", str(address[1])]
        self._ranks = [
            subprocess.Popen(
                [*words, str(rank)], env=common, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
            )
            for rank in range(2)
        ]

    def call(self, method: str, *args: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(getattr(self._desk, method)(*args), self._loop).result()

    def train(self, kinds: Sequence[str]) -> list[Ending]:
        """A job of each kind, and how they ended."""
        for number, kind in enumerate(kinds):
            ticket = RunTicket(run=f"run-{number}", name=kind, experiment="lanes", attempt=1, directory="/nowhere")
            plan = Plan(
                ticket=ticket, train=kind, user={}, spool_directory="", spool_bytes=1, flush_timeout=1.0, seed=0,
                checkpoints={}, config_hash="",
            )  # fmt: skip
            self.call("put", number, plan_to_json(plan).encode())
        return [self._ending(number) for number in range(len(kinds))]

    def close(self) -> list[int]:
        """The exit codes of the ranks, which leave."""
        self.call("close")
        return [rank.wait(timeout=60) for rank in self._ranks]

    def _ending(self, number: int) -> Ending:
        deadline = time.monotonic() + 90
        while time.monotonic() < deadline:
            raw = self.call("look", number, 1.0)
            if raw is not None:
                return ending_from(raw)
            assert [rank.poll() for rank in self._ranks] == [None, None], "a rank died"
        raise AssertionError(f"job {number} did not end")

    def __enter__(self) -> LaneRanks:
        return self

    def __exit__(self, *_: object) -> None:
        for rank in self._ranks:
            rank.kill()
            rank.wait()


class _Desk:
    """What `serve` asks."""

    def __init__(self, port: int) -> None:
        _Wire.register("desk")
        wire = _Wire(("127.0.0.1", port), KEY)
        wire.connect()
        self._desk: Any = wire.desk()  # type: ignore[attr-defined]

    def take(self, *args: Any) -> Any:
        return self._desk.call("take", *args)

    def said(self, *args: Any) -> Any:
        return self._desk.call("said", *args)

    def meet(self, *args: Any) -> Any:
        return self._desk.call("meet", *args)


def _user(kind: str, rank: int) -> None:
    import torch

    first = torch.nn.Linear(50, 500)
    layers = torch.nn.Sequential(first, torch.nn.BatchNorm1d(500), torch.nn.Linear(500, 2))
    model = torch.nn.parallel.DistributedDataParallel(layers)
    if kind == "backward" and rank == 1:

        def fail(_: torch.Tensor) -> torch.Tensor:
            raise ArithmeticError("no gradient today")

        first.weight.register_hook(fail)
    for _ in range(3):
        model(torch.randn(16, 50)).sum().backward()
        if kind == "raises" and rank == 0:
            raise ValueError("bad data")
    if kind == "late" and rank == 1:
        raise ValueError("after the last collective")


def _main(port: int, rank: int) -> None:
    import torch.distributed as dist

    from orchestrator.execution import lane_worker

    def train_rank(plan: Plan, **_: Any) -> Returned:
        try:
            _user(plan.train, rank)
        except Exception as error:
            evidence = Evidence(
                rank=rank,
                type=type(error).__name__,
                message=str(error),
                traceback=traceback.format_exc(),
                at=time.time(),
            )
            raise RankFailed(evidence) from None
        return Returned(how=DONE)

    lane_worker.train_rank = train_rank  # type: ignore[assignment]
    dist.init_process_group("gloo", rank=rank, world_size=2)
    lane_worker.serve(
        _Desk(port), lane=LANE, generation=GENERATION, rank=rank, world_size=2, local_rank=0, growth=1 << 30
    )
    os._exit(0)


if __name__ == "__main__":
    _main(int(sys.argv[1]), int(sys.argv[2]))
