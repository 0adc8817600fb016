"""Where the ranks of `orc run` run: on the stack's Ray, or as processes of this host."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path

from orchestrator.config import Enabled, Settings
from orchestrator.errors import ConfigError
from orchestrator.execution.place import Place
from orchestrator.stack import Stack

WARNING = (
    "there is no Ray in this stack, so the ranks run as processes of this host. "
    "`orc up` starts Ray; with --local or ray.enabled=false this is not mentioned."
)
AWAY = (
    "Ray does not answer ({why}), so the ranks run as processes of this host, as ray.fallback says. "
    "`orc up` starts Ray; `orc resume` asks it again."
)
_DATABASE_VARIABLE = "ORC_LOCAL_DATABASE_URL"
_REDIS_VARIABLE = "ORC_LOCAL_REDIS_URL"


def choose_place(
    settings: Settings, home: Path, *, local: bool, warn: Callable[[str], None]
) -> Callable[[Stack], Place] | None:
    """None: on Ray. Else the local place, with its PostgreSQL up. Raises ConfigError, ServiceUnavailable."""
    is_job = bool(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR"))
    stack = Stack.find(home)
    if not is_local(settings, stack, asked=local, is_job=is_job):
        return _instead_of_ray(settings, stack, is_job, warn)
    if not local and settings.ray.enabled is Enabled.auto:
        warn(WARNING)
    from orchestrator.execution.local import Locally
    from orchestrator.tracking.local.stack_start import running_stack

    words, variables = _words(settings)
    running_stack(home, words, warn, variables)
    return Locally


def _instead_of_ray(
    settings: Settings, stack: Stack | None, is_job: bool, warn: Callable[[str], None]
) -> Callable[[Stack], Place] | None:
    """None: on Ray, which answers, or of which the run is to hear that it does not."""
    is_wanted = settings.ray.enabled is Enabled.true or bool(settings.ray.address) or is_job
    if not settings.ray.fallback or is_wanted or stack is None:
        return None
    from orchestrator.execution.stand_in import StandIn, why_away

    why = why_away(stack.ray_address)
    if not why:
        return None
    warn(AWAY.format(why=why))
    return lambda stack: StandIn(stack, why)


def is_local(settings: Settings, stack: Stack | None, *, asked: bool, is_job: bool) -> bool:
    """The decision, pure. `asked`: with --local; `is_job`: this process was started by Ray's job server."""
    enabled = settings.ray.enabled
    if asked and enabled is Enabled.true:
        why = "is set, and --local asks for no Ray."
        raise ConfigError("ray.enabled", "true", why, "Leave one of them out.")
    if asked or enabled is Enabled.false:
        return True
    if enabled is Enabled.true or settings.ray.address or is_job:
        return False
    return stack is None or not stack.ray_address


def _words(settings: Settings) -> tuple[list[str], Mapping[str, str]]:
    """What `orc up` is told if nothing runs yet, and the environment for it: a URL may hold a password."""
    words, variables = [], {}
    if settings.database.url:
        words.append(f"database.url=${{oc.env:{_DATABASE_VARIABLE}}}")
        variables[_DATABASE_VARIABLE] = settings.database.url
    if settings.mlflow.enabled is not Enabled.auto:
        words.append(f"mlflow.enabled={settings.mlflow.enabled.value}")
    if settings.redis.enabled is not Enabled.auto:
        words.append(f"redis.enabled={settings.redis.enabled.value}")
    if settings.redis.url:
        words.append(f"redis.url=${{oc.env:{_REDIS_VARIABLE}}}")
        variables[_REDIS_VARIABLE] = settings.redis.url
    if settings.tensorboard.enabled is Enabled.true:
        words.append("tensorboard.enabled=true")
    if settings.mlflow.tracking_uri:
        words.append(f"mlflow.tracking_uri={settings.mlflow.tracking_uri}")
    return words, variables
