"""What is in the database. PostgreSQL 15 or later, no extensions, no rights beyond those of a schema's owner.

Words: a run has a text `id` that people see, and a `number` that the two big tables carry instead, because 8 bytes in
every chunk and every index entry are better than 24. Every table that people change says who did it (`who`) and in
which `project` or run. `xid` is the transaction that last wrote a row; the feeds for sinks read behind a horizon of it
(see reading.py).

These objects describe the newest schema; how a database gets there is in migrations/. A test compares the two.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import (
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    DateTime,
    Double,
    ForeignKey,
    ForeignKeyConstraint,
    Identity,
    Index,
    Integer,
    MetaData,
    PrimaryKeyConstraint,
    SmallInteger,
    Table,
    Text,
    UniqueConstraint,
    Uuid,
    text,
)
from sqlalchemy.dialects.postgresql import ARRAY, DOUBLE_PRECISION, JSON, JSONB
from sqlalchemy.types import UserDefinedType

REVISIONS = ("0001", "0002", "0003", "0004", "0005", "0006", "0007")
"""Every schema this code knows, oldest first. Kept here so that looking at a database does not need Alembic."""
HEAD = REVISIONS[-1]

VERSION_TABLE = "schema_version"
"""Not Alembic's usual name: another application's tables (MLflow's, say) may be beside ours."""

ILLEGAL_TRANSITION = "ORC01"
"""SQLSTATE of the trigger that guards runs.status."""
APPEND_ONLY = "ORC02"
"""SQLSTATE of the triggers that guard events and decisions of sweeps."""


class XID8(UserDefinedType[str]):
    """A transaction id that does not wrap around."""

    cache_ok = True

    def get_col_spec(self, **_: Any) -> str:
        return "xid8"


metadata = MetaData(
    naming_convention={
        "pk": "%(table_name)s_pkey",
        "uq": "%(table_name)s_%(column_0_N_name)s_key",
        "fk": "%(table_name)s_%(column_0_N_name)s_fkey",
        "ck": "%(table_name)s_%(constraint_name)s_check",
    }
)

_NOW = text("now()")
_XID = text("pg_current_xact_id()")
_EMPTY = text("''")
_OBJECT = text("'{}'::jsonb")


def _text(name: str) -> Column[Any]:
    return Column(name, Text, nullable=False, server_default=_EMPTY)


def _json(name: str) -> Column[Any]:
    return Column(name, JSONB, nullable=False, server_default=_OBJECT)


def _exact(name: str, default: str = "{}") -> Column[Any]:
    """JSON as it was written: jsonb forgets the order of keys, and that 1e23 was no whole number."""
    return Column(name, JSON, nullable=False, server_default=text(f"'{default}'::json"))


def _when(name: str) -> Column[Any]:
    return Column(name, DateTime(timezone=True))


def _created() -> Column[Any]:
    return Column("created_at", DateTime(timezone=True), nullable=False, server_default=_NOW)


def _updated() -> Column[Any]:
    return Column("updated_at", DateTime(timezone=True), nullable=False, server_default=_NOW)


def _xid() -> Column[Any]:
    return Column("xid", XID8, nullable=False, server_default=_XID)


def _run() -> Column[Any]:
    return Column("run_id", Text, ForeignKey("runs.id", ondelete="CASCADE"), nullable=False)


def _number() -> Column[Any]:
    """A number that the database gives."""
    return Column("id", BigInteger, Identity(), primary_key=True)


# -- what was run ------------------------------------------------------------------------------------------------------

experiments = Table(
    "experiments",
    metadata,
    _number(),
    Column("project", Text, nullable=False),
    Column("name", Text, nullable=False),
    _text("description"),
    _text("who"),
    _created(),
    UniqueConstraint("project", "name"),
)

sweeps = Table(
    "sweeps",
    metadata,
    Column("id", Text, primary_key=True),  # that of its parent run, whose status is the sweep's
    Column("project", Text, nullable=False),
    _text("who"),
    _created(),
    _updated(),
    Column("seed", BigInteger, nullable=False, server_default=text("0")),
    _exact("settings"),
    _exact("space"),
    _text("driver"),  # who alone may decide now
    _when("driver_since"),
    Column("decisions", BigInteger, nullable=False, server_default=text("0")),  # how many there are
    _exact("spent"),
    _exact("facts"),  # found out once: the objective, the unit of the resource
)

dataset_versions = Table(
    "dataset_versions",
    metadata,
    _number(),
    Column("project", Text, nullable=False),
    Column("name", Text, nullable=False),
    Column("version", Text, nullable=False),
    _text("digest"),
    _text("uri"),
    _json("details"),
    _text("who"),
    _created(),
    UniqueConstraint("project", "name", "version"),
)

runs = Table(
    "runs",
    metadata,
    Column("id", Text, primary_key=True),  # sorts by time of creation
    Column("number", BigInteger, Identity(), nullable=False, unique=True),
    Column("experiment_id", BigInteger, ForeignKey("experiments.id"), nullable=False),
    Column("project", Text, nullable=False),
    Column("name", Text, nullable=False),  # generated ones are unique, given ones need not be
    _text("description"),
    _text("who"),
    Column("status", Text, nullable=False),  # guarded by a trigger and run_transitions
    _text("reason"),
    Column("error", JSONB),
    Column("attempt", Integer, nullable=False, server_default=text("0")),  # the current one
    Column("workers", Integer, nullable=False, server_default=text("1")),
    Column("seed", BigInteger, nullable=False, server_default=text("0")),
    _text("job"),
    _text("config_hash"),  # of the current attempt
    _text("directory"),
    _json("model"),
    _json("dataset"),
    Column("dataset_version_id", BigInteger, ForeignKey("dataset_versions.id", ondelete="SET NULL")),
    Column("sweep_id", Text, ForeignKey("sweeps.id", ondelete="SET NULL")),
    _json("links"),  # where the same run is found elsewhere, by sink
    _created(),
    _when("started_at"),
    _when("ended_at"),
    _updated(),
    _text("updated_by"),
    _when("cancel_requested_at"),
    _text("cancel_requested_by"),
    _when("deleted_at"),
    _xid(),
    # Lists are newest first, and number grows with time; each common filter has that order behind it.
    Index("runs_by_experiment", "experiment_id", "number"),
    Index("runs_by_status", "status", "number"),
    Index("runs_by_project", "project", "number"),
    Index("runs_by_name", "name"),
    Index("runs_by_id_prefix", "id", postgresql_ops={"id": "text_pattern_ops"}),  # LIKE 'prefix%' under any collation
    Index("runs_by_config", "config_hash"),
    Index("runs_by_sweep", "sweep_id", postgresql_where=text("sweep_id IS NOT NULL")),
    Index("runs_by_xid", "xid"),
    Index("runs_to_stop", "id", postgresql_where=text("cancel_requested_at IS NOT NULL AND ended_at IS NULL")),
)

run_transitions = Table(
    "run_transitions",
    metadata,
    Column("old_status", Text, primary_key=True),
    Column("new_status", Text, primary_key=True),
    comment="Legal moves of runs.status; the trigger runs_status_guard refuses all others.",
)

attempts = Table(
    "attempts",
    metadata,
    _run(),
    Column("attempt", Integer, nullable=False),
    Column("status", Text, nullable=False),
    _text("reason"),
    Column("error", JSONB),
    _text("who"),
    _text("job"),
    Column("workers", Integer, nullable=False, server_default=text("1")),
    _json("config"),
    _text("config_hash"),
    _json("provenance"),  # git, command, packages, hosts …; producers add to it
    Column("started_at", DateTime(timezone=True), nullable=False, server_default=_NOW),
    _when("ended_at"),
    _when("lease_until"),  # of the first lease, so its length is known; the tracker renews in memory
    _xid(),
    Column("tracker", Text),  # who keeps its lease; while that one shows life, others leave the attempt alone
    PrimaryKeyConstraint("run_id", "attempt"),
    Index("attempts_alive", "run_id", postgresql_where=text("ended_at IS NULL")),
)

trackers = Table(
    "trackers",
    metadata,
    Column("id", Text, primary_key=True),  # of one process
    Column("beats", BigInteger, nullable=False),  # counts its signs of life: no clock is compared
    Column("alive_at", DateTime(timezone=True), nullable=False, server_default=_NOW),
)

run_edges = Table(
    "run_edges",
    metadata,
    Column("parent_id", Text, ForeignKey("runs.id", ondelete="CASCADE"), nullable=False),
    Column("child_id", Text, ForeignKey("runs.id", ondelete="CASCADE"), nullable=False),
    Column("kind", Text, nullable=False),  # parent, fork, resume, pipeline
    Column("checkpoint_id", Text),  # where a fork or resume branched off
    Column("step", BigInteger),
    _text("who"),
    _created(),
    PrimaryKeyConstraint("child_id", "parent_id", "kind"),
    Index("run_edges_by_parent", "parent_id"),
)

trials = Table(
    "trials",
    metadata,
    Column("sweep_id", Text, ForeignKey("sweeps.id", ondelete="CASCADE"), nullable=False),
    Column("number", Integer, nullable=False),
    Column("run_id", Text, ForeignKey("runs.id", ondelete="SET NULL")),  # of its repeat 0
    _text("status"),
    Column("score", Double),
    _created(),
    _updated(),
    _exact("params"),
    Column("is_held", Boolean, nullable=False, server_default=text("false")),
    _text("origin"),
    _text("config_hash"),
    Column("rung", Integer, nullable=False, server_default=text("-1")),
    Column("resource", Double, nullable=False, server_default=text("0")),
    Column("spread", Double),
    Column("n", Integer, nullable=False, server_default=text("0")),
    _exact("scores"),
    _exact("checkpoint"),
    _text("reason"),
    _when("ended_at"),
    PrimaryKeyConstraint("sweep_id", "number"),
    Index("trials_by_run", "run_id"),
)

sweep_jobs = Table(
    "sweep_jobs",
    metadata,
    Column("sweep_id", Text, nullable=False),
    Column("number", Integer, nullable=False),
    Column("trial", Integer, nullable=False),
    Column("repeat", Integer, nullable=False, server_default=text("0")),
    Column("rung", Integer, nullable=False, server_default=text("0")),
    Column("until", Double),
    Column("run_id", Text, ForeignKey("runs.id", ondelete="SET NULL")),
    Column("attempt", Integer, nullable=False, server_default=text("0")),
    _text("status"),
    Column("restarts", Integer, nullable=False, server_default=text("0")),
    _exact("judge"),
    _exact("clone"),
    Column("score", Double),
    Column("resource", Double, nullable=False, server_default=text("0")),
    _exact("reports", "[]"),
    _text("lane"),
    Column("lane_seconds", Double, nullable=False, server_default=text("0")),
    _text("reason"),
    _exact("error"),
    _created(),
    _updated(),
    _when("started_at"),
    _when("ended_at"),
    PrimaryKeyConstraint("sweep_id", "number"),
    ForeignKeyConstraint(["sweep_id", "trial"], ["trials.sweep_id", "trials.number"], ondelete="CASCADE"),
    Index("sweep_jobs_open", "sweep_id", postgresql_where=text("ended_at IS NULL")),
    Index("sweep_jobs_by_trial", "sweep_id", "trial"),
    Index("sweep_jobs_by_run", "run_id"),
)

sweep_decisions = Table(
    "sweep_decisions",
    metadata,
    Column("sweep_id", Text, ForeignKey("sweeps.id", ondelete="CASCADE"), nullable=False),
    Column("seq", BigInteger, nullable=False),  # 0, 1, 2 … without gaps
    Column("kind", Text, nullable=False),
    Column("trial", Integer),
    Column("job", Integer),
    _exact("inputs"),
    _exact("outcome"),
    Column("at", DateTime(timezone=True), nullable=False, server_default=_NOW),
    PrimaryKeyConstraint("sweep_id", "seq"),
    comment="Append-only: a trigger refuses updates and removals. Rows leave only together with their sweep.",
)

sweep_requests = Table(
    "sweep_requests",
    metadata,
    _number(),
    Column("sweep_id", Text, ForeignKey("sweeps.id", ondelete="CASCADE"), nullable=False),
    Column("kind", Text, nullable=False),
    _exact("details"),
    _text("who"),
    _created(),
    _text("answer"),
    _when("done_at"),  # answered by the sweep's driver
    Index("sweep_requests_by_sweep", "sweep_id", "id"),
)

queue = Table(
    "queue",
    metadata,
    Column("run_id", Text, ForeignKey("runs.id", ondelete="CASCADE"), primary_key=True),
    Column("project", Text, nullable=False),
    Column("state", Text, nullable=False),  # waiting, starting, running, done, held
    Column("priority", Integer, nullable=False, server_default=text("0")),  # higher goes first
    _json("request"),
    _text("who"),
    _created(),
    _updated(),
    Index("queue_order", "state", text("priority DESC"), "created_at"),
)

# -- what was said about a run -----------------------------------------------------------------------------------------

params = Table(
    "params",
    metadata,
    _run(),
    Column("name", Text, nullable=False),
    Column("type", Text, nullable=False),  # int, float, bool, str, null, list, dict
    Column("value", JSONB, nullable=False),  # NaN and ±inf as strings: JSON has no numbers for them
    Column("number", Double),  # of int, float and bool: for comparing
    Column("attempt", Integer, nullable=False, server_default=text("0")),
    _text("who"),
    _updated(),
    _xid(),
    PrimaryKeyConstraint("run_id", "name"),
    Index("params_by_number", "name", "number"),
)

tags = Table(
    "tags",
    metadata,
    _run(),
    Column("name", Text, nullable=False),
    Column("value", Text, nullable=False),
    _text("who"),
    _updated(),
    _xid(),
    PrimaryKeyConstraint("run_id", "name"),
    # left(): a B-tree entry has at most 2.7 kB, a tag may have more
    Index("tags_by_value", "name", text("left(value, 100)")),
)

notes = Table(
    "notes",
    metadata,
    _number(),
    _run(),
    Column("body", Text, nullable=False),
    _text("who"),
    _created(),
    _xid(),
    Index("notes_by_run", "run_id", "id"),
)

events = Table(
    "events",
    metadata,
    _number(),
    _run(),
    Column("attempt", Integer, nullable=False, server_default=text("0")),
    Column("rank", Integer, nullable=False, server_default=text("-1")),
    Column("at", DateTime(timezone=True), nullable=False, server_default=_NOW),  # by the clock of whom it happened to
    Column("level", Text, nullable=False, server_default=text("'info'")),
    Column("kind", Text, nullable=False),
    _text("message"),
    Column("step", BigInteger),
    _json("details"),
    _text("who"),
    _created(),
    CheckConstraint("level IN ('debug', 'info', 'warning', 'error')", name="level"),
    Index("events_by_run", "run_id", "id"),
    comment="Append-only: a trigger refuses updates. Rows leave only together with their run.",
)

alert_watches = Table(
    "alert_watches",
    metadata,
    Column("run_id", Text, ForeignKey("runs.id", ondelete="CASCADE"), primary_key=True),
    Column("attempt", Integer, nullable=False),
    Column("place", Text, nullable=False),  # whose tracker has the addresses
    _exact("alerts"),  # rules, and whom to tell; no addresses
    _created(),
    _when("done_at"),  # all that was to be told of the run's end is among the notifications
    Index("alert_watches_open", "place", postgresql_where=text("done_at IS NULL")),
)

alerts = Table(
    "alerts",
    metadata,
    # How each stands; what happened one after another are the run's events.
    _run(),
    Column("rule", Text, nullable=False),
    Column("rank", Integer, nullable=False),
    Column("key", Text, nullable=False),
    Column("attempt", Integer, nullable=False),
    Column("is_firing", Boolean, nullable=False),
    Column("number", Integer, nullable=False),  # how often it fired
    Column("level", Text, nullable=False),
    _text("message"),
    Column("value", Double),
    Column("step", BigInteger),
    Column("fired_at", DateTime(timezone=True), nullable=False),
    _when("resolved_at"),
    PrimaryKeyConstraint("run_id", "rule", "rank", "key"),
    Index("alerts_firing", "fired_at", postgresql_where=text("is_firing")),
)

notifications = Table(
    "notifications",
    metadata,
    # The outbox: written in the transaction of what they tell, sent afterwards, more than once if an answer is lost.
    _number(),
    _run(),
    Column("attempt", Integer, nullable=False),
    Column("key", Text, nullable=False),  # the same each time it is sent: receivers drop what they have
    Column("subject", Text, nullable=False),  # of one subject the older goes first
    Column("place", Text, nullable=False),
    Column("channel", Text, nullable=False),
    Column("notifier", Text, nullable=False),
    Column("kind", Text, nullable=False),
    Column("notice", JSON, nullable=False),
    Column("state", Text, nullable=False, server_default=text("'waiting'")),
    Column("tries", Integer, nullable=False, server_default=text("0")),
    Column("next_at", DateTime(timezone=True), nullable=False),
    _text("error"),
    _created(),
    _when("done_at"),
    UniqueConstraint("channel", "key"),
    CheckConstraint("state IN ('waiting', 'sent', 'failed')", name="state"),
    Index("notifications_waiting", "place", "next_at", postgresql_where=text("state = 'waiting'")),
    Index("notifications_by_run", "run_id", "id"),
)

checkpoints = Table(
    "checkpoints",
    metadata,
    _run(),
    Column("id", Text, nullable=False),
    Column("attempt", Integer, nullable=False, server_default=text("0")),
    _text("uri"),
    _text("state"),
    Column("step", BigInteger),
    Column("epoch", BigInteger),
    _text("label"),
    _json("metrics"),
    Column("is_best", Boolean, nullable=False, server_default=text("false")),
    Column("is_pinned", Boolean, nullable=False, server_default=text("false")),
    Column("size_bytes", BigInteger),
    Column("duration", Double),  # seconds from the call to durable
    _text("manifest_sha256"),
    _text("cipher"),  # empty: not encrypted
    _text("key_id"),
    _text("who"),
    _created(),
    _updated(),
    _xid(),
    Column("resumable", Boolean, nullable=False, server_default=text("true")),  # false: weights only
    _text("kind"),  # sharded, full, weights
    Column("world_size", Integer),  # ranks that saved it
    Column("reasons", JSONB),  # why it was saved: a list of words
    Column("timings", JSONB),  # seconds of its parts, of the slowest rank
    PrimaryKeyConstraint("run_id", "id"),
    Index("checkpoints_by_step", "run_id", "step"),
    comment="An index of what lies in storage; storage is the truth.",
)

artifacts = Table(
    "artifacts",
    metadata,
    _number(),
    _run(),
    Column("name", Text, nullable=False),
    Column("step", BigInteger),
    Column("attempt", Integer, nullable=False, server_default=text("0")),
    _text("uri"),
    _text("media_type"),
    Column("size_bytes", BigInteger),
    _text("sha256"),
    _text("who"),
    _created(),
    _xid(),
    UniqueConstraint("run_id", "name", "step", postgresql_nulls_not_distinct=True),
)

models = Table(
    "models",
    metadata,
    _number(),
    Column("project", Text, nullable=False),
    Column("name", Text, nullable=False),
    _text("description"),
    _text("who"),
    _created(),
    UniqueConstraint("project", "name"),
)

model_versions = Table(
    "model_versions",
    metadata,
    Column("model_id", BigInteger, ForeignKey("models.id", ondelete="CASCADE"), nullable=False),
    Column("version", Integer, nullable=False),
    Column("run_id", Text),  # with checkpoint_id: where it came from
    Column("checkpoint_id", Text),
    _text("uri"),
    _text("stage"),
    _json("details"),
    _text("who"),
    _created(),
    PrimaryKeyConstraint("model_id", "version"),
    # RESTRICT, the default: what is registered cannot be deleted under the registry's feet
    ForeignKeyConstraint(["run_id", "checkpoint_id"], ["checkpoints.run_id", "checkpoints.id"]),
    Index("model_versions_by_run", "run_id", "checkpoint_id"),
)

# -- metrics -----------------------------------------------------------------------------------------------------------

producers = Table(
    "producers",
    metadata,
    _number(),
    Column("uuid", Uuid, nullable=False, unique=True),
    _run(),
    Column("attempt", Integer, nullable=False),
    Column("rank", Integer, nullable=False),
    Column(
        "points", BigInteger, nullable=False, server_default=text("0")
    ),  # the watermark: all up to here is committed
    Column("facts", BigInteger, nullable=False, server_default=text("0")),  # the same of the other stream
    Column("lost", BigInteger, nullable=False, server_default=text("0")),  # of those points: damaged on the way
    _created(),
    _updated(),
    _xid(),
    Index("producers_by_run", "run_id"),
    Index("producers_by_xid", "xid"),
)

metric_keys = Table(
    "metric_keys",
    metadata,
    Column("id", Integer, Identity(), primary_key=True),
    Column("name", Text, nullable=False, unique=True),
    _text("unit"),
    _text("direction"),  # min or max: what is better
    _text("reduction"),  # mean, min, max, sum or last: over ranks
    CheckConstraint("direction IN ('', 'min', 'max')", name="direction"),
    CheckConstraint("reduction IN ('', 'mean', 'min', 'max', 'sum', 'last')", name="reduction"),
)


def _chunk_columns() -> list[Column[Any]]:
    """Points of one producer, key after key; within a key in the order of writing.

    `key_ids` (rising) and `counts` tell whose points stand in the arrays, and how many of each. `steps` and `times`
    hold the differences to the point before, of a key's first point the difference to `first_step` and
    `first_time_ms`, so that they compress and 4 bytes are enough; a row ends where a difference does not fit. Where all
    keys were logged together (`is_wide`) they have equal counts, steps and times, and these stand there once. The order
    of the columns wastes no padding.
    """
    return [
        Column("run_number", BigInteger, nullable=False),
        _xid(),
        Column("id", BigInteger, nullable=False, server_default=text("nextval('metric_chunks_id_seq'::regclass)")),
        Column("producer_id", BigInteger, nullable=False),
        # Numbers, by the producer, of the first and the last of its points here. 0: written before they were kept, or
        # imported.
        Column("first_seq", BigInteger, nullable=False),
        Column("last_seq", BigInteger, nullable=False),
        Column("first_step", BigInteger, nullable=False),
        Column("min_step", BigInteger, nullable=False),
        Column("max_step", BigInteger, nullable=False),
        Column("first_time_ms", BigInteger, nullable=False),
        Column("key_id", Integer, nullable=False),  # the only one of `key_ids`; 0 where there are several
        Column("attempt", Integer, nullable=False),
        Column("rank", Integer, nullable=False),
        Column("n", Integer, nullable=False),
        Column("crc", Integer, nullable=False),  # of the arrays, see chunks.checksum
        # 0: as committed, one batch of a producer; 1: merged, and to be merged with more; 2: merged for good, and its
        # points are in metric_levels; 3: merged for good, too short for that
        Column("level", SmallInteger, nullable=False, server_default=text("0")),
        Column("is_wide", Boolean, nullable=False),
        Column("key_ids", ARRAY(Integer), nullable=False),
        Column("counts", ARRAY(Integer), nullable=False),
        Column("steps", ARRAY(Integer), nullable=False),
        Column("times", ARRAY(Integer), nullable=False),
        Column("values", ARRAY(DOUBLE_PRECISION), nullable=False),
    ]


# No foreign keys and no unique index: exactly-once comes from the watermark in `producers`, and every check would be
# paid per row. Two partitions, because rows are committed into one and merged into the other: the first one is emptied
# again and again, and its space goes back to the disk instead of staying as holes among what is kept.
metric_chunks = Table(
    "metric_chunks",
    metadata,
    *_chunk_columns(),
    Index("metric_chunks_feed", "run_number", "xid", "id"),
    postgresql_partition_by="LIST (level)",
)

metric_chunks_live = Table(
    "metric_chunks_live",
    metadata,
    *_chunk_columns(),
    Index("metric_chunks_live_feed", "run_number", "xid", "id"),
)

metric_chunks_merged = Table(
    "metric_chunks_merged",
    metadata,
    *_chunk_columns(),
    Index("metric_chunks_merged_feed", "run_number", "xid", "id"),
    Index("metric_chunks_merged_by_key", "run_number", "level", "key_id"),
)

metric_levels = Table(
    "metric_levels",
    metadata,
    # Long curves in windows of neighbouring points, for charts; see levels.py. A row of level 1 is made of one row of
    # metric_chunks, one of a higher level of several below; `id` is that of the last chunk in it.
    Column("run_number", BigInteger, nullable=False),
    Column("producer_id", BigInteger, nullable=False),
    Column("id", BigInteger, nullable=False),
    Column("n", BigInteger, nullable=False),  # points in the row
    Column("min_step", BigInteger, nullable=False),
    Column("max_step", BigInteger, nullable=False),
    Column("key_id", Integer, nullable=False),
    Column("attempt", Integer, nullable=False),
    Column("rank", Integer, nullable=False),
    Column("level", Integer, nullable=False),
    # one entry per window
    Column("counts", ARRAY(Integer), nullable=False),
    Column("nans", ARRAY(Integer), nullable=False),
    Column("infinities", ARRAY(Integer), nullable=False),
    Column("steps", ARRAY(BigInteger), nullable=False),  # of the first point
    Column("low_steps", ARRAY(BigInteger), nullable=False),
    Column("high_steps", ARRAY(BigInteger), nullable=False),
    Column("times_ms", ARRAY(BigInteger), nullable=False),  # of the first point
    Column("first", ARRAY(DOUBLE_PRECISION), nullable=False),
    Column("min", ARRAY(DOUBLE_PRECISION), nullable=False),  # NaN: nothing but NaN
    Column("max", ARRAY(DOUBLE_PRECISION), nullable=False),
    Column("sum", ARRAY(DOUBLE_PRECISION), nullable=False),  # of the finite values
    Column("last", ARRAY(DOUBLE_PRECISION), nullable=False),
    PrimaryKeyConstraint("run_number", "key_id", "rank", "attempt", "level", "producer_id", "id"),
)


def _summary_columns() -> list[Column[Any]]:
    """All points of a key and rank, over all attempts. Written in the transaction that writes the chunks."""
    return [
        Column("run_number", BigInteger, nullable=False),
        Column("key_id", Integer, nullable=False),
        Column("rank", Integer, nullable=False),
        Column("first_attempt", Integer, nullable=False),
        Column("last_attempt", Integer, nullable=False),
        Column("count", BigInteger, nullable=False),
        Column("nan_count", BigInteger, nullable=False),
        Column("inf_count", BigInteger, nullable=False),
        Column("sum", Double, nullable=False),  # of the finite values
        Column("first_value", Double, nullable=False),
        Column("first_step", BigInteger, nullable=False),
        Column("first_time_ms", BigInteger, nullable=False),
        Column("last_value", Double, nullable=False),
        Column("last_step", BigInteger, nullable=False),
        Column("last_time_ms", BigInteger, nullable=False),
        Column("min_value", Double),  # NULL: nothing but NaN so far
        Column("min_step", BigInteger),
        Column("max_value", Double),
        Column("max_step", BigInteger),
        Column("is_final", Boolean, nullable=False, server_default=text("false")),
    ]


# Partitions as with metric_chunks: updates leave dead rows behind, so what nobody updates any more is moved away from
# them. No index on values: then an update stays on its page (HOT) instead of touching every index; for that there is
# room in each page.
metric_summaries = Table("metric_summaries", metadata, *_summary_columns(), postgresql_partition_by="LIST (is_final)")

metric_summaries_live = Table(
    "metric_summaries_live",
    metadata,
    *_summary_columns(),
    PrimaryKeyConstraint("run_number", "key_id", "rank"),
    postgresql_with={"fillfactor": 50},
)

metric_summaries_final = Table(
    "metric_summaries_final",
    metadata,
    *_summary_columns(),
    PrimaryKeyConstraint("run_number", "key_id", "rank"),
)

sink_cursors = Table(
    "sink_cursors",
    metadata,
    Column("sink", Text, nullable=False),
    Column("run_id", Text, nullable=False),  # empty: the sink's place in the list of changed runs
    Column("xid", BigInteger, nullable=False, server_default=text("0")),
    Column("id", BigInteger, nullable=False, server_default=text("0")),
    Column("facts", BigInteger, nullable=False, server_default=text("0")),
    _json("state"),
    _updated(),
    PrimaryKeyConstraint("sink", "run_id"),
)
