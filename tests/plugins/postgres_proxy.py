"""Between a client and PostgreSQL: it knows where in the protocol they are, and does something just there.

A fault is armed with `at`: the first connection that gets there stops, the fault's action runs (the server is killed,
say), and the connection is cut. What happened is in `happened`, so a test can prove it.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

COPY, BEFORE_COMMIT, AFTER_COMMIT = "inside COPY", "before COMMIT", "after COMMIT"
_LENGTH = struct.Struct(">I")
_SOCKET = ".s.PGSQL.5432"


@dataclass
class PostgresProxy:
    """`with PostgresProxy(server_directory, own_directory) as proxy`: sockets of those names are in both."""

    server: Path
    directory: Path
    delay: float = 0.0
    """Seconds before each answer."""

    def __enter__(self) -> PostgresProxy:
        self.happened: list[str] = []
        self.delayed = 0
        self._done = threading.Event()
        self._at, self._action = "", _nothing
        self._over = threading.Event()
        self.directory.mkdir(mode=0o700, exist_ok=True)
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(self.directory / _SOCKET))
        self._listener.listen(16)
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes the thread that accepts
        self._listener.close()
        os.unlink(self.directory / _SOCKET)

    def url(self, direct: str) -> str:
        """The URL of a database of the server, through here."""
        return direct.replace(str(self.server), str(self.directory))

    def at(self, place: str, action: Callable[[], object]) -> None:
        """Once: when a transaction that writes points gets to `place`."""
        self._done.clear()
        self._at, self._action = place, action

    def fault(self, patience: float = 30.0) -> list[str]:
        """What happened so far, when the armed fault has; the client may hear of it before its action is over."""
        assert self._done.wait(patience), f"nothing got to {self._at}"
        return self.happened

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                threading.Thread(target=self._carry, args=(client,), daemon=True).start()

    def _carry(self, client: socket.socket) -> None:
        with contextlib.suppress(OSError), client, socket.socket(socket.AF_UNIX) as server:
            server.connect(str(self.server / _SOCKET))
            link = _Link(client, server, self)
            answers = threading.Thread(target=link.answers, daemon=True)
            answers.start()
            link.requests()
            answers.join()

    def is_armed(self, place: str) -> bool:
        return self._at == place

    def reached(self, place: str) -> bool:
        """Whether the fault is armed for here; then it happens now."""
        if not self.is_armed(place):
            return False
        self._at = ""
        self._action()
        self.happened.append(place)
        self._done.set()
        return True

    def wait(self) -> None:
        if self.delay:
            self.delayed += 1
            self._over.wait(self.delay)  # this is the fault, not a wait for something


def _nothing() -> None:
    pass


class _Link:
    """One connection, both ways."""

    def __init__(self, client: socket.socket, server: socket.socket, proxy: PostgresProxy) -> None:
        self._client, self._server, self._proxy = client, server, proxy
        self._commits = False
        """A COMMIT of points is on its way; its answer comes next."""

    def requests(self) -> None:
        """From the client to the server, message by message. The first one has no type."""
        writes_points = False
        with contextlib.suppress(ConnectionError, OSError):
            self._server.sendall(_message(self._client, typed=False))
            while True:
                message = _message(self._client)
                kind = message[:1]
                if kind == b"d":
                    writes_points = True
                    if self._proxy.is_armed(COPY):
                        self._server.sendall(message[: len(message) // 2])
                    if self._proxy.reached(COPY):
                        break
                elif kind == b"Q" and message[5:].upper().startswith(b"COMMIT") and writes_points:
                    if self._proxy.reached(BEFORE_COMMIT):
                        break
                    self._commits, writes_points = True, False
                self._server.sendall(message)
        self._cut()

    def answers(self) -> None:
        with contextlib.suppress(ConnectionError, OSError):
            while data := self._server.recv(65536):
                if self._commits:
                    self._commits = False
                    if self._proxy.reached(AFTER_COMMIT):
                        break
                self._proxy.wait()
                self._client.sendall(data)
        self._cut()

    def _cut(self) -> None:
        for end in (self._client, self._server):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


def _message(source: socket.socket, *, typed: bool = True) -> bytes:
    head = _exactly(source, 5 if typed else 4)
    (length,) = _LENGTH.unpack(head[-4:])
    return head + _exactly(source, length - 4)


def _exactly(source: socket.socket, count: int) -> bytes:
    found = bytearray()
    while len(found) < count:
        piece = source.recv(min(count - len(found), 1 << 20))
        if not piece:
            raise ConnectionError("the client went away")
        found += piece
    return bytes(found)
