"""PostgreSQL (and MLflow) for local runs: what is not there is started, as `orc up ray.enabled=false` does it."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import psutil

from orchestrator import application
from orchestrator.backends import postgres
from orchestrator.errors import ServiceUnavailable
from orchestrator.stack import Stack, default_home

TIMEOUT = 300.0


def _to_stderr(line: str) -> None:
    print(f"orchestrator: {line}", file=sys.stderr, flush=True)


def running_stack(
    home: Path | str | None = None,
    settings: Sequence[str] = (),
    say: Callable[[str], None] = _to_stderr,
    variables: Mapping[str, str] | None = None,
) -> Stack:
    """The stack of a data directory, with a database that answers. Starts what is missing, and says so in one line.

    `settings` are words for `orc up`, such as `database.url=…`, for a stack that has to be started; `variables` are
    environment variables that they name. Raises ServiceUnavailable.
    """
    home = Path(home).expanduser().absolute() if home else default_home()
    stack = Stack.find(home)
    if stack is not None and has_database(stack):
        return stack
    words = [*settings, *([] if stack is not None and _has_ray(stack) else ["ray.enabled=false"])]
    say(f"starting what the stack in {home} lacks (some seconds); `orc --home {home} down` stops it again")
    _up(home, words, variables or {})
    return Stack.load(home)


def has_database(stack: Stack) -> bool:
    """Its database answers."""
    if not stack.database_url:
        return False
    try:
        postgres.probe(stack.database_url)
    except ServiceUnavailable:
        return False
    return True


def _has_ray(stack: Stack) -> bool:
    """A Ray head of this stack lives: it must stay."""
    entry = stack.processes.get("ray", {})
    try:
        return abs(psutil.Process(int(entry["pid"])).create_time() - float(entry["started"])) < 2
    except (psutil.Error, KeyError, ValueError):
        return bool(stack.external.get("ray.address"))


def _up(home: Path, words: Sequence[str], variables: Mapping[str, str]) -> None:
    command = [sys.executable, "-P", "-m", "cluster", "up", "--home", str(home), *words]
    environment = {**os.environ, **variables, "PYTHONPATH": str(application.root())}
    # Files, not pipes: the servers outlive the command.
    with tempfile.TemporaryFile("w+") as said:
        try:
            code = subprocess.run(
                command, env=environment, stdin=subprocess.DEVNULL, stdout=said, stderr=said, timeout=TIMEOUT,
                check=False,
            ).returncode  # fmt: skip
        except subprocess.TimeoutExpired:
            code = -1
        said.seek(0)
        lines = [line for line in said.read().splitlines() if line.strip()]
    if code != 0:
        words_said = " ".join(line.removeprefix("orc: ") for line in lines[-3:])
        hint = f"`orc --home {home} up {' '.join(words)}` shows all of it."
        raise ServiceUnavailable("the stack", str(home), f"it does not start: {words_said}", hint)
