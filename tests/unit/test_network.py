"""Which nodes reach which: over real sockets, and in words."""

from __future__ import annotations

import socket
from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from orchestrator.execution import network
from orchestrator.execution.network import Peer, check, finding

A, B, C = (
    Peer(id=id, address=f"127.0.0.{number}", label=f"{id}-host") for id, number in (("a", 11), ("b", 12), ("c", 13))
)


class Agents:
    """Those of nodes with loopback addresses; `refuses` has nobody behind its port, `silent` no agent."""

    def __init__(self, *, refuses: str = "", silent: str = "") -> None:
        self.refuses, self.silent = refuses, silent

    def __call__(self, arguments: Mapping[str, Sequence[Any]], method: str, timeout: float) -> Mapping[str, Any]:
        return {id: self.answer(id, method, *given) for id, given in arguments.items()}

    def answer(self, id: str, method: str, *given: Any) -> Any:
        if id == self.silent:
            return TimeoutError("it did not answer within 4 s")
        if method == "listen" and id == self.refuses:
            with socket.create_server((given[0], 0)) as gone:
                return gone.getsockname()[1]
        return {"listen": network.listen, "reach": network.reach}[method](*given)


def test_nodes_that_reach_each_other_are_no_finding() -> None:
    assert check(lambda: [A, B, C], Agents()).startswith("All 3 nodes reach each other now, the slowest in ")


def test_a_node_that_nobody_reaches_is_named_and_one_without_an_agent(monkeypatch: pytest.MonkeyPatch) -> None:
    said = check(lambda: [A, B, C], Agents(refuses="b"))
    assert said == "b-host is reached from no other node (Connection refused)."
    said = check(lambda: [A, B, C], Agents(silent="c"))
    assert said == "The agent of c-host does not answer (it did not answer within 4 s)."


def test_a_peer_that_takes_nothing_costs_seconds_not_minutes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network, "CONNECTS", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        found = network.reach([("x", "127.0.0.1", deaf.getsockname()[1])])
    assert found == {"x": "no answer in 0.2 s"}


def test_one_direction_that_is_broken_is_told_as_that() -> None:
    reached = {"a": {"b": "no answer in 2 s", "c": 0.001}, "b": {"a": 0.001, "c": 0.001}, "c": {"a": 0.001, "b": 0.002}}
    assert finding([A, B, C], {}, reached) == "b-host is not reached from a-host (no answer in 2 s)."


def test_on_one_host_there_is_nothing_to_look_at_and_it_never_raises() -> None:
    assert check(lambda: [A], Agents()) == network.ONE_HOST

    def away() -> Sequence[Peer]:
        raise ConnectionError("no cluster")

    assert "could not be looked at: ConnectionError: no cluster" in check(away, Agents())
    error = network.with_network({"kind": "collective_timeout", "hint": "They waited."}, "All well.")
    assert (error["network"], error["hint"]) == ("All well.", "They waited. All well.")
