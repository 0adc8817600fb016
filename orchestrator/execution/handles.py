"""Finds our services on the cluster, speaks to them, starts those that every node has. The only library module that
waits for Ray calls.

A service may die and come back under its name at any time, so a call looks its handle up again when the last one
failed. Ray's own exceptions end here: callers see ConnectionError, TimeoutError, or the service's own error.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError, RayTaskError

from orchestrator.errors import ServiceUnavailable
from orchestrator.records import Ack, RunSpec, RunTicket
from orchestrator.sweep_records import SweepPoll, SweepRecord, SweepSpec, SweepStep

NAMESPACE = "orc"
TRACKER = "orc-tracker"
MIRROR = "orc-mirror"


@dataclass(frozen=True, slots=True)
class PerNode:
    """The names of actors of which every node has one: `<before><12 of the node's id><after>`."""

    before: str
    after: str = ""

    def name(self, node_id: str) -> str:
        return f"{self.before}{node_id[:12]}{self.after}"

    def names(self, name: str) -> bool:
        """Whether it is one of these names."""
        # A run's own actors have a slash in their names, whatever the run is called.
        return name.startswith(self.before) and name.endswith(self.after) and "/" not in name


NODE_AGENTS = PerNode("orc-node-agent-")
_CHECKPOINT_WRITER = "orc-checkpoint-writer-"


def checkpoint_writers(index: int) -> PerNode:
    """Every node's writer of that number, from 0."""
    return PerNode(_CHECKPOINT_WRITER, f"-{index}")


def node_agent(node_id: str) -> str:
    """Name of the agent of one node."""
    return NODE_AGENTS.name(node_id)


def checkpoint_writer(node_id: str, index: int) -> str:
    """Name of one of a node's checkpoint writers."""
    return checkpoint_writers(index).name(node_id)


def surplus_writers(names: Iterable[str], count: int) -> list[str]:
    """Those whose number is not below `count`: they are left from settings with more writers."""
    numbers = {name: name.rpartition("-")[2] for name in names if PerNode(_CHECKPOINT_WRITER).names(name)}
    return sorted(name for name, number in numbers.items() if number.isdigit() and int(number) >= count)


class Remote:
    """One named service. `call` blocks for at most `timeout` seconds."""

    def __init__(self, name: str, timeout: float = 10.0) -> None:
        self.name, self.timeout = name, timeout
        self._handle: Any = None

    def call(self, method: str, *args: Any, timeout: float | None = None) -> Any:
        """Raises ConnectionError when the service is not there, TimeoutError when it does not answer."""
        try:
            if self._handle is None:
                self._handle = ray.get_actor(self.name, namespace=NAMESPACE)
            return ray.get(getattr(self._handle, method).remote(*args), timeout=timeout or self.timeout)
        except RayTaskError as error:
            raise (error.cause or error) from None
        except GetTimeoutError as error:
            raise TimeoutError(f"{self.name} did not answer within {timeout or self.timeout:.0f} s") from error
        except (RayError, ValueError) as error:  # an actor, node or head that is gone, and what was lost with it
            self._handle = None
            raise ConnectionError(f"{self.name} is not there: {type(error).__name__}") from error


class RemoteTracker:
    """The tracker as everybody else sees it; same methods as TrackerService."""

    def __init__(self, timeout: float = 10.0) -> None:
        self._remote = Remote(TRACKER, timeout)

    def push(self, frames: Sequence[bytes]) -> list[Ack]:
        return self._remote.call("push", list(frames))

    def acknowledged(self, producers: Sequence[tuple[str, str, int]]) -> list[Ack]:
        return self._remote.call("acknowledged", list(producers))

    def open_run(self, spec: RunSpec) -> RunTicket:
        return self._remote.call("open_run", spec, timeout=30.0)

    def open_runs(self, specs: Sequence[RunSpec]) -> list[RunTicket]:
        return self._remote.call("open_runs", list(specs), timeout=60.0)

    def heartbeat(self, run: str, attempt: int) -> bool:
        # A lost answer must leave time for another beat before the lease is over.
        return self._remote.call("heartbeat", run, attempt, timeout=4.0)

    def heartbeats(self, attempts: Sequence[tuple[str, int]]) -> list[bool]:
        return self._remote.call("heartbeats", list(attempts), timeout=4.0)

    def cancel(self, run: str, user: str = "") -> None:
        self._remote.call("cancel", run, user)

    def halt(self, run: str, attempt: int) -> None:
        self._remote.call("halt", run, attempt)

    def open_sweep(self, spec: SweepSpec, driver: str) -> SweepRecord:
        return self._remote.call("open_sweep", spec, driver, timeout=60.0)

    def sweep_step(self, step: SweepStep) -> dict[int, RunTicket]:
        return self._remote.call("sweep_step", step, timeout=30.0)

    def sweep_poll(self, sweep: str, driver: str) -> SweepPoll:
        return self._remote.call("sweep_poll", sweep, driver)

    def ask_sweep(self, sweep: str, kind: str, details: Mapping[str, Any], user: str = "") -> int:
        return self._remote.call("ask_sweep", sweep, kind, dict(details), user)

    def live(self, run: str) -> dict[str, Any]:
        return self._remote.call("live", run)

    def describe(self) -> dict[str, Any]:
        return self._remote.call("describe", timeout=30.0)

    def health(self) -> Mapping[str, Any]:
        return self._remote.call("health")


class RemoteDesk:
    """The desk of a sweep's lanes as its driver, Tune's trainables and the ranks see it; same methods as LaneDesk."""

    def __init__(self, name: str, timeout: float = 10.0) -> None:
        self.name = name
        self._remote = Remote(name, timeout)

    def put(self, job: int, plan: bytes) -> None:
        self._remote.call("put", job, plan)

    def run(self, job: int) -> dict[str, Any]:
        """Blocks until the job has ended. Raises ConnectionError when the desk is gone."""
        while True:
            try:
                ending = self.look(job)
            except TimeoutError:
                continue
            if ending is not None:
                return ending

    def look(self, job: int, wait: float = 20.0) -> dict[str, Any] | None:
        return self._remote.call("look", job, wait, timeout=wait + 10)

    def condemn(self, job: int, kind: str, reason: str) -> tuple[int, int] | None:
        return self._remote.call("condemn", job, kind, reason)

    def fail_waiting(self, evidence: Sequence[Mapping[str, Any]]) -> int:
        return self._remote.call("fail_waiting", list(evidence))

    def want(self, lanes: int) -> None:
        self._remote.call("want", lanes)

    def close(self) -> None:
        self._remote.call("close")

    def view(self) -> dict[str, Any]:
        return self._remote.call("view")

    def begin(self, lane: int, generation: int, world_size: int, is_asked: bool = False) -> bool:
        return self._remote.call("begin", lane, generation, world_size, is_asked)

    def gone(self, lane: int, generation: int, evidence: Sequence[Mapping[str, Any]] = ()) -> tuple[int, str]:
        return self._remote.call("gone", lane, generation, list(evidence))

    def take(self, lane: int, generation: int, rank: int, number: int, unfit: str = "") -> tuple[str, int, bytes]:
        return self._remote.call("take", lane, generation, rank, number, unfit, timeout=30.0)

    def said(self, lane: int, generation: int, rank: int, number: int, word: Mapping[str, Any]) -> str:
        return self._remote.call("said", lane, generation, rank, number, dict(word), timeout=30.0)

    def meet(self, lane: int, generation: int, rank: int, number: int, address: str = "") -> str:
        return self._remote.call("meet", lane, generation, rank, number, address, timeout=15.0)


def start_desk(process: type, options: Mapping[str, Any], **arguments: Any) -> Any:
    """An actor that lives as long as somebody in this process keeps what is returned. Does not wait for it."""
    return ray.remote(process).options(**options).remote(**arguments)


def end_actors(names: Iterable[str]) -> list[str]:
    """Kills actors by name, in whatever namespace they are; returns the names of those that were there."""
    wanted = set(names)
    ended = []
    for actor in ray.util.list_named_actors(all_namespaces=True):
        if actor["name"] in wanted:
            try:
                ray.kill(ray.get_actor(actor["name"], namespace=actor["namespace"]), no_restart=True)
                ended.append(actor["name"])
            except ValueError:  # gone meanwhile
                continue
    return ended


def our_actors() -> list[str]:
    """Names of our actors that run, or that Ray tries to start again."""
    named = ray.util.list_named_actors(all_namespaces=True)
    return [actor["name"] for actor in named if actor["namespace"] == NAMESPACE]


def give_up(name: str) -> None:
    """Ends an actor that Ray would start again for ever."""
    try:
        ray.kill(ray.get_actor(name, namespace=NAMESPACE), no_restart=True)
    except ValueError:
        return  # gone already


class RemoteAgents:
    """One kind of actor of which every node has one: which there are, and how one is started or given up.

    `options` are Ray's, from `actors/options.py`, without what differs from node to node; `arguments` those of
    `process`.
    """

    def __init__(
        self, process: type, options: Mapping[str, Any], names: PerNode, arguments: Sequence[Any] = ()
    ) -> None:
        self._process, self._options, self._names, self._arguments = process, options, names, tuple(arguments)

    def living_nodes(self) -> set[str]:
        return {node["NodeID"] for node in ray.nodes() if node["Alive"]}

    def present(self) -> set[str]:
        """Names of those that run, or that Ray tries to start again."""
        return {name for name in our_actors() if self._names.names(name)}

    def name_of(self, node_id: str) -> str:
        return self._names.name(node_id)

    def start(self, node_id: str) -> Any:
        """The one of a node, started if there is none. Does not wait for it."""
        own = {"name": self._names.name(node_id), "label_selector": {"ray.io/node-id": node_id}}
        return ray.remote(self._process).options(**{**self._options, **own}).remote(*self._arguments)

    def give_up(self, name: str) -> None:
        """Ends one whose node is gone; Ray would try to start it there for ever."""
        give_up(name)


def ask_agents(node_ids: Sequence[str], method: str, *args: Any, timeout: float) -> dict[str, Any]:
    """What the agent of each node answers; a ConnectionError or TimeoutError in the place of an answer that is not
    there. Asks all at once.
    """
    with ThreadPoolExecutor(max_workers=min(len(node_ids), 32) or 1) as pool:
        return dict(zip(node_ids, pool.map(lambda node: _answer(node, method, args, timeout), node_ids), strict=True))


def ask_each(arguments: Mapping[str, Sequence[Any]], method: str, timeout: float) -> dict[str, Any]:
    """As `ask_agents`, with arguments for each node."""
    with ThreadPoolExecutor(max_workers=min(len(arguments), 32) or 1) as pool:
        answers = pool.map(lambda node: _answer(node, method, arguments[node], timeout), arguments)
        return dict(zip(arguments, answers, strict=True))


def _answer(node_id: str, method: str, args: Sequence[Any], timeout: float) -> Any:
    try:
        return Remote(node_agent(node_id), timeout).call(method, *args)
    except (ConnectionError, TimeoutError) as error:
        return error


def tracker(address: str) -> RemoteTracker:
    """The cluster's tracker, once it answers. Raises ServiceUnavailable."""
    found = RemoteTracker()
    try:
        found.describe()
    except (ConnectionError, TimeoutError) as error:
        raise ServiceUnavailable("the tracker", address, f"{error}.", "Start our services with `orc up`.") from error
    return found
