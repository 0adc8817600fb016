"""A wire between a client and an HTTP server that breaks once, where a test says, and remembers what went over it."""

from __future__ import annotations

import contextlib
import socket
import threading
from dataclasses import dataclass, field
from types import TracebackType


@dataclass(kw_only=True)
class Fault:
    """Happens to the first request whose line has `request` in it."""

    request: str
    after_bytes: int = 0
    """Of the answer, that still arrive; then the connection is gone. The request itself reaches the server."""
    happened: bool = False


@dataclass
class BrokenWire:
    """`with BrokenWire(host, port, [Fault(…)]) as wire:` listens on `wire.url`. One request per connection."""

    host: str
    port: int
    faults: list[Fault] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)
    """The first lines of all requests, without the version."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._listener.getsockname()[1]}"

    def __enter__(self) -> BrokenWire:
        self._listener = socket.create_server(("127.0.0.1", 0))
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # Wakes the thread that accepts, which closing alone would not.
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                threading.Thread(target=self._carry, args=(client,), daemon=True).start()

    def _carry(self, client: socket.socket) -> None:
        with contextlib.suppress(OSError), client, socket.create_connection((self.host, self.port)) as server:
            begin = client.recv(65536)
            line = begin.split(b"\r\n", 1)[0].decode().rpartition(" ")[0]
            self.requests.append(line)
            fault = next((f for f in self.faults if f.request in line and not f.happened), None)
            if fault:
                fault.happened = True
            server.sendall(begin)
            threading.Thread(target=_copy, args=(client, server), daemon=True).start()
            _copy(server, client, None if fault is None else fault.after_bytes)
            for end in (client, server):
                with contextlib.suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)


def _copy(source: socket.socket, target: socket.socket, most: int | None = None) -> None:
    """Until the source ends, or more than `most` bytes came."""
    with contextlib.suppress(OSError):
        while data := source.recv(65536):
            if most is not None:
                target.sendall(data[:most])
                most -= len(data[:most])
                if most <= 0:
                    return
                continue
            target.sendall(data)
        target.shutdown(socket.SHUT_WR)
