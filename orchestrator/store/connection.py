"""Connections to PostgreSQL, and what its errors mean for a user."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psycopg
from sqlalchemy import create_engine, exc
from sqlalchemy.engine import URL, Engine, make_url

from orchestrator.errors import ConfigError, SchemaMismatch, ServiceUnavailable
from orchestrator.store.tables import HEAD

CONNECT_TIMEOUT = 10
"""Seconds."""

READ_ONLY = "-c default_transaction_read_only=on -c idle_in_transaction_session_timeout=60s"
"""For sessions that answer others: no write, whatever is asked, and no transaction held open by a client that hangs."""

_HINTS = {
    "28": "Check user and password in database.url (and pg_hba.conf of the server).",
    "3D": "Create the database, or correct its name in database.url.",
    "42501": "Let the owner grant what is missing, or make the role in database.url the owner of the database.",
    "53100": "Make room on the server's disk.",
    "53300": "The server has no connection left: raise max_connections or stop other clients.",
    "57P03": "The server is starting or stopping: try again in a moment.",
    "25006": "This is a read-only standby: database.url must point to the primary.",
}
"""By SQLSTATE, or its first two characters."""


def parse(url: str) -> URL:
    """The URL for psycopg 3; `postgresql://` and `postgres://` are taken as well. Raises ConfigError."""
    try:
        parsed = make_url(url)
    except exc.ArgumentError:  # its message may hold the password
        raise ConfigError("database.url", None, "this is no URL.", _FORM) from None
    if parsed.drivername in ("postgresql", "postgres", "postgresql+psycopg"):
        return parsed.set(drivername="postgresql+psycopg")
    raise ConfigError(
        "database.url", redacted(parsed), f"{parsed.drivername} is not supported, only PostgreSQL.", _FORM
    )


_FORM = "Write it as postgresql://user:password@host:5432/database"


def redacted(url: URL) -> str:
    """The address without user, password and options: for people."""
    host = url.host or url.query.get("host") or "localhost"
    where = host if isinstance(host, str) else ",".join(host)
    port = f":{url.port}" if url.port else ""
    return f"{where}{port}/{url.database or ''}"


def open_engine(url: URL, pool_size: int, read_only: bool = False) -> Engine:
    """A pool that connects when it is first used and replaces connections that a server's restart has cut."""
    said = url.query.get("options", ())
    options = {"options": " ".join([*([said] if isinstance(said, str) else said), READ_ONLY])} if read_only else {}
    return create_engine(
        url,
        pool_size=pool_size,
        max_overflow=2,
        pool_timeout=CONNECT_TIMEOUT,
        pool_pre_ping=True,
        hide_parameters=True,  # values that users log do not belong into error messages
        connect_args={"application_name": "orc", "connect_timeout": CONNECT_TIMEOUT, **options},
    )


@contextmanager
def told(url: URL) -> Iterator[None]:
    """Turns errors of the connection, the server and the schema into ours. Errors in our own SQL pass."""
    try:
        yield
    except exc.TimeoutError as error:
        raise ServiceUnavailable(
            "postgresql", redacted(url), "all connections of this process are in use.", "Try again in a moment."
        ) from error
    except exc.DBAPIError as error:
        raise _translated(url, error.orig if isinstance(error.orig, psycopg.Error) else None, error) from error
    except psycopg.Error as error:
        raise _translated(url, error, error) from error


def _translated(url: URL, error: psycopg.Error | None, original: Exception) -> Exception:
    if error is None:
        return original
    state = error.sqlstate or ""
    if state in ("42P01", "42703"):  # a table or column is missing
        return SchemaMismatch("", HEAD, newer=False)
    hint = _HINTS.get(state) or _HINTS.get(state[:2])
    if isinstance(error, psycopg.OperationalError | psycopg.InterfaceError) or hint:
        return ServiceUnavailable(
            "postgresql", redacted(url), scrubbed(reason(error), url), hint or "Is it running? `orc status` tells."
        )
    return original


def reason(error: BaseException) -> str:
    """The last telling line of what psycopg says; lists of tried addresses come before it, advice after it."""
    lines = [line.strip() for line in str(error).splitlines()]
    telling = [line for line in lines if line and not line.startswith(("HINT", "Is the server running"))]
    text = telling[-1] if telling else type(error).__name__
    return text if text.endswith((".", "?")) else text + "."


def scrubbed(text: str, url: URL) -> str:
    """The text without the URL's password, whatever it came from."""
    secrets: list[Any] = [url.password, url.query.get("password")]
    for secret in sorted({str(secret) for secret in secrets if secret}, key=len, reverse=True):
        text = text.replace(secret, "***")
    return text
