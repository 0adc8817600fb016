"""A real MLflow server for the session, whose `kill()` and `start()` make outages; a stack without Ray per module."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.plugins.local_stack import LocalStack
from tests.plugins.mlflow_server import MlflowServer


@pytest.fixture(scope="session")
def mlflow_server() -> Iterator[MlflowServer]:
    directory = Path(tempfile.mkdtemp(prefix="orct-mlflow-"))
    server = MlflowServer(directory)
    server.start()
    yield server
    server.kill()
    shutil.rmtree(directory)


@pytest.fixture(scope="module")
def local(schema_url: str) -> Iterator[LocalStack]:
    stack = LocalStack.make(schema_url)
    yield stack
    stack.remove()
