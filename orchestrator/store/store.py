"""The only door to the database."""

from __future__ import annotations

import time
from collections.abc import Collection, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any
from uuid import UUID

import psycopg
from psycopg.types.json import Jsonb
from sqlalchemy import Connection

from orchestrator.alert_records import AlertRow, Claimed, NotificationRow, Posting, TurnRow, Watched
from orchestrator.errors import IllegalTransition, NotFound, SchemaMismatch
from orchestrator.records import Batch, RunSpec, RunStatus, RunTicket, Stream
from orchestrator.store import (
    alerts,
    checkpoints,
    integrity,
    interruptions,
    lags,
    levels,
    lifecycle,
    merge,
    portable,
    reading,
    removal,
    sweeps,
    transaction,
)
from orchestrator.store.cleaning import clean_json, clean_text
from orchestrator.store.connection import open_engine, parse, redacted, told
from orchestrator.store.errors import BadRecord, SequenceGap, UnknownRun, Watermarks
from orchestrator.store.key_ids import KeyIds
from orchestrator.store.locks import SessionLocks
from orchestrator.store.merge import Changes, Merged, Unmerged
from orchestrator.store.schema import schema_status
from orchestrator.store.transaction import RunIdentity
from orchestrator.store.views import (
    ArtifactRow,
    AttemptRow,
    ChangedRuns,
    CheckpointRow,
    ChunkRow,
    Curve,
    EventRow,
    ExperimentRow,
    FactChanges,
    FeedPosition,
    Interrupted,
    NoteRow,
    ParamRow,
    Points,
    RunDetail,
    RunRow,
    SinkCursor,
    SinkLag,
    SummaryRow,
    SweepDetail,
    SweepRow,
)
from orchestrator.sweep_records import (
    DecisionRow,
    JobRow,
    RequestRow,
    SweepPoll,
    SweepRecord,
    SweepSpec,
    SweepStep,
    TrialRow,
)

TRIES = 5
"""Of a transaction that PostgreSQL ended because of another one."""

MOST_RUNS = 200_000
"""Whose numbers are remembered; then all are read again as they are needed."""


class Store:
    """Runs and everything known about them, in PostgreSQL.

    Safe for threads; connects when it is first used, and again after the server was away. Every method is one
    transaction (or reads one snapshot), so a crash leaves all or nothing of it. Raises ServiceUnavailable when the
    server does not answer, SchemaMismatch when tables are missing, ConfigError for a URL that is none. `run` arguments
    are ids, unless they are called `ref`. Of what it has read it remembers only what never changes: numbers of runs and
    of metric keys; after a restore from a backup, open a new one.
    """

    def __init__(self, url: str, *, pool_size: int = 4, read_only: bool = False) -> None:
        """`read_only`: the server itself refuses every write, and ends a reader that stops reading."""
        self._url = parse(url)
        self._engine = open_engine(self._url, pool_size, read_only)
        self._locks = SessionLocks(self._engine)
        self._runs: dict[str, RunIdentity] = {}
        self._key_ids = KeyIds()

    # -- the connection ------------------------------------------------------------------------------------------------

    @property
    def address(self) -> str:
        """For people: without user and password."""
        return redacted(self._url)

    def close(self) -> None:
        self._locks.close()
        self._engine.dispose()

    def check_schema(self) -> None:
        """Raises SchemaMismatch when the database is older or newer than this code."""
        with self._reading() as connection:
            status = schema_status(connection)
        if not status.is_current:
            raise SchemaMismatch(status.found, status.head, status.is_newer)

    def ping(self) -> tuple[str, float]:
        """The server's version, and the seconds that one question takes."""
        with self._reading() as connection:
            connection.exec_driver_sql("SELECT 1")
            asked = time.perf_counter()
            version = connection.exec_driver_sql("SHOW server_version").scalar_one()
            return version.split()[0], time.perf_counter() - asked

    # -- lifecycle -----------------------------------------------------------------------------------------------------

    def open_attempt(self, spec: RunSpec, *, now: float, lease_seconds: float) -> RunTicket:
        """A new run, or the next attempt of `spec.run`, as RUNNING. An attempt that had not ended becomes CRASHED."""
        with self._writing() as connection, connection.cursor() as cursor:
            ticket = lifecycle.open_attempt(cursor, spec, now, lease_seconds)
            return replace(ticket, earlier=lifecycle.failed_before(cursor, ticket)) if ticket.attempt > 1 else ticket

    def transition(
        self, run: str, attempt: int, new: RunStatus, *, reason: str = "", error: Mapping[str, Any] | None = None,
        user: str = "", now: float,
    ) -> bool:  # fmt: skip
        """Moves the run and its attempt. False: it was there already, or a later attempt decides now.

        Raises IllegalTransition and NotFound.
        """
        with self._writing() as connection, connection.cursor() as cursor:
            outcome, old = lifecycle.move(
                cursor, run, attempt, new, reason=reason, error=error, user=user, at=lifecycle.when(now)
            )
        if outcome is lifecycle.Move.illegal:
            raise IllegalTransition(run, old.value, new.value)
        return outcome is lifecycle.Move.done

    def open_attempts(self, specs: Sequence[RunSpec], *, now: float) -> list[RunTicket]:
        """`open_attempt` for many, all or none of them: one transaction costs less than many."""
        with self._writing() as connection, connection.cursor() as cursor:
            return [lifecycle.open_attempt(cursor, spec, now, spec.lease) for spec in specs]

    def running_attempts(self, *, other_than: str = "") -> dict[tuple[str, int], float | None]:
        """Current attempts that run, with the seconds for which each said that it may be silent; without those of the
        tracker `other_than`."""
        with self._writing() as connection:
            rows = connection.execute(
                "SELECT a.run_id, a.attempt, extract(epoch FROM a.lease_until - a.started_at)::float8 FROM attempts a"
                " JOIN runs r ON r.id = a.run_id AND r.attempt = a.attempt"
                " WHERE a.ended_at IS NULL AND a.status = %s AND a.tracker IS DISTINCT FROM %s ORDER BY r.number",
                (RunStatus.running, other_than),
            )
            return {(run, attempt): seconds for run, attempt, seconds in rows}

    def still_running(self, attempts: Iterable[tuple[str, int]]) -> set[tuple[str, int]]:
        """Which of these attempts have not ended."""
        wanted = list(attempts)
        with self._writing() as connection:
            rows = connection.execute(
                "SELECT a.run_id, a.attempt FROM attempts a JOIN unnest(%s::text[], %s::int[]) AS w(run_id, attempt)"
                " USING (run_id, attempt) WHERE a.ended_at IS NULL",
                ([run for run, _ in wanted], [number for _, number in wanted]),
            )
            return {(run, attempt) for run, attempt in rows}

    def vouch(self, tracker: str, attempts: Iterable[tuple[str, int]] = ()) -> None:
        """The tracker is alive. It keeps the leases of all attempts that it ever named here, now of these as well:
        others on this database leave them alone."""
        claimed = list(attempts)
        with self._writing() as connection:
            (beats,) = connection.execute(
                "INSERT INTO trackers (id, beats) VALUES (%s, 1) ON CONFLICT (id) DO UPDATE"
                " SET beats = trackers.beats + 1, alive_at = now() RETURNING beats",
                (tracker,),
            ).fetchone()  # type: ignore[misc]
            if beats == 1:
                connection.execute("DELETE FROM trackers WHERE alive_at < now() - interval '7 days'")
            if claimed:
                connection.execute(
                    "UPDATE attempts a SET tracker = %s FROM unnest(%s::text[], %s::int[]) AS w(run_id, attempt)"
                    " WHERE a.run_id = w.run_id AND a.attempt = w.attempt AND a.ended_at IS NULL",
                    (tracker, [run for run, _ in claimed], [number for _, number in claimed]),
                )

    def vouched(self, *, other_than: str = "") -> dict[tuple[str, int], int]:
        """For each current attempt that runs, how often its tracker has shown life; 0 if it has none. Without those of
        the tracker `other_than`."""
        with self._writing() as connection:
            rows = connection.execute(
                "SELECT a.run_id, a.attempt, coalesce(t.beats, 0) FROM attempts a"
                " JOIN runs r ON r.id = a.run_id AND r.attempt = a.attempt LEFT JOIN trackers t ON t.id = a.tracker"
                " WHERE a.ended_at IS NULL AND a.status = %s AND a.tracker IS DISTINCT FROM %s",
                (RunStatus.running, other_than),
            )
            return {(run, attempt): beats for run, attempt, beats in rows}

    def request_cancel(self, run: str, *, user: str, now: float) -> None:
        """Asks the run to stop; the first one to ask is remembered. Raises NotFound."""
        with self._writing() as connection, connection.cursor() as cursor:
            found = cursor.execute(
                "SELECT attempt, cancel_requested_at FROM runs WHERE id = %s AND deleted_at IS NULL FOR UPDATE", (run,)
            ).fetchone()
            if found is None:
                raise NotFound("run", run)
            if found[1] is not None:
                return
            at = lifecycle.when(now)
            cursor.execute(
                "UPDATE runs SET cancel_requested_at = %s, cancel_requested_by = %s, updated_at = %s, updated_by = %s,"
                " xid = pg_current_xact_id() WHERE id = %s",
                (at, clean_text(user), at, clean_text(user), run),
            )
            lifecycle.add_event(
                cursor,
                run,
                attempt=found[0],
                at=at,
                kind="cancel",
                user=user,
                message=f"stop requested by {user or 'somebody'}",
            )

    def cancel_requested(self, runs: Iterable[str] | None = None) -> set[str]:
        """Which of them were asked to stop; of all that have not ended, by default."""
        of, parameters = ("ended_at IS NULL", ()) if runs is None else ("id = ANY(%s)", (list(runs),))
        with self._writing() as connection:
            rows = connection.execute(f"SELECT id FROM runs WHERE cancel_requested_at IS NOT NULL AND {of}", parameters)
            return {row[0] for row in rows}

    def set_link(self, run: str, name: str, value: Any, *, user: str = "") -> None:
        """Where the same run is found elsewhere. Example: set_link(run, "mlflow", {"run_id": "…"}). Raises NotFound."""
        with self._writing() as connection:
            changed = connection.execute(
                "UPDATE runs SET links = links || %s, updated_at = now(), updated_by = %s, xid = pg_current_xact_id()"
                " WHERE id = %s",
                (Jsonb({clean_text(name): clean_json(value)}), clean_text(user), run),
            )
            if changed.rowcount == 0:
                raise NotFound("run", run)

    # -- sweeps --------------------------------------------------------------------------------------------------------

    def open_sweep(self, spec: SweepSpec, driver: str) -> SweepRecord:
        """Makes `driver` the sweep's only one; its parent run must be there. Raises NotFound."""
        with self._writing() as connection:
            return sweeps.open_sweep(connection, spec, driver)

    def sweep_step(self, step: SweepStep, *, now: float) -> dict[int, RunTicket]:
        """Stores what a driver decided with all that follows from it, and gives the attempts that it opens, by job. The
        same step again changes nothing and gives the same. Raises SweepTaken, NotFound; see sweeps.py."""
        with self._writing() as connection:
            for tries_left in reversed(range(TRIES)):
                try:
                    with connection.pipeline():  # of thirty statements a third has an answer that is waited for
                        return sweeps.step(connection, step, now=now)
                except (psycopg.errors.DeadlockDetected, psycopg.errors.SerializationFailure):
                    connection.rollback()
                    if not tries_left:
                        raise
        raise AssertionError("unreachable")

    def sweep_poll(self, sweep: str, driver: str) -> SweepPoll:
        """What is asked of the sweep, and whether it is this driver's still. Raises NotFound."""
        with self._writing() as connection:
            return sweeps.poll(connection, sweep, driver)

    def ask_sweep(self, sweep: str, kind: str, details: Mapping[str, Any], user: str = "") -> int:
        """Asks the sweep's driver, now or when it goes on, for something; gives the request's id. Raises NotFound."""
        with self._writing() as connection:
            return sweeps.ask(connection, sweep, kind, details, user=user)

    def sweeps(self, *, limit: int = 50, offset: int = 0) -> list[SweepRow]:
        """Newest first."""
        with self._writing() as connection:
            return sweeps.sweeps(connection, limit=limit, offset=offset)

    def sweep(self, sweep: str) -> SweepDetail:
        """Raises NotFound."""
        with self._writing() as connection:
            found = sweeps.sweep(connection, sweep)
        if found is None:
            raise NotFound("sweep", sweep)
        return found

    def sweep_trials(
        self, sweep: str, *, status: str = "", after: int = -1, limit: int | None = None
    ) -> tuple[TrialRow, ...]:
        """By number, from the one behind `after`."""
        with self._writing() as connection:
            return sweeps.trials(connection, sweep, status=status, after=after, limit=limit)

    def sweep_jobs(self, sweep: str, *, after: int = -1, limit: int | None = None) -> tuple[JobRow, ...]:
        with self._writing() as connection:
            return sweeps.jobs(connection, sweep, after=after, limit=limit)

    def sweep_decisions(self, sweep: str, *, after: int = -1, limit: int | None = None) -> tuple[DecisionRow, ...]:
        """With their inputs, oldest first."""
        with self._writing() as connection:
            return sweeps.decisions(connection, sweep, after=after, limit=limit)

    def sweep_energy(self, sweep: str) -> float | None:
        """Joules that GPUs used for its trials, as far as it is recorded; None where nothing is."""
        with self._writing() as connection:
            return sweeps.energy(connection, sweep)

    def sweep_requests(self, sweep: str) -> tuple[RequestRow, ...]:
        """Oldest first, answered ones too."""
        with self._writing() as connection:
            return sweeps.requests(connection, sweep)

    # -- the exactly-once commit ---------------------------------------------------------------------------------------

    def commit(self, batches: Sequence[Batch]) -> Watermarks:
        """Stores what is new of the batches and gives the watermarks of their producers; see transaction.py.

        May be called again with anything, in any order, by anybody. Batches of one producer and stream must follow
        each other (and the watermark) without a gap: raises SequenceGap. Raises UnknownRun for runs that are not there.
        In both cases the other producers' batches are committed.
        """
        sent = transaction.by_producer(
            [transaction.named(batch) if batch.stream is Stream.points else batch for batch in batches]
        )
        wanted = {batch.run for batch in batches}
        runs = self._identities(wanted)
        unknown_runs = wanted - runs.keys()
        orphans = [producer for producer, own in sent.items() if any(batch.run in unknown_runs for batch in own)]
        for producer in orphans:
            del sent[producer]
        outcome = self._transact(sent, runs) if sent else transaction.Outcome(watermarks={}, gaps=())
        if outcome.gaps:
            raise SequenceGap(outcome.gaps, outcome.watermarks)
        if orphans:
            raise UnknownRun(tuple(sorted(unknown_runs)), tuple(orphans), outcome.watermarks)
        return outcome.watermarks

    def _transact(self, sent: Mapping[str, Sequence[Batch]], runs: Mapping[str, RunIdentity]) -> transaction.Outcome:
        every = {batch.keys for own in sent.values() for batch in own if batch.stream is Stream.points}
        tables = self._key_ids.tables(every, self._writing)
        with self._writing() as connection:
            for tries_left in reversed(range(TRIES)):
                try:
                    return transaction.transact(connection, sent, runs, tables)
                except (psycopg.errors.DeadlockDetected, psycopg.errors.SerializationFailure):
                    connection.rollback()
                    if not tries_left:
                        raise
        raise AssertionError("unreachable")

    def _identities(self, runs: set[str]) -> dict[str, RunIdentity]:
        """Of those that are there."""
        found = {run: known for run in runs if (known := self._runs.get(run)) is not None}
        unknown = runs - found.keys()
        if unknown:
            with self._writing() as connection:
                rows = connection.execute("SELECT id, number, who FROM runs WHERE id = ANY(%s)", (sorted(unknown),))
                learned = {row[0]: RunIdentity(number=row[1], user=row[2]) for row in rows}
            found.update(learned)
            if len(self._runs) + len(learned) > MOST_RUNS:
                self._runs = {}
            self._runs.update(learned)
        return found

    def watermarks(self, producers: Iterable[str]) -> Watermarks:
        """What is committed of each stream; producers that never committed anything are left out."""
        with self._writing() as connection:
            rows = connection.execute(
                "SELECT uuid, points, facts FROM producers WHERE uuid = ANY(%s)",
                ([UUID(hex=producer) for producer in producers],),
            )
            return {
                (row[0].hex, stream): mark
                for row in rows
                for stream, mark in ((Stream.points, row[1]), (Stream.facts, row[2]))
            }

    # -- reading -------------------------------------------------------------------------------------------------------

    def experiments(self, *, project: str | None = None) -> list[ExperimentRow]:
        with self._reading() as connection:
            return reading.experiments(connection, project)

    def runs(
        self, *, experiment: str | None = None, project: str | None = None, status: RunStatus | None = None,
        tags: Mapping[str, str] | None = None, search: str | None = None, limit: int = 50, offset: int = 0,
        trials: bool = True,
    ) -> list[RunRow]:  # fmt: skip
        """Newest first. `search` is part of a name or the beginning of an id. `trials`: also the runs of sweeps'
        trials."""
        with self._reading() as connection:
            ids = None if experiment is None else reading.experiment_ids(connection, experiment)
            return reading.runs(
                connection, reading.runs_query(ids, project, status, tags, search, limit, offset, trials=trials)
            )

    def run(self, ref: str) -> RunDetail:
        """By id, name or the beginning of an id. Raises NotFound and AmbiguousName."""
        with self._reading() as connection:
            return reading.run(connection, ref)

    def attempts(self, run: str) -> list[AttemptRow]:
        with self._reading() as connection:
            return reading.attempts(connection, run)

    def params(self, run: str) -> list[ParamRow]:
        with self._reading() as connection:
            return reading.params(connection, run)

    def tags(self, run: str) -> dict[str, str]:
        with self._reading() as connection:
            return reading.tags_of(connection, [run]).get(run, {})

    def notes(self, run: str) -> list[NoteRow]:
        with self._reading() as connection:
            return reading.notes(connection, run)

    def events(self, run: str, *, after: int = 0, limit: int = 1000) -> list[EventRow]:
        """Oldest first, from the one behind the id `after`."""
        with self._reading() as connection:
            return reading.events(connection, run, after, limit)

    def newest_events(self, run: str, *, before: int | None = None, limit: int) -> list[EventRow]:
        """The newest ones (older than the id `before`), oldest of them first."""
        with self._reading() as connection:
            return reading.newest_events(connection, run, before, limit)

    def checkpoints(self, run: str) -> list[CheckpointRow]:
        with self._reading() as connection:
            return reading.checkpoints(connection, run)

    def artifacts(self, run: str) -> list[ArtifactRow]:
        with self._reading() as connection:
            return reading.artifacts(connection, run)

    def summaries(self, run: str) -> list[SummaryRow]:
        """One per key and rank, by name."""
        return self.summaries_of([run])

    def summaries_of(self, runs: Sequence[str], *, keys: Sequence[str] | None = None) -> list[SummaryRow]:
        """The same for several runs at once."""
        with self._reading() as connection:
            return reading.summaries(connection, runs, keys)

    def first_summaries(
        self, runs: Sequence[str], *, groups: Sequence[Sequence[str]], without: Sequence[str] = ()
    ) -> list[SummaryRow]:
        """One of each run that has metrics: declared directions before others, keys that begin with a word of the first
        group before those of the second and the rest, then by name; of the lowest rank. Keys that begin with a word of
        `without` do not count."""
        with self._reading() as connection:
            return reading.first_summaries(connection, runs, groups, without)

    def points(self, run: str, key: str, *, rank: int | None = None, attempt: int | None = None) -> Points:
        """All points of a key, exactly as logged; empty when there are none. Raises NotFound for the run."""
        number = self._number(run)
        with self._writing() as connection:
            return reading.points(connection, number, key, rank, attempt)

    def points_of(self, run: str, keys: Sequence[str]) -> dict[str, Points]:
        """The same for several keys at once, of all ranks and attempts. Raises NotFound for the run."""
        number = self._number(run)
        with self._writing() as connection:
            return reading.points_of(connection, number, keys)

    def point_blocks(
        self, run: str, key: str, *, rank: int | None = None, attempt: int | None = None
    ) -> Generator[Points]:
        """The same points as of one moment, piece by piece; holds a connection until it is exhausted or closed."""
        number = self._number(run)
        with self._writing() as connection:
            yield from reading.point_blocks(connection, number, key, rank, attempt)

    def curve(
        self, run: str, key: str, *, rank: int = 0, attempt: int | None = None, start: int | None = None,
        stop: int | None = None, most: int = 2000,
    ) -> Curve:  # fmt: skip
        """The key's curve for a chart, in at most `most` windows: every point where there are no more than that, else
        windows of neighbours (see levels.py). `attempt` None: the newest that has the key.

        `start` and `stop` are steps, both included; windows at these ends may reach over them. Raises NotFound for the
        run; a key without points gives an empty curve.
        """
        number = self._number(run)
        with self._writing() as connection:
            return levels.curve(connection, number, key, rank, attempt, start, stop, most)

    # -- the index of checkpoints --------------------------------------------------------------------------------------

    def put_checkpoints(self, run: str, rows: Sequence[Mapping[str, Any]], *, user: str, now: float) -> int:
        """Makes rows of a run what their storage says they are; gives how many were not. A row is the data of a
        `checkpoint` fact with `attempt` and `created`. Raises NotFound for the run."""
        with self._writing() as connection, connection.cursor() as cursor:
            return checkpoints.put(cursor, run, rows, user=user, at=lifecycle.when(now))

    def mark_checkpoints(self, run: str, ids: Iterable[str], state: str, *, user: str, now: float) -> int:
        """Puts them into the state `deleted` or `quarantined`; gives how many were in another one."""
        with self._writing() as connection, connection.cursor() as cursor:
            return checkpoints.mark(cursor, run, ids, state, user=user, at=lifecycle.when(now))

    def pin_checkpoint(self, run: str, checkpoint: str, pinned: bool, *, user: str, now: float) -> bool:
        """False when the index has no such checkpoint. The mark that counts is a file beside the checkpoint."""
        with self._writing() as connection, connection.cursor() as cursor:
            return checkpoints.pin(cursor, run, checkpoint, pinned, user=user, at=lifecycle.when(now))

    def registered_checkpoints(self, run: str) -> dict[str, str]:
        """Ids of the run's checkpoints that a registered model was made from, each with the name of one."""
        with self._writing() as connection:
            return checkpoints.registered(connection, run)

    # -- the feed for sinks --------------------------------------------------------------------------------------------

    def changed_runs(self, after: int = 0) -> ChangedRuns:
        """Runs of which anything was committed since the cursor `after`; once too often at times, never too seldom."""
        with self._reading() as connection:
            return reading.changed_runs(connection, after)

    def chunks_after(self, run: str, position: FeedPosition = FeedPosition(), *, limit: int = 1000) -> list[ChunkRow]:  # noqa: B008
        """The next chunks in the feed's order; each comes once when the position of the last one is passed next."""
        number = self._number(run)
        with self._writing() as connection:
            return reading.chunks_after(connection, number, position, limit)

    def facts_after(self, run: str, cursor: int = 0) -> FactChanges:
        """What was written about the run since; the same may come again after later changes."""
        with self._reading() as connection:
            return reading.facts_after(connection, run, cursor)

    def has_facts_after(self, run: str, cursor: int) -> bool:
        """Whether `facts_after` would give anything new: one short question instead of many. Raises NotFound."""
        with self._writing() as connection:
            return reading.has_facts_after(connection, run, cursor)

    def cursor(self, sink: str, run: str = "") -> SinkCursor:
        """How far the sink is with this run; without a run, with the list of changed runs."""
        with self._reading() as connection:
            return reading.sink_cursor(connection, sink, run)

    def save_cursor(self, sink: str, run: str, cursor: SinkCursor) -> None:
        with self._writing() as connection:
            if run:  # a merge of the run that does not know of this reader yet ends first
                connection.execute(
                    "SELECT pg_advisory_xact_lock_shared(hashtextextended(%s, 0))",
                    (merge.lock_name(run.partition("/")[0]),),
                )
            connection.execute(
                "INSERT INTO sink_cursors (sink, run_id, xid, id, facts, state) VALUES (%s, %s, %s, %s, %s, %s)"
                " ON CONFLICT (sink, run_id) DO UPDATE SET xid = excluded.xid, id = excluded.id,"
                " facts = excluded.facts, state = excluded.state, updated_at = now()",
                (sink, run, cursor.position.xid, cursor.position.id, cursor.facts, Jsonb(clean_json(cursor.state))),
            )

    def sink_lags(self, run: str | None = None) -> list[SinkLag]:
        """How far each sink that ever ran is behind, by name; with a run's id, of that run alone."""
        with self._writing() as connection:
            return lags.sink_lags(connection, run)

    def try_lock(self, sink: str) -> bool:
        """True when this store holds the sink's lock. A lost connection gives it away: ask each time."""
        with told(self._url):
            return self._locks.take(f"orc.sink.{sink}")

    def unlock(self, sink: str) -> None:
        self._locks.give_back(f"orc.sink.{sink}")

    # -- keeping runs --------------------------------------------------------------------------------------------------

    def interrupted(self, since: float) -> list[Interrupted]:
        """Runs and sweeps that ended CRASHED or FAILED since then (seconds since 1970), oldest first."""
        with self._writing() as connection:
            return interruptions.interrupted(connection, since)

    def try_keep(self) -> bool:
        """True while this store's owner is the only one that brings runs of this database back. Ask each time."""
        with told(self._url):
            return self._locks.take("orc.keep")

    # -- alerts and the outbox -----------------------------------------------------------------------------------------

    def watched_runs(self, place: str) -> list[Watched]:
        """Runs that the tracker of this place watches for somebody and of which not everything is told."""
        with self._writing() as connection:
            return alerts.watched(connection, place)

    def names_of(self, runs: Collection[str]) -> dict[str, tuple[str, str]]:
        """Name and experiment of each run that is there."""
        with self._writing() as connection:
            return alerts.names_of(connection, runs)

    def put_turn(self, turn: TurnRow, place: str) -> None:
        """An alert that fired or was resolved, with its event and what is to be sent; once, however often called."""
        with self._writing() as connection, connection.cursor() as cursor:
            alerts.put_turn(cursor, turn, place)

    def put_end(self, run: str, attempt: int, postings: Sequence[Posting], place: str, *, now: float) -> None:
        """What is to be told of an attempt's end, once; nothing more is to come of it."""
        with self._writing() as connection, connection.cursor() as cursor:
            alerts.post(cursor, postings, place, now=now)
            alerts.end_watch(cursor, run, attempt)

    def put_event(
        self, run: str, *, attempt: int, kind: str, level: str, message: str, details: Mapping[str, Any], now: float
    ) -> None:
        """Nothing if the run is gone."""
        with self._writing() as connection, connection.cursor() as cursor:
            alerts.event_of(
                cursor, run, attempt=attempt, kind=kind, level=level, message=message, details=details, now=now
            )

    def claim_notifications(
        self, place: str, *, now: float, lease: float, busy: Collection[str] = (), most: int = 8
    ) -> list[Claimed]:
        """What is to be sent now, at most one to each channel; see store/alerts.py."""
        with self._writing() as connection:
            return alerts.claim(connection, place, now=now, lease=lease, busy=busy, most=most)

    def release_notifications(self, place: str, *, now: float) -> None:
        """What the process before had claimed is due again. Only one process may have the place."""
        with self._writing() as connection:
            alerts.release(connection, place, now=now)

    def next_notification(self, place: str) -> float | None:
        """When the next one is due; None if nothing waits."""
        with self._writing() as connection:
            return alerts.next_due(connection, place)

    def notification_sent(self, claimed: Claimed, *, now: float) -> None:
        with self._writing() as connection, connection.cursor() as cursor:
            alerts.sent(cursor, claimed, now=now)

    def notification_failed(self, claimed: Claimed, error: str, *, now: float, again_at: float | None) -> None:
        """`again_at` None: nobody tries again, and an event says so."""
        with self._writing() as connection, connection.cursor() as cursor:
            if again_at is None:
                alerts.given_up(cursor, claimed, error, now=now)
            else:
                alerts.try_again(cursor, claimed, error, at=again_at)

    def alerts(
        self, runs: Collection[str] | None = None, *, only_firing: bool = True, limit: int = 1000
    ) -> tuple[AlertRow, ...]:
        """Of these runs, of all by default; newest firing first."""
        with self._writing() as connection:
            return alerts.alerts(connection, runs=runs, only_firing=only_firing, limit=limit)

    def notifications(
        self, run: str | None = None, *, only_unsent: bool = True, limit: int = 1000
    ) -> tuple[NotificationRow, ...]:
        """Newest first."""
        with self._writing() as connection:
            return alerts.notifications(connection, run=run, only_unsent=only_unsent, limit=limit)

    # -- merging -------------------------------------------------------------------------------------------------------

    def merge(self, numbers: Sequence[int]) -> Merged:
        """Makes large rows of the small ones that commits left of these runs (by their numbers), as far as it is due;
        see merge.py. One transaction of about a million points at most.
        """
        with self._writing() as connection:
            return merge.merge(connection, numbers)

    def settle(self, numbers: Sequence[int]) -> frozenset[int]:
        """Stores the summaries of those runs that are over where they take least room. Gives those of which nothing
        is left to do: stored so, going on again, or removed."""
        with self._writing() as connection:
            return merge.settle(connection, numbers)

    def unmerged(self) -> list[Unmerged]:
        """Producers with rows as they were committed. Reads all of these."""
        with self._writing() as connection:
            return merge.everything(connection)

    def committed_since(self, after: int) -> Changes:
        """Who committed points since the cursor `after`, and which runs ended."""
        with self._writing() as connection:
            return merge.changed(connection, after)

    def tidy(self) -> tuple[str, ...]:
        """Gives the space of what merging took away back to the disk. Names the tables where there was much."""
        with told(self._url), self._engine.connect() as pooled:
            connection = pooled.execution_options(isolation_level="AUTOCOMMIT").connection.driver_connection
            assert connection is not None
            return merge.tidy(connection)

    # -- a whole run: copied, restored, removed ------------------------------------------------------------------------

    def known_runs(self, runs: Iterable[str]) -> set[str]:
        """Which of them the database knows, also as removed ones."""
        return set(self._identities(set(runs)))

    def whereabouts(self, runs: Iterable[str]) -> dict[str, tuple[RunStatus, str]]:
        """Status and directory of each; those that are not there (any more) are left out."""
        with self._writing() as connection:
            rows = connection.execute(
                "SELECT id, status, directory FROM runs WHERE id = ANY(%s) AND deleted_at IS NULL", (list(runs),)
            )
            return {run: (RunStatus(status), directory) for run, status, directory in rows}

    @contextmanager
    def snapshot(self, run: str) -> Iterator[portable.RunSnapshot]:
        """The run with all of its points as of one moment. While it is open nobody can remove the run.

        Raises NotFound, also when it is being removed.
        """
        name = removal.lock_name(run)
        with self._writing() as connection:
            # In a transaction of its own, and of the session: the snapshot must not be older than the lock.
            taken = connection.execute("SELECT pg_try_advisory_lock_shared(hashtextextended(%s, 0))", (name,))
            if taken.fetchone() != (True,):
                raise NotFound("run", run)
            try:
                connection.commit()
                connection.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY")
                yield portable.RunSnapshot(connection, run)
            finally:
                with suppress(psycopg.Error):  # a connection that ended has given the lock away
                    connection.rollback()
                    connection.execute("SELECT pg_advisory_unlock_shared(hashtextextended(%s, 0))", (name,))

    def restore_run(self, record: portable.Record, points: Iterable[ChunkRow]) -> tuple[str, ...]:
        """Writes a run as `snapshot` gave it, all or nothing; points in the order of `RunSnapshot.chunks`.

        Gives parents of the run that are not here. Raises RunIsThere, BadRecord.
        """
        with self._writing() as connection:
            try:
                keys = portable.declare_metrics(connection, record["metrics"])
                missing = portable.insert(connection, record, points, keys)
            except (psycopg.DataError, psycopg.IntegrityError, KeyError, TypeError, ValueError) as error:
                if isinstance(error, BadRecord):
                    raise
                raise BadRecord("its values", f"{type(error).__name__}: {str(error).splitlines()[0]}.") from error
        return missing

    def remove_run(self, run: str, *, user: str, now: float, force: bool = False) -> None:
        """Removes all that is stored about the run; its directory is then removed by the caller, who says so by
        `finish_removal`. `force`: also a run that has not ended. Raises NotFound, RunIsActive, ModelDependsOnRun,
        SweepHasTrials.
        """
        with self._writing() as connection, connection.cursor() as cursor:
            removal.remove(cursor, run, user=user, at=lifecycle.when(now), force=force)

    def trial_runs(self, sweep: str) -> list[str]:
        """The runs of a sweep's trials, oldest first; none of what is no sweep."""
        with self._writing() as connection, connection.cursor() as cursor:
            return removal.trial_runs(cursor, sweep)

    def half_removed(self, run: str) -> removal.HalfRemoved | None:
        """A run (by its full id) that was removed while its directory was not."""
        with self._writing() as connection, connection.cursor() as cursor:
            return removal.half_removed(cursor, run)

    def finish_removal(self, run: str) -> None:
        with self._writing() as connection, connection.cursor() as cursor:
            removal.finish(cursor, run)

    # -- is all of it consistent? -------------------------------------------------------------------------------------

    def check_integrity(
        self, run: str | None = None, *, progress: integrity.Progress | None = None
    ) -> integrity.Verdict:
        """Looks at every point of all runs, or of one (by its id); see integrity.py. Raises NotFound."""
        return integrity.examine(self._writing, run, progress)

    def repair_integrity(self, runs: Iterable[str], *, user: str, now: float) -> list[integrity.Problem]:
        """Mends what can be mended in these runs, telling it in an event of each."""
        return integrity.mend(self._writing, runs, user=user, at=lifecycle.when(now))

    # -- inside --------------------------------------------------------------------------------------------------------

    def _number(self, run: str) -> int:
        found = self._identities({run}).get(run)
        if found is None:
            raise NotFound("run", run)
        return found.number

    @contextmanager
    def _reading(self) -> Iterator[Connection]:
        """One snapshot for all questions asked through it."""
        with told(self._url), self._engine.connect().execution_options(isolation_level="REPEATABLE READ") as connection:
            yield connection

    @contextmanager
    def _writing(self) -> Iterator[psycopg.Connection[Any]]:
        """A psycopg connection in a transaction that is committed at the end: COPY, savepoints and locks in one."""
        with told(self._url):
            pooled = self._engine.raw_connection()
            connection: Any = pooled.driver_connection
            try:
                yield connection
                connection.commit()
            except BaseException:
                if connection.closed:
                    pooled.invalidate()
                raise
            finally:
                pooled.close()
