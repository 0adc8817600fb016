"""What stands in spools, as the agent reads it; and a spool to damage."""

from __future__ import annotations

from pathlib import Path

from orchestrator.records import LOST, Fact, FactKind, Stream
from orchestrator.tracking.logger import Logger
from orchestrator.tracking.spool import SpoolReader, spools
from orchestrator.tracking.spool_layout import PAGE_POINTS

POINTS = 2 * PAGE_POINTS + 20
FACTS = 3


def readers(tmp_path: Path) -> list[SpoolReader]:
    return [SpoolReader(directory) for directory in spools(tmp_path / "spools")]


def logged(reader: SpoolReader) -> list[tuple[str, int, float]]:
    found: list[tuple[str, int, float]] = []
    while (batch := reader.next_batch(Stream.points, len(found))) is not None:
        found += [(batch.keys[p["key"]], int(p["step"]), float(p["value"])) for p in batch.points()]
    return found


def wanted() -> list[tuple[str, int, float]]:
    return [(("loss", "accuracy", "µ")[number % 3], number, number / 7) for number in range(POINTS)]


def left_spool(root: Path) -> Path:
    """The spool of a producer that is gone: two sealed pages, twenty points more, three facts."""
    logger = Logger(root, run="r1", attempt=1, rank=0)
    for key, step, value in wanted():
        logger.log({key: value}, step=step)
    for number in range(FACTS):
        logger.fact(Fact(kind=FactKind.tag, at=float(number), data={"name": f"t{number}", "value": "x"}))
    logger.close()
    return logger._spool.directory


def points_of(directory: Path) -> list[tuple[str, int, float] | None]:
    """What is shipped; None for what is lost."""
    reader = SpoolReader(directory)
    assert reader.owner.run == "r1"
    reader.settle()
    found: list[tuple[str, int, float] | None] = []
    while (batch := reader.next_batch(Stream.points, len(found), limit=100)) is not None:
        assert len(found) <= 2 * POINTS, "it ends"
        for point in batch.points().tolist():
            key, flags, step, time, value = point
            assert flags in (0, LOST)
            if flags == LOST:
                assert (key, step, time, value) == (0, 0, 0.0, 0.0)
            found.append(None if flags == LOST else (batch.keys[key], step, value))
    return found


def facts_of(directory: Path) -> list[str | None]:
    reader = SpoolReader(directory)
    reader.settle()
    found: list[str | None] = []
    while (batch := reader.next_batch(Stream.facts, len(found), limit=2)) is not None:
        assert len(found) <= 2 * FACTS + 20, "it ends"
        for fact in batch.facts():
            is_lost = fact.kind is FactKind.event and fact.data["kind"] == "lost_fact"
            found.append(None if is_lost else fact.data["name"])
    return found
