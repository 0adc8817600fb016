"""One of two raylets is lost with all that it had started: how long until the training goes on with what is left.

A cluster of a head without CPUs and two nodes of one, on one machine (see tests/plugins/ray_nodes.py); a worker on
each, `resources.min_workers=1`. There a dead node is noticed after a second and a half: its health checks are set so.
With Ray's own (five looks, three seconds apart) it is noticed up to fifteen seconds later.
"""

from __future__ import annotations

import contextlib
import itertools
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import kill
import psutil
import subject
from rows import Row, at_most, printed

from orchestrator.stack import Stack
from orchestrator.store.store import Store
from tests.plugins.own_stack import OwnStack
from tests.plugins.ray_nodes import RayNode, RayNodes
from tools.bench.sweeps.environment import ROOT, tell

BAR = 45.0


def measure(repetitions: int) -> Iterator[Row]:
    found = list(_losses(repetitions, random.Random(0)))
    yield at_most("node lost to running again with what is left, worst", max(first for first, _ in found), BAR, "s")
    yield printed("node lost to running again, median", statistics.median(first for first, _ in found), "s")
    repeated = max(again for _, again in found)
    yield at_most("node lost: training repeated, worst, in checkpoint intervals", repeated, 1.0, "intervals")


def _losses(repetitions: int, by_lot: random.Random) -> Iterator[tuple[float, float]]:
    directory = Path(tempfile.mkdtemp(prefix="orcb-"))
    directory.chmod(0o711)
    addresses = (f"127.0.0.{number}" for number in itertools.count(3))
    try:
        with RayNodes(directory, more={"OMP_NUM_THREADS": "1"}) as nodes, OwnStack() as own:
            own.environment |= {**nodes.environment, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
            living = [nodes.add(next(addresses), cpus=1) for _ in range(2)]
            own.orc("up", f"ray.address={nodes.address}", "mlflow.enabled=false")
            stack = Stack.load(own.home)
            nodes.remove_at_end(Path(stack.slab_directory))
            with contextlib.closing(Store(stack.database_url)) as store:
                for number in range(repetitions):
                    tell(f"loss {number + 1} of {repetitions}")
                    loss, lost = _loss(own, store, f"lost-{number}", living, by_lot)
                    tell(f"loss {number + 1}: running after {loss[0]:.1f} s, repeated {loss[1]:.2f} intervals")
                    yield loss
                    living = [node for node in living if node != lost]
                    living.append(nodes.add(next(addresses), cpus=1))
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def _loss(
    own: OwnStack, store: Store, name: str, living: list[RayNode], by_lot: random.Random
) -> tuple[tuple[float, float], RayNode]:
    """Seconds until the first step after the kill; time that was done again, in checkpoint intervals; who was lost."""
    with tempfile.TemporaryDirectory() as made:
        journal = Path(made)
        words = [*kill.words(journal, name=name), "resources.placement=spread", "resources.min_workers=1"]
        command = [sys.executable, "-m", "orchestrator.cli.main", "run", *words]
        process = subprocess.Popen(command, env=own.environment, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        try:
            kill.until(lambda: _saved(store, name), "a checkpoint", process)
            time.sleep(by_lot.random() * kill.CHECKPOINT_EVERY)  # when the loss comes, not a wait for anything
            victim = by_lot.choice(living)
            assert _has_worker(victim, journal), "each node has a worker"
            killed = time.time()
            victim.kill()
            after = kill.until(lambda: subject.steps(journal, 2), "running again", process)
            before = {step.number: step.at for step in subject.steps(journal, 1)}
            again = max(before.values()) - before.get(after[0].number - 1, min(before.values()))
            return (after[0].at - killed, again / _interval(store, name, before)), victim
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(90)


def _saved(store: Store, name: str) -> bool:
    rows = store.runs(search=name)
    return bool(rows) and len(store.checkpoints(rows[0].run)) >= 2


def _has_worker(node: RayNode, journal: Path) -> bool:
    inside = {child.pid for child in psutil.Process(node.raylet).children(recursive=True)}
    return any(line["pid"] in inside for line in subject.began(journal))


def _interval(store: Store, name: str, moments: dict[int, float]) -> float:
    """The longest between two checkpoints of the attempt that was ended, and between the last one and that end."""
    (row,) = store.runs(search=name)
    steps = sorted(each.step or 0 for each in store.checkpoints(row.run) if each.attempt == 1)
    at = [moments[step] for step in steps if step in moments]
    gaps = [later - earlier for earlier, later in itertools.pairwise(at)]
    return max([kill.CHECKPOINT_EVERY, *gaps])


if __name__ == "__main__":
    sys.exit("python tools/bench/failures --only node")
