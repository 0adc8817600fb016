"""One rank of a local run as a process; started by local.py, with the plan on stdin."""

from __future__ import annotations

import argparse
import ctypes
import datetime
import faulthandler
import json
import os
import signal
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from orchestrator.config import redact_text
from orchestrator.execution.local import plan_from_json
from orchestrator.execution.worker import Plan, Returned, train_rank
from orchestrator.failures.classify import Evidence, RankFailed

_PR_SET_PDEATHSIG = 1
RENDEZVOUS = datetime.timedelta(minutes=5)


def main() -> None:
    parser = argparse.ArgumentParser(prog="orchestrator.execution.local_rank", description=__doc__)
    parser.add_argument("--parent", type=int, required=True)
    parser.add_argument("--result", type=Path, required=True)
    parser.add_argument("--backend", required=True)
    parser.add_argument("--device", type=int, required=True, help="number of the first GPU, where GPUs are used")
    parser.add_argument("--listener", type=int)
    arguments = parser.parse_args()
    die_with(arguments.parent)
    faulthandler.enable()  # a crash in native code leaves the Python lines among its last words
    plan = plan_from_json(sys.stdin.read())
    rank = int(os.environ["RANK"])
    try:
        told: dict[str, Any] = {"returned": asdict(_train(plan, rank, arguments))}
    except RankFailed as error:
        told = {"failure": asdict(error.evidence)}
    except Exception as error:
        message = redact_text(str(error), plan.secrets)
        told = {"failure": asdict(Evidence(rank=rank, type=type(error).__name__, message=message))}
    whole = arguments.result.with_suffix(".tmp")
    whole.write_text(json.dumps(told))
    whole.rename(arguments.result)
    sys.stderr.flush()
    if "failure" in told:
        os._exit(1)  # threads that hang in a collective would keep the process


def die_with(parent: int) -> None:
    """A killed driver leaves no orphans."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)  # it died before we asked


def _train(plan: Plan, rank: int, told: argparse.Namespace) -> Returned:
    import torch
    import torch.distributed as dist

    world_size, listener = int(os.environ["WORLD_SIZE"]), told.listener
    if told.backend == "nccl":
        torch.cuda.set_device(told.device)
    store = dist.TCPStore(
        os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), world_size, is_master=listener is not None,
        timeout=RENDEZVOUS, **({} if listener is None else {"master_listen_fd": listener}),
    )  # fmt: skip
    patience = datetime.timedelta(seconds=plan.collective_timeout)
    dist.init_process_group(told.backend, store=store, rank=rank, world_size=world_size, timeout=patience)
    returned = train_rank(plan, rank=rank, world_size=world_size, local_rank=told.device)
    dist.destroy_process_group()
    return returned


if __name__ == "__main__":
    main()
