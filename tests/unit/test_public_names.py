"""`import orchestrator`: which names there are, and that type checkers see the same ones."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import orchestrator

NAMES = [
    "Checkpoints", "OrchestratorError", "Run", "RunStopped", "SweepResult", "TrainCallback", "TuneCallback",
    "UserError", "load_checkpoint", "metrics", "open_catalog", "start_run", "sweep",
]  # fmt: skip


def test_the_public_names_are_these() -> None:
    assert sorted(orchestrator.__all__) == sorted(NAMES) == sorted(dir(orchestrator))
    assert len(NAMES) <= 15


def test_type_checkers_see_the_same_names() -> None:
    module = ast.parse(Path(orchestrator.__file__).read_text())
    (block,) = (node for node in module.body if isinstance(node, ast.If))
    seen = {alias.asname: node.module for node in block.body for alias in node.names}  # type: ignore[attr-defined]
    assert seen == orchestrator._HOMES
    assert sorted(seen) == sorted(NAMES)


def test_a_name_is_loaded_when_it_is_used() -> None:
    from orchestrator.errors import UserError

    assert orchestrator.UserError is UserError
    with pytest.raises(AttributeError, match="strat_run"):
        orchestrator.strat_run  # noqa: B018
