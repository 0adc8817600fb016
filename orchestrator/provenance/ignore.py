"""What `.gitignore` files say, without git: `pathspec` reads a file's patterns, here is which file decides."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathspec import GitIgnoreSpec


@dataclass(frozen=True, slots=True)
class IgnoreFile:
    """The rules of one file. Paths are relative to the top, where the search began."""

    rules: GitIgnoreSpec
    directory: str = ""
    """Where the file is, at the top ("") or below; its rules speak of nothing outside."""
    way: str = ""
    """The way from the file down to the top, for one that lies above it."""

    def says(self, path: str, *, is_directory: bool) -> bool | None:
        """Whether `path` is ignored; None when no rule speaks of it."""
        prefix = f"{self.directory}/" if self.directory else ""
        if not path.startswith(prefix):
            return None
        relative = (f"{self.way}/" if self.way else "") + path[len(prefix) :] + ("/" if is_directory else "")
        return self.rules.check_file(relative).include


def is_ignored(files: Iterable[IgnoreFile], path: str, *, is_directory: bool) -> bool:
    """Whether the files, the outermost first, leave out `path`; the innermost that speaks of it decides.

    What lies in an ignored directory is not asked about: as with git, nothing in it can be taken back in.
    """
    verdict = False
    for file in files:
        said = file.says(path, is_directory=is_directory)
        verdict = verdict if said is None else said
    return verdict


def parse(lines: Iterable[str], *, directory: str = "", way: str = "") -> IgnoreFile:
    """Example: parse(["*.pt", "/data/", "!keep.pt"])."""
    from pathspec import GitIgnoreSpec

    return IgnoreFile(GitIgnoreSpec.from_lines(lines), directory, way)
