"""The verbs about services and this installation: up, down, status, doctor, keep, env, version."""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from importlib import metadata

from orchestrator import application
from orchestrator.cli.output import Output
from orchestrator.stack import Stack


def up(arguments: argparse.Namespace, output: Output) -> int:
    return _cluster("up", arguments, output, arguments.settings)


def down(arguments: argparse.Namespace, output: Output) -> int:
    return _cluster("down", arguments, output)


def status(arguments: argparse.Namespace, output: Output) -> int:
    return _cluster("status", arguments, output)


def doctor(arguments: argparse.Namespace, output: Output) -> int:
    return _cluster("doctor", arguments, output)


def _cluster(verb: str, arguments: argparse.Namespace, output: Output, settings: Sequence[str] = ()) -> int:
    """Run a verb of the `cluster` folder in a process of its own, which prints the result and gives the exit code.

    `-P` and PYTHONPATH make sure that it is our folder even where the working directory has a `cluster/` too.
    """
    command = _command(verb, arguments, settings)
    output.has_result = True
    process = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(application.root())})
    try:
        return process.wait()
    except KeyboardInterrupt:
        return process.wait()  # the terminal sent ctrl-C to the other process, too, which tells what it left


def _command(verb: str, arguments: argparse.Namespace, words: Sequence[str]) -> list[str]:
    command = [sys.executable, "-P", "-m", "cluster", verb, "--home", str(arguments.home), *words]
    return command + [flag for flag, given in (("--json", arguments.json), ("--debug", arguments.debug)) if given]


def keep(arguments: argparse.Namespace, output: Output) -> int:
    """In place of this process, so that a service manager's signals reach the one that looks."""
    Stack.load(arguments.home)
    words = [f"--{name}={getattr(arguments, name)}" for name in ("interval", "since", "most")]
    words += [f"--{name}" for name in ("once", "all", "local") if getattr(arguments, name)]
    command = _command("keep", arguments, words)
    output.stdout.flush()
    told = os.environ.get("PYTHONPATH", "")  # for the user's code, which the keeper starts again
    path = os.pathsep.join([str(application.root()), *([told] if told else [])])
    os.execve(command[0], command, {**os.environ, "PYTHONPATH": path})


def environment(arguments: argparse.Namespace, output: Output) -> int:
    stack = Stack.load(arguments.home)
    variables = stack.client_environment()
    if stack.api_url:
        variables |= {"ORC_API_URL": stack.api_url, "ORC_API_TOKEN_PATH": stack.api_token_path}

    def render() -> None:
        for name, value in sorted(variables.items()):
            output.line(f"export {name}={shlex.quote(value)}")

    output.result(variables, render)
    return 0


def version(arguments: argparse.Namespace, output: Output) -> int:
    names = ("ray-orchestrator", "ray", "torch", "mlflow", "sqlalchemy", "psycopg")
    versions = {"python": sys.version.split()[0]}
    for name in names:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = ""
    output.result(
        versions, lambda: output.fields([(name, versions[name] or "not installed") for name in (*names, "python")])
    )
    return 0
