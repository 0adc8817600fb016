"""Locks that live as long as their holder: PostgreSQL gives them back when the connection ends, whatever ended it."""

from __future__ import annotations

import threading
from contextlib import suppress

from sqlalchemy import Connection, Engine, exc

_TRY = "SELECT pg_try_advisory_lock(hashtextextended(%s, 0))"


class SessionLocks:
    """Named locks, each held by a connection of its own, one holder per database. Safe for threads.

    A server that stands behind a pooler must give out sessions, not transactions (pgbouncer: `pool_mode = session`).
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._held: dict[str, Connection] = {}
        self._mutex = threading.Lock()

    def take(self, name: str) -> bool:
        """True when this object holds the lock, since now or still. Asks the server each time."""
        with self._mutex:
            held = self._held.get(name)
            if held is not None:
                try:
                    held.exec_driver_sql("SELECT 1")
                except exc.DBAPIError:  # the connection ended, and the lock with it
                    self._drop(name)
                else:
                    return True
            connection = self._engine.connect().execution_options(isolation_level="AUTOCOMMIT")
            try:
                # A holder whose host vanished is noticed after a minute, not after two hours. Sockets ignore it.
                connection.exec_driver_sql("SET tcp_keepalives_idle = 30")
                connection.exec_driver_sql("SET tcp_keepalives_interval = 10")
                connection.exec_driver_sql("SET tcp_keepalives_count = 3")
                taken = bool(connection.exec_driver_sql(_TRY, (name,)).scalar_one())
            except BaseException:
                connection.invalidate()
                connection.close()
                raise
            if taken:
                self._held[name] = connection
            else:
                connection.close()
            return taken

    def give_back(self, name: str) -> None:
        """Without effect when it is not held."""
        with self._mutex:
            self._release(name)

    def close(self) -> None:
        with self._mutex:
            for name in list(self._held):
                self._release(name)

    def _release(self, name: str) -> None:
        """The end of a session frees its locks a moment later; saying so frees them now."""
        if (connection := self._held.get(name)) is not None:
            with suppress(exc.DBAPIError):
                connection.exec_driver_sql("SELECT pg_advisory_unlock_all()")
        self._drop(name)

    def _drop(self, name: str) -> None:
        connection = self._held.pop(name, None)
        if connection is not None:
            connection.invalidate()  # ends the session, and with it the lock
            connection.close()
