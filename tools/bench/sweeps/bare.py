"""The floor: two processes that keep running, train one trial after another and track nothing; a checkpoint after each
epoch by `torch.save`. Started by torchrun: `bare.py TRIALS DIRECTORY`."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch
from subject import EPOCHS, accuracy, distributed, epoch, parts, rates
from torch.nn.parallel import DistributedDataParallel


def main() -> None:
    trials, directory = int(sys.argv[1]), Path(sys.argv[2])
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    is_first = torch.distributed.get_rank() == 0
    for number, lr in enumerate(rates(trials)):
        torch.manual_seed(number)
        model, optimizer, loader, test = parts(lr)
        ddp, loader = DistributedDataParallel(model), distributed(loader)
        for current in range(EPOCHS):
            loader.sampler.set_epoch(current)  # type: ignore[attr-defined]
            epoch(ddp, optimizer, loader)
            accuracy(ddp, test)
            if is_first:
                torch.save(
                    {"model": model.state_dict(), "optimizer": optimizer.state_dict()},
                    directory / f"{number}-{current}.pt",
                )
        torch.distributed.barrier()
        if is_first:
            print(f"end {time.time()}", flush=True)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
