"""What git says about a directory: commit, branch, remote, what is changed. Changes nothing, not even git's index."""

from __future__ import annotations

import os
import re
import subprocess
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from orchestrator.errors import OrchestratorError

TIMEOUT = 15.0
"""Seconds that one git command may take."""

SUBMITTED = "ORC_GIT"
"""Environment variable: what git said where the job was submitted, as JSON; for code that arrives without its `.git`.
"""

_INHERITED = ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_PREFIX")
"""Set inside git's hooks; they would speak of another repository."""

_SCP = re.compile(r"^(?:[^/@:]+(?::[^/@]*)?@)?(?P<host>[^/@:]+):(?P<path>(?!//).+)$")


class GitFailed(OrchestratorError):
    """git is not there, or refused."""

    def __init__(self, what: str, why: str) -> None:
        super().__init__(what, why)
        self.what, self.why = what, why

    def __str__(self) -> str:
        return f"git {self.what}: {self.why}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Listed:
    """One path of a working tree, relative to its root."""

    path: str
    is_tracked: bool


class Repository:
    """The repository that a directory belongs to; `Repository.around(directory)` finds it."""

    def __init__(self, root: Path, environ: Mapping[str, str]) -> None:
        self.root = root
        self._environ = {name: value for name, value in environ.items() if name not in _INHERITED} | {
            "GIT_OPTIONAL_LOCKS": "0",
            "GIT_TERMINAL_PROMPT": "0",
            "LC_ALL": "C",
        }

    @classmethod
    def around(cls, directory: Path, environ: Mapping[str, str]) -> Repository | None:
        """None outside of any repository. Raises GitFailed where there is one and git does not open it."""
        parents = (directory, *directory.parents)
        if not any((parent / ".git").exists() for parent in parents):
            return None
        top = cls(directory, environ)._line("rev-parse", "--show-toplevel")
        return cls(Path(top), environ) if top else None

    def state(self) -> dict[str, Any]:
        """commit, tree, branch, remote, is_dirty, changed (tracked paths that differ from the commit), untracked."""
        commit, branch, changed = _status(self._run("status", "--porcelain=v2", "--branch", "-z", "-uno"))
        return {
            "commit": commit,
            "tree": self._line("rev-parse", "HEAD^{tree}") if commit else "",
            "branch": branch,
            "remote": self._remote(),
            "is_dirty": bool(changed) or not commit,
            "changed": changed,
        }

    def diff(self, paths: Sequence[str], *, most: int) -> tuple[bytes, bool]:
        """What differs from the commit in those tracked paths, staged or not, as a binary patch of at most `most`
        bytes, and whether it was cut."""
        if not paths:
            return b"", False
        arguments = ("diff", "HEAD", "--binary", "--no-renames", "--no-ext-diff", "--no-textconv", "--no-color")
        # From stdin there is no limit to their number, but `git diff` does not read them there.
        some = _as_arguments(paths)
        data = self._read([*arguments, "--", *(f":(top,literal){path}" for path in some)], most + 1)
        return data[:most], len(data) > most or len(some) < len(paths)

    def files(self) -> list[Listed]:
        """Tracked files and those that nothing ignores, with those of repositories inside."""
        return sorted(self._files(), key=lambda listed: listed.path)

    def _files(self) -> Iterator[Listed]:
        seen = set()
        for entry in _split(self._run("ls-files", "-z", "-t", "-c", "-o", "--exclude-standard")):
            path = entry[2:].rstrip("/")
            if path in seen:  # an unmerged file is listed once per side
                continue
            seen.add(path)
            is_tracked = not entry.startswith("?")
            full = self.root / path
            if full.is_dir() and not full.is_symlink():  # a submodule, or a clone inside the tree
                inside = Repository(full, self._environ)
                for listed in inside._files() if (full / ".git").exists() else ():
                    yield Listed(path=f"{path}/{listed.path}", is_tracked=is_tracked and listed.is_tracked)
            else:
                yield Listed(path=path, is_tracked=is_tracked)

    def _remote(self) -> str:
        try:
            found = _split(self._run("config", "-z", "--get-regexp", r"^remote\..*\.url$"))
        except GitFailed:
            return ""  # no remote
        urls = dict(entry.split("\n", 1) for entry in found if "\n" in entry)
        return without_credentials(urls.get("remote.origin.url") or next(iter(urls.values()), ""))

    def _line(self, *arguments: str) -> str:
        return os.fsdecode(self._run(*arguments).strip(b"\n"))

    def _command(self, arguments: Sequence[str]) -> list[str]:
        # A repository's own configuration must not make git start programs here.
        return ["git", "-C", str(self.root), "-c", "core.fsmonitor=false", *arguments]

    def _run(self, *arguments: str) -> bytes:
        try:
            done = subprocess.run(
                self._command(arguments),
                env=self._environ, stdin=subprocess.DEVNULL, capture_output=True, timeout=TIMEOUT, check=False,
            )  # fmt: skip
        except FileNotFoundError as error:
            raise GitFailed(arguments[0], "the command git is not installed") from error
        except (OSError, subprocess.TimeoutExpired) as error:
            raise GitFailed(arguments[0], f"{type(error).__name__} after {TIMEOUT:.0f} s at most") from error
        if done.returncode:
            said = done.stderr.decode(errors="replace").strip().splitlines()
            raise GitFailed(arguments[0], said[0] if said else f"exit code {done.returncode}")
        return done.stdout

    def _read(self, arguments: Sequence[str], most: int) -> bytes:
        """At most that many bytes of what git prints; the rest is never made."""
        with subprocess.Popen(
            self._command(arguments),
            env=self._environ, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        ) as process:  # fmt: skip
            late = threading.Timer(TIMEOUT, process.kill)
            late.start()
            assert process.stdout is not None
            data = process.stdout.read(most)
            is_late = not late.is_alive()
            late.cancel()
            if len(data) == most:
                process.kill()
            process.stdout.close()
            code = process.wait()
        if code and len(data) < most:
            raise GitFailed(arguments[0], f"took over {TIMEOUT:.0f} s" if is_late else f"exit code {code}")
        return data


def without_credentials(url: str) -> str:
    """A remote's address without user, password and query. Example: `git@h:o/r` and `https://t@h/o/r` -> `h:o/r`,
    `https://h/o/r`."""
    if "://" not in url:
        found = _SCP.match(url)
        return f"{found['host']}:{found['path']}" if found else url
    parts = urlsplit(url)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def _as_arguments(paths: Sequence[str]) -> list[str]:
    """As many as a command line surely takes."""
    room, taken = 60_000, []
    for path in paths:
        room -= len(os.fsencode(path)) + 20
        if room < 0:
            break
        taken.append(path)
    return taken


def _split(output: bytes) -> list[str]:
    return [os.fsdecode(entry) for entry in output.split(b"\0") if entry]


def _status(output: bytes) -> tuple[str, str, list[str]]:
    """Commit, branch and changed paths from `git status --porcelain=v2 --branch -z`."""
    commit = branch = ""
    changed: list[str] = []
    entries = iter(_split(output))
    for entry in entries:
        kind, _, rest = entry.partition(" ")
        if kind == "#":
            name, _, value = rest.partition(" ")
            commit = value if name == "branch.oid" and value != "(initial)" else commit
            branch = value if name == "branch.head" else branch
        elif kind == "1":
            changed.append(entry.split(" ", 8)[8])
        elif kind == "2":  # renamed: new path, then the old one
            changed += [entry.split(" ", 9)[9], next(entries)]
        elif kind == "u":
            changed.append(entry.split(" ", 10)[10])
    return commit, "" if branch == "(detached)" else branch, sorted(set(changed))
