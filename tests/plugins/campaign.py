"""Random SIGKILLs against real processes and a real PostgreSQL, until enough of them landed.

    python -m tests.plugins.campaign --kills 1000 --points 1000000 [--seed N]

Producers log all the time and keep their journals; producers, agent, tracker, merging, single PostgreSQL connections
and the whole server are killed at random moments and come back at once. In the end everything must be in PostgreSQL:
nothing lost, nothing doubled, no hole, no phantom. Prints what was killed and what was found; exit code 1 if it was not
so.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from cluster.postgres import EmbeddedPostgres
from orchestrator.records import RunSpec
from orchestrator.store import migrate
from orchestrator.store.store import Store
from orchestrator.tracking.spool import spools
from tests.plugins.delivery_processes import Parts
from tests.plugins.journal import Comparison, compare, logged_in

WEIGHTS = {"tracker": 30, "shipper": 25, "producer": 35, "merging": 6, "connection": 3, "postgres": 1}
PRODUCERS = 2
MOST_PAUSE = 0.12
"""Seconds between two kills, at most."""
SETTLE = 120.0


@dataclass
class Campaign:
    """A run that is logged into while its surroundings die. `go` until enough was killed and logged, then `settle`."""

    directory: Path
    postgres: EmbeddedPostgres
    database_url: str
    parts: Parts
    random: random.Random
    burst: int = 100
    weights: dict[str, int] = field(default_factory=lambda: dict(WEIGHTS))
    kills: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.store = Store(self.database_url)
        spec = RunSpec(experiment="campaign", storage_url="/tmp/runs", lease=1e6)
        self.run = self.store.open_attempt(spec, now=time.time(), lease_seconds=1e6).run
        self.spools, self.journals = self.directory / "spools", self.directory / "journals"
        self.journals.mkdir()
        self._ranks = 0
        if importlib.util.find_spec("orchestrator.tracking.merging") is None:
            self.weights.pop("merging")
        self._pids: dict[str, list[int]] = {}
        for part in ("tracker", "shipper", "merging"):
            if part in self.weights:
                self._start(part)
        for _ in range(PRODUCERS):
            self._start("producer")

    def _start(self, part: str) -> None:
        socket = str(self.directory / "socket")
        arguments: dict[str, object]
        if part == "tracker":
            arguments = {"log": str(self.directory / "log"), "database_url": self.database_url, "socket": socket}
        elif part == "shipper":
            arguments = {"spools": str(self.spools), "socket": socket}
        elif part == "merging":
            arguments = {"database_url": self.database_url}
        else:
            arguments = {
                "spools": str(self.spools), "run": self.run, "rank": self._ranks, "journal": str(self.journals),
                "burst": self.burst, "clock_offset": 86_400.0 * (self._ranks % 2),
            }  # fmt: skip
            self._ranks += 1
        self._pids.setdefault(part, []).append(self.parts.start(part, **arguments))

    def go(self, *, kills: int, seconds: float) -> None:
        """Until so many kills landed, but not longer than that."""
        deadline = time.monotonic() + seconds
        while self.kills.total() < kills and time.monotonic() < deadline:
            time.sleep(self.random.random() * MOST_PAUSE)  # when the kill comes, not a wait for anything
            (victim,) = self.random.choices(list(self.weights), list(self.weights.values()))
            self._kill(victim)

    def _kill(self, victim: str) -> None:
        if victim == "postgres":
            self._crash_server()
        elif victim == "connection":
            self._kill_connection()
        else:
            pids = self._pids[victim]
            self.parts.kill(pids.pop(self.random.randrange(len(pids))))
            self._start(victim)
            self.kills[victim] += 1

    def _crash_server(self) -> None:
        """As `pg_ctl stop -m immediate`: no checkpoint, recovery from its log."""
        pid = self.postgres.pid
        os.kill(pid, signal.SIGQUIT)
        psutil.wait_procs([psutil.Process(pid)], timeout=30) if psutil.pid_exists(pid) else None
        assert not self.postgres.is_up()
        self.kills["postgres"] += 1
        self.postgres.start()

    def _kill_connection(self) -> None:
        """SIGKILL of one server process of ours; the server then ends all and recovers."""
        with contextlib.suppress(psutil.Error):
            children = psutil.Process(self.postgres.pid).children()
            ours = [child for child in children if f" {self.store.address.rpartition('/')[2]} " in child.cmdline()[0]]
            if ours:
                self.random.choice(ours).kill()
                self.kills["connection"] += 1

    def logged(self) -> int:
        """Points that came back from `log()` so far."""
        return logged_in(self.journals)

    def settle(self) -> Comparison:
        """Producers end; what they left arrives; then everything is compared."""
        for pid in self._pids["producer"]:
            self.parts.kill(pid)
        self._pids["producer"] = []
        deadline = time.monotonic() + SETTLE
        while left := len(list(spools(self.spools))):
            assert time.monotonic() < deadline, f"{left} spools are left after {SETTLE} s: {self.parts.said()}"
            time.sleep(0.05)
        return compare(self.store, self.run, self.journals)


def report(campaign: Campaign, found: Comparison, seed: int, seconds: float) -> str:
    kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(campaign.kills.items()))
    verdict = "0 lost, 0 doubled" if not found.problems else "\n".join(("BROKEN", *found.problems[:20]))
    return (
        f"seed {seed}: {campaign.kills.total()} kills landed ({kinds}); {found.points} points and {found.facts} facts "
        f"acknowledged; {verdict}; {seconds:.0f} s"
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.plugins.campaign", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--kills", type=int, default=1000)
    parser.add_argument("--points", type=int, default=1_000_000)
    parser.add_argument("--seconds", type=float, default=3600.0, help="not longer than that")
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--keep", action="store_true", help="leave the data for whoever looks into a failure")
    arguments = parser.parse_args(argv)
    seed = random.SystemRandom().randrange(1 << 32) if arguments.seed is None else arguments.seed
    print(f"seed {seed}", flush=True)
    directory = Path(tempfile.mkdtemp(prefix="orct-"))
    directory.chmod(0o711)
    server = EmbeddedPostgres(directory / "pg")
    server.start()
    try:
        server.ensure_database("campaign")
        migrate.upgrade(server.url("campaign"))
        begun = time.monotonic()
        with Parts(directory) as parts:
            campaign = Campaign(directory, server, server.url("campaign"), parts, random.Random(seed))
            while campaign.kills.total() < arguments.kills or campaign.logged() < arguments.points:
                if time.monotonic() - begun > arguments.seconds:
                    break
                campaign.go(
                    kills=min(campaign.kills.total() + 50, max(arguments.kills, campaign.kills.total() + 1)), seconds=60
                )
                print(f"{campaign.kills.total()} kills, {campaign.logged()} points", flush=True)
            found = campaign.settle()
        print(report(campaign, found, seed, time.monotonic() - begun))
        verdict = campaign.store.check_integrity()
        print("\n".join(map(str, verdict.problems)) or f"orc fsck: {verdict.counts.points} points fit together")
        return 1 if found.problems or verdict.problems else 0
    finally:
        server.stop()
        if not arguments.keep:
            shutil.rmtree(directory, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
