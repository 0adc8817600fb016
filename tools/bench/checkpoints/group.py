"""The ranks of one training as the benchmark sees them: it gives orders, each rank answers."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from environment import HERE, child

_PATIENCE = 180.0
"""Seconds until a rank that does not answer counts as lost."""


class GroupLost(Exception):
    """A rank does not answer any more. `why` has the end of what it said."""

    def __init__(self, why: str) -> None:
        super().__init__(why)
        self.why = " ".join(why.split())[:300]


class Failed(Exception):
    """A rank could not do what it was told."""

    def __init__(self, why: str) -> None:
        super().__init__(why)
        self.why = " ".join(why.split())[:300]


class Group:
    """`world_size` processes with gloo, or as many workers of Ray Train. Gone at the end."""

    def __init__(self, python: Path, directory: Path, world_size: int, *, on_ray: bool = False) -> None:
        self._python, self._directory, self.world_size, self._on_ray = python, directory, world_size, on_ray
        self._processes: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Group:
        self._log = (self._directory / "ranks.log").open("wb")
        path = self._directory / "orders"
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(path))
            listener.listen()
            listener.settimeout(_PATIENCE)
            self._start(path)
            self._lines: list[Any] = [None] * self.world_size
            try:
                for _ in range(self.world_size):
                    connection, _ = listener.accept()
                    connection.settimeout(_PATIENCE)
                    lines = connection.makefile("rw")
                    self._lines[json.loads(lines.readline())["rank"]] = lines
            except TimeoutError as error:
                why = self._said()
                self._stop()
                raise GroupLost(f"the ranks did not start: {why}") from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for lines in filter(None, self._lines):
            with suppress(OSError):
                lines.close()
        self._stop()
        if error is not None:  # the directory goes, what was said stays beside it
            shutil.copy(self._directory / "ranks.log", self._directory.parent / "lost.log")

    def ask(self, what: str, **how: Any) -> list[dict[str, Any]]:
        """Every rank's answer. Raises Failed, GroupLost."""
        order = json.dumps({"do": what, **how})
        try:
            for lines in self._lines:
                print(order, file=lines, flush=True)
            answers = [json.loads(lines.readline()) for lines in self._lines]
        except (OSError, ValueError) as error:
            raise GroupLost(f"{what}: {error!r}: {self._said()}") from error
        if wrong := [answer["error"] for answer in answers if "error" in answer]:
            raise Failed(wrong[0])
        return answers

    def slowest(self, what: str, key: str, **how: Any) -> float:
        return max(answer[key] for answer in self.ask(what, **how))

    def _start(self, path: Path) -> None:
        if self._on_ray:
            commands = [[self._python, HERE / "on_ray.py", path, str(self.world_size), self._directory]]
        else:
            store = f"file://{self._directory / 'store'}"
            commands = [
                [self._python, HERE / "rank.py", path, str(rank), str(self.world_size), store]
                for rank in range(self.world_size)
            ]
        self._processes = [
            subprocess.Popen(command, env=child(), stdout=self._log, stderr=self._log) for command in commands
        ]

    def _stop(self) -> None:
        for process in self._processes:
            for end in (process.terminate, process.kill):  # Ray's driver takes its cluster along when it is asked
                try:
                    process.wait(timeout=30 if self._on_ray else 10)
                    break
                except subprocess.TimeoutExpired:
                    end()
            process.wait()
        self._log.close()

    def _said(self) -> str:
        text = (self._directory / "ranks.log").read_text(errors="replace")
        return " | ".join(text.strip().splitlines()[-4:])
