"""A small HTTP proxy that breaks things: it forwards a request, reads the server's answer, and then resets the
connection, or answers late. What it did is counted, so that a test can prove that its faults happened.
"""

from __future__ import annotations

import contextlib
import http.client
import socket
import struct
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import BinaryIO

PASS, RESET = "pass", "reset"


@dataclass(frozen=True, slots=True)
class Request:
    method: str
    path: str
    headers: dict[str, str]
    body: bytes

    @property
    def kind(self) -> str:
        """What an MLflow client wants by it."""
        end = self.path.partition("?")[0].rpartition("/mlflow/")[2]
        if end == "runs/log-batch":
            return "log_metrics" if b'"metrics": [{' in self.body else "log_texts"
        return "upload" if self.method == "PUT" else end


Rule = Callable[[Request], "str | float"]
"""PASS, RESET (after the server has done it), or seconds to wait before the answer."""


@dataclass
class FaultProxy:
    """In front of the server on `port`. Use as a context; `uri` is where clients go, `rule` may be changed any time."""

    port: int
    rule: Rule = lambda request: PASS
    seen: Counter[str] = field(default_factory=Counter)
    resets: Counter[str] = field(default_factory=Counter)
    """Answered connections that were reset, by kind, only where the server had said that it did it (200)."""
    delays: Counter[str] = field(default_factory=Counter)

    def __enter__(self) -> FaultProxy:
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.uri = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self._over = threading.Event()
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes the thread that accepts
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with client, contextlib.suppress(OSError, http.client.HTTPException), client.makefile("rb") as reader:
            request = _read(reader)
            if request is None:
                return
            self.seen[request.kind] += 1
            verdict = self.rule(request)
            if not isinstance(verdict, str):
                self.delays[request.kind] += 1
                self._over.wait(verdict)  # not a guess of how long something takes: this is the fault
            status, answer = self._forward(request)
            if verdict == RESET:
                # Counted before the client can see it.
                self.resets[request.kind] += status == 200
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                return
            client.sendall(answer)

    def _forward(self, request: Request) -> tuple[int, bytes]:
        server = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            server.request(request.method, request.path, request.body, request.headers)
            answer = server.getresponse()
            body = answer.read()
        finally:
            server.close()
        dropped = ("connection", "transfer-encoding", "content-length")
        lines = [f"{name}: {value}" for name, value in answer.getheaders() if name.lower() not in dropped]
        lines += [f"content-length: {len(body)}", "connection: close"]
        head = f"HTTP/1.1 {answer.status} {answer.reason}\r\n" + "\r\n".join(lines) + "\r\n\r\n"
        return answer.status, head.encode() + body


def _read(reader: BinaryIO) -> Request | None:
    first = reader.readline().decode().split()
    if len(first) != 3:
        return None
    headers = {}
    while line := reader.readline().strip().decode("latin-1"):
        name, _, value = line.partition(":")
        headers[name.strip()] = value.strip()
    length = int({name.lower(): value for name, value in headers.items()}.get("content-length", 0))
    kept = {name: value for name, value in headers.items() if name.lower() not in ("connection", "host")}
    return Request(first[0], first[1], {**kept, "Connection": "close"}, reader.read(length))
