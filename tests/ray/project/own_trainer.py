"""A user's own script for Ray Train: nothing of ours but the callback."""

import sys

import numpy as np
import ray.train
from ray.train import RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer

import orchestrator


def loop(config):
    rank = ray.train.get_context().get_world_rank()
    for step in range(config["steps"]):
        if config["fails"] and rank == 1 and step == 2:
            raise ValueError("the data of rank 1 is broken")
        ray.train.report({"loss": 1.0 / (step + 1), "rank": np.float64(rank), "note": "text"})


trainer = TorchTrainer(
    loop,
    train_loop_config={"steps": 3, "lr": 0.1, "fails": "fail" in sys.argv, "api_key": "canary-5be2c1"},
    scaling_config=ScalingConfig(num_workers=2),
    run_config=RunConfig(storage_path=sys.argv[1], callbacks=[orchestrator.TrainCallback(experiment=sys.argv[2])]),
)
trainer.fit()
