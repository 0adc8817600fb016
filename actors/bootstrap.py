"""Starts our services on the stack's cluster: `python -P -m actors.bootstrap --home DIR`. Idempotent.

A service that runs with other settings than the stack's (another database, say) is replaced; its state is in files
and PostgreSQL.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from orchestrator.stack import Stack


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="actors.bootstrap", description=__doc__)
    parser.add_argument("--home", required=True)
    arguments = parser.parse_args(argv)
    stack = Stack.load(Path(arguments.home))
    os.environ.update(stack.client_environment())
    started = start_services(stack)
    print(json.dumps(started))
    return 0


def start_services(stack: Stack) -> dict[str, Any]:
    """Starts what is not there and waits until each answers. Returns what each says of itself."""
    import ray

    from actors import checkpoint_writers, mirrors, node_agents, tracker
    from orchestrator.execution.handles import give_up, our_actors, surplus_writers

    ray.init(address=stack.ray_address, namespace="orc", log_to_driver=False, logging_level=logging.ERROR)
    home = Path(stack.home)
    spools = stack.spool_directory
    count = stack.checkpoint_writers if stack.slab_directory else 0
    writing = checkpoint_writers.settings(stack.slab_directory, stack.checkpoint_memory_gb, spools, stack.debug)
    tracker_settings = {
        "log_directory": str(home / "wal"),
        "database_url": stack.database_url,
        "spool_directory": spools,
        "lease": 15.0,
        "agent_options": node_agents.OPTIONS.to_ray(),
        "monitoring": stack.monitoring,
        "writers": count,
        "writer_options": checkpoint_writers.OPTIONS.to_ray(),
        "writer_settings": writing,
        "redis_url": stack.redis_url,
    }
    mirror_settings = {
        "database_url": stack.database_url,
        "sinks": stack.sinks(),
    }
    logging_settings = {"logs": str(home / "logs"), "debug": stack.debug}
    described = {
        "tracker": _start(tracker.start, {**tracker_settings, **logging_settings}, tracker.OPTIONS.name),
        "mirror": _start(mirrors.start, {**mirror_settings, **logging_settings}, mirrors.OPTIONS.name),
    }
    agents = node_agents.agents(spools, stack.debug, stack.monitoring)
    sampling = {"spool_directory": spools, "debug": stack.debug, "monitoring": stack.monitoring}
    kinds = [(agents, sampling), *((writers, writing) for writers in checkpoint_writers.writers(count, writing))]
    nodes = sorted(agents.living_nodes())
    started = [(kind, told, node_id, kind.start(node_id)) for kind, told in kinds for node_id in nodes]
    for kind, told, node_id, actor in started:
        described[kind.name_of(node_id)] = _with_settings(kind, told, node_id, actor)
    for name in surplus_writers(our_actors(), count):
        give_up(name)
    return described


def _with_settings(kind: Any, wanted: Mapping[str, Any], node_id: str, actor: Any) -> dict[str, Any]:
    """What the actor of a node says of itself; one with other settings is replaced."""
    import ray

    described = ray.get(actor.describe.remote(), timeout=60)
    if {setting: described.get(setting) for setting in wanted} != wanted:
        ray.kill(actor, no_restart=True)
        _wait_until_gone(kind.name_of(node_id), actor)
        described = ray.get(kind.start(node_id).describe.remote(), timeout=60)
    return described


def _start(start: Any, settings: Mapping[str, Any], name: str) -> dict[str, Any]:
    import ray

    wanted = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
    actor = start(**settings, settings=wanted)
    described = ray.get(actor.describe.remote(), timeout=60)
    if described["settings"] != wanted:
        ray.kill(actor, no_restart=True)
        _wait_until_gone(name, actor)
        actor = start(**settings, settings=wanted)
        described = ray.get(actor.describe.remote(), timeout=60)
    return described


def _wait_until_gone(name: str, actor: Any) -> None:
    """Until the name is free, or another actor has it: the tracker starts agents and writers, too."""
    import ray

    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        try:
            if ray.get_actor(name, namespace="orc") != actor:
                return
        except ValueError:
            return
        time.sleep(0.1)


if __name__ == "__main__":
    sys.exit(main())
