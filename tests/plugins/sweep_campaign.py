"""Random SIGKILLs into sweeps on a real stack, until enough of them landed.

    python -m tests.plugins.sweep_campaign --kills 50 [--lanes 1] [--seed N]

A sweep of ASHA trials runs on a stack of its own while its driver, one of its workers, a whole group of them, the
desk, the tracker or the Ray head is killed; a driver that is gone is followed by `orc sweep resume`. Then the table of
trials is compared: with one lane it must be that of the same sweep left in peace, to the last bit of every score; with
more, no trial is lost or repeated, budgets are exact, and the decisions are those that the rules make. A sweep that is
over before enough was killed is followed by the next one with the same seed. Exit code 1 if anything differs.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from orchestrator.status import RunStatus
from orchestrator.store.names import run_id
from orchestrator.store.store import Store
from tests.plugins.own_stack import OwnStack
from tests.plugins.runs import Orc, wait_until

WEIGHTS = {"driver": 30, "worker": 25, "group": 20, "tracker": 10, "desk": 5, "head": 10}
MOST_PAUSE = 4.0
"""Seconds between a sweep's sign of life and the next kill, at most."""
LONGEST = 240.0
"""Seconds in which a sweep must get on, whatever was killed."""
MILESTONES = (1.0, 3.0, 9.0)

Table = list[tuple[Any, ...]]


@dataclass
class Campaign:
    """Sweeps of `trials` on `lanes` that are disturbed until `go` has seen so many kills."""

    orc: Orc
    directory: Path
    random: random.Random
    lanes: int = 1
    trials: int = 20
    pause: float = 0.15
    weights: dict[str, int] = field(default_factory=lambda: dict(WEIGHTS))
    options: tuple[str, ...] = ()
    """Of `orc sweep` and `orc sweep resume`. With --local there is no Ray, no lane, and only driver and workers can be
    killed."""
    kills: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)
    sweeps: int = 0

    def __post_init__(self) -> None:
        self.store: Store = self.orc.store()

    # -- one sweep

    def undisturbed(self) -> Table:
        """The table of the sweep that nobody kills anything of. One lane: with more there is no single right one."""
        sweep, process = self._start(lanes=1)
        self._until_over(process, sweep)
        return self.table(sweep)

    def go(self, kills: int, expected: Table | None) -> None:
        """Sweeps until so many kills landed. Each is compared with `expected`, or judged by its own rules."""
        while self.kills.total() < kills:
            sweep, process = self._start(lanes=self.lanes)
            self.sweeps += 1
            while process.poll() is None and self.kills.total() < kills:
                process = self._disturb(sweep, process)
            process = self._until_over(process, sweep)
            self._judge(sweep, expected)

    def _start(self, *, lanes: int) -> tuple[str, subprocess.Popen[str]]:
        sweep = run_id(time.time())
        self._journal(sweep).mkdir(parents=True)
        process = self.orc.start(
            "sweep", *self.options, f"--run-id={sweep}", "train=searched:train",
            "lr=loguniform(1e-3,1.0)", "width=choice(4,8,16)",
            f"epochs={int(MILESTONES[-1])}", f"pause={self.pause}", f"journal={self._journal(sweep)}",
            f"sweep.samples={self.trials}", "sweep.scheduler=asha", f"sweep.concurrency={lanes}",
            "sweep.objective=[loss:min]", "sweep.restarts=20", "resources.workers=2", "resources.cpus_per_worker=0.5",
            "failures.max_repeats=0",
        )  # fmt: skip
        self._until(lambda: self._jobs_begun(sweep) > 0, process, "the first trial begins")
        return sweep, process

    def _until_over(self, process: subprocess.Popen[str], sweep: str) -> subprocess.Popen[str]:
        """Waits for its driver; one that went for what was killed is followed by the next one."""
        while True:
            said = self._said(process)
            if process.returncode == 0:
                return process
            if self.store.run(sweep).status is RunStatus.finished and process.returncode != -signal.SIGKILL:
                assert "there is nothing left to resume" in said, said  # the kill came after its last word
                return process
            assert self.kills.total(), f"nobody killed anything, and the driver ended with {process.returncode}: {said}"
            process = self._resume(sweep)

    def _resume(self, sweep: str) -> subprocess.Popen[str]:
        begun = self._jobs_begun(sweep)
        process = self.orc.start("sweep", "resume", *self.options, sweep)
        self._until(
            lambda: self._jobs_begun(sweep) > begun or process.poll() is not None, process, "the sweep goes on",
            may_end=True,
        )  # fmt: skip
        return process

    # -- kills

    def _disturb(self, sweep: str, process: subprocess.Popen[str]) -> subprocess.Popen[str]:
        """One kill, at a moment by lot, and the driver that is there afterwards."""
        time.sleep(self.random.random() * MOST_PAUSE)  # when the kill comes, not a wait for anything
        (victim,) = self.random.choices(list(self.weights), list(self.weights.values()))
        if process.poll() is not None:
            return process
        begun = self._jobs_begun(sweep)
        if not self._kill(victim, sweep, process):
            return process
        self.kills[victim] += 1
        print(f"kill {self.kills.total()}: {victim}, after {begun} starts of ranks in sweep {self.sweeps}", flush=True)
        if victim == "driver":
            process.wait()
            return self._resume(sweep)
        if victim == "head":
            self._said(process)  # it ends by itself: there is nothing left to drive
            self.orc("up", timeout=240)
            return self._resume(sweep)
        self._until(
            lambda: self._jobs_begun(sweep) > begun or process.poll() is not None, process, f"on after the {victim}",
            may_end=True,
        )  # fmt: skip
        return process

    def _kill(self, victim: str, sweep: str, process: subprocess.Popen[str]) -> bool:
        """Whether there was somebody to kill."""
        if victim == "driver":
            process.kill()
            return True
        if victim == "head":
            doomed = [found for found in self._of_ray() if _name(found) in ("gcs_server", "raylet")]
        elif victim in ("tracker", "desk"):
            title = {"tracker": "ray::TrackerProcess", "desk": "ray::LaneDesk"}[victim]
            doomed = [found for found in self._of_ray() if _title(found).startswith(title)]
        else:
            doomed = self._workers(sweep)
            if victim == "worker" and doomed:
                doomed = [self.random.choice(doomed)]
        for found in doomed:
            with suppress(psutil.NoSuchProcess):
                found.send_signal(signal.SIGKILL)
        psutil.wait_procs(doomed, timeout=20)
        return bool(doomed)

    def _of_ray(self) -> list[psutil.Process]:
        from cluster import ray_head

        return ray_head.parts(self.orc.home)

    def _workers(self, sweep: str) -> list[psutil.Process]:
        """Those that have said they train, and live: of one lane, where there are more."""
        by_run: dict[str, list[psutil.Process]] = {}
        for line in self._began(sweep):
            with suppress(psutil.Error):
                process = psutil.Process(line["pid"])
                if process.create_time() <= line["at"] and process.status() != psutil.STATUS_ZOMBIE:
                    by_run.setdefault(line["run"], []).append(process)
        return (
            list({process.pid: process for process in by_run[self.random.choice(sorted(by_run))]}.values())
            if by_run
            else []
        )

    # -- what is compared

    def table(self, sweep: str) -> Table:
        return table_of(self.store, sweep)

    def _judge(self, sweep: str, expected: Table | None) -> None:
        found = self.table(sweep)
        if expected is not None:
            self._say(sweep, [f"{a} became {b}" for a, b in zip(expected, found, strict=False) if a != b])
            self._say(sweep, [f"{len(found)} trials, not {len(expected)}"] if len(found) != len(expected) else [])
        rows = self.store.sweep_trials(sweep)
        self._say(sweep, [f"{len(rows)} trials, not {self.trials}"] if len(rows) != self.trials else [])
        for row in rows:
            budget = MILESTONES[row.rung] if 0 <= row.rung < len(MILESTONES) else None
            if row.resource != budget:
                self._say(sweep, [f"trial {row.number} had {row.resource} epochs at rung {row.rung}"])
        jobs = Counter((job.trial, job.repeat, job.rung) for job in self.store.sweep_jobs(sweep))
        self._say(
            sweep, [f"trial {key[0]} has {count} jobs at rung {key[2]}" for key, count in jobs.items() if count > 1]
        )
        with suppress(AssertionError):
            self.orc("sweep", "verify", sweep)
            return
        self._say(sweep, [self.orc("sweep", "verify", sweep, code=None)])

    def _say(self, sweep: str, problems: Sequence[str]) -> None:
        self.problems += [f"{sweep}: {problem}" for problem in problems]

    # -- details

    def _journal(self, sweep: str) -> Path:
        return self.directory / sweep

    def _began(self, sweep: str) -> list[dict[str, Any]]:
        path = self._journal(sweep) / "began"
        # A killed rank may have left half a line.
        lines = path.read_text().splitlines() if path.exists() else []
        found = []
        for line in lines:
            with suppress(ValueError):
                found.append(json.loads(line))
        return found

    def _jobs_begun(self, sweep: str) -> int:
        return len(self._began(sweep))

    def _until(
        self, what: Callable[[], bool], process: subprocess.Popen[str], why: str, *, may_end: bool = False
    ) -> None:
        def seen() -> bool:
            assert may_end or process.poll() is None, self._said(process)
            return what()

        try:
            wait_until(seen, LONGEST, why)
        except AssertionError as error:
            process.kill()
            raise AssertionError(f"{error}\n{self._said(process)}") from None

    def _said(self, process: subprocess.Popen[str]) -> str:
        try:
            out, err = process.communicate(timeout=LONGEST)
        except subprocess.TimeoutExpired:
            process.kill()
            out, err = process.communicate()
            raise AssertionError(f"a driver has not ended within {LONGEST} s\n{out}\n{err}") from None
        return f"{out}\n{err}"


def table_of(store: Store, sweep: str) -> Table:
    """What a sweep came to, to the last bit of every score."""
    return [
        (
            row.number, json.dumps(row.values, sort_keys=True), row.status, row.rung, row.resource, repr(row.score),
            row.n, json.dumps(row.scores, sort_keys=True),
        )
        for row in store.sweep_trials(sweep)
    ]  # fmt: skip


def _title(process: psutil.Process) -> str:
    with suppress(psutil.Error):
        return (process.cmdline() or [""])[0]
    return ""


def _name(process: psutil.Process) -> str:
    with suppress(psutil.Error):
        return process.name()
    return ""


def report(campaign: Campaign, seed: int, seconds: float) -> str:
    kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(campaign.kills.items()))
    verdict = "\n".join(("BROKEN", *campaign.problems[:20])) if campaign.problems else "nothing differs"
    return (
        f"seed {seed}: {campaign.kills.total()} kills landed ({kinds}) in {campaign.sweeps} sweeps on "
        f"{campaign.lanes} lanes; {verdict}; {seconds:.0f} s"
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.plugins.sweep_campaign", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--lanes", type=int, default=1)
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--only", default=",".join(WEIGHTS), help="what is killed")
    given = parser.parse_args(argv)
    seed = random.SystemRandom().randrange(1 << 32) if given.seed is None else given.seed
    print(f"seed {seed}", flush=True)
    directory = Path(tempfile.mkdtemp(prefix="orct-"))
    weights = {name: WEIGHTS[name] for name in given.only.split(",")}
    begun = time.monotonic()
    try:
        with OwnStack() as own:
            own.orc("up", "ray.num_cpus=2")
            campaign = Campaign(
                Orc(own), directory, random.Random(seed), lanes=given.lanes, trials=given.trials, weights=weights
            )
            expected = campaign.undisturbed() if given.lanes == 1 else None
            campaign.go(given.kills, expected)
            print(report(campaign, seed, time.monotonic() - begun), flush=True)
            return 1 if campaign.problems else 0
    finally:
        shutil.rmtree(directory, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
