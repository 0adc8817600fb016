"""A real MLflow server for whoever asks: one for the session. `mlflow_server.kill()` and `.start()` make an outage."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.plugins.mlflow_server import MlflowServer


@pytest.fixture(scope="session")
def mlflow_server() -> Iterator[MlflowServer]:
    directory = Path(tempfile.mkdtemp(prefix="orct-mlflow-"))
    server = MlflowServer(directory)
    server.start()
    yield server
    server.kill()
    shutil.rmtree(directory)
