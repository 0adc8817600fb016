"""`orc fsck`: is everything there, and does it fit together? In the database and in the files of this host.

The database: see store/integrity.py. The files: spools whose producer is dead and which nobody ships, spools that
cannot be read, what a tracker's log holds that is not committed, and damage in it. May be asked while everything runs.
`deliver` moves what was left into the database: the classes that do it every day, in this process.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from orchestrator.errors import UserError
from orchestrator.records import BadFrame, Batch, Stream
from orchestrator.store.integrity import Counts, Problem, Progress, Trouble
from orchestrator.store.store import Store
from orchestrator.tracking.service import TrackerService
from orchestrator.tracking.shipper import Shipper, Turn
from orchestrator.tracking.spool import SpoolReader, SpoolUnusable, spools
from orchestrator.tracking.wal import LogInUse, LogView

DELIVER_TIMEOUT = 600.0
"""Seconds without any progress after which a repair gives up."""
PRODUCERS_AT_ONCE = 5000


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """The files of one tracker and its agent on this host."""

    spools: Path
    log: Path


@dataclass(slots=True, kw_only=True)
class Files:
    """What was looked at on this host."""

    living: int = 0
    """Producers that log now."""
    left: int = 0
    """Spools of dead producers."""
    waiting: int = 0
    """Entries in these spools that are not committed."""
    frames: int = 0
    """Batches in trackers' logs."""


@dataclass(frozen=True, kw_only=True)
class Report:
    counts: Counts
    files: Files = field(default_factory=Files)
    problems: tuple[Problem, ...] = ()

    @property
    def points(self) -> int:
        return self.counts.points

    @property
    def is_sound(self) -> bool:
        return all(problem.is_repaired for problem in self.problems)


def check(
    store: Store, places: Sequence[Place] = (), *, run: str | None = None, progress: Progress | None = None
) -> Report:
    """Raises NotFound, ServiceUnavailable."""
    verdict = store.check_integrity(run, progress=progress)
    files, found = Files(), list(verdict.problems)
    for place in places:
        found += [*_of_spools(store, place, run, files), *_of_log(store, place, run, files)]
    return Report(counts=verdict.counts, files=files, problems=tuple(found))


def repair(
    store: Store, places: Sequence[Place] = (), *, database_url: str, user: str, run: str | None = None,
    progress: Progress | None = None,
) -> Report:  # fmt: skip
    """Mends what can be mended and looks again: problems that are gone are in the report as repaired."""
    before = check(store, places, run=run, progress=progress)
    for place in places:
        if any(problem.fix.get("place") == place and problem.repair for problem in before.problems):
            _put_aside(place, before.problems)
            deliver(store, place, database_url)
    mended = store.repair_integrity(sorted({p.run for p in before.problems if p.run}), user=user, now=time.time())
    after = check(store, places, run=run, progress=progress)
    left = {str(problem) for problem in after.problems}
    repaired = {str(problem): problem for problem in (*mended, *before.problems) if str(problem) not in left}
    gone = [_repaired(problem) for problem in repaired.values()]
    return Report(counts=after.counts, files=after.files, problems=(*gone, *after.problems))


def _repaired(problem: Problem) -> Problem:
    return Problem(
        trouble=problem.trouble, run=problem.run, where=problem.where, what=problem.what, repair=problem.repair,
        is_repaired=True,
    )  # fmt: skip


# -- spools ------------------------------------------------------------------------------------------------------------


def _of_spools(store: Store, place: Place, run: str | None, files: Files) -> Iterator[Problem]:
    left = []
    for directory in spools(place.spools):
        try:
            reader = SpoolReader(directory)
            is_owned = reader.is_owned()
        except (SpoolUnusable, OSError) as error:
            if run is None and directory.exists():
                yield Problem(
                    trouble=Trouble.spool, run="", where=str(directory), what=f"this spool cannot be read: {error}",
                    repair="it is put aside, with a dot before its name", fix={"place": place, "aside": directory},
                )  # fmt: skip
            continue
        if run not in (None, reader.owner.run):
            continue
        if is_owned:
            files.living += 1
        else:
            files.left += 1
            left.append(reader)
    if not left:
        return
    is_shipped = _is_shipped(place)
    known = store.known_runs({reader.owner.run for reader in left})
    for start in range(0, len(left), PRODUCERS_AT_ONCE):
        some = left[start : start + PRODUCERS_AT_ONCE]
        stored = store.watermarks([reader.producer for reader in some])
        for reader in some:
            reader.settle()
            waiting = sum(max(reader.logged(s) - stored.get((reader.producer, s), 0), 0) for s in Stream)
            reader.rest()
            files.waiting += waiting
            owner = f"rank {reader.owner.rank} of run {reader.owner.run}"
            if reader.owner.run not in known:
                yield Problem(
                    trouble=Trouble.spool, run="", where=str(reader.directory),
                    what=f"{waiting} entries of {owner}, which this database does not know; the spool is kept",
                )  # fmt: skip
            elif waiting and not is_shipped:
                yield Problem(
                    trouble=Trouble.spool, run=reader.owner.run, where=str(reader.directory),
                    what=f"{waiting} entries of {owner} wait, its producer is dead, and nobody ships them (`orc up`)",
                    repair="they are shipped and committed", fix={"place": place},
                )  # fmt: skip


def _is_shipped(place: Place) -> bool:
    """An agent has this directory."""
    turn = Turn(place.spools)
    try:
        return not turn.is_mine()
    except OSError:
        return False
    finally:
        turn.end()


def _put_aside(place: Place, problems: Sequence[Problem]) -> None:
    for problem in problems:
        directory = problem.fix.get("aside")
        if directory is not None and problem.fix["place"] == place:
            directory.rename(directory.with_name(f".{directory.name}.unreadable"))


# -- logs --------------------------------------------------------------------------------------------------------------


def _of_log(store: Store, place: Place, run: str | None, files: Files) -> Iterator[Problem]:
    if not place.log.is_dir():
        return
    view, unreadable = LogView(place.log), 0
    last: dict[str, dict[Stream, int]] = {}
    run_of: dict[str, str] = {}
    for frame in view.frames():
        try:
            batch = Batch.decode(frame)
        except BadFrame:
            unreadable += 1
            continue
        if run not in (None, batch.run):
            continue
        files.frames += 1
        marks = last.setdefault(batch.producer, dict.fromkeys(Stream, 0))
        marks[batch.stream] = max(marks[batch.stream], batch.last)
        run_of[batch.producer] = batch.run
    stored = store.watermarks(last)
    waiting = {
        producer: sum(max(marks[s] - stored.get((producer, s), 0), 0) for s in Stream)
        for producer, marks in last.items()
    }
    behind = sum(waiting.values())
    is_owned = view.is_owned()
    known = store.known_runs({run_of[producer] for producer, count in waiting.items() if count})
    strange = {run_of[producer] for producer, count in waiting.items() if count and run_of[producer] not in known}
    if strange:
        yield Problem(
            trouble=Trouble.log, run="", where=str(place.log),
            what=f"it has entries of runs that this database does not know: {', '.join(sorted(strange)[:5])}",
        )  # fmt: skip
    elif behind and not is_owned:
        yield Problem(
            trouble=Trouble.log, run="", where=str(place.log),
            what=f"{behind} accepted entries are not committed, and no tracker runs (`orc up`)",
            repair="they are committed", fix={"place": place},
        )  # fmt: skip
    if view.damaged_bytes or unreadable:
        damage = f"{view.damaged_bytes} bytes and {unreadable} batches of the log cannot be read"
        yield Problem(
            trouble=Trouble.log, run="", where=str(place.log),
            what=f"{damage}; what was in them is asked for again, from spools that keep it until it is committed",
            repair="" if is_owned else "what is in spools is committed; the log begins anew", fix={"place": place},
        )  # fmt: skip


def deliver(store: Store, place: Place, database_url: str) -> None:
    """Ships what dead producers left and commits what the log holds, until nothing moves any more. Raises UserError
    where a tracker or an agent has these files."""
    try:
        tracker = TrackerService(place.log, database_url)
    except LogInUse as error:
        raise UserError(f"{error} It delivers what is there; look again in a moment.") from error
    agent = Shipper(place.spools, tracker)
    try:
        moved_at, before = time.monotonic(), (-1, -1)
        while time.monotonic() - moved_at < DELIVER_TIMEOUT:
            moved = agent.step()
            moved |= tracker.commit_step()
            if moved:
                moved_at = time.monotonic()
                continue
            now = (_undelivered(place), tracker.health()["lag_bytes"])
            if now == (0, 0):
                return
            if now != before:
                before, moved_at = now, time.monotonic()
            time.sleep(0.05)
    finally:
        agent.stop()
        agent.run()  # a stopped one only gives its turn back
        tracker.stop()


def _undelivered(place: Place) -> int:
    """Spools of dead producers that are not committed to the end."""
    count = 0
    for directory in spools(place.spools):
        try:
            reader = SpoolReader(directory)
            count += not (reader.is_owned() or reader.is_done())
            reader.rest()
        except (SpoolUnusable, OSError):
            continue
    return count
