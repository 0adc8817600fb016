"""A door before a server: while it is shut, connections are cut and refused. What it refused and cut is counted, so
that a test can prove that its faults happened.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading

Address = str | tuple[str, int]
"""A path of a socket, or host and port."""


class Gate:
    """`with Gate(server) as gate`: clients go to `gate.port`, or to `path` where that is given. Open at first."""

    def __init__(self, server: Address, path: str = "", *, is_open: bool = True) -> None:
        self._server, self._path = server, path
        self._lock = threading.Lock()
        self._pairs: set[tuple[socket.socket, socket.socket]] = set()
        self._is_open = is_open
        self.cut = self.refused = 0
        """Connections, since the beginning."""

    def __enter__(self) -> Gate:
        if self._path:
            self._listener = socket.socket(socket.AF_UNIX)
            self._listener.bind(self._path)
            os.chmod(self._path, 0o777)  # a server that runs as another user has its own rules
            self._listener.listen(64)
        else:
            self._listener = socket.create_server(("127.0.0.1", 0), backlog=64)
            self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shut()
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes the thread that accepts
        self._listener.close()
        if self._path:
            os.unlink(self._path)

    @property
    def faults(self) -> int:
        """Connections that came to nothing."""
        return self.cut + self.refused

    def shut(self) -> None:
        with self._lock:
            self._is_open = False
            pairs, self._pairs = self._pairs, set()
            self.cut += len(pairs)
        for pair in pairs:
            _end(*pair)

    def open(self) -> None:
        with self._lock:
            self._is_open = True

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        server = socket.socket(socket.AF_UNIX if isinstance(self._server, str) else socket.AF_INET)
        pair = client, server
        with client, server, contextlib.suppress(OSError):
            with self._lock:
                if not self._is_open:
                    self.refused += 1
                    return
            server.connect(self._server)
            with self._lock:
                self._pairs.add(pair)
            answers = threading.Thread(target=_carry, args=(server, client), daemon=True)
            answers.start()
            _carry(client, server)
            answers.join()
        with self._lock:
            self._pairs.discard(pair)


def _carry(source: socket.socket, target: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(1 << 16):
            target.sendall(data)
    _end(source, target)


def _end(*ends: socket.socket) -> None:
    for end in ends:
        with contextlib.suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)
