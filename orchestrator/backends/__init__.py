"""Doors to everything outside: opened on demand, so that the modules of services stay light to import."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from orchestrator.backends.mlflow import MlflowSink


def open_mlflow(tracking_uri: str, *, experiment_prefix: str = "", dashboard: str = "") -> MlflowSink:
    """The MLflow server or database at `tracking_uri` as a sink. Connects lazily; importing MLflow takes seconds.
    `dashboard`: Ray's, for links back."""
    from orchestrator.backends.mlflow import MlflowSink

    return MlflowSink(tracking_uri, experiment_prefix=experiment_prefix, dashboard=dashboard)
