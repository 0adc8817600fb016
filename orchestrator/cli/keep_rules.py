"""Which checkpoints a run's config says to keep. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from orchestrator.checkpoints.job import KeepRules
from orchestrator.checkpoints.keeping import keep_rules
from orchestrator.checkpoints.policy import CheckpointPolicy, Direction
from orchestrator.errors import UserError


def from_config(config: Mapping[str, Any]) -> KeepRules | None:
    """None where the config does not say: a script of one's own gave its rules to `start_run`, and nobody else knows
    them."""
    given = config.get("checkpoints")
    if not isinstance(given, Mapping) or "keep_last" not in given:
        return None
    known = {field.name for field in fields(CheckpointPolicy)}
    settings = {name: value for name, value in given.items() if name in known}
    try:
        settings["best_direction"] = Direction(settings.get("best_direction", Direction.max))
        return keep_rules(CheckpointPolicy(**settings))
    except (UserError, ValueError, TypeError):
        return None
