"""Where and how an attempt runs, as plain values: host, versions, command, git. Nothing here may fail a run."""

from __future__ import annotations

import os
import platform
import socket
import subprocess
import sys
from importlib import metadata
from typing import Any

PACKAGES = ("ray-orchestrator", "torch", "ray", "numpy", "mlflow", "pyarrow")


def capture(directory: str | None = None) -> dict[str, Any]:
    """The provenance of an attempt started in `directory` (default: the working directory)."""
    directory = directory or _working_directory()
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "command": sys.argv,
        "directory": directory,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "packages": {name: version for name in PACKAGES if (version := _version(name))},
        "git": _git(directory),
    }


def _working_directory() -> str:
    try:
        return os.getcwd()
    except OSError:
        return ""  # somebody removed it


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""


def _git(directory: str) -> dict[str, Any]:
    commit = _run_git(directory, "rev-parse", "HEAD")
    if not commit:
        return {}
    return {
        "commit": commit,
        "branch": _run_git(directory, "rev-parse", "--abbrev-ref", "HEAD"),
        "is_dirty": bool(_run_git(directory, "status", "--porcelain", "--untracked-files=no")),
    }


def _run_git(directory: str, *arguments: str) -> str:
    try:
        done = subprocess.run(
            ["git", "-C", directory or ".", *arguments],
            capture_output=True, text=True, errors="replace", timeout=5, check=False,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
