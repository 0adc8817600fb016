"""Names in Ray's dashboard: jobs, placement groups, actors and processes say which run, attempt and rank they are.

Ray Train has no parameter for any of these names, so this module reaches behind its public interface. It is the only
one that does, and every reach is guarded: where a Ray looks different inside, training goes on without names and one
warning is logged (tests/ray/test_identity.py fails there).
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import json
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from orchestrator.records import RunSpec, RunTicket

logger = logging.getLogger(__name__)

_PRIVATE = "ray.train.v2._internal.execution"


@dataclass(frozen=True, slots=True)
class Identity:
    """What is named after an attempt. Example: Identity("brisk-otter-142", "20261121-081530-a1b2c3d4", 2)."""

    name: str
    run: str
    attempt: int

    @classmethod
    def of(cls, ticket: RunTicket) -> Identity:
        return cls(ticket.name, ticket.run, ticket.attempt)

    @property
    def title(self) -> str:
        """Of placement groups; with a part behind it, of actors. The id makes it unique: names may be given twice."""
        return f"{self.name}/{self.run}/attempt-{self.attempt}"

    def part(self, what: str) -> str:
        """Example: brisk-otter-142/20261121-081530-a1b2c3d4/attempt-2/rank-1."""
        return f"{self.title}/{what}"

    def process(self, rank: int) -> str:
        """What `ps` and `top` show."""
        return f"{self.name}/attempt-{self.attempt}/rank-{rank}"


@dataclass(frozen=True, slots=True)
class LaneIdentity:
    """What is named after a generation of a sweep's lane: the group of ranks that takes jobs until it ends.
    Example: LaneIdentity("digits-sweep-31", "20261121-081530-a1b2c3d4", 0, 2)."""

    name: str
    sweep: str
    lane: int
    generation: int

    @property
    def title(self) -> str:
        return f"{self.name}/{self.sweep}/lane-{self.lane}-g{self.generation}"

    def part(self, what: str) -> str:
        return f"{self.title}/{what}"

    def process(self, rank: int) -> str:
        """Between two jobs."""
        return f"{self.name}/lane-{self.lane}/rank-{rank}"


# -- the job


def job_metadata(spec: RunSpec) -> dict[str, str]:
    """What a Ray job says of itself before its run is open."""
    known = {
        "orc.run": spec.run or ("" if spec.resume else spec.new_run),  # which one a resume finds is not known yet
        "orc.name": spec.name,
        "orc.experiment": spec.experiment,
        "orc.project": spec.project,
        "orc.user": spec.user,
    }
    return {key: value for key, value in known.items() if value}


def tell_submitted_job(submission: str, ticket: RunTicket) -> None:
    """Adds the run to the metadata of a job that was submitted, which is all that the dashboard knows of it."""
    metadata = {
        "orc.run": ticket.run,
        "orc.name": ticket.name,
        "orc.experiment": ticket.experiment,
        "orc.attempt": str(ticket.attempt),
    }
    with _guarded("the job's metadata"):
        from ray._private.ray_constants import KV_NAMESPACE_JOB
        from ray.dashboard.modules.job.common import JobInfoStorageClient
        from ray.experimental import internal_kv

        key = JobInfoStorageClient.JOB_DATA_KEY.format(job_id=submission).encode()
        stored = internal_kv._internal_kv_get(key, namespace=KV_NAMESPACE_JOB)
        if stored:
            info = json.loads(stored)
            info["metadata"] = {**(info.get("metadata") or {}), **metadata}
            internal_kv._internal_kv_put(key, json.dumps(info).encode(), overwrite=True, namespace=KV_NAMESPACE_JOB)


# -- placement groups and actors


def rank_of_bundle(bundle: int, nodes: Mapping[int, str]) -> int:
    """The rank that Ray Train gives to the worker in a bundle; `nodes` says on which node each bundle is.

    Ranks of one node follow each other, nodes come in the order of their first bundle. Where one node has several GPUs
    Ray may hand them out in another order; then the ranks of that node are exchanged among themselves.
    """
    order = list(dict.fromkeys(nodes[index] for index in sorted(nodes)))
    return sorted(nodes, key=lambda index: (order.index(nodes[index]), index)).index(bundle)


NameOf = Callable[[str, Mapping[str, Any]], str]
"""(name of the actor's class, its options) -> its name, '' to leave it without."""

_name_of: contextvars.ContextVar[NameOf | None] = contextvars.ContextVar("orc_actor_names", default=None)


@contextlib.contextmanager
def named_controller(identity: Identity | LaneIdentity) -> Iterator[None]:
    """In the driver, around `fit`: names the actor that controls the workers."""
    controller = identity.part("controller")
    with _naming(lambda kind, _: controller if kind == "TrainController" else ""):
        yield


def worker_names(identity: Identity | LaneIdentity) -> list[Any]:
    """Callbacks for Ray Train's RunConfig that name the placement group and the workers."""
    try:
        from orchestrator.execution.ray_callbacks import NamedWorkers
    except Exception:
        logger.warning("this Ray has no callbacks to name its workers by; they go without", exc_info=True)
        return []
    return [NamedWorkers(identity)]


@contextlib.contextmanager
def named_workers(identity: Identity | LaneIdentity) -> Iterator[None]:
    """In the controller, while it makes a placement group and the workers in it."""
    with contextlib.ExitStack() as stack:
        with _guarded("the placement group"):
            stack.enter_context(_named_placement_group(identity.title))
        with _guarded("the workers"):
            stack.enter_context(_naming(functools.partial(_worker_name, identity)))
        yield


def _worker_name(identity: Identity | LaneIdentity, kind: str, options: Mapping[str, Any]) -> str:
    if kind == "SynchronizationActor":
        return identity.part("synchronization")
    strategy = options.get("scheduling_strategy")
    group = getattr(strategy, "placement_group", None)
    if kind != "RayTrainWorker" or group is None:
        return ""
    from ray.util import placement_group_table

    nodes = placement_group_table(group)["bundles_to_node_id"]
    return identity.part(f"rank-{rank_of_bundle(strategy.placement_group_bundle_index, nodes)}")  # type: ignore[union-attr]


@contextlib.contextmanager
def _named_placement_group(title: str) -> Iterator[None]:
    """The controller has a process of its own: what is changed here is changed for one run."""
    import importlib

    module: Any = importlib.import_module(f"{_PRIVATE}.worker_group.worker_group")
    original = module.placement_group
    module.placement_group = functools.partial(original, name=title)
    try:
        yield
    finally:
        module.placement_group = original


@contextlib.contextmanager
def _naming(name_of: NameOf) -> Iterator[None]:
    """Actors that this thread makes get the names that `name_of` gives."""
    with _guarded("actors"):
        _prepare_actor_class()
    token = _name_of.set(name_of)
    try:
        yield
    finally:
        _name_of.reset(token)


def _prepare_actor_class() -> None:
    from ray.actor import ActorClass

    original = ActorClass._remote
    if hasattr(original, "names_actors"):
        return

    @functools.wraps(original)
    def remote(self: Any, args: Any = None, kwargs: Any = None, **options: Any) -> Any:
        name = "" if options.get("name") else _chosen_name(self, options)
        if name:
            try:
                return original(self, args, kwargs, **{**options, "name": name})
            except ValueError:  # the name is taken: an actor of the same attempt is still dying
                logger.warning("an actor goes without a name, %s is taken", name)
        return original(self, args, kwargs, **options)

    remote.names_actors = True  # type: ignore[attr-defined]
    ActorClass._remote = remote  # type: ignore[method-assign]


def _chosen_name(actor_class: Any, options: Mapping[str, Any]) -> str:
    name_of = _name_of.get()
    if name_of is None:
        return ""
    with _guarded("an actor"):
        return name_of(actor_class.__ray_metadata__.class_name, options)
    return ""


# -- processes


def title_process(title: str) -> None:
    """This process, a worker of Ray, is called `ray::<title>` from now on."""
    with _guarded("the process"):
        from ray._private.worker import global_worker

        # Ray writes the class of its actor into the process' title after every call.
        for actor in global_worker.actors.values():
            type(actor).__name__ = title


@contextlib.contextmanager
def _guarded(what: str) -> Iterator[None]:
    try:
        yield
    except Exception:
        logger.warning("%s could not be named in Ray's dashboard; training goes on", what, exc_info=True)
