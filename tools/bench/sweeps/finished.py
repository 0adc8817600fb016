"""Gives a sweep finished trials without training them: `finished.py HOME SWEEP COUNT`, until it has so many. Each is a
copy of the rows of its first trial, with a number, an id and values of its own; points are left out. To those who look
for changes the copies are as old as their original, so MLflow has no work with them: it would have had it long ago.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import psycopg

from orchestrator.catalog import open_catalog
from orchestrator.stack import Stack
from orchestrator.store.names import trial_run_id
from orchestrator.sweeps.template import template

COPIED = ("runs", "attempts", "params", "tags", "events", "run_edges")
"""In an order in which each refers only to those before."""


def main() -> None:
    home, sweep, count = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    with open_catalog(home) as catalog:
        config = catalog.run(sweep).config
    made, space = template((), base=config, keeps_sweep=True)
    seed = made.base.settings.run.seed
    url = Stack.load(home).database_url.replace("+psycopg", "", 1)
    with psycopg.connect(url) as connection:
        cursor = connection.cursor()
        known, run, name = _one(
            cursor,
            "SELECT (SELECT count(*) FROM trials WHERE sweep_id = %(sweep)s), t.run_id, r.name FROM trials t"
            " JOIN runs r ON r.id = t.sweep_id WHERE t.sweep_id = %(sweep)s AND t.number = 0",
            sweep=sweep,
        )
        cursor.execute(
            "CREATE TEMP TABLE fresh (number int, id text, name text, params json, score float8) ON COMMIT DROP"
        )
        with cursor.copy("COPY fresh FROM STDIN") as copy:
            for number in range(known, count):
                values = space.draw(seed, number)
                id = trial_run_id(sweep, f"{number}.0")
                copy.write_row((number, id, f"{name}-{number}", json.dumps(values), values["x"]))
        for table in COPIED:
            _copy(cursor, table, run)
        cursor.execute(
            "UPDATE tags SET value = f.number FROM fresh f WHERE tags.run_id = f.id AND tags.name = 'orc.trial'"
        )
        _copy_sweep(cursor, sweep)


def _copy(cursor: psycopg.Cursor[Any], table: str, run: str) -> None:
    """Of the rows that belong to a run, one for each fresh trial."""
    owner = {"runs": "id", "run_edges": "child_id"}.get(table, "run_id")
    given = {owner: "f.id"}
    if table == "runs":
        given |= {"name": "f.name", "directory": f"replace(o.directory, '{run}', f.id)"}
    given |= {column: f"o.{column}" for column in _columns(cursor, table) if column not in given}
    cursor.execute(
        f"INSERT INTO {table} ({', '.join(given)}) SELECT {', '.join(given.values())} FROM {table} o, fresh f"
        f" WHERE o.{owner} = %s ORDER BY f.number",
        (run,),
    )


def _copy_sweep(cursor: psycopg.Cursor[Any], sweep: str) -> None:
    """Trial, job and the two decisions of each. Jobs have the numbers of their trials."""
    said = {"sweep": sweep}
    scores = "json_build_object('rungs', json_build_array(json_build_array(0, 1.0, f.score, 1)))"
    own = {"sweep_id": "o.sweep_id", "number": "f.number", "run_id": "f.id", "score": "f.score"}
    for table, more in (
        ("trials", {"params": "f.params", "scores": scores}),
        ("sweep_jobs", {"trial": "f.number", "reports": "json_build_array(json_build_array(1.0, f.score))"}),
    ):
        given = {**own, **more}
        given |= {column: f"o.{column}" for column in _columns(cursor, table) if column not in given}
        cursor.execute(
            f"INSERT INTO {table} ({', '.join(given)}) SELECT {', '.join(given.values())} FROM {table} o, fresh f"
            " WHERE o.sweep_id = %(sweep)s AND o.number = 0",
            said,
        )
    (newest,) = _one(cursor, "SELECT max(seq) FROM sweep_decisions WHERE sweep_id = %(sweep)s", **said)
    for place, (kind, own_outcome) in enumerate(
        (
            ("suggest", "jsonb_build_object('trial', f.number, 'values', f.params, 'run', f.id)"),
            ("result", "jsonb_build_object('score', f.score, 'objectives', jsonb_build_array(f.score))"),
        ),
        1,
    ):
        cursor.execute(
            "INSERT INTO sweep_decisions (sweep_id, seq, kind, trial, job, inputs, outcome)"
            " SELECT o.sweep_id, %(newest)s + 2 * (row_number() OVER (ORDER BY f.number) - 1) + %(place)s, o.kind,"
            f" f.number, f.number, o.inputs, (o.outcome::jsonb || {own_outcome})::json FROM sweep_decisions o, fresh f"
            " WHERE o.sweep_id = %(sweep)s AND o.trial = 0 AND o.kind = %(kind)s",
            {**said, "newest": newest, "place": place, "kind": kind},
        )
    cursor.execute(
        "UPDATE sweeps SET decisions = (SELECT count(*) FROM sweep_decisions WHERE sweep_id = %(sweep)s)"
        " WHERE id = %(sweep)s",
        said,
    )


def _columns(cursor: psycopg.Cursor[Any], table: str) -> list[str]:
    """All but those that the database numbers by itself."""
    cursor.execute(
        "SELECT column_name FROM information_schema.columns WHERE table_schema = current_schema() AND table_name = %s"
        " AND is_identity = 'NO' ORDER BY ordinal_position",
        (table,),
    )
    return [name for (name,) in cursor.fetchall()]


def _one(cursor: psycopg.Cursor[Any], query: str, **values: Any) -> tuple[Any, ...]:
    row = cursor.execute(query, values).fetchone()
    assert row is not None
    return row


if __name__ == "__main__":
    main()
