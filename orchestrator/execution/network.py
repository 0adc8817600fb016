"""Which nodes reach which over TCP, asked after ranks waited for each other in vain. The node agents do it: each
listens on its node's address for a moment, and each sends the others as much as no small packet could carry.

All of it takes at most ten seconds and never raises: it only adds words to a failure.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

LISTENS = 8.0
"""Seconds."""
CONNECTS = 2.0
"""Seconds that a connection, and then an answer, may take."""
ASKED = 4.0
"""Seconds in which an agent answers."""
PAYLOAD = 256 << 10
"""Bytes: a path that loses large packets is told from one that works."""
MOST = 16
"""Nodes that are looked at: the number of pairs grows with their square."""
ONE_HOST = "All ranks were on one host: no network between them was looked at."
_DONE = b"k"


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    """A node. Example: Peer(id="f00…", address="10.0.0.7", label="gpu-7 at 10.0.0.7")."""

    id: str
    address: str
    label: str


class Ask(Protocol):
    """Calls a method of the agents of these nodes at once; an exception in the place of an answer that is not there."""

    def __call__(self, arguments: Mapping[str, Sequence[Any]], method: str, timeout: float) -> Mapping[str, Any]: ...


def listen(address: str, seconds: float = LISTENS) -> int:
    """On a node: takes what `reach` sends, for so many seconds, in a thread. Gives the port. Raises OSError."""
    listener = socket.create_server((address, 0), backlog=64)
    listener.settimeout(0.2)
    port = int(listener.getsockname()[1])
    threading.Thread(target=_serve, args=(listener, time.monotonic() + seconds), name="reach", daemon=True).start()
    return port


def reach(targets: Sequence[tuple[str, str, int]]) -> dict[str, float | str]:
    """On a node: to each (id, address, port) the seconds that sending took, or in words why it did not work."""
    with ThreadPoolExecutor(max_workers=max(len(targets), 1)) as pool:
        return dict(zip([target[0] for target in targets], pool.map(_sent, targets), strict=True))


def with_network(error: Mapping[str, Any], words: str) -> dict[str, Any]:
    """The error of a collective that timed out, with what `check` found."""
    return {**error, "network": words, "hint": " ".join(filter(None, [str(error.get("hint") or ""), words]))}


def check(nodes: Callable[[], Sequence[Peer]], ask: Ask) -> str:
    """Who reaches whom, in words. Never raises."""
    try:
        peers = nodes()[:MOST]
        if len({peer.address for peer in peers}) < 2:
            return ONE_HOST
        ports = ask({peer.id: (peer.address,) for peer in peers}, "listen", ASKED)
        silent = {peer.id: str(ports.get(peer.id)) for peer in peers if not isinstance(ports.get(peer.id), int)}
        there = [peer for peer in peers if peer.id not in silent]
        targets = {
            peer.id: ([(other.id, other.address, ports[other.id]) for other in there if other is not peer],)
            for peer in there
        }
        answers = ask(targets, "reach", ASKED + 1)
        return finding(peers, silent, {id: answer for id, answer in answers.items() if isinstance(answer, Mapping)})
    except Exception as error:
        return f"The network between the nodes could not be looked at: {type(error).__name__}: {error}"


def finding(peers: Sequence[Peer], silent: Mapping[str, str], reached: Mapping[str, Mapping[str, Any]]) -> str:
    """Pure. `silent`: nodes whose agent did not answer; `reached`: node -> what its `reach` gave."""
    labels = {peer.id: peer.label for peer in peers}
    said = [f"The agent of {labels[id]} does not answer ({why})" for id, why in silent.items()]
    asked = [peer.id for peer in peers if peer.id in reached]
    broken = {
        (start, end): str(why) for start in asked for end, why in reached[start].items() if not isinstance(why, float)
    }
    for end in [peer.id for peer in peers]:
        missed = [start for start in asked if (start, end) in broken]
        others = [start for start in asked if start != end]
        if not missed:
            continue
        why = broken[missed[0], end]
        if len(missed) == len(others) and len(others) > 1:
            said.append(f"{labels[end]} is reached from no other node ({why})")
        else:
            said.append(f"{labels[end]} is not reached from {', '.join(labels[start] for start in missed)} ({why})")
    if said:
        return ". ".join(said) + "."
    times = [took for answer in reached.values() for took in answer.values()]
    slowest = f", the slowest in {1000 * max(times):.0f} ms" if times else ""
    return f"All {len(peers)} nodes reach each other now{slowest}."


def _serve(listener: socket.socket, until: float) -> None:
    with listener:
        while time.monotonic() < until:
            try:
                connection, _ = listener.accept()
            except TimeoutError:
                continue
            except OSError:
                return
            threading.Thread(target=_take, args=(connection,), daemon=True).start()


def _take(connection: socket.socket) -> None:
    with connection, contextlib.suppress(OSError):
        connection.settimeout(CONNECTS)
        left = PAYLOAD
        while left > 0 and (piece := connection.recv(1 << 16)):
            left -= len(piece)
        if left <= 0:
            connection.sendall(_DONE)


def _sent(target: tuple[str, str, int]) -> float | str:
    _, address, port = target
    began = time.monotonic()
    try:
        with socket.create_connection((address, port), timeout=CONNECTS) as connection:
            connection.settimeout(CONNECTS)
            connection.sendall(b"\0" * PAYLOAD)
            if connection.recv(1) != _DONE:
                return "the connection was closed"
        return time.monotonic() - began
    except TimeoutError:
        return f"no answer in {CONNECTS:g} s"
    except OSError as error:
        return error.strerror or str(error)
