"""Reading what is recorded, for people and tools: `orc`, notebooks, reports. Nothing here writes.

`Catalog` says what can be asked. `DatabaseCatalog` answers straight from the database, `HttpCatalog` asks the API
server of a stack the same questions. Answers are the plain values of `store/views.py`. Light to import: `orc ls` must
start fast, so numpy, the database driver and pyarrow are loaded by whoever needs them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from orchestrator.catalog.questions import LAST, Catalog, LogFiles
from orchestrator.stack import Stack

if TYPE_CHECKING:
    from orchestrator.store.store import Store

__all__ = ["LAST", "Catalog", "LogFiles", "open_catalog", "open_store"]


@contextmanager
def open_catalog(home: Path) -> Iterator[Catalog]:
    """The catalog of the stack whose data directory is `home`. Raises ServiceUnavailable or SchemaMismatch.

    Its API server is asked if it lives, because a process that need not import a database driver answers in a fifth of
    the time; else the database itself.
    """
    from orchestrator.catalog import remote

    server = remote.living_server(Stack.load(home))
    if server is not None:
        with closing(server):
            yield server
        return
    from orchestrator.catalog.database import DatabaseCatalog

    with open_store(home) as store:
        yield DatabaseCatalog(store)


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
