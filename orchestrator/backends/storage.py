"""Files under one root, on a local path or anywhere pyarrow.fs reaches (`s3://`, `gs://`, `abfs://` …).

Local files do not go through pyarrow, whose local filesystem never fsyncs: here a file appears under its name
complete and durable, or not at all.
"""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol
from urllib.parse import unquote, urlsplit, urlunsplit

import pyarrow.fs as arrow_fs

from orchestrator.errors import ConfigError, UserError

_PARTIAL = ".partial"
"""Ending of a local file that is still being written."""


class UnsafePath(UserError, ValueError):
    """A name that could lead out of the storage's root."""

    def __init__(self, root: str, path: str) -> None:
        super().__init__(root, path)
        self.root, self.path = root, path

    def __str__(self) -> str:
        return f"{self.path!r} is no path inside {self.root}: no '..', leading '/', empty part or link to elsewhere."


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One name in a directory."""

    name: str
    is_dir: bool
    size_bytes: int = 0


class Storage:
    """A directory, by URL or path. Paths given to its methods are relative to it, with `/` between the parts.

    Promises: nothing outside the root is read, written or deleted. On a local path every write is fsynced together
    with the directories it needs. On an object store a failed `open_output` may leave a shortened object: whoever
    writes several files commits them by a manifest, written last with `write_bytes`.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self._files: _Files
        if "://" in url and not url.startswith("file://"):
            try:
                filesystem, root = arrow_fs.FileSystem.from_uri(url)
            except (OSError, ValueError) as error:
                raise ConfigError("storage.url", url.split("@")[-1], f"cannot be opened ({error}).") from error
            self._files, self._root = _RemoteFiles(filesystem), root.rstrip("/")
        else:
            path = unquote(urlsplit(url).path) if url.startswith("file://") else url
            self._files, self._root = _LocalFiles(), os.path.abspath(os.path.expanduser(path))

    def __repr__(self) -> str:
        return f"Storage({self.uri()!r})"

    @property
    def is_local(self) -> bool:
        return isinstance(self._files, _LocalFiles)

    def join(self, *parts: str) -> Storage:
        """The storage whose root is a directory of this one."""
        path = "/".join(parts)
        inner = Storage.__new__(Storage)
        inner._files, inner._root = self._files, self._at(path)
        inner.url = self._root_url(path)
        return inner

    def uri(self, path: str = "") -> str:
        """Where `path` is, for people and records: an absolute path or a URL, never with a password."""
        at = self._at(path)
        if self.is_local:
            return at
        url = urlsplit(self._root_url(path))
        user, _, host = url.netloc.rpartition("@")
        netloc = f"{user.split(':')[0]}@{host}" if user else host
        return urlunsplit(url._replace(netloc=netloc))

    # -- writing -----------------------------------------------------------------------------------------------------

    def write_bytes(self, path: str, data: bytes) -> None:
        """Replaces the file in one step: a reader finds the old bytes or the new ones."""
        with self.open_output(path) as output:
            output.write(data)

    @contextmanager
    def open_output(self, path: str) -> Iterator[Output]:
        """A file to write to, from its beginning. It appears under its name when the block ends without an
        exception."""
        with self._files.open_output(self._at(path)) as output:
            yield output

    def delete(self, path: str) -> None:
        """Removes a file; does nothing if there is none."""
        self._files.delete(self._at(path))

    def delete_dir(self, path: str) -> None:
        """Removes a directory and all that is in it; does nothing if there is none."""
        if not path:
            raise UnsafePath(self.uri(), path)
        self._files.delete_dir(self._at(path))

    def check_writable(self) -> None:
        """Raises ConfigError when nothing can be written here; leaves nothing behind."""
        probe = f".orc-probe-{os.getpid()}"
        made: list[str] = []
        try:
            made = self._files.missing_directories(self._root)
            self.write_bytes(probe, b"probe")
            self.delete(probe)
        except OSError as error:
            why = f"cannot be written to ({error.strerror or error})."
            hint = "Choose a directory or bucket you may write to."
            raise ConfigError("storage.url", self.uri(), why, hint) from error
        finally:
            for directory in reversed(made):
                with suppress(OSError):
                    os.rmdir(directory)

    # -- reading -----------------------------------------------------------------------------------------------------

    def read_bytes(self, path: str) -> bytes:
        """Raises FileNotFoundError."""
        with self.open_input(path) as source:
            return source.read()

    @contextmanager
    def open_input(self, path: str) -> Iterator[BinaryIO]:
        """A file to read from. Raises FileNotFoundError."""
        with self._files.open_input(self._at(path)) as source:
            yield source

    def entries(self, path: str = "") -> list[Entry]:
        """What is in a directory, by name; nothing if there is none. Files still being written are not shown."""
        entries = self._files.entries(self._at(path))
        return sorted((entry for entry in entries if not entry.name.endswith(_PARTIAL)), key=lambda entry: entry.name)

    def files(self) -> Iterator[tuple[str, int]]:
        """Every file at any depth, with its size in bytes, by name. Links are left out, and what is still being
        written.
        """
        found = ((path, size) for path, size in self._files.walk(self._root) if not path.endswith(_PARTIAL))
        yield from sorted(found)

    def exists(self, path: str = "") -> bool:
        return self._files.size(self._at(path)) is not None

    def size_bytes(self, path: str) -> int:
        """Raises FileNotFoundError."""
        size = self._files.size(self._at(path))
        if size is None:
            raise FileNotFoundError(self.uri(path))
        return size

    # -- paths -------------------------------------------------------------------------------------------------------

    def _at(self, path: str) -> str:
        if not path:
            return self._root
        if any(part in ("", ".", "..") for part in path.split("/")) or "\0" in path or "\\" in path:
            raise UnsafePath(self._root, path)
        whole = f"{self._root}/{path}"
        if not self._files.is_inside(self._root, whole):
            raise UnsafePath(self._root, path)
        return whole

    def _root_url(self, path: str) -> str:
        if self.is_local:
            return self._at(path)
        url = urlsplit(self.url)
        return urlunsplit(url._replace(path=f"{url.path.rstrip('/')}/{path}" if path else url.path))


class Output(Protocol):
    def write(self, data: Any, /) -> int: ...


class _Files(Protocol):
    """What a kind of storage can do, by absolute path."""

    def open_output(self, path: str) -> Any: ...
    def open_input(self, path: str) -> Any: ...
    def delete(self, path: str) -> None: ...
    def delete_dir(self, path: str) -> None: ...
    def entries(self, path: str) -> list[Entry]: ...
    def walk(self, path: str) -> Iterator[tuple[str, int]]: ...
    def size(self, path: str) -> int | None: ...
    def is_inside(self, root: str, path: str) -> bool: ...
    def missing_directories(self, path: str) -> list[str]: ...


class _LocalFiles:
    @contextmanager
    def open_output(self, path: str) -> Iterator[Output]:
        directory = os.path.dirname(path)
        for missing in self.missing_directories(directory):
            with suppress(FileExistsError):  # another rank may make it at the same time
                os.mkdir(missing)
            _sync_directory(os.path.dirname(missing))
        partial = f"{path}.{os.getpid()}{_PARTIAL}"
        try:
            with open(partial, "wb") as output:
                yield output
                output.flush()
                os.fsync(output.fileno())
            os.replace(partial, path)
        except BaseException:
            with suppress(OSError):
                os.unlink(partial)
            raise
        _sync_directory(directory)

    def open_input(self, path: str) -> Any:
        return open(path, "rb")

    def delete(self, path: str) -> None:
        with suppress(FileNotFoundError):
            os.unlink(path)
            _sync_directory(os.path.dirname(path))

    def delete_dir(self, path: str) -> None:
        with suppress(FileNotFoundError):
            shutil.rmtree(path)
            _sync_directory(os.path.dirname(path))

    def entries(self, path: str) -> list[Entry]:
        try:
            with os.scandir(path) as found:
                return [
                    Entry(name=item.name, is_dir=item.is_dir(), size_bytes=0 if item.is_dir() else item.stat().st_size)
                    for item in found
                ]
        except FileNotFoundError:
            return []

    def walk(self, path: str) -> Iterator[tuple[str, int]]:
        for directory, _, names in os.walk(path):  # does not follow links
            for name in names:
                whole = os.path.join(directory, name)
                with suppress(FileNotFoundError):
                    status = os.lstat(whole)
                    if stat.S_ISREG(status.st_mode):
                        yield os.path.relpath(whole, path), status.st_size

    def size(self, path: str) -> int | None:
        try:
            return os.stat(path).st_size
        except (FileNotFoundError, NotADirectoryError):
            return None

    def is_inside(self, root: str, path: str) -> bool:
        return Path(os.path.realpath(path)).is_relative_to(os.path.realpath(root))

    def missing_directories(self, path: str) -> list[str]:
        """The directories that must be made for `path`, outermost first."""
        missing: list[str] = []
        while not os.path.isdir(path):
            if os.path.lexists(path) and not os.path.isdir(path):  # another process may have just made it
                raise NotADirectoryError(20, "is a file, not a directory", path)
            missing.append(path)
            path = os.path.dirname(path)
        return missing[::-1]


class _RemoteFiles:
    def __init__(self, filesystem: arrow_fs.FileSystem) -> None:
        self._filesystem = filesystem
        # Object stores have no directories; making one would leave an empty object.
        self._has_directories = filesystem.type_name not in ("s3", "gcs", "abfs")

    @contextmanager
    def open_output(self, path: str) -> Iterator[Output]:
        if self._has_directories:
            self._filesystem.create_dir(os.path.dirname(path), recursive=True)
        with self._filesystem.open_output_stream(path) as output:
            yield output

    def open_input(self, path: str) -> Any:
        return self._filesystem.open_input_stream(path)

    def delete(self, path: str) -> None:
        if self.size(path) is not None:
            self._filesystem.delete_file(path)

    def delete_dir(self, path: str) -> None:
        if self.size(path) is not None:
            self._filesystem.delete_dir(path)

    def entries(self, path: str) -> list[Entry]:
        found = self._filesystem.get_file_info(arrow_fs.FileSelector(path, allow_not_found=True))
        return [
            Entry(name=info.base_name, is_dir=info.type == arrow_fs.FileType.Directory, size_bytes=info.size or 0)
            for info in found
        ]

    def walk(self, path: str) -> Iterator[tuple[str, int]]:
        selector = arrow_fs.FileSelector(path, recursive=True, allow_not_found=True)
        for info in self._filesystem.get_file_info(selector):
            if info.type == arrow_fs.FileType.File:
                yield info.path.removeprefix(f"{path}/"), info.size or 0

    def size(self, path: str) -> int | None:
        info = self._filesystem.get_file_info(path)
        return None if info.type == arrow_fs.FileType.NotFound else info.size or 0

    def is_inside(self, root: str, path: str) -> bool:
        return path.startswith(f"{root}/")

    def missing_directories(self, path: str) -> list[str]:
        return []


def _sync_directory(path: str) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
