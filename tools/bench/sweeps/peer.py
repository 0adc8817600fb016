"""What a user would write today: Ray Tune over TorchTrainer, as Ray's guide has it, with Ray's TuneReportCallback and
MLflowLoggerCallback. `peer.py TRIALS DIRECTORY RAY_ADDRESS MLFLOW_URI POLL`. Prints how many trials have ended."""

from __future__ import annotations

import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import ray
import ray.train
import ray.train.torch
from ray import tune
from ray.air.integrations.mlflow import MLflowLoggerCallback
from ray.train import Checkpoint, ScalingConfig
from ray.train.torch import TorchTrainer
from ray.train.v2.api.config import RunConfig
from ray.tune.integration.ray_train import TuneReportCallback


def worker(config: dict[str, Any]) -> None:
    import torch
    from subject import EPOCHS, accuracy, epoch, parts, together

    torch.set_num_threads(1)
    torch.manual_seed(0)
    bare, optimizer, loader, test = parts(config["lr"])
    model = ray.train.torch.prepare_model(bare)
    loader = ray.train.torch.prepare_data_loader(loader)
    is_first = ray.train.get_context().get_world_rank() == 0
    for current in range(EPOCHS):
        epoch(model, optimizer, loader)
        metrics = {"accuracy": accuracy(model, test), "epoch": current}
        together()
        with tempfile.TemporaryDirectory() as directory:
            began = time.perf_counter()
            checkpoint = None
            if is_first:
                torch.save(
                    {"model": bare.state_dict(), "optimizer": optimizer.state_dict()}, Path(directory) / "state.pt"
                )
                checkpoint = Checkpoint.from_directory(directory)
            ray.train.report(metrics, checkpoint=checkpoint)
            if is_first:
                with open(config["journal"], "a") as journal:
                    journal.write(f"report {time.perf_counter() - began}\n")


def trial(config: dict[str, Any]) -> None:
    # Here, where Train reads it: Ray's workers have the environment of its head, which has a setting of ours.
    os.environ["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"] = config["poll"]
    TorchTrainer(
        worker,
        train_loop_config=config,
        scaling_config=ScalingConfig(num_workers=2),
        run_config=RunConfig(
            name=f"train-{tune.get_context().get_trial_id()}", storage_path=config["directory"],
            callbacks=[TuneReportCallback()],
        ),
    ).fit()  # fmt: skip


def main() -> None:
    from subject import rates

    trials, (directory, address, mlflow, poll) = int(sys.argv[1]), sys.argv[2:6]
    ray.init(address=address, log_to_driver=False)
    tuner = tune.Tuner(
        trial,
        param_space={
            "lr": tune.grid_search(rates(trials)), "directory": directory, "journal": f"{directory}/journal",
            "poll": poll,
        },
        tune_config=tune.TuneConfig(max_concurrent_trials=1),
        run_config=tune.RunConfig(
            name="peer", storage_path=directory, verbose=0,
            callbacks=[MLflowLoggerCallback(tracking_uri=mlflow, experiment_name="peer")],
        ),
    )  # fmt: skip
    found = tuner.fit()
    print(f"ended {sum(result.error is None for result in found)}", flush=True)


if __name__ == "__main__":
    main()
