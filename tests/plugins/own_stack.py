"""A stack for one journey: a data directory, ports and a token of its own, driven through the `orc` command alone."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from types import TracebackType

SETTINGS_OF_OTHERS = ("RAY_", "MLFLOW_", "ORC_", "PG", "HYDRA_", "CI")


class OwnStack:
    """`with OwnStack() as stack: stack.orc("up")`. Whatever was started is stopped at the end."""

    def __init__(self, commands: Path = Path(sys.executable).parent) -> None:
        """`commands` holds the `orc` and the `python` of the installation to try."""
        self.commands = commands
        self.directory = Path(tempfile.mkdtemp(prefix="orct-"))  # short: sockets live below it
        self.directory.chmod(0o711)  # as root PostgreSQL runs as `nobody`, who must pass through
        self.home = self.directory / "home"
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(SETTINGS_OF_OTHERS)}
        path = os.pathsep.join([str(commands), os.environ.get("PATH", os.defpath)])
        self.environment = inherited | {"ORC_HOME": str(self.home), "HOME": str(self.directory), "PATH": path}

    def orc(self, *arguments: str, timeout: float = 180) -> str:
        """What the verb prints on stdout; a verb that fails fails the test with all that it said."""
        command = [str(self.commands / "orc"), *arguments]
        # Files, not pipes: servers that outlive the command keep a pipe open, and reading it would never end.
        with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
            code = subprocess.run(
                command, env=self.environment, cwd=self.directory, stdout=out, stderr=err, stdin=subprocess.DEVNULL,
                timeout=timeout,
            ).returncode  # fmt: skip
            out.seek(0)
            err.seek(0)
            printed = out.read()
            assert code == 0, f"orc {' '.join(arguments)} ended with {code}\n{printed}\n{err.read()}"
            return printed

    def __enter__(self) -> OwnStack:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if (self.home / "stack.json").exists():
            self.orc("down")
        shutil.rmtree(self.directory, ignore_errors=True)
