"""Runs trials on a pool of lanes, without a sweep's core: `python on_lanes.py '{"trials": [{…}], "lanes": "auto"}'`.
Prints as JSON how each ended and what the pool says of itself."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

from orchestrator.config import compose
from orchestrator.execution.lanes import LanePool
from orchestrator.execution.on_ray import OnRay
from orchestrator.execution.worker import Plan
from orchestrator.records import RunSpec
from orchestrator.stack import Stack
from orchestrator.sweeps.jobs import Assigned


def main() -> None:
    asked = json.loads(sys.argv[1])
    stack = Stack.load(None)
    words = ["train=laned:train", "resources.workers=2", "resources.cpus_per_worker=0.5", *asked.get("overrides", [])]
    words.append(f"sweep.lanes={asked['lanes']}")
    place = OnRay(stack)
    size = asked.get("size", 1)
    base = compose(words)
    sweep = f"lanes-{time.time_ns()}"
    spools = place.tracker.describe()["spool_directory"]
    pool = LanePool(stack, base.settings, sweep=sweep, name="on-lanes", driver="0", size=size)

    def run(number: int) -> dict:
        values = asked["trials"][number]
        job = compose([*words, *(f"{key}={value}" for key, value in values.items())])
        spec = RunSpec(
            experiment="lanes", name=f"trial-{number}", params=job.params, config=job.resolved, config_hash=job.hash,
            storage_url=stack.storage_url, workers=2, lease=600.0,
        )  # fmt: skip
        ticket = place.tracker.open_run(spec)
        assigned = Assigned(job=number, trial=number, repeat=0, rung=0, ticket=ticket, values=values, seed=7)
        plan = Plan(
            ticket=ticket, train=job.train, user=job.user, spool_directory=spools, spool_bytes=64 << 20,
            flush_timeout=10.0, seed=7, checkpoints=asdict(job.settings.checkpoints), config_hash=job.hash,
            code_paths=(os.getcwd(),),
        )  # fmt: skip
        if asked.get("condemn") == number:
            threading.Thread(target=condemn, args=(number, Path(ticket.directory)), daemon=True).start()
        ending = pool.run_job(assigned, plan)
        return {**asdict(ending), "run": ticket.run, "directory": ticket.directory}

    def condemn(number: int, directory: Path) -> None:
        """Once its first checkpoint is there, as a watch over hanging trials would."""
        while not list(directory.glob("checkpoints/*/MANIFEST.json")):
            time.sleep(0.1)
        pool.condemn(number, "hang", "no report for a while")

    pool.want(size)
    with ThreadPoolExecutor(size) as threads:
        endings = list(threads.map(run, range(len(asked["trials"]))))
    view = pool.view()
    began = time.time()
    pool.close()
    print(json.dumps({"endings": endings, "view": view, "closed_in": time.time() - began}, default=str), flush=True)
    place.close()


if __name__ == "__main__":
    main()
