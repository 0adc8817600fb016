"""What is asked of a PostgreSQL server before there is a schema: is it there, how old is it, does a database exist.

Everything about the content of our database goes through `orchestrator.store`. URLs are in SQLAlchemy's form,
`postgresql+psycopg://user:password@host/database?host=/socket/directory`. All functions raise ServiceUnavailable.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qsl, quote, unquote, urlencode, urlsplit

import psycopg
from psycopg import sql

from orchestrator.errors import ServiceUnavailable

OLDEST_VERSION = 15
"""The oldest major version whose SQL we use."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Server:
    """A server that answered. Example: Server(version="18.1", major=18, can_create_databases=True, latency_ms=0.4)."""

    version: str
    major: int
    can_create_databases: bool
    latency_ms: float


def conninfo(url: str) -> str:
    """The same URL as libpq understands it."""
    scheme, rest = url.split("://", 1)
    return f"{scheme.split('+')[0]}://{rest}"


def address(url: str) -> str:
    """Where the URL points, for people: host, port and database, never a user or a password."""
    parts = urlsplit(url)
    host = dict(parse_qsl(parts.query)).get("host") or parts.netloc.rpartition("@")[2] or "localhost"
    return f"{host}/{unquote(parts.path[1:])}"


def database_of(url: str) -> str:
    return unquote(urlsplit(url).path[1:])


def with_database(url: str, database: str) -> str:
    """The URL of another database on the same server."""
    before, rest = url.split("://", 1)
    authority = rest.split("/", 1)[0].split("?", 1)[0]
    query = urlsplit(url).query
    return f"{before}://{authority}/{quote(database, safe='')}" + (f"?{query}" if query else "")


def with_schema(url: str, schema: str) -> str:
    """The URL whose connections see and create tables in that schema only."""
    head, _, query = url.partition("?")
    options = [(name, value) for name, value in parse_qsl(query) if name != "options"]
    given = dict(parse_qsl(query)).get("options", "")
    options.append(("options", f"{given} -csearch_path={schema}".strip()))
    return f"{head}?{urlencode(options, quote_via=quote, safe='/')}"


@contextmanager
def _connected(url: str, timeout: int) -> Iterator[psycopg.Connection[Any]]:
    try:
        with psycopg.connect(
            conninfo(url), connect_timeout=timeout, autocommit=True, application_name="orc"
        ) as connection:
            yield connection
    except psycopg.Error as error:
        raise ServiceUnavailable(
            "postgresql", address(url), _reason(error), "Is it running? `orc doctor` tells more."
        ) from error


def _reason(error: Exception) -> str:
    """What the server or the network said, without the list of addresses that were tried."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    telling = [line for line in lines if " failed: " in line] or lines[-1:]
    return telling[-1].rpartition(" failed: ")[2].removeprefix("FATAL:").strip().rstrip(".") + "."


def clock_offset(url: str) -> float:
    """Seconds that the server's clock is ahead of ours, to within half a round trip."""
    with _connected(url, timeout=5) as connection:
        before = time.time()
        row = connection.execute("select extract(epoch from clock_timestamp())::float8").fetchone()
        after = time.time()
    assert row is not None
    return row[0] - (before + after) / 2


def probe(url: str, timeout: int = 5) -> Server:
    """Connects once and asks who is there."""
    with _connected(url, timeout) as connection:
        asked = time.perf_counter()
        row = connection.execute(
            "select current_setting('server_version'), current_setting('server_version_num')::int,"
            " (select rolcreatedb or rolsuper from pg_roles where rolname = current_user)"
        ).fetchone()
        latency_ms = (time.perf_counter() - asked) * 1000
    assert row is not None
    return Server(
        version=row[0].split()[0], major=row[1] // 10000, can_create_databases=bool(row[2]), latency_ms=latency_ms
    )


def ensure_database(url: str, name: str, *, template: str = "template1") -> None:
    """Creates the database, a copy of `template`, unless it exists; `url` is any other database of that server.

    Two callers at once do no harm.
    """
    with _connected(url, 10) as connection:
        if connection.execute("select 1 from pg_database where datname = %s", [name]).fetchone():
            return
        try:
            copied = sql.SQL("create database {} template {}").format(sql.Identifier(name), sql.Identifier(template))
            connection.execute(copied)
        except (psycopg.errors.DuplicateDatabase, psycopg.errors.UniqueViolation):
            return


def drop_database(url: str, name: str) -> None:
    """Drops the database if it exists, ending whatever is connected to it."""
    with _connected(url, 10) as connection:
        connection.execute(sql.SQL("drop database if exists {} with (force)").format(sql.Identifier(name)))


def ensure_schema(url: str, name: str) -> None:
    """Creates the schema in the URL's database unless it exists."""
    with _connected(url, 10) as connection:
        if connection.execute("select 1 from pg_namespace where nspname = %s", [name]).fetchone():
            return
        try:
            connection.execute(sql.SQL("create schema {}").format(sql.Identifier(name)))
        except (psycopg.errors.DuplicateSchema, psycopg.errors.UniqueViolation):
            return
