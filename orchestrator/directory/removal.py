"""The files of runs that are removed: what there is of a run, and its end.

Rows go first (`Store.remove_run`), then the directory, then the word that it is gone. A crash in between leaves a run
that nobody sees and whose directory is still known: removing it again finishes.
"""

from __future__ import annotations

from dataclasses import dataclass

from orchestrator.backends.storage import Storage
from orchestrator.errors import UserError


class NoRunDirectory(UserError):
    """What is recorded as a run's directory does not look like one, so it is not touched."""

    def __init__(self, run: str, directory: str) -> None:
        super().__init__(run, directory)
        self.run, self.directory = run, directory

    def __str__(self) -> str:
        return (
            f"The directory of run {self.run} is recorded as {self.directory}, which does not end in its id: it is "
            "left alone. Remove what is yours there, then use --keep-files."
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Contents:
    """How much lies in a run's directory."""

    files: int
    size_bytes: int


def contents(run: str, directory: str) -> Contents:
    """Raises NoRunDirectory."""
    if not directory:
        return Contents(files=0, size_bytes=0)
    sizes = [size for _, size in _parent(run, directory).join(run).files()]
    return Contents(files=len(sizes), size_bytes=sum(sizes))


def remove(run: str, directory: str) -> None:
    """Removes the directory and all in it; does nothing when it is not there. Raises NoRunDirectory."""
    if directory:
        _parent(run, directory).delete_dir(run)


def _parent(run: str, directory: str) -> Storage:
    parent, _, last = directory.rstrip("/").rpartition("/")
    if last != run or not parent.strip("/"):
        raise NoRunDirectory(run, directory)
    return Storage(parent)
