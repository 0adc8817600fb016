"""A real PostgreSQL for whoever asks: one server per session, one database per test."""

from __future__ import annotations

import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.postgres import EmbeddedPostgres
from orchestrator.backends import postgres as server_of

# The models here are tiny: torch's threads would only wait for each other, and for those of other processes.
os.environ.setdefault("OMP_NUM_THREADS", "1")

pytest_plugins = ("tests.plugins.runs",)


@pytest.fixture(scope="session")
def postgres() -> Iterator[EmbeddedPostgres]:
    """The session's server."""
    directory = Path(tempfile.mkdtemp(prefix="orct-"))  # short: a socket lives in it
    directory.chmod(0o711)  # as root the server runs as `nobody`, who must pass through
    server = EmbeddedPostgres(directory / "pg")
    server.start()
    yield server
    server.stop()
    shutil.rmtree(directory)


@pytest.fixture
def database_url(postgres: EmbeddedPostgres) -> Iterator[str]:
    """The URL of an empty database of the test's own."""
    name = f"t{uuid.uuid4().hex[:12]}"
    postgres.ensure_database(name)
    yield postgres.url(name)
    server_of.drop_database(postgres.url("postgres"), name)


@pytest.fixture(scope="session")
def template(postgres: EmbeddedPostgres) -> str:
    """The name of a database that has our schema and nothing else; copies of it are made in no time."""
    from orchestrator.store import migrate

    postgres.ensure_database("orc_template")
    migrate.upgrade(postgres.url("orc_template"))
    return "orc_template"


@pytest.fixture(scope="module")
def schema_url(postgres: EmbeddedPostgres, template: str) -> Iterator[str]:
    """The URL of a database with our schema, shared by a module: its tests look at their own runs only."""
    name = f"t{uuid.uuid4().hex[:12]}"
    server_of.ensure_database(postgres.url("postgres"), name, template=template)
    yield postgres.url(name)
    server_of.drop_database(postgres.url("postgres"), name)
