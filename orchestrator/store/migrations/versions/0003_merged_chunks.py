"""Rows of metric_chunks hold several keys and are merged in the background; windows for charts; counted losses."""

from __future__ import annotations

from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

LOST = "ALTER TABLE producers ADD COLUMN lost bigint NOT NULL DEFAULT 0"

CHUNKS = """
DROP VIEW metric_points;
ALTER TABLE metric_chunks RENAME TO metric_chunks_before;
ALTER TABLE metric_chunks_before ALTER COLUMN id DROP IDENTITY;
CREATE SEQUENCE metric_chunks_id_seq AS bigint;
CREATE TABLE metric_chunks (
  run_number bigint NOT NULL,
  xid xid8 NOT NULL DEFAULT pg_current_xact_id(),
  id bigint NOT NULL DEFAULT nextval('metric_chunks_id_seq'),
  producer_id bigint NOT NULL,
  first_seq bigint NOT NULL,
  last_seq bigint NOT NULL,
  first_step bigint NOT NULL,
  min_step bigint NOT NULL,
  max_step bigint NOT NULL,
  first_time_ms bigint NOT NULL,
  key_id integer NOT NULL,
  attempt integer NOT NULL,
  rank integer NOT NULL,
  n integer NOT NULL,
  crc integer NOT NULL,
  level smallint NOT NULL DEFAULT 0,
  is_wide boolean NOT NULL,
  key_ids integer[] NOT NULL,
  counts integer[] NOT NULL,
  steps integer[] NOT NULL,
  times integer[] NOT NULL,
  "values" double precision[] NOT NULL
) PARTITION BY LIST (level);
CREATE TABLE metric_chunks_live PARTITION OF metric_chunks FOR VALUES IN (0);
CREATE TABLE metric_chunks_merged PARTITION OF metric_chunks FOR VALUES IN (1, 2, 3);
ALTER SEQUENCE metric_chunks_id_seq OWNED BY metric_chunks.id;
"""

# The values of a live row are compressed when it is merged, not while a tracker waits.
STORAGE = """
ALTER TABLE metric_chunks_live ALTER COLUMN "values" SET STORAGE EXTERNAL;
"""

EARLIER = """
INSERT INTO metric_chunks (run_number, xid, id, producer_id, first_seq, last_seq, first_step, min_step, max_step,
  first_time_ms, key_id, attempt, rank, n, crc, level, is_wide, key_ids, counts, steps, times, "values")
SELECT c.run_number, c.xid, c.id, c.producer_id, 0, 0, c.first_step, s.lowest, s.highest,
  c.first_time_ms, c.key_id, c.attempt, c.rank, c.n, c.crc, 0, false, ARRAY[c.key_id], ARRAY[c.n], c.steps, c.times,
  c."values"
FROM metric_chunks_before c
CROSS JOIN LATERAL (
  SELECT min(c.first_step + p.so_far) AS lowest, max(c.first_step + p.so_far) AS highest FROM (
    SELECT sum(u.step) OVER (ORDER BY u.place ROWS UNBOUNDED PRECEDING) AS so_far
    FROM unnest(c.steps) WITH ORDINALITY AS u (step, place)
  ) p
) s;
SELECT setval('metric_chunks_id_seq', (SELECT coalesce(max(id), 0) + 1 FROM metric_chunks_before), false);
DROP TABLE metric_chunks_before;
"""

INDEXES = """
CREATE INDEX metric_chunks_live_feed ON metric_chunks_live (run_number, xid, id);
CREATE INDEX metric_chunks_merged_feed ON metric_chunks_merged (run_number, xid, id);
CREATE INDEX metric_chunks_feed ON metric_chunks (run_number, xid, id);
CREATE INDEX metric_chunks_merged_by_key ON metric_chunks_merged (run_number, level, key_id);
"""

# A key's points are one slice of the arrays. Within it the differences are added up; its rows come from one unnest and
# stay in their order.
POINTS = """
CREATE VIEW metric_points AS
SELECT r.id AS run, k.name AS key, c.attempt, c.rank, p.step, p.time, p.value
FROM runs r
JOIN metric_chunks c ON c.run_number = r.number
CROSS JOIN LATERAL (
  SELECT u.key_id, u.count, u.upto - u.count AS before, CASE WHEN c.is_wide THEN 0 ELSE u.upto - u.count END AS start
  FROM (
    SELECT key_id, count, (sum(count) OVER (ORDER BY place ROWS UNBOUNDED PRECEDING))::integer AS upto
    FROM unnest(c.key_ids, c.counts) WITH ORDINALITY AS each (key_id, count, place)
  ) u
) s
JOIN metric_keys k ON k.id = s.key_id
CROSS JOIN LATERAL (
  SELECT c.first_step + sum(u.step) OVER so_far AS step,
         to_timestamp((c.first_time_ms + sum(u.ms) OVER so_far) / 1000::float8) AS time,
         u.value
  FROM unnest(c.steps[s.start + 1 : s.start + s.count], c.times[s.start + 1 : s.start + s.count],
              c."values"[s.before + 1 : s.before + s.count]) WITH ORDINALITY AS u (step, ms, value, place)
  WINDOW so_far AS (ORDER BY u.place ROWS UNBOUNDED PRECEDING)
) p;
COMMENT ON VIEW metric_points IS 'Every point as it was logged. Filter by run and key; both have an index behind them.';
"""

LEVELS = """
CREATE TABLE metric_levels (
  run_number bigint NOT NULL,
  producer_id bigint NOT NULL,
  id bigint NOT NULL,
  n bigint NOT NULL,
  min_step bigint NOT NULL,
  max_step bigint NOT NULL,
  key_id integer NOT NULL,
  attempt integer NOT NULL,
  rank integer NOT NULL,
  level integer NOT NULL,
  counts integer[] NOT NULL,
  nans integer[] NOT NULL,
  infinities integer[] NOT NULL,
  steps bigint[] NOT NULL,
  low_steps bigint[] NOT NULL,
  high_steps bigint[] NOT NULL,
  times_ms bigint[] NOT NULL,
  first double precision[] NOT NULL,
  min double precision[] NOT NULL,
  max double precision[] NOT NULL,
  sum double precision[] NOT NULL,
  last double precision[] NOT NULL,
  PRIMARY KEY (run_number, key_id, rank, attempt, level, producer_id, id)
);
"""


SUMMARIES = """
ALTER TABLE metric_summaries RENAME TO metric_summaries_before;
ALTER TABLE metric_summaries_before DROP CONSTRAINT metric_summaries_pkey;
CREATE TABLE metric_summaries (
  run_number bigint NOT NULL,
  key_id integer NOT NULL,
  rank integer NOT NULL,
  first_attempt integer NOT NULL,
  last_attempt integer NOT NULL,
  count bigint NOT NULL,
  nan_count bigint NOT NULL,
  inf_count bigint NOT NULL,
  sum double precision NOT NULL,
  first_value double precision NOT NULL,
  first_step bigint NOT NULL,
  first_time_ms bigint NOT NULL,
  last_value double precision NOT NULL,
  last_step bigint NOT NULL,
  last_time_ms bigint NOT NULL,
  min_value double precision,
  min_step bigint,
  max_value double precision,
  max_step bigint,
  is_final boolean NOT NULL DEFAULT false
) PARTITION BY LIST (is_final);
CREATE TABLE metric_summaries_live PARTITION OF metric_summaries
  (CONSTRAINT metric_summaries_live_pkey PRIMARY KEY (run_number, key_id, rank))
  FOR VALUES IN (false) WITH (fillfactor = 50);
CREATE TABLE metric_summaries_final PARTITION OF metric_summaries
  (CONSTRAINT metric_summaries_final_pkey PRIMARY KEY (run_number, key_id, rank))
  FOR VALUES IN (true);
INSERT INTO metric_summaries SELECT *, false FROM metric_summaries_before;
DROP TABLE metric_summaries_before;
"""


def upgrade() -> None:
    for statements in (LOST, CHUNKS, STORAGE, EARLIER, INDEXES, POINTS, LEVELS, SUMMARIES):
        op.execute(statements)
