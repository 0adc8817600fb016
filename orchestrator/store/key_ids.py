"""Ids of metric keys, remembered: they never change. What is remembered has an end, whatever names users invent."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import psycopg

from orchestrator.store.cleaning import clean_name

MOST = 500_000
"""Names, and as many places in tables; beyond it everything is read again as it is needed."""

Transaction = Callable[[], AbstractContextManager[psycopg.Connection[Any]]]
"""Opens one that is committed at its end."""

_KNOWN = "SELECT name, id FROM metric_keys WHERE name = ANY(%s)"


class KeyIds:
    """Safe for threads: what one of them forgets, another one has in its own hands."""

    def __init__(self) -> None:
        self._ids: dict[str, int] = {}
        self._tables: dict[tuple[str, ...], np.ndarray] = {}
        self._places = 0

    def tables(
        self, wanted: Iterable[tuple[str, ...]], transaction: Transaction
    ) -> Mapping[tuple[str, ...], np.ndarray]:
        """For each tuple of names their ids (int64) in its order. Names that are new get ids."""
        known, found = self._tables, {}
        missing = []
        for names in wanted:
            table = known.get(names)
            if table is None:
                missing.append(names)
            else:
                found[names] = table
        if missing:
            found.update(self._learned(missing, transaction))
        return found

    def _learned(
        self, missing: Iterable[tuple[str, ...]], transaction: Transaction
    ) -> Mapping[tuple[str, ...], np.ndarray]:
        cleaned = {names: [clean_name(name) or "unnamed" for name in names] for names in missing}
        ids = self._ids_of({name for names in cleaned.values() for name in names}, transaction)
        tables = {names: np.array([ids[name] for name in clean], np.int64) for names, clean in cleaned.items()}
        more = sum(map(len, tables))
        if self._places + more > MOST:
            self._tables, self._places = {}, 0
        self._tables.update(tables)
        self._places += more
        return tables

    def _ids_of(self, names: set[str], transaction: Transaction) -> Mapping[str, int]:
        known = self._ids
        found = {name: known[name] for name in names if name in known}
        missing = sorted(names - found.keys())
        if not missing:
            return found
        # In a transaction of its own: a long commit holds nobody up who has the same new keys, and keys of a commit
        # that fails do no harm.
        with transaction() as connection:
            learned = dict(connection.execute(_KNOWN, (missing,)).fetchall())
            fresh = [name for name in missing if name not in learned]
            if fresh:
                connection.execute(
                    "INSERT INTO metric_keys (name) SELECT unnest(%s::text[]) ON CONFLICT DO NOTHING", (fresh,)
                )
                learned |= dict(connection.execute(_KNOWN, (fresh,)).fetchall())
        if len(known) + len(learned) > MOST:
            self._ids = known = {}
        known.update(learned)
        return found | learned
