"""Names in Ray's dashboard are a convenience: where this Ray has no place for them, training goes on."""

from __future__ import annotations

import logging
import sys
from types import ModuleType, SimpleNamespace

import pytest
from ray.actor import ActorClass

from orchestrator.execution import ray_names
from orchestrator.execution.ray_names import Identity, job_metadata, named_workers, title_process, worker_names
from orchestrator.records import RunSpec

IDENTITY = Identity("calm-otter-7", "20261121-081530-a1b2c3d4", 2)
GROUPS = "ray.train.v2._internal.execution.worker_group.worker_group"


def test_names_say_run_attempt_and_rank() -> None:
    assert IDENTITY.part("rank-1") == "calm-otter-7/20261121-081530-a1b2c3d4/attempt-2/rank-1"
    assert IDENTITY.process(1) == "calm-otter-7/attempt-2/rank-1"


def test_a_job_tells_what_is_known_before_its_run_is_open() -> None:
    spec = RunSpec(experiment="digits", new_run="new", user="ann")
    assert job_metadata(spec) == {
        "orc.run": "new", "orc.experiment": "digits", "orc.project": "default", "orc.user": "ann"
    }  # fmt: skip
    resumed = RunSpec(experiment="digits", new_run="new", resume=True)
    assert "orc.run" not in job_metadata(resumed)


def test_a_group_is_named_while_it_is_made_and_only_then(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType(GROUPS)
    module.placement_group = lambda **options: options  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, GROUPS, module)
    with named_workers(IDENTITY):
        assert module.placement_group(bundles=[]) == {"bundles": [], "name": IDENTITY.title}
    assert module.placement_group(bundles=[]) == {"bundles": []}


def test_a_ray_without_these_parts_inside_still_trains(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, GROUPS, None)
    monkeypatch.setitem(sys.modules, "ray.train.v2._internal.execution.callback", None)
    monkeypatch.delitem(sys.modules, "orchestrator.execution.ray_callbacks", raising=False)
    monkeypatch.setitem(sys.modules, "ray._private.worker", SimpleNamespace())
    done = []
    with caplog.at_level(logging.WARNING):
        assert worker_names(IDENTITY) == []
        with named_workers(IDENTITY):
            done.append("workers")
        title_process("title")
    assert done == ["workers"]
    assert len(caplog.records) == 3
    assert all(record.levelname == "WARNING" for record in caplog.records)


def test_an_actor_whose_name_is_taken_goes_without(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []

    def remote(self: object, args: object = None, kwargs: object = None, **options: object) -> object:
        if options.get("name") == "taken":
            raise ValueError("taken")
        made.append(options.get("name"))
        return object()

    monkeypatch.setattr(ActorClass, "_remote", remote)
    actor_class = SimpleNamespace(__ray_metadata__=SimpleNamespace(class_name="TrainController"))
    for name in ("taken", "free"):
        with ray_names._naming(lambda kind, options, name=name: name):
            ActorClass._remote(actor_class)
    ActorClass._remote(actor_class)
    ActorClass._remote(actor_class, name="own")
    assert made == [None, "free", None, "own"]


def test_what_the_body_raises_is_not_swallowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, GROUPS, None)
    with pytest.raises(RuntimeError, match="no room"), named_workers(IDENTITY):
        raise RuntimeError("no room")
