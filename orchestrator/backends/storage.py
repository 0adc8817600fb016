"""Files under one root, on a local path or anywhere pyarrow.fs reaches (`s3://`, `gs://`, `abfs://` …).

Local files do not go through pyarrow, whose local filesystem never fsyncs: here a file appears under its name
complete and durable, or not at all.
"""

from __future__ import annotations

import errno
import io
import mmap
import os
import re
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, ClassVar, Protocol
from urllib.parse import parse_qsl, unquote, urlsplit, urlunsplit

import numpy as np
import pyarrow
import pyarrow.fs as arrow_fs

from orchestrator import disk
from orchestrator.errors import ConfigError, UserError

_PARTIAL = ".partial"
"""Ending of a local file that is still being written."""
_PAGE_BYTES = 4096
"""What is written past the page cache is aligned to this, in memory and in the file."""
_BOUNCE_BYTES = 4 << 20
_LEFT_BEHIND = re.compile(r"\.(\d+)-[0-9a-f]+\.partial")
_CONNECT_TIMEOUT, _REQUEST_TIMEOUT, _ATTEMPTS = 10.0, 60.0, 3
"""Seconds and tries, for S3; a URL may say otherwise: `?connect_timeout=…&request_timeout=…&attempts=…`."""
_PATIENCE = 60
"""Seconds for which Google's library tries again; `?retry_limit_seconds=…` says otherwise. Its own default is 15
minutes."""
_SECRETS = re.compile(r"secret|password|token|signature|(^|_)key$|^sig$", re.IGNORECASE)
"""Options of a URL whose values are never shown."""
_CREDENTIALS = {
    "s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, ~/.aws/credentials or the machine's role",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS, `gcloud auth application-default login` or the machine's service account",
    "abfs": "AZURE_CLIENT_ID, AZURE_TENANT_ID and AZURE_CLIENT_SECRET, `az login` or the machine's managed identity",
}
_FORMS = {
    "s3": "s3://bucket/path?region=…",
    "gs": "gs://bucket/path",
    "abfs": "abfs://container@account.dfs.core.windows.net/path",
}
_KINDS = {"gcs": "gs", "abfss": "abfs"}


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
    modified: float = 0.0
    """Seconds since 1970; 0: the storage does not say."""


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
                filesystem, root = _s3(url) or arrow_fs.FileSystem.from_uri(_with_patience(url))
            except (OSError, ValueError, NotImplementedError, ImportError) as error:
                # Not `from error`: what pyarrow says may repeat the URL with its password, and a traceback shows it.
                why = f"cannot be opened ({_without_secrets(str(error), url)})."
                raise ConfigError("storage.url", shown(url), why, _hint(url)) from None
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
        return shown(self._root_url(path))

    def above(self, levels: int) -> Storage | None:
        """The storage whose root is so many directories further out; None where there is none."""
        parts = self._root.split("/")
        if len(parts) - levels < (2 if self.is_local else 1):
            return None
        outer = Storage.__new__(Storage)
        outer._files, outer._root = self._files, "/".join(parts[:-levels])
        if self.is_local:
            outer.url = outer._root
        else:
            url = urlsplit(self.url)
            outer.url = urlunsplit(url._replace(path="/".join(url.path.rstrip("/").split("/")[:-levels])))
        return outer

    @property
    def parts(self) -> tuple[str, ...]:
        """Names of the directories on the way to the root."""
        return tuple(part for part in self._root.split("/") if part)

    # -- writing -----------------------------------------------------------------------------------------------------

    def write_bytes(self, path: str, data: bytes, *, is_durable: bool = True) -> None:
        """Replaces the file in one step: a reader finds the old bytes or the new ones. What is not durable may be
        empty or the old one after a loss of power, on a local disk, and costs no wait for it."""
        with self._files.open_output(self._at(path), is_durable) as output:
            output.write(data)

    @contextmanager
    def open_output(self, path: str) -> Iterator[Output]:
        """A file to write to, from its beginning. It appears under its name when the block ends without an
        exception."""
        with self._files.open_output(self._at(path), True) as output:
            yield output

    @contextmanager
    def open_image(self, path: str, size_bytes: int) -> Iterator[ImageOutput]:
        """A file of known size, to be written from its beginning and, on a local disk, past the page cache.

        It appears under its name when the block ends without an exception; ValueError if it then has not `size_bytes`
        bytes. A full disk is an OSError as early as the file system can tell.
        """
        with self._files.open_image(self._at(path), size_bytes) as output:
            yield output

    def take(self, source: Storage, path: str) -> None:
        """The file of the same path in `source` lies here as well afterwards, whole and durable: as a second name of it
        on one local disk, copied by the store itself where both lie in one, else read and written. Whoever replaces or
        deletes one of them does not touch the other. Raises FileNotFoundError."""
        theirs, ours = source._at(path), self._at(path)
        if type(source._files) is type(self._files) and self._files.copy(source._files, theirs, ours):
            return
        with source.open_input(path) as reader, self.open_output(path) as output:
            shutil.copyfileobj(reader, output, _BOUNCE_BYTES)

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
            why = f"cannot be written to ({_without_secrets(error.strerror or str(error), self.url)})."
            hint = "Choose a directory you may write to." if self.is_local else _hint(self.url)
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

    def partial_files(self, *, older_than: float) -> list[str]:
        """Files that whoever was killed had not written to their ends, at any depth: they did not change since
        `older_than` (seconds since 1970), and no process of that number lives on this host. None on an object store,
        where nothing is seen before it is complete."""
        return sorted(self._files.partial_files(self._root, older_than))

    def exists(self, path: str = "") -> bool:
        return self._files.size(self._at(path)) is not None

    def size_bytes(self, path: str) -> int:
        """Raises FileNotFoundError."""
        size = self._files.size(self._at(path))
        if size is None:
            raise FileNotFoundError(self.uri(path))
        return size

    def modified(self, path: str = "") -> float:
        """Seconds since 1970 when anything at or below `path` changed last, files still being written included; 0 if
        nothing is there or the storage does not say."""
        return self._files.modified(self._at(path))

    def free_bytes(self) -> int | None:
        """What can still be written here; None: the storage does not say."""
        return self._files.free_bytes(self._root)

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


class ImageOutput(Protocol):
    """Takes the bytes of one file in order. What begins at a multiple of 4096 in memory and in the file goes straight
    to the disk, the rest by way of 4 MiB of our own memory. The memory may be reused as soon as `write` returns."""

    def write(self, data: memoryview, /) -> None: ...


class _Files(Protocol):
    """What a kind of storage can do, by absolute path."""

    def open_output(self, path: str, is_durable: bool) -> Any: ...
    def open_image(self, path: str, size_bytes: int) -> Any: ...
    def open_input(self, path: str) -> Any: ...
    def copy(self, theirs: Any, source: str, path: str) -> bool:
        """Copies a file of `theirs`, which is of the same kind, without reading it; False where that cannot be."""
        ...

    def delete(self, path: str) -> None: ...
    def delete_dir(self, path: str) -> None: ...
    def entries(self, path: str) -> list[Entry]: ...
    def walk(self, path: str) -> Iterator[tuple[str, int]]: ...
    def partial_files(self, path: str, older_than: float) -> list[str]: ...
    def size(self, path: str) -> int | None: ...
    def modified(self, path: str) -> float: ...
    def free_bytes(self, path: str) -> int | None: ...
    def is_inside(self, root: str, path: str) -> bool: ...
    def missing_directories(self, path: str) -> list[str]: ...


class _LocalFiles:
    @contextmanager
    def open_output(self, path: str, is_durable: bool) -> Iterator[Output]:
        replacing = self._replacing(path, is_durable)
        with replacing as partial, io.BufferedWriter(_WatchedFile(partial, "wb")) as output:
            yield output
            output.flush()
            if is_durable:
                disk.fsync(output.fileno(), partial)

    @contextmanager
    def open_image(self, path: str, size_bytes: int) -> Iterator[ImageOutput]:
        with self._replacing(path) as partial:
            image = _LocalImage(partial, size_bytes)
            try:
                yield image
                image.finish()
            finally:
                image.close()

    @contextmanager
    def _replacing(self, path: str, is_durable: bool = True) -> Iterator[str]:
        """A name to write to; the file gets its own when the block ends without an exception."""
        directory = os.path.dirname(path)
        self._make_directories(directory)
        # Not only the process id: two hosts, or two threads, may write the same file at the same time.
        partial = f"{path}.{os.getpid()}-{os.urandom(4).hex()}{_PARTIAL}"
        try:
            yield partial
            disk.replace(partial, path)
        except BaseException:
            with suppress(OSError):
                os.unlink(partial)
            raise
        if is_durable:
            disk.fsync_directory(directory)

    def _make_directories(self, path: str) -> None:
        for _ in range(4):
            try:
                return self._make_missing(path)
            except FileNotFoundError:  # removed behind our back, or NFS remembers that it was not there
                continue
        self._make_missing(path)

    def _make_missing(self, path: str) -> None:
        for missing in self.missing_directories(path):
            with suppress(FileExistsError):  # another rank may make it at the same time
                disk.mkdir(missing)
            disk.fsync_directory(os.path.dirname(missing))

    def open_input(self, path: str) -> Any:
        return open(path, "rb")

    def copy(self, theirs: _LocalFiles, source: str, path: str) -> bool:
        if os.path.exists(path) and os.path.samefile(source, path):
            return True  # to rename one name of a file to another one of it does nothing
        try:
            with self._replacing(path) as partial:
                os.link(source, partial)
        except OSError as error:
            if error.errno not in (errno.EXDEV, errno.EPERM, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EMLINK):
                raise
            return False
        return True

    def delete(self, path: str) -> None:
        if os.path.lexists(path):
            disk.unlink(Path(path))
            disk.fsync_directory(os.path.dirname(path))

    def delete_dir(self, path: str) -> None:
        with suppress(FileNotFoundError):
            disk.remove_tree(path)
            disk.fsync_directory(os.path.dirname(path))

    def entries(self, path: str) -> list[Entry]:
        entries = []
        with suppress(FileNotFoundError), os.scandir(path) as found:
            for item in found:
                with suppress(FileNotFoundError):  # removed meanwhile, or a link to nothing
                    status = item.stat()
                    is_dir = stat.S_ISDIR(status.st_mode)
                    size = 0 if is_dir else status.st_size
                    entries.append(Entry(name=item.name, is_dir=is_dir, size_bytes=size, modified=status.st_mtime))
        return entries

    def walk(self, path: str) -> Iterator[tuple[str, int]]:
        for directory, _, names in os.walk(path):  # does not follow links
            for name in names:
                whole = os.path.join(directory, name)
                with suppress(FileNotFoundError):
                    status = os.lstat(whole)
                    if stat.S_ISREG(status.st_mode):
                        yield os.path.relpath(whole, path), status.st_size

    def partial_files(self, path: str, older_than: float) -> list[str]:
        found = []
        for directory, _, names in os.walk(path):
            for name in names:
                if (left := _LEFT_BEHIND.search(name)) and left.end() == len(name):
                    whole = os.path.join(directory, name)
                    if 0 < _modified(whole) < older_than and not os.path.exists(f"/proc/{left[1]}"):
                        found.append(os.path.relpath(whole, path))
        return found

    def size(self, path: str) -> int | None:
        try:
            return os.stat(path).st_size
        except (FileNotFoundError, NotADirectoryError):
            return None

    def modified(self, path: str) -> float:
        latest = _modified(path)
        for directory, inner, names in os.walk(path):
            latest = max(latest, *(_modified(os.path.join(directory, name)) for name in (*inner, *names)), 0.0)
        return latest

    def free_bytes(self, path: str) -> int | None:
        while not os.path.lexists(path):
            path = os.path.dirname(path)
        status = os.statvfs(path)
        return status.f_bavail * status.f_frsize

    def is_inside(self, root: str, path: str) -> bool:
        if not self._has_link(root, path):
            return True
        return Path(os.path.realpath(path)).is_relative_to(os.path.realpath(root))

    def _has_link(self, root: str, path: str) -> bool:
        """Whether anything below `root` on the way to `path` is a link. A look for each part below the root: to resolve
        both paths whole is a tenth of what writing a small checkpoint costs."""
        step = root
        for part in path[len(root) + 1 :].split("/"):
            step = f"{step}/{part}"
            try:
                if stat.S_ISLNK(os.lstat(step).st_mode):
                    return True
            except FileNotFoundError:
                return False  # nor is there anything behind it
            except OSError:
                return True  # whoever resolves it may know more
        return False

    def missing_directories(self, path: str) -> list[str]:
        """The directories that must be made for `path`, outermost first."""
        missing: list[str] = []
        while not os.path.isdir(path):
            if os.path.lexists(path) and not os.path.isdir(path):  # another process may have just made it
                raise NotADirectoryError(20, "is a file, not a directory", path)
            missing.append(path)
            path = os.path.dirname(path)
        return missing[::-1]


class _WatchedFile(io.FileIO):
    """A file whose writes are seen by `disk`."""

    def write(self, data: Any, /) -> int:
        return disk.write(self.fileno(), data, str(self.name))


class _LocalImage:
    """Writes one file past the page cache, through it where the file system does not know how."""

    _buffered_devices: ClassVar[set[int]] = set()
    """Of this process: devices that refused O_DIRECT."""

    def __init__(self, path: str, size_bytes: int) -> None:
        self._path, self._size = path, size_bytes
        self._taken = 0
        self._at = 0
        """What lies on the disk: a multiple of 4096 while it goes there directly."""
        self._held = 0
        """What lies in the bounce buffer."""
        self._bounce: mmap.mmap | None = None
        self._device = os.stat(os.path.dirname(path)).st_dev
        self._is_direct = size_bytes > 0 and self._device not in self._buffered_devices
        self._fd = -1
        if self._is_direct:
            try:
                self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_DIRECT, 0o666)
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
                self._use_page_cache()
        if self._fd < 0:
            self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o666)
        if self._is_direct:
            self._allocate()

    def write(self, data: memoryview, /) -> None:
        data = memoryview(data).cast("B")
        self._taken += len(data)
        if self._taken > self._size:
            raise ValueError(f"more than {self._size} bytes for {self._path}")
        while data:
            if not self._is_direct:
                data = data[self._put(data) :]
            elif len(data) >= _PAGE_BYTES and self._held % _PAGE_BYTES == 0 and _address(data) % _PAGE_BYTES == 0:
                self._empty()
                data = data[self._put(data[: len(data) // _PAGE_BYTES * _PAGE_BYTES]) :]
            else:
                data = data[self._hold(data) :]

    def finish(self) -> None:
        """What is held goes to the disk, and all of it is durable."""
        if self._taken != self._size:
            raise ValueError(f"{self._taken} bytes for {self._path} instead of {self._size}")
        if self._held and self._bounce is not None:
            end = -(-self._held // _PAGE_BYTES) * _PAGE_BYTES
            self._bounce[self._held : end] = bytes(end - self._held)
            self._held = end
            self._empty()
        if os.fstat(self._fd).st_size != self._size:  # longer, by what was allocated or padded
            disk.truncate(self._fd, self._size, self._path)
        disk.fdatasync(self._fd, self._path)

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
        self._bounce = None  # not closed: whoever holds a view of it would make that an error

    def _hold(self, data: memoryview) -> int:
        """Keeps some of it: as much as there is room for, or only to the next page if the rest can go straight."""
        if self._bounce is None:
            self._bounce = mmap.mmap(-1, min(_BOUNCE_BYTES, -(-self._size // _PAGE_BYTES) * _PAGE_BYTES))
        count = min(len(self._bounce) - self._held, len(data))
        to_page = -self._held % _PAGE_BYTES
        if 0 < to_page < count and (_address(data) + to_page) % _PAGE_BYTES == 0:
            count = to_page
        self._bounce[self._held : self._held + count] = data[:count]
        self._held += count
        if self._held == len(self._bounce):
            self._empty()
        return count

    def _empty(self) -> None:
        if self._bounce is None or not self._held:
            return
        data, self._held = memoryview(self._bounce)[: self._held], 0
        while data:
            data = data[self._put(data) :]

    def _put(self, data: memoryview) -> int:
        """Writes some of it; at least a page, or at least a byte through the page cache."""
        try:
            count = disk.pwrite(self._fd, data, self._at, self._path)
        except OSError as error:
            if error.errno != errno.EINVAL or not self._is_direct or self._at:
                raise
            os.close(self._fd)
            self._fd = -1
            self._use_page_cache()
            self._fd = os.open(self._path, os.O_WRONLY | os.O_CLOEXEC)
            count = disk.pwrite(self._fd, data, self._at, self._path)
        if self._is_direct:
            count -= count % _PAGE_BYTES
        if not count:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), self._path)
        self._at += count
        return count

    def _use_page_cache(self) -> None:
        self._is_direct = False
        self._buffered_devices.add(self._device)

    def _allocate(self) -> None:
        try:
            disk.reserve(self._fd, -(-self._size // _PAGE_BYTES) * _PAGE_BYTES, self._path)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
                self.close()
                raise


class _RemoteFiles:
    def __init__(self, filesystem: arrow_fs.FileSystem) -> None:
        self._filesystem = filesystem
        # Object stores have no directories; making one would leave an empty object.
        self._has_directories = filesystem.type_name not in ("s3", "gcs", "abfs")

    @contextmanager
    def open_output(self, path: str, is_durable: bool = True) -> Iterator[Output]:
        with _as_os_errors():
            if self._has_directories:
                self._filesystem.create_dir(os.path.dirname(path), recursive=True)
            with self._filesystem.open_output_stream(path) as output:
                yield output

    @contextmanager
    def open_image(self, path: str, size_bytes: int) -> Iterator[ImageOutput]:
        """Parts are sent in the background while the next is written."""
        with self.open_output(path) as output:
            image = _RemoteImage(output)
            yield image
            if image.written != size_bytes:
                raise ValueError(f"{image.written} bytes for {path} instead of {size_bytes}")

    def open_input(self, path: str) -> Any:
        with _as_os_errors():
            return self._filesystem.open_input_stream(path)

    def copy(self, theirs: _RemoteFiles, source: str, path: str) -> bool:
        if not self._filesystem.equals(theirs._filesystem):
            return False
        with _as_os_errors():
            if self._has_directories:
                self._filesystem.create_dir(os.path.dirname(path), recursive=True)
            self._filesystem.copy_file(source, path)
        return True

    def delete(self, path: str) -> None:
        if self.size(path) is not None:
            with _as_os_errors():
                self._filesystem.delete_file(path)

    def delete_dir(self, path: str) -> None:
        if self.size(path) is not None:
            with _as_os_errors():
                self._filesystem.delete_dir(path)

    def entries(self, path: str) -> list[Entry]:
        return [
            Entry(
                name=info.base_name, is_dir=info.type == arrow_fs.FileType.Directory, size_bytes=info.size or 0,
                modified=_seconds(info),
            )
            for info in self._below(path)
        ]  # fmt: skip

    def walk(self, path: str) -> Iterator[tuple[str, int]]:
        for info in self._below(path, recursive=True):
            if info.type == arrow_fs.FileType.File:
                yield info.path.removeprefix(f"{path}/"), info.size or 0

    def partial_files(self, path: str, older_than: float) -> list[str]:
        return []

    def size(self, path: str) -> int | None:
        with _as_os_errors():
            info = self._filesystem.get_file_info(path)
        return None if info.type == arrow_fs.FileType.NotFound else info.size or 0

    def modified(self, path: str) -> float:
        return max((_seconds(info) for info in self._below(path, recursive=True)), default=0.0)

    def free_bytes(self, path: str) -> int | None:
        return None

    def is_inside(self, root: str, path: str) -> bool:
        return path.startswith(f"{root}/")

    def missing_directories(self, path: str) -> list[str]:
        return []

    def _below(self, path: str, *, recursive: bool = False) -> list[arrow_fs.FileInfo]:
        selector = arrow_fs.FileSelector(path, recursive=recursive, allow_not_found=True)
        with _as_os_errors():
            return self._filesystem.get_file_info(selector)  # type: ignore[no-any-return]


@contextmanager
def _as_os_errors() -> Iterator[None]:
    """Some of what goes wrong at a store, missing credentials among it, pyarrow raises as errors of its own."""
    try:
        yield
    except OSError:
        raise
    except pyarrow.ArrowException as error:
        raise OSError(str(error)) from error


class _RemoteImage:
    def __init__(self, output: Output) -> None:
        self._output = output
        self.written = 0

    def write(self, data: memoryview, /) -> None:
        data = memoryview(data).cast("B")
        if data:
            self._output.write(data)
            self.written += len(data)


def _s3(url: str) -> tuple[arrow_fs.FileSystem, str] | None:
    """An S3 file system that does not wait for ever; None for URLs of other kinds or with options that only pyarrow
    knows. Raises ValueError, OSError."""
    parts = urlsplit(url)
    options = dict(parse_qsl(parts.query))
    if "/" in _credentials(f"{parts.netloc}{parts.path}")[1]:
        raise ValueError("a '/' in the secret key has to be written as %2F")
    known = {"region", "scheme", "endpoint_override", "connect_timeout", "request_timeout", "attempts"}
    if parts.scheme != "s3" or not parts.hostname or set(options) - known:
        return None
    bucket = parts.netloc.rpartition("@")[2]
    region = options.get("region")
    if region is None and "endpoint_override" not in options:
        region = arrow_fs.resolve_s3_region(bucket)
    user, secret = (None if part is None else unquote(part) for part in (parts.username, parts.password))
    filesystem = arrow_fs.S3FileSystem(
        access_key=user if secret is not None else None,
        secret_key=secret,
        region=region,
        scheme=options.get("scheme", "https"),
        endpoint_override=options.get("endpoint_override"),
        connect_timeout=float(options.get("connect_timeout", _CONNECT_TIMEOUT)),
        request_timeout=float(options.get("request_timeout", _REQUEST_TIMEOUT)),
        allow_delayed_open=True,  # a small file, the manifest above all, is one request instead of three
        retry_strategy=arrow_fs.AwsStandardS3RetryStrategy(max_attempts=int(options.get("attempts", _ATTEMPTS))),
    )
    return filesystem, f"{bucket}{unquote(parts.path)}"


def _with_patience(url: str) -> str:
    """Google's library would try for 15 minutes what will never be."""
    parts = urlsplit(url)
    if _kind(url) != "gs" or "retry_limit_seconds" in dict(parse_qsl(parts.query)):
        return url
    return urlunsplit(parts._replace(query="&".join(filter(None, (parts.query, f"retry_limit_seconds={_PATIENCE}")))))


def shown(url: str) -> str:
    """A storage's URL without passwords: what may be told to people and written down."""
    if "://" not in url:
        return url
    scheme, _, rest = url.partition("://")
    place, mark, query = rest.partition("?")
    user, _, where = _credentials(place)
    options = [
        f"{name}=***" if equals and _SECRETS.search(name) else f"{name}{equals}{value}"
        for name, equals, value in (option.partition("=") for option in query.split("&"))
    ]
    return f"{scheme}://{f'{user}@' if user else ''}{where}{mark}{'&'.join(options)}"


def _credentials(place: str) -> tuple[str, str, str]:
    """User, password and the rest of what a URL has after its scheme. A password with a '/' is none in a URL, but a
    password all the same."""
    authority, slash, path = place.partition("/")
    if "@" in authority:
        told, _, host = authority.rpartition("@")
        where = f"{host}{slash}{path}"
    elif ":" in authority and "@" in path and not authority.rpartition(":")[2].isdigit():
        told, _, where = place.rpartition("@")
    else:
        return "", "", place
    user, _, password = told.partition(":")
    return user, password, where


def _without_secrets(words: str, url: str) -> str:
    """The first line of what a library says, which may repeat the URL or parts of it."""
    words = (words.strip().splitlines() or [""])[0].replace(url, shown(url))
    place, _, query = url.partition("://")[2].partition("?")
    secrets = [_credentials(place)[1]]
    secrets += [value for name, _, value in (each.partition("=") for each in query.split("&")) if _SECRETS.search(name)]
    for secret in filter(None, secrets):
        words = words.replace(secret, "***").replace(unquote(secret), "***")
    return (f"{words[:300]}…" if len(words) > 300 else words).rstrip(".")


def _kind(url: str) -> str:
    scheme = url.partition("://")[0].lower()
    return _KINDS.get(scheme, scheme)


def _hint(url: str) -> str:
    """What to do about a storage that cannot be opened or used."""
    kind = _kind(url)
    if kind not in _FORMS:
        return f"Known are local paths, {', '.join(_FORMS.values())}, and what else this pyarrow was built with."
    return f"It is written as {_FORMS[kind]}; it takes its credentials from {_CREDENTIALS[kind]}."


def _address(data: memoryview) -> int:
    return int(np.frombuffer(data, dtype=np.uint8).ctypes.data)


def _modified(path: str) -> float:
    try:
        return os.lstat(path).st_mtime
    except OSError:
        return 0.0


def _seconds(info: arrow_fs.FileInfo) -> float:
    return (info.mtime_ns or 0) / 1e9
