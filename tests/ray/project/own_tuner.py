"""A user's own script for Ray Tune: nothing of ours but the callback."""

import os
import sys

from ray import tune
from ray.tune import RunConfig, TuneConfig, Tuner

import orchestrator


def trial(config):
    for step in range(3):
        if step == 2 and config["lr"] == 0.1 and not os.path.exists(config["mended"]):
            raise ValueError("the second trial breaks")
        tune.report({"score": config["lr"] * (step + 1), "nested": {"deep": step}})


storage, experiment, mended = sys.argv[1:4]
if os.path.exists(f"{storage}/sweep"):
    tuner = Tuner.restore(f"{storage}/sweep", trainable=trial, resume_errored=True)
else:
    tuner = Tuner(
        tune.with_resources(trial, {"CPU": 1}),
        param_space={"lr": tune.grid_search([0.01, 0.1]), "mended": mended},
        tune_config=TuneConfig(metric="score", mode="max"),
        run_config=RunConfig(
            name="sweep", storage_path=storage, callbacks=[orchestrator.TuneCallback(experiment=experiment)]
        ),
    )
tuner.fit()
