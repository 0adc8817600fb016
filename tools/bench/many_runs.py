"""A database with many runs, written by bulk SQL: every row is one that `orc ls` could have come by."""

from __future__ import annotations

import psycopg

EXPERIMENTS = 20
KEYS = 20
RANKS = 2

EXPERIMENT_ROWS = """
INSERT INTO experiments (project, name, who)
SELECT 'default', 'experiment-' || n, 'ada' FROM generate_series(1, %(experiments)s) n
"""

KEY_ROWS = """
INSERT INTO metric_keys (name, direction)
SELECT (ARRAY['train/', 'val/', 'system/', ''])[1 + n %% 4] || 'metric_' || n, CASE WHEN n = 5 THEN 'max' ELSE '' END
FROM generate_series(1, %(keys)s) n
"""

RUN_ROWS = """
INSERT INTO runs (id, experiment_id, project, name, who, status, reason, attempt, workers, directory, job, config_hash,
                  created_at, started_at, ended_at)
SELECT to_char(at AT TIME ZONE 'UTC', 'YYYYMMDD-HH24MISS') || '-' || lpad(to_hex(n * 7919), 8, '0'),
       (SELECT min(id) FROM experiments) + n %% %(experiments)s, 'default', 'brisk-otter-' || n, 'ada', status,
       CASE status WHEN 'FAILED' THEN 'rank 1: ValueError: bad shape' ELSE '' END, 1, %(ranks)s,
       '/data/runs/experiment-' || n %% %(experiments)s || '/' || n, 'raysubmit_' || md5(n::text),
       md5((n %% 100)::text),
       at, at, CASE status WHEN 'RUNNING' THEN NULL ELSE at + interval '40 minutes' END
FROM (SELECT n, timestamptz '2026-01-01' + n * interval '5 minutes' AS at,
             CASE WHEN n > %(runs)s - 5 THEN 'RUNNING' WHEN n %% 7 = 0 THEN 'FAILED' ELSE 'FINISHED' END AS status
      FROM generate_series(1, %(runs)s) n) made
ORDER BY n
"""

ATTEMPT_ROWS = """
INSERT INTO attempts (run_id, attempt, status, workers, config, started_at, ended_at)
SELECT id, 1, status, workers, '{"optim": {"lr": 0.01}, "run": {"experiment": "digits"}}', started_at, ended_at
FROM runs
"""

TAG_ROWS = """
INSERT INTO tags (run_id, name, value)
SELECT id, said.name, said.value || number %% 10
FROM runs, (VALUES ('team', 'team-'), ('git.branch', 'branch-')) said (name, value)
"""

PARAM_ROWS = """
INSERT INTO params (run_id, name, type, value, number)
SELECT id, 'optim.p' || n, 'float', to_jsonb(number / 7.0), number / 7.0 FROM runs, generate_series(1, 10) n
"""

SUMMARY_ROWS = """
INSERT INTO metric_summaries (run_number, key_id, rank, first_attempt, last_attempt, count, nan_count, inf_count, sum,
                              first_value, first_step, first_time_ms, last_value, last_step, last_time_ms,
                              min_value, min_step, max_value, max_step)
SELECT r.number, k.id, rank, 1, 1, 1000, 0, 0, r.number / 3.0, 1 / 3.0, 0, 1750000000000, sin(r.number + k.id + rank),
       999, 1750000999000, -1, 17, 1, 23
FROM runs r, metric_keys k, generate_series(0, %(ranks)s - 1) rank
"""


def fill(conninfo: str, runs: int) -> None:
    """`runs` runs with `KEYS` metrics on `RANKS` ranks each; the database has our empty schema."""
    numbers = {"runs": runs, "experiments": EXPERIMENTS, "keys": KEYS, "ranks": RANKS}
    with psycopg.connect(conninfo, autocommit=True) as connection:
        for rows in (EXPERIMENT_ROWS, KEY_ROWS, RUN_ROWS, ATTEMPT_ROWS, TAG_ROWS, PARAM_ROWS, SUMMARY_ROWS):
            connection.execute(rows, {name: number for name, number in numbers.items() if f"%({name})s" in rows})
        connection.execute("VACUUM ANALYZE")
