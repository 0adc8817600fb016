"""What the tracker knows of producers: what is forgotten is learned again, and nothing is taken twice or skipped."""

from __future__ import annotations

import numpy as np

from orchestrator.records import POINT, Batch, Stream
from orchestrator.tracking.admission import QUIET, Admission
from orchestrator.tracking.delivery import Verdict
from orchestrator.tracking.leases import Leases
from orchestrator.tracking.progress import Progress
from orchestrator.tracking.wal import Position

P, Q = "ab" * 16, "cd" * 16
POINTS, FACTS = Stream.points, Stream.facts


def batch(first: int, last: int, producer: str = P) -> Batch:
    count = last - first + 1
    return Batch(
        producer=producer, run="r", attempt=1, rank=0, stream=POINTS, first=first, count=count, keys=("x",),
        payload=np.zeros(count, POINT).tobytes(),
    )  # fmt: skip


def learned(admission: Admission, stored: int, producer: str = P) -> None:
    admission.asking([producer])
    admission.learned({(producer, POINTS): stored, (producer, FACTS): 0}, 0.0)


def written(admission: Admission, sent: Batch, now: float = 0.0) -> Verdict | None:
    decision = admission.decide(sent, now)
    if decision is not None and decision.batch is not None:
        admission.written(decision.batch)
    return decision and decision.verdict


def accepted(admission: Admission, producer: str = P) -> tuple[int, int] | None:
    ack = admission.ack(producer, POINTS, stop=False)
    return ack and (ack.accepted, ack.committed)


def test_nothing_is_taken_or_said_of_a_producer_before_the_database_told() -> None:
    admission = Admission()
    assert written(admission, batch(1, 5)) is None
    assert accepted(admission) is None
    assert admission.unknown([P, P, Q]) == [P, Q]
    learned(admission, 3)
    assert admission.unknown([P]) == []
    assert accepted(admission) == (3, 3)
    assert written(admission, batch(1, 5)) is Verdict.accept


def test_what_is_written_is_accepted_with_the_sync_and_not_before() -> None:
    admission = Admission()
    learned(admission, 0)
    written(admission, batch(1, 5))
    assert accepted(admission) == (0, 0)
    assert written(admission, batch(6, 9)) is Verdict.accept, "the next one need not wait for the disk"
    assert written(admission, batch(1, 5)) is Verdict.duplicate
    marks = admission.marks([batch(1, 5)])
    written(admission, batch(10, 12))
    admission.accepted(marks)
    assert accepted(admission) == (9, 0), "what was written since is for the next sync"
    admission.committed({(P, POINTS): 9, (P, FACTS): 0})
    assert accepted(admission) == (9, 9)


def test_a_sync_that_ends_after_its_producer_was_forgotten_accepts_nothing() -> None:
    admission = Admission()
    learned(admission, 0)
    written(admission, batch(1, 5))
    marks = admission.marks([batch(1, 5)])
    admission.forget([P])
    admission.accepted(marks)
    assert accepted(admission) is None
    learned(admission, 0)
    admission.accepted(marks)
    assert accepted(admission) == (0, 0)


def test_an_answer_that_is_older_than_what_was_forgotten_counts_for_nothing() -> None:
    admission = Admission()
    admission.recovered(batch(1, 20), 0.0)
    admission.asking([P])  # and the database says 10
    admission.committed({(P, POINTS): 20, (P, FACTS): 0})
    admission.forget([P])
    admission.learned({(P, POINTS): 10, (P, FACTS): 0}, 0.0)
    assert accepted(admission) is None
    assert admission.unknown([P]) == [P]


def test_a_log_with_a_hole_counts_up_to_the_hole() -> None:
    admission = Admission()
    for first, last in ((11, 20), (31, 40)):
        admission.recovered(batch(first, last), 0.0)
    assert accepted(admission) == (20, 0)


def test_what_another_tracker_committed_is_accepted_here() -> None:
    """This one was frozen, with something in its log; the other one went on."""
    admission = Admission()
    learned(admission, 50)
    written(admission, batch(51, 100))
    admission.accepted(admission.marks([batch(51, 100)]))
    assert written(admission, batch(201, 210)) is Verdict.gap
    assert accepted(admission) == (100, 50), "its log is to be committed yet, nothing is forgotten"
    admission.committed({(P, POINTS): 200, (P, FACTS): 0})
    assert accepted(admission) == (200, 200)
    assert written(admission, batch(201, 210)) is Verdict.accept


def test_a_gap_where_all_is_committed_asks_the_database_again() -> None:
    """This one was frozen, with nothing in its log."""
    admission = Admission()
    learned(admission, 50)
    assert written(admission, batch(201, 210)) is Verdict.gap
    assert admission.unknown([P]) == [P]
    learned(admission, 200)
    assert written(admission, batch(201, 210)) is Verdict.accept


def test_who_is_quiet_and_done_is_forgotten_and_goes_on_where_it_was() -> None:
    admission = Admission()
    for producer in (P, Q):
        learned(admission, 0, producer)
        written(admission, batch(1, 5, producer), now=0.0)
        admission.accepted(admission.marks([batch(1, 5, producer)]))
    admission.committed({(P, POINTS): 5, (P, FACTS): 0})
    assert admission.quiet(QUIET - 1, -1e9) == []
    assert admission.quiet(QUIET + 1, -1e9) == [P], "of the other one something waits in the log"
    admission.heard([P], 100.0)
    assert admission.quiet(QUIET + 1, -1e9) == []
    assert admission.quiet(2 * QUIET + 101, -1e9) == [P]
    assert sorted(admission.quiet(9 * QUIET, 9 * QUIET)) == [P, Q], "the log was empty since: its run is not there"
    admission.forget([P])
    assert len(admission) == 1
    learned(admission, 5)
    assert written(admission, batch(4, 8)) is Verdict.accept
    admission.accepted(admission.marks([batch(4, 8)]))
    assert accepted(admission) == (8, 5)


def test_leases_expire_in_any_order_until_renewed_or_ended() -> None:
    leases = Leases(15.0)
    for number in range(100):
        leases.begin((f"r{number}", 1), now=0.0, seconds=100.0 - number)
    assert leases.expired(now=2.5) == [("r99", 1), ("r98", 1)]
    assert sorted(leases.expired(now=2.5)) == [("r98", 1), ("r99", 1)], "until something is done about them"
    assert leases.renew(("r99", 1), now=2.5)
    assert leases.expired(now=2.5) == [("r98", 1)]
    leases.end(("r98", 1))
    assert not leases.renew(("r98", 1), now=2.5), "a late sign of life does not begin it anew"
    assert leases.expired(now=2.9) == []
    assert leases.expired(now=3.6) == [("r97", 1), ("r99", 1)]
    assert len(leases) == 99


def test_a_lease_that_begins_anew_may_be_shorter() -> None:
    leases = Leases(15.0)
    leases.begin(("a", 1), now=0.0, seconds=1000.0)
    leases.begin(("a", 1), now=0.0, seconds=10.0)
    assert leases.expired(now=11.0) == [("a", 1)]
    assert leases.expired(now=11.0) == [("a", 1)]


def test_a_later_attempt_supersedes_the_ones_before_while_it_holds_its_lease() -> None:
    leases = Leases(15.0)
    for number in (1, 2, 3):
        leases.begin(("a", number), now=0.0)
    assert [leases.is_superseded(("a", number)) for number in (1, 2, 3)] == [True, True, False]
    leases.end(("a", 3))
    assert [leases.is_superseded(("a", number)) for number in (1, 2)] == [True, False]
    assert not leases.is_superseded(("b", 1))


def test_a_lag_is_the_age_of_the_oldest_that_is_not_committed() -> None:
    progress = Progress()
    for second in range(10):
        progress.look(float(second))
        progress.accepted(1000, Position(1, 100 * (second + 1)), float(second))
    assert (progress.lag_points(), progress.lag_seconds(10.0)) == (10_000, 10.0)
    progress.committed(4000, Position(1, 400))
    assert (progress.lag_points(), progress.lag_seconds(10.0)) == (6000, 6.0)
    assert progress.rates(10.0) == (1000.0, 400.0)
    progress.committed(6000, Position(1, 1000))
    assert (progress.lag_points(), progress.lag_seconds(11.0)) == (0, 0.0)


def test_a_long_outage_is_told_in_bounded_memory() -> None:
    progress = Progress()
    for number in range(9000):
        progress.accepted(1, Position(1, number + 1), float(number))
    assert len(progress._marks) <= 2001
    assert progress.lag_seconds(9000.0) == 9000.0
