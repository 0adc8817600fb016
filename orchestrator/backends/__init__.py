"""Doors to everything outside: opened on demand, so that the modules of services stay light to import."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from orchestrator.alert_records import Notice
    from orchestrator.backends.mlflow import MlflowSink
    from orchestrator.backends.redis import LiveRedis
    from orchestrator.backends.tensorboard import TensorboardSink


def open_mlflow(tracking_uri: str, *, experiment_prefix: str = "", dashboard: str = "") -> MlflowSink:
    """The MLflow server or database at `tracking_uri` as a sink. Connects lazily; importing MLflow takes seconds.
    `dashboard`: Ray's, for links back."""
    from orchestrator.backends.mlflow import MlflowSink

    return MlflowSink(tracking_uri, experiment_prefix=experiment_prefix, dashboard=dashboard)


def open_tensorboard(directory: str) -> TensorboardSink:
    """The event files below a local directory as a sink. Needs the library: `pip install tensorboard`."""
    from orchestrator.backends.tensorboard import TensorboardSink

    return TensorboardSink(directory)


def open_sink(name: str, settings: Mapping[str, Any]) -> MlflowSink | TensorboardSink:
    """The sink of that name. Example: open_sink("mlflow", {"tracking_uri": "http://127.0.0.1:5000"})."""
    openers: Mapping[str, Callable[..., MlflowSink | TensorboardSink]] = {
        "mlflow": open_mlflow,
        "tensorboard": open_tensorboard,
    }
    return openers[name](**settings)


def open_live(url: str) -> LiveRedis:
    """Live values in the Redis server at `url`. Connects lazily."""
    from orchestrator.backends.redis import LiveRedis

    return LiveRedis(url)


def send_notice(kind: str, options: Mapping[str, Any], notice: Notice) -> None:
    """Tells Slack, a webhook, PagerDuty or a mail server, once. Raises alert_records.NotSent."""
    from orchestrator.backends.notifiers import send

    send(kind, options, notice)
