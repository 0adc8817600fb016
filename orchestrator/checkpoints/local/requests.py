"""Requests to the member that gives out memory: one per connection, length and JSON, as the local tracker has them."""

from __future__ import annotations

import contextlib
import logging
import socket
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from orchestrator.tracking.local.protocol import (
    Request,
    Response,
    is_same_user,
    receive_request,
    receive_response,
    send,
    value_of,
)

logger = logging.getLogger(__name__)

Answer = Callable[[str, Mapping[str, Any]], Any]


class Requests:
    """Answers what comes over a socket, until `close`. Only processes of our user are heard."""

    def __init__(self, path: Path, answer: Answer) -> None:
        self._path, self._answer = path, answer
        path.unlink(missing_ok=True)  # of a member that was killed: we hold the lock
        self._server = socket.socket(socket.AF_UNIX)
        self._server.bind(str(path))
        path.chmod(0o600)
        self._server.listen(64)
        threading.Thread(target=self._accept, name="requests", daemon=True).start()

    def close(self) -> None:
        """Nobody comes in any more; who is turned away starts the next one."""
        self._path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            self._server.shutdown(socket.SHUT_RDWR)
        self._server.close()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._server.accept()
            except OSError:
                return  # closed
            threading.Thread(target=self._serve, args=(connection,), name="request", daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with connection:
            connection.settimeout(30)
            try:
                if is_same_user(connection):
                    send(connection, self._response(receive_request(connection)))
            except (OSError, ValueError, TypeError) as error:
                logger.debug("a request was cut short: %s", error)

    def _response(self, request: Request) -> Response:
        try:
            return Response(value=self._answer(request.method, request.arguments))
        except Exception as error:
            logger.exception("%s failed", request.method)
            why = f"the checkpoint writer failed: {type(error).__name__}: {error}"
            return Response(error="ConnectionError", error_arguments=[why])


def ask(path: Path, method: str, arguments: Mapping[str, Any], timeout: float) -> Any:
    """One answer. Raises FileNotFoundError or ConnectionError when nobody is there, TimeoutError."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(timeout)
        connection.connect(str(path))
        if not is_same_user(connection):
            raise ConnectionError(f"{path} belongs to another user")
        send(connection, Request(method=method, arguments=arguments))
        return value_of(receive_response(connection))
