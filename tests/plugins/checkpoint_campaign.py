"""Random SIGKILLs against trainings that save all the time, and what could be loaded after each of them.

    python -m tests.plugins.checkpoint_campaign --kills 200 [--seed N] [--contender ours|dcp|dcp-async|ray|all]

The state of the training is a function of its step, so that whatever a restart loads is judged bit by bit. Killed are
one rank or all of them, the writer, or both; half of the kills with one rank, half with two. No checkpoint that was
ever told as committed may be gone, nothing wrong may be loaded. The same is done to torch.distributed.checkpoint and to
Ray Train's own checkpoints; one table shows how they do. Exit code 1 if ours lost or loaded anything wrong.
"""

from __future__ import annotations

import argparse
import random
import shutil
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from orchestrator.backends.storage import Storage
from orchestrator.checkpoints import catalog
from orchestrator.checkpoints.reader import verify
from tests.plugins.checkpoint_training import CONTENDERS, Journal, Place, Processes, dcp_steps, forked, stranger, wait
from tools.bench import rows

VICTIMS = {"one rank": 35, "all ranks": 25, "writer": 25, "ranks and writer": 15}
MOST_PAUSE = 0.25
"""Seconds between the begin of a training, or the last kill, and the next kill, at most."""
EARLY, LATE = 0.1, 0.6
"""Share of the kills that do not wait until the training has begun, and of the others that wait for its first
checkpoint: on a slow machine there would be none to lose."""


@dataclass
class Score:
    """What became of one contender with one number of ranks."""

    contender: str
    world_size: int
    kills: Counter[str] = field(default_factory=Counter)
    inside: int = 0
    """Kills while a save was under way: begun, and not yet told as committed, skipped or failed."""
    loads: int = 0
    """Restarts that loaded something, each rank counted."""
    corrupt: int = 0
    """Loads of which a bit was wrong."""
    refused: int = 0
    """What called itself complete and could not be loaded."""
    lost: int = 0
    """Restarts that found nothing as new as what had been told as committed."""
    committed: int = 0
    steps_lost: list[int] = field(default_factory=list)
    half_visible: int = 0
    """What calls itself complete in the end, and is not."""
    unfinished: int = 0
    partial: int = 0
    left_after_sweep: int = 0
    seconds: float = 0.0

    @property
    def name(self) -> str:
        return f"{self.contender}, {self.world_size} rank{'s' if self.world_size > 1 else ''}"

    def is_clean(self) -> bool:
        return not (self.corrupt or self.lost or self.refused or self.half_visible)


@dataclass
class Campaign:
    """Kills and starts one contender until enough kills landed."""

    contender: str
    world_size: int
    directory: Path
    random: random.Random

    def __post_init__(self) -> None:
        slabs = None
        if self.contender == "ours":
            # In memory if there is any: as trainings have it.
            at = "/dev/shm" if Path("/dev/shm").is_dir() else None
            self._memory = Path(tempfile.mkdtemp(prefix="orct-", dir=at))
            slabs = self._memory / "r"
        self.directory.mkdir(parents=True)
        self.place = Place(directory=self.directory, slabs=slabs)
        self.score = Score(contender=self.contender, world_size=self.world_size)
        self._victims = {who: weight for who, weight in VICTIMS.items() if slabs or "writer" not in who}
        if self.world_size == 1:
            self._victims.pop("all ranks")
        self._newest_told: tuple[int, int] = (0, 0)
        """Attempt and step: what must be there from now on, or something newer."""
        self._noted = 0
        """Lines of the journal that went into it."""
        self._judged: set[int] = set()
        """Attempts."""

    def go(self, kills: int, seconds: float = 3600.0) -> Score:
        """Until so many kills landed, but not longer than that."""
        began = time.monotonic()
        try:
            with Processes(self.place, CONTENDERS[self.contender], self.world_size) as processes:
                processes.start()
                while self.score.kills.total() < kills and time.monotonic() - began < seconds:
                    self._kill_once(processes)
                self._come_up(processes)  # the last kill is judged too
                processes.kill_ranks()
                self._settle(processes)
            self._look_at_what_is_left()
        finally:
            if self.place.slabs is not None:
                shutil.rmtree(self._memory)
        self.score.committed = sum(line["what"] == "committed" and line["own"] for line in processes.journal.lines())
        self.score.seconds = time.monotonic() - began
        return self.score

    # -- killing

    def _kill_once(self, processes: Processes) -> None:
        if self.random.random() >= EARLY:
            self._come_up(processes)
            if self.random.random() < LATE:
                processes.wait_for(partial(self._has_saved, processes), "it saves")
        time.sleep(self.random.random() * MOST_PAUSE)  # when the kill comes, not a wait for anything
        (victim,) = self.random.choices(list(self._victims), list(self._victims.values()))
        if victim == "writer":
            self._kill_writer(processes)
            return
        ranks = range(self.world_size) if victim == "all ranks" else [self.random.randrange(self.world_size)]
        landed = processes.kill_ranks(*ranks)
        if victim == "ranks and writer":
            landed &= processes.kill_writer()
        self._count(victim, landed, processes)
        reached = self.place.progress() if processes.attempt in self._judged else 0
        if not processes.writer and self.place.slabs is not None:
            processes.start_writer()
        processes.start()
        if self.random.random() >= EARLY:
            self._come_up(processes)
            if reached:
                self.score.steps_lost.append(max(reached - min(line["step"] for line in processes.resumed()), 0))

    def _has_saved(self, processes: Processes) -> bool:
        return any(
            line["what"] == "committed" and line["own"] and line["attempt"] == processes.attempt
            for line in reversed(processes.journal.lines())
        )

    def _kill_writer(self, processes: Processes) -> None:
        """The training goes on; the next writer commits what this one left, and what comes."""
        self._count("writer", processes.kill_writer(), processes)
        committed = self._committed(processes.journal)
        processes.start_writer()
        processes.wait_for(lambda: self._committed(processes.journal) > committed, "the next writer commits")
        self._load_beside(processes)

    def _count(self, victim: str, landed: bool, processes: Processes) -> None:
        if not landed:
            raise AssertionError(f"a process had ended by itself: {self.place.said()}")
        lines = [line for line in processes.journal.lines() if line.get("attempt") == processes.attempt]
        ended = {line["step"] for line in lines if line["what"] in ("committed", "skipped", "failed")}
        begun = {line["step"] for line in lines if line["what"] == "begin"}
        self.score.kills[victim] += 1
        self.score.inside += bool(begun - ended)

    def _committed(self, journal: Journal) -> int:
        return sum(line["what"] == "committed" for line in journal.lines())

    # -- judging

    def _come_up(self, processes: Processes) -> None:
        """The attempt has loaded what it found, on all ranks; that is judged, once."""
        if processes.attempt in self._judged:
            return
        processes.wait_for(lambda: len(processes.resumed()) == self.world_size, "it is resumed")
        self._judged.add(processes.attempt)
        self._note_what_was_told(processes)
        for line in processes.resumed():
            self.score.loads += line["step"] > 0
            self.score.corrupt += not line["right"]
        loaded = {(line["of"], line["step"]) for line in processes.resumed()}
        self.score.corrupt += len(loaded) > 1  # ranks that go on from different steps
        self.score.lost += min(loaded) < self._newest_told
        self._newest_told = min(loaded)  # a loss is counted once

    def _note_what_was_told(self, processes: Processes) -> None:
        """By attempts that are over."""
        lines = processes.journal.lines()
        while self._noted < len(lines) and lines[self._noted].get("attempt", 0) < processes.attempt:
            line, self._noted = lines[self._noted], self._noted + 1
            if line["what"] == "committed":
                self._newest_told = max(self._newest_told, (line["of"], line["step"]))

    def _load_beside(self, processes: Processes) -> None:
        """While the training goes on: a stranger loads the newest."""
        told = max((line["of"], line["step"]) for line in processes.journal.lines() if line["what"] == "committed")
        pid = forked(partial(stranger, self.place), self.place.output)
        assert wait(pid) == 0, self.place.said()
        (*_, loaded) = (line for line in processes.journal.lines() if line["what"] == "loaded")
        self.score.loads += 1
        self.score.corrupt += not loaded["right"]
        self.score.refused += len(loaded["skipped"])
        self.score.lost += (loaded["of"], loaded["step"]) < told

    # -- the end

    def _settle(self, processes: Processes) -> None:
        """What was sealed is written."""
        if self.place.slabs is None:
            return
        from orchestrator.checkpoints.local.client import SlabClient

        client = SlabClient(str(self.place.slabs), may_start=False)
        processes.wait_for(lambda: client.health()["pending"] == 0, "all that was sealed is written")

    def _look_at_what_is_left(self) -> None:
        storage = Storage(str(self.place.storage))
        self.score.partial = self._partial()
        if self.contender != "ours":
            complete = {f"step_{step}" for step in dcp_steps(self.place.storage)}
            self.score.unfinished = len({path.name for path in self.place.storage.glob("step_*")} - complete)
            self.score.left_after_sweep = self.score.unfinished
            return
        found = catalog.scan(storage)
        self.score.unfinished = len(found.incomplete)
        self.score.half_visible = len(found.corrupt) + sum(
            bool(verify(storage.join(manifest.name), manifest)) for manifest in found.committed
        )
        later = time.time() + 7200
        catalog.sweep(storage, attempt=1 << 20, now=later)
        catalog.sweep_partial(storage, now=later)
        self.score.left_after_sweep = self._partial() + len(catalog.scan(storage).incomplete)

    def _partial(self) -> int:
        return sum(1 for pattern in ("*.partial", "*.tmp") for _ in self.place.storage.rglob(pattern))


# -- what is said ------------------------------------------------------------------------------------------------------

LINES: Sequence[tuple[str, str]] = (
    ("kills", "kills"), ("inside", "… inside a save"), ("committed", "checkpoints committed"),
    ("loads", "loads judged bit by bit"), ("corrupt", "corrupt loads"), ("lost", "committed ones lost"),
    ("refused", "complete ones that do not load"), ("half_visible", "half ones that look complete"),
    ("steps", "steps lost, median (most)"), ("unfinished", "unfinished directories left"),
    ("partial", "temporary files left"), ("left_after_sweep", "left after a sweep"), ("seconds", "seconds"),
)  # fmt: skip


def table(scores: Sequence[Score]) -> str:
    widths = [max(len(score.name), 10) for score in scores]
    lines = ["  ".join([" " * 32, *(score.name.rjust(width) for score, width in zip(scores, widths, strict=True))])]
    for key, text in LINES:
        cells = [_cell(score, key).rjust(width) for score, width in zip(scores, widths, strict=True)]
        lines.append("  ".join([text.ljust(32), *cells]))
    for score in scores:
        lines.append(f"{score.name}: " + ", ".join(f"{count} × {who}" for who, count in sorted(score.kills.items())))
    return "\n".join(lines)


def _cell(score: Score, key: str) -> str:
    if key == "kills":
        return f"{score.kills.total()}"
    if key == "steps":
        return f"{statistics.median(score.steps_lost):g} ({max(score.steps_lost)})" if score.steps_lost else "-"
    return f"{getattr(score, key):.0f}"


def measured(scores: Sequence[Score]) -> list[rows.Row]:
    made = []
    for score in scores:
        is_ours = score.contender == "ours"
        for key in ("corrupt", "lost", "refused", "half_visible"):
            bar = f"{score.name}: {dict(LINES)[key]}"
            value = float(getattr(score, key))
            made.append(rows.at_most(bar, value, 0.0) if is_ours else rows.printed(bar, value))
        share = score.inside / max(score.kills.total(), 1)
        made.append(rows.printed(f"{score.name}: kills", float(score.kills.total())))
        made.append(rows.printed(f"{score.name}: share of kills inside a save", share))
        made.append(rows.printed(f"{score.name}: loads judged", float(score.loads)))
        if score.steps_lost:
            made.append(rows.printed(f"{score.name}: steps lost, median", float(statistics.median(score.steps_lost))))
        made.append(rows.printed(f"{score.name}: left after a sweep", float(score.left_after_sweep)))
    return made


def run(contender: str, kills: int, seconds: float, seed: int, directory: Path) -> Iterator[Score]:
    if contender == "ray":
        from tests.plugins import checkpoint_campaign_ray

        yield checkpoint_campaign_ray.go(kills, seconds, random.Random(seed), directory / "ray")
        return
    for world_size, count in ((1, kills // 2), (2, kills - kills // 2)):
        place = directory / f"{contender}-{world_size}"
        yield Campaign(contender, world_size, place, random.Random(seed + world_size)).go(count, seconds / 2)


DEFAULT_KILLS: Mapping[str, int] = {"ours": 200, "dcp": 200, "dcp-async": 100, "ray": 15}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.plugins.checkpoint_campaign", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--kills", type=int, default=0, help="by default 200; 100 of dcp-async, 15 of ray")
    parser.add_argument("--seconds", type=float, default=3600.0, help="for each contender not longer than that")
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--contender", choices=[*DEFAULT_KILLS, "all"], default="all")
    parser.add_argument("--keep", action="store_true", help="leave the data for whoever looks into a failure")
    arguments = parser.parse_args(argv)
    seed = random.SystemRandom().randrange(1 << 32) if arguments.seed is None else arguments.seed
    print(f"seed {seed}", flush=True)
    directory = Path(tempfile.mkdtemp(prefix="orct-"))
    scores: list[Score] = []
    try:
        for contender in DEFAULT_KILLS if arguments.contender == "all" else [arguments.contender]:
            kills = arguments.kills or DEFAULT_KILLS[contender]
            for score in run(contender, kills, arguments.seconds, seed, directory):
                scores.append(score)
                rows.save("checkpoint-campaign", measured([score]))
                print(table([score]), flush=True)
        print()
        print(table(scores))
        made = measured(scores)
        print(rows.table([row for row in made if row.required is not None]))
        return int(any(not score.is_clean() for score in scores if score.contender == "ours"))
    finally:
        if not arguments.keep:
            shutil.rmtree(directory, ignore_errors=True)
        else:
            print(directory)


if __name__ == "__main__":
    sys.exit(main())
