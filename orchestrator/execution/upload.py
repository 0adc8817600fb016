"""What `orc submit` sends to the cluster: the user's code as one archive, looked at before anything leaves this host.

Left out is what nobody means by code (`NOT_CODE`, virtual environments), what `.gitignore` and `.rayignore` files say
(also nested ones, those of the directories above within the repository, and without git), and what the user excludes.
Ray would select by itself; here it is done before, so that what was looked at is what travels.
"""

from __future__ import annotations

import hashlib
import os
import sys
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from orchestrator.errors import UserError
from orchestrator.provenance.ignore import IgnoreFile, is_ignored, parse

NOT_CODE = (
    *(".git", ".hg", ".svn", ".venv/", "venv/", "node_modules/", "__pycache__/", "*.py[cod]", "*.egg-info/"),
    *(".mypy_cache/", ".ruff_cache/", ".pytest_cache/", ".hypothesis/", ".ipynb_checkpoints/", ".tox/", ".nox/"),
    ".DS_Store",
)
"""Left out always, in the language of .gitignore."""

IGNORE_FILES = (".gitignore", ".rayignore")

NEEDED = frozenset(
    {
        *("orchestrator", "ray", "torch", "numpy", "pyarrow", "sqlalchemy", "psycopg", "alembic", "hydra", "omegaconf"),
        *(
            "mlflow",
            "redis",
            "pynvml",
            "psutil",
            "safetensors",
            "xxhash",
            "rich",
            "yaml",
            "pydantic",
            "grpc",
            "aiohttp",
        ),
        *("google", "packaging", "requests", "click", "filelock", "jsonschema", "typing_extensions", "pandas"),
        *("jinja2", "markupsafe", "fsspec", "cloudpickle", "certifi", "urllib3", "msgpack", "sympy", "networkx"),
    }
)
"""Top-level modules that a job imports before and while it runs the user's code."""

HARMLESS = frozenset(
    {"test", "this", "antigravity", "turtle", "turtledemo", "idlelib", "lib2to3", "tkinter", "wave", "chunk"}
)
"""Modules of the standard library that nothing in a job imports."""

MOST_FILES = 50_000
"""A directory with more is no project; counting stops there."""

RAY_LIMIT_BYTES = 100 * 2**20
"""The most that Ray's job server takes in one request."""


@dataclass(frozen=True, slots=True)
class Found:
    """One file that would be sent."""

    path: str
    """Relative to the working directory, with slashes."""
    size_bytes: int


class TooLarge(UserError):
    """More would be sent than `limit_mb`. Without the `heaviest` (pattern, bytes), largest first, it would fit."""

    def __init__(
        self, directory: str, size_bytes: int, files: int, limit_mb: float, heaviest: tuple[tuple[str, int], ...]
    ) -> None:
        super().__init__(directory, size_bytes, files, limit_mb, heaviest)
        self.directory, self.size_bytes, self.files = directory, size_bytes, files
        self.limit_mb, self.heaviest = limit_mb, heaviest

    def __str__(self) -> str:
        lines = [
            f"{self.directory} would send {megabytes(self.size_bytes)} in {self.files} files;"
            f" the limit is {self.limit_mb:g} MB. Nothing was sent. The largest:"
        ]
        lines += [f"  {megabytes(size):>10}  {pattern}" for pattern, size in self.heaviest]
        options = " ".join(f"--exclude {_quoted(pattern)}" for pattern, _ in self.heaviest)
        lines.append(f"Leave them out: {options}")
        lines.append("(or by a line in .gitignore), and read data from a path or URL that the cluster can reach.")
        if self.limit_mb < RAY_LIMIT_BYTES / 1e6:
            lines.append(f"If all of it is needed: submit.max_mb={self.size_bytes // 10**6 + 1}.")
        return "\n".join(lines)


class ShadowedModule(UserError):
    """Files of the user's would be imported in place of modules that a job needs."""

    def __init__(self, directory: str, paths: tuple[str, ...]) -> None:
        super().__init__(directory, paths)
        self.directory, self.paths = directory, paths

    def __str__(self) -> str:
        first = self.paths[0]
        name = module_name(first)
        what = "the standard library's" if name in sys.stdlib_module_names else "the installed"
        return (
            f"{', '.join(self.paths)} in {self.directory} would be imported instead of {what} {name}, which the job"
            " needs: on the cluster the working directory comes first. Nothing was sent."
            f" Rename it, move it into a package of yours, or leave it out: --exclude /{first}"
        )


def megabytes(size_bytes: int) -> str:
    return f"{size_bytes / 1e6:.1f} MB" if size_bytes >= 50_000 else f"{size_bytes / 1e3:.1f} kB"


# -- which files


def selected(directory: Path, exclude: Sequence[str] = (), without: Sequence[Path] = ()) -> list[Found]:
    """The files that would be sent, by name. `without` are directories that never travel, such as our data directory.

    Links are followed, as Ray does, but never in a circle. Raises UserError where it cannot look.
    """
    never = [parse([*NOT_CODE, *exclude])]
    hidden = {os.path.realpath(path) for path in without}
    found: list[Found] = []
    for entry in _files(directory, "", _above(directory), never, hidden, (os.path.realpath(directory),)):
        found.append(entry)
        if len(found) > MOST_FILES:
            hint = "Start it in the project's own directory, or name that: --working-dir DIR."
            raise UserError(f"{directory} holds more than {MOST_FILES} files, so it is no project to send. {hint}")
    return sorted(found, key=lambda file: file.path)


def _files(
    directory: Path, inside: str, ignoring: list[IgnoreFile], never: list[IgnoreFile], hidden: set[str],
    trail: tuple[str, ...],
) -> Iterator[Found]:  # fmt: skip
    """Those in and below `directory`, which is `inside` of the top. `trail` are the real directories on the way."""
    ignoring = [*ignoring, *(parse(_lines(directory / name), directory=inside) for name in IGNORE_FILES)]
    try:
        entries = sorted(os.scandir(directory), key=lambda entry: entry.name)
    except OSError as error:
        raise _unreadable(inside or str(directory), error) from error
    for entry in entries:
        path = f"{inside}/{entry.name}" if inside else entry.name
        is_directory = entry.is_dir()
        if is_ignored(never, path, is_directory=is_directory) or is_ignored(ignoring, path, is_directory=is_directory):
            continue
        if not is_directory:
            if entry.is_file():  # no socket, no pipe, no link to nowhere
                yield Found(path, entry.stat().st_size)
            continue
        real = os.path.realpath(entry.path)
        if real in trail or real in hidden or os.path.exists(os.path.join(real, "pyvenv.cfg")):
            continue
        yield from _files(Path(entry.path), path, ignoring, never, hidden, (*trail, real))


def _above(directory: Path) -> list[IgnoreFile]:
    """The rules of the directories above, up to the top of the repository, for what is below; outermost first."""
    directory = directory.resolve()
    parents = [directory, *directory.parents]
    top = next((at for at, parent in enumerate(parents) if (parent / ".git").exists()), None)
    if top is None:
        return []
    files = [(parents[top], parents[top] / ".git" / "info" / "exclude")]
    files += [(parent, parent / name) for parent in reversed(parents[1 : top + 1]) for name in IGNORE_FILES]
    return [parse(_lines(file), way="/".join(directory.relative_to(parent).parts)) for parent, file in files]


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text(errors="replace").splitlines() if file.is_file() else []
    except OSError as error:
        raise _unreadable(str(file), error) from error


# -- may they travel


def check_size(directory: Path, files: Sequence[Found], limit_mb: float) -> int:
    """The bytes in all. Raises TooLarge."""
    total = sum(file.size_bytes for file in files)
    if total > limit_mb * 1e6:
        raise TooLarge(str(directory), total, len(files), limit_mb, tuple(heaviest(files, total - int(limit_mb * 1e6))))
    return total


def heaviest(files: Sequence[Found], excess_bytes: int, most: int = 8) -> list[tuple[str, int]]:
    """The fewest patterns whose absence saves `excess_bytes`, largest first: directories without code, single files."""
    with_code = {parent for file in files if file.path.endswith(".py") for parent in PurePosixPath(file.path).parents}
    sizes: dict[str, int] = {}
    for file in files:
        path = PurePosixPath(file.path)
        parents = [parent for parent in reversed(path.parents) if parent not in with_code and parent.name]
        pattern = f"/{parents[0]}/" if parents else f"/{path}"
        sizes[pattern] = sizes.get(pattern, 0) + file.size_bytes
    chosen: list[tuple[str, int]] = []
    for pattern, size in sorted(sizes.items(), key=lambda item: -item[1])[:most]:
        if excess_bytes <= 0:
            break
        chosen.append((pattern, size))
        excess_bytes -= size
    return chosen


def check_names(directory: Path, files: Iterable[Found], ours: Path) -> None:
    """Refuses what would be imported in place of a module that the job needs. Raises ShadowedModule.

    `ours` is the package that runs now: its own checkout may be submitted. A directory without `__init__.py` hides
    nothing that is installed, and `jobs/`, `actors/`, `cluster/` are the user's to have.
    """
    shadowing = tuple(file.path for file in files if is_reserved(module_name(file.path)))
    if shadowing and (directory / "orchestrator").resolve() == ours.resolve():
        shadowing = tuple(path for path in shadowing if not path.startswith("orchestrator/"))
    if shadowing:
        raise ShadowedModule(str(directory), shadowing)


def module_name(path: str) -> str:
    """The top-level module that a file defines; "" if it defines none. Example: module_name("ray/__init__.py")."""
    parts = PurePosixPath(path).parts
    if len(parts) == 2 and parts[1] == "__init__.py":
        return parts[0]
    name, _, suffix = parts[-1].partition(".")
    return name if len(parts) == 1 and (suffix == "py" or suffix.endswith("so") or suffix == "pyd") else ""


def is_reserved(name: str) -> bool:
    if name in NEEDED:
        return True
    return name in sys.stdlib_module_names - HARMLESS and name not in sys.builtin_module_names


# -- the archive


def pack(directory: Path, files: Sequence[Found], archive: Path) -> str:
    """Writes the files to `archive`; gives its SHA-256. The same content gives the same bytes, so Ray keeps it once."""
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as out:
        for file in files:
            entry = zipfile.ZipInfo(file.path, date_time=(1980, 1, 1, 0, 0, 0))
            entry.compress_type = zipfile.ZIP_DEFLATED
            source = directory / file.path
            try:
                entry.external_attr = (0o755 if source.stat().st_mode & 0o111 else 0o644) << 16
                with source.open("rb") as content, out.open(entry, "w") as copy:
                    while block := content.read(1 << 20):
                        copy.write(block)
            except OSError as error:
                raise _unreadable(file.path, error) from error
    if archive.stat().st_size >= RAY_LIMIT_BYTES:
        size, limit = archive.stat().st_size, RAY_LIMIT_BYTES / 1e6
        raise TooLarge(str(directory), size, len(files), limit, tuple(heaviest(files, size - RAY_LIMIT_BYTES)))
    return hashlib.sha256(archive.read_bytes()).hexdigest()


def _quoted(pattern: str) -> str:
    return f"'{pattern}'" if set(pattern) & set(" *?[]()$&;'\"") else pattern


def _unreadable(path: str, error: OSError) -> UserError:
    why = (error.strerror or str(error)).lower()
    return UserError(f"{path} cannot be read ({why}), so the project cannot be sent. Leave it out: --exclude /{path}")
