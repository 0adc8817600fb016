"""What is said over the local tracker's socket: one request, one response, then the connection ends.

A message is its length (4 bytes) and JSON. Each side checks that the other one is a process of the same user.
"""

from __future__ import annotations

import json
import os
import socket
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from orchestrator import errors
from orchestrator.errors import UserError
from orchestrator.records import RunSpec, RunTicket

PROTOCOL = 4
ANY_PROTOCOL = ("describe", "stop")
"""Understood from every version, so that a newer one can end an older one."""
MAX_BYTES = 64 << 20
_LENGTH = struct.Struct("<I")
_PEER = struct.Struct("3i")


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """Example: Request(method="heartbeat", arguments={"run": "r1", "attempt": 1})."""

    method: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    protocol: int = PROTOCOL


@dataclass(frozen=True, slots=True, kw_only=True)
class Response:
    """`error` is the name of one of our errors, or of ConnectionError; '' when all went well."""

    value: Any = None
    error: str = ""
    error_arguments: list[Any] = field(default_factory=list)


def failure(error: Exception) -> Response:
    """An exception on its way to the caller. What is no error of ours arrives as ConnectionError."""
    name = type(error).__name__
    if isinstance(error, UserError) and getattr(errors, name, None) is type(error):
        return Response(error=name, error_arguments=list(error.args))
    if isinstance(error, UserError):
        return Response(error="UserError", error_arguments=[str(error)])
    return Response(error="ConnectionError", error_arguments=[f"the local tracker failed: {name}: {error}"])


def value_of(response: Response) -> Any:
    """What came back, or the error raised here."""
    if not response.error:
        return response.value
    given = [tuple(each) if isinstance(each, list) else each for each in response.error_arguments]
    kind: Callable[..., Exception] = getattr(errors, response.error, ConnectionError)
    raise kind(*given)


def spec_from(raw: Mapping[str, Any]) -> RunSpec:
    return RunSpec(**raw)


def ticket_from(raw: Mapping[str, Any]) -> RunTicket:
    return RunTicket(**{**raw, "earlier": tuple(raw.get("earlier", ()))})


def send(connection: socket.socket, message: Request | Response) -> None:
    # Not asdict: it would copy every value of it, and a sweep has some hundred thousand.
    text = json.dumps({each.name: getattr(message, each.name) for each in fields(message)}).encode()
    connection.sendall(_LENGTH.pack(len(text)) + text)


def receive_request(connection: socket.socket) -> Request:
    """Raises ConnectionError when the other side speaks another protocol, or went away."""
    request = Request(**_receive(connection))
    if request.protocol != PROTOCOL and request.method not in ANY_PROTOCOL:
        raise ConnectionError(f"it speaks protocol {request.protocol}, this version {PROTOCOL}")
    return request


def receive_response(connection: socket.socket) -> Response:
    """Raises ConnectionError when the other side went away."""
    return Response(**_receive(connection))


def _receive(connection: socket.socket) -> dict[str, Any]:
    (length,) = _LENGTH.unpack(_exactly(connection, _LENGTH.size))
    if length > MAX_BYTES:
        raise ConnectionError(f"a message of {length} bytes is none of ours")
    return json.loads(_exactly(connection, length))


def _exactly(connection: socket.socket, count: int) -> bytes:
    found = bytearray()
    while len(found) < count:
        piece = connection.recv(count - len(found))
        if not piece:
            raise ConnectionError("the other side went away")
        found += piece
    return bytes(found)


def is_same_user(connection: socket.socket) -> bool:
    """Whether the process at the other end runs under our account."""
    _, uid, _ = _PEER.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size))
    return uid == os.geteuid()
