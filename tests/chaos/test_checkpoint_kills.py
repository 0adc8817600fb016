"""Trainings killed before every single store and every call that changes a file, while they save.

The real engine with torch, one rank and two, through shared memory and directly. The state follows from the step, so
that whatever can be loaded afterwards is judged bit by bit.
"""

from __future__ import annotations

import os
import random
import shutil
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from orchestrator.backends.storage import Storage
from orchestrator.checkpoints import catalog
from orchestrator.checkpoints.local.client import SlabClient
from orchestrator.checkpoints.reader import verify
from orchestrator.training.group import Group
from tests.plugins.checkpoint_campaign import Campaign
from tests.plugins.checkpoint_training import (
    CONTENDERS,
    Place,
    Processes,
    Trained,
    die_at,
    engine_of,
    forked,
    meet,
    resumed,
    save,
    stranger,
    wait,
)

FULL = pytest.mark.host
SMALL = {"count": 4, "numel": 1500}


@pytest.fixture
def memory() -> Iterator[Path]:
    root = Path(tempfile.mkdtemp(prefix="orct-", dir="/dev/shm" if Path("/dev/shm").is_dir() else None))
    yield root / "r"
    shutil.rmtree(root)


def saves_once(place: Place, rank: int, world_size: int, attempt: int, *, victim: int, number: int) -> None:
    """Goes on from what there is, one step, and saves; the victim dies before its change `number` in that save."""
    if world_size > 1:
        meet(place, rank, world_size, attempt)
    journal, trained = place.journal, Trained(**SMALL)
    engine = engine_of(place, Group(rank, world_size), attempt, journal)
    found = resumed(engine, trained)
    journal.say("resumed", attempt=attempt, rank=rank, **found)
    trained.go_to(attempt)
    if rank == victim:
        die_at(number)
    save(engine, trained, attempt, waits=True)


def judged(place: Place, at_least: tuple[int, int]) -> tuple[int, int]:
    """Attempt and step of the newest that is there. A stranger loads it, every bit is right, it is what was newest
    before or newer, and nothing that is no whole checkpoint looks like one."""
    found = catalog.scan(Storage(str(place.storage)))
    assert found.corrupt == ()
    for manifest in found.committed:
        assert verify(Storage(str(place.storage)).join(manifest.name), manifest) == []
    newest = max([catalog.age_key(manifest.name)[:2] for manifest in found.committed], default=(0, 0))
    assert newest >= at_least, "a committed checkpoint is lost"
    if found.committed:
        assert wait(forked(partial(stranger, place, **SMALL), place.output)) == 0, place.said()
        (*_, loaded) = (line for line in place.journal.lines() if line["what"] == "loaded")
        assert loaded["right"]
        assert (loaded["of"], loaded["step"]) == newest, "what can be loaded is not what was committed last"
    return newest


def is_quiet(client: SlabClient) -> bool:
    return client.health()["pending"] == 0


@pytest.mark.parametrize(
    ("way", "world_size", "victim", "every"),
    [
        ("direct", 1, 0, 17),
        ("direct", 2, 1, 11),
        ("slab", 2, 0, 2),
        *[
            pytest.param(way, world_size, victim, 1, marks=FULL)
            for way in ("direct", "slab")
            for world_size, victim in ((1, 0), (2, 0), (2, 1))
        ],
    ],
)
@pytest.mark.timeout(900)
def test_a_trainer_killed_anywhere_in_a_save_costs_at_most_that_save(
    tmp_path: Path, memory: Path, way: str, world_size: int, victim: int, every: int
) -> None:
    is_direct = way == "direct"
    place = Place(directory=tmp_path, slabs=None if is_direct else memory)
    newest, kills = (0, 0), 0
    with Processes(place, saves_once, world_size) as processes:
        number = -1  # the first one lives, so that there is something to lose
        while True:
            processes.train = partial(saves_once, victim=victim, number=number)
            processes.start()
            was_killed = processes.killed_or_done(victim)
            kills += was_killed
            for line in processes.resumed():
                assert line["right"]
                assert (line["of"], line["step"]) >= newest
            if not is_direct:
                client = SlabClient(str(memory), may_start=False)
                processes.wait_for(partial(is_quiet, client), "what was sealed is written")
            newest = judged(place, newest)
            if not was_killed:
                assert newest == (processes.attempt, processes.attempt), "what was waited for is there"
                if number >= 0:
                    break
            number = number + every if number >= 0 else random.randrange(every)
            print(f"attempt {processes.attempt + 1} dies at {number}")
    assert kills >= (20 if is_direct else 2) // every, "it was killed at its changes"
    catalog.sweep(Storage(str(place.storage)), attempt=10**6, now=4e9)
    assert catalog.scan(Storage(str(place.storage))).incomplete == ()


@pytest.mark.parametrize("world_size", [1, 2])
def test_what_all_ranks_sealed_is_committed_when_the_whole_group_is_dead(
    tmp_path: Path, memory: Path, world_size: int
) -> None:
    """No writer lives while they seal, and no trainer when it is written."""
    place = Place(directory=tmp_path, slabs=memory)
    with Processes(place, CONTENDERS["ours"], world_size) as processes:
        processes.start()

        def said(what: str, **more: object) -> list[dict[str, object]]:
            wanted = {"what": what, **more}.items()
            return [line for line in processes.journal.lines() if wanted <= line.items()]

        processes.wait_for(lambda: said("committed"), "saves are committed")
        assert processes.kill_writer()
        last = len(processes.journal.lines())
        # Two slots: when a save is skipped, both hold what all ranks have sealed.
        processes.wait_for(
            lambda: [line for line in processes.journal.lines()[last:] if line["what"] == "skipped"][1:],
            "both are full",
        )
        assert processes.kill_ranks(*range(world_size))
        lines = processes.journal.lines()
        ended = {line["step"] for line in lines if line["what"] in ("committed", "skipped", "failed")}
        sealed = {line["step"] for line in lines if line["what"] == "begin"} - ended
        assert sealed
        processes.start_writer()
        client = SlabClient(str(memory), may_start=False)
        processes.wait_for(partial(client.ensure), "the next writer serves")
        processes.wait_for(partial(is_quiet, client), "what was sealed is written")
        found = catalog.scan(Storage(str(place.storage)))
        # The newest begun one may have been about to be agreed on.
        sure = sorted(sealed)[:2]
        assert set(sure) <= {manifest.step for manifest in found.committed}
        processes.train = CONTENDERS["ours"]
        processes.start()
        processes.wait_for(lambda: len(processes.resumed()) == world_size, "it is resumed")
        assert all(line["right"] and line["step"] >= max(sure) for line in processes.resumed())
        processes.kill_ranks()


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("kills", [6, pytest.param(100, marks=FULL)])
@pytest.mark.timeout(900)
def test_after_random_kills_nothing_is_wrong_and_nothing_is_lost(tmp_path: Path, world_size: int, kills: int) -> None:
    seed = int(os.environ.get("ORC_SEED") or random.SystemRandom().randrange(1 << 32))
    print(f"ORC_SEED={seed}")
    score = Campaign("ours", world_size, tmp_path / "campaign", random.Random(seed)).go(kills)
    assert score.is_clean(), score
    assert score.kills.total() == kills
    assert score.inside >= kills // 3, "kills landed while a save was under way"
    assert score.loads > 0
    assert score.left_after_sweep == 0
