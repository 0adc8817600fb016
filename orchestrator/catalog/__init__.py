"""Reading what is recorded, for people and tools: `orc`, notebooks, reports. Nothing here writes.

`Catalog` says what can be asked. `DatabaseCatalog` answers straight from the database, `HttpCatalog` asks the API
server of a stack the same questions. Answers are the plain values of `store/views.py`. Light to import: `orc ls` must
start fast, so numpy, the database driver and pyarrow are loaded by whoever needs them.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from orchestrator.catalog.address import token_from, told_url
from orchestrator.catalog.questions import LAST, Catalog, LogFiles
from orchestrator.stack import Stack, default_home

if TYPE_CHECKING:
    from orchestrator.store.store import Store

__all__ = ["LAST", "Catalog", "LogFiles", "open_catalog", "open_store"]


@contextmanager
def open_catalog(home: Path | None = None, *, api: str = "") -> Iterator[Catalog]:
    """The catalog of the API server at `api`, else of the stack whose data directory is `home`, else of the server in
    ORC_API_URL, else of the stack in ORC_HOME or ~/.orc. Raises ServiceUnavailable or SchemaMismatch.

    A stack's own API server is asked if it lives, because a process that need not import a database driver answers in a
    fifth of the time; else the database itself.
    """
    from orchestrator.catalog import remote

    url = told_url(api, home)
    if url:
        token, found_in = token_from(os.environ, url)
        with closing(remote.HttpCatalog(url, token, token_from=found_in)) as told:
            told.check()
            yield told
        return
    home = home or default_home()
    server = remote.living_server(Stack.load(home))
    if server is not None:
        with closing(server):
            yield server
        return
    from orchestrator.catalog.database import DatabaseCatalog

    with open_store(home) as store:
        yield DatabaseCatalog(store, Stack.load(home).redis_url)


@contextmanager
def open_store(home: Path) -> Iterator[Store]:
    """The stack's store, with the schema checked, for the few commands that write."""
    from orchestrator.store.store import Store

    store = Store(Stack.load(home).database_url, pool_size=1)
    try:
        store.check_schema()
        yield store
    finally:
        store.close()
