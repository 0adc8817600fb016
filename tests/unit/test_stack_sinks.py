"""Which sinks a stack has, what may be said about them, and how `orc status` words their lag."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from cluster import stack_status, stack_up
from orchestrator.backends import open_sink
from orchestrator.config.settings import Enabled, Settings, TensorboardConfig
from orchestrator.errors import ConfigError
from orchestrator.execution.connection import check_stack
from orchestrator.stack import Stack, StackSettings
from orchestrator.store.views import SinkLag
from orchestrator.tracking.circuits import CircuitState

LAG = SinkLag(sink="mlflow", points=3, seconds=1.5, runs=2, state="closed", error="", updated=1000.0)


def test_a_stack_names_its_sinks_and_what_they_are_opened_with(tmp_path: Path) -> None:
    stack = Stack(home="/x", mlflow_uri="http://m", ray_dashboard="http://d", tensorboard_directory=str(tmp_path))
    assert list(stack.sinks()) == ["mlflow", "tensorboard"]
    assert stack.sinks()["mlflow"] == {"tracking_uri": "http://m", "dashboard": "http://d"}
    assert open_sink("tensorboard", stack.sinks()["tensorboard"]).name == "tensorboard"
    assert Stack(home="/x").sinks() == {}


def test_event_files_are_asked_for_once_and_stay_until_they_are_switched_off(tmp_path: Path) -> None:
    asked = StackSettings.parse(["tensorboard.enabled=true", "tensorboard.directory=/data/tb"])
    assert stack_up._event_files(tmp_path, asked) == "/data/tb"
    before = Stack(home="/x", external={"tensorboard.enabled": "true"})
    assert stack_up._event_files(tmp_path, stack_up.remembered(StackSettings(), before)) == str(
        tmp_path / "tensorboard"
    )
    off = StackSettings.parse(["tensorboard.enabled=false"])
    assert stack_up._event_files(tmp_path, stack_up.remembered(off, before)) == ""
    assert stack_up._event_files(tmp_path, StackSettings()) == ""
    with pytest.raises(ConfigError, match="no absolute path"):
        StackSettings.parse(["tensorboard.directory=tb"])


def test_circuits_are_told_in_words_as_the_worst_of_those_who_speak_sees_them() -> None:
    states = [
        CircuitState(name="postgres", by="tracker", state="half-open", began=880.0),
        CircuitState(name="postgres", by="mirror", state="open", began=900.0),
        CircuitState(name="redis", by="tracker"),
        CircuitState(name="tracker", by="node-a", state="half-open", began=995.0),
        CircuitState(name="storage", by="node-a", state="open", began=1000.0 - 7300, error="full"),
    ]
    told = {name: stack_status.circuit(name, states, 1000.0) for name in ("postgres", "redis", "orc-tracker", "ray")}
    assert told == {
        "postgres": "open 2 min (mirror, tracker)", "redis": "closed", "ray": "",
        "orc-tracker": "half-open 5 s (node-a)",
    }  # fmt: skip
    assert stack_status.elsewhere(states, ["postgres", "orc-tracker"], 1000.0) == [
        ("storage", "open 2 h (node-a)", "full")
    ]


def test_a_run_that_needs_event_files_is_refused_where_none_are_written() -> None:
    settings = Settings(tensorboard=TensorboardConfig(enabled=Enabled.true))
    with pytest.raises(ConfigError, match="orc up tensorboard.enabled=true"):
        check_stack(settings, Stack(home="/x"))
    check_stack(settings, Stack(home="/x", tensorboard_directory="/data/tb"))


@pytest.mark.parametrize(
    ("lag", "now", "status"),
    [
        (LAG, 1000.0, "up"),
        (replace(LAG, state="open", error="gone"), 1000.0, "failing"),
        (LAG, 1000.0 + stack_status.SILENT + 1, "stopped"),
        (replace(LAG, points=0, runs=0), 1000.0 + stack_status.SILENT + 1, "idle"),
    ],
)
def test_status_tells_a_failing_sink_from_one_that_nobody_feeds(lag: SinkLag, now: float, status: str) -> None:
    found = stack_status.sink(lag, now)
    assert (found.status, found.points, found.why) == (status, lag.points, lag.error)
